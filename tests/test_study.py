"""The study: arms, label budgets, what is measured, runs that resume, and the report."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from scipy.stats import trim_mean
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Certificate, QAError, Question, certify
from sb3_qa.__main__ import main
from sb3_qa.base_rates import BaseRates
from sb3_qa.evaluation import AnswerRecord, Episodes, Trace
from sb3_qa.scores import Interval
from sb3_qa.study import measure
from sb3_qa.study.aggregate import collect, difference, estimate, interquartile_mean, verdict
from sb3_qa.study.arms import ARMS, LimitedLabels, Trained, train_arm
from sb3_qa.study.measure import flagging_threshold
from sb3_qa.study.report import write_report
from sb3_qa.study.run import Cell, finished, grid, run_cell, run_grid
from sb3_qa.study.task import Task, load_task, task_names
from sb3_qa.truth import eventually, now


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("cliff").quickly()


@pytest.fixture(scope="module")
def plain(task: Task) -> Trained:
    return train_arm(task, "plain", 0)


def state(trained: Trained) -> dict[str, torch.Tensor]:
    return {name: value for name, value in trained.model.policy.state_dict().items() if "qa_head" not in name}


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


# --- Arms -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arm", ["detached", "separate", "probe"])
def test_arms_with_the_agent_of_plain_have_it_bit_for_bit(task: Task, plain: Trained, arm: str) -> None:
    trained = train_arm(task, arm, 0)
    assert not moved(state(plain), state(trained))
    head = trained.model.policy.qa_head.flat
    assert head.grad is not None and float(head.grad.abs().sum()) > 0


def test_a_plain_agent_is_kept_for_the_arms_that_begin_with_it(task: Task, tmp_path: Path) -> None:
    trained = train_arm(task, "plain", 0, folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    assert not moved(state(trained), state(train_arm(task, "probe", 0, folder=tmp_path)))
    assert [each.stat().st_mtime_ns for each in tmp_path.iterdir()] == [before]


def test_a_probe_leaves_actor_and_critics_of_an_off_policy_agent_alone() -> None:
    pytest.importorskip("mujoco")
    sac = load_task("hopper_sac").quickly()
    sac = Task(**{**vars(sac), "timesteps": 160, "hyperparameters": {**sac.hyperparameters, "gradient_steps": 1}})
    before, after = train_arm(sac, "plain", 0), train_arm(sac, "probe", 0)
    weights = {name: value for name, value in state(before).items() if "target" not in name}
    assert not moved(weights, state(after))
    head = after.model.policy.qa_head.flat
    assert head.grad is not None and float(head.grad.abs().sum()) > 0


@pytest.mark.parametrize("arm", ["joint", "finetune", "anchored"])
def test_arms_that_shape_the_trunk_have_another_agent(task: Task, plain: Trained, arm: str) -> None:
    assert moved(state(plain), state(train_arm(task, arm, 0)))


def test_a_muted_agent_learns_from_its_questions_alone(task: Task, plain: Trained) -> None:
    without = Task(**{**vars(task), "qa_kwargs": {**task.qa_kwargs, "qa_coef": 0.0}})
    assert not moved(state(plain), state(train_arm(without, "finetune", 0)))


def test_an_anchored_agent_stays_nearer(task: Task, plain: Trained) -> None:
    obs = torch.arange(36)

    def divergence(arm: str) -> float:
        trained = train_arm(strong, arm, 0)
        with torch.no_grad():
            before, after = (each.model.policy.get_distribution(obs).distribution for each in (plain, trained))
        return float(torch.distributions.kl_divergence(before, after).mean())

    strong = Task(**{**vars(task), "qa_kwargs": {**task.qa_kwargs, "qa_coef": 10.0}})
    assert 0 < divergence("anchored") < divergence("finetune")


def test_the_separate_network_is_as_large_as_the_agents_and_shares_nothing(task: Task, plain: Trained) -> None:
    policy = train_arm(task, "separate", 0).model.policy
    own = {id(parameter) for parameter in policy.twin.parameters()}
    assert not own & {id(parameter) for parameter in policy.parameters()}
    trunk = sum(p.numel() for p in policy.mlp_extractor.parameters())
    assert sum(p.numel() for p in policy.twin.layers.parameters()) == trunk
    fresh = copy.deepcopy(policy.twin.state_dict())
    assert any(float(value.abs().sum()) > 0 for value in fresh.values())


def test_a_share_of_the_labels_weighs_as_much_as_all(task: Task) -> None:
    callback = LimitedLabels(0.25, 0)
    seen: list[np.ndarray] = []
    end = callback._on_rollout_end

    def watch() -> None:
        end()
        seen.append(callback._policy.qa_joint.store._weight)

    callback._on_rollout_end = watch  # type: ignore[method-assign]
    from sb3_qa.study import arms

    original = arms.LimitedLabels
    arms.LimitedLabels = lambda share, seed: callback  # type: ignore[assignment, misc]
    try:
        train_arm(task, "joint", 0, labels=0.25)
    finally:
        arms.LimitedLabels = original  # type: ignore[misc]
    weight = np.concatenate(seen)
    assert set(np.unique(weight)) == {0.0, 4.0}
    assert weight.mean() == pytest.approx(1.0, abs=0.25)


def test_a_head_begins_with_the_base_rates_of_the_labels_it_has(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    add = BaseRates.add
    monkeypatch.setattr(BaseRates, "add", lambda self, *truths: add(self, *truths) or counted.append(self.n_rows))
    train_arm(task, "joint", 0, labels=0.25)
    first = task.hyperparameters["n_steps"] * task.n_envs
    assert 0.1 * first < counted[0] < 0.4 * first


def test_no_more_steps_are_flagged_than_wanted() -> None:
    rng = np.random.default_rng(0)
    for risks in map(np.float32, (rng.random(500), rng.integers(0, 9, 500) / 10, np.full(50, 0.3))):
        for rate in (0.0, 0.02, 0.1, 0.5, 1.0):
            threshold = flagging_threshold(risks, rate)
            assert (risks >= threshold).mean() <= rate
            lower = risks[risks < threshold]
            assert not len(lower) or (risks >= lower.max()).mean() > rate


def test_a_penalty_is_taken_where_the_catastrophe_happens(task: Task) -> None:
    from sb3_qa.study.arms import Punished

    venv = Punished(task.training_env(0), task.catastrophe, 7.0)
    bare = task.training_env(0)
    for env in (venv, bare):
        env.action_space.seed(0)
        env.reset()
    fell = 0
    for _ in range(60):
        actions = np.array([venv.action_space.sample() for _ in range(task.n_envs)])
        _, rewards, _, infos = venv.step(actions)
        _, own, _, _ = bare.step(actions)
        lost = np.array([7.0 * info[task.catastrophe] for info in infos], np.float32)
        np.testing.assert_allclose(rewards, own - lost)
        fell += int(lost.sum())
    assert fell


def test_bad_arms_are_refused(task: Task) -> None:
    with pytest.raises(QAError, match="expected one of"):
        train_arm(task, "joined", 0)
    with pytest.raises(QAError, match=r"\(0, 1\]"):
        train_arm(task, "joint", 0, labels=0.0)
    with pytest.raises(QAError, match="expected one of"):
        load_task("clif")


# --- Measures ---------------------------------------------------------------------------------------------------------------
def test_the_certified_threshold_is_that_of_certify(task: Task, tmp_path: Path) -> None:
    """On the very episodes that certify() plays."""
    trained = train_arm(task, "joint", 0)
    qa = trained.answerer
    venv = DummyVecEnv([task.make] * 4)
    from sb3_qa import shadow

    traces: list[Trace] = []
    record = shadow.episode_record

    def keep(trace: Trace, *rest: object) -> dict[str, object]:
        traces.append(trace)
        return record(trace, *rest)  # type: ignore[arg-type]

    shadow.episode_record = keep  # type: ignore[assignment]
    try:
        certificate: Certificate = certify(
            qa, venv, task.risk, trained.model, 0.2, 0.95, episodes=40, thresholds=measure.GRID, catastrophe="fell"
        )
    finally:
        shadow.episode_record = record
    assert measure.certified_threshold(Episodes(tuple(traces))) == pytest.approx(certificate.threshold)


def test_summary_counts_episodes() -> None:
    def trace(bad: bool, vetoed: bool) -> Trace:
        none, some = np.zeros(2, np.bool_), np.array([False, True])
        return Trace(np.zeros(2), np.ones(2), np.zeros(2), none, some if vetoed else none, some if bad else none, False)

    told = measure.summary(Episodes((trace(True, True), trace(False, True), trace(False, False), trace(False, False))))
    assert told["catastrophes"] == 0.25 and told["veto_rate"] == 0.25
    assert told["disrupted"] == pytest.approx(1 / 3) and told["return"] == 2.0


class Walled(gym.Env[np.ndarray, int]):
    """Five actions, of which two or three may be chosen, by turns; ``info`` tells which was."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(5)
        self.t = 0

    def action_masks(self) -> np.ndarray:
        return np.array([self.t % 2 == 0, True, True, False, False])

    def told(self) -> tuple[np.ndarray, dict[str, bool]]:
        return np.array([self.t % 10 / 10], np.float32), {"bad": False, "forbidden": False}

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, bool]]:
        self.t = 0
        return self.told()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, bool]]:
        forbidden = not self.action_masks()[action]
        self.t += 1
        obs, info = self.told()
        return obs, 0.0, False, self.t == 30, {**info, "bad": action == 2, "forbidden": forbidden}


def test_vetoes_of_an_agent_with_masks_are_counted_and_forbid_what_the_environment_does() -> None:
    """A veto masks what it objects to, and would leave nothing to count if the agent were told so beforehand."""
    walled = Task(
        name="walled",
        title="walled",
        make=Walled,
        questions=[Question("Will {action} be bad?", eventually("bad", within=1), name="bad")],
        catastrophe="forbidden",
        risk="bad",
        algorithm=MaskablePPO,
        hyperparameters=dict(n_steps=32, batch_size=64),
        timesteps=128,
        n_envs=2,
        solved=0.0,
        episodes=4,
    )
    trained = train_arm(walled, "joint", 0)
    assert trained.answerer is not None
    calm = measure.play(walled, trained.model, 0, measure.shadowed(walled, trained.answerer))
    risks = np.concatenate([trace.risk for trace in calm.traces])
    rows = measure.vetoes(walled, trained.model, trained.answerer, calm)
    assert calm.catastrophes.sum() == 0 and len(np.unique(risks)) > 2
    for row in rows[:3]:
        assert 0.0 < row["veto"]["veto_rate"] < 0.25
        assert row["random"]["veto_rate"] == pytest.approx(row["veto"]["veto_rate"], abs=0.1)
        assert row["veto"]["catastrophes"] == row["random"]["catastrophes"] == 0.0


def test_probes_find_what_the_latents_hold(task: Task) -> None:
    """A question that the head was not taught is answered well by a probe on the latents, as they hold the observation."""
    from sb3_qa.study.knowledge import Knowledge, probes

    more = Task(**{**vars(task), "qa_kwargs": {**task.qa_kwargs, "qa_coef": 0.0}, "episodes": 12})
    trained = train_arm(more, "joint", 0)
    assert trained.answerer is not None
    learn, test = Knowledge(trained.answerer), Knowledge(trained.answerer)
    for seed, record in ((50_000, learn), (10_000, test)):
        measure.play(more, trained.model, seed, record=record)
    for of_latents in (True, False):
        found = probes(learn, test, ["edge", "low"], of_latents=of_latents)
        assert found["low"]["skill"] > 0.8 > found["low"]["own_skill"]
        assert found["low"]["own_brier"] > found["low"]["brier"]


def test_a_head_that_is_taught_afterwards_is_a_probe_too(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins anew on the agent's trunk, and counts where it is the best; another head leaves the agent as it is."""
    from sb3_qa.study import knowledge

    untaught = Task(**{**vars(task), "qa_kwargs": {**task.qa_kwargs, "qa_coef": 0.0}, "episodes": 12})
    first = train_arm(untaught, "joint", 0)
    later = train_arm(Task(**{**vars(task), "timesteps": 4096}), "probe", 0, before=first.model)
    assert first.answerer is not None and later.answerer is not None
    before, after = (each.model.policy.state_dict() for each in (first, later))
    assert all(
        torch.equal(value, after[name]) == ("qa_head" not in name)
        for name, value in before.items()
        if value.numel() > 1
    )
    learn, test = knowledge.Knowledge(first.answerer), knowledge.Knowledge(first.answerer)
    held = AnswerRecord(later.answerer)
    for seed, record in ((50_000, learn), (10_000, test)):
        measure.play(untaught, first.model, seed, record=record)
    measure.play(untaught, later.model, 10_000, record=held)
    monkeypatch.setattr(knowledge, "MOST_PROBED", 60)  # too few for the others
    alone = knowledge.probes(learn, test, ["stay_low"], of_latents=True)["stay_low"]
    found = knowledge.probes(learn, test, ["stay_low"], of_latents=True, taught=later.answerer)["stay_low"]
    assert found["brier"] == pytest.approx(measure.answers(held)["stay_low"]["brier"], abs=1e-6)
    assert found["brier"] < alone["brier"] and found["own_brier"] == alone["own_brier"]


class Shade(gym.Env[np.ndarray, int]):
    """An image, dark or bright, all pixels alike, of which the lowest row is always black."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Discrete(2)
        self.t = 0

    def told(self) -> tuple[np.ndarray, dict[str, bool]]:
        self.shade = int(self.np_random.integers(256))
        image = np.full((36, 36, 3), self.shade, np.uint8)
        image[-1] = 0
        return image, {"dark": self.shade < 100}

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, bool]]:
        super().reset(seed=kwargs.get("seed"))
        self.t = 0
        return self.told()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, bool]]:
        self.t += 1
        obs, info = self.told()
        return obs, 0.0, False, self.t == 20, info


def test_a_judge_sees_images_too() -> None:
    from sb3_qa.study.knowledge import Knowledge, _telling, probes

    shade = Task(
        name="shade",
        title="shade",
        make=Shade,
        questions=[Question("Is it dark?", now("dark"), name="dark")],
        catastrophe="dark",
        risk="dark",
        algorithm=PPO,
        hyperparameters=dict(n_steps=16, batch_size=32),
        policy="CnnPolicy",
        policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)),
        timesteps=32,
        n_envs=2,
        solved=0.0,
        episodes=20,
    )
    trained = train_arm(shade, "joint", 0)
    assert trained.answerer is not None
    learn, test = Knowledge(trained.answerer), Knowledge(trained.answerer)
    for seed, record in ((50_000, learn), (10_000, test)):
        measure.play(shade, trained.model, seed, record=record)
    seen = learn.features(of_latents=False)[1]
    assert seen.shape == (400, 36 * 36 * 3) and _telling(seen).tolist() == [0]
    for of_latents in (True, False):
        assert probes(learn, test, ["dark"], of_latents=of_latents)["dark"]["skill"] > 0.9


# --- Statistics -------------------------------------------------------------------------------------------------------------
def test_the_interquartile_mean_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (4, 8, 40):  # where a quarter is a whole number, the two agree
        values = rng.normal(size=n)
        assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25))
    assert interquartile_mean(np.array([1.0])) == 1.0


def test_intervals_cover_what_they_say() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        table = {task: dict(enumerate(rng.normal(size=10))) for task in ("a", "b", "c")}
        interval = estimate(table)
        assert interval is not None
        covered += interval.low <= 0.0 <= interval.high
    assert covered >= 50  # 57 are expected


def test_differences_are_paired() -> None:
    results = [
        {"task": "a", "arm": arm, "seed": seed, "labels": 1.0, "value": 10.0 * seed + shift}
        for seed in range(3)
        for arm, shift in (("x", 1.0), ("y", 0.0))
        if (arm, seed) != ("y", 2)
    ]
    both = difference(*(collect(results, arm, lambda r: r["value"]) for arm in "xy"))
    assert both == {"a": {0: 1.0, 1: 1.0}}
    assert estimate(both) == Interval(1.0, 1.0, 1.0)
    assert estimate({}) is None


def test_verdicts() -> None:
    assert verdict(Interval(0.1, 0.05, 0.2)) == "supported"
    assert verdict(Interval(-0.1, -0.2, -0.05)) == "contradicted"
    assert verdict(Interval(0.0, -0.1, 0.1)) == "open"
    assert verdict(Interval(0.0, -0.04, 0.1), margin=0.05) == "supported"
    assert verdict(Interval(0.0, float("nan"), float("nan"))) == "too few runs"
    assert verdict(None) == "not run"


def test_tables_leave_out_rows_that_tell_nothing() -> None:
    from sb3_qa.study.page import shown, table

    told = shown(Interval(0.123, 0.1, 0.2), 2)
    rows = [
        ["a", "x", told],
        ["b", "x", shown(None, 2)],
        ["c", "x", shown(Interval(1.0, float("nan"), float("nan")), 1)],
    ]
    lines = table(["task", "at", "value"], rows, names=2).splitlines()
    assert lines == ["| task | at | value |", "| --- | --- | --- |", "| a | x | 0.12 [0.10, 0.20] |", "| c | x | 1.0 |"]


def made_up(arm: str, seed: int, **told: Any) -> dict[str, Any]:
    play = {"return": 1.0, "length": 9.0, "catastrophes": told.pop("before", 0.5), "veto_rate": 0.1, "disrupted": 0.2}
    veto = {"at": "0.05", "threshold": 0.5, "veto": play | {"catastrophes": told.pop("after", 0.25)}, "random": play}
    result = {
        "task": "cliff",
        "arm": arm,
        "seed": seed,
        "labels": 1.0,
        "quick": True,
        "timesteps": 9,
        "train_seconds": 1.0,
    }
    result |= {"parameters": {"agent": 9, "questions": 1}, "curve": [[9, 0.0]], "solved_at": None, "play": play}
    if arm != "plain":
        result |= {"answers": {"risk": {"skill": 0.5, "auroc": 0.75}}, "vetoes": [veto]}
    return result | told


def test_a_report_of_many_tasks_has_a_panel_and_a_row_for_each(tmp_path: Path) -> None:
    results = [
        made_up(arm, seed, task=task)
        for task in task_names()
        for arm in ("plain", "joint", "separate")
        for seed in (0, 1)
    ]
    report = write_report(results, tmp_path).read_text()
    for task in task_names():
        assert f"| {task} | 0.05 | 0.50 [0.50, 0.50] | – | 0.50 [0.50, 0.50] |" in report
    assert "Not reached" not in report.split("## The premises")[0]
    (width,) = struct.unpack(">I", (tmp_path / "vetoes.png").read_bytes()[16:20])
    assert width < 1_300  # pixels, which a page has room for


def ruling(report: str, premise: str) -> str:
    (row,) = [line for line in report.splitlines() if premise in line and line.startswith("| ")]
    return row.split(" | ")[-1].rstrip(" |")


def test_a_veto_is_judged_by_shares_of_catastrophes_and_of_all_episodes(tmp_path: Path) -> None:
    few, many = dict(before=0.02, after=0.0), dict(before=0.5, after=0.25)  # all of few, and half of many
    premise = "`joint` averts more than `separate`, 5% flagged"
    results = [
        made_up(arm, seed, **(few if arm == "joint" else many)) for arm in ("joint", "separate") for seed in (0, 1)
    ]
    assert ruling(write_report(results, tmp_path).read_text(), premise) == "open"
    results = [
        made_up(arm, seed, before=0.5, after=0.1 if arm == "joint" else 0.25)
        for arm in ("joint", "separate")
        for seed in (0, 1)
    ]
    assert ruling(write_report(results, tmp_path).read_text(), premise) == "supported"


def test_an_answerer_that_overstates_has_not_stayed_calibrated(tmp_path: Path) -> None:
    told = dict(frequency=0.0005, own_said=0.75, said=0.001, skill=0.1, own_skill=-9.0)
    results = [made_up("shaped", seed, judge={"fall[k=3]": told}) for seed in (0, 1)] + [made_up("joint", 0)]
    report = write_report(results, tmp_path).read_text()
    assert ruling(report, "own answers as near to what happens") == "contradicted"
    assert ruling(report, "own answers say no less") == "supported"


# --- Runs -------------------------------------------------------------------------------------------------------------------
def test_the_grid_is_seed_by_seed_and_leaves_out_what_cannot_be() -> None:
    cells = grid(["cliff"], list(ARMS), [0, 1], [1.0, 0.1])
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert not [cell for cell in cells if cell.labels < 1.0 and cell.arm in ("plain", "punished", "shaped")]
    assert len(set(cells)) == len(cells)


def test_runs_go_on_where_they_stopped(tmp_path: Path) -> None:
    path, models, told = tmp_path / "results.jsonl", tmp_path / "models", []
    cells = [Cell("cliff", arm, 0, 1.0, True) for arm in ("plain", "punished")]
    first = run_grid(cells[:1], path, models, tell=told.append)
    with path.open("a") as file:
        file.write('{"task": "cliff", "arm": "puni')  # the power went
    again = run_grid(cells, path, models, tell=told.append)
    assert len(told) == 2 and again[0] == first[0]
    assert [json.loads(line)["arm"] for line in path.read_text().splitlines()] == ["plain", "punished"]
    assert finished(path) == again
    assert run_cell(cells[0])["play"] == first[0]["play"]  # the same seed, the same result


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": 1}\n')
    with pytest.raises(QAError, match="expected results of this study"):
        run_grid([], path, tmp_path)


def test_every_arm_in_a_tiny_cell(tmp_path: Path) -> None:
    """What ``make study-smoke`` runs, with the report."""
    options = ["--quick", "--task", "cliff", "--seed", "0"]
    assert main(["study", *options, "--out", str(tmp_path), "--models", str(tmp_path / "models")]) == 0
    results = finished(tmp_path / "results.jsonl")
    assert {result["arm"] for result in results} == set(ARMS)
    report = (tmp_path / "report.md").read_text()
    assert "| M3 | answers of `joint` better than `probe` |" in report
    assert all((tmp_path / f"{name}.png").stat().st_size > 5_000 for name in ("skill", "labels", "vetoes"))
    joint = next(r for r in results if r["arm"] == "joint")
    assert len(joint["vetoes"]) == 4 and joint["reward"]["episodes"] == 4
    assert joint["answers_common"] and set(joint["answers_common"]) <= set(joint["answers"]) | {"until_fall"}


def test_names_of_tasks_are_those_of_their_modules() -> None:
    assert {"cliff", "highway", "hopper", "hopper_sac", "lander", "lava", "microrts", "navigation"} <= set(task_names())


def _kill_one(name: str, killed: list[int]) -> None:
    """Kill the first process of that title that has been at work for a second."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        found = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True, check=False).stdout.split()
        if found:
            time.sleep(1.0)
            os.kill(int(found[0]), signal.SIGKILL)
            killed.append(int(found[0]))
        time.sleep(0.1)


def test_a_killed_process_costs_no_result(tmp_path: Path) -> None:
    cells = [Cell("cliff", "joint", seed, 1.0, True) for seed in range(3)]
    killed: list[int] = []

    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.1)
        time.sleep(1.0)
        os.kill(children[0].pid or 0, signal.SIGKILL)
        killed.append(1)

    thread = threading.Thread(target=kill)
    thread.start()
    results = run_grid(cells, tmp_path / "results.jsonl", tmp_path / "models", workers=2)
    thread.join()
    assert killed
    assert [result["seed"] for result in results] == [0, 1, 2]
    assert sorted(result["seed"] for result in finished(tmp_path / "results.jsonl")) == [0, 1, 2]


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_survives_a_killed_worker(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cells = [Cell("cliff", "joint", seed, 1.0, True) for seed in range(4)]
    killed: list[int] = []
    thread = threading.Thread(target=_kill_one, args=("ray::run_cell", killed))
    try:
        ray.init(address=cluster.address)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        thread.start()
        path = tmp_path / "results.jsonl"
        results = run_grid(cells, path, tmp_path / "models", ray="auto")
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert [result["seed"] for result in results] == [0, 1, 2, 3]
    assert sorted(result["seed"] for result in finished(path)) == [0, 1, 2, 3]
    alone = run_cell(cells[0])
    assert results[0]["play"] == alone["play"] and results[0]["answers"] == alone["answers"]
