"""The folder that would be pushed to the Hub: made and read back, and nothing is uploaded. Needs the extra `deploy`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from unittest.mock import create_autospec

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qa import QAError, Question, QuestionAnswerer
from sb3_qa.hub import package, push
from sb3_qa.truth import eventually
from sb3_qa.wrappers import VecVetoAction

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


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push and a download of small files go through."""

    def log_message(self, *args):
        pass

    def answer(self, body, headers=None, status=200):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Request-Id": "1", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b"".join(self.chunks())
        here = self.server
        here.calls.append(f"POST {self.path.partition('?')[0]}")
        if self.path.startswith("/api/repos/create"):
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            self.answer({"url": f"{here.address}/{owner}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            assert "library_name: stable-baselines3" in json.loads(body)["content"]
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [each["path"] for each in json.loads(body)["files"]]
            self.answer({"files": [dict(path=path, uploadMode="regular", shouldIgnore=False) for path in files]})
        else:
            assert "/commit/" in self.path, self.path
            for line in body.splitlines():
                told = json.loads(line)
                if told["key"] == "header":
                    here.message = told["value"]["summary"]
                else:
                    here.files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{here.address}/me/ppo-CartPole-v1/commit/{'0' * 40}",
                }
            )

    def chunks(self):
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        content = self.server.files[name]
        digest = hashlib.sha1(content).hexdigest()
        self.answer(content, {"ETag": f'"{digest}"', "X-Repo-Commit": "0" * 40, "X-Linked-Size": len(content)})

    do_HEAD = do_GET


@pytest.fixture
def server():
    here = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    here.daemon_threads = True
    here.address, here.calls, here.files, here.message = f"http://127.0.0.1:{here.server_address[1]}", [], {}, None
    thread = threading.Thread(target=here.serve_forever)
    thread.start()
    yield here
    here.shutdown()
    thread.join()
    here.server_close()


@pytest.mark.parametrize("repo_id", ["me/ppo-CartPole-v1", "ppo-CartPole-v1"], ids=["owner", "no owner"])
def test_what_is_pushed_is_what_others_download(made, server, repo_id, tmp_path: Path) -> None:
    """Through huggingface_hub itself, with a server on this machine: all files in one commit, byte for byte."""
    model, folder = made
    api = hub.HfApi(endpoint=server.address, token="hf_nobody")
    assert push(folder, repo_id, message="First", api=api) == f"{server.address}/me/ppo-CartPole-v1"
    at = "POST /api/models/me/ppo-CartPole-v1"
    assert server.calls == [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        f"{at}/preupload/main",
        f"{at}/commit/main",
    ]
    assert server.message == "First"
    assert server.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    path = api.hf_hub_download("me/ppo-CartPole-v1", "ppo-CartPole-v1.qa", cache_dir=tmp_path)
    obs = np.zeros((1, 4), np.float32)
    said = QuestionAnswerer.from_model(model).ask("fall[k=5]", obs).probability
    assert QuestionAnswerer.load(path).ask("fall[k=5]", obs).probability == pytest.approx(said)


def test_calls_fit_huggingface_hub(made) -> None:
    """Names and arguments, whatever version is installed."""
    api = create_autospec(hub.HfApi, instance=True)
    api.create_repo.return_value = hub.RepoUrl("https://hub.example/me/ppo-CartPole-v1", endpoint="https://hub.example")
    assert push(made[1], "ppo-CartPole-v1", api=api) == "https://hub.example/me/ppo-CartPole-v1"
    assert api.upload_folder.call_args.kwargs["repo_id"] == "me/ppo-CartPole-v1"
    assert [name for name, *_ in api.method_calls] == ["create_repo", "upload_folder"]


def test_metadata_are_those_of_huggingface_sb3(made) -> None:
    """Its own card of the same result, with our tag beside."""
    theirs = import_module("huggingface_sb3.push_to_hub")._generate_metadata("PPO", "CartPole-v1", 1.0, 2.0).to_dict()
    ours = hub.ModelCard.load(made[1] / "README.md").data.to_dict()
    for data in (ours, theirs):
        data["model-index"][0]["results"][0]["metrics"][0].pop("value")
    assert ours["tags"] == [*theirs["tags"], "sb3-qa"]
    assert ours | {"tags": None} == theirs | {"tags": None}
    results = json.loads((made[1] / "results.json").read_text())
    assert {"mean_reward", "std_reward", "is_deterministic", "n_eval_episodes", "eval_datetime"} <= results.keys()
    assert "system_info" in json.loads((made[1] / "config.json").read_text())


def test_the_card_s_usage_runs_without_trusting_pickles(made, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    text = hub.ModelCard.load(made[1] / "README.md").text
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id, filename: str(made[1] / filename))
    exec(block, {})
    assert "fall[k=5]" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped with a ``Monitor``")
def test_evaluation_leaves_statistics_and_counts_the_environment_s_own_rewards(tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))  # no Monitor, which would tell the return
    env.reset()
    model = PPO("QAMlpPolicy", env, policy_kwargs={"questions": [FALL], "net_arch": [8]}, device="cpu")
    count = env.obs_rms.count
    package(model, tmp_path / "repo", "CartPole-v1", env, n_eval_episodes=1)
    assert env.obs_rms.count == count and env.training and env.norm_reward
    assert json.loads((tmp_path / "repo" / "results.json").read_text())["mean_reward"] >= 8
    package(
        PPO.load(tmp_path / "repo" / "ppo-CartPole-v1.zip"), tmp_path / "again", "CartPole-v1", gym.make("CartPole-v1")
    )


class Forbidding(gym.Wrapper):
    """A cart that must be pushed to the left and to the right by turns."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))

    def reset(self, **kwargs):
        self.n = 0
        return self.env.reset(**kwargs)

    def action_masks(self) -> list[bool]:
        return [self.n % 2 == 0, self.n % 2 == 1]

    def step(self, action):
        assert self.action_masks()[action], f"{action} is forbidden"
        self.n += 1
        return self.env.step(action)


def test_an_agent_that_takes_masks_is_told_them(tmp_path: Path) -> None:
    """And not asked for them where there are none."""
    from sb3_contrib import MaskablePPO

    options = dict(policy_kwargs={"questions": [FALL], "net_arch": [8]}, device="cpu", seed=0)
    model = MaskablePPO("QAMlpPolicy", make_vec_env(Forbidding, 1, seed=0), **options)
    for name, env in (("with", Forbidding()), ("without", gym.make("CartPole-v1"))):
        folder = package(model, tmp_path / name, "CartPole-v1", env, n_eval_episodes=2)
        assert json.loads((folder / "results.json").read_text())["mean_reward"] >= 8


def test_a_failing_evaluation_leaves_no_folder(made, tmp_path: Path) -> None:
    env = VecVetoAction(make_vec_env("CartPole-v1", 1), "fall[k=5]", 0.5)
    with pytest.raises(QAError, match="has no answerer yet"):
        package(made[0], tmp_path / "repo", "CartPole-v1", env)
    assert not (tmp_path / "repo").exists()


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
