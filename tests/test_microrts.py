"""microRTS as an environment: seeds, masks, clones, and what it tells."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gym_env
from stable_baselines3.common.env_checker import check_env

from sb3_qa import QAError
from sb3_qa.study import microrts
from sb3_qa.study.microrts import MicroRTS
from sb3_qa.study.task import load_task

needs_the_game = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gym_microrts", "jpype")),
    reason="microRTS is not installed",
)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microrts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QAError, match="pip install --no-deps gym-microrts"):
        MicroRTS()


def play(env: MicroRTS, seed: int, steps: int = 150) -> list[tuple[Any, ...]]:
    rng, told = np.random.default_rng(seed), []
    obs, info = env.reset(seed=seed)
    for _ in range(steps):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        obs, reward, terminated, truncated, info = env.step(action)
        told.append((obs, reward, terminated, truncated, info))
        if terminated or truncated:
            break
    return told


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x[0], y[0]) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


@needs_the_game
def test_environment_keeps_to_the_interfaces() -> None:
    check_env(MicroRTS())
    check_gym_env(MicroRTS(), skip_render_check=True)


@needs_the_game
def test_java_survives_pygame() -> None:
    """Imported after Java's start it would take from the handler of signals what Java's needs to know."""
    flags = 4  # SA_SIGINFO
    code = f"""
import ctypes
from sb3_qa.study.microrts import MicroRTS
MicroRTS()
import pygame
told = (ctypes.c_ulong * 32)()
ctypes.CDLL(None).sigaction(11, None, told)
assert told[17] & {flags}, list(told)
"""
    pytest.importorskip("pygame")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_the_game
def test_a_seed_is_a_game_and_seeds_differ() -> None:
    env = MicroRTS()
    assert same(play(env, 1), play(env, 1)) and same(play(env, 1), play(MicroRTS(), 1))
    assert len({env.reset(seed=seed)[1]["time"] for seed in range(10)}) > 3


@needs_the_game
def test_two_games_in_one_process_do_not_disturb_each_other() -> None:
    first, second = MicroRTS(), MicroRTS("ai.abstraction.LightRush")
    alone = play(first, 2)
    rng, told = np.random.default_rng(2), []
    first.reset(seed=2)
    second.reset(seed=3)
    for _ in range(len(alone)):
        told.append(first.step(int(rng.choice(np.flatnonzero(first.action_masks())))))
        if second.step(0)[2]:
            second.reset()
    assert same(alone, told)


@needs_the_game
def test_masks_are_what_the_unit_can_do() -> None:
    env = MicroRTS(latest_start=0)
    _, info = env.reset(seed=0)
    assert info["asked"] == "base"
    allowed = set(np.flatnonzero(env.action_masks()).tolist())
    workers = {microrts.FIRST_PRODUCE + 6 * direction + microrts.TYPES.index("Worker") - 1 for direction in range(4)}
    assert 0 in allowed and allowed - {0} <= workers and len(allowed) > 1  # a base makes nothing but workers
    *_, info = env.step(max(allowed))
    assert info["busy"] == 1 and info["asked"] == "worker"
    assert info["own_resources"] == 5  # paid for once the worker is there
    while info["own_workers"] < 2:
        *_, info = env.step(0)
    assert info["own_resources"] == 4 and info["own_units"] == 2


@needs_the_game
def test_an_order_that_cannot_be_carried_out_is_to_wait() -> None:
    one, other = MicroRTS(), MicroRTS()
    one.reset(seed=4)
    other.reset(seed=4)
    forbidden = int(np.flatnonzero(~one.action_masks())[0])
    assert same([one.step(forbidden)], [other.step(0)])


@needs_the_game
def test_who_only_waits_loses_the_base_and_the_game() -> None:
    env = MicroRTS()
    env.reset(seed=0)
    infos = []
    for _ in range(2000):
        _, reward, terminated, truncated, info = env.step(0)
        infos.append(info)
        if terminated or truncated:
            break
    assert terminated and info["defeated"] and not info["won"] and reward < -9
    assert sum(each["lost"] for each in infos) == 1 and any(each["lost_base"] for each in infos)
    assert any(each["threatened"] for each in infos) and not info["own_base"] and info["enemy_base"]
    assert not env.action_masks()[1:].any()


@needs_the_game
def test_a_game_out_of_time_is_cut() -> None:
    env = MicroRTS(max_cycles=60)
    *_, last = play(env, 0)
    assert last[3] and not last[2] and last[4]["time"] == 60


@needs_the_game
def test_a_clone_lives_by_itself() -> None:
    env = MicroRTS()
    env.reset(seed=5)
    for _ in range(20):
        env.step(int(np.flatnonzero(env.action_masks())[-1]))
    clone = env.clone()

    def seen(game: MicroRTS) -> Any:
        return game._observe(game._look())

    before = seen(env)
    for _ in range(30):
        clone.step(int(np.flatnonzero(clone.action_masks())[-1]))
    assert np.array_equal(seen(env), before) and not np.array_equal(seen(clone), before)


@needs_the_game
@pytest.mark.parametrize("opponent", ["WorkerRush", "LightRush"])
def test_a_clone_goes_on_as_the_game_does(opponent: str) -> None:
    """Whatever the opponent has planned: by many plans, in games that both sides play on with."""
    env, rng = MicroRTS(f"ai.abstraction.{opponent}"), np.random.default_rng(0)
    for seed in range(6):
        env.reset(seed=seed)
        for _ in range(200):
            clones = [env.clone()]
            actions, ahead = [], []
            for _ in range(15):
                choices = np.flatnonzero(clones[0].action_masks())
                actions.append(
                    int(rng.choice(choices[choices < 13] if rng.random() < 0.5 and len(choices) > 1 else choices))
                )
                ahead.append(clones[0].step(actions[-1]))
                if ahead[-1][2] or ahead[-1][3]:
                    break
            if not same([env.step(action) for action in actions], ahead):
                raise AssertionError(f"seed {seed}: a clone went another way")
            if ahead[-1][2] or ahead[-1][3]:
                break


def left_alone(env: MicroRTS) -> list[tuple[Any, ...]]:
    """What comes of the game when the agent only waits."""
    told = [env.step(0)]
    while not (told[-1][2] or told[-1][3]):
        told.append(env.step(0))
    return told


@needs_the_game
def test_a_clones_opponent_goes_on_with_its_plans() -> None:
    """A builder on its way has a place in mind, that it would choose another one for if it were asked anew."""
    env = MicroRTS("ai.abstraction.LightRush", latest_start=0)
    env.reset(seed=0)
    ahead = left_alone(env.clone())
    assert ahead[-1][4]["time"] < 500  # asked anew every cycle it would take 654
    env.reset(seed=0)  # and forget what it planned at the end of another game
    for t in range(12):
        assert same(left_alone(env.clone()), ahead[t:])
        env.step(0)


@needs_the_game
@pytest.mark.parametrize("wrong", [dict(opponent="ai.abstraction.NoSuchRush"), dict(board="maps/none.xml")])
def test_an_opponent_or_a_map_that_is_not_there_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QAError, match="expected a"):
        MicroRTS(**wrong)


def test_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(QAError, match="expected one of"):
        load_task("chess")
