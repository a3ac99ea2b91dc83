"""Joint training: nothing changes without questions, one backward pass trains both, and the agent is not starved."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from noise import ACTIONS, POLICIES, QUESTIONS, SPACES, make_env
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_qa import QAError, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.joint import question_losses
from sb3_qa.policies import QAMlpPolicy, qa_policy
from sb3_qa.wrappers import VecAnswerQuestions, VecShapeReward, VecVetoAction

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # a short last one is meant


def make_model(
    algorithm: type = PPO, observation: str = "vector", action: str = "discrete", qa: bool = True, **kwargs: Any
) -> Any:
    policy_kwargs = kwargs.pop("policy_kwargs", {})
    policy: Any = POLICIES[observation]
    if qa:
        policy = qa_policy(algorithm, policy)
        policy_kwargs = dict(questions=QUESTIONS, **policy_kwargs)
    else:
        policy_kwargs = {key: value for key, value in policy_kwargs.items() if not key.startswith("qa_")}
    settings: dict[str, Any] = dict(n_steps=24, seed=3)
    if algorithm is PPO:
        settings.update(batch_size=20, n_epochs=2)  # 72 transitions: the last minibatch is a short one
    return algorithm(policy, make_env(observation, action), policy_kwargs=policy_kwargs, **{**settings, **kwargs})


def agent_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.policy.state_dict().items() if not name.startswith("qa_head.")}


def assert_same_agents(a: Any, b: Any) -> None:
    state_a, state_b = agent_state(a), agent_state(b)
    assert state_a.keys() == state_b.keys()
    for name in state_a:
        assert torch.equal(state_a[name], state_b[name]), name


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("off", [{"qa_coef": 0.0}, {"qa_trunk_gradient": 0.0}], ids=["coef=0", "trunk=0"])
def test_without_questions_weights_are_bit_equal_to_plain_sb3(
    algorithm: type, action: str, off: dict[str, float]
) -> None:
    plain = make_model(algorithm, action=action, qa=False).learn(150)
    joint = make_model(algorithm, action=action, policy_kwargs=off)
    joint.set_env(VecAnswerQuestions(joint.get_env()))
    head = joint.policy.qa_head.flat.clone()
    joint.learn(150, callback=QACallback())
    assert_same_agents(plain, joint)
    assert torch.equal(joint.policy.qa_head.flat, head) == ("qa_coef" in off)


@pytest.mark.parametrize("observation", ["image", "dict"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_bit_equal_for_images_and_dicts(observation: str, shared: bool) -> None:
    kwargs = dict(
        observation=observation, policy_kwargs=dict(share_features_extractor=shared, qa_coef=0.0), n_steps=8, n_epochs=1
    )
    plain = make_model(qa=False, **kwargs).learn(24)
    joint = make_model(**kwargs).learn(24, callback=QACallback())
    assert_same_agents(plain, joint)


class Passes:
    """Counts passes without gradients of as many observations as there are environments."""

    def __init__(self, model: Any) -> None:
        self.n = 0
        policy = model.policy
        shared = policy.share_features_extractor
        (policy.features_extractor if shared else policy.vf_features_extractor).register_forward_hook(self)

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.n += not torch.is_grad_enabled() and len(output) == 3


class Pushed(BaseCallback):
    """Moves the agent's weights in place in the midst of a rollout, and runs its policy on other observations."""

    def _on_step(self) -> bool:
        if self.n_calls % 5 == 0:
            with torch.no_grad():
                self.model.policy.action_net.weight.add_(0.1)
                obs = self.model.policy.obs_to_tensor(self.model._last_obs)[0]
                self.model.policy.forward({key: x[:1] for key, x in obs.items()} if isinstance(obs, dict) else obs[:1])
        return True


@pytest.mark.parametrize("observation", ["image", "dict"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("pushed", [False, True], ids=["", "pushed"])
def test_what_wrappers_have_read_is_not_computed_again(
    observation: str, shared: bool, inside: bool, pushed: bool
) -> None:
    """Whether the wrapper stands inside of that which transposes images, or outside."""
    kwargs = dict(
        observation=observation, policy_kwargs=dict(share_features_extractor=shared, qa_coef=0.0), n_steps=8, n_epochs=1
    )
    plain = make_model(qa=False, **kwargs)
    own = Passes(plain)
    plain.learn(72, callback=[Pushed()] if pushed else [])
    joint = make_model(**kwargs)
    joint.set_env(VecAnswerQuestions(make_env(observation) if inside else joint.get_env()))
    assert isinstance(joint.get_env(), VecTransposeImage) == inside
    joint.get_env().seed(3)
    ours = Passes(joint)
    joint.learn(72, callback=[*([Pushed()] if pushed else []), QACallback()])
    assert_same_agents(plain, joint)
    assert own.n == 3 * 9  # of each step, and of where a rollout ends
    # Read besides: first states, where rollouts are cut, and where the weights have changed in between.
    assert own.n <= ours.n <= own.n + 8 + (8 if pushed else 0) or (inside and observation == "dict")  # see is_of()
    assert joint.policy.qa_joint.ahead is None


@pytest.mark.parametrize("width", [16, 300])
def test_wide_layers_are_not_passed_twice(width: int) -> None:
    rollouts, layers = dict(n_steps=8, n_epochs=1), [width, width]
    plain = make_model(qa=False, policy_kwargs=dict(net_arch=layers), **rollouts).learn(72)
    joint = make_model(policy_kwargs=dict(net_arch=layers, qa_coef=0.0), **rollouts)
    joint.set_env(VecAnswerQuestions(joint.get_env()))
    joint.get_env().seed(3)
    joint.learn(72, callback=(ahead := Ahead()))
    assert_same_agents(plain, joint)
    assert ahead.seen == {width == 300}


class Ahead(QACallback):
    """Looks whether the agent's passes go on from what wrappers have read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bool] = set()

    def _on_step(self) -> bool:
        if self.n_calls > 1:
            answerer = self._policy.qa_joint.ahead
            reading = answerer and answerer.ahead_of(torch.as_tensor(self.locals["new_obs"]))
            self.seen.add(bool(reading and reading.ahead))
        return super()._on_step()


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_scores_in_the_log_are_of_what_wrappers_have_read(observation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(observation=observation, n_steps=8)
    model.set_env(VecAnswerQuestions(model.get_env()))
    scored: list[int] = []

    def checking(logger: Any, catalogue: Any, store: Any, rows: Any, reading: Any, actions: Any, *more: Any) -> None:
        env, step = np.divmod(rows, 8)
        obs = model.rollout_buffer.observations
        seen = {key: x[step, env] for key, x in obs.items()} if isinstance(obs, dict) else obs[step, env]
        anew = QuestionAnswerer.from_model(model).read(seen)
        np.testing.assert_allclose(reading.state_logits(), anew.state_logits(), atol=1e-4)
        np.testing.assert_allclose(reading.action_logits(actions), anew.action_logits(actions), atol=1e-4)
        scored.append(len(rows))

    monkeypatch.setattr("sb3_qa.callbacks.rollout.score_questions", checking)
    passes = Passes(model)
    model.learn(72, callback=QACallback())
    assert scored == [21] * 3  # all but the first step, which was read by the weights of the rollout before
    assert passes.n < 40


def test_what_was_read_counts_for_the_same_observations_and_weights_alone() -> None:
    model = make_model(observation="image").learn(72, callback=QACallback())
    policy, qa = model.policy, QuestionAnswerer.from_model(model)
    policy.qa_joint.ahead = qa
    obs = model.get_env().reset()
    tensor = torch.as_tensor(obs)
    assert qa.ahead_of(tensor) is None
    qa.read(obs)
    with torch.no_grad():
        known, computed = qa.ahead_of(tensor).ahead.latents, policy.qa_taps.tensors(policy, tensor)
    assert all(map(torch.equal, known, computed))
    assert qa.ahead_of(tensor[:2]) is None
    obs[0] += 1  # as an environment that writes over its own array
    assert qa.ahead_of(tensor) is None
    obs[0] -= 1
    assert qa.ahead_of(tensor) is not None
    assert qa.ahead_of(tensor.contiguous()) is None  # which lies in memory in another order, and sums may differ
    with torch.no_grad():
        policy.value_net.bias.add_(1.0)
    assert qa.ahead_of(tensor) is None


def test_bit_equal_for_gsde_normalised() -> None:
    plain = make_model(action="box", qa=False, use_sde=True)
    plain.set_env(VecNormalize(plain.get_env()))
    plain.learn(150)
    joint = make_model(action="box", use_sde=True, policy_kwargs=dict(qa_trunk_gradient=0.0))
    joint.set_env(VecAnswerQuestions(VecNormalize(joint.get_env())))
    assert_same_agents(plain, joint.learn(150, callback=QACallback()))


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("observation", SPACES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_learns_and_answers(algorithm: type, observation: str, shared: bool) -> None:
    model = make_model(algorithm, observation, policy_kwargs=dict(share_features_extractor=shared), n_steps=8)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(24, callback=QACallback())
    changed = {name for name, value in model.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before)
    qa = QuestionAnswerer.from_model(model)
    obs = model.get_env().reset()
    assert qa.ask("bad[k=6]", obs).probability.shape == (3, 3)
    assert qa.ask("bad[k=6]", obs, action=1).probability.shape == (3,)
    assert qa.ask("side", obs).probabilities.shape == (3, 3)


@pytest.mark.parametrize("action", ["multi_discrete", "multi_binary", "box"])
def test_learns_about_actions_that_cannot_be_listed(action: str) -> None:
    model = make_model(action=action).learn(72, callback=QACallback())
    qa = QuestionAnswerer.from_model(model)
    obs = model.get_env().reset()
    acts = np.stack([ACTIONS[action].sample() for _ in range(3)])
    assert qa.ask("bad[k=6]", obs, action=acts).probability.shape == (3,)
    with pytest.raises(QAError, match="cannot be listed"):
        qa.ask("bad[k=6]", obs)


class Captured(Exception):
    pass


def captured(model: Any, monkeypatch: pytest.MonkeyPatch, which: int = 0) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Run learn() up to the backward pass number ``which``; the minibatch's rows and parts, and the gradients."""
    seen: list[Any] = []
    backward = torch.Tensor.backward
    buffer = type(model.rollout_buffer)
    get_samples = buffer._get_samples

    def spying_samples(self: Any, batch_inds: Any, *args: Any) -> Any:
        samples = get_samples(self, batch_inds, *args)
        seen.append((batch_inds, samples))
        return samples

    def spying_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        if len(seen) > which:
            raise Captured

    monkeypatch.setattr(buffer, "_get_samples", spying_samples)
    monkeypatch.setattr(torch.Tensor, "backward", spying_backward)
    with pytest.raises(Captured):
        model.learn(72, callback=QACallback())
    monkeypatch.undo()
    gradients = {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}
    return seen[-1], gradients


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("net_arch", [[16], [16, 8]], ids=str)
def test_gradient_is_that_of_the_sum_of_the_losses(
    action: str, net_arch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(action=action, max_grad_norm=float("inf"), policy_kwargs=dict(qa_coef=0.7, qa_net_arch=net_arch))
    (rows, batch), gradients = captured(model, monkeypatch)
    policy = model.policy

    # The agent's own loss as PPO states it, and the questions' by the head's plain forward pass, added by hand.
    actions = batch.actions.long().flatten() if action == "discrete" else batch.actions
    policy.optimizer.zero_grad()
    policy.qa_joint._pending = None
    values, log_prob, entropy = policy.evaluate_actions(batch.observations, actions)
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    ratio = torch.exp(log_prob - batch.old_log_prob)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.min(advantages * ratio, advantages * clipped).mean()
    loss = (
        loss
        + model.vf_coef * torch.nn.functional.mse_loss(batch.returns, values.flatten())
        - model.ent_coef * entropy.mean()
    )
    store = policy.qa_joint.store
    y, weight = (torch.as_tensor(x) for x in store.dense(rows))
    features = policy.extract_features(batch.observations)
    latents = torch.cat(policy.mlp_extractor(features), dim=1)
    logits = policy.qa_head(latents, torch.as_tensor(store.features[rows]))
    (loss + 0.7 * question_losses(policy.qa_head, logits, y, weight).mean()).backward()

    by_hand = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert gradients.keys() == by_hand.keys()
    for name, gradient in by_hand.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_one_gradient_step_changes_trunk_and_head() -> None:
    """With nothing to learn but the questions (no value, policy or entropy loss), the trunk learns all the same."""
    model = make_model(A2C, vf_coef=0.0, gae_lambda=1.0, gamma=0.0)
    model.ent_coef = 0.0
    trunk = copy.deepcopy(model.policy.mlp_extractor.value_net.state_dict())  # its own loss has no weight
    head = model.policy.qa_head.flat.clone()
    model.learn(72, callback=QACallback())
    assert model._n_updates == 1
    assert not torch.equal(head, model.policy.qa_head.flat)
    assert any(
        not torch.equal(trunk[name], value) for name, value in model.policy.mlp_extractor.value_net.state_dict().items()
    )


def test_trunk_gradient_scales_what_the_trunk_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for share in (0.0, 0.25, 1.0):
        model = make_model(max_grad_norm=float("inf"), policy_kwargs=dict(qa_trunk_gradient=share))
        found[share] = captured(model, monkeypatch)[1]
    name = "mlp_extractor.policy_net.0.weight"
    sent = found[1.0][name] - found[0.0][name]
    torch.testing.assert_close(found[0.25][name] - found[0.0][name], 0.25 * sent, rtol=1e-3, atol=1e-7)
    assert sent.abs().max() > 1e-5
    torch.testing.assert_close(found[0.25]["qa_head.flat"], found[1.0]["qa_head.flat"])


@pytest.mark.parametrize("every", [1, 3])
def test_one_minibatch_in_so_many_teaches_the_questions(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each so many, counted through epochs and rollouts."""
    taught: list[bool] = []
    model = make_model(n_epochs=2, policy_kwargs=dict(qa_every=every))
    head, step = model.policy.qa_head, model.policy.optimizer.step

    def spying_step() -> None:
        before = head.flat.detach().clone()
        step()
        taught.append(not torch.equal(before, head.flat))

    monkeypatch.setattr(model.policy.optimizer, "step", spying_step)
    model.learn(144, callback=QACallback())
    assert len(taught) == 16  # four minibatches an epoch, the last a short one
    assert taught == [n % every == 0 for n in range(16)]
    assert head.n_updates.item() == sum(taught)


@pytest.mark.parametrize(
    ("algorithm", "given", "every"),
    [(PPO, {}, 3), (PPO, dict(n_epochs=4), 1), (PPO, dict(n_epochs=20), 6), (A2C, {}, 1)],
    ids=["ten epochs", "four", "twenty", "A2C"],
)
def test_each_transition_teaches_three_times_where_it_can(algorithm: type, given: dict[str, Any], every: int) -> None:
    settings = dict(n_steps=24, batch_size=24, **given) if algorithm is PPO else dict(n_steps=24)
    model: Any = algorithm(qa_policy(algorithm), make_env(), policy_kwargs=dict(questions=QUESTIONS), **settings)
    model.learn(72, callback=QACallback())
    steps = 3 * model.n_epochs if algorithm is PPO else 1
    assert model.policy.qa_head.n_updates.item() == -(-steps // every)


@pytest.mark.parametrize(
    ("rate", "every", "of_head"), [(1e-3, 1, 3e-3), (1e-3, 2, 6e-3), (1e-3, 8, 1e-2), (0.05, 1, 0.05)], ids=str
)
def test_the_head_learns_faster_than_the_agent(rate: float, every: int, of_head: float) -> None:
    model = make_model(learning_rate=lambda left: rate * (1.0 + left), policy_kwargs=dict(qa_every=every))
    model.learn(72, callback=QACallback())
    own, head = model.policy.optimizer.param_groups
    assert own["lr"] == rate
    assert head["lr"] == pytest.approx(of_head)
    model.policy.optimizer.step()  # it does not add up
    assert head["lr"] == pytest.approx(of_head)


def test_a_frozen_agent_is_taught_in_every_third_minibatch() -> None:
    model = make_model(n_epochs=10)
    for parameter in model.policy.parameters():
        parameter.requires_grad_(False)
    before, head = copy.deepcopy(agent_state(model)), model.policy.qa_head.flat.clone()
    model.learn(72, callback=QACallback())
    assert all(torch.equal(value, before[name]) for name, value in agent_state(model).items())
    assert not torch.equal(head, model.policy.qa_head.flat)
    assert model.policy.qa_head.n_updates.item() == 14
    assert not model.policy.predict_values(torch.zeros(1, 5)).requires_grad


def test_what_teaches_more_rarely_teaches_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    often, rarely = (captured(make_model(policy_kwargs=dict(qa_every=every)), monkeypatch)[1] for every in (1, 4))
    assert often.keys() == rarely.keys()
    assert all(torch.equal(often[name], rarely[name]) for name in often)


@pytest.mark.parametrize("coef", [0.5, 1e6])
def test_questions_cannot_starve_the_agent(coef: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the step that is the agent's own: at least about half of what plain SB3 would take, at every minibatch."""
    shares: list[float] = []
    limit = 0.5
    clip = torch.nn.utils.clip_grad_norm_
    model = make_model(max_grad_norm=limit, n_steps=96, n_epochs=3, policy_kwargs=dict(qa_coef=coef))
    twin = make_model(qa=False, max_grad_norm=limit)

    def spying_clip(parameters: Any, max_norm: float) -> torch.Tensor:
        parameters = list(parameters)
        assert all(p is not model.policy.qa_head.flat for p in parameters)
        # `action_net` is not shaped by questions, so its gradient is the agent's own: follow what is left of it.
        own = model.policy.action_net.weight.grad.norm().item()
        joint_norm = clip(parameters, max_norm)
        after = model.policy.action_net.weight.grad.norm().item()
        # Plain SB3 would scale by limit / |g|, and |g| is at least |joint| - limit, as the questions add no more than the limit.
        plain_scale = min(1.0, limit / max(joint_norm.item() - limit, 1e-12))
        shares.append(after / own / plain_scale)
        return joint_norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spying_clip)
    model.learn(288, callback=QACallback())
    assert len(shares) > 40
    assert min(shares) > 0.35, min(shares)
    assert twin.policy is not None


def test_clipped_share_is_exact_where_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first minibatch what the questions add to the agent's gradient has the norm max_grad_norm."""
    own = captured(make_model(max_grad_norm=0.5, policy_kwargs=dict(qa_trunk_gradient=0.0)), monkeypatch)[1]
    model = make_model(max_grad_norm=0.5, policy_kwargs=dict(qa_coef=1e4))
    both = captured(model, monkeypatch)[1]
    added = torch.cat([(both[name] - own[name]).flatten() for name in own if not name.startswith("qa_head.")])
    assert added.norm().item() == pytest.approx(0.5, rel=1e-2)


def test_no_shared_random_stream_is_used() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    env = make_env()
    PPO("MlpPolicy", env, n_steps=24)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    PPO(qa_policy(PPO), make_env(), n_steps=24, policy_kwargs=dict(questions=QUESTIONS))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_same_seed_same_result() -> None:
    a, b = (make_model(action="box").learn(150, callback=QACallback()) for _ in range(2))
    assert torch.equal(a.policy.qa_head.flat, b.policy.qa_head.flat)
    c = make_model(action="box", seed=4)
    assert not torch.equal(c.policy.qa_head.flat, make_model(action="box").policy.qa_head.flat)


def test_learning_without_callback_says_so_and_stops() -> None:
    model = make_model()
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(QAError, match=r"callback=QACallback\(\)"):
        model.learn(72)
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())


def test_callback_without_questions_says_so() -> None:
    with pytest.raises(QAError, match=r"qa_policy\(PPO\)"):
        make_model(qa=False).learn(72, callback=QACallback())


@pytest.mark.parametrize("algorithm", [PPO, DQN])
@pytest.mark.parametrize("listed", [False, True])
def test_a_callback_that_is_called_once_in_a_while_is_refused(algorithm: Any, listed: bool) -> None:
    model = make_model(algorithm)
    inner = CallbackList([QACallback()]) if listed else QACallback()
    with pytest.raises(QAError, match=r"inside EveryNTimesteps.*callback=\[QACallback\(\), EveryNTimesteps\(...\)\]"):
        model.learn(72, callback=EveryNTimesteps(16, inner))


def test_after_learning_the_buffer_is_itself_again() -> None:
    model = make_model()
    kind = type(model.rollout_buffer)
    model.learn(72, callback=QACallback())
    assert type(model.rollout_buffer) is kind
    with pytest.raises(QAError, match="QACallback"):
        model.learn(72)


def test_windows_longer_than_a_rollout_are_refused() -> None:
    with pytest.raises(QAError, match="n_steps"):
        make_model(A2C, n_steps=3).learn(9, callback=QACallback())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(questions=None), "questions"),
        (dict(questions=[]), "questions"),
        (dict(questions=QUESTIONS[0]), "list of Question"),
        (dict(qa_coef=-1.0), "qa_coef"),
        (dict(qa_coef="much"), "qa_coef"),
        (dict(action_names=["a", "b", "a"]), "action_names"),
        (dict(qa_trunk_gradient=2.0), "qa_trunk_gradient"),
        (dict(qa_net_arch=[]), "qa_net_arch"),
        (dict(qa_encoder="none"), "qa_encoder"),
        (dict(qa_sample=0), "qa_sample"),
        (dict(qa_every=0), "qa_every"),
        (dict(qa_every=1.5), "whole number"),
        (dict(qa_every=True), "qa_every"),
        (dict(action_names=["a"]), "action_names"),
    ],
)
def test_bad_policy_kwargs_are_refused(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(QAError, match=words):
        PPO(qa_policy(PPO), make_env(), policy_kwargs={"questions": QUESTIONS, **kwargs})


@pytest.mark.parametrize("what", [int, "PPO", None, DummyVecEnv])
def test_qa_policy_refuses_what_is_no_policy(what: Any) -> None:
    with pytest.raises(QAError, match="expected"):
        qa_policy(what)


def test_qa_policy_refuses_unknown_bases() -> None:
    with pytest.raises(QAError, match="MlpPolicy"):
        qa_policy(PPO, "LstmPolicy")


class Wide(ActorCriticPolicy):
    """A policy of a user's own, with passes of its own."""

    def forward(self, obs: torch.Tensor, deterministic: bool = False) -> Any:
        return super().forward(obs * 1.0, deterministic)


def test_policy_classes_are_cached_and_travel() -> None:
    made = qa_policy(PPO)
    assert made is qa_policy(PPO) is qa_policy(A2C) is qa_policy(ActorCriticPolicy) is QAMlpPolicy is qa_policy(made)
    assert pickle.loads(pickle.dumps(made)) is made
    wide = qa_policy(Wide)
    assert pickle.loads(pickle.dumps(wide)) is wide
    assert cloudpickle.loads(cloudpickle.dumps(wide)) is wide
    assert issubclass(wide, Wide)


def test_policy_of_ones_own_learns_as_the_stock_one() -> None:
    settings = dict(n_steps=24, batch_size=20, n_epochs=2, seed=3, policy_kwargs=dict(questions=QUESTIONS))
    own = PPO(qa_policy(Wide), make_env(), **settings).learn(72, callback=QACallback())
    stock = make_model().learn(72, callback=QACallback())
    assert not own.policy.qa_taps._direct
    assert stock.policy.qa_taps._direct
    # A stock policy is read by numpy, at the ends of rollouts too, one of a user's own through its own passes.
    torch.testing.assert_close(own.policy.qa_head.flat, stock.policy.qa_head.flat, rtol=1e-4, atol=1e-6)
    obs = make_env().reset()
    a, b = (QuestionAnswerer.from_model(model).ask("bad[k=6]", obs).probability for model in (own, stock))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_policies_can_be_copied_and_pickled() -> None:
    model = make_model().learn(72, callback=QACallback())
    obs = torch.zeros(2, 5)
    model.predict(obs.numpy())  # SB3's own distribution keeps tensors of the last training pass, which cannot be copied
    for twin in (copy.deepcopy(model.policy), cloudpickle.loads(cloudpickle.dumps(model.policy))):
        a, b = (QuestionAnswerer(policy).ask("level", obs.numpy()).mean for policy in (twin, model.policy))
        np.testing.assert_array_equal(a, b)
        with torch.no_grad():
            twin.qa_head.flat.zero_()
        assert model.policy.qa_head.flat.abs().sum() > 0


def test_parameters_are_the_agents_and_the_optimiser_has_all() -> None:
    model = make_model()
    plain = make_model(qa=False)
    ours, theirs = list(model.policy.parameters()), list(plain.policy.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    model.policy.value_net = torch.nn.Linear(3, 1)  # which one of them is later replaced by
    assert [p.shape for p in model.policy.parameters()][-2:] == [(1, 3), (1,)]
    model.policy.value_net = theirs_to_come = plain.policy.value_net
    assert list(model.policy.parameters())[-2] is theirs_to_come.weight
    model = make_model()
    assert "qa_head.flat" in dict(model.policy.named_parameters())
    optimised = [p for group in model.policy.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for _, p in model.policy.named_parameters()}


def test_two_readouts_of_one_tensor_count_once() -> None:
    model = PPO(qa_policy(PPO), make_env(), n_steps=24, policy_kwargs=dict(questions=QUESTIONS, net_arch=[]))
    assert model.policy.qa_taps.latent_dim == 5  # features, not twice
    model.learn(24, callback=QACallback())


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_saved_and_loaded_it_goes_on_as_if_never_stopped(algorithm: type) -> None:
    def go_on(model: Any) -> Any:
        model.set_env(make_env())
        model.set_random_seed(11)
        return model.learn(150, callback=QACallback(), reset_num_timesteps=False)

    model = make_model(algorithm).learn(150, callback=QACallback())
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = algorithm.load(file)
    assert [q.name for q in loaded.policy.qa_head.catalogue.questions] == [q.name for q in QUESTIONS]
    assert loaded.policy.optimizer.state_dict()["state"].keys() == model.policy.optimizer.state_dict()["state"].keys()
    go_on(model)
    go_on(loaded)
    assert_same_agents(model, loaded)
    assert torch.equal(model.policy.qa_head.flat, loaded.policy.qa_head.flat)


class KeepLogs(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.seen.update(self.logger.name_to_value)

    def _on_rollout_end(self) -> None:
        self.seen.update(self.logger.name_to_value)


def test_logs_scores_of_every_question() -> None:
    logs = KeepLogs()
    make_model(n_steps=96).learn(600, callback=[QACallback(), logs])
    for name in ("loss", "brier", "auroc", "accuracy", "base_rate"):
        assert np.isfinite(logs.seen[f"qa/bad/{name}"]), name
    for key in ("qa/level/error", "qa/sum/loss", "qa/side/accuracy", "qa/side/brier", "qa/until/error"):
        assert np.isfinite(logs.seen[key]), key
    assert max(len(key) for key in logs.seen) <= 36


def test_logs_reach_tensorboard_and_csv(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = make_model(n_steps=96)
    env = VecShapeReward(model.get_env(), {"bad[k=6]": -1.0})
    model.set_env(VecVetoAction(env, "bad[k=6]", threshold=0.5))
    model.set_logger(configure(str(tmp_path), ["tensorboard", "csv", "stdout"]))
    model.learn(600, callback=QACallback())
    model.logger.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"qa/bad/loss", "qa/bad/brier", "qa/level/error", "qa/catastrophe_rate", "qa/veto_rate", "qa/raw_return"}
    assert wanted | {"qa/shaped_return"} <= tags
    raw, shaped = (events.Scalars(f"qa/{kind}_return")[-1].value for kind in ("raw", "shaped"))
    assert shaped < raw  # the reward is shaped by minus a probability
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert wanted <= set(header)
