"""The worst moments: chosen, played again from their seeds, and drawn with the answers on them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.answers import ChoiceAnswer, YesNoAnswer
from sb3_qa.evaluation import Trace
from sb3_qa.figures import draw_answers
from sb3_qa.head import decode
from sb3_qa.questions import Instance, YesNo
from sb3_qa.report.played import MakeEnv, Played, warned

__all__ = ["Clip", "Moment", "choose", "film"]

Frame = NDArray[np.uint8]
BEFORE, AFTER = 16, 10  # steps that a clip shows around a false alarm
LONGEST = 28  # frames of a clip
WIDTH = 320  # of a frame, in pixels
MOST_BYTES = 400_000  # of a clip; it is made smaller until it fits
MOST_ACTIONS, MOST_OTHERS = 5, 4  # lines under a frame


@dataclass(frozen=True)
class Moment:
    """A decision worth a look."""

    kind: str
    """"miss" or "false alarm"."""
    episode: int
    step: int
    """That the clip is about: the last decision before a catastrophe, or that of the alarm."""
    risk: float
    """The highest risk answered in time, of a miss; the risk of the alarm."""
    flagged: bool
    """Whether a veto at the report's threshold would have flagged it (of a miss: anything before it in the episode)."""
    first: int
    last: int
    """First and last decision that the clip shows."""


@dataclass(frozen=True)
class Clip:
    """A moment in pictures."""

    moving: bytes
    """WebP."""
    still: bytes
    """WebP, the decision itself."""
    size: tuple[int, int]
    """Width and height in pixels."""
    frames: int


def choose(played: Played, most: int) -> list[Moment]:
    """The ``most`` worst misses and as many false alarms, from different episodes.

    A miss is an episode with a catastrophe, the worse the lower the highest risk of the executed actions in the last steps
    before it (as many as the question looks ahead). A false alarm is a decision whose answer is known to be no, the
    worse the higher its risk.
    """
    if played.risk is None:
        return []
    horizon = played.risk.horizon or 1
    in_time, threshold = warned(played), played.plan.threshold
    misses = []
    for episode, trace in enumerate(played.watched.traces):
        happened = np.flatnonzero(trace.catastrophe)
        if len(happened):
            at = int(happened[0])
            risk = float(trace.risk[max(at + 1 - horizon, 0) : at + 1].max())
            first = max(at + 1 - max(horizon, BEFORE), at + 1 - LONGEST, 0)
            misses.append(Moment("miss", episode, at, risk, bool(in_time[episode]), first, at))
    misses.sort(key=lambda moment: (moment.flagged, moment.risk))
    return [*misses[:most], *_false_alarms(played, most, threshold)]


def _false_alarms(played: Played, most: int, threshold: float) -> list[Moment]:
    assert played.risk is not None
    each = next(each for each in played.record.answered() if each.instance.key == played.risk.key)
    assert isinstance(each.answer, YesNoAnswer)
    no = np.flatnonzero(each.truth == 0)
    found: dict[int, Moment] = {}
    for n in no[np.argsort(-each.answer.probability[no], kind="stable")].tolist():
        episode, step, risk = int(each.episode[n]), int(each.elapsed[n]), float(each.answer.probability[n])
        if episode not in found:
            last = min(step + AFTER, len(played.watched.traces[episode].rewards) - 1)
            first = max(step - BEFORE, 0)
            found[episode] = Moment("false alarm", episode, step, risk, risk >= threshold, first, last)
        if len(found) >= most:
            break
    return list(found.values())


def film(played: Played, moment: Moment, make: MakeEnv) -> Clip | str:
    """Play an episode again and draw the moment, or say why it cannot be."""
    trace = played.watched.traces[moment.episode]
    env = make(1, played.plan.seed + moment.episode, "rgb_array")
    try:
        if env.render_mode != "rgb_array":
            return "the environment draws no frames (it has no render mode rgb_array)"
        try:
            frames, at = _frames(played, moment, trace, env)
        except _Otherwise:
            return "the environment went another way when it was played again from the same seed and actions"
    finally:
        env.close()
    return _encoded(frames, at)


class _Otherwise(Exception):
    """The environment is not the same from the same seed."""


def _frames(played: Played, moment: Moment, trace: Trace, env: VecEnv) -> tuple[list[Frame], int]:
    """Frames of a moment, and which of them is the decision itself."""
    qa = played.qa
    obs = env.reset()
    memory = qa.blank(obs) if qa.recurrent else None
    frames: list[Frame] = []
    at = 0
    for step in range(moment.last + 1):
        reading = qa.read(obs, memory, keep=False)
        action = trace.actions[step]
        if step >= moment.first:
            frame = env.render()
            if frame is None:
                raise _Otherwise
            at = len(frames) if step == moment.step else at
            lines = _lines(qa, played.risk, reading, np.asarray(action))
            title = _title(moment, step)
            frames.append(draw_answers(_small(frame), lines, title=title, alarm=played.plan.threshold))
        obs, rewards, dones, _ = env.step(np.asarray(action)[None])
        raw = env.get_original_reward() if hasattr(env, "get_original_reward") else rewards
        if not np.isclose(float(raw[0]), trace.rewards[step], rtol=1e-3, atol=1e-3):
            raise _Otherwise
        if bool(dones[0]) != (step == len(trace.rewards) - 1):
            raise _Otherwise
        memory = reading.remembered(dones)
    return frames, at


def _title(moment: Moment, step: int) -> str:
    place = "the catastrophe follows" if moment.kind == "miss" else "the alarm"
    return f"step {step}" + (f": {place}" if step == moment.step else "")


def _lines(
    qa: QuestionAnswerer, risk: Instance | None, reading: Any, action: NDArray[Any]
) -> list[tuple[str, float | None, str]]:
    assert risk is not None
    space, names = qa.policy.action_space, qa.action_names
    lines: list[tuple[str, float | None, str]] = []
    if isinstance(space, spaces.Discrete) and names is not None:
        risks = decode(risk, reading.logits(risk)).value[0]
        chosen = int(action) - int(space.start)
        order = [chosen, *(n for n in range(int(space.n)) if n != chosen)][:MOST_ACTIONS]
        for n in sorted(order):
            mark = "> " if n == chosen else "   "
            lines.append((f"{mark}{risk.key}, {names[n]}"[:30], float(risks[n]), _percent(float(risks[n]))))
    else:
        value = float(decode(risk, reading.logits(risk, action[None])).value[0])
        lines.append((risk.key[:30], value, _percent(value)))
    others: dict[str, Instance] = {}
    for instance in qa.catalogue.instances.values():
        if instance.question.name != risk.question.name and not instance.per_action:
            others.setdefault(instance.question.name, instance)
    for instance in list(others.values())[:MOST_OTHERS]:
        answer = decode(instance, reading.logits(instance))
        if isinstance(answer, ChoiceAnswer):
            n = int(answer.value[0])
            lines.append((instance.key[:30], None, f"{answer.options[n]}"[:10]))
        elif isinstance(instance.question.answer, YesNo) and isinstance(answer, YesNoAnswer):
            value = float(answer.value[0])
            lines.append((instance.key[:30], None, _percent(value)))
        else:
            lines.append((instance.key[:30], None, f"{float(answer.value[0]):.3g}"))
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def _small(frame: Any) -> Frame:
    from PIL import Image

    picture = Image.fromarray(np.asarray(frame, np.uint8)[..., :3])
    height = max(round(picture.height * WIDTH / picture.width), 1)
    resample = Image.Resampling.BOX if picture.width > WIDTH else Image.Resampling.NEAREST
    return np.asarray(picture.resize((WIDTH, min(height, 2 * WIDTH)), resample))


def _encoded(frames: list[Frame], at: int) -> Clip:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    times = [120] * len(pictures)
    times[at] = 700
    times[-1] = 1500
    moving = b""
    for quality, keep in ((70, 1), (50, 1), (35, 2), (20, 4), (5, 8)):
        shown = [n for n in range(len(pictures)) if n % keep == 0 or n in (at, len(pictures) - 1)]
        file = io.BytesIO()
        first, *rest = [pictures[n] for n in shown]
        duration = [times[n] * (keep if times[n] == 120 else 1) for n in shown]
        options = dict(append_images=rest, duration=duration, loop=0, quality=quality, method=4)
        first.save(file, "WEBP", save_all=True, **options)
        moving = file.getvalue()
        if len(moving) <= MOST_BYTES:
            break
    file = io.BytesIO()
    pictures[at].save(file, "WEBP", quality=75, method=4)
    return Clip(moving, file.getvalue(), (pictures[0].width, pictures[0].height), len(shown))
