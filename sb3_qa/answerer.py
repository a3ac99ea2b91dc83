"""The question-answerer: what people and wrappers ask."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_qa.answers import Answer
from sb3_qa.errors import QAError
from sb3_qa.head import QAHead, decode
from sb3_qa.memory import Memory
from sb3_qa.panel import Panel
from sb3_qa.questions import UNTAUGHT, Catalogue, Instance, nearest
from sb3_qa.taps import Ahead, plain
from sb3_qa.understanding import Understanding
from sb3_qa.units import observation_normalizer
from sb3_qa.values import PointValues

if TYPE_CHECKING:
    from sb3_qa.sharing import SharedAnswerer

__all__ = ["QuestionAnswerer", "Reading"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]


class Reading:
    """What has been read of a batch of observations, once; any number of questions are answered from it.

    :param answerer: who reads
    :param obs: observations as the policy sees them, a batch of arrays or tensors (n, ...)
    :param memory: of a recurrent policy, what it remembers when it sees them; None of others
    :param ahead: read them as the policy's own pass does, which will be about them next
    :raises QAError: for a recurrent policy without a memory
    """

    def __init__(
        self, answerer: QuestionAnswerer, obs: Any, memory: Memory | None = None, *, ahead: bool = False
    ) -> None:
        policy = self._policy = answerer.policy
        self._head: QAHead = policy.qa_head
        self._critic: Any = policy.critic if policy.qa_critics else None
        self._obs = obs
        self._of_target = answerer.target
        self.memory = memory
        self._after: Memory | None = None
        self.ahead: Ahead | None = None
        """What the policy need not compute again."""
        if answerer.recurrent:
            if memory is None:
                raise QAError(
                    f"{type(policy).__name__} has an LSTM and was given observations alone; expected what it remembers with them; "
                    "pass memory=, as Memory.blank(policy, n) is at the start of episodes"
                )
            self._latents, self._after = policy.qa_taps.recall(policy, obs, memory)
        elif answerer.target:
            self._head = getattr(policy, policy.qa_target[1]).qa_head
            self._critic = policy.critic_target if policy.qa_critics else None
            self._latents = policy.qa_taps.read_target(policy, obs, *policy.qa_target)
        elif ahead:
            self.ahead = policy.qa_taps.read_ahead(policy, obs)
            self._latents = [latent.numpy() for latent in self.ahead.latents]
        else:
            self._latents = policy.qa_taps.read(policy, obs)
        self.hidden: Floats = self._head.hidden(self._policy.qa_taps.join(self._latents))
        blind = _not_finite(obs)
        if blind is not None:
            self.hidden[blind] = np.nan  # behind a tanh an infinite observation would have answers like any other
        self._state_logits: Floats | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def remembered(self, starts: NDArray[np.bool_]) -> Memory | None:
        """The memory that the next observations are read with; None of a policy that has none.

        :param starts: (n,), which of those are the first of an episode
        """
        return None if self._after is None else Memory(self._after.state, np.array(starts, np.bool_))

    def part(self, index: NDArray[np.intp] | slice) -> Reading:
        """The reading of some of the observations."""
        part = copy.copy(self)
        if self._after is not None and self.memory is not None:
            part.memory, part._after = self.memory.part(index), self._after.part(index)
        obs = self._obs
        if obs is not None:
            part._obs = {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]
        part._latents = [latent[index] for latent in self._latents]
        part.hidden = self.hidden[index]
        part._state_logits = None
        return part

    @staticmethod
    def joined(readings: Sequence[Reading]) -> Reading:
        """One reading of all that readings are of, without what is remembered after them."""
        joined = readings[0].bare()
        joined._latents = [np.concatenate(each) for each in zip(*(part._latents for part in readings), strict=True)]
        joined.hidden = np.concatenate([part.hidden for part in readings])
        return joined

    @property
    def can_be_joined(self) -> bool:
        """Whether it can stand in one with others, see :meth:`joined`: nothing but latents is needed for answers."""
        return self.memory is None and not self._policy.qa_critics

    def bare(self) -> Reading:
        """This reading without the observations and the memory, which are large."""
        bare = copy.copy(self)
        bare._obs = bare.memory = bare._after = bare._state_logits = bare.ahead = None
        return bare

    def kept(self, index: NDArray[np.intp]) -> Reading | None:
        """The reading of some of the observations that answers later as this one does now, whatever is learnt meanwhile, and
        can be joined with others of the same :attr:`head`; None where more than that is needed.
        """
        if not self.can_be_joined or self._head.by_panels:
            return None
        kept = self.bare()
        kept._head, kept._latents, kept.hidden = self._head.as_it_is(), [], self.hidden[index]
        return kept

    @property
    def head(self) -> QAHead:
        """Who answers."""
        return self._head

    def with_states(self, index: NDArray[np.intp], other: Reading) -> Reading:
        """This reading, for questions about states, with other states at ``index``."""
        mixed = copy.copy(self)
        mixed.hidden = self.hidden.copy()
        mixed.hidden[index] = other.hidden
        mixed._state_logits = None
        return mixed

    def state_logits(self, panel: Panel | None = None) -> Floats:
        """(n, n_state), of all questions or a panel's."""
        if panel is not None:
            return self._head.state_logits(self.hidden, panel)
        if self._state_logits is None:
            self._state_logits = self._head.state_logits(self.hidden)
        return self._state_logits

    def action_logits(self, actions: NDArray[Any] | None = None, panel: Panel | None = None) -> Floats:
        """Logits of the questions about actions.

        :param actions: (n, *action_shape); (n, m, *action_shape) for m candidates each; None for all of a discrete space
        :param panel: of which questions, all if None
        :return: (n, n_columns) or (n, m, n_columns)
        """
        if actions is None and self._policy.qa_critics:  # which are read at actions
            space = self._policy.action_space
            actions = np.broadcast_to(np.arange(space.start, space.start + space.n), (len(self), int(space.n)))
        return self._head.action_logits(self.hidden, actions, panel, self._of_critics(actions))

    def all_logits(
        self, index: NDArray[np.intp], actions: NDArray[Any] | None, panel: Panel | None = None
    ) -> tuple[Floats, Floats]:
        """Of the states at ``index``: logits of the questions about states, (n, n_state), and of those about actions,
        (n, m, n_logits - n_state), of all questions or a panel's.

        :param actions: m candidates each, (n, m, *action_shape); None for all of a discrete space
        """
        part = self.part(index)
        if self._head.action_features is None:
            return part.state_logits(panel), np.zeros((len(index), 0, 0), np.float32)
        return part.state_logits(panel), part.action_logits(actions, panel)

    def step_logits(self, actions: NDArray[Any], after: Reading, panel: Panel | None = None) -> Floats:
        """Logits of all questions or a panel's, (n, n_logits): about these actions here, and about the states after."""
        return self._head.step_logits(self.hidden, actions, after.hidden, panel, self._of_critics(actions))

    def inputs(self, actions: NDArray[Any]) -> tuple[Floats, Floats | None]:
        """What the head reads here: latents (n, latent_dim), and features of actions (n, *action_shape) with critics' latents."""
        latents = self._policy.qa_taps.join(self._latents)
        if self._head.action_features is None:
            return latents, None
        features, critics = self._head.action_features(actions), self._of_critics(actions)
        return latents, features if critics is None else np.concatenate([features, critics], axis=1)

    def _of_critics(self, actions: NDArray[Any] | None) -> Floats | None:
        critics = self._policy.qa_critics
        return critics.read(self._policy, self._obs, actions, self._critic) if critics else None

    def logits(self, instance: Instance, actions: NDArray[Any] | None = None) -> Floats:
        """The logits that an instance is answered from: (n, width), or with a dimension of candidates in between."""
        target = self._head.catalogue.target_for(instance)
        if self._head.by_panels or target.start == UNTAUGHT:
            panel = self._head.panel_of(target)
            return self.action_logits(actions, panel) if instance.per_action else self.state_logits(panel)
        if not instance.per_action:
            return self.state_logits()[:, target.start : target.stop]
        offset = self._head.n_state
        return self.action_logits(actions)[..., target.start - offset : target.stop - offset]

    def hazard_gradient(self, key: str, actions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a yes/no instance about actions (n, *action_shape): the cumulative hazard -log(1 - probability), (n,), and its
        gradient by the actions' features, (n, n_features), which for a box are the action scaled to [-1, 1].
        """
        instance, target = self._head.catalogue.find(key), self._head.catalogue.target_of[key]
        start, length = target.start - self._head.n_state, instance.horizon if target.kind == "event" else 1
        assert length is not None
        return self._head.hazard_gradient(self.hidden, actions, start, start + length, self._of_critics(actions))

    def shares(self) -> Floats:
        """How often the policy takes each action of a discrete space here, (n, n_actions)."""
        return self._policy.qa_taps.shares(self._policy, self._obs, self._live_latents)

    def preferred(self) -> NDArray[Any]:
        """The action the policy likes best in each observation, (n, *action_shape), as the environment takes it."""
        actions = self._policy.qa_taps.preferred(self._policy, self._obs, self._live_latents)
        return self._for_environment(actions.reshape(len(self), *self._policy.action_space.shape))

    @property
    def _live_latents(self) -> list[Floats]:
        """What the policy acts by; none where those of a target network were read."""
        return [] if self._of_target else self._latents

    def sampled(self, n: int, seed: int) -> NDArray[Any]:
        """``n`` actions of the policy for each observation, (n_obs, n, *action_shape); no shared random stream is used."""
        device = self._policy.device  # whose stream a seed sets too
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_streams_of(device)):
            torch.manual_seed(seed)
            actions = self._policy.qa_taps.sampled(self._policy, self._obs, self._latents, n)
        return self._for_environment(actions.reshape(len(self), n, *self._policy.action_space.shape))

    def preference(self, actions: NDArray[Any]) -> Floats:
        """How much the policy likes candidates (n, m, *action_shape): (n, m), see :meth:`Taps.preference`."""
        space = self._policy.action_space
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            actions = actions - space.start
        elif isinstance(space, spaces.MultiBinary):
            actions = actions.astype(np.float32)
        elif self._policy.squash_output:
            actions = self._policy.scale_action(actions)
        preference: Floats = self._policy.qa_taps.preference(self._policy, self._obs, self._latents, actions)
        return preference

    def _for_environment(self, actions: NDArray[Any]) -> NDArray[Any]:
        space = self._policy.action_space
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            return actions + space.start  # the policy counts from 0
        if not isinstance(space, spaces.Box):
            return actions
        if self._policy.squash_output:
            return np.asarray(self._policy.unscale_action(actions), space.dtype)
        return np.clip(actions, space.low, space.high)


def _not_finite(obs: Any) -> NDArray[np.bool_] | None:
    """Which observations are not finite in some part, (n,); None where all are."""
    wrong = []
    for part in obs.values() if isinstance(obs, dict) else [obs]:
        values = part if isinstance(part, np.ndarray) else part.numpy(force=True)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            wrong.append(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    return np.logical_or.reduce(wrong) if wrong else None


class QuestionAnswerer:
    """Answers questions about observations: live, from a model in training, or frozen, from a file.

    >>> qa = QuestionAnswerer.from_model(model)  # doctest: +SKIP
    >>> qa.ask("crash[k=5]", obs).probability  # doctest: +SKIP

    :param policy: a policy made by :func:`sb3_qa.policies.qa_policy`
    :param action_names: names of the actions of a discrete space, for texts
    :param normalized: whether the policy sees observations normalised by ``VecNormalize``
    :param target: answer as the policy's target networks do, with their head and latents
    :raises QAError: when ``target`` is asked for and the policy has no target network
    """

    def __init__(
        self,
        policy: Any,
        action_names: Sequence[str] | None = None,
        normalized: bool = False,
        *,
        target: bool = False,
    ) -> None:
        if target and policy.qa_target is None:
            raise QAError(
                f"target=True got a {type(policy).__name__}; expected a policy with target networks, as those of DQN, QR-DQN, SAC, TD3, "
                "DDPG and TQC; leave it out"
            )
        self.policy: Any = plain(policy)
        self.normalized = normalized
        self.recurrent: bool = policy.qa_taps.recurrent
        """Whether the policy has an LSTM, so that answers are about what it has seen, not about observations alone."""
        self.target = target
        names = action_names or policy.action_names
        if names is None and isinstance(policy.action_space, spaces.Discrete):
            names = [str(n) for n in range(int(policy.action_space.n))]
        self.action_names: list[str] | None = None if names is None else [str(name) for name in names]
        self._understanding: Understanding | None = None
        self._last: tuple[Any, int, Reading] | None = None
        self._warned = False

    @classmethod
    def from_model(cls, model: BaseAlgorithm, *, target: bool = False) -> QuestionAnswerer:
        """A live answerer: it sees every gradient update of the model.

        :param target: answer as the model's target networks do, which change as slowly as the algorithm moves them
        :raises QAError: when the model's policy has no questions, or no target networks and they are asked for
        """
        if not hasattr(model.policy, "qa_head"):
            raise QAError(
                f"the model's policy is a {type(model.policy).__name__} without questions; expected one made by qa_policy(); write "
                f"{type(model).__name__}(qa_policy({type(model).__name__}), env, policy_kwargs=dict(questions=[...]))"
            )
        env = model.get_env()
        # What it has learnt from counts, whatever it is asked about now.
        normalized: bool = getattr(model, "qa_normalized", observation_normalizer(env) is not None)
        given: list[str] | None = model.policy.action_names  # type: ignore[assignment]
        names = given or names_in(env) or getattr(model, "qa_action_names", None)
        return cls(model.policy, names, normalized, target=target)

    @classmethod
    def load(
        cls, path: str | PathLike[str], device: str | torch.device = "cpu", classes: Iterable[type] = ()
    ) -> QuestionAnswerer:
        """A frozen answerer from a file written by :meth:`save`. It needs no model and runs no code from the file.

        :param classes: policies and features extractors of your own that the answerer was saved with
        :raises QAError: when the file is missing, damaged, or not an answerer's
        """
        from sb3_qa.storage import load_answerer

        return load_answerer(path, device, classes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write weights (safetensors) and description (JSON, in its header) to one file; nothing in it is executable."""
        from sb3_qa.storage import save_answerer

        save_answerer(self, path)

    def share(self, classes: Iterable[type] = ()) -> SharedAnswerer:
        """A form of this live answerer for other processes, see :mod:`sb3_qa.sharing`: wrappers in a ``SubprocVecEnv`` take
        it as ``qa=`` and see every gradient update.

        :param classes: policies and features extractors of your own
        :raises QAError: when the model is not on the CPU, or its answerer cannot be saved
        """
        from sb3_qa.sharing import share

        return share(self, classes)

    def refresh(self) -> None:
        """Take in what has been learnt elsewhere, where that is so. Wrappers do this at the beginning of a step."""

    def export(self, path: str | PathLike[str]) -> None:
        """Write what is answered now as ``.onnx`` or ``.pt2``, to be asked without this package; see :mod:`sb3_qa.deploy`."""
        from sb3_qa.deploy import export

        export(self, path)

    @property
    def catalogue(self) -> Catalogue:
        """The compiled questions."""
        catalogue: Catalogue = self.policy.qa_head.catalogue
        return catalogue

    @property
    def questions(self) -> list[str]:
        """Keys of all instances, e.g. ``["crash[k=1]", "crash[k=5]", "speed"]``."""
        return list(self.catalogue.instances)

    def __repr__(self) -> str:
        seen = ", of observations normalised by VecNormalize" if self.normalized else ""
        target = ", by target networks" if self.target else ""
        first, n = self.questions[:6], len(self.questions)
        more = f", and {n - len(first)} more" if n > len(first) else ""
        return f"<{type(self).__name__} of {type(self.policy).__name__}{seen}{target}: {', '.join(first)}{more}>"

    @property
    def reads_ahead(self) -> bool:
        """Whether an agent in training acts next on what is read and kept, and goes on from there: see :meth:`ahead_of`."""
        return self.policy.qa_joint.ahead is self

    @property
    def version(self) -> int:
        """A number that changes whenever the weights do."""
        version: int = self.policy.qa_taps.version(self.policy) + self.policy.qa_head.version
        return version

    def ask(
        self, question: str, obs: Any, action: Any = None, *, state: Any = None, episode_start: Any = None
    ) -> Answer:
        """Answer one question about each observation.

        A recurrent policy answers from what it remembers too: ``state`` and ``episode_start`` are those of ``predict()``.
        Without a state it answers as at the start of an episode, as ``predict()`` acts, and logs a warning, once. The wrappers
        keep the state by themselves. Of other policies both are passed over.

        Another text is understood as far as the encoder generalises (``qa_encoder="text"`` or ``"sentence"``): the
        answer tells in ``understood_as`` what it was taken to ask, and in ``familiarity`` how near that is to what was taught.

        :param question: an instance's key, ``"crash[k=5]"``, or its text, with or without an action filled in
        :param obs: observations as the policy sees them, (n_envs, ...), or a single one (answers have no first dimension then)
        :param action: for a question about an action, the action of each observation: ``(n_envs, *action_shape)``, one for
            all, or a name; without, every action of a discrete space is asked about
        :param state: of a recurrent policy, its state before it sees ``obs``, as :meth:`remember` returns it and as
            RecurrentPPO keeps it; ``predict()`` returns as much only where the critic has no LSTM of its own
        :param episode_start: (n_envs,), which observations are the first of an episode: their state counts for nothing
        :return: of shape (n_envs,), or (n_envs, n_actions) where every action was asked about
        :raises NotTaught: (a QAError) for a question too far from what was taught; it names the nearest
        :raises QAError: for an unknown action, a text that fits several questions, or observations or a state of another shape
        """
        self.refresh()
        instance, named, familiarity = self.understanding.understand(question)
        named = None if named == "{action}" else named
        if named is not None and action is not None:
            raise QAError(
                f"the question names the action {named!r} and action={action!r} was given; expected one of them; drop one"
            )
        batch, batched = self._batch(obs)
        reading = Reading(self, batch, self._memory(batch, state, episode_start))
        actions = self._actions(instance, named if named is not None else action, len(reading))
        logits = reading.logits(instance, actions)
        answer = decode(instance, logits if batched else logits[0])
        answer.understood_as, answer.familiarity = instance.key, familiarity
        return answer

    def remember(self, obs: Any, state: Any = None, episode_start: Any = None) -> Any:
        """The state of a recurrent policy after it has seen ``obs``, for the next :meth:`ask`; None of other policies.

        Each observation of an episode is given to it once, in order, as to ``predict()``:

        >>> state = qa.remember(obs, state, episode_start)  # doctest: +SKIP

        :param obs: observations as the policy sees them, (n_envs, ...), or a single one
        :param state: before, see :meth:`ask`; None at the start of an episode
        :param episode_start: (n_envs,), which observations are the first of an episode
        :return: ``((hidden, cell), (hidden, cell))`` of actor and critic, each (n_layers, n_envs, size)
        :raises QAError: for observations or a state of another shape
        """
        if not self.recurrent:
            return None
        batch = self._batch(obs)[0]
        memory = Memory.given(self.policy, _length(batch), state, episode_start)
        hidden, cell, hidden_vf, cell_vf = self.policy.qa_taps.recall(self.policy, batch, memory)[1].state
        return (hidden, cell), (hidden_vf, cell_vf)

    def blank(self, obs: Any) -> Memory | None:
        """The memory that a batch of first observations of episodes is read with; None of a policy that has none."""
        return Memory.blank(self.policy, _length(obs)) if self.recurrent else None

    def _memory(self, obs: Any, state: Any, episode_start: Any) -> Memory | None:
        """What to read a batch of observations with that people ask about."""
        if not self.recurrent:
            return None
        memory = Memory.given(self.policy, _length(obs), state, episode_start)
        if state is None and not memory.starts.all() and not self._warned:
            self._warned = True
            log.warning(
                "%s has an LSTM and was asked about observations without state=: it answers as if each were the first of an "
                "episode. Pass state= as qa.remember() returns it, or episode_start=True where they are.",
                type(self.policy).__name__,
            )
        return memory

    def read(self, obs: Any, memory: Memory | None = None, *, keep: bool = True) -> Reading:
        """Read a batch of observations (n, ...) for many questions.

        :param memory: of a recurrent policy, what it remembers when it sees them
        :param keep: keep the reading, for whoever asks about the same observations next
        """
        version = self.version
        contents = _contents(obs)
        last = self._last
        if last is not None and last[1] == version and last[0] == contents and last[2].memory == memory:
            return last[2]
        reading = Reading(self, self._batch(obs)[0], memory, ahead=keep and self.reads_ahead)
        if keep:
            self._last = (contents, version, reading)
        return reading

    def ahead_of(self, obs: Any) -> Reading | None:
        """The last reading that was kept, where it is of these tensors, by the weights as they are, and ahead of the policy."""
        if self._last is None or self._last[1] != self.version:
            return None
        reading = self._last[2]
        return reading if reading.ahead is not None and reading.ahead.is_of(obs) else None

    def read_both(
        self, obs: Any, memory: Memory | None, others: Any, their_memory: Memory | None
    ) -> tuple[Reading, Reading]:
        """Read two batches of observations, at once where that can be; the first is kept, as by :meth:`read`."""
        apart = memory is not None or not isinstance(obs, np.ndarray) or obs.dtype != others.dtype
        if apart or self.reads_ahead:
            return self.read(obs, memory), self.read(others, their_memory, keep=False)
        both = Reading(self, self._batch(np.concatenate([obs, others]))[0])  # hardly slower than one
        first, second = both.part(slice(len(obs))), both.part(slice(len(obs), None))
        self._last = (_contents(obs), self.version, first)
        return first, second

    def values(self, keys: Sequence[str]) -> PointValues:
        """A fast reader of the point values of these instances, see :class:`~sb3_qa.values.PointValues`."""
        return PointValues(self.catalogue, keys, self.policy.qa_head)

    def _batch(self, obs: Any) -> tuple[Any, bool]:
        """A batch of observations (arrays, or tensors where SB3 had to look at them), and whether it was one before."""
        space = self.policy.observation_space
        if isinstance(obs, np.ndarray) and obs.ndim:  # as it should be: nothing to find out
            if obs.shape[1:] == space.shape and obs.ndim > 1:
                return obs, True
            if obs.shape == space.shape:
                return obs[None], False
        in_parts = isinstance(obs, dict) and isinstance(space, spaces.Dict) and obs.keys() == space.spaces.keys()
        if in_parts and all(
            isinstance(x, np.ndarray) and x.ndim > 1 and x.shape[1:] == space[key].shape for key, x in obs.items()
        ):
            return obs, True
        try:
            tensor, batched = self.policy.obs_to_tensor(obs)
            return tensor, batched
        except (ValueError, AssertionError, TypeError, KeyError, AttributeError) as error:
            mend = "pass what the policy's predict() takes"
            if isinstance(obs, tuple):
                got, mend = (
                    "a tuple",
                    "pass the first of the two where it is what reset() returned: obs, info = env.reset()",
                )
            elif isinstance(obs, dict):
                got = f"observations of shape { ({key: np.shape(value) for key, value in obs.items()}) }"
            else:
                got = f"observations of shape {np.shape(obs)}"
            raise QAError(
                f"the answerer got {got}; expected {self.policy.observation_space} as the policy sees it, one or a batch; {mend}"
            ) from error

    @property
    def understanding(self) -> Understanding:
        """Finds the instance that a text asks for; made when it is first needed."""
        if self._understanding is None or self._understanding.head is not self.policy.qa_head:
            self._understanding = Understanding(self.catalogue, self.policy.qa_head, self.action_names or ())
        return self._understanding

    def _actions(self, instance: Instance, action: Any, n: int) -> NDArray[Any] | None:
        space = self.policy.action_space
        if not instance.per_action:
            if action is not None:
                raise QAError(
                    f"{instance.key!r} is not about an action but action={action!r} was given; expected none; leave it out"
                )
            return None
        if action is None:
            if isinstance(space, spaces.Discrete):
                return None
            raise QAError(
                f"{instance.key!r} is about an action and the action space is {space}; expected action=, as its actions cannot be "
                "listed; pass the action of each observation"
            )
        if isinstance(space, spaces.Discrete):
            names = [action] if isinstance(action, str) else action
            if isinstance(names, (list, tuple, np.ndarray)) and len(names) and isinstance(names[0], str):
                action = [self._index_of(name) for name in names] if len(names) > 1 else self._index_of(names[0])
        actions = np.asarray(action)
        shape = space.shape or ()
        if actions.shape == shape:
            actions = np.broadcast_to(actions, (n, *shape))
        if actions.shape != (n, *shape):
            raise QAError(
                f"action= got the shape {actions.shape}; expected {(n, *shape)} or {shape}; give one action for each observation"
            )
        if isinstance(space, spaces.Discrete):
            low, high = int(space.start), int(space.start + space.n)
            if actions.dtype.kind not in "iu" or actions.min(initial=low) < low or actions.max(initial=low) >= high:
                raise QAError(
                    f"action= got {action!r}; expected whole numbers from {low} to {high - 1}; or a name in {self.action_names}"
                )
        return actions

    def _index_of(self, name: str) -> int:
        names, said = self.action_names or [], name
        if said not in names:  # which may differ in capitals alone
            names, said = [known.lower() for known in names], name.lower()
        if said not in names:
            raise QAError(
                f"there is no action {name!r}; expected one of {nearest(name, self.action_names or [])}; or set action_names"
            )
        return names.index(said) + int(self.policy.action_space.start)


def _streams_of(device: torch.device) -> str:
    """The kind of device whose random stream is kept besides the CPU's."""
    return "cuda" if device.type == "cpu" else device.type


def _length(obs: Any) -> int:
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


def _contents(obs: Any) -> Any:
    """What observations hold, to be compared later: the memory itself may be written over in between."""
    if isinstance(obs, dict):
        return {key: _contents(value) for key, value in obs.items()}
    array = np.asarray(obs)
    return array.shape, array.dtype, array.tobytes()


def names_in(env: Any) -> list[str] | None:
    """Names of the actions, where the environment has them: highway-env, ALE and MiniGrid each in its way."""
    if env is None or not isinstance(env.action_space, spaces.Discrete):
        return None
    n = int(env.action_space.n)
    if isinstance(env.unwrapped, SubprocVecEnv):  # a process ends where it is asked for what cannot be sent
        meant = env.env_method("get_action_meanings", indices=0)[0] if env.has_attr("get_action_meanings") else []
        names = [str(name) for name in meant]
        return names if len(names) == n and len(set(names)) == n else None
    if not isinstance(env.unwrapped, DummyVecEnv):
        return None
    ways: dict[str, Callable[[Any], list[Any]]] = {
        "action_type": lambda kind: list(kind.actions.values()),
        "get_action_meanings": lambda get: list(get()),
        "actions": lambda kind: [member.name for member in kind],
    }
    for attribute, names_of in ways.items():
        try:
            names = [str(name) for name in names_of(env.get_attr(attribute, 0)[0])]
        except Exception:
            continue
        if len(names) == n and len(set(names)) == n:
            return names
    return None
