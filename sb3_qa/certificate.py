"""Thresholds with a guarantee: at most so many catastrophes come without a flag.

>>> certificate = certify(qa, env, "crash[k=5]", model, miss_rate=0.05)  # doctest: +SKIP
>>> env = VecVetoAction(env, "crash[k=5]", threshold=certificate, qa=qa)  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sb3_qa.bounds import THRESHOLDS, allowed, check_share, check_whole, fixed_sequence, needed, upper_bound
from sb3_qa.errors import QAError
from sb3_qa.truth import Fact
from sb3_qa.units import observation_normalizer

if TYPE_CHECKING:  # the running of episodes stands above this module, and the answerer beside it
    from stable_baselines3.common.vec_env import VecEnv

    from sb3_qa.answerer import QuestionAnswerer
    from sb3_qa.evaluation import Agent
    from sb3_qa.shadow import ShadowEpisodes

__all__ = ["Certificate", "NotCertified", "certify"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
FORMAT, VERSION = "sb3_qa certificate", 1
SPARE_MISSES = 2  # misses that a run whose length is not given leaves room for


class NotCertified(QAError):
    """No threshold could be certified: there were too few catastrophes, or too many were missed at every one."""

    def __init__(self, message: str, catastrophes: int, episodes: int, needed: int) -> None:
        super().__init__(message)
        self.catastrophes = catastrophes
        """Catastrophic episodes that were seen."""
        self.episodes = episodes
        """Episodes that were played."""
        self.needed = needed
        """Catastrophic episodes that are needed if none of them is missed."""


@dataclass(frozen=True)
class Certificate:
    """A threshold, what is claimed of it, and all that the claim rests on. Made by :func:`certify`.

    It dies when the answerer or the agent learns on, when either of them is exchanged, or when the environment is
    another one; and it speaks of catastrophes while *nobody acts on the flags*. A veto changes which states are visited after its first
    flag: what carries over is :attr:`unflagged_bound`. That a catastrophe is flagged does not mean that it is averted:
    what is executed instead can fail too.
    """

    question: str
    """Key of the instance."""
    threshold: float
    """An action is flagged when its risk is at least this."""
    miss_rate: float
    """What is claimed: the largest share of catastrophic episodes without a flag in time."""
    confidence: float
    """Chance, over all episodes that might have been played, that the claim of a certificate is true."""
    lead: int
    """A flag is in time when it comes at least so many steps before the first catastrophe of the episode; at 1, the decision
    that leads into it is the last that counts."""
    window: int | None
    """... and at most so many steps before; None for any number."""
    false_alarm_rate: float | None
    """If given, also claimed: the largest share of episodes *without* a catastrophe that have a flag."""
    episodes: int
    """Number of episodes played."""
    catastrophes: int
    """Number of them with a catastrophe."""
    misses: int
    """Number of those without a flag in time."""
    false_alarms: int
    """Number of episodes without a catastrophe that have a flag."""
    steps: int
    """Number of steps in all episodes."""
    flagged_steps: int
    """Number of them whose action was flagged: a veto would have replaced it."""
    deterministic: bool
    """Whether the agent took its likeliest actions."""
    seeds: Mapping[str, int] = field(hash=False)
    """``seed``, ``rounds`` and ``n_envs``: in each round, every environment played one episode, from seeds drawn from ``seed``."""
    environment: Mapping[str, Any] = field(hash=False)
    """Wrappers, specification and spaces."""
    digests: Mapping[str, str | None] = field(hash=False)
    """SHA-256 of the answerer's ``weights`` and ``questions``, of the ``agent``'s weights, and of the ``normalizer``'s statistics."""
    catastrophe: str | None = None
    """What counted as one, where that was given: a key of ``info``, or the name of a callable; None for the question's own fact."""
    mismatch: Literal["error", "warn"] = field(default="error", compare=False)
    """What a wrapper does when its answerer is not the one certified, see :meth:`only_warn`; not saved."""

    def __post_init__(self) -> None:
        self._check_fields()
        counts = (self.misses, self.catastrophes, self.episodes, self.false_alarms, self.steps, self.flagged_steps)
        safe = self.episodes - self.catastrophes
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)
        if not (
            whole
            and self.misses <= self.catastrophes <= self.episodes
            and self.false_alarms <= safe
            and self.flagged_steps <= self.steps
            and self.misses <= allowed(self.catastrophes, self.miss_rate, self._confidence_of_each)
            and (
                self.false_alarm_rate is None
                or self.false_alarms <= allowed(safe, self.false_alarm_rate, self._confidence_of_each)
            )
        ):
            raise QAError(
                f"the certificate of {self.question!r} does not hold together: {self.misses} misses in {self.catastrophes} catastrophes do "
                f"not show what it claims; expected it as certify() made it; certify again"
            )

    def _check_fields(self) -> None:
        """Refuse what certify() would not have written, whatever the counts."""
        least = self.lead if isinstance(self.lead, int) else 1
        expected = {
            "question": ("the key of a question", isinstance(self.question, str) and self.question != ""),
            "threshold": ("a number in [0, 1]", _is_number(self.threshold) and 0.0 <= self.threshold <= 1.0),
            "miss_rate": ("a share between 0 and 1", _is_share(self.miss_rate)),
            "confidence": ("a share between 0 and 1", _is_share(self.confidence)),
            "false_alarm_rate": (
                "a share between 0 and 1, or none",
                self.false_alarm_rate is None or _is_share(self.false_alarm_rate),
            ),
            "lead": ("a number of steps, at least 1", _is_whole(self.lead, 1)),
            "window": (
                "a number of steps, at least lead, or none",
                self.window is None or _is_whole(self.window, least),
            ),
            "deterministic": ("true or false", isinstance(self.deterministic, bool)),
            "seeds": (
                "whole numbers by name",
                isinstance(self.seeds, Mapping) and all(_is_whole(each, 0) for each in self.seeds.values()),
            ),
            "environment": ("a description", isinstance(self.environment, Mapping)),
            "digests": (
                "those of weights and questions",
                isinstance(self.digests, Mapping)
                and all(isinstance(self.digests.get(name), str) for name in ("weights", "questions")),
            ),
        }
        for name, (what, fits) in expected.items():
            if not fits:
                raise QAError(
                    f"the certificate has {name}={getattr(self, name)!r}; expected {what}, as certify() made it; certify again"
                )

    @property
    def claim(self) -> str:
        """What is claimed, in words."""
        before = f"at least {self.lead} step{'s' * (self.lead > 1)} before"
        if self.window is not None:
            before += f" and at most {self.window} before"
        what = f"the catastrophe of {self.question!r}"
        if self.catastrophe is not None:
            what = f"{self.catastrophe!r} (in place of {what})"
        alarms = ""
        if self.false_alarm_rate is not None:
            alarms = f", and of the episodes without it at most {self.false_alarm_rate:.4g} have a flag"
        return (
            f"With confidence {self.confidence:g}: of the episodes in which {what} happens, at most a share "
            f"of {self.miss_rate:.4g} come without a flag (risk >= {self.threshold:.6g}) {before}{alarms}. This is about these weights of "
            "answerer and agent in this environment while nobody acts on the flags. It ends when either of them learns on or is "
            "exchanged, or the environment changes. Under a veto, which changes the states visited, what remains is that at most a "
            f"share of {self.unflagged_bound:.3g} of all episodes has a catastrophe with no flag before it."
        )

    @property
    def missed(self) -> float:
        """Share of the catastrophic episodes played that had no flag in time; the claim is about those to come."""
        return self.misses / self.catastrophes

    @property
    def false_alarms_per_episode(self) -> float:
        """Share of the episodes without a catastrophe that had a flag; nan if there were none."""
        safe = self.episodes - self.catastrophes
        return self.false_alarms / safe if safe else float("nan")

    @property
    def false_alarm_bound(self) -> float:
        """Upper bound of that share in episodes to come, at :attr:`confidence`, by itself.

        The threshold was chosen by catastrophic episodes alone, so for the others it is as good as given beforehand.
        """
        return upper_bound(self.false_alarms, self.episodes - self.catastrophes, self.confidence)

    @property
    def flagged_share(self) -> float:
        """Expected share of steps that are flagged, and would be vetoed at least until a veto changes the states."""
        return self.flagged_steps / self.steps

    @property
    def unflagged_bound(self) -> float:
        """Upper bound of the share of *all* episodes that have a catastrophe without a flag in time: :attr:`miss_rate` times
        the upper bound (at :attr:`confidence`) of the share that have a catastrophe.

        An episode under a veto is as it would have been without, until its first flag. So the share with a catastrophe and
        no flag at all before it is the same, and this bounds it as well.
        """
        return self.miss_rate * upper_bound(self.catastrophes, self.episodes, self.confidence)

    @property
    def _confidence_of_each(self) -> float:
        """Of two claims each may fail half as often, so that both hold together with :attr:`confidence`."""
        return confidence_of_each(self.confidence, self.false_alarm_rate)

    def only_warn(self) -> Certificate:
        """The same certificate for wrappers that shall go on, with a warning, with an answerer that is not the one certified.

        The threshold is then a number like any other: nothing is claimed of it.
        """
        return replace(self, mismatch="warn")

    def check(self, qa: QuestionAnswerer, env: Any = None) -> None:
        """Refuse an answerer that is not the one certified.

        :param env: an SB3 environment, to hold what it normalises observations by against the certificate too
        :raises QAError: when weights, questions or statistics are others (a warning is logged after :meth:`only_warn`)
        """
        got: dict[str, str | None] = dict(answerer_digests(qa))
        if env is not None:
            got["normalizer"] = normalizer_digest(env)
        differ = [name for name, digest in got.items() if digest != self.digests.get(name)]
        if not differ:
            return
        words = {"normalizer": "statistics of observations (VecNormalize)"}
        message = (
            f"the answerer's {' and '.join(words.get(name, name) for name in differ)} are not those that were certified for "
            f"{self.question!r} (digest {str(got[differ[0]])[:12]}; expected {str(self.digests.get(differ[0]))[:12]}): the certificate "
            "says nothing of it"
        )
        if self.mismatch == "error":
            raise QAError(
                f"{message}; certify() this one, pass the certified one as qa=, or let it go on with threshold=certificate.only_warn()"
            )
        log.warning("%s; the threshold %g goes on without a guarantee", message, self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """All that :meth:`save` writes, as JSON takes it."""
        content = {key: value for key, value in asdict(self).items() if key != "mismatch"}
        return {"format": FORMAT, "version": VERSION, "claim": self.claim, **content}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Certificate:
        """The certificate of :meth:`to_dict`.

        :raises QAError: when it is none, or its counts do not show what it claims
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise QAError("this is not a certificate; expected what Certificate.save() wrote; check the path")
        if data.get("version") != VERSION:
            raise QAError(
                f"the certificate has format version {data.get('version')}; expected {VERSION}; install the sb3_qa that wrote it"
            )
        known = {each.name for each in fields(cls)}
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except TypeError as error:  # a field is missing, or of another type
            raise QAError(
                f"the certificate is damaged ({error}); expected it as save() wrote it; certify again"
            ) from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON; the file appears whole or not at all, and its folder is made.

        :raises QAError: when it cannot be written
        """
        _check_path("Certificate.save", path)
        temporary = Path(f"{os.fspath(path)}.part")
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise QAError(
                f"{os.fspath(path)} cannot be written ({error}); expected a file in a folder that can be written to; give another path"
            ) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Certificate:
        """Read a file written by :meth:`save`.

        :raises QAError: when it is missing, damaged, or its counts do not show what it claims
        """
        _check_path("Certificate.load", path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QAError(
                f"{os.fspath(path)} cannot be read ({error}); expected a file written by Certificate.save(); check the path"
            ) from error
        return cls.from_dict(data)


def certify(
    qa: QuestionAnswerer | str | PathLike[str],
    env: VecEnv,
    question: str,
    model: Agent,
    miss_rate: float = 0.05,
    confidence: float = 0.95,
    episodes: int | None = None,
    lead: int = 1,
    *,
    window: int | None = None,
    false_alarm_rate: float | None = None,
    catastrophe: Fact | None = None,
    deterministic: bool = False,
    thresholds: ArrayLike | None = None,
    most_episodes: int = 20_000,
    seed: int = 0,
    path: str | PathLike[str] | None = None,
    progress_bar: bool = False,
) -> Certificate:
    """Play fresh episodes without interfering, and find the highest threshold that lets few catastrophes go unflagged.

    Found is the highest of ``thresholds`` for which, with this confidence, at most a share ``miss_rate`` of the
    *episodes* with a catastrophe go without a flag at least ``lead`` steps before. Episodes are the unit, as the steps of one
    are not independent. The thresholds are tested from the lowest up, each with the exact binomial tail over the
    catastrophic episodes, until the first that fails: Learn then Test with fixed-sequence testing (Angelopoulos, Bates,
    Candès, Jordan and Lei 2021, arXiv 2110.01052). As misses only grow with the threshold this equals a one-sided
    tolerance limit (Wilks 1941).

    Without ``episodes`` it goes on until there are catastrophes enough for two misses (124 at the defaults), or
    ``most_episodes``. When to stop depends on how many catastrophes there were and never on whether they were
    missed, so, given their number, misses are binomial as in a run of a fixed length.

    The agent and the answerer must not learn meanwhile. Needs environments that a seed determines; their episodes are
    drawn independently of each other. Whoever certifies several agents and keeps the best must certify it once more, with another seed.

    :param qa: whose answers are the risks; a live one is taken as it is now, and must not change meanwhile
    :param env: fresh environments, with no veto that acts. Statistics of a ``VecNormalize`` are held meanwhile
    :param question: key of a yes/no instance about ``{action}``; its catastrophe is the fact of its truth. The first one in
        an episode counts, and no later one
    :param model: who acts: an SB3 model, or anything with its ``predict``
    :param episodes: number of episodes to play
    :param lead: steps from a flag to the catastrophe that a flag needs to count; 1 counts the decision that leads into it
    :param window: a flag earlier than so many steps before does not count; by default any earlier one in the episode does
    :param false_alarm_rate: claim as well that at most this share of the episodes without a catastrophe has a flag. Each
        of the two claims then gets half of ``1 - confidence``
    :param catastrophe: the fact, where the question does not hold it (a callable is not saved with an answerer)
    :param deterministic: take the likeliest actions; by default they are sampled, as in training
    :param thresholds: those to be tested, in [0, 1] and ascending; chosen before these episodes were seen. By default
        some thousand, evenly spread in the odds
    :param seed: of the episodes
    :param path: a file of JSON lines that keeps what has been played. The same call goes on where an earlier
        one was interrupted: at most the round of one episode per environment that was running is played again
    :param progress_bar: show one (needs tqdm)
    :raises NotCertified: when there were too few catastrophes (it says how many are needed, and how many episodes that should
        take), or when no threshold holds
    :raises QAError: when the arguments do not fit, or the weights change meanwhile
    """
    from sb3_qa.shadow import play_shadow

    check_share("certify", "miss_rate", miss_rate)
    check_share("certify", "confidence", confidence, 0.95)
    if false_alarm_rate is not None:
        check_share("certify", "false_alarm_rate", false_alarm_rate)
    if episodes is not None:
        check_whole("certify", "episodes", episodes)
    check_whole("certify", "lead", lead)
    if window is not None:
        check_whole("certify", "window", window, lead)
    each = confidence_of_each(confidence, false_alarm_rate)
    grid = _checked_thresholds(thresholds)
    if isinstance(model, type) or not callable(getattr(model, "predict", None)):
        raise QAError(
            f"certify got model={model!r}; expected who acts: a model of SB3, or anything with its predict(); give the agent"
        )
    if path is not None:
        _check_path("certify", path)
    played = play_shadow(
        qa,
        env,
        question,
        model,
        thresholds=grid,
        lead=lead,
        window=window,
        catastrophe=catastrophe,
        deterministic=deterministic,
        seed=check_whole("certify", "seed", seed, 0),
        episodes=episodes,
        enough=(
            needed(miss_rate, each, SPARE_MISSES),
            needed(false_alarm_rate, each, SPARE_MISSES) if false_alarm_rate else 0,
        ),
        most=check_whole("certify", "most_episodes", most_episodes),
        claim=dict(miss_rate=miss_rate, confidence=confidence, false_alarm_rate=false_alarm_rate),
        path=path,
        progress_bar=progress_bar,
    )
    _refuse_too_few(played, question, needed(miss_rate, each))
    played.close()  # from here on it is known what was missed: nothing may be added
    index = fixed_sequence(played.misses, played.catastrophes, miss_rate, each) - 1
    if index < 0:
        raise NotCertified(
            f"no threshold of {question!r} can be certified: {played.misses[0]} of {played.catastrophes} catastrophes came without a "
            f"flag in time even at {grid[0]:.3g}; expected at most {allowed(played.catastrophes, miss_rate, each)} for {miss_rate=:g}; "
            f"train longer, ask about a longer horizon, claim a higher miss_rate, or a smaller lead than {lead}",
            played.catastrophes,
            played.episodes,
            needed(miss_rate, each),
        )
    safe, alarms = played.episodes - played.catastrophes, int(played.false_alarms[index])
    if false_alarm_rate is not None and not alarms and safe < needed(false_alarm_rate, each):
        raise NotCertified(
            f"nothing can be claimed of the episodes without a catastrophe of {question!r}: {safe or 'none'} of {played.episodes} were "
            f"without one; expected at least {needed(false_alarm_rate, each)} for {false_alarm_rate=:g}; play more, or leave "
            "false_alarm_rate out",
            played.catastrophes,
            played.episodes,
            needed(miss_rate, each),
        )
    if false_alarm_rate is not None and alarms > allowed(safe, false_alarm_rate, each):
        raise NotCertified(
            f"no threshold of {question!r} keeps both claims: the highest that keeps {miss_rate=:g} is {grid[index]:.3g}, where "
            f"{alarms} of {safe} episodes without a catastrophe have a flag; expected at most "
            f"{max(allowed(safe, false_alarm_rate, each), 0)} for {false_alarm_rate=:g}; train longer, claim less, or leave it out",
            played.catastrophes,
            played.episodes,
            needed(miss_rate, each),
        )
    return Certificate(
        question=question,
        threshold=float(grid[index]),
        miss_rate=float(miss_rate),
        confidence=float(confidence),
        lead=int(lead),
        window=None if window is None else int(window),
        false_alarm_rate=None if false_alarm_rate is None else float(false_alarm_rate),
        episodes=played.episodes,
        catastrophes=played.catastrophes,
        misses=int(played.misses[index]),
        false_alarms=alarms,
        steps=played.steps,
        flagged_steps=int(played.flagged_steps[index]),
        deterministic=bool(deterministic),
        seeds=played.seeds,
        environment=played.environment,
        digests=played.digests,
        catastrophe=None if catastrophe is None else name_of(catastrophe),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0.0 < value < 1.0


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_path(where: str, path: Any) -> None:
    if not isinstance(path, (str, PathLike)):
        raise QAError(f'{where} got path={path!r}; expected the path of a file; give e.g. "crash.json"')


def _refuse_too_few(played: ShadowEpisodes, question: str, least: int) -> None:
    seen, episodes = played.catastrophes, played.episodes
    if seen >= least:
        return
    if seen:
        about = f"some {math.ceil(least * episodes / seen):,} episodes at the rate seen"
    else:  # the rate may be anything below 3 / episodes (95 %)
        about = f"more than {math.ceil(least / upper_bound(0, episodes, 0.95)):,} episodes, as none was seen"
    raise NotCertified(
        f"{seen} catastrophes of {question!r} happened in {episodes:,} episodes; expected at least {least}, and then none may be missed, "
        f"which should take {about}; give episodes=... or a higher most_episodes=, or claim a higher miss_rate or a lower confidence",
        seen,
        episodes,
        least,
    )


def _checked_thresholds(thresholds: ArrayLike | None) -> Floats:
    """As float32 holds them, as that is how a wrapper compares them with risks."""
    if thresholds is None:
        return THRESHOLDS
    try:
        grid = np.asarray(thresholds, np.float32).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise QAError(f"certify got thresholds={thresholds!r}; expected numbers in [0, 1], ascending") from error
    if grid.ndim != 1 or not len(grid) or not ((grid >= 0) & (grid <= 1)).all() or not (np.diff(grid) > 0).all():
        raise QAError(
            f"certify got thresholds={thresholds!r}; expected probabilities in [0, 1], ascending, as the safest is tested first; sort them"
        )
    return grid


def confidence_of_each(confidence: float, false_alarm_rate: float | None) -> float:
    """The confidence at which each of one or two claims is tested (Bonferroni)."""
    return confidence if false_alarm_rate is None else 1 - (1 - confidence) / 2


def answerer_digests(qa: QuestionAnswerer) -> dict[str, str]:
    """What tells the answerer that was certified from another."""
    from sb3_qa.answerer import QuestionAnswerer
    from sb3_qa.storage import questions_digest, weights_digest

    if not isinstance(qa, QuestionAnswerer):
        raise QAError(
            f"the certificate was to be held against {type(qa).__name__}; expected a QuestionAnswerer; write e.g. "
            "certificate.check(QuestionAnswerer.from_model(model))"
        )
    return {"weights": weights_digest(qa.policy, target=qa.target), "questions": questions_digest(qa)}


def normalizer_digest(env: Any) -> str | None:
    """SHA-256 of what an SB3 environment normalises observations by; None where it does not."""
    normalize = observation_normalizer(env)
    if normalize is None:
        return None
    statistics = normalize.obs_rms if isinstance(normalize.obs_rms, dict) else {"": normalize.obs_rms}
    digest = hashlib.sha256()
    for name in sorted(statistics):
        digest.update(name.encode() + statistics[name].mean.tobytes() + statistics[name].var.tobytes())
    return digest.hexdigest()


def name_of(fact: Any) -> str:
    """What a fact is called."""
    return fact if isinstance(fact, str) else str(getattr(fact, "__name__", "a callable"))
