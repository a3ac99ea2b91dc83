"""Exported answerers answer as the answerer does, without this package. Needs the extra `deploy`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from wrapping import IMAGE, QUESTIONS, VECTOR, Toy, toys

from sb3_qa import Choice, Number, QAError, Question, QuestionAnswerer
from sb3_qa.answers import YesNoAnswer
from sb3_qa.callbacks import QACallback
from sb3_qa.deploy import OPSET, AnswererModule
from sb3_qa.policies import qa_policy
from sb3_qa.truth import after, always, lowest, now, peak, steps_until, total

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ASKED = [
    *QUESTIONS,
    Question("Will it stay whole for {k} steps?", always("crashed", during="k"), k=[1, 3], name="whole"),
    Question("In how many steps will it crash?", steps_until("crashed", cap=4), name="until"),
    Question("Is it broken?", now("crashed"), name="broken"),
    Question("How slow will it be in 3 steps?", lowest("speed", over=3), answer=Number(0, 10), name="slow"),
]
ABOUT_ACTIONS = [
    Question("Will it stay whole for 2 steps after {action}?", always("crashed", during=2), name="whole after"),
    Question("In how many steps after {action} will it crash?", steps_until("crashed", cap=4), name="until after"),
    Question(
        "Which lane will it be in after {action}?", after("lane", steps=1), answer=Choice("left", "right"), name="next"
    ),
    Question("How fast will it be after {action}?", peak("speed", over=2), answer=Number(0, 10), name="fast"),
    Question(
        "How far will it go in {k} steps after {action}?",
        total("speed", over="k", discount=0.9),
        answer=Number(0, 30),
        k=[2, 3],
        name="far",
    ),
]
BOX = spaces.Box(-2, 2, (2,), np.float32)
UNEVEN = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32))
PICTURES = spaces.Box(0, 255, (36, 36, 3), np.uint8)  # the smallest that NatureCNN takes
BOTH = spaces.Dict({"image": PICTURES, "vector": VECTOR})


def scrambled(policy):
    """Weights so large that answers differ from each other."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.qa_head.parameters():
            parameter.add_(torch.randn_like(parameter))
    return policy


def answerer(
    algorithm=PPO,
    action_space=None,
    observation_space=VECTOR,
    base="MlpPolicy",
    questions=ASKED + ABOUT_ACTIONS,
    options=None,
    learnt=True,
    **more,
):
    """Of an agent that has learnt a little: distributions hold tensors then, and normalisation layers have seen something."""
    env = DummyVecEnv([lambda: Toy(action_space=action_space, observation_space=observation_space)])
    off_policy = issubclass(algorithm, OffPolicyAlgorithm)
    steps = dict(learning_starts=10, buffer_size=100) if off_policy else dict(n_steps=16)
    if algorithm.__name__ != "A2C":
        steps |= dict(batch_size=8)
    model = algorithm(
        qa_policy(algorithm, base),
        env,
        policy_kwargs=dict(questions=questions, net_arch=[8], **more),
        seed=0,
        device="cpu",
        **(steps | (options or {})),
    )
    learning = dict(use_masking=False) if algorithm.__name__ == "MaskablePPO" else {}
    if learnt:
        model.learn(20, callback=QACallback(), **learning)
    scrambled(model.policy)
    return QuestionAnswerer.from_model(model)


def observations(space, n):
    samples = []
    space.seed(0)
    for _ in range(n):
        samples.append(space.sample())
    if isinstance(space, spaces.Dict):
        return {key: np.stack([np.asarray(each[key]) for each in samples]) for key in space.spaces}
    return np.stack(samples)


def table(answer):
    return answer.probability if isinstance(answer, YesNoAnswer) else answer.probabilities


def as_inputs(obs):
    return {"obs": obs} if not isinstance(obs, dict) else {f"obs.{key}": value for key, value in obs.items()}


def both(qa, folder: Path):
    """The two kinds of files, each as a function from inputs by name to outputs by name."""
    qa.export(folder / "driver.onnx")
    qa.export(folder / "driver.pt2")
    session = onnxruntime.InferenceSession(folder / "driver.onnx")
    told = {"sb3_qa.json": ""}
    program = torch.export.load(folder / "driver.pt2", extra_files=told).module()
    about = json.loads(told["sb3_qa.json"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["sb3_qa"]) == about
    names = [each.name for each in session.get_outputs()]
    assert [each.name for each in session.get_inputs()] == about["inputs"]

    def by_onnx(inputs):
        return dict(zip(names, session.run(None, inputs), strict=True))

    def by_torch(inputs):
        out = program(*(torch.as_tensor(inputs[name]) for name in about["inputs"]))
        return dict(zip(names, (each.numpy() for each in out), strict=True))

    return about, by_onnx, by_torch


CASES = {
    "PPO": {},
    "PPO, dictionaries": dict(observation_space=BOTH, base="MultiInputPolicy"),
    "PPO, discrete parts": dict(
        observation_space=spaces.Dict({"one": VECTOR, "two": spaces.Discrete(3), "three": spaces.MultiBinary(2)}),
        base="MultiInputPolicy",
        learnt=False,  # the toy draws no such observations
    ),
    "PPO, images": dict(observation_space=IMAGE, base="CnnPolicy", features_extractor_class=FlattenExtractor),
    "PPO, words": dict(qa_encoder="text"),
    "PPO, a box of actions": dict(action_space=BOX, options=dict(use_sde=True)),
    "PPO, layers of questions": dict(qa_net_arch=[8, 8], share_features_extractor=False),
    "A2C": dict(algorithm=A2C, action_space=UNEVEN),
    "DQN": dict(algorithm=DQN),
    "DQN, images": dict(algorithm=DQN, observation_space=PICTURES, base="CnnPolicy"),
    "SAC, which reads its critics": dict(algorithm=SAC, action_space=UNEVEN),
    "SAC, images": dict(algorithm=SAC, action_space=BOX, observation_space=PICTURES, base="CnnPolicy"),
    "SAC, words": dict(algorithm=SAC, action_space=BOX, qa_encoder="text"),
    "TD3": dict(algorithm=TD3, action_space=UNEVEN),
    "DDPG": dict(algorithm=DDPG, action_space=BOX),
}
if find_spec("sb3_contrib"):
    from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO

    CASES |= {
        "CrossQ": dict(algorithm=CrossQ, action_space=UNEVEN),
        "MaskablePPO": dict(algorithm=MaskablePPO),
        "QR-DQN": dict(algorithm=QRDQN),
        "TQC, dictionaries": dict(algorithm=TQC, action_space=BOX, observation_space=BOTH, base="MultiInputPolicy"),
        "TRPO": dict(algorithm=TRPO, action_space=BOX),
    }


SLOW = ("PPO, layers of questions", "DQN, images", "SAC, images", "SAC, words")  # combinations of what others show


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_files_answer_as_the_answerer_does(tmp_path: Path, name: str) -> None:
    qa = answerer(**CASES[name])
    about, *ways = both(qa, tmp_path)
    assert [each["output"] for each in about["answers"]] == qa.questions
    space = qa.policy.observation_space
    n_alike = 0
    for n in (1, 7):
        obs = observations(space, n)
        inputs = as_inputs(obs)
        actions = None
        if "action" in about["inputs"]:
            actions = inputs["action"] = observations(qa.policy.action_space, n)
        for way in ways:
            out = way(inputs)
            for told in about["answers"]:
                answer = qa.ask(told["output"], obs, actions if told["per_action"] else None)
                expected = table(answer)
                assert out[told["output"]].shape == expected.shape
                np.testing.assert_allclose(out[told["output"]], expected, atol=1e-5, rtol=0)
                n_alike += n > 1 and expected.std() < 1e-3
                assert told.get("options", told.get("values")) is None or (
                    len(told.get("options", told.get("values"))) == expected.shape[-1]
                )
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":  # of what is not finite nothing is known
        obs.reshape(7, -1)[0, -1] = np.inf
        inputs |= as_inputs(obs)
        for out in (way(inputs) for way in ways):
            assert all(np.isnan(out[key][0]).all() and np.isfinite(out[key][1:]).all() for key in qa.questions)
    assert n_alike <= len(qa.questions)  # of images some saturate: at most half of what is compared says nothing


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"enable_critic_lstm": False},
        {"enable_critic_lstm": False, "shared_lstm": True},
        {"n_lstm_layers": 2, "action_space": BOX},
        {"base": "MultiInputLstmPolicy", "observation_space": BOTH},
        pytest.param(
            {"base": "CnnLstmPolicy", "observation_space": PICTURES, "qa_encoder": "text"}, marks=pytest.mark.slow
        ),
    ],
    ids=["two", "of the actor", "shared", "layers, a box of actions", "dictionaries", "images, words"],
)
def test_an_lstm_goes_on_from_its_state(tmp_path: Path, kind) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    spaces_of = {"observation_space": VECTOR, "action_space": None}
    spaces_of |= {name: kind[name] for name in spaces_of if name in kind}
    more = {name: value for name, value in kind.items() if name not in spaces_of and name != "base"}
    model = contrib.RecurrentPPO(
        f"QA{kind.get('base', 'MlpLstmPolicy')}",
        toys(3, **spaces_of),
        n_steps=8,
        batch_size=24,
        policy_kwargs=dict(questions=ASKED, lstm_hidden_size=6, net_arch=[8], **more),
        seed=0,
        device="cpu",
    )
    model.learn(24, callback=QACallback())
    scrambled(model.policy)
    qa = QuestionAnswerer.from_model(model)
    about, *ways = both(qa, tmp_path)
    layers = more.get("n_lstm_layers", 1)
    for way in ways:
        state = [np.zeros((layers, 3, 6), np.float32)] * 4
        remembered = None
        rows = observations(model.observation_space, 12)
        for step in range(4):
            here = slice(3 * step, 3 * step + 3)
            obs = {key: each[here] for key, each in rows.items()} if isinstance(rows, dict) else rows[here]
            starts = np.array([step == 0, step == 0, step in (0, 2)])
            inputs = {**as_inputs(obs), "episode_start": starts.astype(np.float32)}
            actions = None
            if "action" in about["inputs"]:
                actions = inputs["action"] = observations(model.action_space, 3)
            out = way(inputs | dict(zip(("hidden", "cell", "hidden_vf", "cell_vf"), state, strict=True)))
            for told in about["answers"]:
                asked = actions if told["per_action"] else None
                expected = table(qa.ask(told["output"], obs, asked, state=remembered, episode_start=starts))
                np.testing.assert_allclose(out[told["output"]], expected, atol=1e-5, rtol=0)
            remembered = qa.remember(obs, remembered, starts)
            state = [out[f"next_{name}"] for name in ("hidden", "cell", "hidden_vf", "cell_vf")]


WITHOUT = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("driver.onnx")
names = [each.name for each in session.get_outputs()]
out = dict(zip(names, session.run(None, {"obs": np.zeros((2, 4), np.float32)})))
print(out["danger"][0])
assert not {"torch", "sb3_qa", "stable_baselines3"} & set(sys.modules)
"""


def test_a_file_is_asked_without_torch_and_says_its_opset(tmp_path: Path) -> None:
    qa = answerer()
    qa.export(tmp_path / "driver.onnx")
    file = onnx.load(tmp_path / "driver.onnx")
    onnx.checker.check_model(file)
    assert {each.domain: each.version for each in file.opset_import}[""] == OPSET
    assert [path.name for path in tmp_path.iterdir()] == ["driver.onnx"]  # the weights are in it
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, text=True, capture_output=True, check=True, timeout=60
    )
    assert float(done.stdout) == pytest.approx(float(qa.ask("danger", np.zeros(4, np.float32)).probability), abs=1e-5)


def test_what_is_exported_stays_as_it_was_and_the_model_too(tmp_path: Path) -> None:
    qa = answerer()
    module = AnswererModule(qa)
    obs = np.ones((2, 4), np.float32)
    before = qa.ask("danger", obs).probability
    assert all(parameter.requires_grad for parameter in qa.policy.qa_head.parameters())
    with torch.no_grad():
        qa.policy.qa_head.flat.mul_(0.2)
    assert np.abs(qa.ask("danger", obs).probability - before).max() > 1e-3
    out = dict(zip(module.outputs, module(torch.from_numpy(obs)), strict=True))
    np.testing.assert_allclose(out["danger"].numpy(), before, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QAError, match=r"\.onnx or \.pt2"):
        answerer().export(tmp_path / "driver.bin")
    with pytest.raises(QAError, match="Discrete or Box"):
        answerer(action_space=spaces.MultiDiscrete([2, 3])).export(tmp_path / "driver.onnx")
    with pytest.raises(QAError, match="target networks"):
        model = DQN("QAMlpPolicy", toys(), policy_kwargs=dict(questions=ASKED), device="cpu")
        QuestionAnswerer.from_model(model, target=True).export(tmp_path / "driver.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxscript_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(QAError, match=r"sb3-qa\[deploy\]"):
        answerer().export(tmp_path / "driver.onnx")
