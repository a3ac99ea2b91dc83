"""The file of a frozen answerer: equal answers without a model, and refusal of everything that is not such a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from noise import ACTIONS, POLICIES, QUESTIONS, SPACES, Noise, make_env
from safetensors import safe_open
from safetensors.torch import save_file
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qa import Choice, QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.policies import qa_policy
from sb3_qa.truth import eventually, now
from sb3_qa.wrappers import VecVetoAction

KEYS = ["bad[k=6]", "fine", "until", "level", "sum", "side", "bad_now"]


def make_model(observation: str = "vector", action: str = "discrete", **policy_kwargs: Any) -> PPO:
    kwargs = dict(questions=QUESTIONS, **policy_kwargs)
    return PPO(
        qa_policy(PPO, POLICIES[observation]),
        make_env(observation, action),
        n_steps=8,
        batch_size=24,
        seed=1,
        policy_kwargs=kwargs,
    )


def told(qa: QuestionAnswerer, obs: Any, actions: np.ndarray) -> dict[str, np.ndarray]:
    return {key: qa.ask(key, obs, actions if qa.catalogue.find(key).per_action else None).value for key in KEYS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answerer") / "noise.qa"
    QuestionAnswerer.from_model(make_model()).save(path)
    return path


@pytest.mark.parametrize("observation", SPACES)
@pytest.mark.parametrize("action", ACTIONS)
def test_loaded_answers_are_equal(observation: str, action: str, tmp_path: Path) -> None:
    model = make_model(observation, action)
    live = QuestionAnswerer.from_model(model)
    live.save(tmp_path / "x.qa")
    frozen = QuestionAnswerer.load(tmp_path / "x.qa")
    obs = make_env(observation, action).reset()
    actions = np.stack([ACTIONS[action].sample() for _ in range(3)])
    a, b = told(live, obs, actions), told(frozen, obs, actions)
    for key in KEYS:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert frozen.questions == live.questions
    assert frozen.policy.observation_space == model.policy.observation_space
    assert frozen.policy.action_space == model.action_space


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        dict(net_arch=[]),
        dict(net_arch=dict(pi=[8], vf=[16, 8]), activation_fn=torch.nn.ReLU),
        dict(share_features_extractor=False, qa_net_arch=[8, 8]),
        dict(action_names=["stay", "left", "right"]),
    ],
    ids=str,
)
def test_architectures_are_kept(policy_kwargs: dict[str, Any], tmp_path: Path) -> None:
    live = QuestionAnswerer.from_model(make_model(**policy_kwargs))
    live.save(tmp_path / "x.qa")
    frozen = QuestionAnswerer.load(tmp_path / "x.qa")
    obs = make_env().reset()
    np.testing.assert_array_equal(live.ask("bad[k=6]", obs), frozen.ask("bad[k=6]", obs))
    assert frozen.action_names == live.action_names


def test_gsde_is_kept(tmp_path: Path) -> None:
    kwargs = dict(questions=QUESTIONS)
    model = PPO(qa_policy(PPO), make_env(action="box"), n_steps=8, batch_size=24, use_sde=True, policy_kwargs=kwargs)
    QuestionAnswerer.from_model(model).save(tmp_path / "x.qa")
    QuestionAnswerer.load(tmp_path / "x.qa").ask("level", np.zeros((2, 5), np.float32))


def test_frozen_stays_while_live_learns(tmp_path: Path) -> None:
    model = make_model()
    live = QuestionAnswerer.from_model(model)
    live.save(tmp_path / "x.qa")
    frozen = QuestionAnswerer.load(tmp_path / "x.qa")
    obs = make_env().reset()
    before = live.ask("level", obs).mean
    model.learn(24, callback=QACallback())
    assert not np.array_equal(live.ask("level", obs).mean, before)
    np.testing.assert_array_equal(frozen.ask("level", obs).mean, before)


def test_answers_in_a_process_without_a_model(saved: Path) -> None:
    code = (
        "import sys, numpy as np; from sb3_qa import QuestionAnswerer;"
        "qa = QuestionAnswerer.load(sys.argv[1]); print(repr(qa.ask('level', np.zeros((1, 5), np.float32)).mean.item()))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True).stdout
    expected = QuestionAnswerer.load(saved).ask("level", np.zeros((1, 5), np.float32)).mean.item()
    assert float(out) == expected


def test_file_is_safetensors_and_json(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
        assert "qa_head.flat" in file.keys()  # noqa: SIM118
    description = json.loads(metadata["sb3_qa"])
    assert [question["name"] for question in description["questions"]] == [question.name for question in QUESTIONS]
    assert not list(saved.parent.glob("*.part"))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_files_are_refused(saved: Path, tmp_path: Path, keep: float) -> None:
    data = saved.read_bytes()
    (tmp_path / "x.qa").write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(QAError, match=r"cannot be read|not an answerer's|damaged"):
        QuestionAnswerer.load(tmp_path / "x.qa")


def test_any_damaged_byte_is_noticed(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 150):
        (tmp_path / "x.qa").write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        with pytest.raises(QAError):
            QuestionAnswerer.load(tmp_path / "x.qa")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QAError, match="no file"):
        QuestionAnswerer.load(tmp_path / "nothing.qa")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.qa")
    with pytest.raises(QAError, match="not an answerer's"):
        QuestionAnswerer.load(tmp_path / "other.qa")
    make_model().save(tmp_path / "model.zip")
    with pytest.raises(QAError, match="as of a model that was saved"):
        QuestionAnswerer.load(tmp_path / "model.zip")


class Halved(BaseFeaturesExtractor):
    """An extractor of a user's own."""

    def __init__(self, observation_space: spaces.Box, factor: float = 0.5) -> None:
        super().__init__(observation_space, 5)
        self.factor = factor

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return observations * self.factor


def test_own_classes_must_be_passed(tmp_path: Path) -> None:
    live = QuestionAnswerer.from_model(
        make_model(features_extractor_class=Halved, features_extractor_kwargs=dict(factor=0.25))
    )
    live.save(tmp_path / "x.qa")
    with pytest.raises(QAError, match=r"classes=\[Halved\]"):
        QuestionAnswerer.load(tmp_path / "x.qa")
    frozen = QuestionAnswerer.load(tmp_path / "x.qa", classes=[Halved])
    obs = make_env().reset()
    np.testing.assert_array_equal(live.ask("level", obs), frozen.ask("level", obs))


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    question = Question("which?", now("x"), Choice(("a", 1), frozenset("b")), name="which")
    model = PPO(qa_policy(PPO), make_env(), n_steps=8, batch_size=24, policy_kwargs=dict(questions=[question]))
    with pytest.raises(QAError, match="JSON"):
        QuestionAnswerer.from_model(model).save(tmp_path / "x.qa")
    assert not (tmp_path / "x.qa").exists()


def test_options_and_slots_that_are_tuples(tmp_path: Path) -> None:
    """JSON makes lists of them."""
    cells = [("a", (1, 2)), ("b", (3, 4))]
    questions = [
        Question("which?", now("x"), Choice(*cells), name="which"),
        Question("at {cell}?", now(lambda step, cell: False), name="at", cell=cells, holdout=[dict(cell=cells[1])]),
    ]
    model = PPO(qa_policy(PPO), make_env(), n_steps=8, batch_size=24, policy_kwargs=dict(questions=questions))
    live = QuestionAnswerer.from_model(model)
    live.save(tmp_path / "x.qa")
    frozen = QuestionAnswerer.load(tmp_path / "x.qa")
    obs = make_env().reset()
    assert frozen.catalogue.find("which").question.answer == Choice(*cells)
    assert frozen.catalogue.questions[1].slots == {"cell": tuple(cells)}
    np.testing.assert_array_equal(frozen.ask("which", obs).value, live.ask("which", obs).value)
    assert frozen.catalogue.instances.keys() == live.catalogue.instances.keys()
    frozen.save(tmp_path / "y.qa")
    assert (tmp_path / "y.qa").read_bytes() == (tmp_path / "x.qa").read_bytes()


def test_normalised_observations_are_remembered(tmp_path: Path) -> None:
    kwargs = dict(questions=QUESTIONS)
    model = PPO(qa_policy(PPO), VecNormalize(make_env()), n_steps=8, batch_size=24, policy_kwargs=kwargs)
    QuestionAnswerer.from_model(model).save(tmp_path / "x.qa")
    assert QuestionAnswerer.load(tmp_path / "x.qa").normalized
    with pytest.raises(QAError, match="VecNormalize"):
        VecVetoAction(make_env(), "bad[k=6]", 0.5, qa=tmp_path / "x.qa")
    VecVetoAction(VecNormalize(make_env()), "bad[k=6]", 0.5, qa=tmp_path / "x.qa")


class Named(gym.Wrapper[Any, Any, Any, Any]):
    def get_action_meanings(self) -> list[str]:
        return ["stay", "left", "right"]


def test_an_answerer_of_target_networks_is_refused(tmp_path: Path) -> None:
    """The file would answer as the live ones do."""
    model = DQN(qa_policy(DQN), make_env(), buffer_size=50, policy_kwargs=dict(questions=QUESTIONS))
    with pytest.raises(QAError, match="target networks"):
        QuestionAnswerer.from_model(model, target=True).save(tmp_path / "x.qa")
    assert not (tmp_path / "x.qa").exists()


def test_what_was_learnt_from_is_remembered_without_an_environment(tmp_path: Path) -> None:
    """Normalised observations or raw ones, and the names of actions; what is learnt from later counts."""
    kwargs = dict(n_steps=8, batch_size=24, policy_kwargs=dict(questions=QUESTIONS))
    model = PPO(qa_policy(PPO), VecNormalize(DummyVecEnv([lambda: Named(Noise())] * 3)), **kwargs)  # type: ignore[arg-type]
    model.learn(24, callback=QACallback())
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip")
    qa = QuestionAnswerer.from_model(loaded)
    assert qa.normalized and qa.action_names == ["stay", "left", "right"]
    qa.save(tmp_path / "x.qa")
    with pytest.raises(QAError, match="VecNormalize"):
        VecVetoAction(make_env(), "bad[k=6]", 0.5, qa=tmp_path / "x.qa")
    loaded.set_env(make_env())
    assert QuestionAnswerer.from_model(loaded).normalized
    loaded.learn(24, callback=QACallback())
    assert not QuestionAnswerer.from_model(loaded).normalized


def test_asking(saved: Path) -> None:
    qa = QuestionAnswerer.load(saved)
    obs = make_env().reset()
    every = qa.ask("bad[k=6]", obs).probability
    assert every.shape == (3, 3)
    np.testing.assert_allclose(qa.ask("bad within 6 if I choose 2?", obs).probability, every[:, 2], rtol=1e-6)
    np.testing.assert_allclose(qa.ask("BAD within 6 if I choose 2?", obs).probability, every[:, 2], rtol=1e-6)
    np.testing.assert_allclose(qa.ask("bad within 6 if I choose {action}?", obs).probability, every, rtol=1e-6)
    np.testing.assert_allclose(qa.ask("bad[k=6]", obs, action=[0, 1, 2]).probability, np.diag(every), rtol=1e-6)
    np.testing.assert_allclose(qa.ask("bad[k=6]", obs, action="1").probability, every[:, 1], rtol=1e-6)
    single = qa.ask("bad[k=6]", obs[0])
    assert single.probability.shape == (3,)
    np.testing.assert_allclose(single.probability, every[0], rtol=1e-5)
    assert qa.ask("level", obs[0]).mean.shape == ()
    assert qa.ask("side", obs[0]).best in ("left", "middle", "right")
    assert (every >= qa.ask("bad[k=1]", obs).probability).all()


@pytest.mark.parametrize(
    ("question", "kwargs", "words"),
    [
        ("bad[k=7]", {}, "not taught"),
        ("Will it rain?", {}, "not taught"),
        ("bad within 6 if I choose jump?", {}, "no action 'jump'"),
        ("bad[k=6]", dict(action=3), "from 0 to 2"),
        ("bad[k=6]", dict(action=[0, 1]), "shape"),
        ("bad[k=6]", dict(action=0.5), "whole numbers"),
        ("level", dict(action=1), "not about an action"),
        ("bad within 6 if I choose 1?", dict(action=1), "drop one"),
    ],
)
def test_bad_questions_are_refused(saved: Path, question: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(QAError, match=words):
        QuestionAnswerer.load(saved).ask(question, np.zeros((3, 5), np.float32), **kwargs)


@pytest.mark.parametrize("obs", [np.zeros((3, 4), np.float32), np.zeros(6), {"vector": np.zeros(5)}, None], ids=str)
def test_other_observations_are_refused(saved: Path, obs: Any) -> None:
    with pytest.raises(QAError, match="observations"):
        QuestionAnswerer.load(saved).ask("level", obs)


def test_models_without_questions_are_refused() -> None:
    with pytest.raises(QAError, match=r"qa_policy\(PPO\)"):
        QuestionAnswerer.from_model(PPO("MlpPolicy", make_env(), n_steps=8, batch_size=24))


def test_a_text_that_fits_two_questions_is_refused() -> None:
    question = Question("bad soon?", eventually("bad", within="k"), k=[1, 5], name="bad")
    model = PPO(qa_policy(PPO), make_env(), n_steps=8, batch_size=24, policy_kwargs=dict(questions=[question]))
    with pytest.raises(QAError, match=r"bad\[k=1\]"):
        QuestionAnswerer.from_model(model).ask("bad soon?", np.zeros((1, 5), np.float32))
