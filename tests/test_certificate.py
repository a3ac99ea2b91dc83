"""A certificate's claim is true as often as it says: by exact bounds, by simulation, on chains worked out exactly."""

from __future__ import annotations

import doctest
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO
from scipy.stats import beta, binom, binomtest
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from wrapping import Toy

from sb3_qa import Certificate, QAError, Question, QuestionAnswerer, bounds, certify, monitor
from sb3_qa.bounds import THRESHOLDS, allowed, binomial_cdf, fixed_sequence, needed, upper_bound
from sb3_qa.callbacks import CertifyCallback, QACallback
from sb3_qa.certificate import NotCertified, confidence_of_each
from sb3_qa.evaluation import Trace, seeded_vec_env
from sb3_qa.flight_log import FlightLog
from sb3_qa.monitor import MissMonitor, RateMonitor
from sb3_qa.policies import qa_policy
from sb3_qa.shadow import ShadowEpisodes, episode_record
from sb3_qa.testing import ActionWalk
from sb3_qa.truth import eventually
from sb3_qa.wrappers import VecVetoAction, VetoAction, vector
from sb3_qa.wrappers import guard as guard_module
from sb3_qa.wrappers.guard import Guard
from sb3_qa.wrappers.shell import Arrival

HIT = Question("Hit within {k} steps of {action}?", eventually("hit", within="k"), k=[1, 3], name="hit")
LIMIT = 20


class Moved(ActionWalk):
    """Catastrophes at both ends, where one was certified."""

    def _info(self):
        return {"hit": self._cell in (0, self.cells - 1), "cell": self._cell}


def walks(n: int = 4, cells: int = 5) -> DummyVecEnv:
    return DummyVecEnv([lambda: ActionWalk(cells=cells, slip=0.3, time_limit=LIMIT)] * n)


def make_model(env=None, algorithm=PPO, questions=(HIT,), **arguments):
    arguments = dict(n_steps=32, batch_size=32) | arguments if algorithm is PPO else arguments
    policy_kwargs = dict(questions=list(questions), net_arch=[8])
    return algorithm(
        qa_policy(algorithm), env or walks(), seed=0, device="cpu", policy_kwargs=policy_kwargs, **arguments
    )


@pytest.fixture(scope="module")
def model():
    """Trained until its answers differ between cells, and far from knowing them."""
    model = make_model()
    model.learn(1024, callback=QACallback())
    return model


@pytest.fixture(scope="module")
def qa(model):
    return QuestionAnswerer.from_model(model)


@pytest.fixture(scope="module")
def certificate(model, qa):
    return certify(qa, walks(), "hit[k=3]", model, miss_rate=0.1)


def vetoed(model):
    """Environments under a veto that is certified of this model as it is, and a step in them."""
    qa = QuestionAnswerer.from_model(model)
    mine = certify(qa, walks(), "hit[k=3]", model, 0.9, confidence=0.5, thresholds=[1e-6])
    env = VecVetoAction(walks(), "hit[k=3]", threshold=mine, qa=qa)
    env.reset()
    env.step(np.zeros(4, np.int64))
    return env


def true_miss_rate(model, qa, key, threshold, lead=1, cells=5):
    """Share of the episodes with a hit that have no flag ``lead`` steps before, worked out from the chain of cells."""
    obs = np.eye(cells, dtype=np.float32)
    with torch.no_grad():
        policy = model.policy.get_distribution(torch.as_tensor(obs)).distribution.probs.numpy().astype(float)
    quiet = qa.ask(key, obs).probability < np.float32(threshold)
    transitions = ActionWalk(cells=cells, slip=0.3)._transitions()
    by_action = np.einsum("ca,acd->acd", policy, transitions)
    anyhow, silently = by_action.sum(axis=0), (by_action * quiet.T[:, :, None]).sum(axis=0)
    start = np.array([0.0] + [1 / (cells - 1)] * (cells - 1))
    hit = missed = 0.0
    for arrival in range(1, LIMIT + 1):  # decisions 0 .. arrival - lead are those whose flag counts
        alive = np.diag([0.0] + [1.0] * (cells - 1))
        before = max(arrival - lead + 1, 0)
        at = start.copy()
        for t in range(arrival):
            at = (at @ alive) @ (silently if t < before else anyhow)
        missed += at[0]
        at = start.copy()
        for _ in range(arrival):
            at = (at @ alive) @ anyhow
        hit += at[0]
    return missed / hit


class TestBounds:
    @pytest.mark.parametrize("count, rate", [(1, 0.3), (59, 0.05), (400, 0.01), (3000, 0.5), (10, 0.999)])
    def test_the_tail_is_scipys(self, count, rate):
        np.testing.assert_allclose(binomial_cdf(count, rate), binom.cdf(np.arange(count + 1), count, rate), atol=1e-11)

    @pytest.mark.parametrize("events, count", [(0, 59), (3, 100), (50, 60), (7, 2000), (5, 5), (0, 0)])
    def test_the_bound_is_clopper_and_pearsons(self, events, count):
        expected = 1.0 if events == count else beta.ppf(0.95, events + 1, count - events)
        assert upper_bound(events, count, 0.95) == pytest.approx(expected, abs=1e-9)

    def test_how_many_are_needed(self):
        assert [needed(rate, 0.95) for rate in (0.1, 0.05, 0.01)] == [29, 59, 299]
        assert [needed(0.05, 0.95, k) for k in range(4)] == [59, 93, 124, 153]

    @settings(deadline=None)
    @given(st.integers(1, 400), st.sampled_from([0.01, 0.05, 0.1, 0.3]), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
    def test_allowed_as_scipys_exact_test_has_it(self, count, rate, confidence):
        most = allowed(count, rate, confidence)
        if most >= 0:
            assert binomtest(most, count, rate, alternative="less").pvalue <= (1 - confidence) * (1 + 1e-8)
            assert upper_bound(most, count, confidence) <= rate + 1e-9
            assert needed(rate, confidence, most) <= count
        assert binomtest(most + 1, count, rate, alternative="less").pvalue > 1 - confidence
        assert needed(rate, confidence, most + 1) > count

    def test_a_sequence_ends_at_the_first_that_fails(self):
        assert allowed(100, 0.05, 0.95) == 1
        assert fixed_sequence([0, 1, 2, 0, 0], 100, 0.05, 0.95) == 2
        assert fixed_sequence([2, 0], 100, 0.05, 0.95) == 0
        assert fixed_sequence([0, 0, 0], 100, 0.05, 0.95) == 3


def misses_of(peaks, thresholds=THRESHOLDS):
    """For each threshold how many of the peaks (n,) are below it."""
    return np.searchsorted(np.sort(peaks), thresholds, side="left")


def highest(peaks, miss_rate=0.05, confidence=0.95, thresholds=THRESHOLDS):
    index = fixed_sequence(misses_of(peaks, thresholds), len(peaks), miss_rate, confidence)
    return thresholds[index - 1] if index else 0.0


@settings(deadline=None)
@given(st.lists(st.sampled_from(THRESHOLDS[::37].tolist()) | st.floats(0, 1), min_size=29, max_size=200))
def test_the_threshold_is_a_tolerance_limit(peaks):
    """One-sided, by the order statistic one above the misses allowed (Wilks 1941)."""
    limit = np.sort(peaks)[allowed(len(peaks), 0.1, 0.95)]
    below = THRESHOLDS[limit >= THRESHOLDS]
    assert highest(peaks, 0.1) == (below[-1] if len(below) else 0.0)


@pytest.mark.parametrize("n, miss_rate", [(64, 0.05), (128, 0.05), (256, 0.1), (512, 0.01)])
def test_the_threshold_is_mapies(n, miss_rate):
    """Of MAPIE 1.6 with the same grid; numbers of which shares are exact, as it rounds counts up from shares."""
    control = pytest.importorskip("mapie.risk_control")
    rng = np.random.default_rng(n)
    grid = np.linspace(0.005, 0.995, 199)
    for _ in range(5):
        peaks, safe = rng.beta(6, 2, n), rng.beta(2, 6, 50)
        risks, outcome = np.concatenate([peaks, safe]), np.repeat([1, 0], [n, 50])
        controller = control.BinaryClassificationController(
            lambda x: np.stack([1 - x[:, 0], x[:, 0]], axis=1),
            risk="recall",
            target_level=1 - miss_rate,
            confidence_level=0.95,
            list_predict_params=grid,
            fwer_method="fixed_sequence",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.calibrate(risks[:, None], outcome)
        ours = binomial_cdf(n, miss_rate)[misses_of(peaks, grid)]
        np.testing.assert_allclose(np.ravel(controller.p_values), ours, rtol=1e-6, atol=1e-12)
        valid = controller.valid_predict_params
        assert highest(peaks, miss_rate, thresholds=grid) == (max(valid) if len(valid) else 0.0)


@pytest.mark.parametrize("n, miss_rate", [(59, 0.05), (80, 0.05), (124, 0.05), (61, 0.1), (300, 0.01)])
def test_no_more_certificates_are_broken_than_promised(n, miss_rate):
    """2,000 calibrations; the highest risk of a catastrophic episode is Beta(4, 2), so the miss rate is known."""
    rng = np.random.default_rng(n)
    found = np.array([highest(rng.beta(4, 2, n), miss_rate) for _ in range(2000)])
    broken = float(np.mean(beta.cdf(found, 4, 2) > miss_rate))
    assert broken <= 0.05
    assert broken > 0.008  # and it is not by being timid: as tight as whole numbers of misses allow


def test_stopping_at_enough_catastrophes_breaks_no_more():
    """As certify() stops: after the first round of 8 episodes in which there are enough, which take 12 to 3,000 of them."""
    rng = np.random.default_rng(5)
    broken = []
    for rate in rng.uniform(0.05, 0.9, 2000):
        catastrophic = rng.random(8 * int(3 * 124 / 8 / rate)) < rate
        rounds = catastrophic.reshape(-1, 8).sum(axis=1).cumsum()
        n = int(rounds[np.argmax(rounds >= 124)])
        assert 124 <= n < 132
        broken.append(beta.cdf(highest(rng.beta(4, 2, n)), 4, 2) > 0.05)
    assert 0.015 < np.mean(broken) <= 0.05


def test_the_bound_of_catastrophes_holds_where_one_stops_at_enough():
    rng = np.random.default_rng(6)
    too_low = []
    for _ in range(2000):
        rounds = rng.binomial(8, 0.2, 400).cumsum()
        stop = int(np.argmax(rounds >= 30))
        too_low.append(upper_bound(int(rounds[stop]), 8 * (stop + 1), 0.95) < 0.2)
    assert 0.015 < np.mean(too_low) <= 0.05


def trace(risk, catastrophe):
    n = len(risk)
    none = np.zeros(n, np.bool_)
    return Trace(np.zeros(n), np.zeros(n), np.array(risk), none, none, np.array(catastrophe, np.bool_), False)


class TestRecord:
    GRID = np.array([0.1, 0.2, 0.3, 0.4])

    @pytest.mark.parametrize(
        "lead, window, level",
        [(1, None, 4), (2, None, 3), (3, None, 2), (4, None, 2), (5, None, 0), (1, 1, 4), (2, 2, 1)],
    )
    def test_flags_that_count(self, lead, window, level):
        """Decisions 0 to 3 lead to the catastrophe in state 4; that of decision 2 is 0.15, of the others 0.2, 0.25, 0.4."""
        risk = [0.2, 0.25, 0.15, 0.4, 0.9]
        if (lead, window) == (2, None):
            risk[1], level = 0.3, 3
        record = episode_record(trace(risk, [0, 0, 0, 1, 1]), self.GRID, lead, window)
        assert record["catastrophe"] == 4 and record["steps"] == 5
        assert record["level"] == level

    def test_without_a_catastrophe_all_count(self):
        record = episode_record(trace([0.05, 0.1, 0.35], [0, 0, 0]), self.GRID, 2, 2)
        assert record == {"steps": 3, "catastrophe": None, "level": 3, "flags": [[0, 1], [1, 1], [3, 1]]}

    def test_what_is_not_finite_is_flagged_at_every_threshold(self):
        assert episode_record(trace([np.nan, 0.0], [0, 1]), self.GRID, 1, None)["level"] == 4

    def test_counts_by_hand(self):
        played = ShadowEpisodes(4, {"seed": 0, "n_envs": 2})
        risks = [([0.15, 0.05], [0, 1]), ([0.35], [1]), ([0.25, 0.25], [0, 0]), ([0.0], [0])]
        played.add([episode_record(trace(*each), self.GRID, 1, None) for each in risks])
        assert (played.episodes, played.catastrophes, played.steps) == (4, 2, 6)
        assert played.misses.tolist() == [0, 1, 1, 2]
        assert played.false_alarms.tolist() == [1, 1, 0, 0]
        assert played.flagged_steps.tolist() == [4, 3, 1, 0]


class TestCertify:
    def test_on_a_chain_that_is_known(self, model, qa, certificate):
        grid = THRESHOLDS[THRESHOLDS > 0.01]
        rates = [true_miss_rate(model, qa, "hit[k=3]", threshold) for threshold in grid[::100]]
        assert np.all(np.diff(rates) >= 0) and rates[-1] == pytest.approx(1)
        truth = true_miss_rate(model, qa, "hit[k=3]", certificate.threshold)
        assert truth <= 0.1
        assert 61 <= certificate.catastrophes < 65  # enough for two misses, and no more than a round more
        assert certificate.false_alarms <= certificate.episodes - certificate.catastrophes

    @pytest.mark.parametrize("lead", [1, 2])
    def test_counts_are_those_of_episodes_in_the_long_run(self, model, qa, lead):
        """At the risk of a cell for which about half of them are missed, the share of misses is what the chain says."""
        risks = np.unique(qa.ask("hit[k=3]", np.eye(5, dtype=np.float32)).probability[1:]).astype(float)
        truths = [true_miss_rate(model, qa, "hit[k=3]", risk, lead) for risk in risks]
        nearest = int(np.argmin(np.abs(np.array(truths) - 0.5)))
        truth, risk = truths[nearest], risks[nearest]
        assert 0.05 < truth < 0.95
        options = dict(confidence=0.6, episodes=800, thresholds=[risk], seed=1, lead=lead)
        found = certify(qa, walks(16), "hit[k=3]", model, 0.99, **options)
        assert found.threshold == risk
        assert found.catastrophes > 100
        assert binomtest(found.misses, found.catastrophes, truth).pvalue > 0.001

    def test_the_same_again(self, model, qa, certificate):
        for seed in (1, 2):  # whatever has been drawn from the streams that all share
            torch.manual_seed(seed)
            np.random.seed(seed)
            assert certify(qa, walks(), "hit[k=3]", model, miss_rate=0.1) == certificate
        other = certify(qa, walks(), "hit[k=3]", model, miss_rate=0.1, seed=1)
        assert other.steps != certificate.steps

    def test_nobodys_random_stream_is_touched(self, model, qa):
        torch.manual_seed(3)
        np.random.seed(3)
        before = torch.rand(1), np.random.random()
        torch.manual_seed(3)
        np.random.seed(3)
        certify(qa, walks(), "hit[k=3]", model, 0.5, episodes=40)
        assert (torch.rand(1), np.random.random()) == before

    def test_a_file_that_answers_for_itself(self, model, qa, certificate, tmp_path):
        qa.save(tmp_path / "walk.qa")
        assert certify(tmp_path / "walk.qa", walks(), "hit[k=3]", model, miss_rate=0.1) == certificate

    def test_too_few_catastrophes(self, model, qa):
        with pytest.raises(NotCertified, match="expected at least 59.*should take some [0-9,]+ episodes") as caught:
            certify(qa, walks(), "hit[k=3]", model, episodes=20)
        seen = caught.value.catastrophes
        assert 0 < seen < 20 and caught.value.needed == 59
        assert f"{int(np.ceil(59 * 20 / seen)):,} episodes" in str(caught.value)

    def test_none_at_all(self, model, qa):
        with pytest.raises(NotCertified, match=r"^0 catastrophes.*more than 425 episodes, as none was seen"):
            certify(qa, walks(), "hit[k=3]", model, episodes=20, catastrophe=lambda step: False)

    def test_flags_cannot_come_before_the_episode(self, model, qa):
        """Of episodes that begin in cell 1 many hit at once: no threshold flags them 3 steps before."""
        with pytest.raises(NotCertified, match="no threshold .* can be certified.*smaller lead than 3"):
            certify(qa, walks(), "hit[k=3]", model, miss_rate=0.1, lead=3)

    def test_false_alarms_too(self, model, qa, certificate):
        rate = min(certificate.false_alarm_bound + 0.1, 0.999)
        both = certify(qa, walks(16), "hit[k=3]", model, 0.1, false_alarm_rate=rate, episodes=400)
        assert both.threshold <= certify(qa, walks(16), "hit[k=3]", model, 0.1, episodes=400).threshold
        assert "have a flag" in both.claim
        assert both.misses <= allowed(both.catastrophes, 0.1, 0.975)
        assert both.false_alarms <= allowed(both.episodes - both.catastrophes, rate, 0.975)
        assert confidence_of_each(0.95, rate) == pytest.approx(0.975) and confidence_of_each(0.95, None) == 0.95
        with pytest.raises(NotCertified, match="keeps both claims"):
            certify(qa, walks(16), "hit[k=3]", model, 0.1, false_alarm_rate=0.0001, episodes=400)

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (dict(miss_rate=0), "miss_rate=0"),
            (dict(miss_rate=1.0), "miss_rate=1.0"),
            (dict(confidence=95), "confidence=95"),
            (dict(confidence="high"), "confidence='high'; .*give e.g. confidence=0.95"),
            (dict(model=None), "model=None; expected who acts: a model of SB3"),
            (dict(model=PPO), "expected who acts"),
            (dict(path=3), "certify got path=3; expected the path of a file"),
            (dict(episodes=0), "episodes=0"),
            (dict(lead=0), "lead=0"),
            (dict(lead=3, window=2), "window=2"),
            (dict(seed=-1), "seed=-1"),
            (dict(false_alarm_rate=2), "false_alarm_rate=2"),
            (dict(thresholds=[0.5, 0.1]), "ascending"),
            (dict(thresholds="high"), "ascending"),
            (dict(question="hit[k=2]"), "there is no question"),
            (dict(env=gym.make("CartPole-v1")), "VecEnv"),
            (dict(qa=3), "qa=3"),
            (dict(catastrophe="hut"), "'hut' never appeared"),
        ],
    )
    def test_bad_arguments(self, model, qa, arguments, words):
        given = dict(qa=qa, env=walks(), question="hit[k=3]", model=model, episodes=4) | arguments
        with pytest.raises(QAError, match=words.replace("[", r"\[")):
            certify(**given)

    def test_false_alarms_where_no_episode_is_safe(self, model, qa):
        env = DummyVecEnv([lambda: ActionWalk(cells=5, slip=0.3, time_limit=1000)] * 4)
        with pytest.raises(
            NotCertified, match="none of 20 were without one; expected at least 36 for false_alarm_rate=0.1; play more"
        ):
            certify(qa, env, "hit[k=3]", model, 0.5, false_alarm_rate=0.1, episodes=20)

    def test_environments_that_would_make_it_untrue(self, model, qa):
        with pytest.raises(QAError, match="acting VecVetoAction"):
            certify(qa, VecVetoAction(walks(), "hit[k=3]", 0.5, qa=qa), "hit[k=3]", model)
        with pytest.raises(QAError, match="SeededEpisodes"):
            certify(qa, seeded_vec_env(ActionWalk, 2, 0), "hit[k=3]", model)

    def test_a_model_that_learns_meanwhile(self, model):
        class Learning:
            policy = make_model().policy

            def predict(self, observation, state=None, episode_start=None, deterministic=False):
                with torch.no_grad():
                    self.policy.action_net.bias.add_(0.01)
                return model.predict(observation)

        with pytest.raises(QAError, match="changed while"):
            certify(QuestionAnswerer.from_model(model), walks(), "hit[k=3]", Learning(), 0.5, episodes=8)

    def test_statistics_of_observations_are_held(self):
        env = VecNormalize(walks())
        model = make_model(env)
        model.learn(128, callback=QACallback())
        count = env.obs_rms.count
        found = certify(QuestionAnswerer.from_model(model), env, "hit[k=3]", model, 0.5, episodes=40)
        assert env.obs_rms.count == count and env.training
        assert found.digests["normalizer"] is not None

    def test_an_agent_that_explores_by_other_streams(self):
        model = make_model(algorithm=DQN, learning_starts=10)
        model.learn(64, callback=QACallback())
        model.exploration_rate = 0.5
        space = model.action_space
        state = space.np_random.bit_generator.state
        qa = QuestionAnswerer.from_model(model)
        assert certify(qa, walks(), "hit[k=3]", model, 0.5) == certify(qa, walks(), "hit[k=3]", model, 0.5)
        assert model.action_space is space and space.np_random.bit_generator.state == state


class Interrupted:
    """An agent whose user presses Ctrl-C."""

    def __init__(self, model, after):
        self.model, self.left = model, after
        self.policy, self.device, self.action_space = model.policy, model.device, model.action_space

    def predict(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model.predict(*args, **kwargs)


class TestGoingOn:
    def lines(self, path):
        return [json.loads(line) for line in Path(path).read_text().splitlines()]

    def test_after_an_interruption(self, model, qa, certificate, tmp_path):
        path = tmp_path / "episodes.jsonl"
        for after in (50, 70):
            with pytest.raises(KeyboardInterrupt):
                certify(qa, walks(), "hit[k=3]", Interrupted(model, after), miss_rate=0.1, path=path)
            kept = len(self.lines(path))
        with path.open("a") as file:
            file.write('{"round": 99, "epis')  # what a power cut leaves
        agent = Interrupted(model, 10**6)
        assert certify(qa, walks(), "hit[k=3]", agent, miss_rate=0.1, path=path) == certificate
        lines = self.lines(path)
        assert 2 < kept < len(lines)
        assert sum(len(line.get("episodes", [])) for line in lines) == certificate.episodes
        whole = 10**6 - agent.left
        agent = Interrupted(model, 10**6)
        certify(qa, walks(), "hit[k=3]", agent, miss_rate=0.1)
        assert whole < 10**6 - agent.left  # what was kept is not played again
        agent = Interrupted(model, 0)
        assert certify(qa, walks(), "hit[k=3]", agent, miss_rate=0.1, path=path) == certificate

    def test_more_after_too_few(self, model, qa, tmp_path):
        path = tmp_path / "episodes.jsonl"
        with pytest.raises(NotCertified, match="at least 29"):
            certify(qa, walks(), "hit[k=3]", model, 0.1, episodes=18, path=path)
        found = certify(qa, walks(), "hit[k=3]", model, 0.1, episodes=200, path=path)
        assert found.episodes == 200
        with pytest.raises(QAError, match="judged already"):
            certify(qa, walks(), "hit[k=3]", model, 0.1, episodes=300, path=path)
        with pytest.raises(QAError, match="at least as many"):
            certify(qa, walks(), "hit[k=3]", model, 0.1, episodes=100, path=path)

    def test_a_folder_that_is_not_there(self, model, qa, tmp_path):
        with pytest.raises(NotCertified):
            certify(qa, walks(), "hit[k=3]", model, episodes=4, path=tmp_path / "new" / "e.jsonl")
        assert (tmp_path / "new" / "e.jsonl").exists()
        (tmp_path / "file").write_text("")
        with pytest.raises(QAError, match="cannot be (read|written)"):
            certify(qa, walks(), "hit[k=3]", model, episodes=4, path=tmp_path / "file" / "e.jsonl")

    @pytest.mark.parametrize(
        "line",
        [
            "{}",
            "[]",
            "3",
            '{"episodes": 3}',
            '{"episodes": [{}]}',
            '{"episodes": [{"steps": 3, "catastrophe": 4, "level": 0, "flags": [[0, 3]]}]}',
            '{"episodes": [{"steps": 3, "catastrophe": null, "level": -1, "flags": [[0, 3]]}]}',
            '{"episodes": [{"steps": 3, "catastrophe": null, "level": 0, "flags": [[0, 2]]}]}',
            '{"episodes": [{"steps": "3", "catastrophe": null, "level": 0, "flags": [[0, 3]]}]}',
            '{"episodes": [{"steps": 3, "catastrophe": null, "level": 0, "flags": [[99999, 3]]}]}',
        ],
    )
    def test_lines_of_something_else(self, line, tmp_path):
        played = ShadowEpisodes(4, {"format": "sb3_qa episodes"}, tmp_path / "e.jsonl")
        played.open()
        played.add([{"steps": 3, "catastrophe": 3, "level": 4, "flags": [[0, 2], [4, 1]]}])
        again = ShadowEpisodes(4, played.header, played.path)
        again.open()
        assert again.records == played.records
        with played.path.open("a") as file:
            file.write(line + "\n")
        with pytest.raises(QAError, match="in line 3; expected a round of episodes as certify"):
            ShadowEpisodes(4, played.header, played.path).open()

    def test_no_second_claim_after_the_first_failed(self, model, qa, tmp_path):
        path = tmp_path / "episodes.jsonl"
        certify(qa, walks(), "hit[k=3]", model, 0.1, path=path)
        for other in (dict(miss_rate=0.2), dict(lead=2), dict(seed=1), dict(thresholds=[0.5]), dict(env=walks(2))):
            given = dict(env=walks(), miss_rate=0.1) | other
            with pytest.raises(QAError, match="another certification.*differs in"):
                certify(qa, question="hit[k=3]", model=model, path=path, **given)
        (tmp_path / "notes.txt").write_text("{}\n")
        with pytest.raises(QAError, match="another path"):
            certify(qa, walks(), "hit[k=3]", model, path=tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == "{}\n"

    def test_short_episodes_are_not_favoured(self, model, qa, tmp_path):
        """One environment ends at once and one late: as many episodes of each are counted."""
        env = DummyVecEnv([lambda: ActionWalk(5, 0.3, time_limit=1), lambda: ActionWalk(5, 0.3, time_limit=LIMIT)])
        path = tmp_path / "episodes.jsonl"
        found = certify(qa, env, "hit[k=3]", model, 0.5, path=path)
        rounds = [line["episodes"] for line in self.lines(path) if "episodes" in line]
        assert all(len(each) == 2 and each[0]["steps"] == 1 for each in rounds)
        assert found.episodes == 2 * len(rounds)

    def test_a_progress_bar(self, model, qa, capsys):
        pytest.importorskip("tqdm")
        certify(qa, walks(), "hit[k=3]", model, 0.5, progress_bar=True)
        assert "catastrophe" in capsys.readouterr().err


class TestCertificate:
    def test_saved_and_loaded(self, certificate, tmp_path):
        certificate.save(tmp_path / "c.json")
        assert Certificate.load(tmp_path / "c.json") == certificate
        assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
        written = json.loads((tmp_path / "c.json").read_text())
        assert written["claim"] == certificate.claim and "mismatch" not in written
        assert written["environment"]["wrappers"] == ["DummyVecEnv"]

    def test_the_specification_is_kept(self):
        env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
        down = Question("Down after {action}?", eventually(lambda s: s.terminated, within=5), name="down")
        model = make_model(env, questions=[down], n_steps=64)
        found = certify(QuestionAnswerer.from_model(model), env, "down", model, 0.5, confidence=0.6)
        assert found.environment["spec"]["id"] == "CartPole-v1"
        assert found.misses == 0 and found.episodes == found.catastrophes

    @pytest.mark.parametrize(
        "change",
        [
            dict(misses=40),
            dict(miss_rate=0.01),
            dict(confidence=0.9999),
            dict(catastrophes=10),
            dict(episodes=5),
            dict(threshold=1.5),
            dict(misses=-1),
            dict(misses=True),
            dict(steps=None),
            dict(digests={}),
            dict(digests={"weights": None, "questions": None}),
            dict(digests=3),
            dict(question=None),
            dict(question=""),
            dict(threshold="high"),
            dict(miss_rate=None),
            dict(confidence=-5),
            dict(confidence=True),
            dict(false_alarm_rate=0),
            dict(lead=0),
            dict(lead=1.5),
            dict(window=0),
            dict(deterministic="no"),
            dict(seeds=None),
            dict(seeds={"seed": -1}),
            dict(environment=None),
            dict(format="x"),
            dict(version=2),
        ],
    )
    def test_what_does_not_hold_together_is_refused(self, certificate, tmp_path, change):
        (tmp_path / "c.json").write_text(json.dumps(certificate.to_dict() | change))
        with pytest.raises(QAError):
            Certificate.load(tmp_path / "c.json")

    def test_the_field_that_is_wrong_is_named(self, certificate):
        with pytest.raises(
            QAError,
            match=r"the certificate has confidence=-5; expected a share between 0 and 1, as certify\(\) made it",
        ):
            Certificate.from_dict(certificate.to_dict() | dict(confidence=-5))

    def test_paths(self, certificate, tmp_path):
        certificate.save(tmp_path / "new" / "folder" / "c.json")
        assert Certificate.load(tmp_path / "new" / "folder" / "c.json") == certificate
        (tmp_path / "file").write_text("")
        with pytest.raises(QAError, match="cannot be written .*; expected a file in a folder that can be written to"):
            certificate.save(tmp_path / "file" / "c.json")
        with pytest.raises(QAError, match="Certificate.load got path=None; expected the path of a file"):
            Certificate.load(None)
        with pytest.raises(QAError, match="Certificate.save got path=3"):
            certificate.save(3)

    def test_a_model_in_place_of_an_answerer(self, model, certificate):
        with pytest.raises(QAError, match=r"against PPO; expected a QuestionAnswerer; write .*from_model\(model\)"):
            certificate.check(model)

    def test_files_that_are_none(self, tmp_path):
        for text in ("", "[]", "{}", '{"format": "sb3_qa certificate", "version": 1}'):
            (tmp_path / "c.json").write_text(text)
            with pytest.raises(QAError):
                Certificate.load(tmp_path / "c.json")
        with pytest.raises(QAError, match="cannot be read"):
            Certificate.load(tmp_path / "none.json")

    def test_figures_by_hand(self, certificate):
        made = replace(
            certificate,
            catastrophes=124,
            misses=2,
            miss_rate=0.05,
            episodes=324,
            false_alarms=20,
            steps=1000,
            flagged_steps=50,
        )
        assert made.missed == 2 / 124 and made.false_alarms_per_episode == 0.1 and made.flagged_share == 0.05
        assert made.false_alarm_bound == pytest.approx(beta.ppf(0.95, 21, 180))
        assert made.unflagged_bound == pytest.approx(0.05 * beta.ppf(0.95, 125, 200))


class TestVeto:
    def test_the_answerer_that_was_certified(self, model, qa, certificate, tmp_path):
        qa.save(tmp_path / "walk.qa")
        for answerer in (qa, tmp_path / "walk.qa"):
            env = VecVetoAction(walks(), "hit[k=3]", threshold=certificate, qa=answerer)
            env.reset()
            _, _, _, infos = env.step(np.zeros(4, np.int64))
            assert env.reset_infos[0]["qa/alarm"] is False and infos[0]["qa/alarm"] is False
            risk, flagged = infos[0]["qa/risk"], infos[0]["qa/catastrophe"]
            assert flagged == (risk >= certificate.threshold)

    def test_its_claim_stands_in_a_flight_record(self, model, qa, certificate, tmp_path):
        env = VecVetoAction(walks(), "hit[k=3]", certificate, qa=qa, record=tmp_path / "flight.sqlite")
        obs = env.reset()
        for _ in range(100):
            obs = env.step(model.predict(obs)[0])[0]
        env.close()
        (run,) = FlightLog(tmp_path / "flight.sqlite").runs().values()
        assert run["claim"] == certificate.claim
        assert run["digests"].items() <= certificate.digests.items()

    def test_another_is_refused(self, certificate, caplog):
        other = QuestionAnswerer.from_model(make_model())
        with pytest.raises(QAError, match="weights are not those that were certified"):
            VecVetoAction(walks(), "hit[k=3]", threshold=certificate, qa=other)
        with caplog.at_level(logging.WARNING):
            env = VecVetoAction(walks(), "hit[k=3]", threshold=certificate.only_warn(), qa=other)
        assert "without a guarantee" in caplog.text
        env.reset()
        env.step(np.zeros(4, np.int64))

    def test_other_questions_are_refused(self, certificate):
        more = Question("Cell?", eventually(lambda step: False, within=2), name="more")
        other = QuestionAnswerer.from_model(make_model(questions=[HIT, more]))
        with pytest.raises(QAError, match="weights and questions are not"):
            certificate.check(other)
        with pytest.raises(QAError, match=r"asks 'hit\[k=1\]'"):
            VecVetoAction(walks(), "hit[k=1]", threshold=certificate)

    def test_one_that_learns_on_is_refused(self, certificate):
        model = make_model()
        env = vetoed(model)
        with torch.no_grad():
            model.policy.action_net.bias.add_(0.1)
        with pytest.raises(QAError, match="are not those that were certified"):
            env.step(np.zeros(4, np.int64))
        trained = make_model(VecVetoAction(walks(), "hit[k=3]", threshold=certificate))
        with pytest.raises(QAError, match="are not those that were certified"):
            trained.learn(64, callback=QACallback())

    def test_it_stands_in_a_specification(self, certificate, qa):
        env = VetoAction(ActionWalk(5, 0.3), "hit[k=3]", threshold=certificate.only_warn(), qa=qa)
        kept = json.loads(json.dumps(env._saved_kwargs))
        given = VetoAction.wrapper_spec(question="hit[k=3]", threshold=certificate.only_warn()).kwargs
        assert json.loads(json.dumps(given))["threshold"] == kept["threshold"]
        again = VetoAction(ActionWalk(5, 0.3), **kept)
        assert again.rule.guard.certificate == certificate and again.rule.guard.certificate.mismatch == "warn"
        assert again.rule.threshold == env.rule.threshold == certificate.threshold

    @pytest.mark.parametrize("shadow", [True, False])
    def test_it_counts_by_itself(self, model, qa, certificate, shadow):
        env = VecVetoAction(walks(), "hit[k=3]", threshold=certificate, shadow=shadow, qa=qa)
        env.seed(0)
        torch.manual_seed(0)
        obs, flags, missed, ended, came = env.reset(), [False] * 4, 0, 0, 0
        for _ in range(300):
            obs, _, dones, infos = env.step(model.predict(obs)[0])
            for i, info in enumerate(infos):
                flags[i] |= info["qa/catastrophe"]
                came += info["hit"]
                missed += info["hit"] and not flags[i]
                ended += int(dones[i])
                flags[i] = flags[i] and not dones[i]
        monitor = env.rule.guard.monitor
        assert monitor.per == ("catastrophe" if shadow else "episode")
        assert 0 <= (came if shadow else ended) - monitor.count <= 12  # some wait for one that began before them
        assert 0 <= missed - monitor.events <= 3
        assert monitor.count > 20 and not monitor.alarm

    def test_an_alarm(self, certificate, qa, caplog):
        """The walls have moved: catastrophes now come where nothing is flagged."""
        blind = replace(certificate, threshold=1.0)
        env = VecVetoAction(
            DummyVecEnv([lambda: Moved(5, 0.0, time_limit=LIMIT)] * 4), "hit[k=3]", blind, shadow=True, qa=qa
        )
        env.reset()
        alarms = [env.reset_infos[2]["qa/alarm"]]
        with caplog.at_level(logging.WARNING):
            for _ in range(60):
                alarms.append(env.step(np.ones(4, np.int64))[3][2]["qa/alarm"])
        assert not alarms[0] and alarms[-1] and alarms == sorted(alarms)
        assert caplog.text.count("arrive more often than certified") == 1
        assert env.reset_infos[0]["qa/alarm"] is True

    @pytest.mark.parametrize("mode", list(AutoresetMode)[:2])
    def test_gymnasium_vector_environments_too(self, certificate, qa, mode, tmp_path):
        """What happens in them is in infos of another shape, and at the ends of episodes in other places."""
        blind = replace(certificate, threshold=1.0)
        envs = SyncVectorEnv([lambda: Moved(5, 0.0, time_limit=LIMIT)] * 3, autoreset_mode=mode)
        envs = vector.VetoAction(envs, "hit[k=3]", blind, qa=qa, record=tmp_path / "flight.sqlite")
        envs.reset(seed=0)
        hits = ended = 0  # at the right end it goes on hitting until the time limit
        resetting = np.zeros(3, np.bool_)
        for _ in range(130):
            _, _, _, truncated, infos = envs.step(np.ones(3, np.int64))
            ended += truncated.sum()
            if mode == AutoresetMode.SAME_STEP:
                hits += int(np.sum(infos["hit"] & ~truncated))
                hits += int(np.sum(infos["final_info"]["hit"] & truncated)) if truncated.any() else 0
            else:
                hits += int(np.sum(infos["hit"] & ~resetting))
                resetting = truncated
        envs.close()
        watched = envs.rule.guard.monitor
        assert ended == 18 <= watched.events == watched.count <= 21 and watched.alarm
        assert infos["qa/alarm"].all()
        with FlightLog(tmp_path / "flight.sqlite") as log:
            assert sum(bool(event.catastrophe) for event in log.events()) == hits

    def test_a_callable_fact_is_watched(self, caplog, tmp_path):
        """Of a live answerer; the file of one does not hold it, and that is said."""
        hit = Question("Hit after {action}?", eventually(lambda step: step.info["hit"], within=3), name="hit")
        model = make_model(questions=[hit])
        qa = QuestionAnswerer.from_model(model)
        mine = replace(
            certify(qa, walks(), "hit", model, 0.9, confidence=0.5, thresholds=[1e-6], seed=0), threshold=1.0
        )
        qa.save(tmp_path / "walk.qa")
        for answerer, count in ((qa, 16), (tmp_path / "walk.qa", 0)):
            env = VecVetoAction(DummyVecEnv([lambda: Moved(5, 0.0, time_limit=LIMIT)] * 2), "hit", mine, qa=answerer)
            env.reset()
            for _ in range(8 * LIMIT):
                env.step(np.ones(2, np.int64))
            assert env.rule.guard.monitor.events == env.rule.guard.monitor.count == count
            assert ("qa/alarm will NOT be raised" in caplog.text) is (count == 0)

    def test_an_answerer_bound_anew_ends_no_episode(self, certificate, qa):
        counts = []
        for bound_anew in (False, True):
            env = VecVetoAction(walks(), "hit[k=3]", certificate, qa=qa)
            env.seed(0)
            env.reset()
            for _ in range(100):
                env.step(np.ones(4, np.int64))
                if bound_anew:
                    env.bind(qa)
            counts.append((env.rule.guard.monitor.count, env.rule.guard.monitor.events))
        assert counts[0] == counts[1] and counts[0][0] > 10

    def test_episodes_are_counted_in_the_order_they_began(self, certificate, qa):
        """A short one that ended waits for a long one that began before it."""
        env = DummyVecEnv([lambda: ActionWalk(5, 0.0, time_limit=5), lambda: ActionWalk(5, 0.0, time_limit=2)])
        env = VecVetoAction(env, "hit[k=3]", replace(certificate, threshold=1.0), qa=qa)
        env.reset()
        counts = []
        for _ in range(7):
            env.step(np.ones(2, np.int64))
            counts.append(env.rule.guard.monitor.count)
        assert counts == [0, 0, 0, 0, 3, 4, 4]


class TestWhatIsCertified:
    """The pair as it acts, on episodes that are independent, and all of it held against what is used."""

    def test_masks_are_told_to_an_agent_that_takes_them(self):
        class Forbidding(ActionWalk):
            taken: list = []

            def action_masks(self):
                return np.array([False, True])

            def step(self, action):
                self.taken.append(int(action))
                return super().step(action)

        env = DummyVecEnv([lambda: Forbidding(5, 0.3, time_limit=LIMIT)] * 4)
        model = make_model(env, MaskablePPO, n_steps=32, batch_size=32)
        qa = QuestionAnswerer.from_model(model)
        certify(qa, env, "hit[k=3]", model, 0.9, confidence=0.5, thresholds=[1e-6])
        assert set(Forbidding.taken) == {1}

    @pytest.mark.parametrize("algorithm", [PPO, SAC])
    def test_noise_that_depends_on_the_state_is_drawn_for_each_episode(self, algorithm):
        """And comes from the seed; the agent's own is left as it was."""
        env = DummyVecEnv([lambda: Toy(spaces.Box(-1, 1, (1,), np.float32), length=3)] * 2)
        question = Question("Crash within 3 of {action}?", eventually("crashed", within=3), name="c")
        model = algorithm(
            qa_policy(algorithm),
            env,
            seed=0,
            use_sde=True,
            policy_kwargs=dict(questions=[question], net_arch=[8]),
            device="cpu",
        )
        dist = model.policy.action_dist if algorithm is PPO else model.actor.action_dist
        qa, drawn, kept = QuestionAnswerer.from_model(model), [], []
        predict = model.predict

        def noting(obs, *args, **kwargs):
            drawn[-1].append(dist.exploration_matrices.detach().clone())
            return predict(obs, *args, **kwargs)

        model.predict = noting
        for _ in range(2):
            (model.policy if algorithm is PPO else model.actor).reset_noise(2)
            kept.append(dist.exploration_matrices.detach().clone())
            drawn.append([])
            certify(qa, env, "c", model, 0.9, confidence=0.5, thresholds=[1e-6], episodes=8, seed=3)
            assert torch.equal(dist.exploration_matrices, kept[-1])
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
        assert not torch.equal(*kept)
        assert len({float(each.sum()) for each in drawn[0]}) == 4  # rounds of two episodes

    def test_a_target_answerer_is_another(self):
        model = make_model(algorithm=DQN, learning_starts=10)
        model.learn(200, callback=QACallback())
        live, target = (QuestionAnswerer.from_model(model, target=which) for which in (False, True))
        mine = certify(live, walks(), "hit[k=3]", model, 0.9, confidence=0.5, thresholds=[1e-6])
        mine.check(live)
        with pytest.raises(QAError, match="weights are not those that were certified"):
            mine.check(target)

    def test_weights_written_past_the_count_of_changes_are_found(self, monkeypatch):
        clock = iter(range(100))
        monkeypatch.setattr(guard_module.time, "monotonic", lambda: 1000.0 ** next(clock))  # it flies
        model = make_model()
        env = vetoed(model)
        version = env.rule.qa.version
        model.policy.action_net.bias.data.add_(0.1)
        assert env.rule.qa.version == version
        with pytest.raises(QAError, match="are not those that were certified"):
            env.step(np.zeros(4, np.int64))

    def test_other_statistics_of_observations_are_refused(self, tmp_path):
        env = VecNormalize(walks(), norm_reward=False)
        model = make_model(env)
        model.learn(128, callback=QACallback())
        qa = QuestionAnswerer.from_model(model)
        env.save(tmp_path / "normalize.pkl")
        mine = certify(qa, env, "hit[k=3]", model, 0.9, confidence=0.5, thresholds=[1e-6])
        same = VecNormalize.load(tmp_path / "normalize.pkl", walks())
        VecVetoAction(same, "hit[k=3]", threshold=mine, qa=qa)
        same.obs_rms.mean += 1.0
        with pytest.raises(QAError, match=r"statistics of observations \(VecNormalize\) are not those"):
            VecVetoAction(same, "hit[k=3]", threshold=mine, qa=qa)

    def test_another_catastrophe_stands_in_the_claim(self, model, qa, tmp_path):
        common = dict(miss_rate=0.9, confidence=0.5, thresholds=[1e-6], path=tmp_path / "episodes.jsonl")
        mine = certify(qa, walks(), "hit[k=3]", model, catastrophe=lambda step: step.info["cell"] == 4, **common)
        assert "'<lambda>' (in place of the catastrophe of 'hit[k=3]')" in mine.claim
        assert Certificate.from_dict(mine.to_dict()) == mine
        with pytest.raises(QAError, match="differs in .*catastrophe"):
            certify(qa, walks(), "hit[k=3]", model, catastrophe=lambda step: step.info["cell"] == 3, **common)
        keyed = certify(qa, walks(), "hit[k=3]", model, 0.9, confidence=0.5, thresholds=[1e-6], catastrophe="cell")
        env = VecVetoAction(walks(), "hit[k=3]", replace(keyed, threshold=1.0), qa=qa)
        env.reset()
        for _ in range(3 * LIMIT):
            env.step(np.ones(4, np.int64))
        assert env.rule.guard.monitor.events > 8  # a cell other than 0 is where that one happens

    def test_an_acting_veto_in_another_process_is_refused(self, model, qa, tmp_path):
        qa.save(tmp_path / "walk.qa")
        path = str(tmp_path / "walk.qa")
        env = SubprocVecEnv([lambda: VetoAction(ActionWalk(5, 0.3, time_limit=LIMIT), "hit[k=3]", 0.5, qa=path)])
        try:
            with pytest.raises(QAError, match="VetoAction in other processes"):
                certify(qa, env, "hit[k=3]", model)
        finally:
            env.close()

    def test_an_instance_that_was_held_out(self):
        held = Question(
            "Hit within {k} steps of {action}?",
            eventually("hit", within="k"),
            k=[1, 3, 5],
            name="hit",
            holdout=[dict(k=3)],
        )
        kwargs = dict(questions=[held], net_arch=[8], qa_encoder="text")
        model = PPO(qa_policy(PPO), walks(), n_steps=32, batch_size=32, seed=0, device="cpu", policy_kwargs=kwargs)
        qa = QuestionAnswerer.from_model(model)
        assert "hit[k=3]" not in qa.questions
        mine = certify(qa, walks(), "hit[k=3]", model, 0.9, confidence=0.5, thresholds=[1e-6])
        assert mine.catastrophes > 0

    def test_a_question_about_the_state(self):
        near = Question("Hit within 3 steps?", eventually("hit", within=3), name="near")
        model = make_model(questions=[HIT, near])
        qa = QuestionAnswerer.from_model(model)
        mine = certify(qa, walks(), "near", model, 0.9, confidence=0.5, thresholds=[1e-6])
        env = VecVetoAction(walks(), "near", mine, on_veto=lambda obs, action: 1, qa=qa)
        env.reset()
        assert env.step(np.zeros(4, np.int64))[3][0]["qa/catastrophe"]


class TestGuard:
    def watched(self, certificate, qa, flags, facts, shadow=True):
        """Whether the first catastrophe was found flagged, of one episode."""
        guard = Guard(certificate, shadow)
        guard.bind(qa)
        guard.begin(np.array([0]))
        for n, (flag, fact) in enumerate(zip(flags, facts, strict=True)):
            last, infos = np.array([n == len(flags) - 1]), [{}]
            happened = None if fact is None else np.array([bool(fact)])
            guard.watch(np.array([flag]), Arrival(None, np.zeros(1), last, last, infos), happened)
            assert infos == [{"qa/alarm": False}]
        return guard.monitor.count, guard.monitor.events

    @pytest.mark.parametrize(
        "lead, window, missed",
        [(1, None, 0), (2, None, 0), (3, None, 0), (4, None, 1), (2, 2, 1), (2, 3, 0), (1, 1, 1)],
    )
    def test_in_time(self, certificate, qa, lead, window, missed):
        """Decision 1 is flagged, and the catastrophe is in state 4."""
        mine = replace(certificate, lead=lead, window=window)
        assert self.watched(mine, qa, [0, 1, 0, 0, 1], [0, 0, 0, 1, 1]) == (1, missed)
        # The same that certify() makes of such an episode.
        record = episode_record(
            trace([0.0, 1.0, 0.0, 0.0, 1.0], [0, 0, 0, 1, 1]), np.array([0.5]), mine.lead, mine.window
        )
        assert (record["level"] == 0) == bool(missed)

    def test_under_a_veto_any_flag_before_counts(self, certificate, qa):
        mine = replace(certificate, lead=3)
        assert self.watched(mine, qa, [0, 1], [0, 1], shadow=False) == (1, 0)
        assert self.watched(mine, qa, [0, 0], [0, 1], shadow=False) == (1, 1)
        assert self.watched(mine, qa, [0, 0], [0, 0], shadow=False) == (1, 0)
        assert self.watched(mine, qa, [0, 0, 1], [0, 1, 1], shadow=False) == (1, 1)

    def test_the_first_catastrophe_counts_though_it_waits(self, certificate, qa):
        """That of the second environment is not told before the first one's episode is over; meanwhile a flagged one comes."""
        guard = Guard(certificate, shadow=False)
        guard.bind(qa)
        guard.begin(np.array([0, 1]))
        for n in range(3):
            happened, done = np.array([False, n < 2]), np.array([n == 2, n == 2])
            guard.watch(np.array([False, n == 1]), Arrival(None, np.zeros(2), done, done, [{}, {}]), happened)
            assert (guard.monitor.count, guard.monitor.events) == ((2, 1) if n == 2 else (0, 0))

    def test_what_nobody_knows_is_not_counted_and_said_once(self, certificate, qa, caplog):
        with caplog.at_level(logging.WARNING):
            assert self.watched(certificate, qa, [0, 0], [None, None], shadow=False) == (0, 0)
        assert caplog.text.count("qa/alarm will NOT be raised") == 1
        # A fact that is told only when it happens was not known before, and that one is.
        assert self.watched(certificate, qa, [0, 0], [None, 1], shadow=False) == (1, 1)

    def test_before_a_fact_is_told_that_is_told_only_when_it_happens_it_had_not(self, certificate, qa):
        counts = []
        for told_always in (True, False):
            guard = Guard(certificate, shadow=False)
            guard.bind(qa)
            guard.begin(np.arange(2))
            for n in range(90):  # episodes of 3 and 4 steps; the last but some ends in an unflagged catastrophe
                done = np.array([n % 3 == 2, n % 4 == 3])
                happened = np.array([n == 80, False])
                known = happened if told_always or n >= 80 else None
                guard.watch(np.zeros(2, np.bool_), Arrival(None, np.zeros(2), done, done, [{}, {}]), known)
                guard.begin(np.flatnonzero(done))
            counts.append((guard.monitor.count, guard.monitor.events, guard.monitor.alarm))
        assert counts[0] == counts[1] == (30 + 22, 1, False)

    def test_an_episode_that_goes_on_and_on_does_not_silence_it(self, certificate, qa):
        """It is waited for by a hundred others, and counted when it ends; the rest in the order of their beginnings."""
        guard = Guard(certificate, shadow=False)
        guard.bind(qa)
        guard.begin(np.array([0, 1]))
        for n in range(150):
            last = n == 149
            done = np.array([last, True])
            infos = [{}, {}]
            guard.watch(np.zeros(2, np.bool_), Arrival(None, np.zeros(2), done, done, infos), np.array([False, True]))
            assert infos[0]["qa/alarm"] is guard.monitor.alarm
            guard.begin(np.flatnonzero(done))
            if n == 50:
                assert guard.monitor.count == 0
            if n == 120:
                assert guard.monitor.count > 100 and guard.monitor.alarm
        assert guard.monitor.count == 151 and guard.monitor.events == 150


def test_examples():
    for module in (bounds, monitor):
        failed, tried = doctest.testmod(module)
        assert tried and not failed


class TestMonitor:
    @pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
    def test_false_alarms_over_all_time(self, rate):
        """2,000 runs at the very rate that was certified, watched over 1,000 trials each."""
        raised = self.raised(rate, rate, 1000)
        assert raised.any(axis=1).mean() <= 0.05
        assert raised.any(axis=1).mean() > 0.003  # and it does raise some

    @pytest.mark.parametrize("rate, trials, power", [(0.05, 400, 0.85), (0.1, 200, 0.85), (0.05, 800, 0.98)])
    def test_twice_the_rate_is_noticed(self, rate, trials, power):
        assert self.raised(2 * rate, rate, trials).any(axis=1).mean() > power

    def raised(self, true_rate, rate, trials, runs=2000):
        """The alarm depends on two counts alone: asked once for each pair of them."""
        rng = np.random.default_rng(0)
        monitor = RateMonitor(rate)
        events = np.cumsum(rng.random((runs, trials)) < true_rate, axis=1)
        raised = np.zeros((runs, trials), np.bool_)
        for t in range(trials):
            kinds, place = np.unique(events[:, t], return_inverse=True)
            evidence = []
            for kind in kinds:
                monitor.count, monitor.events = t + 1, int(kind)
                evidence.append(monitor.evidence)
            raised[:, t] = np.array(evidence)[place] >= 1 / monitor.alpha
        return raised

    def test_it_is_fair(self):
        """The expected evidence after the next trial is the evidence now, at the certified rate; less, below it."""
        monitor = RateMonitor(0.1)
        for event in (True, False, False, True):
            monitor.update(event)
        now = monitor.evidence
        monitor.count, monitor.events = 5, 3
        won = monitor.evidence
        monitor.events = 2
        lost = monitor.evidence
        assert 0.1 * won + 0.9 * lost == pytest.approx(now)
        assert 0.05 * won + 0.95 * lost < now

    def test_updates_and_going_on(self, certificate):
        monitor = MissMonitor(certificate)
        assert monitor.rate == 0.1
        assert [monitor.update(flagged) for flagged in (True, None, False, False, False)] == [False] * 4 + [True]
        assert (monitor.count, monitor.events) == (4, 3)
        while monitor.evidence > 1:
            assert monitor.update(True)  # it stays raised
        other = MissMonitor(certificate)
        other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
        assert other.alarm and other.evidence == monitor.evidence

    def test_a_state_of_another_rate(self, certificate):
        """As that of a monitor that counts something else."""
        episodes = MissMonitor(certificate, per="episode")
        with pytest.raises(QAError, match="counted against a rate of"):
            MissMonitor(certificate).load_state_dict(episodes.state_dict())

    def test_neither_true_nor_false(self, certificate):
        monitor = MissMonitor(certificate)
        with pytest.raises(QAError, match=r"MissMonitor.update got flagged='no'; expected True, False, or None"):
            monitor.update("no")
        with pytest.raises(QAError, match=r"RateMonitor.update got event=2; expected True or False"):
            RateMonitor(0.1).update(2)
        assert monitor.count == 0
        assert not monitor.update(np.bool_(True)) and monitor.events == 0

    @pytest.mark.parametrize(
        "state",
        [
            {},
            None,
            dict(count=-1, events=-1, alarm=False),
            dict(count=1, events=2, alarm=False),
            dict(count=1.5, events=1, alarm=False),
            dict(count=2, events=1, alarm="no"),
            dict(count=2, events=1),
        ],
    )
    def test_states_that_are_none(self, state):
        monitor = RateMonitor(0.1)
        monitor.update(True)
        with pytest.raises(QAError, match="RateMonitor got the state .*; give what state_dict"):
            monitor.load_state_dict(state)
        assert (monitor.count, monitor.events) == (1, 1)

    def test_per_episode(self, certificate):
        monitor = MissMonitor(certificate, per="episode")
        assert monitor.rate == certificate.unflagged_bound
        for flagged in (None, True, False):
            monitor.update(flagged)
        assert (monitor.count, monitor.events) == (3, 1)

    def test_bad_arguments(self, certificate):
        with pytest.raises(QAError, match="expected a Certificate"):
            MissMonitor(0.05)
        with pytest.raises(QAError, match="per='step'"):
            MissMonitor(certificate, per="step")
        with pytest.raises(QAError, match="alpha=0"):
            MissMonitor(certificate, alpha=0)


class TestCallback:
    def test_it_certifies_and_the_agent_learns_the_same(self, tmp_path):
        callback = CertifyCallback(walks(), "hit[k=3]", 128, save_path=tmp_path, miss_rate=0.3, confidence=0.8)
        logged = {}

        class Spy(QACallback):
            def _on_rollout_end(self):
                super()._on_rollout_end()
                logged.update(self.logger.name_to_value)

        watched = make_model()
        watched.learn(256, callback=[Spy(), callback])
        alone = make_model()
        alone.learn(256, callback=QACallback())
        for (name, a), (_, b) in zip(
            watched.policy.state_dict().items(), alone.policy.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name
        assert [steps for steps, _ in callback.certificates] == [128, 256]
        latest = callback.certificate
        assert latest is not None and {"certify/threshold", "certify/miss_rate", "certify/flagged_share"} <= set(logged)
        frozen = QuestionAnswerer.load(tmp_path / "256.qa")
        kept = Certificate.load(tmp_path / "256.json")
        kept.check(frozen)
        assert kept == latest and logged["certify/threshold"] == latest.threshold
        with pytest.raises(QAError, match="not those that were certified"):
            Certificate.load(tmp_path / "128.json").check(frozen)

    def test_too_few_catastrophes_stop_nothing(self, caplog):
        callback = CertifyCallback(walks(), "hit[k=3]", 64, verbose=1, episodes=4)
        model = make_model()
        with caplog.at_level(logging.WARNING):
            model.learn(128, callback=[QACallback(), callback])
        assert callback.certificates == [(64, None), (128, None)] and callback.certificate is None
        assert "expected at least 59" in caplog.text and "after 64 steps" in caplog.text

    def test_statistics_are_taken_over(self):
        env, model = (
            VecNormalize(walks(), training=False),
            make_model(VecVetoAction(VecNormalize(walks()), "hit[k=3]", 1.0)),
        )
        callback = CertifyCallback(env, "hit[k=3]", 64, miss_rate=0.5, confidence=0.6)
        model.learn(128, callback=[QACallback(), callback])
        assert env.obs_rms.count > 100 and not env.training

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(QAError, match="every=0"):
            CertifyCallback(walks(), "hit[k=3]", 0)
        with pytest.raises(QAError, match=r"got missrate=...; expected options of certify\(\), e.g. 'miss_rate'"):
            CertifyCallback(walks(), "hit[k=3]", 10, missrate=0.1)
        with pytest.raises(QAError, match=r"there is no question 'hit\[k=2\]'"):
            make_model().learn(64, callback=[QACallback(), CertifyCallback(walks(), "hit[k=2]", 10**6)])
        with pytest.raises(QAError, match="save_path="):
            CertifyCallback(walks(), "hit[k=3]", 10, path=tmp_path)
        env = walks()
        with pytest.raises(QAError, match="trained in"):
            make_model(env).learn(64, callback=[QACallback(), CertifyCallback(env, "hit[k=3]", 10)])
        with pytest.raises(QAError, match="without VecNormalize"):
            make_model(VecNormalize(walks())).learn(
                64, callback=[QACallback(), CertifyCallback(walks(), "hit[k=3]", 10)]
            )
