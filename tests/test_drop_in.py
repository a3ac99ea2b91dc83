"""A policy with questions stands wherever a plain one does: spaces, optimisers, parts of states, names, calls by hand."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_algorithms import ALL, QUESTIONS, VALUE_BASED, Drift, alias, environment, make, network, taught

from sb3_qa import Number, QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.truth import Truth, after, always, eventually, now
from sb3_qa.wrappers import VecAnswerQuestions, VecVetoAction

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")

SHORT = [
    Question("Will it end within {k} steps if I choose {action}?", eventually("end", within="k"), k=[1, 3], name="end"),
    Question("Is it paid?", now(lambda step: step.reward > 0.5), name="paid"),
    Question("How much?", now(lambda step: step.reward), Number(0, 1), name="much"),
]


class Anything(gym.Env[Any, Any]):
    """Random observations of any space, to which any action may be answered."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {"end": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.t += 1
        end = bool(self.np_random.random() < 0.1)
        return self.observation_space.sample(), float(self.np_random.random()), end, self.t > 15, {"end": end}


SEEN = {
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3)),
    "dict": spaces.Dict(
        {"which": spaces.Discrete(3), "bits": spaces.MultiBinary(2), "where": spaces.Box(-1.0, 1.0, (2,))}
    ),
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("algorithm", [PPO, TRPO, DQN, QRDQN, SAC])
def test_observations_of_every_kind(algorithm: Any, seen: str) -> None:
    action_space = spaces.Box(-1.0, 1.0, (2,)) if algorithm is SAC else spaces.Discrete(3)
    env = VecAnswerQuestions(DummyVecEnv([lambda: Anything(SEEN[seen], action_space) for _ in range(2)]))
    policy = "QAMultiInputPolicy" if seen == "dict" else "QAMlpPolicy"
    model = make(algorithm, policy, env, dict(questions=SHORT, net_arch=[8]))
    if algorithm in VALUE_BASED or algorithm is SAC:  # answers about what a buffer keeps are scored only every so often
        model.learn(2200, callback=QACallback())
    else:
        model.learn(96, callback=QACallback())
    assert int(model.policy.qa_head.n_updates) > 0
    obs = env.reset()
    action = np.stack([action_space.sample()] * 2) if algorithm is SAC else None
    probability = QuestionAnswerer.from_model(model).ask("end[k=3]", obs, action).probability
    assert probability.shape == ((2,) if algorithm is SAC else (2, 3))


@pytest.mark.parametrize("algorithm", [PPO, A2C, SAC, TD3])
def test_actions_of_several_dimensions(algorithm: Any) -> None:
    actions = spaces.Box(-1.0, 1.0, (2, 2))
    env = DummyVecEnv([lambda: Anything(SEEN["matrix"], actions)])
    model = make(algorithm, "QAMlpPolicy", env, dict(questions=SHORT, net_arch=[8])).learn(96, callback=QACallback())
    asked = QuestionAnswerer.from_model(model).ask("end[k=3]", env.reset(), actions.sample()[None])
    assert asked.probability.shape == (1,)


def test_a_policy_for_other_observations_is_refused_by_name() -> None:
    for name in ("QAMlpPolicy", "QACnnPolicy"):
        with pytest.raises(QAError, match="MultiInputPolicy"):
            PPO(name, DummyVecEnv([lambda: Drift("dict")]), policy_kwargs=dict(questions=QUESTIONS))


def test_algorithms_know_the_policy_by_its_name() -> None:
    """PPO recommends the CPU to a policy of dense layers, which it tells by the name of its class."""
    model = taught(PPO)
    model.device = torch.device("cuda")
    with pytest.warns(UserWarning, match="PPO on the GPU"):
        model._maybe_recommend_cpu()
    made = qa_policy(PPO)
    assert (made.__name__, made.__qualname__) == ("ActorCriticPolicy", "QAActorCriticPolicy")


@pytest.mark.parametrize("algorithm", ALL)
def test_all_of_the_state_can_be_replaced_by_random_numbers_in_part(algorithm: Any) -> None:
    model = taught(algorithm)
    state = model.policy.state_dict()
    # The agent's own counters (of CrossQ's normalisation) are left as they are; the head has nothing but floats.
    drawn = {k: torch.rand_like(v) for k, v in state.items() if "qa_head." in k or v.is_floating_point()}
    kept = copy.deepcopy(model.policy.qa_head.average)
    place = "" if model.policy.qa_target is None else f"{model.policy.qa_target[0]}."
    del drawn[f"{place}qa_head.average"], drawn[f"{place}qa_head.n_updates"]
    model.set_parameters({"policy": drawn}, exact_match=False)
    assert torch.equal(model.policy.qa_head.flat, drawn[f"{place}qa_head.flat"])
    assert torch.equal(model.policy.qa_head.average, kept)
    # Answers go on from the weights where their average was not among what was loaded.
    obs = np.zeros((2, 3), np.float32)
    before = QuestionAnswerer.from_model(taught(algorithm)).ask("is_low", obs).probability
    assert not np.array_equal(QuestionAnswerer.from_model(model).ask("is_low", obs).probability, before)
    assert torch.equal(model.policy.qa_head.average, model.policy.qa_head.flat)


@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALL if algorithm is not CrossQ])
def test_a_plain_agents_parameters_can_be_taken_over(algorithm: Any) -> None:
    """Its optimiser knows nothing of the head; the agent goes on as it would have without questions."""
    plain = make(
        algorithm, alias(algorithm, "vector"), environment(algorithm), network(algorithm, "vector", True)
    ).learn(80)
    model = taught(algorithm, coef=0.0)
    model.set_parameters(plain.get_parameters(), exact_match=False)
    weights = model.policy.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.policy.state_dict().items())
    model.learn(80, callback=QACallback())


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_an_optimiser_put_in_by_hand_or_copied_is_joined(algorithm: Any) -> None:
    def by_hand(model: Any) -> None:
        owner = model.policy if algorithm is not SAC else model.policy.actor
        owner.optimizer = torch.optim.SGD(list(owner.parameters()), lr=1e-3, momentum=0.5)

    def copied(model: Any) -> None:
        model.policy = copy.deepcopy(model.policy)
        model._create_aliases() if algorithm is not PPO else None

    for change in (by_hand, copied):
        model = taught(algorithm)
        change(model)
        head = model.policy.qa_head.flat.detach().clone()
        model.learn(80, callback=QACallback())
        assert not torch.equal(model.policy.qa_head.flat, head)
        assert int(model.policy.qa_head.n_updates) > 0
        with pytest.raises(QAError, match="QACallback"):
            model.learn(80)


def test_a_model_saved_with_another_optimiser_says_what_sb3_would() -> None:
    model = taught(DQN)
    nets = model.q_net, model.q_net_target
    own = [x for net in nets for name, x in net.named_parameters() if not name.startswith("qa_head.")]
    model.policy.optimizer = torch.optim.Adam(own, lr=1e-3)
    file = io.BytesIO()
    model.save(file)
    with pytest.warns(UserWarning, match="DQN"):  # as SB3 wrote them before 2.4: the target in the optimiser too
        DQN.load(io.BytesIO(file.getvalue()), env=model.get_env()).learn(40, callback=QACallback())


def test_rollouts_collected_by_hand() -> None:
    model = taught(PPO)
    head = model.policy.qa_head.flat.detach().clone()
    _, callback = model._setup_learn(64, QACallback())
    for _ in range(2):
        model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
    model.train()
    assert not torch.equal(model.policy.qa_head.flat, head)


@pytest.mark.parametrize("algorithm", ALL)
def test_trained_by_hand_on_what_was_learnt_from_and_on_nothing_newer(algorithm: Any) -> None:
    model = taught(algorithm).learn(64, callback=QACallback())
    off_policy = hasattr(model, "replay_buffer")
    before, head = copy.deepcopy(model.policy.state_dict()), copy.deepcopy(model.policy.qa_head.flat)
    train: Callable[[], None] = (lambda: model.train(gradient_steps=3, batch_size=16)) if off_policy else model.train
    train()
    after = model.policy.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(head, model.policy.qa_head.flat) != off_policy  # a replay buffer keeps its labels
    with pytest.raises(QAError, match="QACallback"):
        model.learn(64, reset_num_timesteps=False)
    with pytest.raises(QAError, match="QACallback"):
        train()


def test_short_calls_of_learn_are_labelled_too() -> None:
    """Labels come in blocks, and at the end of learn() for the rest, whose futures go on by the answerer's curve."""
    model = taught(DQN)
    for _ in range(4):
        model.learn(40, callback=QACallback(), reset_num_timesteps=False)
    known = (model.replay_buffer.qa_labels._known > 0).any(axis=1)
    assert known.sum() == 160
    assert int(model.policy.qa_head.n_updates) > 0


def test_a_small_replay_buffer_is_labelled_in_smaller_blocks() -> None:
    model = make(DQN, "QAMlpPolicy", environment(DQN), dict(questions=SHORT[1:], net_arch=[8]), buffer_size=4)
    model.learn(40, callback=QACallback())
    assert int(model.policy.qa_head.n_updates) > 0
    far = [Question("?", after("low", steps=3), name="far")]
    model = make(DQN, "QAMlpPolicy", environment(DQN), dict(questions=far, net_arch=[8]), buffer_size=4)
    with pytest.raises(QAError, match="at least 3"):
        model.learn(40, callback=QACallback())


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return False


@pytest.mark.parametrize("buffer_size, memory", [(1, False), (2, False), (5, False), (5, True), (40, True)])
def test_an_event_beyond_what_the_buffer_keeps_goes_on_by_the_curve(buffer_size: int, memory: bool) -> None:
    far = [Question("?", eventually("low", within=60), name="far")]
    given = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    env = DummyVecEnv([Drift])
    model = make(
        DQN,
        "QAMlpPolicy",
        env,
        dict(questions=far, net_arch=[8]),
        buffer_size=buffer_size,
        learning_starts=12,
        **(given if memory else {}),
    )
    went_on = []

    class Watch(QACallback):
        def _on_rollout_end(self) -> None:
            labels = self.model.replay_buffer.qa_labels  # type: ignore[attr-defined]
            went_on.append(bool(labels._any_open.any()))
            assert self.n_calls < buffer_size or (labels._known > 0).mean() >= 0.4
            super()._on_rollout_end()

    model.learn(80, callback=Watch())
    assert any(went_on) and (model.replay_buffer.qa_labels._known > 0).all()
    model.learn(10, callback=[QACallback(), Stop()], reset_num_timesteps=False)


def make_fact(limit: Any) -> Any:
    return lambda step, k=1: step.obs[0] < limit


def test_a_question_is_equal_to_itself_once_loaded(tmp_path: Path) -> None:
    asked = [Question("?", eventually(make_fact(1.0), within=3), name="lower"), *QUESTIONS]
    kwargs = dict(questions=asked, net_arch=[8])
    PPO("QAMlpPolicy", environment(PPO), policy_kwargs=kwargs).save(tmp_path / "model.zip")
    ours = PPO.load(tmp_path / "model.zip").policy_kwargs["questions"]
    assert ours[0].truth.fact is not asked[0].truth.fact and ours == asked
    assert [hash(question) for question in ours] == [hash(question) for question in asked]
    PPO.load(tmp_path / "model.zip", policy_kwargs=kwargs)  # SB3 compares them
    with pytest.raises(ValueError, match="policy kwargs"):
        PPO.load(tmp_path / "model.zip", policy_kwargs=dict(questions=QUESTIONS, net_arch=[8]))


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_a_policy_whose_facts_no_import_finds_is_saved_and_pickled_by_itself(algorithm: Any, tmp_path: Path) -> None:
    """SB3 saves policies by pickle alone, which refuses lambdas."""
    asked = [Question("?", eventually(make_fact(1.0), within=3), name="lower"), *SHORT[1:]]
    policy = make(algorithm, "QAMlpPolicy", environment(algorithm), dict(questions=asked, net_arch=[8])).policy
    policy.save(tmp_path / "policy.pth")
    for again in (type(policy).load(tmp_path / "policy.pth"), pickle.loads(pickle.dumps(policy))):
        questions = again.qa_kwargs["questions"]
        assert questions == asked and questions[0].truth.fact is not asked[0].truth.fact
        assert torch.equal(again.qa_head.flat, policy.qa_head.flat)
    named, own = Question("?", now(math.sin), name="named"), Question("?", now(Counting()), name="own")
    assert pickle.loads(pickle.dumps(named)).truth.fact is math.sin
    assert copy.deepcopy(own).truth.fact is not own.truth.fact
    assert copy.deepcopy(asked[0]).truth.fact is asked[0].truth.fact


class Counting:
    """A fact with a state of its own."""

    def __call__(self, step: Any) -> bool:
        return False


@pytest.mark.parametrize(
    "a, b, same",
    [
        (now(make_fact(1.0)), now(make_fact(1.0)), True),
        (now(make_fact(1.0)), now(make_fact(2.0)), False),
        (now(make_fact(1.0)), always(make_fact(1.0), during=1), False),
        (now(make_fact(np.zeros(2))), now(make_fact(np.zeros(2))), False),  # arrays have no one truth value
        (now(lambda step: 1), now(lambda step: 1), False),  # of other lines
        (now(math.sin), now(math.sin), True),
        (now("low"), now("low"), True),
        (now("low"), now("x"), False),
        (now("low"), now(make_fact(1.0)), False),
    ],
)
def test_truths_are_equal_where_their_facts_are_of_the_same_code(a: Truth, b: Truth, same: bool) -> None:
    assert (a == b) == same
    assert not same or hash(a) == hash(b)
    assert a != "low"


COMPILED = [
    (PPO, "vector", ""),
    (PPO, "vector", "mlp_extractor"),
    (PPO, "vector", "action_net"),
    (PPO, "image", "features_extractor"),
    (DQN, "vector", "q_net"),
    (DQN, "vector", "q_net.q_net"),
    (DQN, "image", "q_net"),
    (SAC, "vector", ""),
    (SAC, "image", "actor"),
]


@pytest.mark.filterwarnings("ignore")  # of the compiler, about its own affairs
@pytest.mark.parametrize("algorithm, seen, part", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_parts_or_as_a_whole_it_learns_the_same(
    algorithm: Any, seen: str, part: str, backend: str, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    usual = taught(algorithm, seen).learn(64, callback=QACallback())
    model = taught(algorithm, seen)
    if part:
        owner, _, name = part.rpartition(".")
        module = model.policy.get_submodule(owner)
        setattr(module, name, torch.compile(getattr(module, name), backend=backend))
        if hasattr(model, "_create_aliases"):
            model._create_aliases()
    else:
        model.policy = torch.compile(model.policy, backend=backend)
    model.learn(64, callback=QACallback())
    state = {name.replace("_orig_mod.", ""): value for name, value in model.policy.state_dict().items()}
    for name, value in usual.policy.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert int(model.policy.qa_head.n_updates) == int(usual.policy.qa_head.n_updates) > 0
    qa, obs = QuestionAnswerer.from_model(model), model.get_env().reset()
    action = np.zeros((2, 1), np.float32) if algorithm is SAC else None
    asked = qa.ask("low[k=4]", obs, action).probability
    expected = QuestionAnswerer.from_model(usual).ask("low[k=4]", obs, action).probability
    np.testing.assert_allclose(asked, expected, atol=1e-3)
    qa.save(tmp_path / "a.qa")
    frozen = QuestionAnswerer.load(tmp_path / "a.qa")
    np.testing.assert_allclose(frozen.ask("low[k=4]", obs, action).probability, asked, atol=1e-5)
    if algorithm is DQN:
        env = VecVetoAction(model.get_env(), "low[k=4]", 0.0, on_veto="policy", qa=qa)
        env.reset()
        env.step(np.zeros(2, np.int64))


class Squared(BaseFeaturesExtractor):
    """An extractor of a user's own."""

    def __init__(self, observation_space: Any, factor: float = 1.0) -> None:
        super().__init__(observation_space, 2 * observation_space.shape[0])
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return torch.cat([observations, self.factor * observations.square()], dim=1)


OWN = dict(features_extractor_class=Squared, features_extractor_kwargs=dict(factor=0.5))
COMBINED: list[tuple[Any, dict[str, Any], dict[str, Any], bool]] = [
    # algorithm, the network, other arguments, whether observations are normalised
    (PPO, dict(net_arch=[8], ortho_init=False, **OWN), dict(target_kl=1e-3, batch_size=12), True),
    (A2C, dict(net_arch=[], log_std_init=-1.0), dict(use_rms_prop=False), True),
    (TRPO, dict(net_arch=dict(pi=[8], vf=[])), dict(batch_size=12), False),
    (DQN, dict(net_arch=[], optimizer_class=torch.optim.AdamW), dict(n_steps=3), True),
    (QRDQN, dict(net_arch=[8], n_quantiles=5, **OWN), dict(gradient_steps=-1), False),
    (SAC, dict(net_arch=[8], n_critics=1), dict(use_sde=True, sde_sample_freq=2, ent_coef=0.1), True),
    (SAC, dict(net_arch=[8], **OWN), dict(n_steps=3, use_sde_at_warmup=True, use_sde=True), False),
    (TQC, dict(net_arch=[], n_critics=3), dict(use_sde=True, top_quantiles_to_drop_per_net=1), False),
    (TD3, dict(net_arch=dict(pi=[8], qf=[6]), n_critics=3), dict(policy_delay=2), True),
    (CrossQ, dict(net_arch=[8], n_critics=1), dict(learning_rate=lambda left: 1e-3 * left), False),
]


@pytest.mark.parametrize("algorithm, net, given, normalised", COMBINED, ids=lambda each: getattr(each, "__name__", ""))
def test_options_in_combination_leave_the_agent_alone_when_off_and_are_learnt_with_when_on(
    algorithm: Any, net: dict[str, Any], given: dict[str, Any], normalised: bool
) -> None:
    models = []
    for coef in (None, 0.0, 0.5):
        env = environment(algorithm)
        env = VecNormalize(env) if normalised else env
        asked = {} if coef is None else dict(questions=QUESTIONS, qa_coef=coef)
        model = make(algorithm, "MlpPolicy" if coef is None else "QAMlpPolicy", env, {**net, **asked}, **given)
        for again in (True, False, True):  # a learn() that goes on, and one that begins anew
            model.learn(64, reset_num_timesteps=again, callback=None if coef is None else QACallback())
        models.append(model)
    plain, off, on = (model.policy.state_dict() for model in models)
    assert all(torch.equal(value, off[name]) for name, value in plain.items())
    if net["net_arch"] == [8]:  # there is something between the observations and the readout
        assert any(not torch.equal(value, on[name]) for name, value in plain.items())
    assert int(models[2].policy.qa_head.n_updates) > 0 == int(models[1].policy.qa_head.n_updates)


def test_a_last_layer_put_in_by_hand_is_read() -> None:
    model = taught(PPO)
    model.policy.action_net = torch.nn.Linear(16, 2)
    head = model.policy.qa_head.flat.detach().clone()
    model.learn(64, callback=QACallback())
    assert not torch.equal(model.policy.qa_head.flat, head)


def test_on_another_device_the_gradient_is_worked_out_there() -> None:
    """On the device "meta", which has shapes and no numbers, nothing may come from or go to the CPU."""
    head = taught(PPO).policy.qa_head
    rng = np.random.default_rng(0)
    y, weight, features = (rng.random((5, n), np.float32) for n in (head.n_logits, head.n_logits, 2))
    latents = [torch.zeros(5, head.latent_dim - 4), torch.zeros(5, 4)]
    here = head.gradients(latents, features, y, weight)
    head.to("meta")
    there = head.gradients([latent.to("meta") for latent in latents], features, y, weight)
    for mine, theirs in zip([*there[0], there[1]], [*here[0], here[1]], strict=True):
        assert mine.is_meta and mine.shape == theirs.shape
    head.n_updates = torch.zeros(())
    head.follow()
    assert head.average.is_meta


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "DQN", "QRDQN", "TD3", "SAC"])
def test_on_another_device_it_learns_the_same(algorithm: str) -> None:
    """In a process of its own, as torch is told of a device that is none; see other_device.py."""
    command = [sys.executable, str(Path(__file__).with_name("other_device.py")), algorithm]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout.split()[-1]) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("algorithm", ALL)
def test_on_cuda_it_learns_answers_and_goes_on(algorithm: Any, tmp_path: Path) -> None:
    model = taught(algorithm, device="cuda").learn(64, callback=QACallback())
    assert model.policy.qa_head.flat.is_cuda
    obs = model.get_env().reset()
    asked = QuestionAnswerer.from_model(model).ask("is_low", obs).probability
    QuestionAnswerer.from_model(model).save(tmp_path / "a.qa")
    here = QuestionAnswerer.load(tmp_path / "a.qa").ask("is_low", obs).probability
    np.testing.assert_allclose(here, asked, atol=1e-4)
    model.save(tmp_path / "model.zip")
    for device in ("cpu", "cuda"):
        algorithm.load(tmp_path / "model.zip", env=environment(algorithm), device=device).learn(
            64, callback=QACallback()
        )


def test_drawing_actions_leaves_the_stream_of_the_device_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed sets the streams of all devices; the one that the policy is on is put back, not only the CPU's."""
    reading = QuestionAnswerer.from_model(taught(SAC)).read(np.zeros((2, 3), np.float32))
    before = torch.get_rng_state()
    reading.sampled(3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    kept: list[Any] = []

    class Kept(Exception):
        pass

    def fork_rng(devices: Any, device_type: str = "cuda") -> Any:
        kept.append((devices, device_type))
        raise Kept

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(type(reading._policy), "device", torch.device("cuda", 1), raising=False)
    with pytest.raises(Kept):
        reading.sampled(3, seed=1)
    assert kept == [([torch.device("cuda", 1)], "cuda")]


@pytest.mark.parametrize("algorithm, name", [(DQN, "q_net"), (QRDQN, "quantile_net"), (TD3, "actor"), (SAC, "actor")])
def test_a_network_is_saved_and_loaded_by_itself_as_what_it_was(algorithm: Any, name: str, tmp_path: Path) -> None:
    model = taught(algorithm).learn(64, callback=QACallback())
    network = getattr(model.policy, name)
    head = model.policy.qa_head.flat.detach().clone()
    network.save(tmp_path / "network.pth")
    loaded = type(network).load(tmp_path / "network.pth")
    obs = np.zeros((3, 3), np.float32)
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], network.predict(obs, deterministic=True)[0]
    )
    weights = {key: value + 1.0 for key, value in loaded.state_dict().items()}
    network.load_state_dict(weights)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert torch.equal(model.policy.qa_head.flat, head)
