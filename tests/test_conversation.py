"""A conversation in the terminal: what is typed, and what comes back."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_qa import Choice, Number, QAError, Question, QuestionAnswerer
from sb3_qa.__main__ import main
from sb3_qa.callbacks import QACallback
from sb3_qa.cli.agents import as_seen_by, load_agent, make_env
from sb3_qa.cli.conversation import Conversation, picture
from sb3_qa.evaluation import run_episodes
from sb3_qa.memory import Memory
from sb3_qa.truth import after, eventually, now

QUESTIONS = [
    Question(
        "Will I fall within {k} steps if I choose {action}?",
        eventually(lambda step: step.terminated, within="k"),
        k=[2, 10],
        name="fall",
    ),
    Question(
        "Which way do I lean?",
        now(lambda step: "left" if step.obs[2] < 0 else "right"),
        Choice("left", "right"),
        "lean",
    ),
    Question("How fast will I be in 3 steps?", after(lambda step: step.obs[1], steps=3), Number(-3, 3), name="speed"),
    Question("Do I move left?", now(lambda step: step.obs[1] < 0), name="moves_left"),
]
NAMES = ["push left", "push right"]


def train(algorithm: Any = PPO, encoder: str = "index", **kwargs: Any) -> Any:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    policy_kwargs = dict(questions=QUESTIONS, action_names=NAMES, qa_encoder=encoder)
    model = algorithm("QAMlpPolicy", env, seed=0, policy_kwargs=policy_kwargs, **kwargs)
    return model.learn(256, callback=QACallback())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    model = train(n_steps=64)
    model.save(folder / "cart.zip")
    QuestionAnswerer.from_model(model).save(folder / "cart.qa")
    return folder


def talk(path: Path, *lines: str, env_id: str = "CartPole-v1", **kwargs: Any) -> str:
    agent = load_agent(path)
    env = as_seen_by(agent, make_env(env_id, render=False))
    out = io.StringIO()
    conversation = Conversation(agent, env, Console(file=out, width=100, highlight=False), **kwargs)
    conversation.begin(seed=0)
    out.truncate(0), out.seek(0)
    for line in lines:
        conversation.say(line)
    return out.getvalue()


@pytest.mark.parametrize("name", ["cart.zip", "cart.qa"])
def test_answers_are_the_answerers(files: Path, name: str) -> None:
    qa = QuestionAnswerer.load(files / "cart.qa")
    env = make_env("CartPole-v1", render=False)
    env.seed(0)
    obs = env.reset()
    said = talk(files / name, "fall[k=10]")
    shares = [int(x) for x in re.findall(r"(\d+) %", said)]
    np.testing.assert_allclose(shares, 100 * qa.ask("fall[k=10]", obs).probability[0], atol=0.51)
    choice = NAMES[int(qa.read(obs).preferred()[0])]
    assert next(line for line in said.splitlines() if "<- the agent's choice" in line).startswith(choice)
    said = talk(files / name, "How fast will I be in 3 steps?")
    answer = qa.ask("speed", obs)
    numbers = [float(answer.mean[0]), *(float(bound[0]) for bound in answer.interval(0.9))]
    assert [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-\d+)?", said.replace("90 %", ""))] == pytest.approx(
        numbers, rel=0.01
    )
    said = talk(files / name, "lean")
    assert re.findall(r"(left|right) +(\d+) %", said)[0][1] == f"{100 * qa.ask('lean', obs).probabilities[0, 0]:.0f}"


def test_what_was_not_taught_as_such_is_told_with_its_familiarity(tmp_path: Path) -> None:
    train(encoder="text", n_steps=64).save(tmp_path / "words.zip")
    assert "understood as" not in talk(tmp_path / "words.zip", "fall[k=10]", "Do I move left?")
    said = talk(tmp_path / "words.zip", "Will I fall within 5 steps if I choose push left?")
    assert "understood as fall[k=5], familiarity " in said


def test_what_if_compares_an_action_with_the_agents_own(files: Path) -> None:
    said = talk(files / "cart.qa", "what if I choose push right?")
    assert "if I choose" in said and "push right" in said and "(the agent's choice)" in said
    assert "fall[k=2]" in said and "fall[k=10]" in said and "lean" not in said
    said = talk(
        files / "cart.qa", "What would happen if I push right: Will I fall within 2 steps if I choose {action}?"
    )
    assert said.count("%") == 1
    assert "push left" in talk(files / "cart.qa", "Will I fall within 2 steps if I choose push left?", "actions")


def test_the_environment_goes_on_as_told(files: Path) -> None:
    said = talk(files / "cart.zip", "", "step 2", "do push left", "do push right")
    assert said.count("the agent chose") == 3 and said.count("you chose") == 2 and "reward 1, 5 so far" in said
    assert said.count("observation [") == 4  # after the last of several steps only
    assert "observation" not in talk(files / "cart.zip", "step", show=False)
    falls = talk(files / "cart.zip", *["do push left"] * 12)
    assert "The episode ended by itself after" in falls and "A new episode." in falls
    assert talk(files / "cart.zip", "reset 3", "show") != talk(files / "cart.zip", "reset 4", "show")


def test_words_that_begin_like_commands_are_questions_all_the_same(files: Path) -> None:
    assert "%" in talk(files / "cart.qa", "Do I move left?")
    assert talk(files / "cart.qa", "fall").count("Will I fall within") == 2  # a name: all its instances
    assert "what if I ACTION" in talk(files / "cart.qa", "help")
    assert "Will I fall within 10 steps if I choose ACTION?" in talk(files / "cart.qa", "questions")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("What is love?", "was not taught 'What is love"),
        ("do nothing", r"got the action 'nothing'; expected one of \['push left', 'push right'\]"),
        ("step far", "got 'far'; expected a whole number"),
        ("what if I choose push left: lean", "is not about an action"),
    ],
)
def test_what_cannot_be_understood_is_told(files: Path, line: str, message: str) -> None:
    with pytest.raises(QAError, match=message):
        talk(files / "cart.qa", line)


def test_questions_and_commands_are_completed(files: Path) -> None:
    agent = load_agent(files / "cart.qa")
    talk_ = Conversation(agent, make_env("CartPole-v1", render=False), Console(file=io.StringIO()))
    assert {"fall[k=10]", "Which way do I lean?", "what if I choose push left", "help"} <= set(talk_.completions)


def test_a_frame_is_drawn_in_shades_and_in_colours() -> None:
    frame = np.full((40, 80, 3), 255, np.uint8)
    frame[:, :40] = 0
    frame[30:] = 255
    lines = picture(frame, 20, colours=False).plain.splitlines()
    assert len(lines) == 5 and all(len(line) == 20 for line in lines)
    assert lines[0] == "@" * 10 + " " * 10 and lines[4] == " " * 20
    styled = picture(frame, 20, colours=True)
    assert str(styled.spans[0].style) == "rgb(0,0,0) on rgb(0,0,0)" and len(styled.plain.splitlines()) == 5


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])
def test_the_algorithm_of_a_model_is_found(algorithm: Any, tmp_path: Path) -> None:
    train(algorithm).save(tmp_path / "model.zip")
    assert type(load_agent(tmp_path / "model.zip").model) is algorithm


def test_an_agent_with_an_lstm_is_asked_with_what_it_remembers(tmp_path: Path) -> None:
    from sb3_contrib import RecurrentPPO

    env = make_vec_env("CartPole-v1", 2, seed=0)
    kwargs = dict(questions=QUESTIONS, action_names=NAMES, lstm_hidden_size=8)
    model = RecurrentPPO("QAMlpLstmPolicy", env, n_steps=32, seed=0, policy_kwargs=kwargs)
    model.learn(64, callback=QACallback()).save(tmp_path / "lstm.zip")
    said = talk(tmp_path / "lstm.zip", "step 3", "fall[k=10]", show=False).splitlines()[-2:]
    agent, one = load_agent(tmp_path / "lstm.zip"), make_env("CartPole-v1", render=False)
    one.seed(0)
    obs, state, starts = one.reset(), None, np.array([True])
    for _ in range(3):
        action = agent.qa.read(
            obs, agent.qa.blank(obs) if state is None else Memory.given(agent.qa.policy, 1, state, starts)
        )
        state, starts = agent.qa.remember(obs, state, starts), np.array([False])
        obs = one.step(action.preferred())[0]
    known = agent.qa.ask("fall[k=10]", obs, state=state, episode_start=starts).probability[0]
    np.testing.assert_allclose([int(re.findall(r"(\d+) %", line)[0]) for line in said], 100 * known, atol=0.51)


class Forbidding(gym.Wrapper[Any, Any, Any, Any]):
    """A cart that must be pushed to the left and to the right by turns."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(gym.make("CartPole-v1", **kwargs))

    def reset(self, **kwargs: Any) -> Any:
        self.n = 0
        return self.env.reset(**kwargs)

    def action_masks(self) -> list[bool]:
        return [self.n % 2 == 0, self.n % 2 == 1]

    def step(self, action: Any) -> Any:
        assert self.action_masks()[action], f"{action} is forbidden"
        self.n += 1
        return self.env.step(action)


def test_a_masked_agent_is_told_what_is_allowed(tmp_path: Path) -> None:
    """A model and an answerer, in a conversation and in the episodes of a report."""
    from sb3_contrib import MaskablePPO

    gym.register("Forbidding-v0", Forbidding)
    env = make_vec_env(Forbidding, 2, seed=0)
    kwargs = dict(questions=QUESTIONS, action_names=NAMES)
    model = MaskablePPO("QAMlpPolicy", env, n_steps=32, batch_size=32, seed=0, policy_kwargs=kwargs)
    model.learn(64, callback=QACallback()).save(tmp_path / "masked.zip")
    QuestionAnswerer.from_model(model).save(tmp_path / "masked.qa")
    for name in ("masked.zip", "masked.qa"):
        said = talk(tmp_path / name, "step 5", "what if I push left", "fall[k=2]", env_id="Forbidding-v0")
        assert re.findall("the agent chose (.*);", said) == [NAMES[n % 2] for n in range(5)]
        assert re.search(r"push right +\(the agent's choice\)", said)
        assert re.search(r"push right .*<- the agent's choice", said)
        agent, env = load_agent(tmp_path / name), make_env("Forbidding-v0", render=False, n_envs=2, seed=0)
        assert len(run_episodes(agent, env, 3, catastrophe=lambda step: step.terminated).lengths) == 3


def test_files_and_environments_that_do_not_fit_are_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(QAError, match="there is no file"):
        load_agent(tmp_path / "none.zip")
    PPO("MlpPolicy", "CartPole-v1").save(tmp_path / "plain.zip")
    with pytest.raises(QAError, match="holds a model without questions"):
        load_agent(tmp_path / "plain.zip")
    with pytest.raises(QAError, match="expected one of .*'dqn'"):
        load_agent(files / "cart.zip", "alphazero")
    (tmp_path / "bad.zip").write_text("no model")
    with pytest.raises(QAError, match=r"bad.zip' could not be read .*; expected a model"):
        load_agent(tmp_path / "bad.zip")
    with pytest.raises(QAError, match="--algorithm got 'sac', and SAC could not load"):
        load_agent(files / "cart.zip", "sac")
    for name in ("Nope-v1", "no_such_module:CartPole-v1"):
        with pytest.raises(QAError, match=f"--env got '{name}'"):
            make_env(name)
    with pytest.raises(QAError, match="expected a JSON object"):
        make_env("CartPole-v1", "[1]")
    with pytest.raises(QAError, match=r"--env-kwargs got .*foo.*; expected arguments that CartPole-v1 takes"):
        make_env("CartPole-v1", '{"foo": 1}')
    with pytest.raises(QAError, match="--frame-stack got 0; expected at least 1"):
        make_env("CartPole-v1", frame_stack=0)
    with pytest.raises(QAError, match="--seed got -1"):
        make_env("CartPole-v1", seed=-1)
    with pytest.raises(QAError, match="expected those of the agent"):
        as_seen_by(load_agent(files / "cart.qa"), make_env("Acrobot-v1", render=False))


def test_a_piped_conversation_reads_as_one(files: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sb3_qa", "ask", str(files / "cart.qa"), "--env", "CartPole-v1", "--width", "30"],
        input="fall[k=2]\n\nWhat is love?\nquit\n",
        capture_output=True,
        text=True,
        env={**os.environ, "SDL_VIDEODRIVER": "dummy"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[step 0] > fall[k=2]" in done.stdout and "[step 1] > What is love?" in done.stdout
    assert "was not taught" in done.stdout and "\x1b[" not in done.stdout  # no colours where there is no terminal


def test_usage_and_errors_of_the_command_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "ask" in capsys.readouterr().out
    assert main(["sing"]) == 2 and "no command 'sing'" in capsys.readouterr().err
    assert main(["ask", str(files / "none.qa"), "--env", "CartPole-v1"]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert main(["ask", str(files / "cart.qa"), "--env", "CartPole-v1", "--seed", "-1"]) == 1
    assert "--seed got -1" in capsys.readouterr().err
