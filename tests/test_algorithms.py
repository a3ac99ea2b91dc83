"""Every algorithm of SB3 and sb3-contrib that has a gradient: it learns, answers, is left alone, saved, and goes on."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as maskable_evaluation
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_qa import Number, QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.truth import after, eventually, now, total
from sb3_qa.wrappers import VecAnswerQuestions, VecVetoAction

ON_POLICY = [PPO, A2C, TRPO, MaskablePPO, RecurrentPPO]
# The batches of 12 that 32 transitions are split into leave a smaller one, which SB3 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")

VALUE_BASED = [DQN, QRDQN]
CONTINUOUS = [SAC, TD3, DDPG, TQC, CrossQ]
ALL = [*ON_POLICY, *VALUE_BASED, *CONTINUOUS]
QUESTIONS = [
    Question(
        "Will it be low within {k} steps if I choose {action}?", eventually("low", within="k"), k=[1, 4], name="low"
    ),
    Question("Will it be low within 9 steps?", eventually("low", within=9), name="low_later"),
    Question("Is it low?", now("low"), name="is_low"),
    Question("Where will it be in 2 steps?", after("x", steps=2), Number(-2, 2), name="where"),
    Question("How far will it go in 3 steps?", total("x", over=3), Number(-6, 6), name="far"),
]


class Drift(gym.Env[Any, Any]):
    """A point that drifts, pushed by the action; seen as numbers, as an image, or as both."""

    def __init__(self, seen: str = "vector", continuous: bool = False, time_limit: int = 12) -> None:
        self.seen = seen
        self.time_limit = time_limit
        self.action_space = spaces.Box(-2.0, 2.0, (1,)) if continuous else spaces.Discrete(2)
        vector, image = spaces.Box(-9.0, 9.0, (3,)), spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.observation_space = {"vector": vector, "image": image, "dict": spaces.Dict(vector=vector, image=image)}[
            seen
        ]

    def _told(self) -> tuple[Any, dict[str, Any]]:
        vector = np.array([self.x, self.v, self.t / 10], np.float32)
        image = np.full((1, 36, 36), np.clip(128 + 40 * self.x, 0, 255), np.uint8)
        obs: Any = {"vector": vector, "image": image, "dict": {"vector": vector, "image": image}}[self.seen]
        return obs, {"low": bool(self.x < -0.5), "x": self.x, "t": self.t}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.v, self.t = float(self.np_random.normal(0, 0.3)), 0.0, 0
        return self._told()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        push = float(action[0]) / 2 if isinstance(self.action_space, spaces.Box) else 2.0 * int(action) - 1.0
        self.v = 0.8 * self.v + 0.1 * push + float(self.np_random.normal(0, 0.1))
        self.x, self.t = self.x + self.v, self.t + 1
        obs, info = self._told()
        return obs, -abs(self.x), abs(self.x) > 1.5, self.t >= self.time_limit, info

    def action_masks(self) -> np.ndarray[Any, Any]:
        return np.ones(2, np.bool_)


def environment(algorithm: type, seen: str = "vector", **kwargs: Any) -> DummyVecEnv:
    env = DummyVecEnv([lambda: Drift(seen, algorithm in CONTINUOUS, **kwargs) for _ in range(2)])
    env.seed(3)
    return env


def make(algorithm: type, policy: Any, env: Any, net: dict[str, Any], **kwargs: Any) -> Any:
    if issubclass(algorithm, OffPolicyAlgorithm):
        given: dict[str, Any] = dict(
            learning_starts=20, batch_size=16, buffer_size=1000, train_freq=4, gradient_steps=1
        )
    else:
        given = dict(n_steps=16) if algorithm is A2C else dict(n_steps=16, batch_size=12)
    if algorithm is TD3:
        given["policy_delay"] = 1
    return algorithm(policy, env, seed=0, policy_kwargs=dict(net), **{**given, **kwargs})


def alias(algorithm: type, seen: str) -> str:
    name = {"vector": "Mlp", "image": "Cnn", "dict": "MultiInput"}[seen]
    return f"{name}LstmPolicy" if algorithm is RecurrentPPO else f"{name}Policy"


def network(algorithm: type, seen: str, shared: bool) -> dict[str, Any]:
    net: dict[str, Any] = dict(net_arch=[16])
    if seen == "image":
        net["features_extractor_kwargs"] = dict(features_dim=16)
    if seen == "dict":
        net["features_extractor_kwargs"] = dict(cnn_output_dim=16)
    if algorithm is RecurrentPPO:
        net["lstm_hidden_size"] = 16
    if algorithm not in VALUE_BASED:
        net["share_features_extractor"] = shared
    return net


def taught(
    algorithm: type, seen: str = "vector", net: dict[str, Any] | None = None, coef: float = 0.5, **kwargs: Any
) -> Any:
    net = network(algorithm, seen, True) if net is None else net
    return make(
        algorithm,
        f"QA{alias(algorithm, seen)}",
        environment(algorithm, seen),
        {**net, "questions": QUESTIONS, "qa_coef": coef},
        **kwargs,
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seen", ["vector", "image", "dict"])
@pytest.mark.parametrize("algorithm", ALL)
def test_learns_and_answers_and_leaves_the_agent_alone_when_off(
    algorithm: type, seen: str, shared: bool, tmp_path: Path
) -> None:
    if algorithm in VALUE_BASED and not shared:
        pytest.skip("has one extractor")
    if alias(algorithm, seen) not in algorithm.policy_aliases:  # type: ignore[attr-defined]
        pytest.skip("has no such policy")
    torch.set_num_threads(1)
    net = network(algorithm, seen, shared)
    plain = make(algorithm, alias(algorithm, seen), environment(algorithm, seen), net).learn(160)
    off = taught(algorithm, seen, net, coef=0.0)
    head = off.policy.qa_head.flat.detach().clone()
    off.learn(160, callback=QACallback())
    weights = off.policy.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.policy.state_dict().items())
    assert torch.equal(off.policy.qa_head.flat, head)

    on = taught(algorithm, seen, net)
    on.learn(160, callback=QACallback())
    assert not torch.equal(on.policy.qa_head.flat, head)
    shaped = on.policy.state_dict()
    assert any(not torch.equal(weight, shaped[name]) for name, weight in plain.policy.state_dict().items())
    qa = QuestionAnswerer.from_model(on)
    obs = on.get_env().reset()
    action = np.zeros((2, 1), np.float32) if algorithm in CONTINUOUS else None
    asked = [qa.ask("low[k=4]", obs, action).probability, qa.ask("is_low", obs).probability, qa.ask("far", obs).mean]
    assert all(np.isfinite(answer).all() for answer in asked)
    qa.save(tmp_path / "a.qa")
    frozen = QuestionAnswerer.load(tmp_path / "a.qa")
    np.testing.assert_array_equal(frozen.ask("low[k=4]", obs, action).probability, asked[0])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seen", ["vector", "image", "dict"])
@pytest.mark.parametrize("algorithm", ALL)
def test_goes_on_after_loading_as_if_it_had_never_stopped(algorithm: type, seen: str, shared: bool) -> None:
    if algorithm in VALUE_BASED and not shared:
        pytest.skip("has one extractor")
    if alias(algorithm, seen) not in algorithm.policy_aliases:  # type: ignore[attr-defined]
        pytest.skip("has no such policy")
    steps = 160 if seen == "vector" or algorithm in VALUE_BASED else 64
    first = taught(algorithm, seen, network(algorithm, seen, shared))
    first.learn(steps, callback=QACallback())
    file = io.BytesIO()
    first.save(file)
    second = algorithm.load(io.BytesIO(file.getvalue()), env=environment(algorithm, seen))  # type: ignore[attr-defined]
    if isinstance(first, OffPolicyAlgorithm):
        buffer = io.BytesIO()
        first.save_replay_buffer(buffer)
        second.load_replay_buffer(io.BytesIO(buffer.getvalue()))
    for model in (first, second):
        env = environment(algorithm, seen)
        model.set_env(env)
        set_random_seed(7)
        env.action_space.seed(7)
        model.learn(steps, reset_num_timesteps=False, callback=QACallback())
    weights = second.policy.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in first.policy.state_dict().items())


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("on_veto", ["safest", "policy"])
def test_veto(algorithm: type, on_veto: Any) -> None:
    env = VecVetoAction(VecAnswerQuestions(environment(algorithm)), "low[k=4]", 0.45, on_veto=on_veto)
    net = {**network(algorithm, "vector", True), "questions": QUESTIONS}
    model = make(algorithm, qa_policy(algorithm), env, net)
    model.learn(160, callback=QACallback())
    obs = env.reset()
    for _ in range(30):
        obs, _, _, infos = env.step(model.predict(obs)[0])
        assert all(0.0 <= info["qa/risk"] <= 1.0 and isinstance(info["qa/vetoed"], bool) for info in infos)


@pytest.mark.parametrize("threshold", [0.0, 0.45])
def test_maskable_agents_never_sample_what_would_be_vetoed(threshold: float) -> None:
    env = VecVetoAction(environment(MaskablePPO), "low[k=4]", threshold)
    model = make(
        MaskablePPO, qa_policy(MaskablePPO), env, {**network(MaskablePPO, "vector", True), "questions": QUESTIONS}
    )
    told: list[dict[str, Any]] = []

    class Watch(QACallback):
        def _on_step(self) -> bool:
            told.extend(dict(info) for info in self.locals["infos"])
            return super()._on_step()

    model.learn(96, callback=Watch())
    assert not any(info["qa/vetoed"] for info in told)
    masks = np.stack(env.env_method("action_masks"))
    qa, obs = QuestionAnswerer.from_model(model), model._last_obs
    risk = qa.ask("low[k=4]", obs).probability
    allowed = risk < threshold
    lowest = risk == risk.min(axis=1, keepdims=True)
    np.testing.assert_array_equal(masks, np.where(allowed.any(axis=1, keepdims=True), allowed, lowest))
    never = np.zeros((2, 2), np.bool_)
    never[:, 0] = True
    np.testing.assert_array_equal(env.rule.masks(never), never)  # what the environment forbids stays so
    assert len(env.env_method("action_masks", indices=[1])) == 1
    shadow = VecVetoAction(environment(MaskablePPO), "low[k=4]", 0.0, shadow=True, qa=qa)
    shadow.reset()
    assert np.stack(shadow.env_method("action_masks")).all()
    # A question about states tells no action from another: its veto acts, and masks nothing.
    state = VecVetoAction(environment(MaskablePPO), "low_later", 0.0, on_veto=lambda obs, action: 1 - action, qa=qa)
    state.reset()
    assert np.stack(state.env_method("action_masks")).shape == (2, 2)
    assert np.stack(state.env_method("action_masks")).all()


class Forbidding(gym.Wrapper[Any, Any, Any, Any]):
    """Three actions, of which one is forbidden, another in every step; which it is must never be executed."""

    def __init__(self) -> None:
        super().__init__(Drift("vector", False, time_limit=10))
        self.action_space = spaces.Discrete(3)

    def forbidden(self) -> int:
        return int(self.env.unwrapped.t) % 3

    def step(self, action: Any) -> Any:
        assert action != self.forbidden()
        return self.env.step(int(action > 1))


def possible(env: Any) -> np.ndarray[Any, Any]:
    return np.arange(3) != env.get_wrapper_attr("forbidden")()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_masks_of_the_veto_and_of_the_environment_together(threshold: float) -> None:
    """By sb3-contrib's own ActionMasker, evaluation and all: neither the agent nor a veto executes what is forbidden."""
    env = DummyVecEnv([lambda: ActionMasker(Monitor(Forbidding()), possible) for _ in range(2)])
    env = VecVetoAction(VecAnswerQuestions(env), "low[k=4]", threshold)
    model = make(MaskablePPO, "QAMlpPolicy", env, {**network(MaskablePPO, "vector", True), "questions": QUESTIONS})
    model.learn(96, callback=QACallback())
    obs = env.reset()
    for _ in range(25):
        own = np.stack(env.venv.env_method("action_masks"))
        masks = get_action_masks(env)
        assert masks.any(axis=1).all() and not (masks & ~own).any()
        if threshold == 1.0:
            np.testing.assert_array_equal(masks, own)
        action, _ = model.predict(obs, action_masks=masks)
        obs, _, _, infos = env.step(action)
        assert not any(info["qa/vetoed"] for info in infos)
    maskable_evaluation(model, env, n_eval_episodes=2)


@pytest.mark.parametrize("algorithm", [DQN, SAC])
@pytest.mark.parametrize("store", ["proposed", "executed"])
def test_which_action_is_stored(algorithm: type, store: Any) -> None:
    """Every action is judged a catastrophe and replaced by another one."""

    def replace(obs: Any, action: Any) -> Any:
        return np.array([1.5], np.float32) if algorithm is SAC else 1 - action

    env = VecVetoAction(environment(algorithm), "low[k=4]", 0.0, on_veto=replace)
    net = {**network(algorithm, "vector", True), "questions": QUESTIONS}
    model = make(algorithm, qa_policy(algorithm), env, net)
    told: list[dict[str, Any]] = []

    class Watch(QACallback):
        def _on_step(self) -> bool:
            told.extend(dict(info) for info in self.locals["infos"])
            return super()._on_step()

    model.learn(100, callback=Watch(store=store))
    buffer = model.replay_buffer
    kept = buffer.actions[: buffer.pos].reshape(-1)
    expected = np.array([np.ravel(info[f"qa/{store}_action"])[0] for info in told], np.float32)
    if algorithm is SAC:
        expected = expected / 2.0  # the buffer keeps actions in [-1, 1]
    np.testing.assert_allclose(kept, expected, atol=1e-6)


def test_executed_actions_are_stored_off_policy_only() -> None:
    with pytest.raises(QAError, match="replay buffer"):
        taught(PPO).learn(16, callback=QACallback(store="executed"))
    with pytest.raises(QAError, match="proposed"):
        QACallback(store="all")  # type: ignore[arg-type]


def test_observations_that_vecnormalize_changes() -> None:
    env = VecNormalize(environment(DQN))
    model = make(DQN, qa_policy(DQN), env, {**network(DQN, "vector", True), "questions": QUESTIONS})
    model.learn(300, callback=QACallback())
    assert int(model.policy.qa_head.n_updates) > 0


@pytest.mark.parametrize(
    "net", [dict(net_arch=[]), dict(net_arch=[16], use_sde=True), dict(net_arch=[16], n_critics=3)]
)
def test_networks_of_sac(net: dict[str, Any]) -> None:
    use_sde = net.pop("use_sde", False)
    model = taught(SAC, net=net, use_sde=use_sde)
    before = model.policy.qa_head.flat.detach().clone()
    model.learn(160, callback=QACallback())
    assert not torch.equal(model.policy.qa_head.flat, before)


def test_agents_without_a_gradient_are_refused() -> None:
    with pytest.raises(QAError, match="no gradient"):
        qa_policy(ARS)
    for name in ("QAMlpPolicy", "QALinearPolicy"):
        with pytest.raises(QAError, match="use PPO or SAC"):
            ARS(name, Drift(), policy_kwargs=dict(questions=QUESTIONS))


def test_policies_are_known_by_name_once_the_package_is_imported() -> None:
    program = (
        "import sb3_qa; from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3; from sb3_contrib import CrossQ, RecurrentPPO, TRPO;"
        "assert all('QA' + n in a.policy_aliases for a in (A2C, DDPG, DQN, PPO, SAC, TD3, CrossQ, RecurrentPPO, TRPO)"
        " for n in a.policy_aliases if not n.startswith('QA'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert qa_policy(DQN, "CnnPolicy") is DQN.policy_aliases["QACnnPolicy"]


def test_an_unknown_family_says_what_it_could_not_find_and_takes_names() -> None:
    from stable_baselines3.common.policies import BasePolicy

    class Own(BasePolicy):
        def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, **kwargs: Any) -> None:
            super().__init__(observation_space, action_space, **kwargs)
            self.trunk = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU())
            self.last = torch.nn.Linear(8, 2)
            self.optimizer = torch.optim.Adam(self.parameters(), lr=lr_schedule(1.0))

        def _predict(self, observation: Any, deterministic: bool = False) -> torch.Tensor:
            return self.last(self.trunk(observation)).argmax(dim=1)

    env = Drift()
    arguments: Any = (env.observation_space, env.action_space, lambda _: 1e-3)
    with pytest.raises(QAError, match=r"qa_readouts=.*") as error:
        qa_policy(Own)(*arguments, questions=QUESTIONS)
    assert "'last'" in str(error.value)
    with pytest.raises(QAError, match="'trunk.9'"):
        qa_policy(Own)(*arguments, questions=QUESTIONS, qa_readouts=["trunk.9"])
    policy: Any = qa_policy(Own)(*arguments, questions=QUESTIONS, qa_readouts=["last"])
    assert QuestionAnswerer(policy).ask("low[k=4]", np.zeros((5, 3), np.float32)).probability.shape == (5, 2)


@pytest.mark.parametrize("names", [["value_net"], ["value_net", "action_net"]], ids=str)
def test_readouts_that_are_named_are_read_in_that_order(names: list[str]) -> None:
    """What is taught in passing and what answers are the latents of the same readouts."""
    model = taught(PPO, net=dict(net_arch=[8], qa_readouts=names))
    policy, obs = model.policy, torch.randn(7, 3)
    with torch.no_grad():
        actor, critic = policy.mlp_extractor(obs)
        expected = [{"action_net": actor, "value_net": critic}[name] for name in names]
        read = policy.qa_taps.join(policy.qa_taps.read(policy, obs.numpy()))
        best = policy.get_distribution(obs).mode().numpy()
    np.testing.assert_allclose(read, torch.cat(expected, dim=1).numpy(), atol=1e-6)
    np.testing.assert_array_equal(QuestionAnswerer.from_model(model).read(obs.numpy()).preferred(), best)


@pytest.mark.parametrize("target", [False, True])
def test_the_preferred_action_is_what_the_agent_takes(target: bool) -> None:
    """Of the network that acts, also where its target answers."""
    model = taught(DQN, net=dict(net_arch=[16]))
    with torch.no_grad():
        for parameter in model.policy.q_net_target.q_net.parameters():
            parameter.neg_()
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    taken, _ = model.predict(obs, deterministic=True)
    assert 0 < taken.sum() < 50
    reading = QuestionAnswerer.from_model(model, target=target).read(obs)
    np.testing.assert_array_equal(reading.preferred(), taken)
    np.testing.assert_array_equal(reading.shares().argmax(axis=1), taken)


class Frozen(torch.nn.BatchNorm1d):
    """A layer that never leaves its evaluation."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("own", [False, True], ids=["stock", "with a layer of its own ways"])
def test_modes_change_as_those_of_a_plain_agent(algorithm: Any, own: bool) -> None:
    plain = make(algorithm, alias(algorithm, "vector"), environment(algorithm), network(algorithm, "vector", True))
    asked = taught(algorithm)
    networks = [plain.policy, asked.policy]
    if own:
        for policy in networks:
            part = next(part for part in policy.children() if len(list(part.children())))
            part.frozen = Frozen(3)
    for mode in (True, False, False, True):
        states = []
        for policy in networks:
            policy.set_training_mode(mode)
            states.append({name: part.training for name, part in policy.named_modules() if "qa_head" not in name})
        assert states[0] == states[1]
        assert states[0][""] is mode
        assert not own or not any(on for name, on in states[1].items() if name.endswith("frozen"))


@pytest.mark.parametrize("algorithm", [DQN, QRDQN, SAC, TD3, TQC])
@pytest.mark.parametrize("arch", [[], [8], [8, 6]])
def test_dense_layers_are_read_as_torch_computes_them(algorithm: type, arch: list[int]) -> None:
    model = taught(algorithm, net=dict(net_arch=arch))
    taps, policy = model.policy.qa_taps, model.policy
    obs = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    assert taps._dense is not None
    with torch.no_grad():
        by_torch = [latent.numpy() for latent in taps.tensors(policy, torch.as_tensor(obs))]
    np.testing.assert_allclose(taps.read(policy, obs)[0], by_torch[0], atol=1e-6)
    assert taps._dense[0]._steps or not arch


@pytest.mark.parametrize("algorithm", ALL)
def test_the_policy_is_a_policy_like_any_other(algorithm: Any, tmp_path: Path) -> None:
    model = taught(algorithm)
    model.learn(80, callback=QACallback())
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    acted = model.predict(obs, deterministic=True)[0]
    assert acted.shape == (5, *model.action_space.shape)
    model.policy.save(tmp_path / "policy.pth")
    loaded = type(model.policy).load(tmp_path / "policy.pth")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], acted)
    asked = QuestionAnswerer.from_model(model).ask("is_low", obs).probability
    np.testing.assert_array_equal(QuestionAnswerer(loaded).ask("is_low", obs).probability, asked)
    again = type(model.policy)(**model.policy._get_constructor_parameters())
    again.load_state_dict(model.policy.state_dict())
    np.testing.assert_array_equal(again.predict(obs, deterministic=True)[0], acted)
    other = taught(algorithm)
    other.set_parameters(model.get_parameters())
    np.testing.assert_array_equal(other.predict(obs, deterministic=True)[0], acted)
    assert model.policy.to("cpu") is model.policy
    assert {id(p) for p in model.policy.qa_head.parameters()}.isdisjoint(id(p) for p in model.policy.parameters())


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_steps_and_episodes_between_updates(algorithm: Any) -> None:
    for train_freq, gradient_steps in (((1, "episode"), -1), ((3, "step"), 2)):
        env = DummyVecEnv([lambda: Drift(continuous=algorithm is SAC)])
        net = {**network(algorithm, "vector", True), "questions": QUESTIONS}
        model = make(algorithm, qa_policy(algorithm), env, net, train_freq=train_freq, gradient_steps=gradient_steps)
        model.learn(100, callback=QACallback())
        model.learn(60, callback=QACallback(), reset_num_timesteps=False)
        assert int(model.policy.qa_head.n_updates) > 0


def test_in_pipelines_that_people_have(tmp_path: Path) -> None:
    """Stacked images, sub-processes, evaluation and checkpoints beside, early stopping, learning again, other environments."""
    questions = dict(questions=QUESTIONS)
    stacked = VecVetoAction(VecFrameStack(environment(DQN, "image"), 2, channels_order="first"), "low[k=4]", 0.5)
    make(DQN, "QACnnPolicy", stacked, {**network(DQN, "image", True), **questions}).learn(120, callback=QACallback())

    apart = SubprocVecEnv([lambda: Drift("vector", True)] * 2, start_method="fork")
    model = make(SAC, "QAMlpPolicy", VecAnswerQuestions(apart), {**network(SAC, "vector", True), **questions})
    model.learn(120, callback=QACallback())
    apart.close()

    for algorithm in (SAC, MaskablePPO):
        env, fresh = (VecVetoAction(VecMonitor(environment(algorithm)), "low[k=4]", 0.5) for _ in range(2))
        model = make(algorithm, qa_policy(algorithm), env, {**network(algorithm, "vector", True), **questions})
        beside = [
            EvalCallback(fresh, eval_freq=40, n_eval_episodes=2, verbose=0),
            CheckpointCallback(50, str(tmp_path / algorithm.__name__), save_replay_buffer=algorithm is SAC),
        ]
        model.learn(160, callback=[QACallback(), *beside])
    saved = sorted((tmp_path / "SAC").glob("*replay_buffer*.pkl"))[-1]
    model = taught(SAC)
    model.load_replay_buffer(saved)
    model.learn(60, callback=QACallback())
    assert int(model.policy.qa_head.n_updates) > 0

    model = taught(PPO, target_kl=1e-4)
    model.learn(100, callback=QACallback())
    model.set_env(environment(PPO))
    model.learn(60, callback=QACallback(), reset_num_timesteps=False)
