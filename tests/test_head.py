"""The head by itself: its closed-form gradient, the average that answers, and networks that are read by numpy."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from gymnasium import spaces
from noise import QUESTIONS, make_env
from stable_baselines3 import PPO
from torch import nn
from wrapping import QUESTIONS as TOY_QUESTIONS
from wrapping import toys

from sb3_qa import Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback, replay, rollout
from sb3_qa.closed_form import ClosedForm
from sb3_qa.head import LONG_AVERAGE, QAHead, decode
from sb3_qa.joint import attach, question_losses
from sb3_qa.policies import qa_policy
from sb3_qa.questions import Catalogue
from sb3_qa.truth import eventually


def make_model(**policy_kwargs: Any) -> Any:
    arguments = dict(n_steps=24, batch_size=24, n_epochs=2, seed=3)
    return PPO(qa_policy(PPO), make_env(), policy_kwargs=dict(questions=QUESTIONS, **policy_kwargs), **arguments)


def fill(head: QAHead, value: float) -> None:
    with torch.no_grad():
        head.flat.fill_(value)


class TestGradients:
    @pytest.mark.parametrize("net_arch", [[], [6], [7, 6]], ids=str)
    @pytest.mark.parametrize("questions", ["both", "states", "actions"])
    def test_by_numpy_by_torch_and_by_autograd(self, net_arch: list[int], questions: str) -> None:
        """The same lines run with torch where the agent is not on the CPU."""
        kept = [q for q in QUESTIONS if questions == "both" or ("{action}" in q.text) == (questions == "actions")]
        if not net_arch:
            kept = [q for q in QUESTIONS if "{action}" not in q.text]
        space = make_env().action_space
        head = QAHead(Catalogue(kept), 5, space, net_arch)
        rng = np.random.default_rng(0)
        latents = [torch.as_tensor(rng.normal(size=(9, n)), dtype=torch.float32) for n in (2, 3)]
        features = None if head.action_features is None else head.action_features(rng.integers(0, space.n, 9))
        y = rng.random((9, head.n_logits)).astype(np.float32)
        weight = rng.random((9, head.n_logits)).astype(np.float32)
        for (
            start,
            stop,
            width,
        ) in head.blocks:  # a distribution over the options of a choice, known or not known as a whole
            if width > 1:
                parts = y[:, start:stop].reshape(9, -1, width)
                parts /= parts.sum(-1, keepdims=True)
                weight[:, start:stop] = np.repeat(weight[:, start:stop:width], width, axis=1)

        d_latents, d_flat = head.gradients(latents, features, y, weight)

        about = None if features is None else torch.as_tensor(features)
        arrays = (torch.as_tensor(y), torch.as_tensor(weight))
        by_torch, d_flat_by_torch = head._gradients(torch, head.weights(head.flat.detach()), latents, about, *arrays)
        whole = torch.cat(latents, dim=1).requires_grad_()
        (question_losses(head, head(whole, about), *arrays).sum() * 9).backward()
        for gradients, flat in ((d_latents, d_flat), (by_torch, d_flat_by_torch)):
            torch.testing.assert_close(torch.cat(list(gradients), dim=1), whole.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(flat, head.flat.grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("encoder", ["index", "text"])
    def test_large_batches_are_torchs_where_it_has_several_threads(
        self, encoder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Numpy's threads and torch's would wait for each other: learning with 256 units took four times as long."""
        learnt, ways = [], []
        original = ClosedForm.__init__

        def noting(form: ClosedForm, head: Any, weights: Any, xp: Any, *args: Any) -> None:
            ways.append(xp)
            original(form, head, weights, xp, *args)

        monkeypatch.setattr(ClosedForm, "__init__", noting)
        for threads, least in ((1, 0), (2, 2**60), (2, 0)):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            monkeypatch.setattr("sb3_qa.head.SHARED_OUT_FROM", least)
            model = make_model(qa_encoder=encoder)
            model.learn(72, callback=QACallback())
            learnt.append(
                torch.cat([p.detach().flatten() for p in (*model.policy.parameters(), model.policy.qa_head.flat)])
            )
            assert set(ways) == {torch if (threads, least) == (2, 0) else np}
            ways.clear()
        assert torch.equal(learnt[0], learnt[1])
        torch.testing.assert_close(learnt[2], learnt[0], rtol=1e-3, atol=1e-4)

    def test_what_it_returns_is_kept(self) -> None:
        """It works in arrays that are used again, for batches of the same size and of others."""
        space = make_env().action_space
        head = QAHead(Catalogue(QUESTIONS), 5, space, [6])
        rng = np.random.default_rng(0)

        def batch(n: int) -> Any:
            latents = [torch.as_tensor(rng.normal(size=(n, dim)), dtype=torch.float32) for dim in (2, 3)]
            y, weight = rng.random((2, n, head.n_logits)).astype(np.float32)
            return latents, head.action_features(rng.integers(0, space.n, n)), y, weight

        batches = [batch(n) for n in (9, 9, 4, 9)]
        results = [head.gradients(*each) for each in batches]
        for each, (d_latents, d_flat) in zip(batches, results, strict=True):
            alone = QAHead(Catalogue(QUESTIONS), 5, space, [6])
            expected, expected_flat = alone.gradients(*each)
            assert all(torch.equal(a, b) for a, b in zip(d_latents, expected, strict=True))
            assert torch.equal(d_flat, expected_flat)


class TestAverage:
    def test_shares_by_hand(self) -> None:
        head = make_model().policy.qa_head
        head.average.fill_(0.0)
        expected = 0.0
        for n in range(1, 4):
            fill(head, float(n))
            head.follow()
            expected += 10.0 / (10.0 + n) * (n - expected)
            torch.testing.assert_close(head.average, torch.full_like(head.average, expected))
        head.n_updates.fill_(1_000_000)
        fill(head, expected + LONG_AVERAGE)
        head.follow()
        torch.testing.assert_close(head.average, torch.full_like(head.average, expected + 1.0))

    def test_training_moves_it_and_answers_come_from_it(self) -> None:
        model = make_model().learn(72, callback=QACallback())
        head, obs = model.policy.qa_head, make_env().reset()
        assert int(head.n_updates) == 6
        assert not torch.equal(head.average, head.flat)
        answer = QuestionAnswerer.from_model(model).ask("bad[k=6]", obs).probability
        fill(head, 0.0)
        with torch.no_grad():
            head.flat.copy_(head.average)
        np.testing.assert_array_equal(QuestionAnswerer.from_model(model).ask("bad[k=6]", obs).probability, answer)

    def test_the_average_that_foretells_better_answers(self) -> None:
        """Old weights do not fit the latents of an agent that has moved on."""
        model = make_model().learn(72, callback=QACallback())
        head, qa, obs = model.policy.qa_head, QuestionAnswerer.from_model(model), make_env().reset()
        head.n_updates.fill_(10_000)
        with torch.no_grad():
            head.flat.add_(0.5)
        head.follow()
        long, asked = head.average.clone(), qa.read(obs)
        nearness = lambda flat: float((flat - head.flat.detach()).square().mean())  # noqa: E731
        head.compare(nearness)  # the short one is nearer to what has been learnt
        assert not torch.equal(head.average, long) and nearness(head.average) < nearness(long)
        assert qa.read(obs) is not asked  # what was read by other weights is read again
        assert not np.array_equal(qa.read(obs).hidden, asked.hidden)
        short = head.average.clone()
        head.compare(lambda flat: -0.5 * nearness(flat))  # evidence half as strong for once
        assert torch.equal(head.average, short)
        head.compare(lambda flat: float("nan"))
        assert torch.equal(head.average, short)
        for _ in range(20):
            head.compare(lambda flat: -0.5 * nearness(flat))
        assert torch.equal(head.average, long)

    def test_averages_begin_anew_with_weights_written_by_hand(self) -> None:
        head = make_model().learn(72, callback=QACallback()).policy.qa_head
        fill(head, 0.25)
        assert head.hidden(np.ones((1, head.latent_dim), np.float32)).shape == (1, head.width)  # notices them
        head.compare(lambda flat: -float(flat.sum()))
        assert torch.equal(head.average, head.flat)

    @pytest.mark.parametrize("encoder", ["index", "text"])
    @pytest.mark.parametrize("name", ["PPO", "A2C", "RecurrentPPO", "DQN", "SAC"])
    def test_averages_are_compared_by_what_has_come_since(
        self, name: str, encoder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rollout, "EVIDENCE", 1)
        monkeypatch.setattr(replay, "MOST_SCORED", 8)
        losses: list[float] = []
        compare = QAHead.compare

        def watched(head: QAHead, loss: Any) -> None:
            losses.append(loss(head.average))
            learnt = head.flat.detach().clone()
            compare(head, loss)
            assert torch.equal(head.flat, learnt)

        monkeypatch.setattr(QAHead, "compare", watched)
        algorithm = getattr(sb3_contrib if name == "RecurrentPPO" else stable_baselines3, name)
        more: dict[str, Any] = {"n_steps": 8} if name in ("PPO", "A2C", "RecurrentPPO") else {"learning_starts": 8}
        more |= {"batch_size": 8} if name != "A2C" else {}
        space = spaces.Box(-1.0, 1.0, (2,), np.float32) if name == "SAC" else None
        policy_kwargs = dict(questions=TOY_QUESTIONS, qa_encoder=encoder)
        model = algorithm(
            qa_policy(algorithm), toys(1, action_space=space), policy_kwargs=policy_kwargs, seed=0, **more
        )
        model.learn(64, callback=QACallback())
        assert len(losses) >= 2 and np.isfinite(losses).all() and min(losses) > 0.0

    def test_weights_written_by_hand_answer_at_once(self) -> None:
        """So that a head which has become useless is noticed, whoever made it so."""
        model = make_model().learn(72, callback=QACallback())
        qa, obs = QuestionAnswerer.from_model(model), make_env().reset()
        assert np.isfinite(qa.ask("bad[k=6]", obs).probability).all()
        fill(model.policy.qa_head, float("nan"))
        assert np.isnan(qa.ask("bad[k=6]", obs).probability).all()

    def test_copies_and_loads_keep_it(self) -> None:
        model = make_model().learn(72, callback=QACallback())
        obs = make_env().reset()
        answer = QuestionAnswerer.from_model(model).ask("bad[k=6]", obs).probability
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        loaded = PPO.load(file)
        assert int(loaded.policy.qa_head.n_updates) == 6
        for policy in (loaded.policy, copy.deepcopy(loaded.policy)):
            np.testing.assert_array_equal(QuestionAnswerer(policy).ask("bad[k=6]", obs).probability, answer)

    def test_without_questions_to_learn_it_stays(self) -> None:
        head = make_model(qa_coef=0.0).learn(72, callback=QACallback()).policy.qa_head
        assert int(head.n_updates) == 0
        assert torch.equal(head.average, head.flat)


def test_a_small_probability_keeps_its_digits() -> None:
    catalogue = Catalogue([Question("Bad within {k} steps?", eventually("bad", within="k"), k=[3], name="bad")])
    logits = np.full((1, 3), np.log(1e-9), np.float32)
    assert decode(catalogue.find("bad[k=3]"), logits).probability == pytest.approx(3e-9, rel=1e-4)


class TestReadByNumpy:
    @pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Identity, nn.ELU])
    @pytest.mark.parametrize("net_arch", [[], [16, 8], dict(pi=[8], vf=[])], ids=str)
    def test_latents_are_those_of_torch(self, activation: type[nn.Module], net_arch: Any) -> None:
        policy = make_model(activation_fn=activation, net_arch=net_arch).policy
        obs = np.random.default_rng(0).normal(size=(7, *policy.observation_space.shape)).astype(np.float32)
        with torch.no_grad():
            expected = policy.mlp_extractor(policy.extract_features(torch.as_tensor(obs)))
            preferred = policy.get_distribution(torch.as_tensor(obs)).mode()
        latents = policy.qa_taps.read(policy, obs)
        for latent, by_torch in zip(latents, expected, strict=True):
            np.testing.assert_allclose(latent, by_torch.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(policy.qa_taps.preferred(policy, obs, latents), preferred.numpy())

    def test_follows_what_becomes_of_the_network(self) -> None:
        policy = make_model(net_arch=[8]).policy
        obs = np.ones((2, *policy.observation_space.shape), np.float32)

        def check() -> None:
            with torch.no_grad():
                expected = policy.mlp_extractor(policy.extract_features(torch.as_tensor(obs)))[0]
            np.testing.assert_allclose(policy.qa_taps.read(policy, obs)[0], expected.numpy(), rtol=1e-5, atol=1e-6)

        check()
        layer = policy.mlp_extractor.policy_net[0]
        layer.weight.data.mul_(-2.0)  # in place
        check()
        layer.weight.data = torch.ones_like(layer.weight)  # elsewhere
        check()
        policy.mlp_extractor.policy_net[0] = nn.Linear(layer.in_features, 8)
        check()
        policy.mlp_extractor.policy_net[1].register_forward_hook(lambda module, args, output: output + 1.0)
        check()
        policy.mlp_extractor.policy_net[1] = nn.ELU()
        check()


class TestAttach:
    def test_adds_on_the_way_of_the_pass(self) -> None:
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        head = nn.Parameter(torch.zeros(3))
        latent = 3.0 * x
        output = attach(latent.sum() * 2.0, [(latent, torch.tensor([10.0, 20.0]))], head, torch.ones(3))
        assert output.item() == 18.0
        assert head.grad is None
        output.backward(retain_graph=True)
        assert x.grad.tolist() == [36.0, 66.0]  # 3 * (2 + 10) and 3 * (2 + 20)
        assert head.grad.tolist() == [1.0] * 3
        output.backward()  # gradients of several passes add up
        assert x.grad.tolist() == [72.0, 132.0]
        assert head.grad.tolist() == [2.0] * 3

    def test_the_head_of_a_frozen_agent_learns(self) -> None:
        head = nn.Parameter(torch.zeros(3))
        (attach(torch.ones(4), [], head, torch.ones(3)) * 5.0).sum().backward()
        assert head.grad.tolist() == [1.0] * 3
