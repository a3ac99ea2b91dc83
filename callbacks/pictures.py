"""What TensorBoard is shown beside scalars: reliability diagrams, survival curves, and hyperparameters."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Figure, HParam, Logger, TensorBoardOutputFormat

from sb3_qa import scores
from sb3_qa.answers import Answer, YesNoAnswer
from sb3_qa.bounds import check_whole
from sb3_qa.head import survival
from sb3_qa.questions import Choice, Instance, Number, Question

__all__ = ["Pictures", "draws", "log_hparams"]

ONLY_TENSORBOARD = ("stdout", "log", "json", "csv")
MOST_CURVES = 6  # in one diagram: as many as there are colours that everybody tells apart


def draws(logger: Logger) -> bool:
    """Whether somebody looks at figures."""
    return any(isinstance(output, TensorBoardOutputFormat) for output in logger.output_formats)


class Pictures:
    """Collects answers and what came true of them, and draws them every so many steps.

    :param every: environment steps between figures; each shows the answers since the one before
    """

    def __init__(self, every: int) -> None:
        self.every = check_whole("QACallback", "figures", every)
        _drawing()  # what is missing is said now, and not after an hour
        self._drawn = 0
        self._clear()

    def _clear(self) -> None:
        self._texts: dict[str, str] = {}
        self._answers: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {}
        self._curves: dict[str, tuple[list[Any], list[Any], list[Any]]] = {}

    def start(self, num_timesteps: int) -> None:
        """Training starts, or goes on, after so many environment steps."""
        self._drawn = num_timesteps
        self._clear()

    def see(self, instance: Instance, answer: Answer, truth: NDArray[np.float32]) -> None:
        """Take in answers (n,) to a yes/no instance; to others there is no such diagram."""
        if isinstance(answer, YesNoAnswer):
            said, happened = self._answers.setdefault(instance.question.name, {}).setdefault(instance.key, ([], []))
            self._texts[instance.question.name] = instance.question.text
            said.append(answer.probability)
            happened.append(truth)

    def see_curves(
        self, instance: Instance, logits: NDArray[np.float32], known: NDArray[Any], event: NDArray[np.bool_]
    ) -> None:
        """Take in the curves of an event's hazards (n, K), and the time of the event or of the cut, (n,).

        Of a question with slots beside the horizon the instances are pooled.
        """
        mean, time, happened = self._curves.setdefault(instance.question.name, ([], [], []))
        self._texts[instance.question.name] = instance.question.text
        mean.append(survival(logits))
        time.append(known)
        happened.append(event)

    def log(self, logger: Logger, num_timesteps: int) -> None:
        """Draw what has been collected, if it is time."""
        if num_timesteps - self._drawn < self.every:
            return
        self._drawn = num_timesteps
        figures = _drawing()
        for name, by_key in self._answers.items():
            keys = [list(by_key)[n] for n in np.unique(np.linspace(0, len(by_key) - 1, MOST_CURVES).astype(int))]
            pooled = {key: [np.concatenate(each) for each in by_key[key]] for key in keys}
            curves = {key: scores.reliability(said, happened) for key, (said, happened) in pooled.items()}
            figure, axes = figures.new_figure(size=(4.8, 4.8))
            figures.plot_reliability(axes, curves, self._texts[name])
            _record(logger, name, "reliability", figure)
        for name, (mean, time, happened) in self._curves.items():
            answered = np.concatenate(mean).mean(axis=0)
            observed = scores.kaplan_meier(np.concatenate(time), np.concatenate(happened), len(answered) - 1)
            figure, axes = figures.new_figure()
            figures.plot_survival(axes, {"happened": (answered, observed, observed, observed)}, self._texts[name])
            _record(logger, name, "survival", figure)
        self._clear()


def _record(logger: Logger, name: str, kind: str, figure: Any) -> None:
    logger.record(f"qa/{name}/{kind}", Figure(figure, close=True), exclude=ONLY_TENSORBOARD)


def log_hparams(logger: Logger, model: BaseAlgorithm) -> None:
    """Tell TensorBoard's HParams what the agent and its questions were trained with, and by which scalars to compare them."""
    policy: Any = model.policy
    names = ("gamma", "learning_rate", "n_steps", "batch_size", "n_epochs", "ent_coef", "vf_coef", "buffer_size", "tau")
    told: dict[str, Any] = {"algorithm": type(model).__name__, "seed": model.seed, "n_envs": model.n_envs}
    told |= {name: getattr(model, name) for name in names if hasattr(model, name)}
    told |= {name: policy.qa_kwargs[name] for name in ("qa_coef", "qa_trunk_gradient", "qa_net_arch", "qa_encoder")}
    questions = policy.qa_head.catalogue.questions
    told["questions"] = ", ".join(question.name for question in questions)
    metrics = {"rollout/ep_rew_mean": 0.0, **{f"qa/{question.name}/{_metric(question)}": 0.0 for question in questions}}
    logger.record(
        "hparams", HParam({key: _plain(value) for key, value in told.items()}, metrics), exclude=ONLY_TENSORBOARD
    )


def _metric(question: Question) -> str:
    if question.truth.operator == "steps_until" or isinstance(question.answer, Number):
        return "error"
    return "accuracy" if isinstance(question.answer, Choice) else "brier"


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, str)) else float(value) if isinstance(value, Real) else str(value)


def _drawing() -> Any:
    """The module that draws, which needs matplotlib."""
    from sb3_qa import figures

    figures.new_figure()
    return figures
