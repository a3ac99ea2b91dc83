"""The flight recorder: what is written, that it survives, that it stays small, and that a veto never fails of it."""

import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import time
import traceback
import warnings
from enum import Enum

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from test_veto import ACTIONS, make_risks, steps
from wrapping import IMAGE, KEYS, QUESTIONS, VECTOR, Toy, make_model, make_qa, run_single, run_vec, toys

from sb3_qa import Choice, QAError, Question, QuestionAnswerer
from sb3_qa import recorder as recorder_module
from sb3_qa.certificate import answerer_digests
from sb3_qa.flight_log import FlightLog
from sb3_qa.policies import qa_policy
from sb3_qa.recorder import Batch, Chunk, Event, FlightRecorder, pack, unpack
from sb3_qa.scores import false_alarm_rate
from sb3_qa.truth import after, eventually, now
from sb3_qa.wrappers import VecVetoAction, VetoAction, vector
from sb3_qa.wrappers import evidence as evidence_module

PARTS = spaces.Dict({"a": VECTOR, "b": spaces.Box(-10, 10, (2, 3), np.float32)})


def forked(work, *arguments):
    """Run ``work`` in a process of its own, which ends as if it had been killed: nothing is closed. Its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
        process = os.fork()
    if process:
        return process
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def fly(path, delay, say, qa):
    """Record until killed; say, after each step, how many events have to be in the file."""
    env = VecVetoAction(toys(2), "ruin", 0.5, qa=qa, record=FlightRecorder(path, delay=delay, before=3, after=3))
    env.reset()
    rng, n = np.random.default_rng(0), 0
    while True:
        _, _, _, infos = env.step(rng.integers(3, size=2))
        n += sum(info["qa/catastrophe"] or info["crashed"] for info in infos)
        os.write(say, b"%d\n" % (n - env.rule.evidence.waiting))


@pytest.fixture(scope="module")
def qa():
    return make_qa()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flight.sqlite"


def events_of(moments):
    """The steps of which there has to be an event, with their place: environment, episode, step."""
    found = {}
    for env, each in enumerate(moments):
        episode, step = -1, 0
        for moment in each:
            if moment.before is None:
                episode, step = episode + 1, 0
                continue
            if moment.told["qa/catastrophe"] or moment.info["crashed"]:
                found[env, episode, step] = moment
            step += 1
    return found


class TestWhatIsWritten:
    @pytest.mark.parametrize("form", ["single", "vector"])
    def test_every_flag_veto_and_catastrophe(self, qa, path, form):
        options = dict(question="crash[k=3]", threshold=0.5, qa=qa, record=path, let_through=0.3)
        started = time.time()
        if form == "single":
            env = VetoAction(Toy(), **options)
            moments = [run_single(env, ACTIONS[:, 0])]
        else:
            env = VecVetoAction(toys(3), **options)
            moments = run_vec(env, ACTIONS)
        env.close()
        log = FlightLog(path)
        expected = events_of(moments)
        events = {(event.env, event.episode, event.step): event for event in log.events()}
        assert events.keys() == expected.keys()
        assert 10 < sum(event.flagged for event in events.values()) < len(events)
        for place, event in events.items():
            moment, told = expected[place], expected[place].told
            assert started - 1 <= event.time <= time.time()
            assert event.seed == 7 + event.env
            assert event.since_seed == event.episode
            assert event.flagged is told["qa/catastrophe"]
            assert event.vetoed is told["qa/vetoed"]
            assert event.let_through is told["qa/let_through"]
            assert event.probability == told["qa/let_through_probability"]
            assert event.no_safe_action is told["qa/no_safe_action"]
            assert event.catastrophe is moment.info["crashed"]
            assert (event.terminated, event.truncated) == (moment.terminated, moment.truncated)
            assert event.risk == pytest.approx(told["qa/risk"])
            assert event.executed_risk == pytest.approx(told["qa/crash[k=3]"], rel=1e-5)
            assert (event.proposed, event.executed) == (moment.action, moment.info["did"])
            assert event.answers.keys() == set(KEYS)
            for key, value in event.answers.items():
                answer = qa.ask(key, moment.before)
                if key == "lane":
                    assert value == answer.best
                else:
                    np.testing.assert_allclose(value, answer.value, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(
                event.risks, qa.ask("crash[k=3]", moment.before).probability, rtol=1e-4, atol=1e-6
            )
            assert event.actions is None
        (run,) = log.runs().values()
        assert (run["question"], run["threshold"], run["let_through"]) == ("crash[k=3]", 0.5, 0.3)

    @pytest.mark.parametrize("observation_space", [VECTOR, IMAGE, PARTS], ids=["vector", "image", "dict"])
    @pytest.mark.parametrize(("before", "after_"), [(10, 10), (0, 0), (1, 4), (4, 1)])
    def test_steps_around_it(self, path, observation_space, before, after_):
        base = "MultiInputPolicy" if observation_space is PARTS else "MlpPolicy"
        qa = make_qa(base, observation_space=observation_space)
        env = VecVetoAction(
            DummyVecEnv([lambda i=i: Toy(None, observation_space, 19 + i) for i in range(3)]),
            "crash[k=3]",
            0.97,
            qa=qa,
            record=FlightRecorder(path, before=before, after=after_),
        )
        moments = run_vec(env, np.random.default_rng(0).integers(3, size=(70, 3)))
        env.close()
        log = FlightLog(path)
        episodes = []
        for each in moments:
            episodes.append([])
            for moment in each:
                if moment.before is None:
                    episodes[-1].append([])
                else:
                    episodes[-1][-1].append(moment)
        assert len(log) >= 6
        for event in log.events():
            episode = episodes[event.env][event.episode]
            window = log.window(event.id, before, after_)
            assert window.step[0] <= max(event.step - before, 0)
            last = min(event.step + after_, len(episode) - 1)
            assert window.step.tolist() == list(range(max(event.step - before, 0), last + 1))
            for n, step in enumerate(window.step.tolist()):
                moment = episode[step]
                seen = {k: v[n] for k, v in window.obs.items()} if isinstance(window.obs, dict) else window.obs[n]
                np.testing.assert_equal(seen, moment.before)
                assert (window.proposed[n], window.executed[n]) == (moment.action, moment.info["did"])
                assert window.risk[n] == pytest.approx(moment.told["qa/risk"])
                assert window.reward[n] == pytest.approx(moment.reward)
            if last == len(episode) - 1 and (episode[-1].terminated or episode[-1].truncated):
                np.testing.assert_equal(window.last_obs, episode[-1].after)
            else:
                assert window.last_obs is None

    @pytest.mark.parametrize("encoder", ["index", "text"])
    @pytest.mark.parametrize("action_space", [None, spaces.Box(-1, 1, (2,), np.float32)], ids=["discrete", "box"])
    def test_answers_are_those_of_the_moment_however_long_they_wait(self, path, encoder, action_space):
        """They are given for many events at once; what is learnt in between, or another answerer, changes nothing."""
        kwargs = dict(questions=QUESTIONS, net_arch=[8], qa_net_arch=[16], qa_encoder=encoder)
        venv = toys(action_space=action_space)
        qa = QuestionAnswerer.from_model(PPO(qa_policy(PPO), venv, policy_kwargs=kwargs, seed=0, device="cpu"))
        recorder = FlightRecorder(path, delay=1e9)
        env = VecVetoAction(toys(2, action_space=action_space), "crash[k=3]", 0.0, shadow=True, qa=qa, record=recorder)
        obs, expected = env.reset(), []
        env.action_space.seed(0)
        rng = torch.Generator().manual_seed(0)
        for n in range(12):
            actions = np.stack([env.action_space.sample() for _ in range(2)])
            about = None if action_space is None else actions
            answers = {key: qa.ask(key, obs, about if qa.catalogue.instances[key].per_action else None) for key in KEYS}
            expected += [{key: answer.value[i] for key, answer in answers.items()} for i in range(2)]
            obs = env.step(actions)[0]
            if n % 3 == 2:
                flat = qa.policy.qa_head.flat.detach()
                flat += torch.randn(flat.shape, generator=rng)
            if n == 7:
                qa = QuestionAnswerer.from_model(make_model(toys(action_space=action_space)))
                env.bind(qa)
        assert env.rule.evidence.waiting == 24 and len(FlightLog(path)) == 0
        env.close()
        with FlightLog(path) as log:
            assert len(log) == 24
            for event, answers in zip(log.events(), expected, strict=True):
                for key, value in event.answers.items():
                    if key == "lane":
                        assert value == ("left", "right")[int(answers[key])]
                    else:
                        proposed = (
                            isinstance(value, list) and action_space is not None
                        )  # is the first that was compared
                        told = value[0] if proposed else value
                        np.testing.assert_allclose(told, answers[key], rtol=1e-4, atol=1e-6)

    def test_what_came_of_flags(self, path):
        """The catastrophe within 3 steps of the flagged one; not known of what a time limit cut off."""
        qa = QuestionAnswerer.from_model(
            make_model(
                toys(), questions=[Question("Crash within 3 of {action}?", eventually("crashed", within=3), name="c")]
            )
        )
        env = VecVetoAction(toys(2), "c", 0.0, shadow=True, qa=qa, record=path)
        run_vec(env, ACTIONS[:33, :2])  # episodes of 5 and 6 steps; every second one is cut
        env.close()
        found = {}
        for event in FlightLog(path).events():
            length = 5 + event.env
            left = length - event.step  # steps to the end, this one included
            expected = (False if left >= 3 else None) if event.episode % 2 else left <= 3
            if event.episode == 33 // length:
                continue  # the recording ended before it could be known
            assert event.outcome is expected, event
            found[expected] = found.get(expected, 0) + 1
        assert min(found.values()) >= 8 and len(found) == 3

    def test_seeds_that_were_given_one_by_one(self, path, qa):
        envs = vector.VetoAction(
            AsyncVectorEnv([Toy] * 3), "crash[k=3]", 0.0, shadow=True, qa=qa, record=FlightRecorder(path, delay=0)
        )
        envs.reset(seed=[5, 99, 3])
        envs.step(np.zeros(3, np.int64))
        envs.close()
        with FlightLog(path) as log:
            assert [(event.seed, event.since_seed) for event in log.events()] == [(5, 0), (99, 0), (3, 0)]

    def test_false_alarms_are_not_told_wrong_by_a_time_limit(self, path):
        """Of flags just before it, only the catastrophes would be known: they are left out whatever came of them."""

        class Hazard(gym.Env):
            observation_space, action_space = VECTOR, spaces.Discrete(2)

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.n = 0
                return self.observation_space.sample() * 0, {"crashed": False}

            def step(self, action):
                self.n += 1
                crashed = bool(self.np_random.random() < 0.05)
                cut = not crashed and self.n == 12
                return np.zeros(VECTOR.shape, np.float32), 0.0, crashed, cut, {"crashed": crashed}

        question = Question("Crash within 10 steps of {action}?", eventually("crashed", within=10), name="c")
        qa = QuestionAnswerer.from_model(make_model(DummyVecEnv([Hazard]), questions=[question]))
        env = VecVetoAction(DummyVecEnv([Hazard] * 8), "c", 0.0, shadow=True, qa=qa, record=path)
        env.seed(0)
        env.reset()
        for _ in range(500):
            env.step(np.zeros(8, np.int64))
        env.close()
        with FlightLog(path) as log:
            assert log.runs()[1]["time_limits"] == {str(i): 12 for i in range(8)}
            flags, events = log.flags(), log.events()
        early = np.array([event.step <= 2 for event in events if event.flagged])
        assert np.isnan(flags["outcome"][~early]).all() and np.isnan(flags["outcome"][early]).mean() < 0.1
        rate = false_alarm_rate(**flags)
        assert rate.low < 0.95**10 < rate.high and rate.high - rate.low < 0.15

    def test_what_came_of_a_question_about_one_moment(self, path):
        question = Question("Crashed 2 steps after {action}?", after("crashed", steps=2), name="c")
        qa = QuestionAnswerer.from_model(make_model(toys(), questions=[question]))
        env = VetoAction(Toy(), "c", 0.0, shadow=True, qa=qa, record=path)
        run_single(env, [0] * 5)
        env.close()
        outcomes = [event.outcome for event in FlightLog(path).events()]
        assert outcomes == [False, False, False, True, False]  # there is no second step after the last

    def test_continuous_actions(self, path):
        space = spaces.Box(-1, 1, (2,), np.float32)
        qa = make_qa(action_space=space)
        env = VecVetoAction(toys(2, action_space=space), "crash[k=3]", 0.5, qa=qa, record=path)
        moments = run_vec(env, np.random.default_rng(0).uniform(-1, 1, (20, 2, 2)).astype(np.float32))
        env.close()
        expected = events_of(moments)
        n = 0
        for event in FlightLog(path).events():
            moment = expected[event.env, event.episode, event.step]
            np.testing.assert_allclose(event.proposed, moment.action, rtol=1e-6)
            np.testing.assert_allclose(event.executed, moment.info["did"], rtol=1e-6)
            risks = qa.ask("crash[k=1]", np.stack([moment.before] * len(event.actions)), event.actions).probability
            np.testing.assert_allclose(event.answers["crash[k=1]"], risks, rtol=1e-3, atol=1e-5)
            if event.flagged:
                assert (
                    len(event.actions) == len(event.risks) == 66
                )  # proposed, 32 of the policy, 32 of the space, refined
                assert event.executed_risk == pytest.approx(event.risks.min(), rel=1e-3, abs=1e-6)
                n += 1
        assert n > 5

    def test_normalised_environments_and_facts_that_are_callables(self, path):
        """Facts are in the environment's own units: |obs| is some 1 there, and so is the reward."""
        far = Question(
            "Far after {action}?",
            eventually(lambda step: step.obs[0] > 1.2 and step.reward > 1.0, within=2),
            name="far",
        )
        inner = toys(2)
        normal = VecNormalize(inner)
        qa = QuestionAnswerer.from_model(make_model(normal, questions=[far]))
        env = VecVetoAction(normal, "far", 1.0, qa=qa, record=path)
        raw = []
        wait = inner.step_wait

        def step_wait():
            result = wait()
            raw.append([np.copy(result[0]), np.copy(result[1]), np.copy(result[2]), list(result[3])])
            return result

        inner.step_wait = step_wait
        env.reset()
        for _ in range(100):
            env.step(np.array([1, 2]))
        env.close()
        expected = 0
        for obs, rewards, dones, infos in raw:
            for i in range(2):
                seen = infos[i]["terminal_observation"] if dones[i] else obs[i]
                expected += bool(seen[0] > 1.2 and rewards[i] > 1.0)
        events = FlightLog(path).events()
        assert sum(event.catastrophe for event in events) == expected > 5

    def test_an_answerer_from_a_file_does_not_know_its_callable_facts(self, path, tmp_path):
        """Terminations are recorded, and called just that."""
        question = Question("Crash after {action}?", eventually(lambda step: step.info["crashed"], within=2), name="c")
        QuestionAnswerer.from_model(make_model(toys(), questions=[question])).save(tmp_path / "c.qa")
        env = VecVetoAction(toys(2), "c", 1.0, qa=tmp_path / "c.qa", record=path)
        moments = run_vec(env, ACTIONS[:, :2])
        env.close()
        events = FlightLog(path).events()
        assert len(events) == sum(moment.terminated for each in moments for moment in each) > 3
        assert all(event.catastrophe is None and event.kinds == ["terminated"] for event in events)

    def test_a_fact_that_fails_stops_nothing(self, path, caplog):
        question = Question("Crash after {action}?", eventually(lambda step: 1 / 0, within=2), name="c")
        qa = QuestionAnswerer.from_model(make_model(toys(), questions=[question]))
        env = VetoAction(Toy(), "c", 0.0, qa=qa, record=path)
        with caplog.at_level(logging.WARNING):
            assert len(steps(run_single(env, ACTIONS[:, 0]))) == 40
        env.close()
        assert len(caplog.records) == 1 and "ZeroDivisionError" in caplog.text
        assert {event.catastrophe for event in FlightLog(path).events()} == {None}

    def test_frames(self, qa, path):
        class Seen(Toy):
            render_mode = "rgb_array"

            def render(self):
                return np.full((4, 6, 3), self._steps, np.uint8)

        env = VecVetoAction(DummyVecEnv([Seen] * 2), "crash[k=3]", 0.5, qa=qa, record=FlightRecorder(path, frames=True))
        run_vec(env, ACTIONS[:, :2])
        env.close()
        log = FlightLog(path)
        for event in log.events():
            window = log.window(event.id)
            assert window.frames.shape == (len(window.step), 4, 6, 3)
            assert window.frames[:, 0, 0, 0].tolist() == window.step.tolist()
        single = VetoAction(Seen(), "crash[k=3]", 0.5, qa=qa, record=FlightRecorder(path, frames=True))
        run_single(single, ACTIONS[:, 0])
        single.close()
        event = FlightLog(path).events()[-1]
        assert FlightLog(path).window(event.id).frames.shape[1:] == (4, 6, 3)
        with pytest.raises(QAError, match=r"render_mode=None; expected 'rgb_array'; make it with render_mode"):
            VetoAction(Toy(), "crash[k=3]", 0.5, qa=qa, record=FlightRecorder(path, frames=True))

    def test_seeds(self, qa, path):
        """Those of environments in other processes are the ones given; in this one, the ones in use."""
        env = SubprocVecEnv([Toy] * 2, start_method="fork")
        env.seed(5)  # before the wrapper is there, as make_vec_env does
        env = VecVetoAction(env, "crash[k=3]", 0.0, qa=qa, record=path)
        env.reset()
        for _ in range(7):
            env.step(np.array([0, 1]))
        env.close()
        events = FlightLog(path).events()
        assert {(event.env, event.seed, event.episode, event.since_seed) for event in events} == {
            (i, 5 + i, episode, episode) for i in range(2) for episode in range(2)
        }
        single = VetoAction(Toy(length=2), "crash[k=3]", 0.0, qa=qa, record=path)
        for seed in (3, None, 4):
            single.reset(seed=seed)
            single.step(0)
        single.close()
        told = [(event.seed, event.since_seed, event.episode) for event in FlightLog(path).events()[-3:]]
        assert told == [(3, 0, 0), (3, 1, 1), (4, 0, 2)]

    def test_options_that_come_from_numpy(self, qa, path):
        n = np.int64
        options = dict(seed=n(5), refine=n(2), cooldown=n(1), budget=n(3), let_through=np.float32(0.25))
        env = VecVetoAction(
            toys(2),
            "crash[k=3]",
            np.float32(0.5),
            qa=qa,
            record=path,
            shadow=np.bool_(False),
            penalty=np.float32(0.5),
            **options,
        )
        run_vec(env, ACTIONS[:, :2])
        env.close()
        (run,) = FlightLog(path).runs().values()
        assert {name: run[name] for name in options} == options
        assert (run["threshold"], run["shadow"]) == (0.5, False)

    def test_options_of_a_choice_that_json_does_not_take(self, path):
        Lane = Enum("Lane", ["LEFT", "RIGHT"])
        options = [Lane.LEFT, np.int64(3), (1, 2), frozenset([4])]
        lane = Question("Which lane is it in?", now("lane"), answer=Choice(*options), name="lane")
        qa = QuestionAnswerer.from_model(make_model(toys(2), questions=[QUESTIONS[0], lane]))
        env = VecVetoAction(toys(2), "crash[k=3]", 0.5, qa=qa, record=path)
        run_vec(env, ACTIONS[:, :2])
        env.close()
        told = [event.answers["lane"] for event in FlightLog(path).events()]
        assert told and all(each in ("Lane.LEFT", 3, [1, 2], "frozenset({4})") for each in told)

    def test_who_answered(self, qa, path, monkeypatch, caplog):
        def fly_once():
            env = VecVetoAction(toys(2), "crash[k=3]", 0.5, qa=qa, record=path)
            run_vec(env, ACTIONS[:, :2])
            env.close()

        fly_once()
        monkeypatch.setattr(evidence_module, "answerer_digests", lambda qa: 1 / 0)
        with caplog.at_level(logging.WARNING):
            fly_once()
        assert "will not tell the answerer from another" in caplog.text
        first, second = FlightLog(path).runs().values()
        assert first["digests"] == answerer_digests(qa) and second["digests"] is None
        assert "claim" not in first

    def test_training(self, path):
        """From learn() on, with an answerer that is bound there; the observations are those the policy sees."""
        from sb3_qa.callbacks import QACallback

        env = VecVetoAction(VecNormalize(toys(2)), "crash[k=3]", 0.5, record=path)
        model = make_model(env)
        model.learn(64, QACallback())
        env.close()
        log = FlightLog(path)
        assert len(log) > 3
        assert np.abs(log.window(log.events()[-1].id).obs).max() <= 10.0

    def test_nothing_in_it_is_executable(self, qa, path):
        env = VecVetoAction(toys(2), "crash[k=3]", 0.5, qa=qa, record=path)
        run_vec(env, ACTIONS[:, :2])
        env.close()
        db = sqlite3.connect(path)
        for (data,) in db.execute("SELECT compared FROM events UNION ALL SELECT data FROM chunks"):
            assert data[:6] == b"\x93NUMPY"
            with pytest.raises(pickle.UnpicklingError):
                pickle.loads(data)
        for texts in db.execute("SELECT proposed, executed, answers FROM events"):
            for text in texts:
                json.loads(text, parse_constant=pytest.fail)  # strict JSON
        with pytest.raises(ValueError, match="allow_pickle"):
            unpack(["x"], pack([np.zeros(1)])[:0] + _object_npy())


def _object_npy():
    import io

    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    return file.getvalue()


class TestArrays:
    def test_as_numpy_saves_them(self):
        import io

        arrays = {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.float32([]), "c": np.array(True)}
        data = pack(arrays.values())
        file = io.BytesIO()
        for array in arrays.values():
            np.save(file, array, allow_pickle=False)
        assert data == file.getvalue()
        for name, array in unpack(list(arrays), data).items():
            np.testing.assert_array_equal(array, arrays[name])
            assert array.dtype == arrays[name].dtype

    def test_many_are_compressed(self):
        image = np.zeros((4, 84, 84), np.uint8)
        assert len(pack([image])) < image.nbytes / 20
        np.testing.assert_array_equal(unpack(["x"], pack([image]))["x"], image)


def an_event(recorder, run=1, when=0.0, size=100):
    """A batch with one event, and steps of so many bytes around it."""
    batch, number = Batch(), recorder.next_event()
    batch.events.append(
        Event(
            *(number, run, when, 0, 0, number, None, 0, True, True, False, 0.0, False, False, None, False, False),
            *(0.9, 0.1, "0", "1", "{}", pack([np.float32([0.9, 0.1])])),
        )
    )
    noise = np.random.default_rng(number).integers(256, size=size, dtype=np.uint8)
    batch.chunks.append(
        Chunk(
            number,
            number,
            1,
            {
                "obs": noise[None],
                "risk": np.float32([0.9]),
                **dict.fromkeys(("proposed", "executed", "reward"), np.zeros(1)),
            },
        )
    )
    return batch


class TestKilled:
    """By SIGKILL at any moment, 50 times: nothing that was committed is lost, and the file opens."""

    @pytest.mark.parametrize("delay", [0.0, 0.02])
    def test_nothing_committed_is_lost(self, path, delay):
        qa, rng, known = make_risks([0.9, 0.2, 0.1]), random.Random(1), 0
        for _ in range(25):
            listen, say = os.pipe()
            process = forked(fly, path, delay, say, qa)
            os.close(say)
            said = os.read(listen, 10)  # it steps
            time.sleep(rng.uniform(0.0, 0.1))
            os.kill(process, signal.SIGKILL)
            while more := os.read(listen, 65536):
                said += more
            os.waitpid(process, 0)
            os.close(listen)
            committed = int(said[: said.rindex(b"\n")].split(b"\n")[-1])
            db = sqlite3.connect(path)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            db.close()
            with FlightLog(path) as log:
                events = log.events()
                assert len(events) - known >= committed
                assert len({event.id for event in events}) == len(events)
                known = len(events)
                for event in events[-3:]:
                    window = log.window(event.id)
                    assert window is not None and event.step in window.step
        assert known > 100

    def test_before_the_step_returns(self, path):
        """With no delay, what a step has told is in the file."""
        env = VecVetoAction(
            toys(2), "ruin", 0.5, qa=make_risks([0.9, 0.2, 0.1]), record=FlightRecorder(path, delay=0.0)
        )
        env.reset()
        n = 0
        for actions in ACTIONS[:, :2]:
            n += sum(info["qa/catastrophe"] or info["crashed"] for info in env.step(actions)[3])
            assert len(FlightLog(path)) == n

    def test_what_waits_is_written_at_the_end_of_a_process_that_does_not_close(self, path):
        env = VetoAction(Toy(), "ruin", 0.5, qa=make_risks([0.9, 0.2, 0.1]), record=FlightRecorder(path, delay=1e6))
        env.reset(seed=0)
        env.step(0)
        assert len(FlightLog(path)) == 0
        evidence_module._close_all()  # what atexit calls
        assert len(FlightLog(path)) == 1


class TestSize:
    def test_the_oldest_are_dropped_and_counted(self, path):
        recorder = FlightRecorder(path, max_mb=1.0)
        n, size = 400, 20_000
        for k in range(n):
            assert recorder.write(an_event(recorder, when=float(k), size=size))
        recorder.close()
        assert path.stat().st_size <= 1e6
        with FlightLog(path) as log:
            events = log.events()
            assert 20 <= len(events) < 50
            assert log.counts == {"dropped": n - len(events), "lost": 0}
            assert [event.time for event in events] == list(np.arange(n - len(events), n))  # the newest, all of them
            assert log.event(events[0].id).id == events[0].id
        db = sqlite3.connect(path)
        assert db.execute("SELECT count(*) FROM chunks").fetchone() == (len(events),)

    def test_while_it_is_open_too(self, path):
        recorder = FlightRecorder(path, max_mb=1.0)
        largest = 0
        for _ in range(300):
            recorder.write(an_event(recorder, size=20_000))
            largest = max(largest, sum(each.stat().st_size for each in path.parent.iterdir()))
        assert largest < 1e6 + 6e6  # with the write-ahead log, which is emptied every 1000 pages

    def test_of_a_file_that_was_larger(self, path):
        larger = FlightRecorder(path)
        for k in range(100):
            larger.write(an_event(larger, when=float(k), size=50_000))
        larger.close()
        assert path.stat().st_size > 5e6
        recorder = FlightRecorder(path, max_mb=1.0)
        with FlightLog(path) as log:
            kept = log.events()
            assert 5 < len(kept) < 20
            assert [event.time for event in kept] == list(np.arange(100 - len(kept), 100))
            assert log.counts == {"dropped": 100 - len(kept), "lost": 0}
            assert log.window(kept[0].id).obs.shape == (len(kept), 50_000)
        assert path.stat().st_size <= 1e6
        for _ in range(50):
            assert recorder.write(an_event(recorder, size=50_000))
        recorder.close()
        assert path.stat().st_size <= 1e6

    def test_of_a_file_that_was_larger_while_others_use_it(self, path, monkeypatch):
        monkeypatch.setattr(recorder_module, "WAIT", 0.05)
        larger = FlightRecorder(path)
        for _ in range(40):
            larger.write(an_event(larger, size=50_000))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        recorder = FlightRecorder(path, max_mb=1.0)  # it cannot be made smaller now
        with FlightLog(path) as log:
            assert len(log) == 40
        other.execute("ROLLBACK")
        for _ in range(20):
            assert recorder.write(an_event(recorder, size=50_000)) and larger.write(an_event(larger, size=50_000))
        with FlightLog(path) as log:
            assert len(log) < 30
        other.execute("BEGIN")
        n = other.execute("SELECT count(*) FROM chunks").fetchone()
        third = FlightRecorder(path, max_mb=1.0)  # somebody reads: it is made smaller, and what is read stays as it was
        assert other.execute("SELECT count(*) FROM chunks").fetchone() == n
        other.execute("COMMIT")
        assert larger.write(an_event(larger))
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for each in (other, recorder, larger, third):
            each.close()
        assert path.stat().st_size <= 1e6

    def test_an_event_larger_than_the_file(self, path, caplog):
        recorder = FlightRecorder(path, max_mb=1.0)
        with caplog.at_level(logging.ERROR):
            assert not recorder.write(an_event(recorder, size=3_000_000))
        assert "cannot be written to (database or disk is full)" in caplog.text
        assert path.stat().st_size <= 1e6


class TestSeveral:
    def test_processes_write_into_one_file(self, path):
        def work():
            recorder = FlightRecorder(path)
            run = recorder.begin_run({})
            assert all(recorder.write(an_event(recorder, run=run)) for _ in range(250))

        assert [os.waitpid(process, 0)[1] for process in [forked(work) for _ in range(3)]] == [0, 0, 0]
        log = FlightLog(path)
        assert len(log) == 750
        assert sorted(log.runs()) == [1, 2, 3]
        assert [sum(event.run == run for event in log.events()) for run in (1, 2, 3)] == [250] * 3

    def test_made_by_several_processes_at_once(self, tmp_path):
        for n in range(25):
            processes = [forked(lambda n=n: FlightRecorder(tmp_path / f"{n}.sqlite").close()) for _ in range(6)]
            assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 6

    def test_environments_in_processes_of_their_own(self, qa, path, tmp_path):
        saved = tmp_path / "toy.qa"
        qa.save(saved)
        recorder = FlightRecorder(path)  # opened here, and used there

        def make(i):
            return VetoAction(Toy(length=5 + i), "crash[k=3]", 0.5, qa=saved, record=recorder if i % 2 else path)

        env = SubprocVecEnv([lambda i=i: make(i) for i in range(3)], start_method="fork")
        moments = run_vec(env, ACTIONS)
        env.close()
        log = FlightLog(path)
        assert len(log.runs()) == 3
        assert len(log) == len(events_of(moments)) > 20

    def test_wrappers_of_one_process(self, qa, path):
        recorder = FlightRecorder(path)
        envs = [VetoAction(Toy(), "crash[k=3]", 0.5, qa=qa, record=recorder) for _ in range(2)]
        n = sum(len(events_of([run_single(env, ACTIONS[:, 0])])) for env in envs)
        for env in envs:
            env.close()
        assert len(FlightLog(path)) == n
        assert len(FlightLog(path).runs()) == 2

    def test_read_while_it_is_written(self, path):
        recorder = FlightRecorder(path)
        for n in range(1, 6):
            recorder.write(an_event(recorder))
            assert len(FlightLog(path)) == n

    def test_a_recorder_goes_through_pickle(self, path):
        recorder = FlightRecorder(path, before=3, max_mb=2.0, frames=True)
        twin = pickle.loads(pickle.dumps(recorder))
        assert (twin.before, twin.max_mb, twin.frames, twin.path) == (3, 2.0, True, str(path))
        assert twin.write(an_event(twin))
        assert len(FlightLog(path)) == 1

    def test_in_the_specification_of_an_environment(self, qa, path):
        env = VetoAction(gym.make("CartPole-v1"), "crash[k=3]", 0.5, unbound="pass", record=path, budget=2)
        assert json.loads(env.spec.to_json())["additional_wrappers"][-1]["kwargs"]["record"] == str(path)
        again = gym.make(env.spec)
        assert again.rule.evidence.recorder.path == str(path)
        assert again.rule.restraint.budget == 2


class TestFailing:
    """Whatever happens to the file, vetoes go on; it is said once."""

    def test_a_disk_that_is_full(self, path, tmp_path):
        qa = make_risks([0.9, 0.2, 0.1])

        def work():
            logging.basicConfig(filename=tmp_path / "log", level=logging.INFO, force=True)
            env = VecVetoAction(toys(2), "ruin", 0.5, qa=qa, record=FlightRecorder(path, delay=0))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limit))
            env.reset()
            for _ in range(300):
                infos = env.step(np.array([0, 1]))[3]
                assert infos[0]["qa/vetoed"] and infos[0]["did"] == 2 and not infos[1]["qa/vetoed"]
            env.rule.evidence.recorder._wait_until = 0.0
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for _ in range(2):
                env.step(np.array([0, 1]))
            env.close()

        assert os.waitpid(forked(work), 0)[1] == 0
        said = (tmp_path / "log").read_text()
        assert said.count("cannot be written to") == said.count("flags and vetoes go on, UNRECORDED") == 1
        assert said.count("is written to again") == 1
        with FlightLog(path) as log:
            assert 10 < len(log) < 300
            assert log.counts["lost"] > 50

    def test_a_file_that_is_taken_away(self, path, caplog, monkeypatch):
        qa = make_risks([0.9, 0.2, 0.1])
        env = VetoAction(Toy(), "ruin", 0.5, qa=qa, record=FlightRecorder(path, delay=0))
        env.reset(seed=0)
        env.step(0)
        recorder = env.rule.evidence.recorder
        recorder._open().execute("PRAGMA query_only = 1")  # as of a disk that is mounted read-only
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                info = env.step(0)[4]
                assert info["qa/vetoed"] is True and info["did"] == 2
        assert len(caplog.records) == 1
        assert "attempt to write a readonly database" in caplog.text
        assert recorder.lost == 3
        env.close()
        assert len(FlightLog(path)) == 1

    @pytest.mark.parametrize("how", ["renamed", "deleted", "replaced"])
    def test_a_file_of_which_the_name_is_gone(self, path, caplog, how):
        """What was written is in the file that was renamed; what comes then is counted as lost, and not in silence."""
        qa = make_risks([0.9, 0.2, 0.1])
        env = VetoAction(Toy(length=50), "ruin", 0.5, qa=qa, record=FlightRecorder(path, delay=0))
        env.reset(seed=0)
        for _ in range(4):
            env.step(0)
        away = path.with_name("away.sqlite")
        os.replace(path, away)
        if how == "deleted":
            away.unlink()
        elif how == "replaced":
            path.write_bytes(b"")
        recorder = env.rule.evidence.recorder
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert env.step(0)[4]["qa/vetoed"] is True
        assert recorder.lost == 3
        (said,) = caplog.records
        assert "it was deleted or renamed while it was open); flags and vetoes go on, UNRECORDED" in said.getMessage()
        if how == "renamed":
            assert len(FlightLog(away)) == 4
            os.replace(away, path)
            recorder._wait_until = 0.0
            env.step(0)
            env.close()
            with FlightLog(path) as log:
                assert len(log) == 5
                assert log.counts["lost"] == 3
        env.close()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: path.write_bytes(b"text" * 1000), "file is not a database"),
            (lambda path: sqlite3.connect(path).execute("CREATE TABLE x (y)"), "it is a database of something else"),
            (lambda path: path.mkdir(), "unable to open database file"),
        ],
    )
    def test_what_is_no_flight_record_is_refused(self, qa, path, make, message):
        make(path)
        with pytest.raises(
            QAError, match=f"flight.sqlite cannot be opened \\({message}\\); expected a flight record, or a new"
        ):
            VetoAction(Toy(), "crash[k=3]", 0.5, qa=qa, record=path)
        with pytest.raises(QAError, match="expected a file|cannot be read"):
            FlightLog(path)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(before=-1), "before=-1; expected a number of steps"),
            (dict(after=1.5), "after=1.5"),
            (dict(max_mb=0.5), "max_mb=0.5; expected megabytes, at least 1"),
            (dict(max_mb=float("nan")), "max_mb=nan"),
            (dict(delay=-1), "delay=-1; expected seconds"),
        ],
    )
    def test_refused_arguments(self, path, arguments, message):
        with pytest.raises(QAError, match=message):
            FlightRecorder(path, **arguments)

    def test_refused_as_record(self, qa):
        with pytest.raises(QAError, match="FlightRecorder got path=3; expected the path of a file"):
            FlightRecorder(3)
        with pytest.raises(QAError, match="VetoAction got record=3; expected a path or a FlightRecorder"):
            VetoAction(Toy(), "crash[k=3]", 0.5, qa=qa, record=3)

    def test_reading_from_a_folder_that_cannot_be_written_to(self, path, tmp_path):
        recorder = FlightRecorder(path)
        recorder.write(an_event(recorder))
        recorder.close()
        assert [each.name for each in tmp_path.iterdir()] == ["flight.sqlite"]
        copy = shutil.copy(path, tmp_path / "copy.sqlite")
        os.chmod(copy, 0o400)
        assert len(FlightLog(copy)) == 1
        with pytest.raises(QAError, match="has no event 7; expected a number from 1 to 1"):
            FlightLog(copy).event(7)
        with pytest.raises(QAError, match="there is no flight record"):
            FlightLog(tmp_path / "none.sqlite")
