"""Labels beside replay buffers: the right rows, and their truths."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qa import Choice, Number, QAError, Question
from sb3_qa.callbacks import QACallback
from sb3_qa.encoders import ActionFeatures
from sb3_qa.joint import JointTraining
from sb3_qa.policies import qa_policy
from sb3_qa.replay import KeptActions
from sb3_qa.truth import after, always, eventually, now, steps_until, total

QUESTIONS = [
    Question("Will it ring within {k} steps?", eventually("rings", within="k"), k=[2, 7], name="ring"),
    Question("Will it ring within 3 steps if I choose {action}?", eventually("rings", within=3), name="ring_if"),
    Question("Will it be silent for 5 steps?", always(lambda step: not step.info["rings"], during=5), name="silent"),
    Question("When will it ring?", steps_until("rings", cap=6), name="when"),
    Question("Does it ring?", now("rings"), name="rings"),
    Question("Which digit will it be in 2 steps?", after("digit", steps=2), Choice(0, 1, 2), name="digit"),
    Question("What is the sum of 4 digits?", total("digit", over=4), Number(0, 8), name="sum"),
]
HORIZON = 7


class Bell(gym.Env[Any, Any]):
    """Rings and shows digits at random; episodes end, or are cut, at random times."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Discrete(2)

    def _told(self) -> tuple[Any, dict[str, Any]]:
        self.n = getattr(self, "n", 0) + 1
        draw = self.np_random
        return np.array([self.n, draw.normal()], np.float32), {
            "rings": bool(draw.random() < 0.15),
            "digit": int(draw.integers(3)),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._told()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        end = self.np_random.random()
        obs, info = self._told()
        return obs, 0.0, end < 0.06, 0.06 <= end < 0.12, info


class Keep(QACallback):
    """Keeps what happened, transition by transition."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        infos, dones = self.locals["infos"], self.locals["dones"]
        cut = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self.log.append(
            dict(
                obs=self.model._last_obs.copy(),  # type: ignore[union-attr]
                rings=[info["rings"] for info in infos],
                digit=[info["digit"] for info in infos],
                terminated=dones & ~cut,
                truncated=cut,
            )
        )
        return super()._on_step()


@pytest.mark.parametrize("buffer_size", [1000, 130])
def test_labels_are_what_came_of_each_transition(buffer_size: int) -> None:
    env = DummyVecEnv([Bell, Bell])
    env.seed(1)
    model = DQN(
        qa_policy(DQN),
        env,
        seed=0,
        buffer_size=buffer_size,
        learning_starts=10**6,
        policy_kwargs=dict(questions=QUESTIONS),
    )
    keep = Keep()
    model.learn(500, callback=keep)
    labels, log, buffer = model.replay_buffer.qa_labels, keep.log, model.replay_buffer  # type: ignore[union-attr]
    size = buffer.buffer_size  # type: ignore[union-attr]
    labelled = cuts = 0
    for t in range(max(0, len(log) - size), len(log)):
        for env_index in range(2):
            row = t % size * 2 + env_index
            np.testing.assert_array_equal(buffer.observations[t % size, env_index], log[t]["obs"][env_index])  # type: ignore[union-attr]
            labelled += 1
            future = []
            for step in log[t : t + HORIZON]:
                future.append(step)
                if step["terminated"][env_index] or step["truncated"][env_index]:
                    break
            end = future[-1]
            y, weight = (None, None) if labels._any_open[row] else labels.dense(np.array([row]))
            for target in labels.targets:
                name = target.question.name
                if target.kind == "event" and y is not None:
                    rings = [step["rings"][env_index] for step in future][: target.width]
                    at_risk = [not any(rings[:j]) for j in range(len(rings))]
                    comes = [at and ring for at, ring in zip(at_risk, rings, strict=True)]
                    if end["terminated"][env_index]:  # nothing comes after the end
                        rest = not any(rings)
                        at_risk += [rest] * (target.width - len(rings))
                    at_risk += [False] * (target.width - len(at_risk))
                    comes += [False] * (target.width - len(comes))
                    assert weight[0, target.start : target.stop].tolist() == at_risk, name
                    assert y[0, target.start : target.stop].tolist() == comes, name
            if labels._any_open[row]:
                cuts += 1
                assert end["truncated"][env_index] or (t + len(future) == len(log) and not end["terminated"][env_index])
                cut = labels.cut_row[row]
                assert cut // 2 == (t + len(future) - 1) % size and cut % 2 == env_index
            by_name = {target.question.name: labels.values.get(target.start) for target in labels.targets}
            whole = len(future) >= 2
            digit = by_name["digit"][row]  # type: ignore[index]
            assert np.isnan(digit) if not whole else digit == future[1]["digit"][env_index]
    assert labelled == 2 * min(size, len(log))
    assert cuts > 10


def agent(buffer_size: int = 130, **kwargs: Any) -> DQN:
    """Of two Bells, which collects and does not train."""
    env = DummyVecEnv([Bell, Bell])
    env.seed(1)
    given = dict(buffer_size=buffer_size, learning_starts=10**6, policy_kwargs=dict(questions=QUESTIONS))
    return DQN(qa_policy(DQN), env, seed=0, **(given | kwargs))


MEMORY_OPTIMISED: dict[str, Any] = dict(
    optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)
)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_memory_optimised_buffer_has_the_same_labels(normalised: bool) -> None:
    """Also of futures that go on beyond a time limit, or beyond the end of learning, whose last states it does not keep."""
    stores = []
    for kwargs in ({}, MEMORY_OPTIMISED):
        model = agent(**kwargs)
        if normalised:
            model.set_env(VecNormalize(model.get_env()))
            model._vec_normalize_env = model.get_env()  # type: ignore[assignment]
        model.learn(520, callback=QACallback())
        if kwargs:
            model.replay_buffer.observations[model.replay_buffer.pos] = 99.0  # type: ignore[union-attr]  # of the next episode
        stores.append(model.replay_buffer.qa_labels)  # type: ignore[union-attr]
    plain, optimised = stores
    assert plain._any_open.sum() > 20
    np.testing.assert_array_equal(plain.cut_row, optimised.cut_row)
    for mine, theirs in zip(plain.dense(np.arange(len(plain))), optimised.dense(np.arange(len(plain))), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    ends = sorted(optimised.ends)
    assert set(optimised.cut_row[optimised._any_open]) <= set(ends)
    assert len(ends) < len(optimised) / 8, "one for each episode that was cut and is still in the buffer"
    again = pickle.loads(pickle.dumps(optimised))
    assert sorted(again.ends) == ends


def test_labels_are_gone_on_with_when_learning_goes_on() -> None:
    model = agent(buffer_size=1000)
    model.learn(300, callback=QACallback())
    before: Any = model.replay_buffer.qa_labels  # type: ignore[union-attr]
    known = before._known.copy()
    model.learn(200, callback=QACallback(), reset_num_timesteps=False)
    after: Any = model.replay_buffer.qa_labels  # type: ignore[union-attr]
    for name in ("_known", "_event_at", "_open", "_any_open", "cut_row", "features"):
        assert getattr(after, name) is getattr(before, name)
    assert all(after.values[start] is before.values[start] for start in before.values)
    np.testing.assert_array_equal(after._known[:300], known[:300])
    assert (after._known[:500] > 0).any(axis=1).all(), "those at the end of the first learn() too"
    # Other questions have other labels, and leave nothing of these.
    other = [
        Question("Will it ring within 7 steps?", eventually(lambda step: step.info["rings"], within=7), name="ring")
    ]
    another = agent(buffer_size=1000, policy_kwargs=dict(questions=other))
    another.replay_buffer = model.replay_buffer
    another.learn(2, callback=QACallback())
    assert np.count_nonzero(another.replay_buffer.qa_labels._known) <= 8  # type: ignore[union-attr]


def test_a_step_that_a_callback_stopped_at_is_not_labelled() -> None:
    class Stop(QACallback):
        def _on_step(self) -> bool:
            super()._on_step()
            return self.n_calls < 100

    model = agent(buffer_size=1000)
    model.learn(500, callback=Stop())
    assert model.replay_buffer.pos == 99  # type: ignore[union-attr]
    labels: Any = model.replay_buffer.qa_labels  # type: ignore[union-attr]
    assert (labels._known[:198] > 0).any(axis=1).all() and not labels._known[198:].any()
    assert labels.cut_row.max() < 198


def test_labels_are_small() -> None:
    """At most 16 bytes for each event question and transition, all that is kept with the buffer counted."""
    events = [
        Question(
            "Will it ring within {k} steps if I choose {action}?", eventually("rings", within="k"), k=[5, 50], name="a"
        ),
        Question("Will it be silent?", always(lambda step: not step.info["rings"], during=30), name="b"),
        Question("When will it ring?", steps_until("rings", cap=20), name="c"),
    ]
    for asked, most in ((events[:1], 16), (events, 16 * 3)):
        for kwargs in ({}, MEMORY_OPTIMISED):
            model = agent(buffer_size=50_000, policy_kwargs=dict(questions=asked), **kwargs)
            model.learn(1000, callback=QACallback())
            labels: Any = model.replay_buffer.qa_labels  # type: ignore[union-attr]
            assert len(labels) == 50_000
            assert len(pickle.dumps(labels)) <= most * len(labels)
            arrays = [labels._known, labels._event_at, labels._open, labels._any_open, labels.cut_row]
            assert sum(array.nbytes for array in [*arrays, labels.features.actions]) <= most * len(labels)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(300, start=-5),
        spaces.MultiDiscrete([3, 400], start=[-2, 7]),
        spaces.MultiBinary(3),
        spaces.Box(-2.0, 3.0, (2,)),
    ],
    ids=str,
)
def test_kept_actions_have_the_features_that_they_had(space: Any) -> None:
    features = ActionFeatures(space)
    kept = KeptActions(features, 100)
    space.seed(0)
    actions = np.array([space.sample() for _ in range(50)])
    kept[np.arange(50, 100)] = actions
    np.testing.assert_allclose(kept[np.arange(50, 100)], features(actions), atol=1e-6)
    kept[np.arange(50)]  # of rows that hold nothing yet


class Reach(gym.Env[Any, Any]):
    """A goal environment, for hindsight."""

    def __init__(self) -> None:
        each = spaces.Box(-9.0, 9.0, (1,))
        self.observation_space = spaces.Dict({"observation": each, "achieved_goal": each, "desired_goal": each})
        self.action_space = spaces.Discrete(2)

    def _told(self) -> tuple[Any, dict[str, Any]]:
        x, goal = np.array([self.x], np.float32), np.array([2.0], np.float32)
        return {"observation": x, "achieved_goal": x, "desired_goal": goal}, {
            "rings": bool(self.x > 1),
            "digit": self.t % 3,
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.t = 0.0, 0
        return self._told()

    def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
        return -np.abs(achieved - desired).reshape(len(achieved), -1).sum(axis=1) if np.ndim(achieved) > 1 else 0.0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x += 0.5 * (2 * int(action) - 1) + 0.01 * float(self.np_random.normal())
        self.t += 1
        obs, info = self._told()
        return obs, 0.0, False, self.t >= 10, info


class Own(ReplayBuffer):
    """A buffer of a user's own: newest first."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return self._get_samples(np.arange(self.pos)[::-1][:batch_size].copy(), env)


BUFFERS: list[tuple[type, type[gym.Env[Any, Any]], dict[str, Any]]] = [
    (ReplayBuffer, Bell, {}),
    (ReplayBuffer, Bell, dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))),
    (NStepReplayBuffer, Bell, dict(n_steps=3)),
    (DictReplayBuffer, Reach, {}),
    (HerReplayBuffer, Reach, dict(replay_buffer_kwargs=dict(n_sampled_goal=4))),
    (Own, Bell, {}),
]


@pytest.mark.parametrize("buffer_class, env, kwargs", BUFFERS, ids=lambda each: getattr(each, "__name__", None))
def test_rows_are_those_that_were_handed_out(
    buffer_class: Any, env: Any, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = qa_policy(DQN, "MultiInputPolicy" if env is Reach else "MlpPolicy")
    if buffer_class is not NStepReplayBuffer:
        kwargs = {**kwargs, "replay_buffer_class": buffer_class}
    model = DQN(
        policy,
        DummyVecEnv([env, env]),
        seed=0,
        buffer_size=300,
        learning_starts=60,
        policy_kwargs=dict(questions=QUESTIONS),
        **kwargs,
    )
    assert type(model.replay_buffer) is buffer_class
    handed = []
    original = JointTraining.hand_out

    def hand_out(self: JointTraining, rows: Any, observations: Any = None) -> None:
        buffer: Any = model.replay_buffer
        kept = buffer.observations
        real = rows >= 0
        place = np.divmod(rows[real], buffer.n_envs)
        pairs = (
            [(kept[k][place], observations[k]) for k in kept]
            if isinstance(kept, dict)
            else [(kept[place], observations)]
        )
        for mine, theirs in pairs:
            np.testing.assert_array_equal(mine, theirs[torch.as_tensor(real)].numpy())
        handed.append(real)
        original(self, rows, observations)

    monkeypatch.setattr(JointTraining, "hand_out", hand_out)
    model.learn(400, callback=QACallback())
    assert len(handed) > 20
    virtual = ~np.concatenate(handed)
    assert virtual.any() == (buffer_class is HerReplayBuffer)  # other goals have other truths
    copy = pickle.loads(pickle.dumps(model.replay_buffer))
    assert type(copy) is buffer_class and type(copy.actions) is np.ndarray
    assert isinstance(model.replay_buffer, buffer_class) and model.replay_buffer.actions.taken is None
    assert int(model.policy.qa_head.n_updates) > 0


def test_a_buffer_that_hides_its_rows_is_refused() -> None:
    class Hidden(ReplayBuffer):
        def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
            kept, self.actions = self.actions, np.asarray(self.actions).view(np.ndarray)
            samples = super()._get_samples(batch_inds, env)
            self.actions = kept
            return samples

    env = DummyVecEnv([Bell])
    model = DQN(
        qa_policy(DQN), env, replay_buffer_class=Hidden, learning_starts=10, policy_kwargs=dict(questions=QUESTIONS)
    )
    with pytest.raises(QAError, match="self.actions"):
        model.learn(50, callback=QACallback())


def test_a_buffer_built_otherwise_is_refused_by_name() -> None:
    class Rows(BaseBuffer):
        optimize_memory_usage = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, n_envs=kwargs["n_envs"])

        def add(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("nothing may be learnt")

        def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("nothing may be learnt")

    env = DummyVecEnv([Bell])
    kwargs: Any = dict(replay_buffer_class=Rows, policy_kwargs=dict(questions=QUESTIONS))
    with pytest.raises(QAError, match="got a Rows; .*ReplayBuffer"):
        DQN(qa_policy(DQN), env, **kwargs).learn(10, callback=QACallback())


def test_what_could_never_be_learnt_is_refused() -> None:
    far = Question("Does it ring in 300 steps?", after("rings", steps=300), name="far")
    model = DQN(qa_policy(DQN), DummyVecEnv([Bell]), buffer_size=310, policy_kwargs=dict(questions=[far]))
    with pytest.raises(QAError, match="buffer_size"):
        model.learn(10, callback=QACallback())
    wrong = Question("Does it sing?", eventually("sings", within=3), name="sings")
    model = DQN(qa_policy(DQN), DummyVecEnv([Bell]), policy_kwargs=dict(questions=[wrong]))
    with pytest.raises(QAError, match="sings"):
        model.learn(300, callback=QACallback())


def test_a_buffer_saved_during_training_is_the_buffer_it_was(tmp_path: Any) -> None:
    class Save(QACallback):
        def _on_step(self) -> bool:
            if self.n_calls == 100:
                self.model.save_replay_buffer(tmp_path / "buffer.pkl")  # type: ignore[attr-defined]
            return super()._on_step()

    model = DQN(
        qa_policy(DQN),
        DummyVecEnv([Bell]),
        learning_starts=10,
        policy_kwargs=dict(questions=QUESTIONS),
        buffer_size=500,
    )
    model.learn(120, callback=Save())
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert type(model.replay_buffer) is ReplayBuffer
    assert model.replay_buffer.pos == 99
    assert (model.replay_buffer.qa_labels._known > 0).any(axis=1).sum() == 64  # type: ignore[attr-defined]
    model.learn(50, callback=QACallback(), reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_the_gradient_is_that_of_the_sum_of_the_losses(algorithm: Any) -> None:
    """What a step of the optimiser is given, held against the losses added by hand."""
    from sb3_qa.joint import question_losses
    from tests.test_algorithms import QUESTIONS as ASKED
    from tests.test_algorithms import Drift

    env = DummyVecEnv([lambda: Drift(continuous=algorithm is SAC)])
    alone = ["actor.mu"] if algorithm is SAC else None  # tests/test_critics.py has the critics as well
    questions = dict(questions=ASKED, qa_coef=0.7, net_arch=[16], qa_readouts=alone)
    model = algorithm(qa_policy(algorithm), env, seed=0, learning_starts=30, policy_kwargs=questions, batch_size=16)
    model.learn(120, callback=QACallback())
    policy, joint = model.policy, model.policy.qa_joint
    joint.store, joint.max_grad_norm = model.replay_buffer.qa_labels, None
    policy.set_training_mode(True)
    agent = policy.q_net if algorithm is DQN else policy.actor
    rows = np.flatnonzero((joint.store._known > 0).any(axis=1) & ~joint.store._any_open)[:16]
    obs = torch.as_tensor(model.replay_buffer.observations[:, 0][rows])

    def own_loss() -> torch.Tensor:
        if algorithm is DQN:
            return policy.q_net(obs).square().mean()
        return policy.actor(obs, deterministic=True).square().mean()

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in agent.parameters()]
        found.append(policy.qa_head.flat.grad.clone())
        policy.zero_grad(set_to_none=True)
        policy.qa_head.flat.grad = None
        return found

    gradients()  # of the training so far
    joint.hand_out(rows)
    own_loss().backward()
    attached = gradients()
    joint.store, store = None, joint.store
    with_taps = policy.qa_taps.tensors(policy, obs)[0]
    y, weight = (torch.as_tensor(x) for x in store.dense(rows))
    logits = policy.qa_head(with_taps, torch.as_tensor(store.features[rows]))
    loss = own_loss() + 0.7 * question_losses(policy.qa_head, logits, y, weight).mean()
    loss.backward()
    for mine, by_hand in zip(attached, gradients(), strict=True):
        torch.testing.assert_close(mine, by_hand, atol=1e-6, rtol=1e-4)


UPRIGHT = Question(
    "Will it be upright within 2 steps if I choose {action}?",
    eventually(lambda step: step.obs[0] > 0, within=2),
    name="up",
)


@pytest.mark.parametrize(("algorithm", "every"), [(SAC, None), (SAC, 4), (TD3, None), (TD3, 3), (DQN, 2)], ids=str)
def test_one_minibatch_in_so_many_teaches_the_questions(algorithm: Any, every: int | None) -> None:
    env: Any = "CartPole-v1" if algorithm is DQN else "Pendulum-v1"
    kwargs = dict(questions=[UPRIGHT], net_arch=[8], qa_every=every)
    model = algorithm("QAMlpPolicy", env, learning_starts=40, seed=0, policy_kwargs=kwargs)
    model.learn(80, callback=QACallback())
    assert model._n_updates >= 10
    assert model.policy.qa_head.n_updates.item() == -(-model._n_updates // (every or 1))


def test_the_actor_is_shaped_though_it_takes_fewer_steps() -> None:
    def trained(**qa: Any) -> Any:
        kwargs = dict(questions=[UPRIGHT], net_arch=[8])
        model = TD3("QAMlpPolicy", "Pendulum-v1", policy_kwargs={**kwargs, **qa}, learning_starts=40, seed=0)
        return model.learn(80, callback=QACallback()).policy

    alone = [trained(qa_trunk_gradient=share, qa_readouts=["actor.mu"]) for share in (0.0, 1.0)]
    assert not any(a.equal(b) for a, b in zip(*(list(p.actor.parameters()) for p in alone), strict=True))
    with pytest.raises(QAError, match=r"qa_every got 4 with policy_delay=2.*give qa_every=3"):
        trained(qa_every=4)
