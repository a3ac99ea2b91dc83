"""What TensorBoard is shown, read back from its event files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Choice, Number, QAError, Question
from sb3_qa.callbacks import QACallback
from sb3_qa.callbacks.pictures import Pictures
from sb3_qa.figures import new_figure, plot_survival
from sb3_qa.questions import Catalogue
from sb3_qa.scores import kaplan_meier
from sb3_qa.truth import eventually, now

pytest.importorskip("tensorboard")
image = pytest.importorskip("PIL.Image")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # noqa: E402


def fell(step):
    return step.terminated


QUESTIONS = [
    Question(
        "Will it fall within {k} steps if I push {action}?", eventually(fell, within="k"), k=[1, 5, 10], name="fall"
    ),
    Question("Is it left of the middle?", now(lambda step: step.obs[0] < 0), name="left"),
    Question("How fast is it?", now(lambda step: step.obs[1]), answer=Number(-3, 3), name="speed"),
    Question(
        "Where does it lean?",
        now(lambda step: "left" if step.obs[2] < 0 else "right"),
        answer=Choice("left", "right"),
        name="lean",
    ),
]


def events_of(folder: Path) -> EventAccumulator:
    (run,) = folder.iterdir()
    return EventAccumulator(str(run), size_guidance={"images": 0}).Reload()


def learn(folder: Path | None, algorithm=PPO, steps=600, callback=None, **options):
    model = algorithm(
        "QAMlpPolicy",
        make_vec_env("CartPole-v1", 2, seed=0),
        policy_kwargs={"questions": QUESTIONS, "net_arch": [8]},
        tensorboard_log=None if folder is None else str(folder),
        seed=0,
        device="cpu",
        **options,
    )
    return model.learn(steps, callback=callback, log_interval=1)


SMALL = dict(n_steps=64, batch_size=64, n_epochs=1)


def test_figures_are_in_the_event_file(tmp_path: Path) -> None:
    every = 200
    learn(tmp_path, steps=600, callback=QACallback(figures=every), **SMALL)
    events = events_of(tmp_path)
    shown = {"qa/fall/reliability", "qa/fall/survival", "qa/left/reliability"}
    assert set(events.Tags()["images"]) == shown
    for tag in shown:
        told = events.Images(tag)
        assert 2 <= len(told) <= 3
        assert all(b.step - a.step >= every for a, b in pairwise(told))
        picture = np.asarray(image.open(io.BytesIO(told[-1].encoded_image_string)).convert("RGB"))
        assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert "qa/fall/brier" in events.Tags()["scalars"]


def test_answers_about_a_replay_buffer_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_qa.callbacks.replay.MOST_SCORED", 200)
    callback = QACallback(figures=10**6)
    learn(tmp_path, DQN, 400, callback, buffer_size=1000, learning_starts=50)
    assert set(callback.pictures._answers) == {"fall", "left"} and set(callback.pictures._curves) == {"fall"}


def test_hyperparameters_are_in_the_event_file(tmp_path: Path) -> None:
    learn(tmp_path, steps=300, callback=QACallback(hparams=True), **SMALL)
    events = events_of(tmp_path)
    content = {
        tag.split("/")[-1]: HParamsPluginData.FromString(data)
        for tag, data in events.summary_metadata.items()
        for data in [data.plugin_data.content]
        if tag.startswith("_hparams_")
    }
    told = content["session_start_info"].session_start_info.hparams
    assert told["algorithm"].string_value == "PPO"
    assert told["qa_coef"].number_value == pytest.approx(0.1)
    assert told["questions"].string_value == "fall, left, speed, lean"
    assert told["n_steps"].number_value == 64
    metrics = {each.name.tag for each in content["experiment"].experiment.metric_infos}
    assert metrics == {
        "rollout/ep_rew_mean",
        "qa/fall/brier",
        "qa/left/brier",
        "qa/speed/error",
        "qa/lean/accuracy",
    }
    assert metrics <= set(events.Tags()["scalars"])  # else HParams would have nothing to compare by


def test_nothing_is_drawn_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pictures, "log", lambda *args: pytest.fail("a figure was drawn"))
    learn(None, callback=QACallback(figures=100, hparams=True), **SMALL)


def test_training_is_the_same_with_figures(tmp_path: Path) -> None:
    one = learn(tmp_path / "a", callback=QACallback(), **SMALL)
    two = learn(tmp_path / "b", callback=QACallback(figures=100, hparams=True), **SMALL)
    assert all((a == b).all() for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True))


@pytest.mark.parametrize("figures", [-1, 2.5, "often"])
def test_bad_intervals_are_refused(figures) -> None:
    with pytest.raises(QAError, match="figures"):
        QACallback(figures=figures)


def test_curves_drawn_are_the_means_of_those_answered() -> None:
    question = Question("Will it fall within {k} steps?", eventually("fell", within="k"), k=[1, 3], name="fall")
    instance = Catalogue([question]).find("fall[k=3]")
    pictures = Pictures(1)
    logits = np.zeros((4, 3), np.float32)  # hazards of one half
    pictures.see_curves(instance, logits, np.array([1, 2, 2, 3]), np.array([True, True, False, False]))
    told = {}

    class Told:
        def record(self, key, value, exclude):
            told[key] = value.figure
            assert exclude == ("stdout", "log", "json", "csv")

    pictures.log(Told(), 1)
    happened, said = told["qa/fall/survival"].axes[0].lines[:2]
    assert said.get_ydata() == pytest.approx([1, 0.5, 0.25, 0.125])
    assert happened.get_ydata() == pytest.approx([1, 3 / 4, 3 / 4 * 2 / 3, 1 / 2])


def test_kaplan_meier_by_hand() -> None:
    """The example of Kaplan and Meier 1958, page 464, in months: losses and deaths of eight."""
    time, event = [8, 10, 27, 31, 34, 36, 51, 59], [1, 0, 1, 0, 1, 0, 0, 0]
    curve = kaplan_meier(time, event, 40)
    assert curve[[7, 8, 26, 27, 33, 34, 40]] == pytest.approx([1, 7 / 8, 7 / 8, 35 / 48, 35 / 48, 35 / 64, 35 / 64])
    assert np.isnan(kaplan_meier([1, 2], [0, 0], 3)[3])
    with pytest.raises(QAError, match="both"):
        kaplan_meier([1, 2], [0], 3)
    with pytest.raises(QAError, match="horizon=0"):
        kaplan_meier([1, 2], [0, 1], 0)


def test_survival_refuses_curves_of_two_lengths() -> None:
    _, axes = new_figure()
    with pytest.raises(QAError, match="one horizon"):
        plot_survival(axes, {"all": ([1, 0.5], *[[1, 0.5, 0.2]] * 3)})


SYNCED = """
import wandb
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from sb3_qa import Question
from sb3_qa.callbacks import QACallback
from sb3_qa.truth import eventually


def fell(step):
    return step.terminated


run = wandb.init(project="driver", sync_tensorboard=True, mode="offline")
asked = Question("Will it fall within {k} steps?", eventually(fell, within="k"), k=[1, 5], name="fall")
env = make_vec_env("CartPole-v1", 2, seed=0)
model = PPO("QAMlpPolicy", env, n_steps=64, batch_size=64, policy_kwargs=dict(questions=[asked]), tensorboard_log="runs")
model.learn(600, callback=QACallback(figures=200, hparams=True), log_interval=1)
run.finish()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install wandb")
def test_wandb_takes_scalars_and_figures_without_a_network(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SYNCED))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": paths, "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=os.environ | settings, check=True, timeout=240)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    told = record.read_bytes()
    assert all(f"qa/fall/{name}".encode() in told for name in ("brier", "reliability", "survival"))
    assert len(list((run / "files" / "media" / "images").glob("*.png"))) >= 2
