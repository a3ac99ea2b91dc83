"""Actor and critics of SAC and its like: both are read, both are shaped, and target networks carry a target head."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common import utils
from stable_baselines3.common.utils import set_random_seed
from test_algorithms import CONTINUOUS, alias, environment, make, network, taught

from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.joint import question_losses
from sb3_qa.taps import readout
from sb3_qa.truth import eventually, now

WITH_TARGETS = [DQN, QRDQN, SAC, TD3, DDPG, TQC]


class AtTheEnd(QACallback):
    """Does something while labels are still being handed out."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def _on_training_end(self) -> None:
        self.what(self.model, self._recorder)
        super()._on_training_end()


@contextmanager
def entering_critics(policy: Any) -> Iterator[list[torch.Tensor]]:
    """What enters the last layers of the critics, in order."""
    seen: list[torch.Tensor] = []
    layers = [readout(policy, name) for name in policy.qa_critics.names]
    hooks = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in layers]
    yield seen
    for hook in hooks:
        hook.remove()


def gradients_of_one_update(model: Any, coef: float) -> dict[str, torch.Tensor]:
    """What the optimisers of actor and critic are given, of one minibatch at learning rate 0."""
    policy = model.policy
    taken: dict[str, torch.Tensor] = {}
    names = {id(parameter): name for name, parameter in policy.named_parameters()}

    def take(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    taken[names[id(parameter)]] = parameter.grad.clone()
                    parameter.grad = None

    hooks = [network.optimizer.register_step_pre_hook(take) for network in (policy.actor, policy.critic)]
    policy.qa_joint.coef = coef
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    set_random_seed(5)
    model._n_updates = 5  # an actor's step that is delayed falls due with the sixth
    model.train(1, 16)
    policy.load_state_dict(before)
    for hook in hooks:
        hook.remove()
    return taken


def added_gradients(model: Any, recorder: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What joint training adds to the gradients, and the gradients of the question loss as autograd has them."""
    policy, head, joint = model.policy, model.policy.qa_head, model.policy.qa_joint
    model.lr_schedule, model.tau = (lambda _: 0.0), 0.0
    passes: list[Any] = []
    rows: list[Any] = []
    hook = policy.critic.register_forward_pre_hook(
        lambda module, args: passes.append(args) if torch.is_grad_enabled() else None
    )
    batch = joint.store.batch
    joint.store.batch = lambda given: rows.append(given) or batch(given)
    on = gradients_of_one_update(model, 0.5)
    hook.remove()
    off = gradients_of_one_update(model, 0.0)
    added = {name: gradient - off[name] if name in off else gradient for name, gradient in on.items()}

    observations, actions = passes[0]  # the critics' pass on what the buffer holds comes first
    y, weight, features = (torch.as_tensor(x) for x in batch(rows[0]))
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    leaf = policy.qa_taps.tensors(policy, joint.observations)[0].detach().requires_grad_()
    if hasattr(policy.actor, "set_bn_training_mode"):
        policy.actor.set_bn_training_mode(True)
        policy.critic.set_bn_training_mode(True)
    actor = policy.qa_taps.tensors(policy, joint.observations)[0]
    with entering_critics(policy) as seen:
        policy.critic(observations, actions)
    logits = head(leaf, torch.cat([features, *(latent[:16] for latent in seen)], dim=1))
    loss = 0.5 * question_losses(head, logits, y, weight).mean()
    named = {n: p for n, p in policy.named_parameters() if n.startswith(("actor.", "critic.")) or p is head.flat}
    found = torch.autograd.grad(loss, [leaf, *named.values()], allow_unused=True, retain_graph=True)
    reached = torch.autograd.grad(actor, list(named.values()), found[0], allow_unused=True)
    expected = {}
    for name, own, through_actor in zip(named, found[1:], reached, strict=True):
        parts = [part for part in (own, through_actor) if part is not None]
        expected[name] = sum(parts) if parts else torch.zeros_like(named[name])
    policy.load_state_dict(state)
    return added, expected


@pytest.mark.parametrize("algorithm", CONTINUOUS)
def test_actor_and_critics_get_the_gradient_of_one_and_the_same_loss(algorithm: type) -> None:
    results: list[Any] = []
    model = taught(algorithm, net=dict(net_arch=[8]))
    model.learn(160, callback=AtTheEnd(lambda *given: results.append(added_gradients(*given))))
    added, expected = results[0]
    assert any(name.startswith("actor.") for name in added) and any(name.startswith("critic.qf0") for name in added)
    for name, gradient in added.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    largest = {
        part: max(g.abs().max() for n, g in added.items() if n.startswith(part)) for part in ("actor.", "critic.qf0.")
    }
    assert all(value > 1e-4 for value in largest.values()), largest


@pytest.mark.parametrize("algorithm, delay", [(TD3, 2), (CrossQ, 3)])
def test_the_head_learns_from_minibatches_that_the_actor_is_spared(algorithm: type, delay: int) -> None:
    model = taught(algorithm, policy_delay=delay)
    passes: list[bool] = []
    model.policy.actor.optimizer.register_step_post_hook(
        lambda *_: passes.append(model.policy.qa_joint.owed is not None)
    )
    model.learn(160, callback=QACallback())
    updates = int(model.policy.qa_head.n_updates)
    assert updates == model._n_updates and 0 < len(passes) <= updates / delay + 1
    assert not any(passes), "what the actor was owed has been paid before its step"


@pytest.mark.parametrize("seen", ["vector", "image", "dict"])
@pytest.mark.parametrize("algorithm", CONTINUOUS)
def test_critics_are_read_at_the_action_as_torch_computes_them(algorithm: Any, seen: str) -> None:
    if alias(algorithm, seen) not in algorithm.policy_aliases:
        pytest.skip("has no such policy")
    model = taught(algorithm, seen)
    policy, rng = model.policy, np.random.default_rng(0)
    obs = [environment(algorithm, seen).reset() for _ in range(3)]
    batch: Any = {k: np.concatenate([o[k] for o in obs]) for k in obs[0]} if seen == "dict" else np.concatenate(obs)
    candidates = rng.uniform(-2, 2, (6, 4, 1)).astype(np.float32)
    read = policy.qa_critics.read(policy, batch, candidates)
    assert read.shape == (6, 4, sum(policy.qa_head.critic_dims))
    tensors, _ = policy.obs_to_tensor(batch)
    policy.set_training_mode(False)
    for j in range(4):
        with torch.no_grad(), entering_critics(policy) as inputs:
            policy.critic(tensors, torch.as_tensor(candidates[:, j] / 2.0))  # the agent's actions are scaled to [-1, 1]
        np.testing.assert_allclose(read[:, j], torch.cat(inputs, dim=1).numpy(), atol=1e-5)
        alone = policy.qa_critics.read(policy, batch, candidates[:, j])
        np.testing.assert_allclose(alone, read[:, j], atol=1e-5)


def test_an_answer_about_an_action_changes_with_the_critic_and_one_about_a_state_does_not() -> None:
    model = taught(SAC)
    qa, obs, action = QuestionAnswerer.from_model(model), model.get_env().reset(), np.zeros((2, 1), np.float32)
    about_action, about_state = qa.ask("low[k=4]", obs, action).probability, qa.ask("is_low", obs).probability
    with torch.no_grad():
        model.policy.critic.qf1[0].weight += 1.0
    assert not np.allclose(qa.ask("low[k=4]", obs, action).probability, about_action)
    np.testing.assert_array_equal(qa.ask("is_low", obs).probability, about_state)


def test_the_actor_alone_is_read_where_no_question_is_about_actions_or_it_is_named(tmp_path: Path) -> None:
    low = Question("Is it low?", now("low"), name="is_low")
    without = make(SAC, "QAMlpPolicy", environment(SAC), {**network(SAC, "vector", True), "questions": [low]})
    named = taught(SAC, net={**network(SAC, "vector", True), "qa_readouts": ["actor.mu"]})
    for model in (without, named):
        policy = model.policy
        assert policy.qa_critics is None and policy.qa_head.critic_dims == []
        assert any(p is policy.qa_head.flat for g in policy.actor.optimizer.param_groups for p in g["params"])
        model.learn(160, callback=QACallback())
        assert int(policy.qa_head.n_updates) > 0
        qa, obs = QuestionAnswerer.from_model(model), model.get_env().reset()
        qa.save(tmp_path / "a.qa")
        frozen = QuestionAnswerer.load(tmp_path / "a.qa")
        assert frozen.policy.qa_critics is None
        np.testing.assert_array_equal(frozen.ask("is_low", obs).probability, qa.ask("is_low", obs).probability)


@pytest.mark.parametrize("algorithm", WITH_TARGETS)
@pytest.mark.parametrize("tau", [1.0, 0.03])
def test_polyak_update_is_exact_with_the_target_head_in_it(
    algorithm: type, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = dict(target_update_interval=4) if algorithm in (DQN, QRDQN) else {}
    model = taught(algorithm, tau=tau, **given)
    plain = make(algorithm, "MlpPolicy", environment(algorithm), network(algorithm, "vector", True))
    live, target = (getattr(model.policy, name) for name in model.policy.qa_target)
    heads: list[int] = []

    def checked(parameters: Any, targets: Any, share: float) -> None:
        pairs = list(zip(parameters, targets, strict=True))
        expected = [share * p.detach() + (1 - share) * t.detach() for p, t in pairs]
        utils.polyak_update([p for p, _ in pairs], [t for _, t in pairs], share)
        for (p, t), value in zip(pairs, expected, strict=True):
            torch.testing.assert_close(t, value, rtol=1e-6, atol=1e-7)
            if p is model.policy.qa_head.flat:
                assert t is target.qa_head.flat
                heads.append(1)

    trains = TD3 if algorithm is DDPG else algorithm
    monkeypatch.setattr(sys.modules[trains.__module__], "polyak_update", checked)
    first = target.qa_head.flat.detach().clone()
    model.learn(240, callback=QACallback())
    assert len(heads) > 3
    assert not torch.equal(target.qa_head.flat, first) and not target.qa_head.flat.requires_grad
    if tau == 1.0 and not given:
        assert all(torch.equal(a, b) for a, b in zip(live.parameters(), target.parameters(), strict=True))
    assert list(live.state_dict()) == list(target.state_dict())
    own = [name for name in live.state_dict() if not name.startswith("qa_head.")]
    assert own == list(getattr(plain.policy, model.policy.qa_target[0]).state_dict())


@pytest.mark.parametrize("seen", ["vector", "image"])
@pytest.mark.parametrize("algorithm", WITH_TARGETS)
def test_a_target_answerer_answers_by_target_networks_and_follows_them(algorithm: Any, seen: str) -> None:
    if alias(algorithm, seen) not in algorithm.policy_aliases:
        pytest.skip("has no such policy")
    model = taught(algorithm, seen, **(dict(target_update_interval=8) if algorithm in (DQN, QRDQN) else {}))
    model.learn(160, callback=QACallback())
    obs, policy = environment(algorithm, seen).reset(), model.policy
    action = np.zeros((2, 1), np.float32) if algorithm in CONTINUOUS else None
    slow, live = (QuestionAnswerer.from_model(model, target=target) for target in (True, False))

    def asked(qa: QuestionAnswerer) -> np.ndarray[Any, Any]:
        return np.concatenate(
            [np.ravel(qa.ask(key, obs, a).probability) for key, a in (("low[k=4]", action), ("is_low", None))]
        )

    before = asked(live)
    assert not np.allclose(asked(slow), before)
    live_net, target_net = (getattr(policy, name) for name in policy.qa_target)
    policy.qa_head.average.copy_(policy.qa_head.flat.detach())
    for name in ("q_net", "quantile_net", "actor", "critic"):
        if hasattr(policy, f"{name}_target"):
            getattr(policy, f"{name}_target").load_state_dict(getattr(policy, name).state_dict())
    utils.polyak_update(live_net.parameters(), target_net.parameters(), 1.0)  # the head's too
    np.testing.assert_allclose(asked(slow), asked(live), atol=1e-5)  # the same weights give the same answers
    utils.polyak_update([torch.zeros_like(p) for p in live_net.parameters()], target_net.parameters(), 0.5)
    assert not np.allclose(asked(slow), asked(live), atol=1e-3)


def test_a_target_answerer_whose_rows_are_made_of_words_follows_too() -> None:
    question = Question("Will it be low within {k} steps?", eventually("low", within="k"), k=[1, 4], name="low")
    policy_kwargs = dict(questions=[question], qa_encoder="text", net_arch=[8])
    model = make(DQN, "QAMlpPolicy", environment(DQN), policy_kwargs, target_update_interval=10**6)
    model.learn(160, callback=QACallback())
    obs, policy = environment(DQN).reset(), model.policy
    slow, live = (QuestionAnswerer.from_model(model, target=target) for target in (True, False))
    policy.qa_head.average.copy_(policy.qa_head.flat.detach())
    assert not np.allclose(slow.ask("low[k=4]", obs).probability, live.ask("low[k=4]", obs).probability, atol=1e-4)
    utils.polyak_update(policy.q_net.parameters(), policy.q_net_target.parameters(), 1.0)
    for key in ("low[k=1]", "low[k=4]"):
        np.testing.assert_allclose(slow.ask(key, obs).probability, live.ask(key, obs).probability, atol=1e-5)


@pytest.mark.parametrize("algorithm", [CrossQ, PPO])
def test_no_target_answerer_without_target_networks(algorithm: type) -> None:
    model = taught(algorithm, batch_size=16)
    assert model.policy.qa_target is None
    with pytest.raises(QAError, match="target networks"):
        QuestionAnswerer.from_model(model, target=True)


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_the_target_head_is_not_saved_with_a_frozen_answerer(algorithm: type, tmp_path: Path) -> None:
    model = taught(algorithm)
    model.learn(160, callback=QACallback())
    qa, obs = QuestionAnswerer.from_model(model), model.get_env().reset()
    qa.save(tmp_path / "a.qa")
    saved = safetensors.torch.load_file(tmp_path / "a.qa")
    assert sorted(name for name in saved if "qa_head" in name) == [
        "qa_head.average",
        "qa_head.flat",
        "qa_head.n_updates",
    ]
    frozen = QuestionAnswerer.load(tmp_path / "a.qa")
    np.testing.assert_array_equal(frozen.ask("is_low", obs).probability, qa.ask("is_low", obs).probability)
