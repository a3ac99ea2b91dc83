"""Observations that are not boxes: numbers, digits and bits, from training to a wrapper of one environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Question, QuestionAnswerer, Step
from sb3_qa.callbacks import QACallback
from sb3_qa.truth import eventually
from sb3_qa.wrappers import AnswerQuestions, VecAnswerQuestions


class Cells(gym.Env[Any, Any]):
    """A walk over eight cells, told by number, as digits, as bits, or in a dict; the first is a pit."""

    SPACES = {
        "discrete": spaces.Discrete(8),
        "multi_discrete": spaces.MultiDiscrete([2, 4]),
        "multi_binary": spaces.MultiBinary(8),
        "dict": spaces.Dict(cell=spaces.Discrete(8), bits=spaces.MultiBinary(8)),
    }

    def __init__(self, seen: str) -> None:
        self.seen, self.observation_space, self.action_space = seen, self.SPACES[seen], spaces.Discrete(2)

    def _obs(self) -> Any:
        bits = np.eye(8, dtype=np.int8)[self.cell]
        return {
            "discrete": np.int64(self.cell),
            "multi_discrete": np.array(divmod(self.cell, 4)),
            "multi_binary": bits,
            "dict": {"cell": np.int64(self.cell), "bits": bits},
        }[self.seen]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.cell, self.t = 4, 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.cell, self.t = int(np.clip(self.cell + self.np_random.choice([-1, 1]), 0, 7)), self.t + 1
        return self._obs(), 0.0, self.cell == 0, self.t == 20, {}


@pytest.mark.parametrize("seen", Cells.SPACES)
@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_observations_of_any_space_are_learnt_from_logged_and_asked_about(
    algorithm: Any, seen: str, tmp_path: Path
) -> None:
    pit = Question(
        "Will I fall within {k} steps if I choose {action}?", eventually(fallen, within="k"), k=[1, 3], name="pit"
    )
    given: dict[str, Any] = (
        dict(n_steps=64) if algorithm is PPO else dict(learning_starts=50, batch_size=32, train_freq=2)
    )
    env = VecAnswerQuestions(make_vec_env(lambda: Cells(seen), 2, seed=0))
    name = "QAMultiInputPolicy" if seen == "dict" else "QAMlpPolicy"
    model = algorithm(name, env, seed=0, policy_kwargs=dict(questions=[pit]), **given)
    model.learn(400, callback=QACallback())
    obs = env.reset()
    assert "qa/pit[k=1]" in env.reset_infos[0]
    answer = QuestionAnswerer.from_model(model).ask("pit[k=3]", obs).probability
    assert answer.shape == (2, 2) and np.isfinite(answer).all()
    QuestionAnswerer.from_model(model).save(tmp_path / "cells.qa")
    frozen = QuestionAnswerer.load(tmp_path / "cells.qa")
    np.testing.assert_array_equal(frozen.ask("pit[k=3]", obs).probability, answer)
    single = AnswerQuestions(Cells(seen), qa=frozen)
    _, info = single.reset(seed=0)
    assert np.isfinite(info["qa/pit[k=3]"]) and np.isfinite(single.step(0)[-1]["qa/pit[k=3]"])


def fallen(step: Step) -> bool:
    return step.terminated
