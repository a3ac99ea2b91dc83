"""What every question-answering wrapper shares: a rule that works on batches, and the shells that feed it.

A *rule* holds all that a wrapper decides. A *shell* fits it to an interface: :class:`QAWrapper` is a
``gymnasium.Wrapper`` (a batch of one), :class:`VecQAWrapper` an SB3 ``VecEnvWrapper``; that of ``gymnasium.vector`` is in
:mod:`sb3_qa.wrappers.vector`.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import WrapperSpec
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn, VecEnvWrapper

from sb3_qa.answerer import QuestionAnswerer, Reading
from sb3_qa.errors import QAError
from sb3_qa.memory import Memory
from sb3_qa.sharing import SharedAnswerer
from sb3_qa.wrappers.specification import specified

__all__ = ["Arrival", "QAWrapper", "Rule", "VecQAWrapper", "own_rewards", "qa_wrappers"]

log = logging.getLogger(__name__)

QA = QuestionAnswerer | SharedAnswerer | str | PathLike[str] | None
Info = dict[str, Any]


class Arrival:
    """What one step of a batch of environments brought. Observations are batches (n, ...)."""

    def __init__(
        self,
        obs: Any,
        rewards: NDArray[np.float32],
        done: NDArray[np.bool_],
        terminated: NDArray[np.bool_],
        infos: list[Info],
        memory: Memory | None = None,
    ) -> None:
        self.obs = obs
        """Where the agent acts next: the first state of a new episode, if the environment has reset itself."""
        self.memory = memory
        """What a recurrent policy remembers when it sees that."""
        self.rewards = rewards
        self.done = done
        self.terminated = terminated
        self.infos = infos

    def last_obs(self, index: NDArray[np.intp]) -> Any:
        """The true last observations of the episodes that ended at ``index``."""
        rows = [
            self.infos[i]["terminal_observation"] if "terminal_observation" in self.infos[i] else row(self.obs, i)
            for i in index
        ]
        return stack(rows)


class Rule:
    """Base of the rules. ``here`` is the reading of the states the agent is about to act in.

    :param qa: who answers; None to be bound later (``QACallback`` does so)
    :param unbound: what to do at a step without one: "error", or "pass" the step through
    """

    def __init__(self, name: str, qa: QA, unbound: str) -> None:
        if unbound not in ("error", "pass"):
            raise QAError(f'{name} got unbound={unbound!r}; expected "error" or "pass"; give one of them')
        self.name = name
        self.unbound = unbound
        self.qa: QuestionAnswerer | None = None
        self.obs: Any = None
        self.memory: Memory | None = None
        """What a recurrent policy remembers of each environment when it sees ``obs``; None of other policies."""
        self.own = qa is not None
        self._stepped = False  # whether there have been steps since the last reset of all environments
        self.told_inside: list[float | None] | None = None
        """The rewards that wrappers further in have told to be the environment's own; None of a rule that has changed none."""
        self.acting: NDArray[np.bool_] | bool = True
        """Which environments execute their action; one that is about to reset itself ignores it, and nothing is vetoed there."""

    def seed(self, seed: int, each: Sequence[int | None] | None = None) -> None:
        """Begin again whatever is drawn at random. May be extended.

        :param each: what every environment by itself is seeded with, where that is not this and the numbers after it
        """

    def watch(self, env: Any) -> None:
        """Look around in the environment that is wrapped, once it is. May be extended.

        :param env: the wrapper itself
        """

    def close(self) -> None:
        """The environment is being closed. May be extended."""

    def on_bind(self, qa: QuestionAnswerer) -> None:
        """Check the rule's questions against the answerer's. To be extended."""

    def begin(self, index: NDArray[np.intp]) -> list[Info]:
        """What to tell at a reset, for the environments at ``index`` of ``self.obs``. To be implemented."""
        raise NotImplementedError

    def act(self, actions: NDArray[Any]) -> NDArray[Any]:
        """The actions to execute in ``self.obs``. May be extended."""
        return actions

    def arrive(self, actions: NDArray[Any], arrival: Arrival) -> None:
        """Tell, in ``arrival.infos``, and set ``arrival.rewards``. ``self.obs`` is still where the actions were chosen."""
        raise NotImplementedError

    @property
    def here(self) -> Reading:
        """The reading of ``self.obs``."""
        assert self.qa is not None
        return self.qa.read(self.obs, self.memory)

    def started(self, obs: Any, which: NDArray[np.bool_] | None = None) -> None:
        """Environments have been reset, and the agent acts in ``obs`` next.

        :param which: (n,), those that have; None for all
        """
        self.obs = obs
        if self.qa is not None:
            self.qa.refresh()
        if which is not None and self.memory is not None:
            self.memory = Memory(self.memory.state, self.memory.starts | which)
        elif which is None or which.all():
            self.memory = None if self.qa is None else self.qa.blank(obs)
            self._stepped = False

    def remembered(self, begun: NDArray[np.bool_]) -> Memory | None:
        """What a recurrent policy remembers after ``self.obs``, for where a step has brought the agent.

        :param begun: (n,), which environments are in the first state of an episode there
        """
        return None if self.memory is None else self.here.remembered(begun)

    def moved(self, arrival: Arrival) -> None:
        """The agent acts next where a step has brought it."""
        self.obs, self.memory, self._stepped = arrival.obs, arrival.memory, True

    def passed(self, obs: Any) -> None:
        """The same, where nobody answers."""
        self.obs, self._stepped = obs, True

    def bind(self, qa: QuestionAnswerer) -> None:
        """Let ``qa`` answer from now on. A recurrent policy remembers what it was shown; a new one begins with nothing."""
        self.on_bind(qa)
        same = self.qa is not None and self.qa.policy is qa.policy
        self.qa = qa
        if not same and self.obs is not None:
            self.memory = qa.blank(self.obs)
            if self.memory is not None and self._stepped:
                log.warning(
                    "%s was bound in the middle of episodes, whose beginnings the LSTM of its answerer has not seen: until they end it "
                    "answers as if they had begun now. Bind it before the first step, or reset the environment.",
                    self.name,
                )

    def ready(self) -> bool:
        """Whether there is an answerer; an error at once where one is needed."""
        if self.qa is None and self.unbound == "error":
            raise QAError(
                f"{self.name} has no answerer yet; expected one before the first step; train with callback=QACallback(), pass "
                "qa=, call .bind(QuestionAnswerer.from_model(model)), in rl_zoo3 name the wrappers of sb3_qa.zoo, or let it pass with "
                'unbound="pass"'
            )
        if self.qa is None:
            return False
        if self.obs is None:
            raise QAError(
                f"{self.name} got a step before any reset; expected to know what the agent sees; call reset() first"
            )
        self.qa.refresh()  # all of a step is answered by the same weights
        return True

    def tell_rewards(self, before: NDArray[Any], arrival: Arrival, replaced: NDArray[Any] | None = None) -> None:
        """Tell what the environment's own reward was, and what all wrappers so far have added to it (or put in its place)."""
        self.told_inside = [info.get("qa/raw_reward") for info in arrival.infos]
        for i, info in enumerate(arrival.infos):
            info.setdefault("qa/raw_reward", float(before[i]))
            added = info.get("qa/shaping_reward", 0.0) + float(arrival.rewards[i]) - float(before[i])
            info["qa/shaping_reward"] = added if replaced is None else float(replaced[i])

    @staticmethod
    def executed(actions: NDArray[Any], infos: Sequence[Info]) -> NDArray[Any]:
        """The actions that were really executed, should a veto further in have replaced some."""
        if not any("qa/executed_action" in info for info in infos):
            return actions
        return np.stack(
            [np.asarray(info.get("qa/executed_action", action)) for info, action in zip(infos, actions, strict=True)]
        )


_LOADED: weakref.WeakValueDictionary[str, QuestionAnswerer] = weakref.WeakValueDictionary()


def as_answerer(name: str, qa: QA) -> QuestionAnswerer | None:
    """``qa=`` as it is, or loaded from its path: once in a process for all wrappers that have it, as nobody trains it.

    :raises QAError: when it is something else, or the file is missing or no answerer's
    """
    if isinstance(qa, SharedAnswerer):
        return qa.open()
    if qa is None or isinstance(qa, QuestionAnswerer):
        return qa
    if not isinstance(qa, (str, PathLike)):
        made = "QuestionAnswerer.from_model(model)"
        raise QAError(
            f"{name} got qa={type(qa).__name__}; expected a QuestionAnswerer, shared or not, the path of a saved one, or None; "
            f"write qa={made}"
        )
    path = Path(qa)
    if not path.is_file():
        return QuestionAnswerer.load(path)  # who says what is missing
    # By content, not by path: a file that has been written anew is another answerer.
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    answerer = _LOADED.get(content)
    if answerer is None:
        _LOADED[content] = answerer = QuestionAnswerer.load(path)
    return answerer


def plain(action: Any) -> Any:
    """An action for ``info``: a number of a discrete action, an array otherwise."""
    return action.item() if isinstance(action, np.generic) or np.ndim(action) == 0 else np.array(action)


def plain_rows(actions: NDArray[Any]) -> list[Any]:
    """The same of the actions of a batch."""
    return actions.tolist() if actions.ndim == 1 else [np.array(action) for action in actions]


def no_action(space: spaces.Space[Any]) -> Any:
    """What stands for the action in the info of a reset, where there is none: -1, or nans in the shape of a box."""
    if isinstance(space, spaces.Box):
        return np.full(space.shape, np.nan, np.float32)
    return -1 if isinstance(space, spaces.Discrete) else np.full(space.shape or (), -1)


class QAWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """Shell for one environment: a batch of one."""

    def __init__(self, env: gym.Env[Any, Any], rule: Rule, qa: QA) -> None:
        if not isinstance(env, gym.Env):
            other = "" if not isinstance(env, (VecEnv, VectorEnv)) else "Vec" if isinstance(env, VecEnv) else "vector."
            mend = f"wrap it in sb3_qa.wrappers.{other}{rule.name}" if other else "make one, as by gym.make(id)"
            raise QAError(f"{rule.name} got a {type(env).__name__}; expected one gymnasium.Env; {mend}")
        super().__init__(env)
        self.rule = rule
        self._first_info: Info | None = None  # what was told at the reset, until the first step
        answerer = as_answerer(rule.name, qa)
        if answerer is not None:
            self.bind(answerer)
        rule.watch(self)

    @classmethod
    def wrapper_spec(cls, **kwargs: Any) -> WrapperSpec:
        """This wrapper for an environment's specification, ``EnvSpec(additional_wrappers=...)``, which goes through JSON.

        :param kwargs: of the wrapper; ``qa`` is a path
        :raises QAError: when it does not take them, or they cannot be written as JSON
        """
        return super().wrapper_spec(**specified(cls, kwargs))

    def close(self) -> None:
        self.rule.close()
        super().close()

    def bind(self, qa: QuestionAnswerer | SharedAnswerer) -> None:
        """Let ``qa`` answer from now on; it must know observations like this environment's.

        :raises QAError: when it does not
        """
        if isinstance(qa, SharedAnswerer):
            qa = qa.open()
        refuse_normalized(type(self).__name__, f"Vec{type(self).__name__}", qa)
        check_spaces(type(self).__name__, qa, self.observation_space, self.action_space)
        self.rule.bind(qa)
        if self.rule.obs is not None:  # bound after a reset, as in learn(): tell now what the reset could not
            self._begin()

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        if seed is not None:
            self.rule.seed(seed)
        obs, info = self.env.reset(seed=seed, options=options)
        self.rule.started(_batch(obs))
        self._first_info = info = dict(info)
        if self.rule.qa is not None:
            self._begin()
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        rule = self.rule
        self._first_info = None
        if not rule.ready():
            obs, *rest = self.env.step(action)
            rule.passed(_batch(obs))
            return obs, *rest
        chosen = rule.act(np.asarray(action)[None])
        obs, reward, terminated, truncated, info = self.env.step(_like(action, chosen[0]))
        done = np.array([terminated or truncated])
        rewards: NDArray[Any] = np.array([reward], np.float64)
        memory = rule.remembered(done)
        arrival = Arrival(_batch(obs), rewards, done, np.array([terminated]), [dict(info)], memory)
        rule.arrive(chosen, arrival)
        rule.moved(arrival)
        return obs, float(arrival.rewards[0]), terminated, truncated, arrival.infos[0]

    @property
    def unbound(self) -> str | None:
        """What a step without an answerer does, "error" or "pass", where this wrapper or one further in has none."""
        inner = self.env.get_wrapper_attr("unbound") if self.env.has_wrapper_attr("unbound") else None
        own = self.rule.unbound if self.rule.qa is None else None
        return "error" if "error" in (own, inner) else own or inner

    def _begin(self) -> None:
        told = self.rule.begin(np.zeros(1, np.intp))[0]
        if self._first_info is not None:
            self._first_info.update(told)


class VecQAWrapper(VecEnvWrapper):
    """Shell for an SB3 vectorised environment. ``reset_infos`` tells the same keys for first states."""

    def __init__(self, venv: VecEnv, rule: Rule, qa: QA) -> None:
        if not isinstance(venv, VecEnv):
            single = rule.name.removeprefix("Vec")
            other = f"sb3_qa.wrappers.{single if isinstance(venv, gym.Env) else f'vector.{single}'}"
            raise QAError(
                f"{rule.name} got a {type(venv).__name__}; expected a VecEnv of stable-baselines3; wrap it in {other}, or give "
                "make_vec_env(...)"
            )
        super().__init__(venv)
        self.rule = rule
        self._actions: NDArray[Any] = np.zeros(0)
        self._first = np.ones(venv.num_envs, np.bool_)  # which environments are in the first state of an episode
        answerer = as_answerer(rule.name, qa)
        if answerer is not None:
            self.bind(answerer)
        rule.watch(self)

    def close(self) -> None:
        self.rule.close()
        super().close()

    def bind(self, qa: QuestionAnswerer | SharedAnswerer) -> None:
        """Let ``qa`` answer from now on; it must know observations like this environment's.

        :raises QAError: when it does not
        """
        if isinstance(qa, SharedAnswerer):
            qa = qa.open()
        name = type(self).__name__
        inside = [wrapper for wrapper in _chain(self.venv) if isinstance(wrapper, VecNormalize) and wrapper.norm_obs]
        if not inside:
            refuse_normalized(name, name, qa)
        if inside and not qa.normalized:
            raise QAError(
                f"{name} sees observations normalised by VecNormalize but its answerer learnt from raw ones; expected the same; "
                f"wrap the other way round: VecNormalize({name}(env, ...))"
            )
        check_spaces(name, qa, self.observation_space, self.action_space)
        self.rule.bind(qa)
        if self.rule.obs is not None:  # bound after a reset, as in learn(): tell now what the reset could not
            self._begin(np.arange(self.num_envs))

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        if seed is not None:
            self.rule.seed(seed)
        return super().seed(seed)

    def reset(self) -> Any:
        obs = self.venv.reset()
        self.rule.started(obs)
        self._first[:] = True
        self._begin(np.arange(self.num_envs))
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = self.rule.act(np.asarray(actions)) if self.rule.ready() else actions
        self.venv.step_async(self._actions)

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        ended = dones.nonzero()[0]
        self._first[:] = dones
        if self.rule.qa is None:
            self.rule.passed(obs)
            self._begin(ended)
            return obs, rewards, dones, infos
        terminated = np.array(dones)
        for i in ended.tolist():
            terminated[i] = not infos[i].get("TimeLimit.truncated", False)
        arrival = Arrival(obs, rewards, dones, terminated, infos, self.rule.remembered(dones))
        self.rule.arrive(self._actions, arrival)
        self.rule.moved(arrival)
        self._begin(ended)
        return obs, arrival.rewards, dones, arrival.infos

    def _begin(self, index: NDArray[np.intp]) -> None:
        if not len(index):
            return
        # SB3's own wrappers do not pass reset_infos on: take them from the next wrapper that does.
        inner = next(
            env for env in _chain(self.venv) if isinstance(env, VecQAWrapper) or not isinstance(env, VecEnvWrapper)
        )
        told = self.rule.begin(index) if self.rule.qa is not None else [{}] * len(index)
        for i, more in zip(index, told, strict=True):
            if self._first[i]:
                self.reset_infos[i] = {**inner.reset_infos[i], **more}


def qa_wrappers(env: Any) -> Iterator[tuple[QAWrapper | VecQAWrapper, list[Any]]]:
    """The question-answering wrappers of an SB3 environment, outermost first, each with the wrappers around it.

    Single environments are looked into where they live in this process (``DummyVecEnv``).
    """
    around: list[Any] = []
    for wrapper in _chain(env):
        if isinstance(wrapper, VecQAWrapper):
            yield wrapper, list(around)
        around.append(wrapper)
        if isinstance(wrapper, DummyVecEnv):
            for single in wrapper.envs:
                outside = list(around)
                while isinstance(single, gym.Wrapper):
                    if isinstance(single, QAWrapper):
                        yield single, list(outside)
                    outside.append(single)
                    single = single.env


def own_rewards(env: Any, rewards: NDArray[Any], infos: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rewards of the last step as the environment itself gave them: before any shaping, and before ``VecNormalize``.

    :param env: what gave the rewards
    """
    normalize: VecNormalize | None = None
    around: Rule | None = None  # the innermost that changes rewards outside of it
    shaping: Rule | None = None
    for wrapper in _chain(env):
        if isinstance(wrapper, VecNormalize):
            normalize, around = wrapper, shaping
        elif isinstance(wrapper, VecQAWrapper) and wrapper.rule.told_inside is not None:
            shaping = wrapper.rule
    if normalize is not None:
        rewards = normalize.get_original_reward()
    told = [info.get("qa/raw_reward") for info in infos]
    if around is not None and around.told_inside is not None:  # what it told is the normalised reward
        told = around.told_inside
    return [float(reward if own is None else own) for reward, own in zip(rewards, told, strict=True)]


def check_around(wrapper: QAWrapper | VecQAWrapper, around: list[Any]) -> None:
    """Refuse a wrapper that stands inside one which changes what the policy observes.

    :raises QAError: with the order that works
    """
    name = type(wrapper).__name__
    vec_name = name if name.startswith("Vec") else f"Vec{name}"
    # Named is the outermost wrapper that changes them: only outside of that one all is well.
    for outer, inner in pairwise([*around, wrapper]):
        if isinstance(outer, VecNormalize) and outer.norm_obs:
            raise QAError(
                f"{name} stands inside VecNormalize, so it sees raw observations where the policy sees normalised ones; expected "
                f"the same; put it outside: {vec_name}(VecNormalize(env), ...)"
            )
        space = inner.observation_space
        if isinstance(outer, gym.ObservationWrapper) or not same_observations(outer.observation_space, space):
            kind, outside = type(outer).__name__, name if isinstance(outer, gym.Wrapper) else vec_name
            raise QAError(
                f"{name} stands inside {kind}, which makes {outer.observation_space} of {space}, so it does not see what the policy "
                f"sees; expected the same; put it outside: {outside}({kind}(env, ...), ...)"
            )


def check_spaces(
    name: str, qa: QuestionAnswerer, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> None:
    """Refuse an answerer that learnt from another kind of observations or actions.

    :raises QAError: naming both
    """
    policy = qa.policy
    if not same_observations(policy.observation_space, observation_space):
        raise QAError(
            f"{name} sees {observation_space} but its answerer's policy sees {policy.observation_space}; expected the same; put "
            f"{name} outside the wrapper that changes observations (VecFrameStack, a FrameStack, ...), or use that answerer's environment"
        )
    if policy.action_space != action_space:
        raise QAError(
            f"{name} has the action space {action_space} but its answerer's is {policy.action_space}; expected the same; use the "
            "environment that the answerer was trained in"
        )


def same_observations(a: spaces.Space[Any], b: spaces.Space[Any]) -> bool:
    """Whether observations of the two spaces have one shape; images may have their channels first or last, as in SB3."""
    if isinstance(a, spaces.Dict) or isinstance(b, spaces.Dict):
        both = isinstance(a, spaces.Dict) and isinstance(b, spaces.Dict) and a.spaces.keys() == b.spaces.keys()
        return both and all(same_observations(a.spaces[key], b.spaces[key]) for key in a.spaces)  # type: ignore[attr-defined]
    if a.shape == b.shape:
        return type(a) is type(b)
    image = a.dtype == b.dtype == np.uint8 and len(a.shape or ()) == len(b.shape or ()) == 3
    return image and (a.shape == (b.shape[2], *b.shape[:2]) or b.shape == (a.shape[2], *a.shape[:2]))  # type: ignore[index]


def _chain(env: Any) -> Iterator[Any]:
    while env is not None:
        yield env
        env = env.venv if isinstance(env, VecEnvWrapper) else None


def refuse_normalized(name: str, vec_name: str, qa: QuestionAnswerer) -> None:
    """Refuse an answerer that learnt from observations as only ``VecNormalize`` makes them.

    :raises QAError: with the wrapping that works
    """
    if qa.normalized:
        raise QAError(
            f"the answerer of {name} learnt from observations normalised by VecNormalize, and this environment has none inside; "
            f"expected the same observations; wrap {vec_name}(VecNormalize.load(path, env), qa=...)"
        )


def _batch(obs: Any) -> Any:
    """A batch of one, in memory of its own: an environment may write its next observation over this one."""
    return {key: np.array(value)[None] for key, value in obs.items()} if isinstance(obs, dict) else np.array(obs)[None]


def stack(rows: list[Any]) -> Any:
    """A batch of observations of single environments."""
    return (
        {key: np.stack([one[key] for one in rows]) for key in rows[0]} if isinstance(rows[0], dict) else np.stack(rows)
    )


def row(obs: Any, i: Any) -> Any:
    """Observation of one environment, or those at an index of arrays."""
    return {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]


def _like(action: Any, chosen: Any) -> Any:
    return type(action)(chosen) if isinstance(action, (int, np.integer)) else chosen
