"""What every question-answering wrapper promises: what it tells and of which states, its forms, its binding."""

import dataclasses
import threading
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from wrapping import (
    KEYS,
    REWARDS,
    VECTOR,
    VERDICT,
    Toy,
    Witness,
    answer,
    assert_same,
    batch,
    make_model,
    make_qa,
    run_single,
    run_vec,
    toys,
)

from sb3_qa import QAError, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.wrappers import (
    AnswerQuestions,
    ShapeReward,
    VecAnswerQuestions,
    VecRandomVeto,
    VecShapeReward,
    VecVetoAction,
    VetoAction,
    qa_wrappers,
)

ALL = {f"qa/{key}" for key in KEYS}
STATE = {"qa/danger", "qa/speed", "qa/lane"}
WEIGHTS = {"danger": -2.0, "speed": 0.5, "crash[k=1]": -1.0}
POTENTIAL = dict(rewards={"danger": -2.0, "speed": 0.5}, mode="potential", gamma=0.9)


def first(obs, action):
    """An on_veto that looks at what it is given."""
    assert obs.shape == VECTOR.shape
    assert type(action) is int
    return (action + 1) % 3


# name: (single form, vector form, arguments, the keys it tells)
WRAPPERS = {
    "answer all": (AnswerQuestions, VecAnswerQuestions, {}, ALL),
    "answer some": (
        AnswerQuestions,
        VecAnswerQuestions,
        dict(questions=["speed", "crash[k=3]"]),
        {"qa/speed", "qa/crash[k=3]"},
    ),
    "answer about states": (
        AnswerQuestions,
        VecAnswerQuestions,
        dict(questions=["lane", "danger"]),
        {"qa/lane", "qa/danger"},
    ),
    "add": (ShapeReward, VecShapeReward, dict(rewards=WEIGHTS), {f"qa/{key}" for key in WEIGHTS} | REWARDS),
    "replace": (
        ShapeReward,
        VecShapeReward,
        dict(rewards=WEIGHTS, mode="replace"),
        {f"qa/{key}" for key in WEIGHTS} | REWARDS,
    ),
    "potential": (ShapeReward, VecShapeReward, POTENTIAL, {"qa/danger", "qa/speed"} | REWARDS),
    "add callable": (
        ShapeReward,
        VecShapeReward,
        dict(rewards=lambda told: -told["danger"] * told["crash[k=3]"]),
        ALL | REWARDS,
    ),
    "potential callable": (
        ShapeReward,
        VecShapeReward,
        POTENTIAL | dict(rewards=lambda told: -told["danger"]),
        STATE | REWARDS,
    ),
    "veto": (VetoAction, VecVetoAction, dict(question="crash[k=3]", threshold=0.5), VERDICT | {"qa/crash[k=3]"}),
    "veto by policy": (
        VetoAction,
        VecVetoAction,
        dict(question="crash[k=3]", threshold=0.5, on_veto="policy"),
        VERDICT | {"qa/crash[k=3]"},
    ),
    "veto by callable": (
        VetoAction,
        VecVetoAction,
        dict(question="crash[k=3]", threshold=0.5, on_veto=first),
        VERDICT | {"qa/crash[k=3]", "qa/substitute_catastrophe"},
    ),
    "veto of states": (
        VetoAction,
        VecVetoAction,
        dict(question="danger", threshold=0.5, on_veto=first),
        VERDICT | {"qa/danger", "qa/substitute_catastrophe"},
    ),
    "shadow": (
        VetoAction,
        VecVetoAction,
        dict(question="crash[k=3]", threshold=0.5, shadow=True),
        VERDICT | {"qa/crash[k=3]"},
    ),
    "penalty": (
        VetoAction,
        VecVetoAction,
        dict(question="crash[k=1]", threshold=0.5, penalty=0.5),
        VERDICT | REWARDS | {"qa/crash[k=1]"},
    ),
    "random veto": (None, VecRandomVeto, dict(question="crash[k=3]", rate=0.5), VERDICT | {"qa/crash[k=3]"}),
}
BOTH_FORMS = [name for name, (single, *_) in WRAPPERS.items() if single is not None]
ACTIONS = np.random.default_rng(3).integers(3, size=(23, 3))  # 23 steps of three environments: four episodes and a bit


@pytest.fixture(scope="module")
def qa():
    return make_qa()


@pytest.fixture(scope="module")
def saved(qa, tmp_path_factory):
    path = tmp_path_factory.mktemp("answerer") / "toy.qa"
    qa.save(path)
    return path


@pytest.fixture(scope="module")
def pole(tmp_path_factory):
    """A live answerer, and the path of the same saved."""
    path = tmp_path_factory.mktemp("pole") / "pole.qa"
    qa = QuestionAnswerer.from_model(make_model("CartPole-v1"))
    qa.save(path)
    return qa, path


def trajectories(name, form, qa):
    """Moments of each environment in the single form or the vector form of a wrapper."""
    single, vector, arguments, _ = WRAPPERS[name]
    if form == "single":
        return [run_single(single(Toy(), qa=qa, **arguments), ACTIONS[:, 0])]
    return run_vec(vector(toys(3), qa=qa, **arguments), ACTIONS)


FORMS = [(name, form) for name in WRAPPERS for form in ("single", "vector") if name in BOTH_FORMS or form == "vector"]


class TestWhatIsTold:
    @pytest.mark.parametrize(("name", "form"), FORMS)
    def test_keys_and_types_on_every_step_and_at_reset(self, qa, name, form):
        keys = WRAPPERS[name][3]
        each = trajectories(name, form, qa)
        resets = [sum(moment.before is None for moment in moments) for moments in each]
        assert resets == ([5] if form == "single" else [5, 4, 4])
        for moments in each:
            for moment in moments:
                assert moment.told.keys() == keys
                for key, value in moment.told.items():
                    kind = {
                        "qa/catastrophe": bool,
                        "qa/vetoed": bool,
                        "qa/proposed_action": int,
                        "qa/executed_action": int,
                        "qa/no_safe_action": bool,
                        "qa/substitute_catastrophe": bool,
                    }
                    assert type(value) is kind.get(key, float), key

    @pytest.mark.parametrize(("name", "form"), FORMS)
    def test_each_answer_is_about_the_state_arrived_in_or_the_action_executed(self, qa, name, form):
        n = 0
        for moments in trajectories(name, form, qa):
            for moment in moments:
                for key in KEYS:
                    if f"qa/{key}" in moment.told:
                        np.testing.assert_allclose(
                            moment.told[f"qa/{key}"], answer(qa, key, moment), rtol=1e-5, atol=1e-6
                        )
                        n += 1
        assert n

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_the_answers_differ_from_those_about_other_states_and_actions(self, qa, form):
        """The test above would fail, were the answers about something else."""
        for moments in trajectories("answer all", form, qa):
            steps = [moment for moment in moments if moment.before is not None]
            for key in KEYS[:4]:
                others = [moment._replace(after=moment.before, action=(moment.action + 1) % 3) for moment in steps]
                apart = [
                    abs(moment.told[f"qa/{key}"] - answer(qa, key, other))
                    for moment, other in zip(steps, others, strict=True)
                ]
                assert np.mean(np.array(apart) > 1e-3) > 0.8

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_no_action_has_been_executed_at_a_reset(self, qa, form):
        for moments in trajectories("penalty", form, qa):
            for moment in moments:
                if moment.before is None:
                    told = moment.told
                    assert told["qa/proposed_action"] == told["qa/executed_action"] == -1
                    assert told["qa/raw_reward"] == told["qa/shaping_reward"] == 0.0
                    assert told["qa/catastrophe"] is told["qa/vetoed"] is False
                    assert told["qa/risk"] == told["qa/crash[k=1]"]

    def test_reset_infos_keep_what_the_environment_told(self, qa):
        venv = VecAnswerQuestions(VecVetoAction(toys(2), "crash[k=1]", 0.5, qa=qa), ["speed"], qa=qa)
        for moments in run_vec(venv, ACTIONS[:, :2]):
            for moment in moments:
                assert {"crashed", "speed", "lane", "qa/speed", "qa/risk"} <= moment.info.keys()

    def test_no_action_is_nan_in_a_box_and_minus_one_in_each_part(self):
        for space, nothing in (
            (spaces.Box(-1, 1, (2,)), np.nan),
            (spaces.MultiDiscrete([2, 3]), -1),
            (spaces.MultiBinary(2), -1),
        ):
            qa = make_qa(action_space=space)
            info = VetoAction(Toy(space), "crash[k=1]", 0.5, qa=qa).reset(seed=0)[1]
            np.testing.assert_equal(info["qa/executed_action"], np.full(2, nothing))


class TestForms:
    @pytest.mark.parametrize("name", BOTH_FORMS)
    @pytest.mark.parametrize("n", [1, 3])
    def test_single_and_vector_form_agree(self, qa, name, n):
        single, vector, arguments, _ = WRAPPERS[name]
        each = run_vec(vector(toys(n), qa=qa, **arguments), ACTIONS[:, :n])
        for i, moments in enumerate(each):
            env = single(Toy(length=5 + i), qa=qa, **arguments)
            assert_same(run_single(env, ACTIONS[:, i], seed=7 + i), moments)

    @pytest.mark.parametrize("n", [1, 3])
    def test_nested_forms_agree(self, qa, n):
        def inner(toy):
            return VetoAction(ShapeReward(toy, WEIGHTS, qa=qa), "crash[k=3]", 0.5, penalty=0.5, qa=qa)

        def single(toy):
            return AnswerQuestions(inner(toy), qa=qa)

        venv = VecVetoAction(VecShapeReward(toys(n), WEIGHTS, qa=qa), "crash[k=3]", 0.5, penalty=0.5, qa=qa)
        outside = run_vec(VecAnswerQuestions(venv, qa=qa), ACTIONS[:, :n])
        within = run_vec(toys(n, single), ACTIONS[:, :n])
        mixed = run_vec(VecAnswerQuestions(toys(n, inner), qa=qa), ACTIONS[:, :n])
        for i in range(n):
            alone = run_single(single(Toy(length=5 + i)), ACTIONS[:, i], seed=7 + i)
            assert any(moment.told["qa/vetoed"] for moment in alone)
            assert_same(alone, outside[i])
            assert_same(alone, within[i])
            assert_same(alone, mixed[i])

    def test_nested_wrappers_tell_one_story(self, qa):
        """Answers outside a veto outside shaping: what the outer ones tell is about what really happened inside."""
        env = VetoAction(ShapeReward(Toy(), WEIGHTS, qa=qa), "crash[k=3]", 0.5, penalty=0.5, qa=qa)
        env = AnswerQuestions(env, qa=qa)
        plain = iter(run_single(AnswerQuestions(Toy(), ["speed"], qa=qa), [0] * 23))
        n_vetoed = 0
        for moment, bare in zip(run_single(env, ACTIONS[:, 0]), plain, strict=True):
            assert moment.told.keys() == ALL | VERDICT | REWARDS
            if moment.before is None:
                continue
            told = moment.told
            n_vetoed += told["qa/vetoed"]
            assert told["qa/executed_action"] == moment.info["did"]
            assert told["qa/proposed_action"] == moment.action
            assert told["qa/vetoed"] is bool(told["qa/executed_action"] != moment.action)
            assert told["qa/raw_reward"] == pytest.approx(bare.reward + moment.info["did"])
            shaping = sum(weight * answer(qa, key, moment) for key, weight in WEIGHTS.items()) - 0.5 * told["qa/vetoed"]
            assert told["qa/shaping_reward"] == pytest.approx(shaping, rel=1e-4)
            assert moment.reward == pytest.approx(told["qa/raw_reward"] + shaping, rel=1e-4)
        assert 3 < n_vetoed < 20

    def test_an_environment_may_use_one_observation_and_one_info_again(self, qa):
        env = Toy(reuse=True)

        def wrap(env):
            return VetoAction(ShapeReward(AnswerQuestions(env, qa=qa), WEIGHTS, qa=qa), "crash[k=3]", 0.0, qa=qa)

        wrapped = wrap(env)
        moments = run_single(wrapped, ACTIONS[:, 0])
        assert_same(run_single(wrap(Toy()), ACTIONS[:, 0]), moments)
        assert wrapped.step(0)[0] is env._seen  # it is used again
        assert not any(key.startswith("qa/") for key in env._info)

    def test_actions_reach_the_environment_as_they_were_given(self, qa):
        env = AnswerQuestions(Toy(), qa=qa)
        env.reset(seed=0)
        got = []
        inner = env.env.step
        env.env.step = lambda action: got.append(action) or inner(action)
        for action in (1, np.int64(1), np.array(1)):
            env.step(action)
        assert [type(action) for action in got[:2]] == [int, np.int64]
        assert got == [1, 1, 1]


class TestBinding:
    def test_answers_come_with_the_first_step_of_learning(self):
        """learn() resets before callbacks start: what could not be told at that reset is told when bound."""
        venv = VecAnswerQuestions(VecVetoAction(toys(2), "crash[k=3]", 0.5))
        model = make_model(venv)
        told = []

        class Look(BaseCallback):
            def _on_training_start(self):
                told.extend(dict(info) for info in venv.reset_infos)

            def _on_step(self):
                return True

        witness = Witness()
        model.learn(64, [QACallback(), Look(), witness])
        for info in told:
            assert {key for key in info if key.startswith("qa/")} == ALL | VERDICT
            assert {"crashed", "speed", "lane"} <= info.keys()
            assert info["qa/executed_action"] == -1
        assert witness.n_steps == 32
        assert witness.n_ended == 11
        for info in venv.reset_infos:  # and after the resets that follow by themselves
            assert {key for key in info if key.startswith("qa/")} == ALL | VERDICT

    @pytest.mark.parametrize(
        "wrap", [lambda env: AnswerQuestions(env), lambda env: Monitor(AnswerQuestions(Monitor(env)))]
    )
    def test_single_wrappers_are_bound_in_learn(self, wrap):
        env = toys(2, wrap)
        model = make_model(env)
        told = []

        class Look(Witness):
            def _on_training_start(self):
                super()._on_training_start()
                for i, info in enumerate(env.reset_infos):
                    told.append(info["qa/speed"])
                    assert info["qa/speed"] == pytest.approx(
                        self.qa.ask("speed", self.model._last_obs[i]).value, rel=1e-5
                    )

        witness = Look()
        model.learn(64, [QACallback(), witness])
        assert len(told) == 2
        assert witness.n_steps == 32
        assert witness.n_ended == 11

    def test_an_environment_given_to_the_model_bare_is_bound(self):
        model = make_model(AnswerQuestions(Toy()))
        witness = Witness()
        model.learn(32, [QACallback(), witness])
        assert witness.n_steps == 32

    def test_environments_in_processes_of_their_own(self):
        env = SubprocVecEnv([Toy] * 2, start_method="fork")
        try:
            witness = Witness()
            make_model(VecAnswerQuestions(env)).learn(64, [QACallback(), witness])
            assert (witness.n_steps, witness.n_ended) == (32, 12)
        finally:
            for process in env.processes:
                process.terminate()

    def test_a_saved_answerer_goes_into_processes_of_their_own(self, saved):
        env = SubprocVecEnv(
            [lambda i=i: AnswerQuestions(Toy(length=5 + i), qa=saved) for i in range(2)], start_method="fork"
        )
        within = run_vec(env, ACTIONS[:, :2])
        env.close()
        for moments, same in zip(within, run_vec(VecAnswerQuestions(toys(2), qa=saved), ACTIONS[:, :2]), strict=True):
            assert_same(moments, same)

    def test_answers_follow_the_training(self):
        venv = VecAnswerQuestions(toys())
        model = make_model(venv, learning_rate=0.1)
        obs = venv.reset()
        model.learn(32, QACallback())
        (wrapper, _), *_ = qa_wrappers(venv)
        before = wrapper.rule.qa.ask("speed", obs).value
        model.learn(32, QACallback())
        assert abs(wrapper.rule.qa.ask("speed", obs).value - before) > 1e-3
        moments = run_vec(venv, ACTIONS[:, :1])[0]
        for moment in moments:
            expected = QuestionAnswerer.from_model(model).ask("speed", batch(moment.after)).value[0]
            assert moment.told["qa/speed"] == pytest.approx(expected, rel=1e-5)

    def test_an_answerer_of_its_own_is_kept(self, saved):
        venv = VecAnswerQuestions(toys(), qa=saved)
        model = make_model(venv, learning_rate=0.1)
        own = venv.rule.qa
        model.learn(64, [QACallback(), Witness(QuestionAnswerer.load(saved))])
        assert venv.rule.qa is own

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_without_an_answerer_a_step_is_refused(self, form):
        env = AnswerQuestions(Toy()) if form == "single" else VecAnswerQuestions(toys())
        env.reset()
        with pytest.raises(QAError, match=r'AnswerQuestions has no answerer yet; .* pass qa=.*unbound="pass"'):
            env.step(0 if form == "single" else np.array([0]))

    @pytest.mark.parametrize("form", ["single", "vector"])
    @pytest.mark.parametrize("name", ["answer all", "potential", "veto", "penalty"])
    def test_without_an_answerer_a_step_may_pass_and_be_bound_later(self, qa, name, form):
        single, vector, arguments, keys = WRAPPERS[name]
        env = (
            single(Toy(), unbound="pass", **arguments)
            if form == "single"
            else vector(toys(), unbound="pass", **arguments)
        )
        # Nine steps, the ninth being the fourth of the second episode; the second half of that episode is told.
        run = run_single if form == "single" else lambda *given: run_vec(*given)[0]
        actions = ACTIONS[:8, 0] if form == "single" else ACTIONS[:8, :1]
        bare = run(Toy() if form == "single" else toys(), actions)
        for passed, plain in zip(run(env, actions), bare, strict=True):
            assert not passed.told
            assert passed.reward == pytest.approx(plain.reward)
            np.testing.assert_array_equal(passed.after, plain.after)
        left = bare[-1].after
        env.bind(qa)
        if form == "single":
            obs, reward, *_, info = env.step(1)
        else:
            assert not any(key.startswith("qa/") for key in env.reset_infos[0])  # the first state is long past
            obs, (reward,), _, (info,) = env.step(np.array([1]))
            obs = obs[0]
        assert {key for key in info if key.startswith("qa/")} == keys
        if "qa/risk" in info:
            assert info["qa/risk"] == pytest.approx(qa.ask(arguments["question"], left, 1).value, rel=1e-5)
        if name == "potential":
            before, after = (-2.0 * qa.ask("danger", o).value + 0.5 * qa.ask("speed", o).value for o in (left, obs))
            assert info["qa/shaping_reward"] == pytest.approx(0.9 * after - before, rel=1e-4, abs=1e-5)
            assert reward == pytest.approx(info["qa/raw_reward"] + info["qa/shaping_reward"], rel=1e-5)

    def test_binding_again_in_the_middle_of_an_episode_leaves_reset_infos(self, qa):
        venv = VecAnswerQuestions(toys(2), qa=qa)
        venv.seed(0)
        venv.reset()
        first = [dict(info) for info in venv.reset_infos]
        venv.step(np.array([0, 1]))
        venv.bind(qa)
        assert venv.reset_infos == first

    def test_unknown_way_to_be_unbound(self):
        with pytest.raises(QAError, match="unbound='skip'; expected"):
            AnswerQuestions(Toy(), unbound="skip")

    def test_unknown_question(self, qa):
        with pytest.raises(QAError, match=r"there is no question 'crash\[k=2\]'; expected one of 'crash\[k=3\]'"):
            AnswerQuestions(Toy(), ["crash[k=2]"], qa=qa)

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_answerer_of_another_environment(self, saved, form):
        def make(**arguments):
            return (
                AnswerQuestions(Toy(**arguments), qa=saved)
                if form == "single"
                else VecAnswerQuestions(toys(**arguments), qa=saved)
            )

        make()
        with pytest.raises(
            QAError, match=r"sees Box\(-10.0, 10.0, \(5,\), float32\) but its answerer's policy sees Box\(.*\(4,\)"
        ):
            make(observation_space=spaces.Box(-10, 10, (5,), np.float32))
        with pytest.raises(QAError, match=r"has the action space Discrete\(4\) but its answerer's is Discrete\(3\)"):
            make(action_space=spaces.Discrete(4))

    @pytest.mark.parametrize(
        "wrap", [lambda qa: AnswerQuestions(Toy(), qa=qa), lambda qa: VecAnswerQuestions(toys(), qa=qa)]
    )
    def test_what_is_no_answerer(self, wrap, tmp_path):
        model = make_model(toys())
        with pytest.raises(QAError, match=r"AnswerQuestions got qa=PPO; expected a .*; write qa=.*from_model\(model\)"):
            wrap(model)
        model.save(tmp_path / "model.zip")
        with pytest.raises(
            QAError, match=r"model.zip is a .zip, .*expected a file written by .*from_model\(PPO\.load\("
        ):
            wrap(tmp_path / "model.zip")
        (tmp_path / "half.qa").write_bytes(b"half")
        with pytest.raises(QAError, match=r"half.qa cannot be read .*expected a whole file written by .*save\(\)"):
            wrap(tmp_path / "half.qa")
        with pytest.raises(QAError, match="there is no file"):
            wrap(tmp_path)

    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_answerer_of_other_questions(self, saved, form):
        wrong = {
            (AnswerQuestions, VecAnswerQuestions): dict(questions=["speed", "height"]),
            (ShapeReward, VecShapeReward): dict(rewards={"height": 1.0}),
            (VetoAction, VecVetoAction): dict(question="height", threshold=0.5),
        }
        for (single, vector), arguments in wrong.items():
            with pytest.raises(
                QAError,
                match=r"(Answer|Shape|Veto)\w+ got an answerer that was not taught 'height'; .*'speed'.*; ask one",
            ):
                single(Toy(), qa=saved, **arguments) if form == "single" else vector(toys(), qa=saved, **arguments)

    def test_an_answerer_of_a_path_is_loaded_once_and_anew_when_written_anew(self, qa, tmp_path):
        path = tmp_path / "x.qa"
        qa.save(path)
        first, same = (AnswerQuestions(Toy(), qa=path).rule.qa for _ in range(2))
        assert first is same is VecAnswerQuestions(toys(), qa=str(path)).rule.qa
        assert QuestionAnswerer.load(path) is not first  # who asks for one of his own gets one
        make_qa(action_space=spaces.Discrete(4)).save(path)
        assert AnswerQuestions(Toy(spaces.Discrete(4)), qa=path).rule.qa.policy.action_space.n == 4
        assert first.policy.action_space.n == 3

    def test_missing_file(self, tmp_path):
        with pytest.raises(QAError, match="there is no file"):
            AnswerQuestions(Toy(), qa=tmp_path / "nothing.qa")


@pytest.mark.parametrize("first", [True, False])
def test_environments_with_other_wrappers_side_by_side(first):
    """Labels are of the actions executed, and what is logged is of those that tell it."""

    made = [lambda: ShapeReward(VetoAction(Toy(), "crash[k=3]", 0.0, on_veto=lambda obs, action: 2), WEIGHTS), Toy]
    model = make_model(DummyVecEnv(made if first else made[::-1]))
    joint, witness, labelled, flags = QACallback(), Witness(keys=[]), [], []

    def look(*_):
        labelled.append(joint._recorder._actions[-1])
        flags[:] = joint._recorder.episodes._flags["qa/catastrophe"]
        return True

    model.learn(64, [joint, ConvertCallback(look), witness])
    did = np.array([[info["did"] for info in infos] for infos in witness.infos])
    np.testing.assert_array_equal(labelled, did)
    vetoed, free = did.T if first else did.T[::-1]
    assert (vetoed == 2).all() and (free != 2).any()
    assert flags == [True] * 32


class TestEvaluation:
    @pytest.mark.parametrize("inside", [False, True], ids=["beside", "within another callback"])
    @pytest.mark.parametrize("first", [True, False], ids=["after", "before"])
    def test_eval_environments_are_bound(self, inside, first):
        eval_env = VecAnswerQuestions(VecVetoAction(DummyVecEnv([lambda: Monitor(Toy())]), "crash[k=3]", 0.5))
        model = make_model(VecAnswerQuestions(toys()))
        evaluate = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=16 if not inside else 1, verbose=0)
        callbacks = [QACallback(), EveryNTimesteps(16, evaluate) if inside else evaluate]
        model.learn(32, callbacks if first else callbacks[::-1])
        assert evaluate.last_mean_reward > -np.inf  # it did run
        for moment in run_vec(eval_env, ACTIONS[:, :1])[0]:
            assert moment.told.keys() == ALL | VERDICT
            for key in KEYS:
                expected = answer(QuestionAnswerer.from_model(model), key, moment)
                assert moment.told[f"qa/{key}"] == pytest.approx(expected, rel=1e-5)

    def test_single_eval_environments_are_bound(self):
        model = make_model(toys())
        eval_env = Monitor(AnswerQuestions(Toy(), ["speed"]))
        callback = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=16, verbose=0)
        model.learn(32, [QACallback(), callback])
        assert callback.last_mean_reward > -np.inf
        assert "qa/speed" in eval_env.reset()[1]


class TestGymnasium:
    @staticmethod
    def nested(qa):
        env = ShapeReward(gym.make("CartPole-v1"), {"danger": -1.0}, mode="potential", gamma=0.9, qa=qa)
        env = VetoAction(env, "crash[k=3]", 0.5, on_veto="policy", penalty=0.1, seed=3, qa=qa)
        return AnswerQuestions(env, ["speed"], qa=qa)

    @pytest.mark.parametrize("kind", [str, lambda path: path])
    def test_spec_goes_through_json(self, pole, kind):
        env = self.nested(kind(pole[1]))
        made = gym.make(EnvSpec.from_json(env.spec.to_json()))
        assert str(made) == str(env)
        actions = np.random.default_rng(0).integers(2, size=30)
        plain, again = list(play(env, actions)), list(play(made, actions))
        assert any(info["qa/vetoed"] for *_, info in plain)
        for (obs, reward, info), (obs_2, reward_2, info_2) in zip(plain, again, strict=True):
            np.testing.assert_array_equal(obs, obs_2)
            assert reward == reward_2
            assert info == info_2

    @pytest.mark.parametrize("way", ["registered", "replaced", "json"])
    def test_made_by_their_specs(self, pole, way):
        """What is given as data makes what is made by hand."""
        qa = str(pole[1])
        wrappers = (
            ShapeReward.wrapper_spec(rewards={"danger": -1.0}, mode="potential", gamma=0.9, qa=qa),
            VetoAction.wrapper_spec(question="crash[k=3]", threshold=0.5, on_veto="policy", penalty=0.1, seed=3, qa=qa),
            AnswerQuestions.wrapper_spec(questions=["speed"], qa=qa),
        )
        spec = dataclasses.replace(gym.spec("CartPole-v1"), additional_wrappers=wrappers)
        if way == "registered":
            gym.register("SafePole-v0", spec.entry_point, max_episode_steps=500, additional_wrappers=wrappers)
        try:
            given = {"registered": "SafePole-v0", "replaced": spec, "json": EnvSpec.from_json(spec.to_json())}
            made = gym.make(given[way])
        finally:
            gym.registry.pop("SafePole-v0", None)
        check(made)
        actions = np.random.default_rng(0).integers(2, size=30)
        for (obs, reward, info), (obs_2, reward_2, info_2) in zip(
            play(self.nested(qa), actions), play(made, actions), strict=True
        ):
            np.testing.assert_array_equal(obs, obs_2)
            assert reward == reward_2
            assert info == info_2

    def test_arguments_that_json_does_not_know_are_written_as_what_they_are(self, pole):
        env = ShapeReward(gym.make("CartPole-v1"), {"danger": np.float32(-0.5)}, gamma=np.float64(0.5), qa=pole[1])
        env = VetoAction(env, "crash[k=3]", np.float32(0.5), penalty=np.float32(1), seed=np.int64(3), qa=pole[1])
        env = AnswerQuestions(env, ("speed",), qa=pole[1])
        assert str(gym.make(EnvSpec.from_json(env.spec.to_json()))) == str(env)

    def test_functions_are_written_by_their_names(self, pole):
        env = ShapeReward(gym.make("CartPole-v1"), halved, qa=pole[1])
        env = VetoAction(env, "crash[k=3]", 0.0, on_veto=other_pole, qa=pole[1])
        shape, veto = (wrapper.kwargs for wrapper in EnvSpec.from_json(env.spec.to_json()).additional_wrappers)
        assert (shape["rewards"], veto["on_veto"]) == ("test_wrappers:halved", "test_wrappers:other_pole")
        made = gym.make(EnvSpec.from_json(env.spec.to_json()))
        assert (made.rule.on_veto, made.env.rule.rewards) == (other_pole, halved)

    def test_a_specification_takes_what_the_wrapper_takes_and_writes_it_as_data(self, pole, tmp_path):
        """Paths, numpy's numbers, functions, as they are when wrapping by hand."""
        wrappers = (
            ShapeReward.wrapper_spec(rewards=halved, gamma=np.float64(0.5), mode="potential", qa=pole[1]),
            VetoAction.wrapper_spec(
                question="crash[k=3]",
                threshold=np.float32(0.5),
                on_veto=other_pole,
                qa=pole[1],
                record=tmp_path / "flight.sqlite",
            ),
            AnswerQuestions.wrapper_spec(questions=("speed",), qa=pole[1]),
        )
        assert wrappers[1].kwargs["qa"] == str(pole[1]) and type(wrappers[1].kwargs["threshold"]) is float
        spec = dataclasses.replace(gym.spec("CartPole-v1"), additional_wrappers=wrappers)
        for made in (gym.make(spec), gym.make(EnvSpec.from_json(spec.to_json()))):
            assert (made.env.rule.on_veto, made.env.env.rule.rewards) == (other_pole, halved)
            assert made.rule.questions == ["speed"] and made.env.rule.threshold == 0.5
            made.close()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (dict(threshold=0.5, qa="live"), r"got qa=QuestionAnswerer; expected a path.*qa\.save\("),
            (dict(threshold=0.5, penalty=1j), r"got penalty=1j, which cannot be written as JSON.*plain data"),
            (dict(threshold=0.5, thresh=0.5), r"got thresh=; expected one of 'threshold'.*rename"),
            (dict(), r"got no threshold; expected one; give threshold="),
        ],
        ids=["live", "no data", "misspelt", "missing"],
    )
    def test_a_specification_that_cannot_be_written_is_refused_when_it_is_made(self, pole, arguments, said):
        if "qa" in arguments:
            arguments = arguments | {"qa": pole[0]}
        with pytest.raises(QAError, match=rf"VetoAction\.wrapper_spec {said}"):
            VetoAction.wrapper_spec(question="crash[k=3]", **arguments)

    def test_a_model_that_acts_is_written_by_its_name(self, pole):
        """In this process it is at hand; from JSON it is refused at once."""
        model = make_model("CartPole-v1")
        env = AnswerQuestions(VetoAction(gym.make("CartPole-v1"), "crash[k=3]", 0.0, on_veto=model, qa=pole[1]))
        assert gym.make(env.spec).env.rule.on_veto is model
        spec = EnvSpec.from_json(env.spec.to_json())
        with pytest.raises(QAError, match=r"VetoAction, on_veto, got '.*:<PPO>', which names no function"):
            gym.make(spec)

    @pytest.mark.parametrize("mode", ["sync", "async"])
    def test_vector_environments_of_a_specification(self, pole, mode):
        """Through make_vec, and through the JSON of what it made, as wrapped by hand."""
        wrapper = VetoAction.wrapper_spec(question="crash[k=3]", threshold=0.5, qa=pole[1])
        spec = dataclasses.replace(gym.spec("CartPole-v1"), additional_wrappers=(wrapper,))
        single = VetoAction(gym.make("CartPole-v1"), "crash[k=3]", 0.5, qa=pole[1])
        envs = gym.make_vec(spec, 2, vectorization_mode=mode, vector_kwargs=dict(autoreset_mode="SameStep"))
        try:
            again = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
            for made in (envs, again):
                obs, _ = made.reset(seed=[1, 2])
                alone, _ = single.reset(seed=1)
                np.testing.assert_array_equal(obs[0], alone)
                for action in (0, 1, 0):
                    obs, *_, infos = made.step(np.array([action, action]))
                    alone, *_, info = single.step(action)
                    np.testing.assert_array_equal(obs[0], alone)
                    assert infos["qa/risk"][0] == pytest.approx(info["qa/risk"])
                    assert infos["qa/executed_action"][0] == info["qa/executed_action"]
            again.close()
        finally:
            envs.close()

    def test_what_is_no_environment_is_refused(self, pole):
        with pytest.raises(QAError, match=r"got a str; expected one gymnasium\.Env; make one, as by gym\.make\(id\)"):
            AnswerQuestions("CartPole-v1", qa=pole[1])

    @pytest.mark.parametrize("kind", ["lambda", "method", "object"])
    def test_a_function_without_a_name_is_refused_when_made_again(self, pole, kind):
        """From JSON, at once and not at the first veto; in this process it is still at hand."""

        class Half:
            def __init__(self):
                self.lock = threading.Lock()

            def reward(self, told):
                return halved(told)

            def __call__(self, told):
                return halved(told)

        half = {"lambda": lambda told: halved(told), "method": Half().reward, "object": Half()}[kind]
        env = AnswerQuestions(ShapeReward(gym.make("CartPole-v1"), half, qa=pole[1]), qa=pole[1])
        assert gym.make(env.spec).env.rule.rewards is half
        spec = EnvSpec.from_json(env.spec.to_json())
        with pytest.raises(
            QAError, match=r"ShapeReward, rewards, got 'test_wrappers:<.*>', which names no function .*def"
        ):
            gym.make(spec)

    def test_functions_may_be_named(self, qa):
        env = VetoAction(
            ShapeReward(Toy(), "test_wrappers:halved", qa=qa), "crash[k=3]", 0.0, "test_wrappers:two", qa=qa
        )
        env.reset(seed=0)
        info = env.step(0)[4]
        assert info["did"] == 2
        assert info["qa/shaping_reward"] == pytest.approx(0.5 * info["qa/danger"])
        with pytest.raises(QAError, match="VetoAction, on_veto, got 'test_wrappers:nobody'; expected a function in"):
            VetoAction(Toy(), "crash[k=3]", 0.0, "test_wrappers:nobody", qa=qa)

    def test_spec_of_a_live_answerer_is_to_be_bound_again(self, pole):
        env = self.nested(pole[0])
        made = gym.make(EnvSpec.from_json(env.spec.to_json()))
        made.reset(seed=0)
        with pytest.raises(QAError, match="has no answerer yet"):
            made.step(0)

    def test_a_trained_answerer_is_taken_as_it_is(self):
        """No copy of it is made: it would be slow, and torch refuses after a training pass."""
        model = make_model(toys())
        model.learn(32, QACallback())
        qa = QuestionAnswerer.from_model(model)
        for env in (
            VetoAction(Toy(), "crash[k=1]", 0.5, qa=qa),
            ShapeReward(Toy(), WEIGHTS, qa=qa),
            AnswerQuestions(Toy(), qa=qa),
        ):
            assert env.rule.qa is qa

    def test_callables_are_taken_as_they_are(self, qa):
        """A method may belong to what cannot be copied."""

        class Human:
            def __init__(self):
                self.lock = threading.Lock()

            def act(self, obs, action):
                return 2

            def reward(self, told):
                return 0.5

        human = Human()
        env = VetoAction(ShapeReward(Toy(), human.reward, qa=qa), "crash[k=3]", 0.0, on_veto=human.act, qa=qa)
        env.reset(seed=0)
        info = env.step(0)[4]
        assert (info["did"], info["qa/shaping_reward"]) == (2, 0.5)

    def test_spec_keeps_the_arguments_as_they_were(self, pole):
        rewards, questions = {"danger": -1.0}, ["speed"]
        env = ShapeReward(AnswerQuestions(gym.make("CartPole-v1"), questions, qa=pole[1]), rewards, qa=pole[1])
        rewards["danger"] = 5.0
        questions.append("danger")
        inner, outer = (wrapper.kwargs for wrapper in env.spec.additional_wrappers)
        assert outer["rewards"] == {"danger": -1.0}
        assert inner["questions"] == ["speed"]
        assert env.rule.rewards == {"danger": -1.0}

    @pytest.mark.parametrize("name", BOTH_FORMS)
    def test_environment_checkers(self, qa, name):
        single, _, arguments, _ = WRAPPERS[name]
        check(single(Toy(), qa=qa, **arguments))

    def test_environment_checkers_with_candidates_drawn_at_random(self):
        """The checkers want the same from the same seed."""
        space = spaces.Box(-1, 1, (2,), np.float32)
        check(VetoAction(Toy(space), "crash[k=1]", 0.0, qa=make_qa(action_space=space)))


def halved(told):
    return 0.5 * told["danger"]


def other_pole(obs, action):
    return 1 - action


def two(obs, action):
    return 2


def check(env):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        warnings.filterwarnings("ignore", message=r".*Box observation space m\w+ value is -?infinity")  # CartPole's
        check_env(env, skip_render_check=True)
    sb3_check_env(env)


def play(env, actions):
    """What an environment shows, gives and tells, resets included."""
    obs, info = env.reset(seed=1)
    yield obs, 0.0, info
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        yield obs, reward, info
        if terminated or truncated:
            obs, info = env.reset()
            yield obs, 0.0, info
