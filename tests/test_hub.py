"""The folder that would be pushed to the Hub: made and read back, and nothing is uploaded. Needs the extra `deploy`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.hub import package, push
from sb3_qa.truth import eventually

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_sb3")

FALL = Question("Will it fall | within {k} steps?", eventually("fell", within="k"), k=[1, 5], name="fall")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    env = VecNormalize(make_vec_env("CartPole-v1", 1, seed=0), training=False)
    model = PPO("QAMlpPolicy", env, policy_kwargs={"questions": [FALL], "net_arch": [8]}, device="cpu")
    folder = tmp_path_factory.mktemp("hub") / "repo"
    options = dict(scores={"fall[k=5] Brier score": 0.125}, limits="Only on *flat* ground.", n_eval_episodes=2)
    assert package(model, folder, "CartPole-v1", env, **options) == folder
    return model, folder


def test_files_are_named_as_huggingface_sb3_names_them(made) -> None:
    model, folder = made
    expected = {"config.json", "results.json", "README.md", "vec_normalize.pkl"}
    assert {path.name for path in folder.iterdir()} >= expected | {"ppo-CartPole-v1.zip", "ppo-CartPole-v1.qa"}
    obs = np.zeros((1, 4), np.float32)
    said = QuestionAnswerer.from_model(model).ask("fall[k=5]", obs).probability
    assert QuestionAnswerer.load(folder / "ppo-CartPole-v1.qa").ask("fall[k=5]", obs).probability == pytest.approx(said)
    loaded = PPO.load(folder / "ppo-CartPole-v1.zip")
    assert QuestionAnswerer.from_model(loaded).ask("fall[k=5]", obs).probability == pytest.approx(said)
    results = json.loads((folder / "results.json").read_text())
    assert results["n_eval_episodes"] == 2 and results["mean_reward"] > 0
    assert "policy_class" in json.loads((folder / "config.json").read_text())


def test_the_card_holds(made) -> None:
    """Its metadata are what the Hub, and rl_zoo3's listing of trained models, read."""
    card = hub.ModelCard.load(made[1] / "README.md")
    assert card.data.library_name == "stable-baselines3"
    assert {"CartPole-v1", "stable-baselines3", "sb3-qa"} <= set(card.data.tags)
    (index,) = card.data.to_dict()["model-index"]
    assert index["name"] == "PPO" and index["results"][0]["dataset"]["name"] == "CartPole-v1"
    assert index["results"][0]["metrics"][0]["type"] == "mean_reward"
    for text in (
        "`fall`",
        "Will it fall \\| within {k} steps?",
        "0.125",
        "Only on *flat* ground.",
        "VecNormalize.load",
    ):
        assert text in card.text


def test_pushing_is_one_commit_of_the_folder(made) -> None:
    calls = []

    class Api:
        def create_repo(self, **options):
            calls.append(("create_repo", options))
            return "https://hub.example/me/ppo-CartPole-v1"

        def upload_folder(self, **options):
            calls.append(("upload_folder", options))

    assert push(made[1], "me/ppo-CartPole-v1", api=Api()) == "https://hub.example/me/ppo-CartPole-v1"
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[1][1]["folder_path"] == str(made[1]) and calls[1][1]["repo_id"] == "me/ppo-CartPole-v1"


def test_what_does_not_fit_is_refused(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = made
    with pytest.raises(QAError, match="holds files"):
        package(model, folder, "CartPole-v1", model.get_env())
    with pytest.raises(QAError, match="without questions"):
        package(PPO("MlpPolicy", "CartPole-v1", device="cpu"), tmp_path / "new", "CartPole-v1", model.get_env())
    assert not (tmp_path / "new").exists()
    with pytest.raises(QAError, match="make it first"):
        push(tmp_path, "me/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(QAError, match=r"sb3-qa\[deploy\]"):
        package(model, tmp_path / "new", "CartPole-v1", model.get_env())
