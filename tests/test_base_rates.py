"""A head begins with the base rates of the first labels, and an agent with little time is not disturbed by what it would learn of them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Choice, Number, Question, QuestionAnswerer
from sb3_qa.base_rates import DEFAULT, BaseRates
from sb3_qa.callbacks import QACallback
from sb3_qa.head import survival
from sb3_qa.labels import EventTimes
from sb3_qa.questions import Catalogue
from sb3_qa.truth import eventually, now

QUESTIONS = [
    Question("Does it rain?", now("rain"), name="rain"),
    Question("Will it thunder within {k} steps?", eventually("thunder", within="k"), k=[1, 8], name="thunder"),
    Question("Which way does the wind blow?", now("wind"), Choice("north", "east", "south"), name="wind"),
    Question("How warm is it?", now("warmth"), Number(0.0, 10.0), name="warmth"),
]


class Weather(gym.Env[Any, Any]):
    """Observations say nothing, nor do actions change anything."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def facts(self) -> dict[str, Any]:
        wind = self.np_random.choice(["north", "east", "south"], p=[0.7, 0.3, 0.0])
        return {
            "rain": self.np_random.random() < 0.3,
            "thunder": self.np_random.random() < 0.05,
            "wind": str(wind),
            "warmth": 2.5 + 5.0 * (self.np_random.random() < 0.2),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), self.facts()

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 0.0, self.np_random.random() < 0.02, False, self.facts()


def mixed(rate: float, default: float) -> float:
    return (rate + DEFAULT * default) / (1 + DEFAULT)


def assert_base_rates(answerer: QuestionAnswerer, tolerance: float) -> None:
    obs = np.zeros(2, np.float32)
    assert answerer.ask("rain", obs).probability == pytest.approx(mixed(0.3, 0.5), abs=tolerance)
    hazard = mixed(0.05, 1 - 0.5 ** (1 / 8))
    assert answerer.ask("thunder[k=1]", obs).probability == pytest.approx(hazard, abs=tolerance)
    assert answerer.ask("thunder[k=8]", obs).probability == pytest.approx(1 - (1 - hazard) ** 8, abs=3 * tolerance)
    wind = answerer.ask("wind", obs).probabilities
    assert wind == pytest.approx([mixed(each, 1 / 3) for each in (0.7, 0.3, 0.0)], abs=tolerance)
    assert answerer.ask("warmth", obs).mean == pytest.approx(mixed(3.5, 5.0), abs=10 * tolerance)


def test_biases_answer_by_the_rates_of_what_is_known() -> None:
    catalogue = Catalogue(QUESTIONS)
    rates, rng = BaseRates(catalogue.targets), np.random.default_rng(0)
    n = 4000
    for part in range(2):  # in any number of parts
        times, values = [], []
        for target in catalogue.targets:
            if target.kind == "yesno":
                times.append(EventTimes(np.ones(n, np.int32), rng.random(n) < 0.3))
            elif target.kind == "event":  # an event at 5 % a step, or a cut after six steps
                at = rng.geometric(0.05, n)
                times.append(EventTimes(np.minimum(at, 6).astype(np.int32), at <= 6))
            elif target.kind == "choice":
                values.append(np.where(rng.random(n) < 0.7, 0.0, np.nan).astype(np.float32))
            else:
                values.append(np.full(n, 2.5, np.float32))
        rates.add(times, values)
        assert rates.n_rows == n * (part + 1)
    kept = DEFAULT / (1 + DEFAULT)
    for target in catalogue.targets:
        bias = rates.biases()[target.start]
        assert bias.shape == (target.width,) and bias.dtype == np.float32
        if target.kind == "yesno":
            assert 1 / (1 + np.exp(-bias[0])) == pytest.approx((1 - kept) * 0.3 + kept * 0.5, abs=0.02)
        elif target.kind == "event":
            hazard = (1 - kept) * 0.05 + kept * (1 - 0.5 ** (1 / 8))
            assert survival(bias[None])[0] == pytest.approx((1 - hazard) ** np.arange(9), abs=0.03)
        else:
            p = np.exp(bias) / np.exp(bias).sum()
            assert p.argmax() == (0 if target.kind == "choice" else round(2.5 / 10 * (target.width - 1)))
            assert p.max() > 1 - kept - 0.01 if target.kind == "choice" else p.max() > 0.4
            assert (p >= 0.9 * kept / target.width).all(), "nothing is held to be impossible"


def test_without_labels_nothing_changes() -> None:
    catalogue = Catalogue(QUESTIONS)
    rates = BaseRates(catalogue.targets)
    rates.add(
        [
            EventTimes(np.zeros(5, np.int32), np.zeros(5, np.bool_))
            for t in catalogue.targets
            if t.kind in ("event", "yesno")
        ],
        [np.full(5, np.nan, np.float32) for t in catalogue.targets if t.kind not in ("event", "yesno")],
    )
    for target in catalogue.targets:
        bias = rates.biases()[target.start]
        if target.kind in ("event", "yesno"):
            assert survival(bias[None])[0, -1] == pytest.approx(0.5, abs=1e-5)
        else:
            assert bias == pytest.approx(np.full(target.width, bias[0]))


@pytest.mark.parametrize("encoder", ["index", "text"])
@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_the_first_answers_are_base_rates(algorithm: Any, encoder: str) -> None:
    # The learning rate is so small that nothing else is learnt.
    more = dict(n_steps=4096) if algorithm is PPO else dict(learning_starts=4090, train_freq=4)
    kwargs = dict(questions=QUESTIONS, qa_encoder=encoder)
    model = algorithm("QAMlpPolicy", Weather(), policy_kwargs=kwargs, seed=0, learning_rate=1e-9, **more)
    model.learn(4096, callback=QACallback())
    assert_base_rates(QuestionAnswerer.from_model(model), 0.04)
    if algorithm is DQN:
        assert_base_rates(QuestionAnswerer.from_model(model, target=True), 0.04)


def test_a_template_begins_with_the_rate_of_all_its_instances() -> None:
    # Also where an instance is never taught, or asked with values that were not listed.
    rain = Question(
        "Is it {much} wetter than {less}?",
        now(lambda step: step.info["rain"]),
        name="wet",
        much=[1, 2, 3],
        less=[1, 2],
        holdout=["wet[much=3][less=2]"],
    )
    kwargs = dict(questions=[rain, *QUESTIONS], qa_encoder="text")
    model = PPO("QAMlpPolicy", Weather(), policy_kwargs=kwargs, seed=0, learning_rate=1e-9, n_steps=4096)
    assert QuestionAnswerer.from_model(model).ask("wet[much=1][less=1]", np.zeros(2)).probability > 0.4
    model.learn(4096, callback=QACallback())
    answerer = QuestionAnswerer.from_model(model)
    for question in ["wet[much=1][less=1]", "wet[much=3][less=2]", "Is it 2.5 wetter than 1.5?"]:
        assert answerer.ask(question, np.zeros(2)).probability == pytest.approx(mixed(0.3, 0.5), abs=0.04)
    assert_base_rates(answerer, 0.04)


def test_what_has_been_learnt_stays(tmp_path: Any) -> None:
    model = PPO("QAMlpPolicy", Weather(), policy_kwargs=dict(questions=QUESTIONS), seed=0, n_steps=256)
    model.learn(256, callback=QACallback())
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", Weather(), custom_objects=dict(learning_rate=0.0, lr_schedule=lambda _: 0.0))
    before = loaded.policy.qa_head.flat.detach().clone()
    loaded.learn(256, callback=QACallback())
    assert before.equal(loaded.policy.qa_head.flat.detach())


@pytest.mark.parametrize("encoder", ["index", "text"])
def test_heads_that_do_not_learn_are_left_alone(encoder: str) -> None:
    kwargs = dict(questions=QUESTIONS, qa_encoder=encoder, qa_coef=0.0)
    model = PPO("QAMlpPolicy", Weather(), policy_kwargs=kwargs, seed=0, n_steps=256, learning_rate=0.0)
    before = model.policy.qa_head.flat.detach().clone()
    model.learn(256, callback=QACallback())
    assert before.equal(model.policy.qa_head.flat.detach())


@pytest.mark.parametrize(
    ("algorithm", "env", "least"),
    [(A2C, IdentityEnvMultiDiscrete, 90), (A2C, IdentityEnvMultiBinary, 80), (PPO, IdentityEnvMultiBinary, 88)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_agent_with_little_time_is_not_disturbed(algorithm: Any, env: Any, least: float) -> None:
    # SB3's own test of learning, where plain SB3 has 93, 94 and 94, and heads that began with even odds 86, 61 and 85.
    questions = [
        Question("Was I paid?", now(lambda step: step.reward > 0), name="paid"),
        Question("How much?", now(lambda step: step.reward), Number(-1, 1), name="reward"),
    ]
    single = env(4)
    venv = DummyVecEnv([lambda: single])
    given = dict(n_epochs=4, n_steps=256) if algorithm is PPO else {}
    model = algorithm(
        "QAMlpPolicy", venv, gamma=0.4, learning_rate=0.002, seed=3, policy_kwargs=dict(questions=questions), **given
    )
    model.learn(1200, callback=QACallback())
    assert evaluate_policy(model, venv, n_eval_episodes=20, warn=False)[0] >= least
