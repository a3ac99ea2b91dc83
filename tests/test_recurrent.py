"""Agents with an LSTM: their answers go on from what they remember, everywhere as the agent itself does."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from noise import ACTIONS, QUESTIONS, SPACES, make_env
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from test_joint import captured
from wrapping import KEYS, Toy, assert_same, run_single, run_vec
from wrapping import QUESTIONS as TOY_QUESTIONS

from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.callbacks.rollout import Rollout
from sb3_qa.evaluation import AnswerRecord, run_episodes
from sb3_qa.head import survival
from sb3_qa.joint import question_losses
from sb3_qa.memory import Memory
from sb3_qa.policies import qa_policy
from sb3_qa.truth import eventually
from sb3_qa.wrappers import (
    AnswerQuestions,
    ShapeReward,
    VecAnswerQuestions,
    VecShapeReward,
    VecVetoAction,
    VetoAction,
)

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # a short last one is meant

BASES = {"vector": "MlpPolicy", "image": "CnnPolicy", "dict": "MultiInputPolicy"}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": dict(shared_lstm=True, enable_critic_lstm=False),
    "none for the critic": dict(enable_critic_lstm=False),
    "direct": dict(net_arch=[]),
    "shared, direct": dict(net_arch=[], shared_lstm=True, enable_critic_lstm=False),
    "two layers": dict(n_lstm_layers=2, share_features_extractor=False, lstm_kwargs=dict(bias=False)),
}


def make_model(env: Any = None, policy: Any = None, qa: bool = True, **kwargs: Any) -> Any:
    policy_kwargs = dict(lstm_hidden_size=12, net_arch=[8]) | kwargs.pop("policy_kwargs", {})
    if qa:
        policy_kwargs = dict(questions=QUESTIONS) | policy_kwargs
    policy = policy or (qa_policy(RecurrentPPO) if qa else "MlpLstmPolicy")
    settings = dict(n_steps=24, batch_size=20, n_epochs=2, seed=3, device="cpu") | kwargs
    return RecurrentPPO(policy, make_env() if env is None else env, policy_kwargs=policy_kwargs, **settings)  # type: ignore[arg-type]


def lively(model: Any) -> Any:
    """A model whose untrained answers and preferences differ from state to state, and from one memory to another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if name == "qa_head.flat" or name.startswith(("lstm", "action_net.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.policy.qa_head.average.copy_(model.policy.qa_head.flat)
    return model


def own_pass(policy: Any, obs: Any, states: Any, starts: Any) -> tuple[list[np.ndarray], Any]:
    """What enters the readouts in the policy's own pass, and the states it leaves."""
    seen: dict[str, np.ndarray] = {}
    handles = [
        getattr(policy, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].numpy()}))
        for name in ("action_net", "value_net")
    ]
    with torch.no_grad():
        tensors = policy.obs_to_tensor(obs)[0]
        states = policy.forward(tensors, states, torch.as_tensor(np.asarray(starts, np.float32)))[-1]
    for handle in handles:
        handle.remove()
    return [seen["action_net"], seen["value_net"]], states


def agent_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.policy.state_dict().items() if not name.startswith("qa_head.")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn_answer_and_leave_the_agent_alone_when_off(variant: str, tmp_path: Path) -> None:
    arguments = VARIANTS[variant]
    plain = make_model(qa=False, policy_kwargs=arguments).learn(144)
    for off in (dict(qa_coef=0.0), dict(qa_trunk_gradient=0.0)):
        joint = make_model(policy_kwargs={**arguments, **off})
        joint.set_env(VecAnswerQuestions(joint.get_env()))
        joint.learn(144, callback=QACallback())
        state = agent_state(joint)
        assert all(torch.equal(value, state[name]) for name, value in agent_state(plain).items())

    model = make_model(policy_kwargs=arguments)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(144, callback=QACallback())
    changed = {name for name, value in model.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before)
    live = QuestionAnswerer.from_model(model)
    live.save(tmp_path / "a.qa")
    frozen = QuestionAnswerer.load(tmp_path / "a.qa")
    states = model._last_lstm_states
    asked = [
        qa.ask("bad[k=6]", model._last_obs, state=states, episode_start=model._last_episode_starts).probability
        for qa in (live, frozen)
    ]
    assert asked[0].shape == (3, 3)
    np.testing.assert_array_equal(*asked)


@pytest.mark.parametrize("observation", SPACES)
@pytest.mark.parametrize(
    "action", ["discrete", "multi_discrete", "box"]
)  # RecurrentPPO fails on gymnasium's bits itself
def test_spaces(observation: str, action: str, tmp_path: Path) -> None:
    base = qa_policy(RecurrentPPO, BASES[observation])
    model = make_model(make_env(observation, action), base, n_steps=8, n_epochs=1)
    model.learn(24, callback=QACallback())
    live = QuestionAnswerer.from_model(model)
    live.save(tmp_path / "a.qa")
    frozen = QuestionAnswerer.load(tmp_path / "a.qa")
    obs = make_env(observation, action).reset()
    actions = np.stack([ACTIONS[action].sample() for _ in range(3)])
    state = live.remember(obs, episode_start=True)
    told = [qa.ask("bad[k=6]", obs, actions, state=state).probability for qa in (live, frozen)]
    assert told[0].shape == (3,)
    np.testing.assert_array_equal(*told)
    np.testing.assert_array_equal(frozen.remember(obs, state)[1][1], live.remember(obs, state)[1][1])


def test_shared_readouts_count_once() -> None:
    width = {name: make_model(policy_kwargs=VARIANTS[name]).policy.qa_taps.latent_dim for name in VARIANTS}
    assert width["default"] == width["shared"] == 16
    assert width["direct"] == 24
    assert width["shared, direct"] == 12  # the critic reads the actor's, detached


class Compare(BaseCallback):
    """At every step, what a wrapper remembers and reads against what the agent itself has just computed."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.seen: list[np.ndarray] = []
        self.n_steps = self.n_ended = 0

    def _on_training_start(self) -> None:
        def note(module: Any, args: Any) -> None:
            if not torch.is_grad_enabled() and self.watching:
                self.seen.append(args[0].numpy().copy())

        self.watching = False
        forward = self.model.policy.forward

        def watched(*args: Any, **kwargs: Any) -> Any:  # the agent samples, which readers do not
            self.watching = not kwargs.get("deterministic", False)
            try:
                return forward(*args, **kwargs)
            finally:
                self.watching = False

        self.model.policy.forward = watched
        self.handles = [
            getattr(self.model.policy, name).register_forward_pre_hook(note) for name in ("action_net", "value_net")
        ]

    def _on_step(self) -> bool:
        rule, local = self.wrapper.rule, self.locals
        states = [part.numpy() for pair in local["lstm_states"] for part in pair]
        for mine, theirs in zip(rule.memory.state, states, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(rule.memory.starts, local["dones"])
        acted, self.seen = self.seen, []
        # Where the agent acted, read again: the state before is still the model's.
        memory = Memory.given(
            self.model.policy, 3, self.model._last_lstm_states, np.asarray(self.model._last_episode_starts)
        )
        latents, _ = self.model.policy.qa_taps.recall(self.model.policy, self.model._last_obs, memory)
        for mine, theirs in zip(latents, reversed(acted), strict=True):  # the agent values before it acts
            np.testing.assert_array_equal(mine, theirs)
        self.n_steps += 1
        self.n_ended += int(local["dones"].sum())
        return True

    def _on_training_end(self) -> None:
        del self.model.policy.forward
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("wrapper", ["answer", "veto", "shape"])
def test_wrappers_remember_exactly_what_the_agent_does(wrapper: str) -> None:
    """Across the ends of episodes, gradient updates, and a second call of learn()."""
    env = make_env()
    wrapped: Any = {
        "answer": lambda: VecAnswerQuestions(env),
        "veto": lambda: VecVetoAction(env, "bad[k=6]", 0.5, on_veto="policy"),
        "shape": lambda: VecShapeReward(env, {"level": 0.1}, mode="potential"),
    }[wrapper]()
    model = make_model(wrapped)
    for again in (False, True):
        compare = Compare(wrapped)
        model.learn(150, callback=[QACallback(), compare], reset_num_timesteps=not again)
        assert compare.n_steps >= 50 and compare.n_ended >= 8


def by_hand(qa: QuestionAnswerer, key: str, latents: list[np.ndarray], action: Any = None) -> np.ndarray:
    """The probability of a yes/no instance from latents, by the head's plain forward pass."""
    head = qa.policy.qa_head
    features = None if action is None else torch.as_tensor(head.action_features(np.asarray(action)))
    with torch.no_grad():
        logits = head(torch.cat([torch.as_tensor(x) for x in latents], dim=1), features).numpy()
    target, instance = qa.catalogue.target_of[key], qa.catalogue.instances[key]
    alive = survival(logits[:, target.start : target.start + (instance.horizon or 1)])[:, -1]
    return np.asarray(alive if instance.question.truth.operator == "always" else 1.0 - alive)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_told_in_an_ordinary_evaluation_loop(frozen: bool, tmp_path: Path) -> None:
    """Questions about actions are read before the action, about states after it, at an end in the true last state."""
    model = lively(make_model(make_env()))
    qa = QuestionAnswerer.from_model(model)
    if frozen:
        qa.save(tmp_path / "a.qa")
        qa = QuestionAnswerer.load(tmp_path / "a.qa")
    env = VecVetoAction(VecAnswerQuestions(make_env(), qa=qa), "bad[k=6]", 0.5, on_veto="policy", qa=qa)
    env.seed(5)
    policy = model.policy
    n_ended = n_vetoed = 0
    obs, state, starts = env.reset(), None, np.ones(3, np.bool_)
    zeros = torch.zeros(1, 3, 12)
    states: Any = RNNStates((zeros, zeros), (zeros, zeros))
    for _ in range(60):
        actions, state = model.predict(obs, state=state, episode_start=starts)
        here, after = own_pass(policy, obs, states, starts)
        preferred = policy.predict(obs, (states.pi[0].numpy(), states.pi[1].numpy()), starts, deterministic=True)[0]
        np.testing.assert_array_equal(env.rule.here.preferred(), preferred)
        np.testing.assert_array_equal(state[0], after.pi[0].numpy())
        risk = np.stack([by_hand(qa, "bad[k=6]", here, np.full(3, a)) for a in range(3)], axis=1)
        with torch.no_grad():
            log_probs = policy._get_action_dist_from_latent(torch.as_tensor(here[0])).distribution.logits.numpy()
        obs, _, dones, infos = env.step(actions)
        for i, info in enumerate(infos):
            np.testing.assert_allclose(info["qa/risk"], risk[i, actions[i]], atol=1e-5)
            executed = info["qa/executed_action"]
            if risk[i, actions[i]] >= 0.5:
                allowed = np.flatnonzero(risk[i] < 0.5)
                expected = allowed[np.argmax(log_probs[i, allowed])] if len(allowed) else np.argmin(risk[i])
                assert executed == expected
                n_vetoed += info["qa/vetoed"]
            np.testing.assert_allclose(info["qa/bad[k=6]"], risk[i, executed], atol=1e-5)
            arrived = info["terminal_observation"] if dones[i] else obs[i]
            before = RNNStates(*(tuple(part[:, i : i + 1].contiguous() for part in pair) for pair in after))
            there, _ = own_pass(policy, arrived[None], before, [False])
            for key in ("fine", "bad_now"):
                np.testing.assert_allclose(info[f"qa/{key}"], by_hand(qa, key, there)[0], atol=1e-5)
        n_ended += int(dones.sum())
        states, starts = after, dones
    assert n_ended >= 6 and n_vetoed >= 6


def test_futures_go_on_from_what_is_remembered_where_they_are_cut() -> None:
    """At time limits, where the rollout has them inside and at its very end, and at the end of the rollout."""
    env = DummyVecEnv([lambda length=length: Toy(length=length) for length in (4, 6, 9)])  # every second episode is cut
    model = lively(make_model(env, n_steps=24, policy_kwargs=dict(questions=TOY_QUESTIONS)))
    checked: list[str] = []
    continuations = Rollout._continuations

    def checking(self: Rollout, cuts: Any) -> Any:
        told = continuations(self, cuts)
        buffer, policy = self.model.rollout_buffer, self.model.policy
        n_steps = buffer.buffer_size
        targets = [target for target in self.catalogue.targets if target.kind == "event"]
        index = next(n for n, target in enumerate(targets) if target.question.name == "danger")
        kept = [buffer.hidden_states_pi, buffer.cell_states_pi, buffer.hidden_states_vf, buffer.cell_states_vf]
        for row, (step, env) in enumerate(zip(cuts.step.tolist(), cuts.env.tolist(), strict=True)):
            # The agent's own way: pass the observation it acted on again, from the state kept beside it.
            before = [torch.as_tensor(part[step][:, env : env + 1]) for part in kept]
            states = RNNStates((before[0], before[1]), (before[2], before[3]))
            _, after = own_pass(
                policy, buffer.observations[step, env][None], states, buffer.episode_starts[step, [env]]
            )
            last = self._last_obs.get((step, env))
            checked.append(f"{'limit' if last is not None else 'end'} {'last' if step == n_steps - 1 else 'inside'}")
            latents, _ = own_pass(policy, (self.model._last_obs[env] if last is None else last)[None], after, [False])
            head = policy.qa_head
            with torch.no_grad():
                features = torch.zeros(1, head.action_features.n_features)
                logits = head(torch.cat([torch.as_tensor(x) for x in latents], dim=1), features).numpy()
            target = targets[index]
            np.testing.assert_allclose(
                told[index][row], survival(logits[:, target.start : target.stop])[0], rtol=1e-3, atol=1e-5
            )
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "_continuations", checking)
        model.learn(72, callback=QACallback())
    assert set(checked) >= {"limit inside", "limit last", "end last"}


def test_scores_in_the_log_are_of_answers_given_with_what_was_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic says so: its values of the same states, from what the log reads, are those that it gave then."""
    model = lively(make_model())
    n_scored = 0

    def checking(
        logger: Any, catalogue: Any, store: Any, rows: Any, reading: Any, actions: Any, room: Any, *more: Any
    ) -> None:
        nonlocal n_scored
        with torch.no_grad():
            values = model.policy.value_net(torch.as_tensor(reading._latents[1])).numpy()[:, 0]
        env, step = np.divmod(rows, 24)
        np.testing.assert_allclose(values, model.rollout_buffer.values[step, env], atol=1e-5)
        n_scored += len(rows)

    monkeypatch.setattr("sb3_qa.callbacks.rollout.score_questions", checking)
    model.learn(144, callback=QACallback())
    assert n_scored == 144


@pytest.mark.parametrize("net", [{}, VARIANTS["shared, direct"]], ids=str)
def test_gradient_on_a_padded_batch_is_that_of_the_sum_of_the_losses(
    net: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(max_grad_norm=float("inf"), batch_size=50, policy_kwargs=dict(qa_coef=0.7, **net))
    (rows, batch), gradients = captured(model, monkeypatch)
    mask = batch.mask > 1e-8
    assert int(mask.sum()) == len(rows) == 50 < len(mask), "nothing was padded"

    policy = model.policy
    policy.optimizer.zero_grad()
    policy.qa_joint._pending = None
    actions = batch.actions.long().flatten()
    entering: dict[str, torch.Tensor] = {}
    handles = [
        getattr(policy, name).register_forward_pre_hook(lambda _, args, name=name: entering.update({name: args[0]}))
        for name in ("action_net", "value_net")
    ]
    values, log_prob, entropy = policy.evaluate_actions(
        batch.observations, actions, batch.lstm_states, batch.episode_starts
    )
    for handle in handles:
        handle.remove()
    advantages = (batch.advantages - batch.advantages[mask].mean()) / (batch.advantages[mask].std() + 1e-8)
    ratio = torch.exp(log_prob - batch.old_log_prob)
    loss = -torch.min(advantages * ratio, advantages * torch.clamp(ratio, 0.8, 1.2))[mask].mean()
    loss = loss + model.vf_coef * ((batch.returns - values.flatten()) ** 2)[mask].mean()
    loss = loss - model.ent_coef * entropy[mask].mean()
    store = policy.qa_joint.store
    y, weight = (torch.as_tensor(x) for x in store.dense(rows))
    names = ("action_net",) if net else ("action_net", "value_net")
    latents = torch.cat([entering[name] for name in names], dim=1)[mask]
    logits = policy.qa_head(latents, torch.as_tensor(store.features[rows]))
    (loss + 0.7 * question_losses(policy.qa_head, logits, y, weight).mean()).backward()
    added = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert gradients.keys() == added.keys()
    for name, gradient in added.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def toys(n: int = 1, continuous: bool = False) -> DummyVecEnv:
    space = spaces.Box(-1.0, 1.0, (2,), np.float32) if continuous else spaces.Discrete(3)
    return DummyVecEnv([lambda i=i: Toy(space, length=5 + i) for i in range(n)])


@pytest.fixture(scope="module", params=[False, True], ids=["discrete", "continuous"])
def toy_qa(request: pytest.FixtureRequest) -> QuestionAnswerer:
    model = make_model(toys(continuous=request.param), policy_kwargs=dict(questions=TOY_QUESTIONS))
    return QuestionAnswerer.from_model(lively(model))


def test_single_and_vectorised_twins_tell_the_same(toy_qa: QuestionAnswerer) -> None:
    space = toy_qa.policy.action_space
    space.seed(0)
    actions = np.stack([[space.sample() for _ in range(2)] for _ in range(40)])

    def vec(env: Any) -> Any:
        env = VecAnswerQuestions(env, qa=toy_qa)
        env = VecShapeReward(env, {"danger": -1.0, "speed": 0.1}, mode="potential", gamma=0.9, qa=toy_qa)
        env = VecShapeReward(env, {"crash[k=3]": -1.0}, qa=toy_qa)
        return VecVetoAction(env, "crash[k=3]", 0.5, on_veto="policy", qa=toy_qa)

    def single(env: Any) -> Any:
        env = AnswerQuestions(env, qa=toy_qa)
        env = ShapeReward(env, {"danger": -1.0, "speed": 0.1}, mode="potential", gamma=0.9, qa=toy_qa)
        env = ShapeReward(env, {"crash[k=3]": -1.0}, qa=toy_qa)
        return VetoAction(env, "crash[k=3]", 0.5, on_veto="policy", qa=toy_qa)

    continuous = isinstance(space, spaces.Box)
    for n in (1, 2) if not continuous else (1,):  # candidates are drawn in the order of environments
        venv = vec(toys(n, continuous))
        told = run_vec(venv, actions[:, :n])
        for i in range(n):
            env = toys(n, continuous).envs[i]
            wrapped = single(env)
            alone = run_single(wrapped, actions[:, i], seed=7 + i)
            assert_same(alone[: len(told[i])], told[i][: len(alone)])
    assert any(moment.info.get("qa/vetoed") for moments in told for moment in moments)


def test_an_order_of_wrappers_or_a_second_reader_feeds_nothing_twice(toy_qa: QuestionAnswerer) -> None:
    space = toy_qa.policy.action_space
    space.seed(0)
    actions = np.stack([[space.sample()] for _ in range(30)])
    alone = run_vec(VecAnswerQuestions(toys(1, isinstance(space, spaces.Box)), qa=toy_qa), actions)[0]
    both = VecAnswerQuestions(VecAnswerQuestions(toys(1, isinstance(space, spaces.Box)), qa=toy_qa), qa=toy_qa)
    other = VecAnswerQuestions(toys(1, isinstance(space, spaces.Box)), qa=toy_qa)
    other.reset()

    class Interrupted(VecAnswerQuestions):
        def step_wait(self) -> Any:
            other.step(actions[0])  # elsewhere, the same answerer is at work
            return super().step_wait()

    for env in (both, Interrupted(toys(1, isinstance(space, spaces.Box)), qa=toy_qa)):
        for left, right in zip(run_vec(env, actions)[0], alone, strict=True):
            for key in KEYS:
                assert left.info[f"qa/{key}"] == right.info[f"qa/{key}"]


def test_asking_with_a_state_and_without(caplog: pytest.LogCaptureFixture) -> None:
    model = lively(make_model())
    qa = QuestionAnswerer.from_model(model)
    env = make_env()
    env.seed(1)
    first = env.reset()
    second = env.step(np.zeros(3, int))[0]
    with caplog.at_level(logging.WARNING):
        at_start = qa.ask("level", first, episode_start=True).mean
        state = qa.remember(first)
        remembering = qa.ask("level", second, state=state).mean
        assert not caplog.records
        np.testing.assert_array_equal(qa.ask("level", first).mean, at_start)
        assert "state=" in caplog.records[0].getMessage()
        forgetful = qa.ask("level", second).mean
        assert len(caplog.records) == 1  # said once
    assert np.abs(forgetful - remembering).max() > 1e-3
    np.testing.assert_array_equal(qa.ask("level", second, state=state, episode_start=True).mean, forgetful)
    mixed = qa.ask("level", second, state=state, episode_start=[True, False, True]).mean
    np.testing.assert_allclose(mixed, np.where([True, False, True], forgetful, remembering), atol=1e-6)
    # As the policy itself: predict() leaves the actor's part of it.
    acted = model.predict(first, episode_start=np.ones(3))[1]
    np.testing.assert_array_equal(acted[0], state[0][0])
    np.testing.assert_array_equal(acted[1], state[0][1])
    # One observation, and its state.
    one = qa.ask("level", second[1], state=qa.remember(first[1])).mean
    assert one.shape == ()
    np.testing.assert_allclose(one, remembering[1], atol=1e-6)
    # What has been read is kept for the next who asks, but not for one who remembers something else.
    memories = [Memory.given(model.policy, 3, given, None) for given in (state, None)]
    for memory, expected in zip(memories, (remembering, forgetful), strict=True):
        reading = qa.read(second, memory)
        assert qa.read(second.copy(), copy.deepcopy(memory)) is reading
        target = qa.catalogue.target_of["level"]
        p = torch.softmax(torch.as_tensor(reading.state_logits()[:, target.start : target.stop]), dim=1).numpy()
        np.testing.assert_allclose(p @ np.linspace(0, 1, p.shape[1]), expected, atol=1e-5)
    with pytest.raises(QAError, match="actor's LSTM alone"):
        qa.ask("level", second, state=acted)
    with pytest.raises(QAError, match="for as many observations"):
        qa.ask("level", second[:2], state=state)
    with pytest.raises(QAError, match="one flag each"):
        qa.ask("level", second, episode_start=[True, False])
    with pytest.raises(QAError, match="LSTM"):
        qa.read(second)


@pytest.mark.parametrize("variant", ["shared", "none for the critic"])
def test_the_state_of_predict_is_enough_without_an_lstm_of_the_critics_own(variant: str) -> None:
    model = lively(make_model(policy_kwargs=VARIANTS[variant]))
    qa = QuestionAnswerer.from_model(model)
    env = make_env()
    env.seed(1)
    obs = env.reset()
    _, state = model.predict(obs)
    later = env.step(np.zeros(3, int))[0]
    np.testing.assert_array_equal(
        qa.ask("level", later, state=state).mean, qa.ask("level", later, state=qa.remember(obs)).mean
    )


def test_other_policies_pass_a_state_over() -> None:
    from stable_baselines3 import PPO

    model = PPO(qa_policy(PPO), make_env(), n_steps=8, batch_size=24, policy_kwargs=dict(questions=QUESTIONS))
    qa = QuestionAnswerer.from_model(model)
    obs = make_env().reset()
    assert qa.remember(obs) is None and not qa.recurrent
    np.testing.assert_array_equal(
        qa.ask("level", obs, state=None, episode_start=np.ones(3)).mean, qa.ask("level", obs).mean
    )


def test_frozen_answers_in_a_process_without_a_model(tmp_path: Path) -> None:
    qa = QuestionAnswerer.from_model(lively(make_model(policy_kwargs=VARIANTS["two layers"])))
    qa.save(tmp_path / "a.qa")
    observations = np.random.default_rng(0).normal(size=(4, 1, 5)).astype(np.float32)
    np.save(tmp_path / "obs.npy", observations)
    code = (
        "import sys, numpy as np; from sb3_qa import QuestionAnswerer; qa = QuestionAnswerer.load(sys.argv[1]); state = None\n"
        "for obs in np.load(sys.argv[2]):\n"
        "    print(repr(qa.ask('level', obs, state=state, episode_start=state is None).mean.item()))\n"
        "    state = qa.remember(obs, state)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.qa"), str(tmp_path / "obs.npy")]
    told = [float(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
    state, expected = None, []
    for obs in observations:
        expected.append(qa.ask("level", obs, state=state, episode_start=state is None).mean.item())
        state = qa.remember(obs, state)
    assert told == expected
    assert len(set(expected)) == 4


def test_bound_in_the_middle_of_an_episode_says_so(caplog: pytest.LogCaptureFixture) -> None:
    qa = QuestionAnswerer.from_model(lively(make_model(toys(), policy_kwargs=dict(questions=TOY_QUESTIONS))))
    for env in (VecAnswerQuestions(toys(), unbound="pass"), AnswerQuestions(toys().envs[0], unbound="pass")):
        caplog.clear()
        env.reset()
        env.bind(qa)
        assert not caplog.records  # before the first step all is known
        env.step(np.zeros(1, int) if isinstance(env, VecAnswerQuestions) else 0)
        env.bind(qa)
        assert not caplog.records
    for env in (VecAnswerQuestions(toys(), unbound="pass"), AnswerQuestions(toys().envs[0], unbound="pass")):
        caplog.clear()
        env.reset()
        env.step(np.zeros(1, int) if isinstance(env, VecAnswerQuestions) else 0)
        env.bind(qa)
        assert "middle of episodes" in caplog.records[0].getMessage()


def test_environments_that_are_reset_one_by_one(toy_qa: QuestionAnswerer) -> None:
    env = VecAnswerQuestions(toys(2, isinstance(toy_qa.policy.action_space, spaces.Box)), qa=toy_qa)
    obs, action = env.reset(), np.stack([toy_qa.policy.action_space.sample() for _ in range(2)])
    for _ in range(3):
        obs = env.step(action)[0]
    kept, rule = env.rule.memory, env.rule
    rule.started(obs, np.array([True, False]))
    told = rule.here.hidden
    np.testing.assert_array_equal(told[:1], toy_qa.read(obs, Memory(kept.state, np.array([True, False]))).hidden[:1])
    np.testing.assert_allclose(told[0], toy_qa.read(obs[:1], toy_qa.blank(obs[:1])).hidden[0], atol=1e-5)
    np.testing.assert_allclose(told[1], toy_qa.read(obs, kept).hidden[1], atol=1e-5)
    assert np.abs(told[1] - toy_qa.read(obs, toy_qa.blank(obs)).hidden[1]).max() > 1e-2
    rule.started(obs, np.array([True, True]))
    np.testing.assert_allclose(rule.here.hidden, toy_qa.read(obs, toy_qa.blank(obs)).hidden, atol=1e-5)


def test_records_of_whole_episodes_read_what_was_remembered() -> None:
    model = lively(make_model())
    qa = QuestionAnswerer.from_model(model)
    told: set[bytes] = set()

    class Watched(VecAnswerQuestions):
        def step_wait(self) -> Any:
            told.update(hidden.tobytes() for hidden in self.rule.here.hidden)
            return super().step_wait()

    record = AnswerRecord(qa)
    n_steps = 0
    for _ in range(2):  # a second run goes on with the same record, from the beginning of episodes
        n_steps += int(
            run_episodes(model, Watched(make_env(), qa=qa), 6, catastrophe="bad", record=record).lengths.sum()
        )
    read = [hidden.tobytes() for part in record._rows for hidden in part[2].hidden]
    assert len(read) == n_steps == len(set(read))
    assert set(read) <= told
    answers = {key: answer for key, answer, _ in record.answers()}
    assert answers.keys() == set(qa.questions)
    assert len(answers["bad_now"].probability) == n_steps


def test_in_pipelines_that_people_have(tmp_path: Path) -> None:
    """Normalised observations, evaluation beside, saving and loading with the answerer, and learning again."""
    env = VecVetoAction(VecNormalize(VecMonitor(make_env())), "bad[k=6]", 0.5)
    fresh = VecVetoAction(VecNormalize(VecMonitor(make_env()), training=False), "bad[k=6]", 0.5)
    model = make_model(env, "QAMlpLstmPolicy")
    model.learn(144, callback=[QACallback(), EvalCallback(fresh, eval_freq=20, n_eval_episodes=3, verbose=0)])
    model.save(tmp_path / "model.zip")
    loaded = RecurrentPPO.load(tmp_path / "model.zip", env=env)
    loaded.learn(72, callback=QACallback(), reset_num_timesteps=False)
    assert int(loaded.policy.qa_head.n_updates) > int(model.policy.qa_head.n_updates)


def test_names_of_policies() -> None:
    for base in ("Mlp", "Cnn", "MultiInput"):
        expected = RecurrentPPO.policy_aliases[f"QA{base}LstmPolicy"]
        assert qa_policy(RecurrentPPO, f"{base}LstmPolicy") is qa_policy(RecurrentPPO, f"{base}Policy") is expected
    with pytest.raises(QAError, match="MlpLstmPolicy"):
        qa_policy(RecurrentPPO, "Mlp")


def test_a_policy_of_the_users_own_is_read_through_its_own_pass() -> None:
    class Scaled(RecurrentActorCriticPolicy):
        def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
            return 3.0 * super().extract_features(obs, features_extractor)

    model = lively(make_model(policy=qa_policy(Scaled)))
    model.learn(72, callback=QACallback())
    obs = make_env().reset()
    memory = Memory.blank(model.policy, 3)
    zeros = torch.zeros(1, 3, 12)
    expected, _ = own_pass(model.policy, obs, RNNStates((zeros, zeros), (zeros, zeros)), np.ones(3))
    for mine, theirs in zip(model.policy.qa_taps.recall(model.policy, obs, memory)[0], expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Cued(gym.Env[Any, Any]):
    """A cue, seen in the first state alone, tells how dangerous every step of the episode will be."""

    HAZARD = (0.03, 0.3)
    TIME_LIMIT = 10

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.t = int(self.np_random.integers(2)), 0
        return self.seen(self.cue), {"hit": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        hit = bool(self.np_random.random() < self.HAZARD[self.cue])
        return self.seen(2), 0.0, hit, self.t >= self.TIME_LIMIT and not hit, {"hit": hit}

    @staticmethod
    def seen(n: int) -> Any:
        return np.eye(3, dtype=np.float32)[n]


HORIZONS = [1, 2, 5, 10]


def check_memory(steps: int, seed: int) -> tuple[float, float]:
    """Mean absolute error of the answers some steps after the cue, and that of the best answers without a memory."""
    torch.set_num_threads(1)
    question = Question("Will I be hit within {k} steps?", eventually("hit", within="k"), k=HORIZONS, name="hit")
    model = RecurrentPPO(
        "QAMlpLstmPolicy",
        DummyVecEnv([Cued for _ in range(16)]),
        n_steps=16,
        batch_size=128,
        learning_rate=1e-3,
        seed=seed,
        policy_kwargs=dict(questions=[question], lstm_hidden_size=16, net_arch=[]),
    ).learn(steps, callback=QACallback())
    qa = QuestionAnswerer.from_model(model)
    state, blank = qa.remember(np.eye(3, dtype=np.float32)[:2]), np.stack([Cued.seen(2)] * 2)
    hazard = np.array(Cued.HAZARD)
    known = 1.0 - (1.0 - hazard[:, None]) ** np.array(HORIZONS)
    errors, forgetful = [], []
    visited = np.stack([(1.0 - hazard) ** t for t in range(1, 8)])  # how often each is met, some steps after the cue
    best = (visited.sum(axis=0)[:, None] * known).sum(axis=0) / visited.sum()
    for _ in range(1, 8):
        told = np.stack([qa.ask(f"hit[k={k}]", blank, state=state).probability for k in HORIZONS], axis=1)
        errors.append(np.abs(told - known).mean())
        forgetful.append(np.abs(best - known).mean())
        state = qa.remember(blank, state)
    return float(np.mean(errors)), float(np.mean(forgetful))


def test_what_was_seen_some_steps_ago_counts() -> None:
    error, forgetful = check_memory(8_000, seed=0)
    print(f"mean absolute error {error:.4f}, {forgetful:.4f} without a memory")
    assert forgetful > 0.25
    assert error < 0.1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
def test_known_answers_that_need_a_memory(seed: int) -> None:
    error, forgetful = check_memory(40_000, seed)
    print(f"mean absolute error {error:.4f}, {forgetful:.4f} without a memory")
    assert error < 0.04
