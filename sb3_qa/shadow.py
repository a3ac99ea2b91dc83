"""Episodes for a certificate: played without interfering, kept as they come, and gone on with after an interruption.

They are played in *rounds*: every environment is reset and plays one episode. Rounds are kept whole or not at all, and the
next one begins from a seed of its own. So which episodes are counted never depends on how long they took (taking those
that end first would favour short ones), and a round that was interrupted is played again as it was: a fresh one in its place
would favour short ones too, as what is interrupted is mostly long.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.certificate import answerer_digests, name_of, normalizer_digest
from sb3_qa.errors import QAError
from sb3_qa.evaluation import Agent, SeededEpisodes, Trace, run_episodes
from sb3_qa.extras import need
from sb3_qa.facts import FactReader
from sb3_qa.storage import weights_digest
from sb3_qa.truth import Fact, Step
from sb3_qa.wrappers.shell import as_answerer, qa_wrappers
from sb3_qa.wrappers.veto import VecVetoAction, VetoAction, VetoRule

__all__ = ["CatastropheOf", "ShadowEpisodes", "episode_record", "play_shadow"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Record = dict[str, Any]
FORMAT, VERSION = "sb3_qa episodes", 1


def episode_record(trace: Trace, thresholds: Floats, lead: int, window: int | None) -> Record:
    """What a certificate needs of an episode. A *level* is how many of the thresholds a risk reaches: it is flagged at those.

    :return: ``steps``; ``catastrophe``, the number of the step that led into the first one, or None; ``level``, the highest of
        decisions whose flag counts (all of them, without a catastrophe); ``flags``, how many steps have which level
    """
    risk = np.where(np.isfinite(trace.risk), trace.risk, np.inf)  # as a veto has it: not finite is a catastrophe
    levels = np.searchsorted(thresholds, risk, side="right")
    happened = np.flatnonzero(trace.catastrophe)
    arrival = int(happened[0]) + 1 if len(happened) else None
    counted = levels
    if arrival is not None:  # decision t leads to arrival t + 1
        counted = levels[max(arrival - window, 0) if window else 0 : max(arrival - lead + 1, 0)]
    kinds, count = np.unique(levels, return_counts=True)
    return {
        "steps": len(levels),
        "catastrophe": arrival,
        "level": int(counted.max(initial=0)),
        "flags": [list(pair) for pair in zip(kinds.tolist(), count.tolist(), strict=True)],
    }


@dataclass
class ShadowEpisodes:
    """Records of the episodes, and where they are from."""

    n_thresholds: int
    header: Record
    path: Path | None = None
    rounds: list[list[Record]] = field(default_factory=list)
    judged: bool = False
    catastrophes: int = 0
    """How many have a catastrophe."""

    @property
    def records(self) -> list[Record]:
        """Of all episodes, in order."""
        return [record for each in self.rounds for record in each]

    @property
    def episodes(self) -> int:
        """How many there are."""
        return sum(map(len, self.rounds))

    @property
    def steps(self) -> int:
        """How many steps they have."""
        return sum(record["steps"] for record in self.records)

    @property
    def misses(self) -> Integers:
        """For each threshold, how many catastrophic episodes have no flag in time."""
        return self._without_flag(catastrophic=True)

    @property
    def false_alarms(self) -> Integers:
        """For each threshold, how many episodes without a catastrophe have a flag."""
        return self.episodes - self.catastrophes - self._without_flag(catastrophic=False)

    @property
    def flagged_steps(self) -> Integers:
        """For each threshold, how many steps are flagged."""
        at_level = np.zeros(self.n_thresholds + 1, np.int64)
        for record in self.records:
            for level, count in record["flags"]:
                at_level[level] += count
        return self.steps - np.cumsum(at_level)[:-1]

    @property
    def seeds(self) -> dict[str, int]:
        """What they can be played again from."""
        return {"seed": self.header["seed"], "rounds": len(self.rounds), "n_envs": self.header["n_envs"]}

    @property
    def environment(self) -> dict[str, Any]:
        """See :func:`describe`."""
        return dict(self.header["environment"])

    @property
    def digests(self) -> dict[str, str | None]:
        """Of the answerer, the agent, and the statistics of observations."""
        return dict(self.header["digests"])

    def _without_flag(self, catastrophic: bool) -> Integers:
        levels = [record["level"] for record in self.records if (record["catastrophe"] is not None) == catastrophic]
        # No flag at threshold j where the level is at most j.
        return np.cumsum(np.bincount(np.array(levels, np.int64), minlength=self.n_thresholds + 1))[:-1]

    def add(self, records: list[Record]) -> None:
        """Take in a round, and keep it."""
        self._count(records)
        self._append({"round": len(self.rounds) - 1, "episodes": records})

    def _count(self, records: list[Record]) -> None:
        self.rounds.append(records)
        self.catastrophes += sum(record["catastrophe"] is not None for record in records)

    def close(self) -> None:
        """It has been looked at which were missed: going on after that would be choosing when to stop by the outcome."""
        if not self.judged:
            self.judged = True
            self._append({"judged": True})

    def _append(self, line: Record) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def open(self) -> None:
        """Begin the file, or read it and go on.

        :raises QAError: when it is of something else
        """
        if self.path is None:
            return
        lines: list[Record] = []
        if self.path.exists():
            try:
                text = self.path.read_text(encoding="utf-8")
                # A line without its end was being written when the power went.
                lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            except (OSError, ValueError) as error:
                raise QAError(
                    f"{self.path} cannot be read ({error}); expected episodes that certify() kept; give another path"
                ) from error
            self._check_header(lines)
        for number, line in enumerate(lines[1:], 2):
            self._check_line(number, line)
            if line.get("judged"):
                self.judged = True
            else:
                self._count(line["episodes"])
        # Written anew, so that what follows does not continue half a line.
        content = [self.header, *lines[1:]]
        temporary = Path(f"{self.path}.part")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise QAError(
                f"{self.path} cannot be written ({error}); expected a file in a folder that can be written to; give another path"
            ) from error

    def _check_line(self, number: int, line: Any) -> None:
        try:
            if line.get("judged") is True:
                return
            fits = all(
                0 <= record["level"] <= self.n_thresholds
                and (record["catastrophe"] is None or 1 <= record["catastrophe"] <= record["steps"])
                and sum(count for _, count in record["flags"]) == record["steps"] >= 1
                and all(0 <= level <= self.n_thresholds and count > 0 for level, count in record["flags"])
                for record in line["episodes"]
            )
        except (AttributeError, KeyError, TypeError, ValueError):  # what it has is of other types
            fits = False
        if not fits:
            raise QAError(
                f"{self.path} has {json.dumps(line)[:80]} in line {number}; expected a round of episodes as certify() kept it; give "
                "another path"
            )

    def _check_header(self, lines: list[Record]) -> None:
        if not lines:
            return
        kept = lines[0]
        if not isinstance(kept, dict) or kept.get("format") != FORMAT:
            raise QAError(
                f"{self.path} does not hold episodes that certify() kept; expected none of it; give another path"
            )
        expected = json.loads(json.dumps(self.header))
        differ = [key for key in expected if kept.get(key) != expected[key]]
        if differ:
            raise QAError(
                f"{self.path} holds the episodes of another certification: it differs in {differ}, e.g. {differ[0]} is "
                f"{str(kept.get(differ[0]))[:80]} and {str(expected[differ[0]])[:80]} was expected; give another path"
            )


def play_shadow(
    qa: QuestionAnswerer | str | PathLike[str],
    env: VecEnv,
    question: str,
    model: Agent,
    *,
    thresholds: Floats,
    lead: int,
    window: int | None,
    catastrophe: Fact | None,
    deterministic: bool,
    seed: int,
    episodes: int | None,
    enough: tuple[int, int],
    most: int,
    claim: Mapping[str, Any],
    path: str | PathLike[str] | None,
    progress_bar: bool,
) -> ShadowEpisodes:
    """Play episodes in shadow mode, see :func:`sb3_qa.certify`.

    :param enough: without ``episodes``, how many with and without a catastrophe to go on for
    :param claim: what will be claimed, which must stay as it is in a file that is gone on with
    """
    answerer = as_answerer("certify", qa) if isinstance(qa, (QuestionAnswerer, str, PathLike)) else None
    if answerer is None:
        raise QAError(
            f"certify got qa={qa!r}; expected a QuestionAnswerer or the path of one; give e.g. from_model(model)"
        )
    _check_environment(env)
    # A question about the state is certified too, for vetoes by a callable or a model; here nobody acts on it.
    per_action = answerer.catalogue.find(question).per_action
    shadow = VecVetoAction(env, question, 1.0, "safest" if per_action else _as_proposed, shadow=True, qa=answerer)
    fact = CatastropheOf(answerer, model, question) if catastrophe is None else catastrophe
    header = {
        "format": FORMAT,
        "version": VERSION,
        "question": question,
        "catastrophe": str(fact) if isinstance(fact, (str, CatastropheOf)) else _described(fact),
        "lead": lead,
        "window": window,
        **claim,
        "deterministic": deterministic,
        "thresholds": hashlib.sha256(thresholds.tobytes()).hexdigest(),
        "seed": seed,
        "n_envs": env.num_envs,
        "environment": describe(env),
        "digests": _digests(answerer, model, env),
    }
    played = ShadowEpisodes(len(thresholds), header, None if path is None else Path(path))
    played.open()
    version = _version(answerer, model)
    progress = _Progress(played, episodes, enough[0]) if progress_bar else None
    with _held_statistics(env):
        while (wanted := _wanted(played, episodes, enough, most)) > 0:
            if played.judged:
                raise QAError(
                    f"{path} holds {played.episodes} episodes that have been judged already; expected no more of them, as adding episodes "
                    "once the misses are known would make the claim untrue; give another path and another seed"
                )
            start = _seed_of_round(seed, len(played.rounds))
            shadow.seed(start)
            with _own_randomness(model, start, env.num_envs):
                round_ = run_episodes(
                    model, shadow, min(wanted, env.num_envs), catastrophe=fact, deterministic=deterministic
                )
            if isinstance(fact, CatastropheOf):
                fact.check_seen()
            if _version(answerer, model) != version:
                raise QAError(
                    "the weights changed while certify() played; expected them frozen; certify when nothing is learning"
                )
            played.add([episode_record(trace, thresholds, lead, window) for trace in round_.traces])
            if progress is not None:
                progress.update()
    if progress is not None:
        progress.close()
    return played


def _wanted(played: ShadowEpisodes, episodes: int | None, enough: tuple[int, int], most: int) -> int:
    """How many more episodes to play. It must not depend on whether catastrophes were missed."""
    if episodes is not None:
        if played.episodes > episodes:
            raise QAError(
                f"{played.path} holds {played.episodes} episodes and episodes={episodes} was given; expected at least as many; give it, or "
                "another path"
            )
        return episodes - played.episodes
    seen = played.catastrophes
    if seen >= enough[0] and played.episodes - seen >= enough[1]:
        return 0
    return most - played.episodes


def _as_proposed(obs: Any, action: Any) -> Any:
    return action


def _described(fact: Any) -> str:
    """What tells a callable from another in a file of episodes: its name, and what it does."""
    code = getattr(fact, "__code__", None)
    does = "" if code is None else repr((code.co_code, code.co_consts, code.co_names))
    return f"{name_of(fact)} {hashlib.sha256(does.encode()).hexdigest()[:12]}"


def describe(env: VecEnv) -> dict[str, Any]:
    """What an environment is, as JSON takes it: wrappers from the outside in, specification, spaces."""
    wrappers, inner = [], env
    while isinstance(inner, VecEnvWrapper):
        wrappers.append(type(inner).__name__)
        inner = inner.venv
    try:
        spec = env.get_attr("spec", 0)[0]
    except AttributeError:  # of environments that are not gymnasium's
        spec = None
    try:
        told = None if spec is None else json.loads(spec.to_json())
    except Exception:  # a specification may hold what JSON does not take
        told = str(spec.id)
    return {
        "wrappers": [*wrappers, type(inner).__name__],
        "spec": told,
        "observation_space": str(env.observation_space),
        "action_space": str(env.action_space),
    }


class CatastropheOf:
    """The event of a question's truth, read of a step as training reads it.

    :param qa: whose question
    :param model: who acts, and may have the callable of a fact of which a saved answerer has the name alone
    :param key: of the instance
    """

    def __init__(self, qa: QuestionAnswerer, model: Any, key: str) -> None:
        # A saved answerer has only the name of a fact that was a callable; the model that acts may have the callable.
        own = getattr(getattr(model, "policy", None), "qa_head", None)
        catalogue = own.catalogue if own is not None and key in own.catalogue.instances else qa.catalogue
        instance = catalogue.find(key)
        question = instance.question
        self._reader = FactReader([catalogue.target_for(instance)])
        self._column = self._reader.column[0]
        self._info: Mapping[str, Any] = {}
        self._fact = question.truth.fact

    def __str__(self) -> str:
        return self._fact if isinstance(self._fact, str) else str(getattr(self._fact, "__name__", "callable"))

    def __call__(self, step: Step) -> bool:
        self._info = step.info
        return bool(self._reader.read([step.info], [step])[0, self._column] == 1.0)

    def check_seen(self) -> None:
        """Refuse a fact that never appeared.

        :raises QAError: naming it
        """
        try:
            self._reader.check_seen(self._info)
        except QAError as error:
            raise QAError(
                f"{error}; or, of a saved answerer whose fact was a callable, give certify(catastrophe=...)"
            ) from None


def _check_environment(env: Any) -> None:
    if not isinstance(env, VecEnv):
        raise QAError(f"certify got env={env!r}; expected an SB3 VecEnv; write make_vec_env(id, n_envs=8)")
    for wrapper, _ in qa_wrappers(env):
        if isinstance(wrapper.rule, VetoRule) and not wrapper.rule.shadow:
            raise QAError(
                f"certify got an environment with an acting {type(wrapper).__name__}; expected none, as what would happen without it is to "
                "be seen; leave it out, or give it shadow=True"
            )
    inside = any(isinstance(wrapper, VetoAction) for wrapper, _ in qa_wrappers(env))  # was looked at above
    if not inside and any(env.env_is_wrapped(VetoAction)):
        raise QAError(
            "certify got environments with a VetoAction in other processes, where it cannot be seen whether it acts; expected none, as "
            "what would happen without it is to be seen; leave it out"
        )
    if any(env.env_is_wrapped(SeededEpisodes)):
        raise QAError(
            "certify got environments in SeededEpisodes; expected ones that take the seeds it gives; leave that out"
        )


def _digests(qa: QuestionAnswerer, model: Any, env: VecEnv) -> dict[str, str | None]:
    policy = getattr(model, "policy", None)
    digests: dict[str, str | None] = {**answerer_digests(qa), "agent": None, "normalizer": normalizer_digest(env)}
    if isinstance(policy, torch.nn.Module):
        digests["agent"] = weights_digest(policy)
    return digests


def _version(qa: QuestionAnswerer, model: Any) -> int:
    """A number that changes with the weights, and costs less than their digests."""
    policy = getattr(model, "policy", None)
    agent = policy.state_dict(keep_vars=True).values() if isinstance(policy, torch.nn.Module) else []
    return qa.version + sum(tensor._version for tensor in agent)


def _seed_of_round(seed: int, number: int) -> int:
    """Far from each other, and from the small numbers that training is seeded with. Environments add their index."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) % (2**31 - 2**16)


@contextmanager
def _held_statistics(env: VecEnv) -> Iterator[None]:
    """What observations are normalised by stays as it is."""
    normalize = unwrap_vec_normalize(env)
    before = normalize is not None and normalize.training
    if normalize is not None:
        normalize.training = False
    try:
        yield
    finally:
        if normalize is not None:
            normalize.training = before


@contextmanager
def _own_randomness(model: Any, seed: int, n_envs: int) -> Iterator[None]:
    """Seed what an agent draws its actions from, and leave the streams that training goes on with as they were.

    The noise of gSDE is a function of the state that is drawn once in a while: here for every episode by itself.
    """
    device = getattr(model, "device", None)
    cuda = [device] if isinstance(device, torch.device) and device.type == "cuda" else []
    before, space = np.random.get_state(), getattr(model, "action_space", None)
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        np.random.seed(seed)
        if space is not None:  # DQN explores by it
            model.action_space = copy.deepcopy(space)
            model.action_space.seed(seed)
        noise = _noise_of(model)
        kept = [dict(vars(each)) for each in noise]
        if noise:
            (model.policy if hasattr(model.policy, "reset_noise") else model.actor).reset_noise(n_envs)
        try:
            yield
        finally:
            for each, before_it in zip(noise, kept, strict=True):
                vars(each).update(before_it)
            np.random.set_state(before)
            if space is not None:
                model.action_space = space


def _noise_of(model: Any) -> list[Any]:
    """The distributions whose noise depends on the state."""
    policy = getattr(model, "policy", None)
    if not getattr(model, "use_sde", False) or policy is None:
        return []
    found = [getattr(each, "action_dist", None) for each in (policy, getattr(policy, "actor", None))]
    return [each for each in found if isinstance(each, StateDependentNoiseDistribution)]


class _Progress:
    def __init__(self, played: ShadowEpisodes, episodes: int | None, enough: int) -> None:
        tqdm = need("tqdm", "demo", "certify, with progress_bar=True,").tqdm
        self.played, self.by_episode = played, episodes is not None
        self.bar = tqdm(
            total=episodes if self.by_episode else enough, unit="episode" if self.by_episode else "catastrophe"
        )
        self.update()

    def update(self) -> None:
        done = self.played.episodes if self.by_episode else min(self.played.catastrophes, self.bar.total)
        self.bar.set_postfix(episodes=self.played.episodes, catastrophes=self.played.catastrophes, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()
