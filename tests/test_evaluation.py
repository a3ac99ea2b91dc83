"""Episodes are counted and paired as they should be, and answers are held against what really happened."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qa import Choice, Number, QAError, Question, QuestionAnswerer
from sb3_qa.evaluation import AnswerRecord, SeededEpisodes, run_episodes, score_answers, seeded_vec_env
from sb3_qa.policies import qa_policy
from sb3_qa.truth import after, always, eventually, now, steps_until, total
from sb3_qa.wrappers import VecRandomVeto, VecShapeReward, VecVetoAction


class Countdown(gym.Env):
    """Counts down from a number drawn at reset; at 0 the episode terminates, in a crash if the last action was 1."""

    observation_space = gym.spaces.Box(0.0, 20.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, longest: int = 9, limit: int | None = None, fixed: int | None = None) -> None:
        self.longest, self.limit, self.fixed = longest, limit, fixed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.fixed or int(self.np_random.integers(2, self.longest))
        self.steps = 0
        return self._obs(), {"left": self.left, "crashed": False}

    def step(self, action):
        self.left, self.steps = self.left - 1, self.steps + 1
        terminated = self.left == 0
        truncated = self.limit is not None and self.steps >= self.limit and not terminated
        info = {"left": self.left, "crashed": bool(terminated and action == 1)}
        return self._obs(), float(action), terminated, truncated, info

    def _obs(self) -> np.ndarray:
        return np.array([self.left], np.float32)


class Always:
    """An agent that always does the same, and remembers what it was asked."""

    def __init__(self, action: int) -> None:
        self.action = action
        self.deterministic: list[bool] = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.deterministic.append(deterministic)
        return np.full(len(observation), self.action), None


QUESTIONS = [
    Question("Crash within {k} with {action}?", eventually("crashed", within="k"), k=[1, 3, 6], name="crash"),
    Question("Nearly over?", now(lambda step: step.obs[0] <= 2), name="nearly"),
    Question("Still above 2 for 2 steps?", always(lambda step: step.obs[0] > 2, during=2), name="above"),
    Question("How many in 2 steps?", after("left", steps=2), Number(0, 20), name="left"),
    Question("Odd in 1 step?", after(lambda s: s.info["left"] % 2, steps=1), Choice("even", "odd"), name="odd"),
    Question("How long?", steps_until(lambda step: step.terminated, cap=4), name="long"),
    Question("Reward in 3?", total(lambda step: step.reward, over=3), Number(0, 3), name="reward"),
]


@pytest.fixture(scope="module")
def qa() -> QuestionAnswerer:
    model = PPO(qa_policy(PPO), Countdown(), policy_kwargs=dict(questions=QUESTIONS), seed=0, device="cpu")
    return QuestionAnswerer.from_model(model)


def lengths_of(seeds: range) -> list[int]:
    env = Countdown()
    return [int(env.reset(seed=seed)[0][0]) for seed in seeds]


@pytest.mark.parametrize("n_envs", [1, 3, 4])
def test_episode_e_has_seed_e_whatever_the_number_of_environments(n_envs):
    venv = seeded_vec_env(Countdown, n_envs, seed=100)
    episodes = run_episodes(Always(1), venv, 10, catastrophe="crashed")
    assert episodes.lengths.tolist() == lengths_of(range(100, 110))
    assert episodes.returns.tolist() == lengths_of(range(100, 110))
    assert episodes.catastrophes.tolist() == [1] * 10
    assert len(set(episodes.lengths.tolist())) > 2


def test_rates_by_hand():
    venv = DummyVecEnv([lambda: Countdown(fixed=4), lambda: Countdown(fixed=6)])
    episodes = run_episodes(Always(1), venv, 4, catastrophe=lambda step: step.terminated and step.reward == 1)
    assert episodes.lengths.tolist() == [4, 6, 4, 6]
    assert episodes.catastrophes_per_1000.estimate == pytest.approx(4 / 20 * 1000)
    assert episodes.catastrophes_per_episode == (1.0, 1.0, 1.0)
    assert episodes.mean_return.estimate == 5.0
    assert episodes.vetoes.tolist() == [0] * 4 and np.isnan(episodes.traces[0].risk).all()
    assert set(episodes.summary()) >= {"catastrophes_per_1000", "mean_return", "vetoes_per_1000"}


def test_short_episodes_are_not_favoured():
    venv = DummyVecEnv([lambda: Countdown(fixed=2), lambda: Countdown(fixed=8)])
    assert run_episodes(Always(0), venv, 6, catastrophe="crashed").lengths.tolist() == [2, 8] * 3


def test_a_time_limit_is_no_catastrophe():
    venv = DummyVecEnv([lambda: Countdown(fixed=8, limit=3)])
    episodes = run_episodes(Always(1), venv, 2, catastrophe=lambda step: step.terminated)
    assert episodes.lengths.tolist() == [3, 3] and episodes.catastrophes.tolist() == [0, 0]
    assert [trace.truncated for trace in episodes.traces] == [True, True]


def test_what_wrappers_tell_is_counted(qa):
    def play(wrap):
        return run_episodes(Always(1), wrap(seeded_vec_env(Countdown, 2, 0)), 6, catastrophe="crashed")

    seen = play(lambda env: VecVetoAction(env, "crash[k=3]", 0.0, shadow=True, qa=qa))
    assert (seen.flags == seen.lengths).all() and not seen.vetoes.any()
    assert np.isfinite(seen.traces[0].risk).all()
    other = play(lambda env: VecVetoAction(env, "crash[k=3]", 0.0, on_veto=lambda obs, action: 0, qa=qa))
    assert (other.vetoes == other.lengths).all() and not other.catastrophes.any()
    assert (other.traces[0].actions == 0).all() and other.vetoes_per_1000.estimate == 1000.0
    rng = play(lambda env: VecRandomVeto(env, "crash[k=3]", 0.5, qa=qa))
    assert 0 < rng.vetoes.sum() < rng.lengths.sum()


def test_returns_are_the_environments_own(qa):
    shaped = VecShapeReward(seeded_vec_env(Countdown, 2, 0), {"nearly": -5.0}, qa=qa)
    normalised = VecNormalize(seeded_vec_env(Countdown, 2, 0))
    for venv in (shaped, normalised):
        episodes = run_episodes(Always(1), venv, 4, catastrophe="crashed")
        assert episodes.returns.tolist() == lengths_of(range(4))


def test_deterministic_is_passed_on():
    agent = Always(0)
    run_episodes(agent, seeded_vec_env(Countdown, 1, 0), 1, catastrophe="crashed", deterministic=True)
    assert set(agent.deterministic) == {True}


@pytest.mark.parametrize("n_episodes", [0, -1, 1.5, True])
def test_bad_numbers_of_episodes(n_episodes):
    with pytest.raises(QAError, match="n_episodes"):
        run_episodes(Always(0), seeded_vec_env(Countdown, 1, 0), n_episodes, catastrophe="crashed")


def test_an_unknown_catastrophe():
    with pytest.raises(QAError, match="'crash'.*'crashed'"):
        run_episodes(Always(0), seeded_vec_env(Countdown, 1, 0), 2, catastrophe="crash")
    with pytest.raises(QAError, match="catastrophe=None"):
        run_episodes(Always(0), seeded_vec_env(Countdown, 1, 0), 2, catastrophe=None)


def test_seeded_episodes_go_on_counting():
    env = SeededEpisodes(Countdown(), first=5, stride=3)
    starts = [int(env.reset(seed=99)[0][0]) for _ in range(4)]
    assert starts == [lengths_of(range(seed, seed + 1))[0] for seed in (5, 8, 11, 14)]


def truths(qa, venv, n_episodes):
    record = AnswerRecord(qa)
    run_episodes(Always(1), venv, n_episodes, catastrophe="crashed", record=record)
    return {key: truth for key, _, truth in record.answers()}, record


def test_truth_by_hand(qa):
    """One episode of 5 steps, decisions with 5, 4, 3, 2, 1 left; every one of its futures is known."""
    truth, record = truths(qa, DummyVecEnv([lambda: Countdown(fixed=5)]), 1)
    assert truth["crash[k=1]"].tolist() == [0, 0, 0, 0, 1]
    assert truth["crash[k=3]"].tolist() == [0, 0, 1, 1, 1]
    assert truth["crash[k=6]"].tolist() == [1, 1, 1, 1, 1]
    assert truth["nearly"].tolist() == [0, 0, 0, 1, 1]
    assert truth["above"].tolist() == [1, 0, 0, 0, 0]
    assert truth["left"].tolist() == [3, 2, 1, 0]  # the last decision has no state two steps later
    assert truth["odd"].tolist() == [0, 1, 0, 1, 0]
    assert truth["long"].tolist() == [4, 4, 3, 2, 1]
    assert truth["reward"].tolist() == [3, 3, 3, 2, 1]
    scores = score_answers(record)
    assert scores["crash[k=1]"]["frequency"] == pytest.approx(0.2) and scores["crash[k=1]"]["count"] == 5
    assert scores["left"]["constant_error"] == pytest.approx(1.0) and scores["left"]["error"] >= 0
    assert scores["odd"]["constant_accuracy"] == pytest.approx(0.6)


def test_episodes_not_counted_leave_no_trace(qa):
    venv = DummyVecEnv([lambda: Countdown(fixed=2), lambda: Countdown(fixed=7)])
    truth, _ = truths(qa, venv, 3)  # the first environment plays two of them, and idles while the second goes on
    assert len(truth["nearly"]) == 2 + 2 + 7


def test_windows_that_a_time_limit_may_cut_are_left_out(qa):
    """Of the episodes of 3 (crash) and of 8 (cut after 5) steps, decisions whose window passes step 5 do not count."""
    venv = DummyVecEnv([lambda: Countdown(fixed=3, limit=5), lambda: Countdown(fixed=8, limit=5)])
    truth, _ = truths(qa, venv, 2)
    assert len(truth["crash[k=1]"]) == 3 + 5
    assert len(truth["crash[k=3]"]) == 3 + 3
    assert len(truth["crash[k=6]"]) == 0
    assert len(truth["reward"]) == 3 + 3 and len(truth["nearly"]) == 3 + 5


def test_answers_are_about_the_decision_and_the_action_executed(qa):
    record = AnswerRecord(qa)
    venv = VecVetoAction(DummyVecEnv([lambda: Countdown(fixed=4)]), "crash[k=3]", 0.0, lambda obs, a: 0, qa=qa)
    run_episodes(Always(1), venv, 1, catastrophe="crashed", record=record)
    answers = {key: answer for key, answer, _ in record.answers()}
    obs = np.array([[4], [3], [2], [1]], np.float32)
    np.testing.assert_allclose(answers["crash[k=3]"].probability, qa.ask("crash[k=3]", obs, action=0), atol=1e-6)
    np.testing.assert_allclose(answers["nearly"].probability, qa.ask("nearly", obs), atol=1e-6)


def test_an_empty_record(qa):
    with pytest.raises(QAError, match="empty"):
        score_answers(AnswerRecord(qa))
