"""rl_zoo3, through its own command line. Needs the extra `zoo`, for the slow tests alone."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage
from wrapping import IMAGE, KEYS, VECTOR, toys
from wrapping import QUESTIONS as ABOUT_TOYS

from sb3_qa import QAError, QuestionAnswerer, zoo
from sb3_qa.callbacks import QACallback
from sb3_qa.flight_log import FlightLog
from sb3_qa.policies import QAMlpPolicy, qa_policy
from sb3_qa.policies.mixin import LEARNERS
from sb3_qa.units import own_units
from sb3_qa.wrappers import VecVetoAction

QUESTIONS = [
    {
        "name": "fall",
        "text": "Will the pole fall within {k} steps if I push {action}?",
        "truth": {"eventually": {"step": "terminated"}, "within": "k"},
        "k": [1, 5],
    },
    {
        "name": "angle",
        "text": "At what angle is it?",
        "truth": {"now": {"obs": -2}},
        "answer": {"number": [-0.25, 0.25]},
    },
]


class OwnQuestions(QAMlpPolicy):
    """A policy that has its questions, and all else about them, whatever policy_kwargs are."""

    questions = QUESTIONS
    qa_coef = 0.5
    qa_trunk_gradient = 0.25
    qa_net_arch = [16]
    qa_encoder = "text"
    qa_sample = 7
    qa_readouts = ["action_net"]
    action_names = ["left", "right"]


def as_zoo_builds(wrap, n_envs=2, training=True):
    """Environments as rl_zoo3 builds them: vec_env_wrapper, then normalisation, then the frame stack."""
    env = VecNormalize(wrap(make_vec_env("CartPole-v1", n_envs, seed=0)), training=training)
    return VecFrameStack(env, 2)


def seats(env):
    return zoo.VecAnswerQuestions(zoo.VecVetoAction(env, question="fall[k=5]", threshold=0.4))


def learner(env, **kwargs):
    options = {"policy_kwargs": {"questions": QUESTIONS}, **kwargs}
    return PPO("QAMlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu", **options)


def test_training_puts_the_wrappers_outermost() -> None:
    env = as_zoo_builds(seats)
    held_out = as_zoo_builds(seats, n_envs=1)
    model = learner(env)
    evaluation = EvalCallback(held_out, n_eval_episodes=1, eval_freq=40, verbose=0)
    model.learn(128, callback=[zoo.QACallback(), evaluation])
    for chain in (model.get_env(), evaluation.eval_env):
        names = []
        while hasattr(chain, "venv"):
            names.append(type(chain).__module__.split(".")[0] + "." + type(chain).__name__)
            chain = chain.venv
        assert [name.split(".")[1] for name in names] == [
            "VecAnswerQuestions",
            "VecVetoAction",
            "VecFrameStack",
            "VecNormalize",
        ]
    assert model.get_env().venv.rule.qa.policy is model.policy


def test_training_goes_as_with_wrappers_put_outermost_by_hand() -> None:
    told = []
    for by_hand in (False, True):
        env = as_zoo_builds((lambda env: env) if by_hand else (lambda env: zoo.VecVetoAction(env, "fall[k=5]", 0.4)))
        model = learner(VecVetoAction(env, "fall[k=5]", 0.4) if by_hand else env)
        model.learn(192, callback=QACallback() if by_hand else zoo.QACallback())
        told.append([p.detach().clone() for p in model.policy.parameters()])
    assert all((a == b).all() for a, b in zip(*told, strict=True))


@pytest.fixture
def alone():
    """No model with questions of another test lives."""
    kept = list(LEARNERS)
    LEARNERS.clear()
    yield
    LEARNERS.update(kept)


@pytest.fixture
def enjoyed(alone):
    """An environment as enjoy builds it, and the model that is loaded after it."""
    env = as_zoo_builds(seats, training=False)
    rng = np.random.default_rng(0)
    normalize = env.venv
    normalize.obs_rms.mean, normalize.obs_rms.var = rng.normal(size=4), rng.uniform(0.5, 2.0, 4)
    return env, learner(as_zoo_builds(lambda env: env))


def test_enjoy_answers_by_what_the_policy_sees(enjoyed) -> None:
    env, model = enjoyed
    qa = QuestionAnswerer(model.policy)
    obs = env.reset()
    vetoes = ends = 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        proposed = rng.integers(2, size=2)
        risks = qa.ask("fall[k=5]", obs).probability
        obs, rewards, dones, infos = env.step(proposed)
        for i, info in enumerate(infos):
            assert info["qa/risk"] == pytest.approx(risks[i, proposed[i]], abs=1e-6)
            executed = proposed[i] if risks[i, proposed[i]] < 0.4 else np.argmin(risks[i])
            assert info["qa/executed_action"] == executed
            vetoes += info["qa/vetoed"]
            arrived = info["terminal_observation"] if dones[i] else obs[i]
            assert info["qa/angle"] == pytest.approx(float(qa.ask("angle", arrived[None]).value[0]), abs=1e-5)
        ends += dones.sum()
    assert vetoes and ends


def test_what_is_around_sees_what_it_would_have_seen(enjoyed) -> None:
    """The seat passes on observations and terminal observations as the environment made them."""
    env, _ = enjoyed
    bare = as_zoo_builds(lambda env: env, training=False)
    bare.venv.obs_rms = env.venv.obs_rms
    assert np.array_equal(env.reset(), bare.reset())
    ended = 0
    for _ in range(60):
        obs, _, dones, infos = env.step(np.zeros(2, np.int64))
        same = bare.step(np.array([info["qa/executed_action"] for info in infos]))
        assert np.array_equal(obs, same[0]) and np.array_equal(dones, same[2])
        for i in dones.nonzero()[0]:
            ended += 1
            assert np.array_equal(infos[i]["terminal_observation"], same[3][i]["terminal_observation"])
    assert ended


def test_a_saved_answerer_answers_in_a_seat(enjoyed, tmp_path: Path) -> None:
    env, model = enjoyed
    model.learn(64, callback=QACallback())  # its environment normalises, and so the file says so
    QuestionAnswerer.from_model(model).save(tmp_path / "driver.qa")
    LEARNERS.clear()
    env = as_zoo_builds(
        lambda env: zoo.VecVetoAction(env, question="fall[k=5]", threshold=0.4, qa=str(tmp_path / "driver.qa")),
        training=False,
    )
    env.reset()
    *_, infos = env.step(np.zeros(2, np.int64))
    assert 0.0 <= infos[0]["qa/risk"] <= 1.0


@pytest.mark.parametrize("models", [0, 2])
def test_a_seat_refuses_to_guess_whose_answers_count(alone, models: int) -> None:
    kept = [learner(make_vec_env("CartPole-v1", 1)) for _ in range(models)]
    env = seats(make_vec_env("CartPole-v1", 1))
    env.reset()
    with pytest.raises(QAError, match=rf"found {models or 'no'} models with questions.*expected one.*zoo\.QACallback"):
        env.step(np.zeros(1, np.int64))
    assert len(kept) == models


def test_the_plain_callback_is_refused_inside_a_normaliser_that_learns(alone) -> None:
    with pytest.raises(QAError, match=r"a step behind.*callback: sb3_qa\.zoo\.QACallback"):
        learner(as_zoo_builds(seats)).learn(64, callback=QACallback())


def test_bad_arguments_are_refused_when_the_seat_is_made() -> None:
    env = make_vec_env("CartPole-v1", 1)
    with pytest.raises(QAError, match="threshold"):
        zoo.VecVetoAction(env, question="fall[k=5]", threshold="high")
    with pytest.raises(QAError, match="leave it out"):
        zoo.VecVetoAction(env, question="fall[k=5]", threshold=0.5, unbound="pass")
    with pytest.raises(QAError, match="vec_env_wrapper"):
        zoo.VecAnswerQuestions(env.envs[0])
    with pytest.raises(QAError, match="no file"):
        zoo.VecAnswerQuestions(env, qa="none.qa")


def test_images_and_dictionaries_are_stacked_as_outside(alone) -> None:
    for space, base in ((IMAGE, "CnnPolicy"), (spaces.Dict({"one": VECTOR, "two": VECTOR}), "MultiInputPolicy")):
        env = zoo.VecAnswerQuestions(toys(2, observation_space=space))
        env = VecTransposeImage(VecFrameStack(env, 2))
        small = {"features_extractor_class": FlattenExtractor} if base == "CnnPolicy" else {}
        model = PPO(
            qa_policy(PPO, base),
            env,
            policy_kwargs={"questions": ABOUT_TOYS, **small},
            n_steps=8,
            batch_size=16,
            device="cpu",
        )
        obs = env.reset()
        qa = QuestionAnswerer(model.policy)
        for _ in range(7):
            obs, _, dones, infos = env.step(np.zeros(2, np.int64))
            for i in (~dones).nonzero()[0]:
                seen = (
                    {key: value[i : i + 1] for key, value in obs.items()} if isinstance(obs, dict) else obs[i : i + 1]
                )
                assert infos[i]["qa/danger"] == pytest.approx(float(qa.ask("danger", seen).probability[0]), abs=1e-6)
        LEARNERS.clear()
    assert set(KEYS) <= {key.removeprefix("qa/") for key in infos[0]}


def test_stacked_observations_are_told_in_their_own_units() -> None:
    env = as_zoo_builds(lambda env: env)
    raw = VecFrameStack(make_vec_env("CartPole-v1", 2, seed=0), 2)
    seen, expected = env.reset(), raw.reset()
    for _ in range(40):
        seen, _, dones, infos = env.step(np.ones(2, np.int64))
        expected, *_, plain = raw.step(np.ones(2, np.int64))
        newest = own_units(env, seen)
        assert newest[:, 4:] == pytest.approx(expected[:, 4:], abs=1e-5)
        for i in dones.nonzero()[0]:
            last = own_units(env, infos[i]["terminal_observation"])
            assert last[4:] == pytest.approx(plain[i]["terminal_observation"][4:], abs=1e-5)


def test_questions_of_a_class_stay_with_the_model(tmp_path: Path) -> None:
    """rl_zoo3's -optimize puts policy_kwargs of its own in the place of those that are given."""
    model = PPO(
        OwnQuestions, make_vec_env("CartPole-v1", 1), policy_kwargs={"net_arch": [8]}, n_steps=32, batch_size=32
    )
    model.learn(32, callback=QACallback())
    model.save(tmp_path / "model")
    expected = dict(
        qa_coef=0.5,
        qa_trunk_gradient=0.25,
        qa_net_arch=[16],
        qa_encoder="text",
        qa_sample=7,
        qa_readouts=["action_net"],
        action_names=["left", "right"],
    )
    kept = {name: vars(OwnQuestions)[name] for name in ["questions", *expected]}
    OwnQuestions.questions = [QUESTIONS[0]]
    for name in expected:
        delattr(OwnQuestions, name)
    try:
        loaded = PPO.load(tmp_path / "model")
    finally:
        for name, value in kept.items():
            setattr(OwnQuestions, name, value)
    for policy in (model.policy, loaded.policy):
        assert [question.name for question in policy.qa_head.catalogue.questions] == ["fall", "angle"]
        assert {name: policy.qa_kwargs[name] for name in expected} == expected
    with pytest.raises(QAError, match="class Mine"):
        PPO("QAMlpPolicy", make_vec_env("CartPole-v1", 1), policy_kwargs={"net_arch": [8]})


def test_what_is_given_counts_more_than_what_the_class_says() -> None:
    given = dict(questions=[QUESTIONS[1]], qa_coef=0.0, qa_net_arch=[], qa_encoder="index")
    policy = PPO(OwnQuestions, make_vec_env("CartPole-v1", 1), policy_kwargs=given).policy
    assert {name: policy.qa_kwargs[name] for name in ("qa_coef", "qa_net_arch", "qa_encoder", "qa_sample")} == dict(
        qa_coef=0.0, qa_net_arch=[], qa_encoder="index", qa_sample=7
    )
    assert list(policy.qa_head.catalogue.instances) == ["angle"]


def test_a_misspelt_attribute_of_a_class_is_refused() -> None:
    with pytest.raises(QAError, match=r"got qa_coeff, which no policy takes; expected one of 'qa_coef'"):
        type(QAMlpPolicy)("Mine", (QAMlpPolicy,), {"qa_coeff": 0.5})


class ExperimentManager:
    """What rl_zoo3's has when it makes a model, without rl_zoo3."""

    __module__ = "rl_zoo3.exp_manager"
    storage, study_name, trial_id = "trials.log", "mine", None
    optimize_hyperparameters = False
    given = {"questions": QUESTIONS, "qa_coef": 0.7, "net_arch": [16, 16]}

    def __init__(self, **options):
        vars(self).update(options)
        self._hyperparams = {"policy_kwargs": self.given}

    def read_hyperparameters(self):
        print("Loading hyperparameters")
        kwargs = repr(self.given) if self.trial_id is None else {"net_arch": [8]}
        return {"policy_kwargs": kwargs}, None

    def make(self, policy, learn=False):
        model = PPO(
            policy, make_vec_env("CartPole-v1", 1), n_steps=32, batch_size=32, policy_kwargs={"net_arch": [8]}, seed=0
        )
        return model.learn(32, callback=zoo.QACallback()) if learn else model


@pytest.mark.parametrize("way", [dict(optimize_hyperparameters=True), dict(trial_id=1)], ids=["optimize", "trial"])
def test_what_the_zoo_overwrites_is_kept(way, tmp_path: Path, capsys) -> None:
    """-optimize and --trial-id pass policy_kwargs of a trial in the place of those of the hyperparameters."""
    policy = import_module("sb3_qa.zoo.ppo").MlpPolicy
    model = ExperimentManager(**way).make(policy, learn=True)
    model.save(tmp_path / "model")
    for kept in (model, PPO.load(tmp_path / "model")):
        assert [question.name for question in kept.policy.qa_head.catalogue.questions] == ["fall", "angle"]
        assert kept.policy.qa_kwargs["qa_coef"] == 0.7 and kept.policy.net_arch == [8]
    assert "Loading" not in capsys.readouterr().out
    QuestionAnswerer.from_model(model).save(tmp_path / "driver.qa")
    assert QuestionAnswerer.load(tmp_path / "driver.qa").questions == ["fall[k=1]", "fall[k=5]", "angle"]
    plain = ExperimentManager().make(policy)
    assert [question.name for question in plain.policy.qa_head.catalogue.questions] == ["end"]
    assert plain.policy.qa_kwargs["qa_coef"] == 0.1


def test_what_another_class_would_lose_is_refused() -> None:
    with pytest.raises(
        QAError, match=r"OwnQuestions got no qa_coef of the hyperparameters.*sb3_qa\.zoo\.ppo\.MlpPolicy"
    ):
        ExperimentManager(optimize_hyperparameters=True).make(OwnQuestions, learn=True)
    same = {"questions": QUESTIONS, "qa_coef": 0.5}
    ExperimentManager(optimize_hyperparameters=True, given=same).make(OwnQuestions, learn=True)


ALGORITHMS = ["a2c", "crossq", "ddpg", "dqn", "ppo", "ppo_lstm", "qrdqn", "sac", "td3", "tqc", "trpo"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_policies_for_conf_are_found_by_name(name: str) -> None:
    module = import_module(f"sb3_qa.zoo.{name}")
    policy = module.MlpLstmPolicy if name == "ppo_lstm" else module.MlpPolicy
    assert pickle.loads(pickle.dumps(policy)) is policy
    assert policy.questions[0]["name"] == "end"
    with pytest.raises(AttributeError):
        _ = module.nothing
    if find_spec("rl_zoo3") is None:
        with pytest.raises(QAError, match=r"sb3-qa\[zoo\]"):
            _ = module.hyperparams
        return
    for entry in module.hyperparams.values():
        if entry["policy"] == "MlpPolicy" and name == "ppo_lstm":  # which that algorithm refuses itself
            assert "callback" not in entry
        else:
            assert getattr(module, entry["policy"].removeprefix(f"sb3_qa.zoo.{name}.")).questions
            assert entry["callback"][0] == "sb3_qa.zoo.QACallback"


# --- the command line ---

SETTINGS = """
CartPole-v1:
  n_envs: 2
  n_timesteps: 256
  n_steps: 64
  batch_size: 32
  n_epochs: 1
  {more}
  policy: sb3_qa.policies.QAMlpPolicy
  policy_kwargs:
    questions: questions.toml
  env_wrapper: gymnasium.wrappers.TimeAwareObservation
  vec_env_wrapper:
    - {package}.VecVetoAction: {{question: "fall[k=5]", threshold: 0.02, record: flight.sqlite}}
    - {package}.VecAnswerQuestions
  callback:
    - {package}.QACallback
"""
FILE = """
[[questions]]
name = "fall"
text = "Will the pole fall within {k} steps if I push {action}?"
truth = { eventually = { step = "terminated" }, within = "k" }
k = [1, 5]
"""
slow = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if find_spec("rl_zoo3") is None:
        pytest.skip("rl_zoo3 is not installed: pip install 'sb3-qa[zoo]'")
    (tmp_path / "questions.toml").write_text(FILE)
    more = "normalize: true\n  frame_stack: 2"
    (tmp_path / "ppo.yml").write_text(SETTINGS.format(more=more, package="sb3_qa.zoo"))
    (tmp_path / "policies.py").write_text(
        "from sb3_qa.policies import QAMlpPolicy\n\n\nclass Mine(QAMlpPolicy):\n    questions = 'questions.toml'\n"
    )
    return tmp_path


def run(folder: Path, command: str, *arguments: str, fails: str | None = None) -> str:
    """What a command of the zoo prints; with ``fails``, what it is to say when it stops."""
    line = [sys.executable, "-m", f"rl_zoo3.{command}", "--env", "CartPole-v1", "-f", "logs", "--seed", "1", *arguments]
    paths = os.pathsep.join([".", str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        line,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        start_new_session=True,
    )
    assert (done.returncode != 0) == (fails is not None), done.stdout
    assert fails is None or fails in done.stdout, done.stdout
    return done.stdout


def train(folder: Path, *arguments: str, algo: str = "ppo", fails: str | None = None) -> str:
    return run(folder, "train", "--algo", algo, "--eval-freq", "100", "--eval-episodes", "1", *arguments, fails=fails)


def enjoy(folder: Path, *arguments: str, algo: str = "ppo", fails: str | None = None) -> str:
    return run(folder, "enjoy", "--algo", algo, "--no-render", "-n", "40", *arguments, fails=fails)


def vetoes(folder: Path) -> int:
    with FlightLog(folder / "flight.sqlite") as log:
        return sum(event.vetoed for event in log.events())


def flags(folder: Path) -> int:
    with FlightLog(folder / "flight.sqlite") as log:
        return sum(event.flagged for event in log.events())


@slow
@pytest.mark.parametrize("kind", ["dummy", "subproc"])
def test_train_enjoy_and_go_on(folder: Path, kind: str) -> None:
    told = train(folder, "-conf", "ppo.yml", "--vec-env", kind)
    assert "fall/brier" in told and "veto_rate" in told
    trained = vetoes(folder)
    assert trained > 0
    assert "Stacking 2 frames" in enjoy(folder)
    enjoyed = vetoes(folder)
    assert enjoyed > trained
    enjoy(folder, "--n-envs", "2", "--load-best")
    assert vetoes(folder) > enjoyed
    model = "logs/ppo/CartPole-v1_1/CartPole-v1.zip"
    assert "fall/brier" in train(folder, "-conf", "ppo.yml", "--vec-env", kind, "-i", model)
    assert (
        PPO.load(folder / "logs/ppo/CartPole-v1_2/CartPole-v1.zip").policy.qa_head.catalogue.questions[0].name == "fall"
    )


@slow
def test_enjoy_refuses_a_veto_that_nobody_answers(folder: Path) -> None:
    (folder / "plain.yml").write_text(
        SETTINGS.format(more="", package="sb3_qa.wrappers").replace(
            "sb3_qa.wrappers.QACallback", "sb3_qa.callbacks.QACallback"
        )
    )
    train(folder, "-conf", "plain.yml")
    enjoy(folder, fails="has no answerer yet")


@slow
def test_a_wrapper_of_one_environment_with_a_saved_answerer(folder: Path) -> None:
    train(folder, "-conf", "sb3_qa.zoo.ppo", "--hyperparams", "n_steps:32", "n_timesteps:256")
    model = PPO.load(folder / "logs/ppo/CartPole-v1_1/CartPole-v1.zip")
    QuestionAnswerer.from_model(model).save(folder / "driver.qa")
    veto = "[{'sb3_qa.wrappers.VetoAction': dict(question='end[k=5]', threshold=0.02, qa='driver.qa', record='flight.sqlite')}]"
    train(folder, "-conf", "sb3_qa.zoo.ppo", "--hyperparams", "n_steps:32", "n_timesteps:256", f"env_wrapper:{veto}")
    trained = vetoes(folder)
    enjoy(folder)
    assert vetoes(folder) > trained > 0


@slow
def test_optimize_keeps_questions_or_stops(folder: Path) -> None:
    search = [
        "-n",
        "128",
        "-optimize",
        "--n-trials",
        "1",
        "--sampler",
        "random",
        "--pruner",
        "none",
        "--no-optim-plots",
    ]
    told = train(folder, "-conf", "ppo.yml", *search, fails="class Mine(QAMlpPolicy)")
    assert "Best trial" not in told
    told = train(
        folder,
        "-conf",
        "ppo.yml",
        *search,
        "--optimization-log-path",
        "trials",
        "--hyperparams",
        "policy:'policies.Mine'",
    )
    assert "Best trial" in told
    sys.path.insert(0, str(folder))
    try:
        model = PPO.load(folder / "trials/trial_0/best_model.zip")
    finally:
        sys.path.remove(str(folder))
    assert model.policy.qa_head.catalogue.questions[0].name == "fall"


@slow
def test_optimize_and_its_trials_keep_what_a_file_says(folder: Path) -> None:
    """By the zoo's own policies, without a class of one's own."""
    study = ["--storage", "study.log", "--study-name", "mine", "-n", "128"]
    search = ["-optimize", "--n-trials", "2", "--sampler", "random", "--pruner", "none", "--no-optim-plots"]
    settings = (folder / "ppo.yml").read_text().replace("sb3_qa.policies.QAMlpPolicy", "sb3_qa.zoo.ppo.MlpPolicy")
    (folder / "ppo.yml").write_text(settings.replace("toml\n", "toml\n    qa_coef: 0.7\n", 1))
    told = train(folder, "-conf", "ppo.yml", *study, *search, "--optimization-log-path", "trials")
    assert "Best trial" in told
    train(folder, "-conf", "ppo.yml", *study, "--trial-id", "1")
    (trained,) = folder.glob("logs/ppo/*/CartPole-v1.zip")
    for path in (folder / "trials/trial_0/best_model.zip", trained):
        policy = PPO.load(path).policy
        assert policy.qa_head.catalogue.questions[0].name == "fall" and policy.qa_kwargs["qa_coef"] == 0.7


@slow
@pytest.mark.parametrize("algo", ["dqn", "a2c"])
def test_conf_of_other_algorithms(folder: Path, algo: str) -> None:
    veto = "[{'sb3_qa.zoo.VecVetoAction': dict(question='end[k=5]', threshold=0.0001, record='flight.sqlite')}]"
    more = ["learning_starts:50", "buffer_size:1000"] if algo == "dqn" else ["n_steps:32"]
    told = train(
        folder, "-n", "300", "-conf", f"sb3_qa.zoo.{algo}", "--hyperparams", f"vec_env_wrapper:{veto}", *more, algo=algo
    )
    assert "Saving to" in told
    assert vetoes(folder) > 0
    trained = flags(folder)  # what a greedy agent proposes may be the safest already, and so not vetoed
    enjoy(folder, algo=algo)
    assert flags(folder) > trained
