"""The navigation tasks: their dynamics, their walls, and the risk that is known of each action."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gym_env
from stable_baselines3.common.env_checker import check_env

from sb3_qa import QAError
from sb3_qa.study.navigation import LAYOUTS, Navigation


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*Box observation space minimum value is -infinity.*")
@pytest.mark.filterwarnings("ignore:.*Box observation space maximum value is infinity.*")
def test_environment_keeps_to_the_interfaces(layout: str) -> None:
    check_env(Navigation(layout))
    check_gym_env(Navigation(layout), skip_render_check=True)


def drive(
    env: Navigation, *pushes: tuple[float, float], seed: int = 0
) -> list[tuple[float, bool, bool, dict[str, bool]]]:
    env.reset(seed=seed)
    told = []
    for push in pushes:
        _, reward, terminated, truncated, info = env.step(np.array(push, np.float32))
        told.append((reward, terminated, truncated, info))
        if terminated or truncated:
            break
    return told


def test_straight_on_is_the_way_through_the_corridor_and_into_the_block() -> None:
    told = drive(Navigation("corridor"), *[(1.0, 0.0)] * 100)
    assert told[-1][1] and told[-1][3] == {"constraint": False, "success": True} and 40 < len(told) < 52
    told = drive(Navigation("block"), *[(1.0, 0.0)] * 100)
    assert told[-1][1] and told[-1][3] == {"constraint": True, "success": False} and 16 < len(told) < 26


def test_a_wall_ends_the_episode_and_time_cuts_it() -> None:
    told = drive(Navigation("corridor"), *[(0.0, 1.0)] * 100)
    assert told[-1][3]["constraint"] and 2 < len(told) < 9
    told = drive(Navigation("corridor"), *[(0.0, 0.0)] * 200)
    assert len(told) == 100 and told[-1][2] and not told[-1][1]


def test_the_reward_is_minus_the_distance_of_the_state_that_is_left() -> None:
    env = Navigation()
    obs, _ = env.reset(seed=3)
    assert env.step(np.zeros(2, np.float32))[1] == pytest.approx(-float(np.linalg.norm(obs)), rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "position", "action"),
    [
        ("corridor", (-20.0, 4.0), (0.0, 1.0)),
        ("corridor", (-20.0, 4.0), (0.0, 0.93)),
        ("corridor", (-20.0, -4.06), (0.3, -1.0)),
        ("block", (-31.0, 7.45), (1.0, 0.0)),
        ("block", (-40.0, 0.0), (1.0, 0.0)),
    ],
)
def test_the_known_risk_is_how_often_it_happens(
    layout: str, position: tuple[float, float], action: tuple[float, float]
) -> None:
    env, n = Navigation(layout), 4000
    env.reset(seed=1)
    hits = 0
    for _ in range(n):
        env.position, env.n_steps = np.array(position), 0
        hits += env.step(np.array(action, np.float32))[4]["constraint"]
    risk = float(env.risk(np.array(position), np.array(action)))
    assert abs(hits / n - risk) < 4 * np.sqrt(max(risk * (1 - risk), 1e-3) / n)
    both = env.risk(np.array([position, (-50.0, 0.0)]), np.array([action, (0.0, 0.0)]))
    assert both.shape == (2,) and both[0] == risk and both[1] < 1e-12


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(QAError, match=r"layout='maze'; expected one of \['block', 'corridor'\]"):
        Navigation("maze")
