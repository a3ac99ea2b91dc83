"""Labels of hindsight's virtual goals: recomputed where that can be done, and without its bias."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Number, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.hindsight import Hindsight, VirtualGoals
from sb3_qa.policies import qa_policy
from sb3_qa.truth import always, eventually, now, peak, total

CELLS = 7
HORIZONS = list(range(1, 13))


class GoalWalk(gym.Env[Any, Any]):
    """A walk along cells by actions that always do as they say; the goal is one of the cells. Nothing ends but the time."""

    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        each = spaces.Box(0.0, 1.0, (CELLS,), np.float32)
        self.observation_space = spaces.Dict({"observation": each, "achieved_goal": each, "desired_goal": each})

    def _told(self) -> dict[str, Any]:
        here = np.eye(CELLS, dtype=np.float32)[self.cell]
        return {"observation": here, "achieved_goal": here, "desired_goal": np.eye(CELLS, dtype=np.float32)[self.goal]}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.goal = self.np_random.integers(CELLS, size=2).tolist()
        self.t = 0
        return self._told(), {"is_success": False}

    def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
        return (np.argmax(achieved, axis=-1) == np.argmax(desired, axis=-1)) - 1.0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.cell = int(np.clip(self.cell + 2 * int(action) - 1, 0, CELLS - 1))
        self.t += 1
        obs = self._told()
        reward = float(self.compute_reward(obs["achieved_goal"], obs["desired_goal"], {}))
        return obs, reward, False, self.t >= 15, {"is_success": reward == 0.0}


def there(step: Any) -> Any:
    """For one step, and for a minibatch as one step."""
    return (step.obs["achieved_goal"] * step.obs["desired_goal"]).sum(-1) > 0


def probability_within(k: int) -> np.ndarray:
    """Of reaching the goal by taking an action and random ones after it: (cells, goals, actions)."""
    within = np.zeros((CELLS, CELLS))  # within no step, of the state itself not counted
    step = np.clip(np.arange(CELLS)[:, None] + np.array([-1, 1]), 0, CELLS - 1)
    for _ in range(k):
        at = np.maximum(within, np.eye(CELLS))
        acted = at[step].transpose(0, 2, 1)
        within = acted.mean(-1)
    return acted


class OneGoal(GoalWalk):
    """Always the same goal, so that nothing but hindsight tells about others."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        _, info = super().reset(**kwargs)
        self.goal = CELLS - 1
        return self._told(), info


def far(step: Any) -> Any:
    return np.abs(np.argmax(step.obs["achieved_goal"], -1) - np.argmax(step.obs["desired_goal"], -1))


def train(questions: list[Question], steps: int, env: type = GoalWalk, **kwargs: Any) -> DQN:
    """An agent that always takes random actions, so that there is one truth."""
    torch.set_num_threads(1)
    given: dict[str, Any] = dict(
        learning_rate=2e-3,
        batch_size=128,
        train_freq=1,
        buffer_size=20_000,
        learning_starts=300,
        exploration_initial_eps=1.0,
        exploration_final_eps=1.0,
        seed=0,
    )
    model = DQN(
        qa_policy(DQN, "MultiInputPolicy"),
        DummyVecEnv([env for _ in range(4)]),
        replay_buffer_class=HerReplayBuffer,
        policy_kwargs=dict(questions=questions, net_arch=[64, 64]),
        **(given | kwargs),
    )
    return model.learn(steps, callback=QACallback())


def every_state() -> dict[str, np.ndarray]:
    cell, goal = (x.ravel() for x in np.mgrid[:CELLS, :CELLS])
    one_hot = np.eye(CELLS, dtype=np.float32)
    return {"observation": one_hot[cell], "achieved_goal": one_hot[cell], "desired_goal": one_hot[goal]}


def answers(model: Any, name: str) -> np.ndarray:
    qa = QuestionAnswerer.from_model(model)
    told = np.stack([qa.ask(f"{name}[k={k}]", every_state()).probability for k in HORIZONS])
    return told.reshape(len(HORIZONS), CELLS, CELLS, -1)


def within(**kwargs: Any) -> Question:
    ((name, fact),) = kwargs.items()
    return Question(
        f"Will {name} hold within {{k}} steps if I choose {{action}}?",
        eventually(fact, within="k"),
        k=[1, 4],
        name=name,
    )


def at_once(step: Any) -> Any:
    """Right for one step; for 7 steps at once it is of the right shape, and wrong."""
    return (step.obs["achieved_goal"] == step.obs["desired_goal"]).all(axis=0)


def swallows(step: Any) -> Any:
    try:
        return bool(step.info["is_success"])
    except Exception:
        return there(step)


RECOMPUTED = [
    within(there=there),
    within(paid=lambda step: step.reward == 0),
    within(single=lambda step: bool(np.array_equal(step.obs["achieved_goal"], step.obs["desired_goal"]))),
    within(at_once=at_once),
]
OTHERS = [
    Question("Am I there?", now(there), name="now"),
    Question("Away for 2 if {action}?", always(lambda step: not there(step), during=2), name="away"),
    Question("How far next if {action}?", peak(far, over=1), Number(0, CELLS), name="far"),
]
LEFT_OUT = [
    Question("Will I be there within 4 steps?", eventually(there, within=4), name="state"),
    Question("How often in 5 if {action}?", total(there, over=5), Number(0, 5), name="often"),
    Question("Paid now?", now(lambda step: step.reward == 0), name="paid_now"),
    within(info=lambda step: step.info["is_success"]),
    within(is_success="is_success"),
    within(truncated=lambda step: there(step) and not step.truncated),
    within(acted=lambda step: there(step) and step.action == 1),
    within(swallows=swallows),
    within(at_wall=lambda step: step.obs["observation"][0] > 0),
]


@pytest.mark.parametrize("batch_size", [9, 64])
def test_labels_of_virtual_goals_are_those_recomputed_by_hand(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n_checked = n_reached = 0
    original = Hindsight.labels

    def labels(self: Hindsight, goals: VirtualGoals) -> Any:
        nonlocal n_checked, n_reached
        y, weight = original(self, goals)
        buffer, place = self.buffer, (goals.position, goals.env)
        goal = goals.goal.argmax(-1)
        here, there_ = (
            kept["achieved_goal"][place].argmax(-1) for kept in (buffer.observations, buffer.next_observations)
        )
        qa = answerer[0]
        after = {key: value[place] for key, value in buffer.next_observations.items()} | {"desired_goal": goals.goal}
        for target in qa.catalogue.targets:
            name, own = target.question.name, slice(target.start, target.stop)
            if target.question in LEFT_OUT:
                assert not weight[:, own].any(), name
            elif target.kind == "event":
                happens = there_ == goal
                np.testing.assert_array_equal(y[:, target.start], happens, name)
                assert (weight[:, target.start] == 1).all()
                assert not weight[happens, target.start + 1 : target.stop].any()
                n_reached += int(happens.sum())
                if name == "there" and n_checked % 10 == 0:  # it goes on as the answerer says, of random actions
                    asked = [qa.ask(f"there[k={k}]", after).probability.mean(-1) for k in (1, 4)]
                    rest = ~happens
                    hazard_free = weight[rest, own]
                    np.testing.assert_allclose(hazard_free[:, 1], 1.0, atol=1e-6)
                    np.testing.assert_allclose(hazard_free[:, 2], 1.0 - asked[0][rest], atol=1e-5)
                    np.testing.assert_allclose(y[rest, target.start + 1], asked[0][rest], atol=1e-5)
            elif name == "now":
                assert (weight[:, own] == 1).all()
                np.testing.assert_array_equal(y[:, target.start], here == goal)
            else:
                assert name == "far"
                grid = np.linspace(0, CELLS, target.width)
                np.testing.assert_allclose(y[:, own] @ grid, np.abs(there_ - goal), atol=1e-4)
        n_checked += 1
        return y, weight

    monkeypatch.setattr(Hindsight, "labels", labels)
    from_model = QuestionAnswerer.from_model
    answerer: list[QuestionAnswerer] = []
    monkeypatch.setattr(QuestionAnswerer, "from_model", lambda model: answerer.append(from_model(model)) or answerer[0])
    train([*RECOMPUTED, *OTHERS, *LEFT_OUT], 1200, batch_size=batch_size)
    assert n_checked > 50 and n_reached > 100


def test_virtual_goals_teach_about_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against the known probabilities of every cell and goal: with hindsight, and with its goals left out."""
    questions = [
        Question(
            "Will I be there within {k} steps if I choose {action}?",
            eventually(there, within="k"),
            k=HORIZONS,
            name="if",
        )
    ]
    known = np.stack([probability_within(k) for k in HORIZONS])
    errors = []
    for labels in (
        Hindsight.labels,
        lambda self, goals: np.zeros((2, len(goals.position), self._n_columns), np.float32),
    ):
        monkeypatch.setattr(Hindsight, "labels", labels)
        told = answers(train(questions, 6000, env=OneGoal), "if")
        errors.append(float(np.abs(told - known).mean()))
    assert errors[0] < 0.12 and errors[1] > 0.25, errors
