"""What is said in a conversation with an agent: lines in, answers and what the environment looks like out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answers import Answer, ChoiceAnswer, NumberAnswer, YesNoAnswer
from sb3_qa.cli.agents import Agent
from sb3_qa.errors import QAError
from sb3_qa.memory import Memory
from sb3_qa.questions import Instance
from sb3_qa.wrappers.surroundings import action_masks

__all__ = ["Conversation"]

BAR = 20  # columns of a full bar
SHADES = " .:-=+*#%@"
WHAT_IF = re.compile(r"what (?:if|happens if|would happen if) (?:i|you|we|it) (?P<rest>.+)", re.IGNORECASE)
HELP = """\
A question, in words or by its key, is answered for the state that is shown; a question about actions for every action.
  what if I ACTION             all questions about that action, beside the agent's own choice
  what if I ACTION: QUESTION   one question about it
  questions                    what it was taught
  actions                      the actions by name
  step [N]   (or just Enter)   let the agent act, once or N times
  do ACTION                    take another action than the agent would
  show                         the state again
  reset [SEED]                 a new episode
  help, quit
Tab completes; the arrow keys bring back what was typed before."""


class Conversation:
    """Steps an environment and answers.

    :param agent: who acts and answers
    :param env: one environment, as the policy sees it
    :param console: where everything is written
    :param deterministic: whether the agent takes the action that it likes best
    :param show: whether the state is shown after each step
    :param width: columns that a frame is drawn in
    """

    def __init__(
        self,
        agent: Agent,
        env: VecEnv,
        console: Console,
        *,
        deterministic: bool = True,
        show: bool = True,
        width: int = 60,
    ) -> None:
        self.agent, self.env, self.console = agent, env, console
        self.deterministic, self.show, self.width = deterministic, show, width
        self.qa = agent.qa
        self.n_steps = 0
        self.total = 0.0
        self.obs: Any = None
        self.memory: Memory | None = None  # of an agent with an LSTM
        self.masked: bool = env.has_attr("action_masks")

    @property
    def prompt(self) -> str:
        """What stands before the cursor."""
        return f"[step {self.n_steps}] > "

    @property
    def completions(self) -> list[str]:
        """All that can be completed: questions by key and by text, commands, actions."""
        names = self.qa.action_names or []
        texts = [instance.text for instance in self.qa.catalogue.instances.values()]
        commands = ["questions", "actions", "step ", "show", "reset ", "help", "quit"]
        about = [f"{before}{name}" for before in ("do ", "what if I choose ") for name in names]
        return [*self.qa.questions, *texts, *commands, *about]

    def begin(self, seed: int | None = None) -> None:
        """Begin an episode, and show its first state."""
        if seed is not None:
            self.env.seed(seed)
        self.obs = self.env.reset()
        self.memory = self.qa.blank(self.obs)
        self.n_steps, self.total = 0, 0.0
        self.console.print("A new episode. Ask, or type `help`.", style="bold")
        self._show()

    def say(self, line: str) -> bool:
        """Answer one line; False when it ends the conversation.

        :raises QAError: for a question or an action that is not known
        """
        word, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "": lambda _: self._step(1),
            "step": lambda rest: self._step(_number(rest, 1)),
            "do": self._do,
            "reset": lambda rest: self.begin(_number(rest, None) if rest else None),
            "questions": lambda _: self._questions(),
            "actions": lambda _: self._actions(),
            "show": lambda _: self._show(force=True),
            "help": lambda _: self.console.print(HELP, markup=False),
        }
        if line.strip().lower() in ("quit", "exit", "q"):
            return False
        command = commands.get(word.lower())
        # "Do I lean left?" is a question, "do left" is not.
        if command is not None and not (rest and line.rstrip().endswith("?")) and self._is_command(word.lower(), rest):
            command(rest.strip())
        elif what_if := WHAT_IF.match(line.strip()):
            self._what_if(what_if["rest"])
        else:
            self._answer(line.strip())
        return True

    @staticmethod
    def _is_command(word: str, rest: str) -> bool:
        return word in ("do", "step", "reset") or not rest

    # --- the environment -----------------------------------------------------------------------------------------------
    def _step(self, n: int, action: NDArray[Any] | None = None) -> None:
        for _ in range(n):
            taken = self._choice(deterministic=self.deterministic) if action is None else action
            after = self.qa.read(self.obs, self.memory) if self.memory is not None else None
            self.obs, rewards, dones, infos = self.env.step(taken)
            self.memory = None if after is None else after.remembered(dones)
            self.n_steps, self.total = self.n_steps + 1, self.total + float(rewards[0])
            who = "the agent chose" if action is None else "you chose"
            self.console.print(
                f"{who} {self._name(taken[0])}; reward {float(rewards[0]):.3g}, {self.total:.3g} so far", markup=False
            )
            if dones[0]:
                how = "at its time limit" if infos[0].get("TimeLimit.truncated", False) else "by itself"
                self.console.print(
                    f"The episode ended {how} after {self.n_steps} steps, with a return of {self.total:.4g}.",
                    style="bold",
                )
                self.begin()
                return
        self._show()

    def _choice(self, *, deterministic: bool) -> NDArray[Any]:
        """The action (1, ...) that the agent chooses of what the environment allows."""
        masks = action_masks(self.env) if self.masked else None
        return self.agent.act(self.obs, self.memory, deterministic=deterministic, action_masks=masks)

    def _do(self, name: str) -> None:
        self._step(1, np.asarray(self._action(name))[None])

    def _show(self, force: bool = False) -> None:
        if not (self.show or force):
            return
        frame = self.env.render() if self.env.render_mode in ("ansi", "rgb_array") else None
        if isinstance(frame, str):
            self.console.print(frame, markup=False)
        elif isinstance(frame, np.ndarray):
            self.console.print(picture(frame, self.width, colours=self.console.is_terminal))
        else:
            self.console.print(f"observation {_in_words(self.obs)}", markup=False)

    # --- questions -----------------------------------------------------------------------------------------------------
    def _answer(self, question: str) -> None:
        mine = [i for i in self.qa.catalogue.instances.values() if i.question.name == question]
        if mine and question not in self.qa.catalogue.instances:  # a name: all its instances
            for instance in mine:
                self.console.print(Text(_with_actions(instance), style="italic"))
                self._answer(instance.key)
            return
        answer = self._ask(question)
        if (
            answer.familiarity < 1.0 or answer.understood_as not in self.qa.catalogue.instances
        ):  # it was not taught as such
            taken = f"understood as {answer.understood_as}, familiarity {answer.familiarity:.2f}"
            self.console.print(taken, style="italic", markup=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        for label, text in self._rows(answer):
            table.add_row(Text(label), text)
        self.console.print(table)

    def _ask(self, question: str, action: Any = None) -> Answer:
        if self.memory is None:
            return self.qa.ask(question, self.obs, action)
        hidden, cell, *of_critic = self.memory.state
        state = (hidden, cell), tuple(of_critic)
        return self.qa.ask(question, self.obs, action, state=state, episode_start=self.memory.starts)

    def _rows(self, answer: Answer) -> list[tuple[str, Text]]:
        """An answer about one state in lines: what they are about, and what is said."""
        per_action = np.ndim(answer.value) == 2
        labels = list(self.qa.action_names or []) if per_action else [""]
        chosen = self._choice(deterministic=True)[0] if per_action else None
        rows: list[tuple[str, Text]] = []
        for n, label in enumerate(labels):
            part = _part(answer, (0, n) if per_action else (0,))
            lines = in_words(part)
            if chosen is not None and n == int(chosen) - int(self.env.action_space.start):  # type: ignore[attr-defined]
                lines[0].append("  <- the agent's choice", style="bold")
            rows += [(label if not m else "", line) for m, line in enumerate(lines)]
        return rows

    def _what_if(self, rest: str) -> None:
        what, _, question = (part.strip() for part in rest.partition(":"))
        what = what.rstrip("? ")
        action = self._action(what)
        if question:
            self._table({what: action}, [question])
            return
        about = [i.key for i in self.qa.catalogue.instances.values() if i.per_action]
        if not about:
            raise QAError(
                "the answerer was taught no questions about actions; expected some with {action} in their text; ask about the state instead"
            )
        own = self._choice(deterministic=True)[0]
        same = np.array_equal(action, own)
        mine = {f"{self._name(own)} (the agent's choice)": own}
        self._table(mine if same else {self._name(action): action} | mine, about)

    def _table(self, actions: dict[str, Any], questions: list[str]) -> None:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for name in actions:
            table.add_column(f"if I choose\n{name}", no_wrap=True)
        for question in questions:
            answers = [self._ask(question, np.asarray(action)[None]) for action in actions.values()]
            table.add_row(Text(question), *[Text("\n").join(in_words(_part(answer, (0,)))) for answer in answers])
        self.console.print(table)

    def _questions(self) -> None:
        table = Table(box=None, pad_edge=False)
        table.add_column("key")
        table.add_column("question")
        for instance in self.qa.catalogue.instances.values():
            table.add_row(Text(instance.key), Text(_with_actions(instance)))
        self.console.print(table)

    def _actions(self) -> None:
        if self.qa.action_names is None:
            self.console.print(f"{self.env.action_space}: type numbers, e.g. `do 0.5 -1`", markup=False)
        else:
            self.console.print(", ".join(self.qa.action_names), markup=False)

    def _action(self, words: str) -> Any:
        """The action that some words name: "main", "choose main engine", "0.5 -1"."""
        space, names = self.env.action_space, self.qa.action_names
        if isinstance(space, spaces.Discrete):
            found = [
                n for n, name in enumerate(names or []) if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words, re.I)
            ]
            longest = max((len(names[n]) for n in found), default=0) if names else 0
            found = [n for n in found if names and len(names[n]) == longest]
            if len(found) == 1:
                return found[0] + int(space.start)
            raise QAError(f"got the action {words!r}; expected one of {names}; name one of them")
        numbers = re.findall(r"-?\d+(?:\.\d*)?(?:e-?\d+)?", words)
        action = np.array([float(number) for number in numbers])
        if action.size != int(np.prod(space.shape or ())):
            raise QAError(f"got the action {words!r}; expected {int(np.prod(space.shape or ()))} numbers for {space}")
        shaped = action.reshape(space.shape or ()).astype(space.dtype)
        if not space.contains(shaped):
            raise QAError(f"got the action {words!r}; expected one in {space}; give numbers in its bounds")
        return shaped

    def _name(self, action: Any) -> str:
        if self.qa.action_names is not None and isinstance(self.env.action_space, spaces.Discrete):
            return self.qa.action_names[int(action) - int(self.env.action_space.start)]
        return str(np.round(action, 3))


def in_words(answer: Answer) -> list[Text]:
    """An answer of no dimensions in lines: a probability with a bar, a number with its interval, a bar for each option."""
    if isinstance(answer, YesNoAnswer):
        return [_bar(float(answer.probability))]
    if isinstance(answer, ChoiceAnswer):
        width = max(len(str(option)) for option in answer.options)
        likeliest = int(answer.value)
        lines = []
        for n, (option, probability) in enumerate(zip(answer.options, answer.probabilities, strict=True)):
            name = Text(f"{option!s:{width}} ", style="bold" if n == likeliest else "")
            lines.append(name.append(_bar(float(probability))))
        return lines
    assert isinstance(answer, NumberAnswer)
    low, high = answer.interval(0.9)
    return [Text(f"{float(answer.mean):.3g}, with 90 % between {float(low):.3g} and {float(high):.3g}")]


def picture(frame: NDArray[np.uint8], width: int, *, colours: bool) -> Text:
    """A frame (height, width, 3) in characters, two pixels in each: in colours, or else in shades."""
    height = max(2, round(frame.shape[0] * width / frame.shape[1] / 2) * 2)
    small = _shrunk(_shrunk(frame.astype(np.float64), height, 0), width, 1)
    text = Text(no_wrap=True)
    if colours:
        for upper, lower in zip(small[::2].astype(int), small[1::2].astype(int), strict=True):
            for a, b in zip(upper.tolist(), lower.tolist(), strict=True):
                text.append("▀", style=f"rgb({a[0]},{a[1]},{a[2]}) on rgb({b[0]},{b[1]},{b[2]})")
            text.append("\n")
        return text
    grey = small.mean(axis=2).reshape(height // 2, 2, width).mean(axis=1) / 255
    empty = float(np.median(grey) > 0.5)  # what most of it looks like stays blank
    shade = np.rint(np.abs(grey - empty) * (len(SHADES) - 1)).astype(int)
    for line in shade.tolist():
        text.append("".join(SHADES[n] for n in line) + "\n")
    return text


def _shrunk(image: NDArray[np.float64], n: int, axis: int) -> NDArray[np.float64]:
    """``n`` averages along an axis."""
    edges = np.linspace(0, image.shape[axis], n + 1).astype(int)[:-1]
    counts = np.diff([*edges, image.shape[axis]])
    summed = np.add.reduceat(image, edges, axis=axis)
    return np.asarray(summed / counts.reshape([-1 if dim == axis else 1 for dim in range(image.ndim)]))


def _bar(probability: float) -> Text:
    if not np.isfinite(probability):
        return Text("not finite: count it as a catastrophe", style="red")
    full = round(probability * BAR)
    percent = f"{100 * probability:.0f} %" if 0.01 <= probability <= 0.99 or probability in (0.0, 1.0) else None
    percent = percent or (f"{100 * probability:.2g} %" if probability < 0.5 else f"{100 * probability:.4g} %")
    return Text(f"{percent:>8} ").append("█" * full, style="cyan").append("·" * (BAR - full), style="dim")


def _part(answer: Answer, index: tuple[int, ...]) -> Answer:
    """The answer about one observation, and action."""
    if isinstance(answer, YesNoAnswer):
        return YesNoAnswer(answer.probability[index])
    if isinstance(answer, ChoiceAnswer):
        return ChoiceAnswer(answer.options, answer.probabilities[index])
    assert isinstance(answer, NumberAnswer)
    return NumberAnswer(answer.support, answer.probabilities[index], answer._whole)


def _with_actions(instance: Instance) -> str:
    return instance.text.replace("{action}", "ACTION")


def _number(text: str, default: int | None) -> Any:
    if not text:
        return default
    if not text.isdigit():
        raise QAError(f"got {text!r}; expected a whole number; write e.g. `step 5`")
    return int(text)


def _in_words(obs: Any) -> str:
    if isinstance(obs, dict):
        return ", ".join(f"{key} {_in_words(value)}" for key, value in obs.items())
    return np.array2string(np.asarray(obs)[0], precision=3, suppress_small=True, threshold=20)
