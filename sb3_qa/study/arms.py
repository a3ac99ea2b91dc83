"""The arms: how an agent comes by answers. All have the same labels, environment steps and hyperparameters.

``plain`` and the arms that come afterwards begin with the very same agent; ``detached`` and ``separate`` train it anew, bit
for bit, as nothing comes back to it from its questions. So the arms differ in what their answers are made of, and ``joint`` and
``finetune`` in the agent too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import nn

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.errors import QAError
from sb3_qa.labels import EventTimes
from sb3_qa.policies import qa_policy, stock_policies
from sb3_qa.questions import Catalogue
from sb3_qa.study.afterwards import adopt, anchor, freeze, muted_policy
from sb3_qa.study.separate import separate_policy
from sb3_qa.study.task import Task
from sb3_qa.wrappers import VecShapeReward

__all__ = ["ARMS", "Arm", "Curve", "Trained", "plain_agent", "train_arm"]


class Arm(NamedTuple):
    """One way to come by answers."""

    meaning: str
    questions: bool = True
    trunk_gradient: float = 1.0
    afterwards: bool = False
    """Whether the agent has been trained before, without questions."""
    separate: bool = False
    frozen: bool = False
    """Whether nothing of the agent changes afterwards."""
    kl: float = 0.0
    """How strongly it is held near what it was."""
    on_policy: bool = False
    """Whether it can be had for on-policy algorithms only."""
    punished: str = ""
    """What is taken from the reward: "catastrophes" as they happen, or the "answers" about them as they are given."""

    @property
    def shapes_agent(self) -> bool:
        """Whether questions make the agent another than ``plain``'s."""
        return self.questions and self.trunk_gradient > 0 and not (self.separate or self.frozen)


ARMS: dict[str, Arm] = {
    "plain": Arm("SB3 as it is, without questions", questions=False),
    "oracle": Arm("plain, with vetoes by true risks, from rollouts of a clone", questions=False, afterwards=True),
    "joint": Arm("questions trained with the policy, the trunk shaped by both"),
    "detached": Arm("trained at the same time, no gradient into the trunk", trunk_gradient=0.0),
    "separate": Arm("a network of its own, trained at the same time on the same labels", separate=True, on_policy=True),
    "probe": Arm("a head on the frozen trunk of the finished agent", afterwards=True, frozen=True),
    "finetune": Arm("the finished agent's trunk and a head, trained on questions", afterwards=True, on_policy=True),
    "punished": Arm("no questions; catastrophes punished in the reward", questions=False, punished="catastrophes"),
    "shaped": Arm("as joint; its own answers about the catastrophe punished in the reward", punished="answers"),
    "anchored": Arm("as finetune, held near the agent by its KL divergence", afterwards=True, kl=1.0, on_policy=True),
}


@dataclass(frozen=True, eq=False)
class Trained:
    """An agent, and who answers."""

    model: BaseAlgorithm
    answerer: QuestionAnswerer | None
    seconds: float
    """Of training, wall-clock; of an arm that comes afterwards, without the agent's own."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Environment steps, and the mean return of the training episodes that ended in the twentieth of the training before."""

    @property
    def parameters(self) -> dict[str, int]:
        """How many the agent has, and how many were added for questions."""
        policy: Any = self.model.policy
        every = sum(p.numel() for p in nn.Module.parameters(policy))
        own = sum(p.numel() for p in policy.parameters())
        return {"agent": own, "questions": every - own}


class Curve(BaseCallback):
    """The mean return of training episodes, at each twentieth of the training.

    :param timesteps: of the training
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.every = max(timesteps // 20, 1)
        self.points: list[tuple[int, float]] = []
        self._returns: list[float] = []

    def _on_step(self) -> bool:
        self._returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        if self.num_timesteps >= self.every * (len(self.points) + 1):
            self.points.append((self.num_timesteps, float(np.mean(self._returns)) if self._returns else float("nan")))
            self._returns = []
        return True


class Punished(VecEnvWrapper):
    """Takes a penalty from the reward of a catastrophe, of which a key of ``info`` tells."""

    def __init__(self, venv: VecEnv, catastrophe: str, penalty: float) -> None:
        super().__init__(venv)
        self.catastrophe, self.penalty = catastrophe, penalty

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        happened = np.array([bool(info[self.catastrophe]) for info in infos])
        return obs, (rewards - self.penalty * happened).astype(np.float32), dones, infos


class _Limited:
    """Labels of which only some are known: those of a share of the transitions, drawn at random."""

    def __init__(self, store: Any, known: NDArray[np.bool_], share: float) -> None:
        self._store = store
        self._weight = (known / share).astype(np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def batch(self, rows: Any) -> Any:
        y, weight, features = self._store.batch(rows)
        return y, weight * self._weight[rows, None], features


class LimitedLabels(QACallback):
    """As :class:`QACallback`, with labels for a share of the transitions only; they weigh as much together as all would.

    :param share: in (0, 1]
    """

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share = share
        self.rng = np.random.default_rng([seed, 1])

    def _on_training_start(self) -> None:
        super()._on_training_start()
        recorder: Any = self._recorder
        begin_with = recorder._begin_with

        def begin_with_some(times: Sequence[EventTimes], values: Sequence[NDArray[np.float32]]) -> None:
            """The head begins with the base rates of the same labels."""
            n = len(times[0].known) if len(times) else len(values[0])
            known = self._known = self.rng.random(n) < self.share
            begin_with(
                [EventTimes(each.known[known], each.event[known]) for each in times], [value[known] for value in values]
            )

        recorder._begin_with = begin_with_some

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        joint = self._policy.qa_joint
        joint.store = _Limited(joint.store, self._known, self.share)  # type: ignore[assignment]


def train_arm(
    task: Task,
    arm: str,
    seed: int,
    *,
    labels: float = 1.0,
    folder: Path | None = None,
    env: VecEnv | None = None,
    before: BaseAlgorithm | None = None,
) -> Trained:
    """Train an arm.

    :param labels: share of the steps that have labels, in (0, 1]
    :param folder: where plain agents are kept, that other arms begin with; without one they are trained each time
    :param env: to train in, in place of the task's
    :param before: agent that an arm which comes afterwards begins with, in place of ``plain``'s
    :raises QAError: when there is no such arm for the task
    """
    if arm not in ARMS:
        raise QAError(f"the study got arm {arm!r}; expected one of {list(ARMS)}; give one of them")
    if not 0.0 < labels <= 1.0:
        raise QAError(f"the study got labels={labels!r}; expected a share of the steps, in (0, 1]; give e.g. 0.1")
    how = ARMS[arm]
    on_policy = issubclass(task.algorithm, OnPolicyAlgorithm)
    if (how.on_policy or labels < 1.0) and not on_policy:
        raise QAError(
            f"arm {arm!r} with labels={labels:g} got {task.algorithm.__name__}; expected an on-policy algorithm; leave it out"
        )
    if how.afterwards and before is None:
        before = plain_agent(task, seed, folder)
    if before is not None and not how.questions:  # there is nothing to be learnt
        return Trained(before, None, 0.0)
    base = stock_policies(task.algorithm)[task.policy]
    kwargs: dict[str, Any] = dict(task.policy_kwargs)
    policy: Any = base
    if how.questions:
        chosen: Any = base
        if how.separate:
            chosen, kwargs["qa_readouts"] = separate_policy(base), ["twin.readout"]  # type: ignore[arg-type]
        elif how.afterwards and not how.frozen:
            chosen = muted_policy(base)
        policy = qa_policy(chosen)
        kwargs |= {"qa_trunk_gradient": how.trunk_gradient, "questions": list(task.questions), **task.qa_kwargs}
    venv = task.training_env(seed + 1_000 * how.afterwards) if env is None else env
    if how.punished == "catastrophes":
        venv = Punished(venv, task.catastrophe, task.penalty)
    elif how.punished == "answers":
        # So many steps tell of the same catastrophe.
        horizon = Catalogue(task.questions).instances[task.risk].horizon or 1
        venv = VecShapeReward(venv, rewards={task.risk: -task.penalty / horizon}, mode="add")
    model = task.algorithm(policy, venv, policy_kwargs=kwargs, seed=seed, device="cpu", **task.hyperparameters)
    if before is not None:
        adopt(model.policy, before.policy)
        if how.frozen:
            freeze(model.policy)
        elif how.kl:
            anchor(model.policy, how.kl)
    curve = Curve(task.timesteps)
    callbacks: list[BaseCallback] = [curve]
    if how.questions:
        callbacks.append(QACallback() if labels == 1.0 else LimitedLabels(labels, seed))
    started = time.perf_counter()
    model.learn(task.timesteps, callback=callbacks)
    seconds = time.perf_counter() - started
    venv.close()
    answerer = QuestionAnswerer.from_model(model) if how.questions else None
    if arm == "plain" and folder is not None:
        _keep(model, _path(task, seed, folder))
    return Trained(model, answerer, seconds, curve.points)


def plain_agent(task: Task, seed: int, folder: Path | None) -> BaseAlgorithm:
    """The agent without questions, loaded, or trained and kept."""
    if folder is not None and (path := _path(task, seed, folder)).exists():
        return task.algorithm.load(path, device="cpu")
    return train_arm(task, "plain", seed, folder=folder).model


def _path(task: Task, seed: int, folder: Path) -> Path:
    return folder / f"{task.name}-{task.timesteps}-{seed}.zip"


def _keep(model: BaseAlgorithm, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:  # whole or not at all, as another process may look for it
        model.save(file)
    os.replace(part, path)
