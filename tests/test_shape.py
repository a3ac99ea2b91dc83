"""Rewards made of answers: weights, callables, potentials, and what is told of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from wrapping import KEYS, Toy, Witness, answer, batch, make_model, make_qa, run_single, run_vec, toys

from sb3_qa import QAError, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.wrappers import AnswerQuestions, ShapeReward, VecShapeReward, VecVetoAction, VetoAction
from sb3_qa.wrappers.shape import potential_shaping

ACTIONS = np.random.default_rng(3).integers(3, size=(23, 2))
WEIGHTS = {"danger": -2.0, "speed": 0.5, "crash[k=1]": -1.0}
STATE_WEIGHTS = {"danger": -2.0, "speed": 0.5}


@pytest.fixture(scope="module")
def qa():
    return make_qa()


def weighted(qa, weights, moment):
    return sum(weight * float(answer(qa, key, moment)) for key, weight in weights.items())


def phi(qa, obs):
    return sum(weight * float(qa.ask(key, batch(obs)).value[0]) for key, weight in STATE_WEIGHTS.items())


def steps(moments):
    return [moment for moment in moments if moment.before is not None]


def both_forms(qa, *arguments, **more):
    """Moments of each environment in the single form and in the vector form."""
    single = [run_single(ShapeReward(Toy(), *arguments, qa=qa, **more), ACTIONS[:, 0])]
    return single + run_vec(VecShapeReward(toys(2), *arguments, qa=qa, **more), ACTIONS)


@pytest.mark.parametrize("mode", ["add", "replace", "potential"])
def test_a_reward_that_is_not_finite_stops_before_an_agent_learns_from_it(mode):
    """Once weights are nan, everything is."""

    def broken(answers):
        return np.where(np.arange(len(answers["danger"])) == 0, np.nan, answers["danger"])

    for env, action in ((ShapeReward, 1), (VecShapeReward, np.ones(2, np.int64))):
        env = env(Toy() if env is ShapeReward else toys(2), broken, mode, 0.9, qa=make_qa())
        with pytest.raises(
            QAError, match=r"reward nan of environment 0, from the answers \{.*\}; expected a finite number"
        ):
            env.reset()
            env.step(action)


class TestPotentialShaping:
    def test_by_hand(self):
        before, after = np.array([1.0, 2.0, -3.0], np.float32), np.array([4.0, 5.0, -1.0], np.float32)
        shaping = potential_shaping(before, after, np.array([False, True, False]), 0.5)
        np.testing.assert_allclose(shaping, [0.5 * 4 - 1, -2.0, 0.5 * -1 + 3])
        assert shaping.dtype == np.float32

    def test_undiscounted(self):
        shaping = potential_shaping(np.array([1.0]), np.array([4.0]), np.array([False]), 1.0)
        np.testing.assert_allclose(shaping, [3.0])

    @settings(deadline=None)
    @given(
        potential=arrays(
            np.float32, st.tuples(st.integers(2, 30), st.integers(1, 3)), elements=st.floats(-10, 10, width=32)
        ),
        gamma=st.floats(0, 1),
        data=st.data(),
    )
    def test_the_discounted_sum_telescopes(self, potential, gamma, data):
        """sum of gamma^t F_t = gamma^T Phi(s_T) - Phi(s_0), where the first part is 0 if s_T is terminal."""
        n_steps, n = len(potential) - 1, potential.shape[1]
        terminates = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        total = np.zeros(n)
        for t in range(n_steps):
            terminated = terminates & (t == n_steps - 1)
            total += gamma**t * potential_shaping(potential[t], potential[t + 1], terminated, gamma)
        expected = np.where(terminates, 0.0, gamma**n_steps * potential[-1]) - potential[0]
        np.testing.assert_allclose(total, expected, atol=1e-4)


class TestModes:
    def test_add(self, qa):
        bare = steps(run_single(AnswerQuestions(Toy(), ["speed"], qa=qa), ACTIONS[:, 0]))
        each = both_forms(qa, WEIGHTS)
        for moments in each:
            for moment in steps(moments):
                shaping = weighted(qa, WEIGHTS, moment)
                assert abs(shaping) > 1e-3
                assert moment.told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-4, abs=1e-5)
                assert moment.reward == pytest.approx(moment.told["qa/raw_reward"] + shaping, rel=1e-4, abs=1e-5)
        assert [moment.told["qa/raw_reward"] for moment in steps(each[0])] == [moment.reward for moment in bare]

    def test_replace(self, qa):
        bare = steps(run_single(AnswerQuestions(Toy(), ["speed"], qa=qa), ACTIONS[:, 0]))
        each = both_forms(qa, WEIGHTS, mode="replace")
        for moments in each:
            for moment in steps(moments):
                shaping = weighted(qa, WEIGHTS, moment)
                assert moment.reward == pytest.approx(shaping, rel=1e-4, abs=1e-5)
                assert moment.told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-4, abs=1e-5)
        assert [moment.told["qa/raw_reward"] for moment in steps(each[0])] == [moment.reward for moment in bare]

    def test_callable_gets_each_answer_as_an_array(self, qa):
        seen = []

        def rewards(told):
            seen.append({key: value.shape for key, value in told.items()})
            return np.where(told["danger"] > 0.5, -1.0, told["crash[k=3]"])

        for moments in both_forms(qa, rewards):
            for moment in steps(moments):
                danger, crash = (answer(qa, key, moment) for key in ("danger", "crash[k=3]"))
                shaping = -1.0 if danger > 0.5 else crash
                assert moment.told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-4, abs=1e-5)
        assert {tuple(shapes) for shapes in seen} == {tuple(KEYS)}
        assert {shape for shapes in seen for shape in shapes.values()} == {(1,), (2,)}

    def test_callable_may_give_one_number_for_all(self, qa):
        for moments in both_forms(qa, lambda told: 0.25):
            assert [moment.told["qa/shaping_reward"] for moment in steps(moments)] == pytest.approx(
                [0.25] * 23, rel=1e-4
            )

    def test_callable_of_another_shape(self, qa):
        env = VecShapeReward(toys(2), lambda told: np.zeros((2, 1)), qa=qa)
        env.reset()
        with pytest.raises(QAError, match=r"rewards callable gave the shape \(2, 1\); expected \(2,\)"):
            env.step(np.array([0, 0]))

    def test_later_changes_of_the_weights_do_not_count(self, qa):
        weights = {"danger": -2.0}
        env = ShapeReward(Toy(), weights, qa=qa)
        weights["danger"] = 100.0
        for moment in steps(run_single(env, ACTIONS[:, 0])):
            assert moment.told["qa/shaping_reward"] == pytest.approx(-2.0 * answer(qa, "danger", moment), rel=1e-4)


class TestPotential:
    @pytest.mark.parametrize("rewards", [STATE_WEIGHTS, lambda told: -2.0 * told["danger"] + 0.5 * told["speed"]])
    def test_each_step(self, qa, rewards):
        n_terminated = n_truncated = 0
        for moments in both_forms(qa, rewards, mode="potential", gamma=0.9):
            for moment in steps(moments):
                after = 0.0 if moment.terminated else phi(qa, moment.after)
                shaping = 0.9 * after - phi(qa, moment.before)
                assert moment.told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-3, abs=1e-5)
                assert moment.reward == pytest.approx(moment.told["qa/raw_reward"] + shaping, rel=1e-3, abs=1e-5)
                n_terminated += moment.terminated
                n_truncated += moment.truncated
        assert (n_terminated, n_truncated) == (6, 5)

    def test_an_episode_telescopes(self, qa):
        """A terminal state has the potential 0; one that is only cut off has its own."""
        for moments in both_forms(qa, STATE_WEIGHTS, mode="potential", gamma=0.9):
            episodes = []
            for moment in moments:
                if moment.before is None:
                    episodes.append([])
                else:
                    episodes[-1].append(moment)
            for episode, terminates in zip(episodes[:3], (True, False, True), strict=True):
                assert (episode[-1].terminated, episode[-1].truncated) == (terminates, not terminates)
                total = sum(0.9**t * moment.told["qa/shaping_reward"] for t, moment in enumerate(episode))
                at_end = 0.0 if terminates else 0.9 ** len(episode) * phi(qa, episode[-1].after)
                assert abs(phi(qa, episode[-1].after)) > 1e-2
                assert total == pytest.approx(at_end - phi(qa, episode[0].before), rel=1e-3, abs=1e-4)

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_a_reset_in_the_middle_of_an_episode_begins_anew(self, qa, form):
        arguments = dict(rewards=STATE_WEIGHTS, mode="potential", gamma=0.9, qa=qa)
        env = ShapeReward(Toy(), **arguments) if form == "single" else VecShapeReward(toys(1), **arguments)
        run = run_single if form == "single" else lambda *given: run_vec(*given)[0]
        for n in (3, 2):  # the second run begins two steps before the first one's episode would end
            actions = ACTIONS[:n, 0] if form == "single" else ACTIONS[:n, :1]
            for moment in steps(run(env, actions)):
                shaping = 0.9 * phi(qa, moment.after) - phi(qa, moment.before)
                assert moment.told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_learning_fills_in_the_discount(self, form):
        rewards = dict(rewards=STATE_WEIGHTS, mode="potential")
        env = (
            VecShapeReward(toys(2), **rewards) if form == "vector" else toys(2, lambda toy: ShapeReward(toy, **rewards))
        )

        class Look(Witness):
            def _on_step(self):
                super()._on_step()
                for i, info in enumerate(self.locals["infos"]):
                    done = self.locals["dones"][i]
                    after = info["terminal_observation"] if done else self.locals["new_obs"][i]
                    terminated = done and not info["TimeLimit.truncated"]
                    potential = 0.0 if terminated else phi(self.qa, after)
                    shaping = 0.75 * potential - phi(self.qa, self.model._last_obs[i])
                    if self.n_steps != 17:  # the potential left was told before the update
                        assert info["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-3, abs=1e-5)
                    total = info["qa/raw_reward"] + info["qa/shaping_reward"]
                    assert self.locals["rewards"][i] == pytest.approx(total, rel=1e-4, abs=1e-5)
                return True

        look = Look(keys=list(STATE_WEIGHTS))
        make_model(env, gamma=0.75, n_steps=16).learn(64, [QACallback(), look])
        assert (look.n_steps, look.n_ended) == (32, 11)

    def test_a_discount_of_ones_own_is_kept(self):
        env = VecShapeReward(toys(), STATE_WEIGHTS, mode="potential", gamma=0.5)
        make_model(env, gamma=0.75).learn(32, QACallback())
        assert env.rule.discount == 0.5

    def test_without_a_discount(self, qa):
        with pytest.raises(
            QAError, match=r'mode="potential" without gamma; expected the agent\'s discount; give gamma='
        ):
            ShapeReward(Toy(), STATE_WEIGHTS, mode="potential", qa=qa)
        env = VecShapeReward(toys(), STATE_WEIGHTS, mode="potential")
        with pytest.raises(QAError, match="without gamma"):
            env.bind(qa)

    def test_a_question_about_an_action(self, qa):
        with pytest.raises(
            QAError, match=r"'crash\[k=1\]' in mode=\"potential\"; expected a question about the state; drop \{action\}"
        ):
            ShapeReward(Toy(), {"crash[k=1]": -1.0}, mode="potential", gamma=0.9, qa=qa)

    def test_a_callable_is_told_of_the_state_only(self, qa):
        seen = set()
        env = ShapeReward(Toy(), lambda told: seen.update(told) or 0.0, mode="potential", gamma=0.9, qa=qa)
        run_single(env, ACTIONS[:3, 0])
        assert seen == {"danger", "speed", "lane"}


class TestNested:
    """Raw and shaping rewards add up over all wrappers, whichever is outside."""

    def test_adding_twice(self, qa):
        env = ShapeReward(ShapeReward(Toy(), {"danger": -2.0}, qa=qa), {"speed": 0.5}, qa=qa)
        bare = steps(run_single(AnswerQuestions(Toy(), [], qa=qa), ACTIONS[:, 0]))
        for moment, plain in zip(steps(run_single(env, ACTIONS[:, 0])), bare, strict=True):
            shaping = weighted(qa, STATE_WEIGHTS, moment)
            assert moment.told["qa/raw_reward"] == plain.reward
            assert moment.told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-4)
            assert moment.reward == pytest.approx(plain.reward + shaping, rel=1e-4)

    @pytest.mark.parametrize("outer", ["veto", "shape"])
    def test_adding_to_what_replaced_the_reward(self, qa, outer):
        """What replaced the reward, and what was added to that, are all shaping."""
        env = ShapeReward(Toy(), {"danger": -2.0}, mode="replace", qa=qa)
        if outer == "veto":
            env = VetoAction(env, "crash[k=1]", 0.5, penalty=0.5, qa=qa)
        else:
            env = ShapeReward(env, {"speed": 0.5}, qa=qa)
        bare = run_single(VetoAction(Toy(), "crash[k=1]", 0.5 if outer == "veto" else 1.0, qa=qa), ACTIONS[:, 0])
        for moment, plain in zip(steps(run_single(env, ACTIONS[:, 0])), steps(bare), strict=True):
            added = -0.5 * moment.told["qa/vetoed"] if outer == "veto" else 0.5 * answer(qa, "speed", moment)
            assert moment.told["qa/raw_reward"] == plain.reward
            assert moment.reward == pytest.approx(-2.0 * answer(qa, "danger", moment) + added, rel=1e-4)
            assert moment.told["qa/shaping_reward"] == pytest.approx(moment.reward, rel=1e-4)

    def test_replacing_what_was_added(self, qa):
        env = ShapeReward(ShapeReward(Toy(), {"danger": -2.0}, qa=qa), {"speed": 0.5}, mode="replace", qa=qa)
        bare = steps(run_single(AnswerQuestions(Toy(), [], qa=qa), ACTIONS[:, 0]))
        for moment, plain in zip(steps(run_single(env, ACTIONS[:, 0])), bare, strict=True):
            assert moment.told["qa/raw_reward"] == plain.reward
            assert moment.reward == pytest.approx(0.5 * answer(qa, "speed", moment), rel=1e-4)
            assert moment.told["qa/shaping_reward"] == pytest.approx(moment.reward, rel=1e-4)

    @pytest.mark.parametrize("shape_outside", [True, False])
    def test_a_question_about_an_action_is_about_the_one_executed(self, qa, shape_outside):
        weights = {"crash[k=3]": -3.0}
        if shape_outside:
            env = VecShapeReward(VecVetoAction(toys(2), "crash[k=3]", 0.5, qa=qa), weights, qa=qa)
        else:
            env = VecVetoAction(VecShapeReward(toys(2), weights, qa=qa), "crash[k=3]", 0.5, qa=qa)
        n_vetoed = 0
        for moments in run_vec(env, ACTIONS):
            for moment in steps(moments):
                assert moment.told["qa/executed_action"] == moment.info["did"]
                risk = qa.ask("crash[k=3]", batch(moment.before), int(moment.info["did"])).value[0]
                assert moment.told["qa/shaping_reward"] == pytest.approx(-3.0 * risk, rel=1e-4)
                n_vetoed += moment.told["qa/vetoed"]
        assert n_vetoed > 5


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                dict(rewards={"danger": -1.0}, mode="multiply"),
                'mode=\'multiply\'; expected "add", "replace" or "potential"',
            ),
            (dict(rewards={}), r"rewards=\{\}; expected weights of instances"),
            (dict(rewards=["danger"]), "expected weights of instances"),
            (dict(rewards={"danger": True}), "the weight True for 'danger'; expected a finite number"),
            (dict(rewards={"danger": float("nan")}), "the weight nan for 'danger'"),
            (dict(rewards={"danger": "high"}), "the weight 'high'"),
            (dict(rewards={"danger": -1.0}, gamma=1.5), r"gamma=1.5; expected a number in \[0, 1\]"),
            (dict(rewards={"lane": 1.0}), "weight for the choice 'lane'; expected a number; make rewards a callable"),
            (dict(rewards={"dangr": 1.0}), "no question 'dangr'; expected one of 'danger'"),
        ],
    )
    def test_arguments(self, qa, arguments, message):
        for form, env in ((ShapeReward, Toy()), (VecShapeReward, toys())):
            with pytest.raises(QAError, match=message):
                form(env, qa=qa, **arguments)


def test_answers_are_those_of_the_time_they_were_given():
    """The potential of a state is what it was when the state was visited, as the answerer goes on learning."""
    model = make_model(toys(), learning_rate=0.1)
    qa = QuestionAnswerer.from_model(model)
    env = ShapeReward(Toy(), STATE_WEIGHTS, mode="potential", gamma=0.9, qa=qa)
    obs, _ = env.reset(seed=0)
    before = phi(qa, obs)
    model.learn(32, QACallback())
    assert abs(phi(qa, obs) - before) > 1e-2
    after, _, *_, info = env.step(0)
    assert info["qa/shaping_reward"] == pytest.approx(0.9 * phi(qa, after) - before, rel=1e-3)
