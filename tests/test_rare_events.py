"""The memory of rare events: what it keeps, how it weighs, and that only the head learns from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import QAError, Question
from sb3_qa.callbacks import QACallback
from sb3_qa.rare_events import RareEventMemory
from sb3_qa.truth import eventually, now

FALL = Question(
    "Will I fall within {k} steps if I choose {action}?", eventually("fallen", within="k"), k=[2, 4], name="fall"
)
LEAN = Question("Do I lean left?", now(lambda step: step.obs[2] < 0), name="lean")


def rows(rng: np.random.Generator, n: int, rates: np.ndarray) -> dict[str, Any]:
    """Transitions in states of a few kinds, each with a rate of its own."""
    kind = rng.integers(len(rates), size=n)
    event = rng.random(n) < rates[kind]
    return dict(
        obs=kind[:, None].astype(np.float32),
        features=None,
        y=event[:, None].astype(np.float32),
        weight=np.ones((n, 1), np.float32),
        event=event,
        risk=(rates[kind] * rng.uniform(0.2, 2.0, n)).astype(np.float32),  # answers are only so good
    )


def test_what_is_true_given_the_state_is_kept() -> None:
    rates, rng = np.array([0.0, 0.02, 0.3, 0.9]), np.random.default_rng(0)
    memory = RareEventMemory(capacity=3000, floor=0.05, seed=1)
    for _ in range(40):
        memory.offer(**rows(rng, 1000, rates))
    assert len(memory) == 3000 and memory.n_events == 1500
    more = memory.sample(400_000)
    assert more is not None and more.features is None
    kind, y, weight = more.obs[:, 0].astype(int), more.y[:, 0], more.weight[:, 0]
    found = np.array([np.average(y[kind == k], weights=weight[kind == k]) for k in range(4)])
    np.testing.assert_allclose(found, rates, atol=0.04)  # 1,500 of each kind stand for 40,000
    plain = np.array([y[kind == k].mean() for k in range(4)])
    assert plain[1] > 3 * rates[1]  # without the weights it would not be
    assert abs(weight.mean() - 1.0) < 0.02
    # Risky states count more than they were met: a quarter each.
    assert weight[kind == 2].sum() > 3 * weight[kind == 0].sum()


def test_a_reservoir_holds_all_that_was_offered_with_the_same_chance() -> None:
    counts = np.zeros(200)
    for seed in range(600):
        memory = RareEventMemory(capacity=40, seed=seed)
        for start in range(0, 200, 50):
            index = np.arange(start, start + 50)
            memory.offer(
                index,
                None,
                np.ones((50, 1), np.float32),
                np.ones((50, 1), np.float32),
                np.ones(50, np.bool_),
                np.ones(50),
            )
        more = memory.sample(4000)
        assert more is not None
        counts[np.unique(more.obs)] += 1
    expected = 600 * 20 / 200  # half of the capacity is for events
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert abs(counts[:50].mean() - counts[-50:].mean()) < 5


def test_nothing_is_remembered_before_the_first_event_and_dicts_are_kept_whole() -> None:
    memory = RareEventMemory(capacity=10)
    assert memory.sample(4) is None
    obs = {"a": np.arange(6.0), "b": np.arange(12).reshape(6, 2)}
    one = np.ones((6, 3), np.float32)
    memory.offer(obs, one[:, :2], one, one, np.zeros(6, np.bool_), np.ones(6, np.float32))
    assert len(memory) == 5 and memory.sample(4) is None
    memory.offer(obs, one[:, :2], one, one, np.arange(6) == 3, np.ones(6, np.float32))
    more = memory.sample(5)
    assert more is not None and more.features is not None
    assert set(more.obs) == {"a", "b"} and more.obs["b"].shape == (5, 2) and more.features.shape == (5, 2)
    np.testing.assert_array_equal(more.obs["b"][:, 0], 2 * more.obs["a"])
    assert (more.obs["a"][:2] == 3).all()  # half of them are of the only event


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(questions="fall"), r"expected names in a list; write \['fall'\]"),
        (dict(capacity=1), "capacity=1; expected a whole number, at least 2"),
        (dict(questions=[]), r"questions=\[\]; expected a list of names, at least one"),
        (dict(questions=3), r"expected a list of names"),
        (dict(questions=["fall", 3]), r"expected a list of names"),
        (dict(capacity=True), "capacity=True"),
        (dict(capacity=2.5), "capacity=2.5"),
        (dict(weight="x"), "weight='x'; expected a number above 0"),
        (dict(floor="x"), "floor='x'; expected above 0"),
        (dict(seed=-1), "seed=-1; expected a whole number"),
        (dict(seed=None), "seed=None"),
        (dict(weight=0.0), "weight=0.0; expected a number above 0"),
        (dict(floor=0.0), "floor=0.0; expected above 0"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QAError, match=message):
        RareEventMemory(**arguments)


def test_numbers_that_come_from_numpy() -> None:
    rates = np.array([0.0, 0.5])
    given = RareEventMemory(
        ["fall"], capacity=np.int64(101), weight=np.float32(0.5), floor=np.float64(0.5), seed=np.int32(3)
    )  # type: ignore[arg-type]
    plain = RareEventMemory(["fall"], capacity=101, weight=0.5, floor=0.5, seed=3)
    for memory in (given, plain):
        memory.offer(**rows(np.random.default_rng(0), 500, rates))
    a, b = given.sample(50), plain.sample(50)
    assert a is not None and b is not None and len(given) == 101
    np.testing.assert_array_equal(a.weight, b.weight)


def carts(n: int = 2) -> Any:
    import gymnasium as gym

    class Fallen(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated, truncated, {**info, "fallen": terminated}

    return make_vec_env("CartPole-v1", n, seed=0, wrapper_class=Fallen)


def agent(questions: Any = (FALL, LEAN), **kwargs: Any) -> Any:
    return PPO(
        "QAMlpPolicy",
        carts(),
        n_steps=64,
        batch_size=32,
        seed=0,
        policy_kwargs=dict(questions=list(questions), **kwargs),
    )


def test_questions_without_rare_events_and_replay_buffers_are_refused() -> None:
    with pytest.raises(QAError, match="QACallback got memory=3; expected a RareEventMemory"):
        QACallback(memory=3)  # type: ignore[arg-type]
    with pytest.raises(QAError, match=r"got \['lean'\]; expected names of questions with eventually"):
        agent().learn(64, callback=QACallback(memory=RareEventMemory(["lean"])))
    dqn = DQN("QAMlpPolicy", carts(1), policy_kwargs=dict(questions=[FALL]))
    with pytest.raises(QAError, match="expected an on-policy algorithm, as a replay buffer remembers by itself"):
        dqn.learn(64, callback=QACallback(memory=RareEventMemory()))


STILL = Question("Am I still?", LEAN.truth, name="still")


@pytest.mark.parametrize("others", [[FALL], [FALL, STILL], [FALL, STILL, LEAN]])
def test_what_other_questions_were_remembered_by_is_refused(others: Any) -> None:
    """Though the columns of the labels may fit."""
    memory = RareEventMemory()
    agent([FALL, LEAN]).learn(256, callback=QACallback(memory=memory))
    agent([FALL, LEAN]).learn(64, callback=QACallback(memory=memory))
    assert memory.n_events
    with pytest.raises(QAError, match=r"what it holds was labelled by .*; expected the same in the same order"):
        agent(others).learn(64, callback=QACallback(memory=memory))


def test_only_the_head_learns_from_it_and_only_about_its_questions() -> None:
    torch.set_num_threads(1)
    memory = RareEventMemory(["fall"])
    with_it, without = agent(qa_trunk_gradient=0.0), agent(qa_trunk_gradient=0.0)
    with_it.learn(512, callback=QACallback(memory=memory))
    without.learn(512, callback=QACallback())
    plain = PPO("MlpPolicy", carts(), n_steps=64, batch_size=32, seed=0).learn(512)
    assert memory.n_events > 10
    for one, other in zip(with_it.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(with_it.policy.qa_head.flat, without.policy.qa_head.flat)
    more = memory.sample(16)
    assert more is not None
    catalogue = with_it.policy.qa_head.catalogue
    for target in catalogue.targets:
        told = more.weight[:, target.start : target.stop]
        assert told.any() if target.question.name == "fall" else not told.any()
    assert with_it.policy.qa_joint.remember is None  # and training may go on with another, or none
    with_it.learn(128, callback=QACallback())


def test_the_gradient_is_that_of_both_losses_added() -> None:
    torch.set_num_threads(1)
    memory = RareEventMemory(["fall"], weight=0.7)
    model = agent(qa_trunk_gradient=0.0, qa_coef=0.5, qa_every=1)
    callback = QACallback(memory=memory)
    model.learn(256, callback=callback)
    policy, joint, head = model.policy, model.policy.qa_joint, model.policy.qa_head
    drawn = memory.sample(32)
    assert drawn is not None
    latents = [torch.as_tensor(x) for x in policy.qa_taps.read(policy, drawn.obs)]
    joint.remember = lambda n: (latents, drawn) if n == 32 else None
    new = memory.sample(32)  # any labelled rows will do for the minibatch
    assert new is not None

    class Store:
        panel = n_asked = None

        def batch(self, rows: Any) -> Any:
            return new.y, new.weight.copy(), new.features

    joint.store = Store()  # type: ignore[assignment]
    model.policy.set_training_mode(True)
    joint.hand_out(np.arange(32))
    head.flat.grad = None
    values, log_prob, _ = policy.evaluate_actions(torch.as_tensor(new.obs), torch.zeros(32))
    (values.sum() + log_prob.sum()).backward()
    got = head.flat.grad.clone()
    head.flat.grad = None
    total = torch.zeros(())
    for sample in (new, drawn):
        seen = torch.cat([torch.as_tensor(x) for x in policy.qa_taps.read(policy, sample.obs)], dim=1)
        logits = head(seen, torch.as_tensor(sample.features))
        cell = torch.nn.functional.softplus(logits) - torch.as_tensor(sample.y) * logits
        total = total + (torch.as_tensor(sample.weight) * cell).sum() / 32 / len(head.catalogue.targets)
    (0.5 * total).backward()
    torch.testing.assert_close(got, head.flat.grad, rtol=1e-4, atol=1e-6)
