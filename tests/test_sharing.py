"""A live answerer in the processes of environments: each update is seen, none is seen by half, and nobody waits."""

import gc
import multiprocessing
import os
import pickle
import time
from functools import partial

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from wrapping import QUESTIONS, Toy, make_model, toys

import sb3_qa.sharing
from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.sharing import FollowingAnswerer
from sb3_qa.storage import all_weights
from sb3_qa.truth import eventually
from sb3_qa.wrappers import AnswerQuestions, VetoAction, vector

FORK = pytest.param(
    "fork",
    marks=pytest.mark.skipif(
        os.environ.get("OMP_NUM_THREADS") != "1", reason="threads of OpenMP do not survive a fork"
    ),
)
METHODS = [FORK, "forkserver", "spawn"]


same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)  # a batch of one is added up in another order


class Watched(AnswerQuestions):
    """Tells what its process answers by."""

    def report(self):
        qa = self.rule.qa
        return os.getpid(), type(qa).__name__, self.env.rule.qa is qa, float(qa.policy.qa_head.flat.detach().sum())

    def last_obs(self):
        return self.rule.obs

    def damage(self):
        self.rule.qa.policy.qa_head.flat.detach().zero_()


def guarded(shared, number):
    return Watched(VetoAction(Toy(length=5 + number), "crash[k=3]", 0.5, qa=shared), qa=shared)


def small(venv):
    return make_model(venv, n_steps=32)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", METHODS)
def test_workers_answer_as_the_model_that_learns(method):
    model = small(toys(2))
    qa = QuestionAnswerer.from_model(model)
    shared = qa.share()
    workers = SubprocVecEnv([partial(guarded, shared, i) for i in range(2)], start_method=method)
    try:
        model.set_env(workers)
        learnt = []
        for _ in range(3):
            model.learn(128, callback=QACallback(), reset_num_timesteps=False)
            obs = np.concatenate(workers.env_method("last_obs"))
            actions = model.predict(obs, deterministic=True)[0]
            infos = workers.step(actions)[3]
            executed = np.array([info["qa/executed_action"] for info in infos])
            risk = qa.ask("crash[k=3]", obs, action=actions).probability
            same([info["qa/risk"] for info in infos], risk)
            same([info["qa/crash[k=3]"] for info in infos], qa.ask("crash[k=3]", obs, action=executed).probability)
            if not any("terminal_observation" in info for info in infos):
                arrived = np.concatenate(workers.env_method("last_obs"))
                same([info["qa/speed"] for info in infos], qa.ask("speed", arrived).mean)
            probe = np.zeros((1, 4), np.float32)
            learnt.append(float(qa.ask("danger", probe).probability[0]))
        assert np.ptp(learnt) > 1e-3  # far more than what is let pass above
        reports = workers.env_method("report")
        assert len({pid for pid, *_ in reports} | {os.getpid()}) == 3
        assert [(kind, same) for _, kind, same, _ in reports] == [("FollowingAnswerer", True)] * 2
        weights = float(qa.policy.qa_head.flat.detach().sum())
        assert [x for *_, x in reports] == [weights] * 2
        workers.env_method("damage", indices=0)  # of its own copy
        assert float(qa.policy.qa_head.flat.detach().sum()) == weights != 0.0
        assert workers.env_method("report", indices=1)[0][-1] == weights
    finally:
        workers.close()


def test_an_answerer_can_be_bound_later():
    """Where the environment stands before the model does."""
    workers = SubprocVecEnv([partial(guarded_later, i) for i in range(2)], start_method="forkserver")
    try:
        model = small(workers)
        shared = QuestionAnswerer.from_model(model).share()
        workers.env_method("bind", shared)
        model.learn(64, callback=QACallback())
        obs = np.concatenate(workers.env_method("last_obs"))
        infos = workers.step(np.zeros(2, int))[3]
        told = [info["qa/risk"] for info in infos]
        same(told, shared.open().ask("crash[k=3]", obs, action=np.zeros(2, int)).probability)
    finally:
        workers.close()


class Later(VetoAction):
    def last_obs(self):
        return self.rule.obs


def guarded_later(number):
    return Later(Toy(length=5 + number), "crash[k=3]", 0.5, unbound="pass")


def one_update(model):
    """What a step of the optimiser writes."""
    for optimizer in sb3_qa.sharing._optimizers(model.policy):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_each_update_is_seen_by_whoever_follows(algorithm):
    env = make_vec_env("Pendulum-v1" if algorithm is SAC else "CartPole-v1", 1, seed=0)
    question = Question("Over within 5 with {action}?", eventually(lambda step: step.terminated, within=5), name="over")
    model = algorithm(qa_policy(algorithm), env, policy_kwargs=dict(questions=[question]), seed=0, device="cpu")
    before = {name: tensor.clone() for name, tensor in all_weights(model.policy).items()}
    qa = QuestionAnswerer.from_model(model)
    shared = qa.share()
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_weights(model.policy).items())
    following = FollowingAnswerer(shared._folder, shared._places, ())
    obs, action = env.reset(), np.zeros((1, *env.action_space.shape), env.action_space.dtype)
    model.policy.qa_joint.learnt = lambda: True  # it is trained by hand here
    for _ in range(3):
        writes, version = shared.n_writes, following.version
        model.policy.qa_joint.learnt = lambda: True
        one_update(model)
        assert shared.n_writes == writes + 1
        assert following.ask("over", obs, action).probability == qa.ask("over", obs, action).probability
        assert following.version != version
        for name, tensor in all_weights(following.policy).items():
            assert torch.equal(tensor, all_weights(model.policy)[name]), name
    model.set_parameters(model.get_parameters())
    assert shared.n_writes > writes + 1  # weights that are loaded are written too


def test_it_learns_as_it_would_without(tmp_path):
    """Where the weights lie changes nothing of what they become, nor of what is saved."""
    plain = small(toys(2)).learn(128, callback=QACallback())
    other = small(toys(2))
    QuestionAnswerer.from_model(other).share()
    other.learn(128, callback=QACallback())
    a, b = all_weights(plain.policy), all_weights(other.policy)
    assert all(torch.equal(a[name], b[name]) for name in a)
    other.save(tmp_path / "m.zip")
    loaded = PPO.load(tmp_path / "m.zip", device="cpu")
    assert all(torch.equal(tensor, b[name]) for name, tensor in all_weights(loaded.policy).items())
    assert (tmp_path / "m.zip").stat().st_size < 2_000_000


def write_for_ever(shared, owner_weights, stop):
    """Every weight is the number of the update, in each update."""
    number = 0
    while not stop.is_set():
        number += 1
        shared.begin()
        for tensor in owner_weights:
            tensor.fill_(float(number % 1000))
        shared.end()
        time.sleep(0.0002)


def test_no_update_is_seen_by_half():
    """A writer that never waits, in another process, against a reader that looks as often as it can."""
    model = small(toys(1))
    shared = QuestionAnswerer.from_model(model).share()
    weights = [tensor.detach() for tensor in all_weights(model.policy).values()]
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=write_for_ever, args=(shared, weights, stop))
    following = FollowingAnswerer(shared._folder, shared._places, ())
    writer.start()
    try:
        seen = set()
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            following.refresh()
            values = [tensor.flatten()[[0, -1]] for tensor in all_weights(following.policy).values()]
            if following._seen > 2:
                told = set(torch.cat(values).tolist())
                assert len(told) == 1, told
                seen |= told
        assert len(seen) > 100
    finally:
        stop.set()
        writer.join()


def test_the_counter_tells_what_is_being_written():
    """A reader that comes in the middle of an update copies again, and not what is half written."""
    model = small(toys(1))
    shared = QuestionAnswerer.from_model(model).share()
    following = FollowingAnswerer(shared._folder, shared._places, ())
    flat, before = model.policy.qa_head.flat, following.policy.qa_head.flat.clone()
    shared.begin()
    with torch.no_grad():
        flat[: len(flat) // 2] = 7.0
    sb3_qa.sharing.PATIENCE, patience = 0.05, sb3_qa.sharing.PATIENCE
    try:
        with pytest.raises(QAError, match="could not be read in 0.05 s"):
            following.refresh()
    finally:
        sb3_qa.sharing.PATIENCE = patience
    assert torch.equal(following.policy.qa_head.flat, before) and following.n_retries > 0
    shared.begin()  # an update that was given up is begun again
    shared.end()
    following.refresh()
    assert torch.equal(following.policy.qa_head.flat, flat)


def test_what_is_sent_is_small_and_can_be_sent_by_any_pickle():
    shared = QuestionAnswerer.from_model(small(toys(1))).share()
    for dumps in (pickle.dumps, cloudpickle.dumps):
        data = dumps(shared)
        assert len(data) < 10_000
        qa = pickle.loads(data).open()
        assert type(qa) is FollowingAnswerer and pickle.loads(data).open() is qa  # one a process
    assert shared.open() is shared.owner  # at home, the live one


def test_shared_twice_it_is_the_same():
    model = small(toys(1))
    shared = QuestionAnswerer.from_model(model).share()
    assert QuestionAnswerer.from_model(model).share() is shared
    env = DummyVecEnv([partial(guarded, shared, 0)])  # in the process that learns
    assert env.envs[0].rule.qa is shared.owner
    for made in (AnswerQuestions(Toy()), vector.AnswerQuestions(gym.vector.SyncVectorEnv([Toy]))):
        made.bind(shared)
        assert made.rule.qa is shared.owner


def test_it_is_tidied_away_with_the_model():
    model = small(toys(1))
    folder = QuestionAnswerer.from_model(model).share()._folder
    handle = pickle.dumps(model.policy.qa_shared)
    assert folder.exists()
    del model
    gc.collect()
    assert not folder.exists()
    with pytest.raises(QAError, match=r"are gone; expected the process that learns to live"):
        pickle.loads(handle).open()


def test_what_cannot_be_shared_is_refused(monkeypatch):
    model = DQN(
        qa_policy(DQN),
        DummyVecEnv([Toy]),
        policy_kwargs=dict(questions=QUESTIONS),
        buffer_size=100,
        seed=0,
        device="cpu",
    )
    with pytest.raises(QAError, match="which no optimiser moves; expected the live one"):
        QuestionAnswerer.from_model(model, target=True).share()
    weights = {"w": torch.zeros(1, device="meta")}
    monkeypatch.setattr(sb3_qa.sharing, "all_weights", lambda policy: weights)
    with pytest.raises(QAError, match="expected one on the CPU"):
        QuestionAnswerer.from_model(model).share()
