"""The shipped environments: their contract, and that what they call exact is what they do."""

import itertools
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_qa.errors import QAError
from sb3_qa.testing import ActionWalk, RandomWalk

WALKS = [RandomWalk, ActionWalk, lambda: RandomWalk(cells=2), lambda: ActionWalk(cells=3, slip=0.0, time_limit=2)]


def share_of_hits(env, k, cell, first_action, policy, n):
    """Share of n walks from a cell that hit within k steps: the environment itself, counted."""
    rng = np.random.default_rng(cell)
    hits = 0
    for _ in range(n):
        env.reset(options={"cell": cell})
        action = first_action
        for _ in range(k):
            _, _, terminated, _, info = env.step(action)
            if terminated:
                hits += 1
                break
            action = int(rng.random() < policy[info["cell"], 1])
    return hits / n


def four_errors(p, n):
    return 4 * np.sqrt(p * (1 - p) / n) + 1e-12


class TestContract:
    @pytest.mark.parametrize("make", WALKS)
    def test_environment_checkers(self, make):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(make(), skip_render_check=True)
            sb3_check_env(make())

    @pytest.mark.parametrize("make", WALKS)
    def test_info_reward_and_observation_agree_with_the_cell(self, make):
        env = make()
        for episode in range(30):
            obs, info = env.reset(seed=episode)
            assert info["cell"] in range(1, env.cells)
            over = terminated = False
            while not over:
                assert obs.dtype == np.float32
                assert np.flatnonzero(obs).tolist() == [info["cell"]]
                assert obs.sum() == 1
                assert type(info["hit"]) is bool
                assert type(info["cell"]) is int
                assert info["hit"] is terminated is (info["cell"] == 0)
                cell = info["cell"]
                obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
                assert info["cell"] in (cell - 1, min(cell + 1, env.cells - 1))
                assert reward == (0.0 if terminated else 1.0)
                over = terminated or truncated
                assert not (terminated and truncated)
            assert set(info) == {"hit", "cell"}

    def test_starts_uniformly_outside_the_catastrophe(self):
        env = RandomWalk(cells=5)
        env.reset(seed=0)
        starts = np.bincount([env.reset()[1]["cell"] for _ in range(4000)], minlength=5) / 4000
        assert starts[0] == 0
        np.testing.assert_allclose(starts[1:], 0.25, atol=four_errors(0.25, 4000))

    @pytest.mark.parametrize("make", [RandomWalk, ActionWalk])
    def test_a_seed_makes_the_episode(self, make):
        def episode(seed):
            env = make()
            cells = [env.reset(seed=seed)[1]["cell"]]
            for action in itertools.cycle([0, 1, 1]):
                _, _, terminated, truncated, info = env.step(action)
                cells.append(info["cell"])
                if terminated or truncated:
                    return cells

        assert episode(3) == episode(3)
        assert len({tuple(episode(seed)) for seed in range(10)}) > 5

    def test_no_action_changes_a_random_walk(self):
        def cells(action):
            env = RandomWalk(cells=30, time_limit=20)
            env.reset(seed=1, options={"cell": 29})
            return [env.step(action)[4]["cell"] for _ in range(20)]

        assert cells(0) == cells(1)

    def test_actions_steer_an_action_walk(self):
        env = ActionWalk(cells=7, slip=0.0)
        _, info = env.reset(options={"cell": 3})
        assert info == {"hit": False, "cell": 3}
        path = [env.step(action)[4]["cell"] for action in (1, 1, 1, 1, 0, 0)]
        assert path == [4, 5, 6, 6, 5, 4]  # the last cell reflects

    @pytest.mark.parametrize("limit", [1, 7])
    def test_the_time_limit_truncates(self, limit):
        env = ActionWalk(slip=0.0, time_limit=limit)
        env.reset(seed=0, options={"cell": 3})
        steps = [env.step(1) for _ in range(limit)]
        assert [step[3] for step in steps] == [False] * (limit - 1) + [True]
        assert not any(step[2] for step in steps)

    def test_a_hit_on_the_last_step_terminates_and_does_not_truncate(self):
        env = ActionWalk(slip=0.0, time_limit=2)
        env.reset(options={"cell": 2})
        env.step(0)
        obs, reward, terminated, truncated, info = env.step(0)
        assert (reward, terminated, truncated, info["hit"], obs[0]) == (0.0, True, False, True, 1.0)

    def test_the_defaults(self):
        assert (RandomWalk().cells, RandomWalk().time_limit) == (11, 30)
        assert (ActionWalk().cells, ActionWalk().slip, ActionWalk().time_limit) == (7, 0.2, 30)


class TestRandomWalkProbabilities:
    def test_by_hand(self):
        walk = RandomWalk(cells=4)
        np.testing.assert_array_equal(walk.probability_within(0), [1, 0, 0, 0])
        np.testing.assert_array_equal(walk.probability_within(1), [1, 1 / 2, 0, 0])
        np.testing.assert_array_equal(walk.probability_within(2), [1, 1 / 2, 1 / 4, 0])
        # From 1: L, or RLL. From 2: LL only. From 3: LLL only (RLL ends in 1).
        np.testing.assert_array_equal(walk.probability_within(3), [1, 1 / 2 + 1 / 8, 1 / 4, 1 / 8])
        # From 3 in 4: LLL*, RLLL. From 2 in 4: LL**, LRLL, RLLL.
        np.testing.assert_array_equal(walk.probability_within(4)[2:], [1 / 4 + 2 / 16, 1 / 8 + 1 / 16])

    @pytest.mark.parametrize("k", [1, 5, 9])
    def test_by_counting_every_path(self, k):
        walk = RandomWalk(cells=5)
        hits = np.zeros(5)
        for start, path in itertools.product(range(5), itertools.product((-1, 1), repeat=k)):
            cell = start
            for move in path:
                cell = min(cell + move, 4) if cell else 0
            hits[start] += cell == 0
        np.testing.assert_allclose(walk.probability_within(k), hits / 2**k)

    def test_by_reflection_principle(self):
        # Far from the reflecting end: P(hit within k | c) = P(S_k >= c) + P(S_k > c) for a free walk S.
        k, steps = 10, np.array([sum(path) for path in itertools.product((-1, 1), repeat=10)])
        expected = [np.mean(steps >= cell) + np.mean(steps > cell) for cell in range(1, 12)]
        np.testing.assert_allclose(RandomWalk(cells=40).probability_within(k)[1:12], expected)

    @pytest.mark.parametrize("k", [3, 12])
    def test_by_walking(self, k):
        env, n = RandomWalk(cells=6), 1000
        env.reset(seed=k)
        exact = env.probability_within(k)
        for cell in range(1, 6):
            share = share_of_hits(env, k, cell, 0, np.full((6, 2), 0.5), n)
            assert share == pytest.approx(exact[cell], abs=four_errors(exact[cell], n))

    def test_it_grows_with_the_horizon_and_falls_with_the_distance(self):
        curve = np.stack([RandomWalk().probability_within(k) for k in range(60)])
        assert np.all(np.diff(curve, axis=0) >= 0)
        assert np.all(np.diff(curve, axis=1) <= 0)
        assert RandomWalk().probability_within(5000)[10] == pytest.approx(1)

    def test_the_time_limit_is_no_part_of_it(self):
        short, long = RandomWalk(time_limit=2), RandomWalk(time_limit=90)
        np.testing.assert_array_equal(short.probability_within(40), long.probability_within(40))


class TestActionWalkProbabilities:
    def test_by_hand(self):
        walk = ActionWalk(cells=3, slip=0.2)
        away = [[0.0, 1.0]] * 3
        np.testing.assert_array_equal(walk.probability_within(0, away), [[1, 1], [0, 0], [0, 0]])
        np.testing.assert_allclose(walk.probability_within(1, away), [[1, 1], [0.8, 0.2], [0, 0]])
        # Left: hit at 0.8, else in 2. Right: hit at 0.2, else in 2; from 2 nothing hits in one step.
        # From 2, left: in 1 at 0.8, then slips at 0.2; right: slips twice.
        np.testing.assert_allclose(walk.probability_within(2, away), [[1, 1], [0.8, 0.2], [0.16, 0.04]])
        # From 2 in three, staying first and then slipping twice counts too.
        expected = [0.8 * 0.2 + 0.2 * 0.04, 0.2 * 0.2 + 0.8 * 0.04]
        np.testing.assert_allclose(walk.probability_within(3, away)[2], expected)

    @pytest.mark.parametrize("k", [1, 4, 10])
    def test_by_walking(self, k):
        env, n = ActionWalk(cells=5, slip=0.3), 1000
        env.reset(seed=k)
        policy = np.array([[0.5, 0.5], [0.1, 0.9], [0.6, 0.4], [1.0, 0.0], [0.3, 0.7]])
        exact = env.probability_within(k, policy)
        assert exact.shape == (5, 2)
        for cell, action in itertools.product(range(1, 5), range(2)):
            share = share_of_hits(env, k, cell, action, policy, n)
            assert share == pytest.approx(exact[cell, action], abs=four_errors(exact[cell, action], n))

    @pytest.mark.parametrize("k", [1, 3, 20])
    def test_even_slips_make_it_the_random_walk(self, k):
        policy = np.random.default_rng(0).dirichlet([1, 1], 6)
        exact = ActionWalk(cells=6, slip=0.5).probability_within(k, policy)
        np.testing.assert_allclose(exact, np.tile(RandomWalk(cells=6).probability_within(k)[:, None], 2))

    def test_the_first_action_is_one_step_and_the_policy_the_rest(self):
        walk = ActionWalk()
        policy = np.random.default_rng(0).dirichlet([1, 1], 7)
        state = (policy * walk.probability_within(8, policy)).sum(axis=1)
        first = walk.probability_within(9, policy)
        assert first[3, 0] == pytest.approx(0.8 * state[2] + 0.2 * state[4])
        assert first[6, 1] == pytest.approx(0.8 * state[6] + 0.2 * state[5])

    def test_left_is_never_safer(self):
        exact = ActionWalk().probability_within(10, np.full((7, 2), 0.5))
        assert np.all(exact[1:, 0] > exact[1:, 1])


class TestRefusals:
    @pytest.mark.parametrize(
        "call",
        [
            lambda: RandomWalk(cells=1),
            lambda: RandomWalk(cells=4.0),
            lambda: RandomWalk(time_limit=0),
            lambda: ActionWalk(slip=1.2),
            lambda: ActionWalk(slip=float("nan")),
            lambda: RandomWalk().probability_within(-1),
            lambda: RandomWalk().probability_within(True),
            lambda: ActionWalk().probability_within(3, [[0.5, 0.5]]),
            lambda: ActionWalk().probability_within(3, [[0.5, 0.6]] * 7),
            lambda: ActionWalk().probability_within(3, [[1.5, -0.5]] * 7),
            lambda: ActionWalk().probability_within(3, [[np.nan, 0.5]] * 7),
            lambda: ActionWalk().probability_within(3, "left"),
            lambda: RandomWalk().reset(options={"cell": 0}),
            lambda: RandomWalk().reset(options={"cell": 11}),
        ],
    )
    def test_says_what_was_got_what_was_expected_and_the_mend(self, call):
        with pytest.raises(QAError, match=r"(?s)^Got .+, expected .+: .+\.$"):
            call()

    @pytest.mark.parametrize("action", [2, -1, 0.5])
    def test_an_action_it_does_not_have(self, action):
        env = RandomWalk()
        env.reset(seed=0)
        with pytest.raises(QAError, match="0 \\(left\\) or 1 \\(right\\)"):
            env.step(action)

    def test_a_step_without_an_episode(self):
        env = ActionWalk(slip=0.0)
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(0)
        env.reset(options={"cell": 1})
        env.step(0)
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(0)
