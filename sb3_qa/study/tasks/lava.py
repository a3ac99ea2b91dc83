"""MiniGrid's LavaGapS7 from pixels: a room cut in two by lava with one gap; the catastrophe is to step into the lava.

The floor is slippery: now and then the agent is turned to a side before its action. On a firm floor PPO has no accident any more
after 80,000 steps, and there would be nothing to veto; here it has to choose whether to walk along the lava.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_qa import Choice, Number, Question
from sb3_qa.study.oracle import Counterfactuals, deep_copy
from sb3_qa.study.task import Task
from sb3_qa.truth import after, always, eventually, lowest, now, steps_until

ACTIONS = ["left", "right", "forward"]  # MiniGrid's other four do nothing here
LIMIT = 100
SLIP = 0.1  # probability of being turned
TILE = 8  # pixels; the agent sees 7 x 7 tiles, itself at the middle of the lower edge


class LavaFacts(gym.Wrapper[Any, Any, Any, Any]):
    """Three actions, a slippery floor, and the facts of the grid in ``info``: told in here, before the environment resets itself."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return obs, {**info, **self._facts()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        room: Any = self.unwrapped
        if self.np_random.random() < SLIP:
            room.agent_dir = int(room.agent_dir + self.np_random.choice((-1, 1))) % 4
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward), terminated, truncated, {**info, **self._facts()}

    def _facts(self) -> dict[str, Any]:
        room: Any = self.unwrapped
        (x, y), (gap_x, gap_y), (goal_x, goal_y) = room.agent_pos, room.gap_pos, room.goal_pos
        to_left = room.agent_pos - room.right_vec
        here, ahead, left = (_kind(room, at) for at in (room.agent_pos, room.front_pos, to_left))
        sides = [_kind(room, (x + dx, y + dy)) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        return {
            "lava": here == "lava",
            "goal": here == "goal",
            "lava_ahead": ahead == "lava",
            "wall_ahead": ahead == "wall",
            "lava_left": left == "lava",
            "beside_lava": "lava" in sides,
            "side": "before" if x < gap_x else "gap" if x == gap_x else "beyond",
            "facing": ("right", "down", "left", "up")[room.agent_dir],
            "gap_rows": abs(int(gap_y - y)),
            "goal_steps": int(abs(goal_x - x) + abs(goal_y - y)),
        }


def _kind(room: Any, at: Any) -> str:
    thing = room.grid.get(int(at[0]), int(at[1]))
    return "" if thing is None else str(thing.type)


def make() -> gym.Env[Any, Any]:
    import minigrid  # noqa: F401  (registers its environments)
    from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper

    wrappers: tuple[Any, Any] = RGBImgPartialObsWrapper, ImgObsWrapper  # which have no annotations
    room = gym.make("MiniGrid-LavaGapS7-v0", max_steps=LIMIT)
    return LavaFacts(wrappers[1](wrappers[0](room, tile_size=TILE)))


class Tiles(BaseFeaturesExtractor):
    """A small convolutional network whose first layer looks at one tile at a time."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 16, TILE, stride=TILE),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 3 * 3, features_dim),
            nn.ReLU(),
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.cnn(observations)
        return out


TASK = Task(
    name="lava",
    title="MiniGrid LavaGapS7 from pixels (lava)",
    make=make,
    questions=[
        Question(
            "Will I be in the lava within {k} steps if I choose {action}?",
            eventually("lava", within="k"),
            k=[1, 2, 5, 10],
            name="lava",
        ),
        Question("Is lava right ahead of me?", now("lava_ahead"), name="lava_ahead"),
        Question("Is a wall right ahead of me?", now("wall_ahead"), name="wall_ahead"),
        Question("Is lava right to my left?", now("lava_left"), name="lava_left"),
        Question("Will I be beside lava within {k} steps?", eventually("beside_lava", within="k"), k=[3], name="near"),
        Question("Will I reach the goal within {k} steps?", eventually("goal", within="k"), k=[5, 10], name="goal"),
        Question(
            "Will I stay clear of what is beside lava for 5 steps?",
            always(lambda step: not step.info["beside_lava"], during=5),
            name="clear",
        ),
        Question("Which side of the lava am I on?", now("side"), Choice("before", "gap", "beyond"), name="side"),
        Question(
            "Which side of the lava will I be on {k} steps from now?",
            after("side", steps="k"),
            Choice("before", "gap", "beyond"),
            k=[5],
            name="side_later",
        ),
        Question(
            "Which way will I face after choosing {action}?",
            after("facing", steps=1),
            Choice("right", "down", "left", "up"),
            name="facing",
        ),
        Question("How many rows am I away from the gap?", now("gap_rows"), Number(0, 5), name="gap_rows"),
        Question("How many cells away is the goal?", now("goal_steps"), Number(0, 8), name="distance"),
        Question(
            "How close will I have come to the goal in 5 steps?",
            lowest("goal_steps", over=5),
            Number(0, 8),
            name="closest",
        ),
        Question("How many steps until I am at the goal?", steps_until("goal", cap=20), name="until_goal"),
    ],
    catastrophe="lava",
    risk="lava[k=2]",
    # Of each step that is not yet the goal's a little is taken, and of the lava more than could be saved by ending it all there.
    reward={"lava[k=2]": -5.0, "until_goal": -0.01},
    penalty=1.0,
    algorithm=PPO,
    hyperparameters=dict(
        n_steps=128, batch_size=256, n_epochs=4, learning_rate=7e-4, gamma=0.97, gae_lambda=0.95, ent_coef=0.01
    ),
    policy="CnnPolicy",
    policy_kwargs=dict(features_extractor_class=Tiles, net_arch=[64]),
    timesteps=80_000,
    n_envs=8,
    evaluation_envs=20,
    solved=0.6,
    oracle=Counterfactuals(deep_copy, catastrophe="lava", horizon=2),
    quick=dict(timesteps=2_048, episodes=16),
)
