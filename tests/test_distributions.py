"""Distributions of actions in fewer steps: the same numbers, gradients, random draws and refusals as SB3's own, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
    kl_divergence,
)

from sb3_qa import Question
from sb3_qa.policies import qa_policy
from sb3_qa.policies.distributions import lean
from sb3_qa.truth import now

N = 64
Make = Callable[[], Any]
KINDS: dict[str, tuple[Make, Callable[[], list[torch.Tensor]]]] = {
    "discrete": (lambda: CategoricalDistribution(5), lambda: [3 * torch.randn(N, 5)]),
    "multi-discrete": (lambda: MultiCategoricalDistribution([2, 3]), lambda: [3 * torch.randn(N, 5)]),
    "continuous": (lambda: DiagGaussianDistribution(3), lambda: [torch.randn(N, 3), torch.randn(3)]),
    "squashed": (lambda: SquashedDiagGaussianDistribution(3), lambda: [torch.randn(N, 3), torch.randn(N, 3)]),
}


@pytest.fixture(autouse=True)
def validating(request: pytest.FixtureRequest) -> Iterator[None]:
    """As torch does by default; some libraries switch it off for all."""
    of_torch: Any = torch.distributions.Distribution
    before = of_torch._validate_args
    of_torch.set_default_validate_args(getattr(request, "param", True))
    yield
    of_torch.set_default_validate_args(before)


def both(make: Make) -> tuple[Any, Any]:
    own, light = make(), make()
    lean(light)
    assert type(light) is not type(own) and isinstance(light, type(own))
    return own, light


def told(distribution: Any, parameters: list[torch.Tensor], whole: bool) -> list[torch.Tensor]:
    """All that algorithms ask for, of one pass, and the gradients of it."""
    torch.manual_seed(3)
    leaves = [parameter.clone().requires_grad_() for parameter in parameters]
    distribution.proba_distribution(*leaves)
    with torch.no_grad():
        drawn = distribution.get_actions()
        best = distribution.get_actions(deterministic=True)
    actions = drawn if whole or drawn.dtype.is_floating_point else drawn.float()
    log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
    loss = (log_prob * torch.linspace(-1, 1, N)).sum() + (0 if entropy is None else 0.3 * entropy.sum())
    loss.backward()
    after_draw = torch.rand(1)  # as much was drawn
    found = [drawn, best, log_prob.detach(), after_draw, *(leaf.grad for leaf in leaves)]
    return found if entropy is None else [*found, entropy.detach()]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers_gradients_and_draws(kind: str, whole: bool) -> None:
    make, parameters = KINDS[kind]
    own, light = both(make)
    for seed in range(20):
        torch.manual_seed(seed)
        given = parameters()
        pairs = zip(told(own, given, whole), told(light, given, whole), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_actions_drawn_with_a_gradient() -> None:
    own, light = both(KINDS["squashed"][0])
    mean, log_std = torch.randn(N, 3), torch.randn(N, 3)
    gradients = []
    for distribution in (own, light):
        torch.manual_seed(0)
        leaves = [mean.clone().requires_grad_(), log_std.clone().requires_grad_()]
        actions, log_prob = distribution.log_prob_from_params(*leaves)
        (actions.sum() + log_prob.sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_probabilities_read_without_gradients_have_one_where_it_is_wanted() -> None:
    _, light = both(KINDS["discrete"][0])
    logits = torch.randn(N, 5, requires_grad=True)
    light.proba_distribution(logits)
    with torch.no_grad():
        light.get_actions()
    light.entropy().sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_same_refusal_of_parameters_that_are_no_numbers(kind: str) -> None:
    make, parameters = KINDS[kind]
    given = parameters()
    given[0][7, 1] = torch.nan
    messages = []
    for distribution in both(make):
        with pytest.raises(ValueError, match="invalid values") as refused:
            distribution.proba_distribution(*given)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("validating", [False], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_refused_where_torch_is_told_to_refuse_nothing(kind: str) -> None:
    make, parameters = KINDS[kind]
    given = parameters()
    given[0][7, 1] = torch.nan
    told = [distribution.proba_distribution(*given).get_actions(deterministic=True) for distribution in both(make)]
    assert torch.equal(*(torch.nan_to_num(each.float()) for each in told))


def test_same_refusal_of_a_spread_of_zero() -> None:
    for distribution in both(KINDS["continuous"][0]):
        with pytest.raises(ValueError, match="scale"):
            distribution.proba_distribution(torch.zeros(N, 3), torch.tensor([0.0, -1000.0, 0.0]))


@pytest.mark.parametrize(("kind", "wrong"), [("discrete", 5), ("discrete", -1), ("discrete", 0.5)])
def test_same_refusal_of_actions_that_are_none(kind: str, wrong: float) -> None:
    make, parameters = KINDS[kind]
    given, messages = parameters(), []
    actions = torch.zeros(N, dtype=torch.float32 if isinstance(wrong, float) else torch.int64)
    actions[3] = wrong
    for distribution in both(make):
        distribution.proba_distribution(*given)
        with pytest.raises(ValueError, match="invalid values") as refused:
            distribution.log_prob(actions)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_same_refusal_of_continuous_actions_that_are_no_numbers() -> None:
    actions = torch.zeros(N, 3)
    actions[2, 0] = torch.nan
    for distribution in both(KINDS["continuous"][0]):
        distribution.proba_distribution(torch.zeros(N, 3), torch.zeros(3))
        with pytest.raises(ValueError, match="invalid values"):
            distribution.log_prob(actions)


def test_impossible_actions_are_as_impossible() -> None:
    logits = torch.randn(N, 5)
    logits[:, 2] = -torch.inf
    own, light = both(KINDS["discrete"][0])
    chosen = torch.ones(N, dtype=torch.int64)
    for a, b in zip(
        *([d.log_prob(chosen), d.entropy()] for d in (own, light) if d.proba_distribution(logits)), strict=True
    ):
        assert torch.equal(a, b) and a.isfinite().all()


def test_divergence_between_two() -> None:
    for make, parameters in (KINDS["discrete"], KINDS["continuous"], KINDS["multi-discrete"]):
        given, found = [parameters(), parameters()], []
        for light in (False, True):
            pair = [make(), make()]
            for distribution, each in zip(pair, given, strict=True):
                if light:
                    lean(distribution)
                distribution.proba_distribution(*each)
            found.append(kl_divergence(*pair))
        assert torch.equal(*found)


def test_other_distributions_are_left_as_they_are() -> None:
    others: list[Distribution] = [
        BernoulliDistribution(3),
        StateDependentNoiseDistribution(3),
        MaskableCategoricalDistribution(3),
    ]
    for other in others:
        kind = type(other)
        lean(other)
        assert type(other) is kind
    lean(None)


def test_policies_with_questions_have_them() -> None:
    question = [Question("Is it on?", now("on"), name="on")]
    for algorithm, env in ((PPO, "CartPole-v1"), (A2C, "Pendulum-v1"), (SAC, "Pendulum-v1")):
        model = algorithm(qa_policy(algorithm), env, policy_kwargs=dict(questions=question))  # type: ignore[type-var]
        plain: Any = algorithm("MlpPolicy", env)
        owners = [getattr(m.policy, "actor", m.policy) for m in (model, plain)]
        kinds = [type(owner.action_dist) for owner in owners]
        assert kinds[0] is not kinds[1] and issubclass(*kinds)
        for again in (copy.deepcopy(owners[0]), pickle.loads(pickle.dumps(owners[0].action_dist))):
            assert type(getattr(again, "action_dist", again)) is kinds[0]
