"""The truth of every operator, against its definition read off one episode after another in plain loops."""

from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa.callbacks import QACallback
from sb3_qa.labels import ENDED, event_times, find_cuts, window, window_after, yes_or_no
from sb3_qa.limits import CutAges, cut_anyway
from sb3_qa.policies import qa_policy
from sb3_qa.questions import Choice, Number, Question
from sb3_qa.truth import after, always, eventually, lowest, now, peak, steps_until, total

UNKNOWN = None
HORIZONS = range(1, 12)
N_STEPS = 9  # at most; some horizons are longer than that


class Future(NamedTuple):
    """What was recorded after a decision."""

    facts: list  # f(s_{t+1}), f(s_{t+2}), ... up to the end of the episode or of the recording
    terminated: bool  # whether the last of them belongs to a terminal state
    room: int  # how many steps of the recording are left, whatever episode they belong to


def futures(recording):
    """{(t, env): Future} of a recording: for each environment a list of (fact, terminated, truncated)."""
    found = {}
    for env, steps in enumerate(recording):
        for t in range(len(steps)):
            facts, terminated = [], False
            for fact, ends, stops in steps[t:]:
                facts.append(fact)
                terminated = ends
                if ends or stops:
                    break
            found[t, env] = Future(facts, terminated, len(steps) - t)
    return found


# The definitions. An event is known as soon as it is seen; a window of values only if it fits into the recording.


def eventually_is(future, k):
    if any(future.facts[:k]):
        return True
    return False if len(future.facts) >= k or future.terminated else UNKNOWN


def always_is(future, k):
    if not all(future.facts[:k]):
        return False
    return True if len(future.facts) >= k or future.terminated else UNKNOWN


def steps_until_is(future, k):
    for step, fact in enumerate(future.facts, start=1):
        if step <= k and fact:
            return step
    return k if len(future.facts) >= k or future.terminated else UNKNOWN


def after_is(future, k, ended=UNKNOWN):
    if future.room < k:
        return UNKNOWN
    if len(future.facts) >= k:
        return future.facts[k - 1]
    return ended if future.terminated else UNKNOWN


def window_of(future, k):
    if future.room < k or (len(future.facts) < k and not future.terminated):
        return UNKNOWN
    return future.facts[:k]


def total_is(future, k, discount=1.0):
    seen = window_of(future, k)
    return UNKNOWN if seen is UNKNOWN else sum(discount**n * fact for n, fact in enumerate(seen))


def peak_is(future, k):
    seen = window_of(future, k)
    return UNKNOWN if seen is UNKNOWN else max(seen)


def lowest_is(future, k):
    seen = window_of(future, k)
    return UNKNOWN if seen is UNKNOWN else min(seen)


@st.composite
def recordings(draw, fact):
    n_envs, n_steps = draw(st.integers(1, 3)), draw(st.integers(1, N_STEPS))
    ends = st.sampled_from([(False, False)] * 5 + [(True, False)] * 2 + [(False, True)] * 2 + [(True, True)])
    step = st.tuples(fact, ends).map(lambda pair: (pair[0], *pair[1]))
    return draw(st.lists(st.lists(step, min_size=n_steps, max_size=n_steps), min_size=n_envs, max_size=n_envs))


flags = recordings(st.booleans())
numbers = recordings(st.integers(-8, 8).map(lambda n: n / 4))
some_numbers = recordings(st.none() | st.integers(-8, 8).map(lambda n: n / 4))


def arrays(recording, dtype):
    """(n_steps, n_envs) of facts, terminations and truncations."""
    fact, terminated, truncated = (
        np.array([[step[part] for step in steps] for steps in recording], kind).T
        for part, kind in enumerate((dtype, bool, bool))
    )
    return fact, terminated, truncated


def same(computed, defined):
    """Whether an array equals {(t, env): value}, nan for what is not known."""
    for place, value in defined.items():
        if value is UNKNOWN:
            assert np.isnan(computed[place]), (place, computed[place])
        else:
            assert computed[place] == pytest.approx(float(value), abs=1e-5), (place, value)


class TestEvents:
    @given(flags)
    def test_known_steps(self, recording):
        known, event = event_times(*arrays(recording, bool))
        for place, future in futures(recording).items():
            first = next((n for n, fact in enumerate(future.facts, start=1) if fact), None)
            assert event[place] == (first is not None)
            assert known[place] == (first or (ENDED if future.terminated else len(future.facts)))

    @given(flags)
    def test_eventually(self, recording):
        known, event = event_times(*arrays(recording, bool))
        for place, future in futures(recording).items():
            for k in HORIZONS:
                if event[place] and known[place] <= k:
                    answer = True
                else:
                    answer = False if known[place] >= k else UNKNOWN
                assert answer is eventually_is(future, k)

    @given(flags)
    def test_always(self, recording):
        fact, terminated, truncated = arrays(recording, bool)
        known, event = event_times(~fact, terminated, truncated)  # the event is that it stops holding
        for place, future in futures(recording).items():
            for k in HORIZONS:
                if event[place] and known[place] <= k:
                    answer = False
                else:
                    answer = True if known[place] >= k else UNKNOWN
                assert answer is always_is(future, k)

    @given(flags)
    def test_steps_until(self, recording):
        known, event = event_times(*arrays(recording, bool))
        for place, future in futures(recording).items():
            for k in HORIZONS:
                if event[place]:
                    answer = min(known[place], k)
                else:
                    answer = k if known[place] >= k else UNKNOWN
                assert answer == steps_until_is(future, k)

    def test_by_hand(self):
        # One environment: an event, a termination without one, a time limit, and the end of the recording.
        event = np.array([[0, 1, 0, 0, 0, 0, 0]], bool).T
        terminated = np.array([[0, 0, 0, 1, 0, 0, 0]], bool).T
        truncated = np.array([[0, 0, 0, 0, 1, 0, 0]], bool).T
        known, happens = event_times(event, terminated, truncated)
        assert known[:, 0].tolist() == [2, 1, ENDED, ENDED, 1, 2, 1]
        assert happens[:, 0].tolist() == [True, True, False, False, False, False, False]

    def test_the_fact_of_a_terminal_state_counts(self):
        known, happens = event_times(*(np.array([[x]]) for x in (True, True, False)))
        assert (known.item(), happens.item()) == (1, True)

    def test_no_event_comes_after_a_termination(self):
        event, terminated, truncated = (
            np.array([column], bool).T for column in ([0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0])
        )
        known, happens = event_times(event, terminated, truncated)
        assert known[:2, 0].tolist() == [ENDED, ENDED] and not happens[:2].any() and happens[2:].all()

    def test_a_step_that_ends_both_ways_has_terminated(self):
        known, _ = event_times(*(np.array([[x]]) for x in (False, True, True)))
        assert known.item() == ENDED

    def test_what_always_holds_holds_through_a_termination(self):
        holds, terminated = np.ones((3, 1), bool), np.array([[0], [0], [1]], bool)
        known, stops = event_times(~holds, terminated, np.zeros((3, 1), bool))
        assert not stops.any() and (known == ENDED).all()


class TestWindows:
    @given(some_numbers)
    def test_after(self, recording):
        fact, terminated, truncated = arrays(recording, float)
        for k in HORIZONS:
            computed = window_after(fact, terminated, truncated, k)
            same(computed, {place: after_is(future, k) for place, future in futures(recording).items()})

    @given(flags)
    def test_after_yes_or_no_is_no_once_terminated(self, recording):
        fact, terminated, truncated = arrays(recording, float)
        for k in HORIZONS:
            computed = window_after(fact, terminated, truncated, k, ended=0.0)
            same(computed, {place: after_is(future, k, ended=False) for place, future in futures(recording).items()})

    @given(numbers, st.sampled_from([1.0, 0.9, 0.5]))
    def test_total(self, recording, discount):
        for k in HORIZONS:
            computed = window("total", *arrays(recording, np.float32), k, discount)
            same(computed, {place: total_is(future, k, discount) for place, future in futures(recording).items()})

    @pytest.mark.parametrize(("operator", "definition"), [("peak", peak_is), ("lowest", lowest_is)])
    @given(numbers)
    def test_peak_and_lowest(self, operator, definition, recording):
        for k in HORIZONS:
            computed = window(operator, *arrays(recording, np.float32), k, 0.5)  # only a total is discounted
            same(computed, {place: definition(future, k) for place, future in futures(recording).items()})

    @pytest.mark.parametrize("operator", ["total", "peak", "lowest"])
    @given(some_numbers)
    def test_a_fact_that_is_missing_makes_its_windows_unknown(self, operator, recording):
        for k in HORIZONS:
            computed = window(operator, *arrays(recording, float), k)
            for place, future in futures(recording).items():
                seen = window_of(future, k)
                assert np.isnan(computed[place]) == (seen is UNKNOWN or None in seen)

    def test_total_by_hand(self):
        fact, none = np.array([[1.0], [2.0], [4.0]], np.float32), np.zeros((3, 1), bool)
        assert window("total", fact, none, none, 2, discount=0.5)[:2, 0].tolist() == [2.0, 4.0]
        assert np.isnan(window("total", fact, none, none, 2)[2, 0])

    @pytest.mark.parametrize("k", [2, 3, 4])
    def test_windows_that_overrun_the_recording_are_left_out_whatever_happens_in_them(self, k):
        # The episode terminates at the last step but one: the truth of its windows would be known, and is not told.
        fact = np.ones((4, 1), np.float32)
        terminated, truncated = np.array([[0], [0], [1], [0]], bool), np.zeros((4, 1), bool)
        for values in (
            window_after(fact, terminated, truncated, k, ended=0.0),
            *(window(operator, fact, terminated, truncated, k) for operator in ("total", "peak", "lowest")),
        ):
            assert not np.isnan(values[: 4 - k + 1]).any() and np.isnan(values[4 - k + 1 :]).all()

    def test_a_window_is_up_to_a_termination_and_never_over_a_time_limit(self):
        fact = np.array([[1.0], [5.0], [9.0]], np.float32)
        end = np.array([[0], [1], [0]], bool)
        assert window("peak", fact, end, np.zeros_like(end), 3)[0, 0] == 5.0
        assert np.isnan(window("peak", fact, np.zeros_like(end), end, 3)[0, 0])

    def test_what_is_passed_in_is_not_changed(self):
        fact, terminated = np.ones((3, 1), np.float32), np.array([[0], [1], [0]], bool)
        window("total", fact, terminated, terminated, 2)
        window_after(fact, terminated, terminated, 2)
        assert (fact == 1).all() and terminated[:, 0].tolist() == [False, True, False]

    def test_a_yes_or_no_is_the_event_of_one_step(self):
        known, event = yes_or_no(np.array([1.0, 0.0, np.nan], np.float32))
        assert known.tolist() == [1, 1, 0] and event.tolist() == [True, False, False]


class TestCuts:
    @given(flags)
    def test_every_future_that_does_not_terminate_runs_into_its_cut(self, recording):
        _, terminated, truncated = arrays(recording, bool)
        given_to = terminated.copy(), truncated.copy()
        cuts = find_cuts(terminated, truncated)
        assert (terminated == given_to[0]).all() and (truncated == given_to[1]).all()
        for (t, env), future in futures(recording).items():
            row = cuts.row[t, env]
            if future.terminated:
                assert row == -1
            else:
                assert (cuts.step[row], cuts.env[row]) == (t + len(future.facts) - 1, env)
        # None is there twice, and none without a future that runs into it.
        assert len(set(zip(cuts.step.tolist(), cuts.env.tolist(), strict=True))) == len(cuts.step)
        assert set(cuts.row[cuts.row >= 0].tolist()) == set(range(len(cuts.step)))

    def test_by_hand(self):
        terminated = np.array([[0, 0], [1, 0], [0, 0], [0, 1]], bool)
        truncated = np.array([[0, 1], [0, 0], [0, 0], [0, 0]], bool)
        cuts = find_cuts(terminated, truncated)
        assert list(zip(cuts.step.tolist(), cuts.env.tolist(), strict=True)) == [(0, 1), (3, 0)]
        assert cuts.row.tolist() == [[-1, 0], [-1, -1], [1, -1], [1, -1]]


class Scripted(gymnasium.Env):
    """Episodes of random facts and endings, written down as they are told."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.told = []  # ("reset" | "step", facts, terminated, truncated)

    def _tell(self, kind, terminated=False, truncated=False):
        lane = str(self.rng.choice(["left", "middle", "right"]))
        facts = {"flag": bool(self.rng.random() < 0.15), "level": float(self.rng.integers(-8, 9) / 4), "lane": lane}
        self.told.append((kind, facts, terminated, truncated))
        return self.rng.random(2).astype(np.float32), dict(facts)

    def reset(self, *, seed=None, options=None):
        return self._tell("reset")

    def step(self, action):
        terminated, truncated = (bool(x) for x in self.rng.random(2) < 0.08)
        obs, info = self._tell("step", terminated, truncated)
        return obs, 1.0, terminated, truncated, info


class Labels(BaseCallback):
    """Keeps what QACallback has made of the rollout."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.store = self.model.policy.qa_joint.store


STEPS, ENVS = 96, 2
ASKED = [
    Question("Flag in {k}?", eventually("flag", within="k"), name="eventually", k=[3, 7]),
    Question("Flag in {k}!", eventually(lambda step: step.info["flag"], within="k"), name="eventually_called", k=[7]),
    Question("No flag for {k}?", always(lambda step: not step.info["flag"], during="k"), name="always", k=[5]),
    Question("Steps to a flag?", steps_until("flag", cap=6), name="steps"),
    Question("Flag?", now("flag"), name="now"),
    Question("Level?", now("level"), Number(-2, 2), name="level"),
    Question("Flag after {k}?", after("flag", steps="k"), name="after", k=[1, 4]),
    Question("Lane after {k}?", after("lane", steps="k"), Choice("left", "middle", "right"), "lane", k=[1, 3]),
    Question("Sum?", total("level", over=4, discount=0.5), Number(-9, 9), name="total"),
    Question("Most?", peak("level", over=4), Number(-2, 2), name="peak"),
    Question("Least if {action}?", lowest("level", over=4), Number(-2, 2), name="lowest"),
]


@pytest.fixture(scope="module")
def recorded():
    """The environments of a rollout, the store of its labels, and the catalogue."""
    envs = [Scripted(seed) for seed in range(ENVS)]
    model = PPO(
        qa_policy(PPO),
        DummyVecEnv([lambda env=env: env for env in envs]),
        n_steps=STEPS,
        n_epochs=1,
        policy_kwargs=dict(questions=ASKED),
        device="cpu",
    )
    labels = Labels()
    model.learn(STEPS * ENVS, callback=[QACallback(), labels])
    return envs, labels.store, model.policy.qa_head.catalogue


class TestRecording:
    """From an environment through PPO to the labels in its buffer: which fact belongs to which state."""

    def decisions(self, envs, fact):
        """{(t, env): (f(s_t), Future)} as the environments told them."""
        before, recording = {}, []
        for n, env in enumerate(envs):
            state, steps = None, []
            for kind, facts, terminated, truncated in env.told:
                if kind == "step" and len(steps) < STEPS:
                    before[len(steps), n] = fact(state)
                    steps.append((fact(facts), terminated, truncated))
                state = facts
            recording.append(steps)
        return {place: (before[place], future) for place, future in futures(recording).items()}

    def label(self, recorded, key):
        """{(t, env): what the store holds}, rows being environment by environment."""
        envs, store, catalogue = recorded
        target = catalogue.target_of[key]
        if target.kind in ("choice", "number"):
            rows = store.values[target.start]
        else:
            rows = list(zip(*store.times[target.start], strict=True))
        return {(t, env): rows[env * STEPS + t] for t in range(STEPS) for env in range(ENVS)}

    def left_out(self, envs, key):
        """(t, env): windows that a time limit would have cut, had a termination not come first."""
        horizon = int(key.split("k=")[1][:-1]) if "[" in key else 4 if key in ("total", "peak", "lowest") else 1
        steps = np.array([[told[2:] for told in env.told if told[0] == "step"][:STEPS] for env in envs], bool)
        terminated, truncated = steps[..., 0].T, (steps[..., 1] & ~steps[..., 0]).T
        ages = CutAges(ENVS, np.ones(ENVS, bool))
        left = np.stack([ages.step(*both) for both in zip(terminated, truncated, strict=True)])
        return cut_anyway(terminated, truncated, left, horizon)

    def test_enough_happened(self, recorded):
        told = [step for env in recorded[0] for step in env.told]
        assert sum(step[2] for step in told) >= 5 and sum(step[3] for step in told) >= 5
        assert sum(step[1]["flag"] for step in told) >= 10

    @pytest.mark.parametrize(
        ("key", "fact"),
        [
            ("eventually[k=3]", lambda facts: facts["flag"]),
            ("eventually[k=7]", lambda facts: facts["flag"]),
            ("eventually_called[k=7]", lambda facts: facts["flag"]),
            ("always[k=5]", lambda facts: facts["flag"]),
            ("steps", lambda facts: facts["flag"]),
        ],
    )
    def test_events(self, recorded, key, fact):
        labels = self.label(recorded, key)
        for place, (_, future) in self.decisions(recorded[0], fact).items():
            known, event = labels[place]
            first = next((n for n, holds in enumerate(future.facts, start=1) if holds), None)
            assert event == (first is not None)
            assert known == (first or (ENDED if future.terminated else len(future.facts)))

    @pytest.mark.parametrize(
        ("key", "definition"),
        [
            ("now", lambda state, future: state),
            ("after[k=1]", lambda state, future: after_is(future, 1, ended=False)),
            ("after[k=4]", lambda state, future: after_is(future, 4, ended=False)),
        ],
    )
    def test_yes_or_no(self, recorded, key, definition):
        labels, left_out = self.label(recorded, key), self.left_out(recorded[0], key)
        for place, (state, future) in self.decisions(recorded[0], lambda facts: facts["flag"]).items():
            truth = UNKNOWN if left_out[place] else definition(state, future)
            known, event = labels[place]
            assert (bool(event) if known else UNKNOWN) == truth and (known == 1) == (truth is not UNKNOWN)

    @pytest.mark.parametrize(
        ("key", "fact", "definition"),
        [
            ("level", "level", lambda state, future: state),
            ("lane[k=1]", "lane", lambda state, future: after_is(future, 1)),
            ("lane[k=3]", "lane", lambda state, future: after_is(future, 3)),
            ("total", "level", lambda state, future: total_is(future, 4, 0.5)),
            ("peak", "level", lambda state, future: peak_is(future, 4)),
            ("lowest", "level", lambda state, future: lowest_is(future, 4)),
        ],
    )
    def test_values(self, recorded, key, fact, definition):
        options = {"left": 0, "middle": 1, "right": 2}
        left_out, defined = self.left_out(recorded[0], key), {}
        for place, (state, future) in self.decisions(recorded[0], lambda facts: facts[fact]).items():
            value = UNKNOWN if left_out[place] else definition(state, future)
            defined[place] = options.get(value, value) if isinstance(value, str) else value
        same(self.label(recorded, key), defined)
