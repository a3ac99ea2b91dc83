"""A live answerer in other processes: its weights in shared memory, each gradient update visible, no lock held.

The weights that an agent learns are moved, in place, into a file in memory that other processes map too. Whoever answers there
keeps a copy of its own and renews it when the weights have changed, so that all it says in one step is said by one state of
the weights.

A copy taken while the optimiser writes could be *torn*: some layers from before the update and some from after it. A counter
tells: it is odd while weights are being written and goes up by two with every write. A reader takes the counter, copies, and
takes the counter again; if it was odd, or has changed, it copies again. The writer never waits and never looks at who reads
(a *seqlock*; Lameter 2005, "Effective synchronization on Linux/NUMA systems", section on seqlocks; Boehm 2012, "Can seqlocks
get along with programming language memory models?").
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.errors import QAError
from sb3_qa.storage import all_weights, load_answerer

__all__ = ["SharedAnswerer", "share"]

ALIGNMENT = 64  # bytes; each weight begins a line of the processor's cache
PATIENCE = 5.0  # seconds that a reader tries for before it gives up, and raises
LIVE = Path("/dev/shm")  # a file system in memory, where there is one

Place = tuple[str, int, tuple[int, ...], str]  # of a weight: name, offset, shape, type


class SharedAnswerer:
    """A live answerer that can be sent to other processes: give it to wrappers there as ``qa=``, or to their ``bind``.

    Made by :meth:`~sb3_qa.QuestionAnswerer.share`. Pickled, it is the path of the weights and what they mean, a few kilobytes;
    it can be opened while the process that learns lives.

    :param owner: who learns
    :param classes: policies and features extractors of your own, as ``QuestionAnswerer.load`` takes them
    """

    def __init__(self, owner: QuestionAnswerer, classes: Iterable[type] = ()) -> None:
        policy = owner.policy
        weights = all_weights(policy)
        if any(tensor.device.type != "cpu" for tensor in weights.values()):
            raise QAError(
                f"share() got a policy on {policy.device}; expected one on the CPU, whose memory processes can share; make the model with "
                'device="cpu", or keep the wrappers in this process: VecVetoAction(SubprocVecEnv(...))'
            )
        if owner.target:
            raise QAError(
                "share() got an answerer of target networks, which no optimiser moves; expected the live one; leave out target=True"
            )
        self._classes = tuple(classes)
        self._folder = Path(tempfile.mkdtemp(prefix="sb3_qa_", dir=LIVE if os.access(LIVE, os.W_OK) else None))
        self._removed = weakref.finalize(self, _remove, self._folder, os.getpid())
        self._process, self.owner = os.getpid(), owner
        owner.save(self._folder / "answerer.qa")
        load_answerer(
            self._folder / "answerer.qa", "cpu", self._classes
        )  # what could not be opened there is refused here
        self._places: list[Place] = []
        size = ALIGNMENT  # the counter stands in front
        for name, tensor in weights.items():
            array = tensor.detach().numpy()
            self._places.append((name, size, array.shape, array.dtype.str))
            size += -(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        self._memory: Any = np.memmap(self._folder / "weights", np.uint8, "w+", shape=(size,))
        self._counter: NDArray[np.int64] = self._memory[:8].view(np.int64)
        for (_, offset, shape, kind), tensor in zip(self._places, weights.values(), strict=True):
            there = _view(self._memory, offset, shape, kind)
            there[...] = tensor.detach().numpy()
            tensor.data = torch.from_numpy(there)
        self._watch(policy)

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_places": self._places, "_classes": self._classes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _process=0, owner=None)

    def _watch(self, policy: Any) -> None:
        """Have the counter go up around everything that writes the weights."""
        reference = weakref.ref(self)
        begin, end = functools.partial(_call, reference, "begin"), functools.partial(_call, reference, "end")
        for optimizer in _optimizers(policy):
            optimizer.register_step_pre_hook(begin)
            optimizer.register_step_post_hook(end)  # behind the hook by which the weights that answer follow
        policy.register_load_state_dict_pre_hook(begin)
        policy.register_load_state_dict_post_hook(end)
        policy.qa_shared = self  # which lives as long as who writes

    def begin(self) -> None:
        """The weights are going to be written, by hand: optimisers and ``load_state_dict`` say so themselves."""
        self._counter[0] |= 1

    def end(self) -> None:
        """They have been written."""
        self._counter[0] = (self._counter[0] | 1) + 1

    @property
    def n_writes(self) -> int:
        """How often the weights have been written since they are shared."""
        return int(self._counter[0]) // 2

    def open(self) -> QuestionAnswerer:
        """Who answers in this process: the live answerer itself where it learns, elsewhere one that follows it, one a process.

        :raises QAError: when the process that learns has gone
        """
        if self.owner is not None and self._process == os.getpid():
            return self.owner
        key = f"{os.getpid()} {self._folder}"
        following = _OPEN.get(key)
        if following is None:
            _OPEN[key] = following = FollowingAnswerer(self._folder, self._places, self._classes)
        return following


class FollowingAnswerer(QuestionAnswerer):
    """Answers by a copy of weights that are learnt in another process, renewed by :meth:`refresh`.

    :param folder: where they are
    :param places: what stands where in them
    """

    def __init__(self, folder: Path, places: list[Place], classes: tuple[type, ...]) -> None:
        if not (folder / "weights").is_file():
            raise QAError(
                f"the shared weights {folder} are gone; expected the process that learns to live and to keep its model; share() again there"
            )
        frozen = load_answerer(folder / "answerer.qa", "cpu", classes)
        super().__init__(frozen.policy, frozen.action_names, frozen.normalized)
        self._shared: Any = np.memmap(folder / "weights", np.uint8, "r")
        self._counter: NDArray[np.int64] = self._shared[:8].view(np.int64)
        weights = all_weights(self.policy)
        self._copy = np.zeros(len(self._shared), np.uint8)
        self._pairs = [
            (weights[name], torch.from_numpy(_view(self._copy, offset, shape, kind)))
            for name, offset, shape, kind in places
        ]
        self._seen = -1
        self.n_retries = 0
        """Copies that were thrown away, as the weights were being written meanwhile."""
        self.refresh()

    def refresh(self) -> None:
        before = int(self._counter[0])
        if before == self._seen:
            return
        give_up = time.monotonic() + PATIENCE
        while True:
            if not before & 1:
                self._copy[:] = self._shared
                if int(self._counter[0]) == before:
                    break
            if time.monotonic() > give_up:
                raise QAError(
                    f"the shared weights could not be read in {PATIENCE:g} s, as they were being written all the time; expected pauses "
                    "between updates; end() every begin(), or share fewer weights"
                )
            self.n_retries += 1
            time.sleep(0 if self.n_retries % 16 else 0.0005)
            before = int(self._counter[0])
        with torch.no_grad():
            for mine, theirs in self._pairs:
                mine.copy_(theirs)
        self.policy.qa_head.followed()
        self._seen = before


_OPEN: weakref.WeakValueDictionary[str, FollowingAnswerer] = weakref.WeakValueDictionary()


def share(answerer: QuestionAnswerer, classes: Iterable[type] = ()) -> SharedAnswerer:
    """The shared form of a live answerer; its model's weights are moved once, and asked again it is the same."""
    shared: SharedAnswerer | None = getattr(answerer.policy, "qa_shared", None)
    if (
        shared is None or shared.owner is None or shared.owner.policy is not answerer.policy
    ):  # that of a copy is another
        shared = SharedAnswerer(answerer, classes)
    return shared


def _view(memory: Any, offset: int, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
    dtype = np.dtype(kind)
    n = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return np.asarray(memory)[offset : offset + n].view(dtype).reshape(shape)


def _optimizers(policy: torch.nn.Module) -> list[torch.optim.Optimizer]:
    found = [each for module in policy.modules() for each in vars(module).values()]
    return list({id(each): each for each in found if isinstance(each, torch.optim.Optimizer)}.values())


def _call(reference: weakref.ref[SharedAnswerer], method: str, *_: Any) -> None:
    shared = reference()
    if shared is not None:
        getattr(shared, method)()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not where it was forked
        shutil.rmtree(folder, ignore_errors=True)
