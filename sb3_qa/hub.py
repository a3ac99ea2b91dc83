"""Models with questions on the Hugging Face Hub, by the conventions of ``huggingface_sb3``. Needs the extra ``sb3-qa[deploy]``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import gymnasium as gym
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_qa.answerer import QuestionAnswerer
from sb3_qa.errors import QAError
from sb3_qa.extras import need
from sb3_qa.questions import Question
from sb3_qa.wrappers.substitutes import takes_masks

__all__ = ["package", "push"]

log = logging.getLogger(__name__)


def package(
    model: BaseAlgorithm,
    folder: str | PathLike[str],
    env_id: str,
    eval_env: VecEnv | gym.Env[Any, Any],
    *,
    scores: Mapping[str, float] | None = None,
    limits: str = "",
    n_eval_episodes: int = 10,
    deterministic: bool = True,
) -> Path:
    """Make the folder of a repository: model, answerer, statistics, results and model card. Nothing is uploaded.

    Files are named as ``huggingface_sb3`` names them: ``ppo-CartPole-v1.zip``, ``config.json``, ``results.json``, ``vec_normalize.pkl``
    and ``README.md``; beside them ``ppo-CartPole-v1.qa`` and, if the policy can be exported, ``ppo-CartPole-v1.onnx``. There is no video.

    :param folder: new or empty
    :param env_id: the environment's id
    :param eval_env: as the model sees it, for the mean reward on the card; neither statistics nor rewards are normalised in it
    :param scores: of the answers, for the card, e.g. ``{"crash[k=5] Brier score": 0.006}``
    :param limits: what users are to know, in Markdown
    :return: the folder
    :raises QAError: when it holds files already, the model has no questions, or what this needs is not installed
    """
    sb3_names = need("huggingface_sb3.naming_schemes", "deploy", "sb3_qa.hub")
    cards = need("huggingface_hub", "deploy", "sb3_qa.hub")
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise QAError(
            f"package got the folder {str(target)!r}, which holds files; expected a new one, as all of it is pushed; name one"
        )
    answerer = QuestionAnswerer.from_model(model)
    venv = eval_env if isinstance(eval_env, VecEnv) else DummyVecEnv([lambda: Monitor(eval_env)])
    normalize = unwrap_vec_normalize(venv)
    with _as_it_is(normalize):  # and before there is a folder, should it fail
        mean, std = _evaluation_of(model, venv)(model, venv, n_eval_episodes, deterministic)
    algorithm = {"RecurrentPPO": "ppo_lstm"}.get(
        type(model).__name__, type(model).__name__.lower()
    )  # as rl_zoo3 names them
    name = sb3_names.ModelName(algorithm, sb3_names.EnvironmentName(env_id))
    target.mkdir(parents=True, exist_ok=True)
    model.save(target / name.filename)
    answerer.save(target / f"{name}.qa")
    files = [name.filename, f"{name}.qa"]
    try:
        answerer.export(target / f"{name}.onnx")
        files.append(f"{name}.onnx")
    except QAError as error:
        log.warning("the folder is made without an ONNX file: %s", error)
    if normalize is not None:
        normalize.save(str(target / "vec_normalize.pkl"))
        files.append("vec_normalize.pkl")
    with ZipFile(target / name.filename) as saved:
        config = json.loads(saved.read("data"))
    config["system_info"] = stable_baselines3.get_system_info(print_info=False)[0]
    (target / "config.json").write_text(json.dumps(config))
    results = {
        "mean_reward": float(mean),
        "std_reward": float(std),
        "is_deterministic": deterministic,
        "n_eval_episodes": n_eval_episodes,
        "eval_datetime": datetime.now(timezone.utc).isoformat(),
        **({"scores": dict(scores)} if scores else {}),
    }
    (target / "results.json").write_text(json.dumps(results))
    reward = f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    title = type(model).__name__
    data = cards.ModelCardData(
        library_name="stable-baselines3",
        tags=[env_id, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3-qa"],
        model_name=title,
        eval_results=[
            cards.EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=env_id,
                dataset_name=env_id,
                metric_type="mean_reward",
                metric_name="mean_reward",
                metric_value=reward,
                verified=False,
            )
        ],
    )
    text = _text(title, env_id, name, files, answerer, reward, n_eval_episodes, scores or {}, limits)
    cards.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(target / "README.md")
    return target


def push(folder: str | PathLike[str], repo_id: str, *, message: str = "A model with questions", api: Any = None) -> str:
    """Upload a folder made by :func:`package`, as one commit.

    :param repo_id: e.g. ``"my-team/ppo-CartPole-v1"``; made if it is not there
    :param api: a ``huggingface_hub.HfApi``; one that is logged in as you are if None
    :return: the repository's address
    :raises QAError: when the folder has no model card
    """
    if not (Path(folder) / "README.md").is_file():
        raise QAError(
            f"push got {str(folder)!r}, which has no README.md; expected a folder made by package(); make it first"
        )
    api = need("huggingface_hub", "deploy", "sb3_qa.hub").HfApi() if api is None else api
    address = api.create_repo(repo_id=repo_id, exist_ok=True)  # which knows the owner where none was given
    api.upload_folder(repo_id=address.repo_id, folder_path=str(folder), commit_message=message)
    return str(address)


def _evaluation_of(model: BaseAlgorithm, venv: VecEnv) -> Callable[..., Any]:
    """SB3's evaluation, or that of sb3-contrib, which tells an agent what its environment allows."""
    if not takes_masks(model) or not venv.has_attr("action_masks"):
        return evaluate_policy
    from sb3_contrib.common.maskable.evaluation import (
        evaluate_policy as maskable_evaluation,
    )  # there, as the model is one of its

    return cast("Callable[..., Any]", maskable_evaluation)


@contextmanager
def _as_it_is(normalize: VecNormalize | None) -> Iterator[None]:
    """Statistics stay as they are, and rewards the environment's own."""
    if normalize is None:
        yield
        return
    before = normalize.training, normalize.norm_reward
    normalize.training = normalize.norm_reward = False
    try:
        yield
    finally:
        normalize.training, normalize.norm_reward = before


def _text(
    title: str,
    env_id: str,
    name: str,
    files: list[str],
    answerer: QuestionAnswerer,
    reward: str,
    n: int,
    scores: Mapping[str, float],
    limits: str,
) -> str:
    rows = "\n".join(
        f"| `{each.name}` | {_cell(each.text)} | {_truth(each)} | {each.answer} |"
        for each in answerer.catalogue.questions
    )
    measured = "".join(f"| {_cell(key)} | {value:g} |\n" for key, value in scores.items())
    table = f"\n## Its answers, measured\n\n| | |\n|---|---|\n{measured}" if measured else ""
    sees = (
        'Observations are normalised: wrap environments in `VecNormalize.load("vec_normalize.pkl", env)`.\n'
        if answerer.normalized
        else ""
    )
    inside = " · ".join(f"`{file}`" for file in files)
    return f"""# **{title}** agent playing **{env_id}**, and a question-answerer

Trained with [stable-baselines3](https://github.com/DLR-RM/stable-baselines3) jointly with a question-answerer (`sb3_qa`), from whose
answers rewards, catastrophe flags and vetoes can be made. Mean reward {reward} over {n} episodes.

{inside}

## Questions

| | | truth | answer |
|---|---|---|---|
{rows}
{table}
## Limits

Answers are about the agent as it has been acting, in {env_id}; where it never went they are guesses, and a threshold that is not certified
has no guarantee. {limits}

## Usage

```python
from huggingface_hub import hf_hub_download
from sb3_qa import QuestionAnswerer

qa = QuestionAnswerer.load(hf_hub_download("<owner>/{name}", "{name}.qa"))  # no pickle; the .zip holds some
print(qa.questions)
```
{sees}"""


def _truth(question: Question) -> str:
    truth = question.truth
    fact = truth.fact if isinstance(truth.fact, str) else getattr(truth.fact, "__name__", str(truth.fact))
    return f"`{truth.operator}({_cell(str(fact))})`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
