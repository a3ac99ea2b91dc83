"""The command line: ``python -m sb3_qa report``. What needs no browser; test_report_browser.py opens the page in one."""

import base64
import io
import re
import sys
from html.parser import HTMLParser

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qa import Choice, Number, Question, QuestionAnswerer
from sb3_qa.__main__ import main
from sb3_qa.callbacks import QACallback
from sb3_qa.cli.agents import load_agent, make_env
from sb3_qa.evaluation import Episodes, Trace
from sb3_qa.policies import qa_policy
from sb3_qa.report.moments import Clip, choose, film
from sb3_qa.report.played import Plan, Played, changed, play, thresholds
from sb3_qa.report.tables import question_parts
from sb3_qa.scores import survival_intervals
from sb3_qa.truth import eventually, now, steps_until

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tyro")

ENV = "ReportRoad-v0"


class Road(gym.Env):
    """Walks to the right of a road of ten places; in a pit (place 6, seen two places before) action 0 falls, action 1 jumps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-1.0, 20.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None, fickle=False):
        self.render_mode, self.fickle, self.resets = render_mode, fickle, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.pit = 0, int(self.np_random.integers(3, 8))
        if self.fickle:  # what a seed does not bring back
            self.pit = int(np.random.default_rng().integers(3, 8))
        return self._seen(), {"fallen": False}

    def step(self, action):
        self.place += 1
        fallen = self.place == self.pit and action == 0
        over = fallen or self.place == 10
        return self._seen(), float(self.place == self.pit) + 0.1 * self.pit, over, False, {"fallen": fallen}

    def _seen(self):
        return np.array([self.place, self.pit], np.float32)

    def render(self):
        frame = np.full((40, 200, 3), 230, np.uint8)
        frame[:, 20 * self.pit : 20 * self.pit + 20] = 60
        frame[10:30, 20 * self.place : 20 * self.place + 15] = (200, 30, 30)
        return frame


class Blind(Road):
    metadata = {"render_modes": []}


gym.register(ENV, entry_point=Road)
gym.register("ReportBlind-v0", entry_point=Blind)
QUESTIONS = [
    Question(
        "Will I <fall> within {k} steps if I choose {action}?", eventually("fallen", within="k"), k=[1, 3], name="fall"
    ),
    Question("Am I past it?", now(lambda step: step.obs[0] > step.obs[1]), name="past"),
    Question("Where is it?", now(lambda step: step.obs[1]), Number(0, 10), name="where"),
    Question(
        "Which half?",
        now(lambda step: "first" if step.obs[0] < 5 else "second"),
        Choice("first", "second"),
        name="half",
    ),
    Question("How long?", steps_until(lambda step: step.terminated, cap=5), name="long"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = PPO(
        qa_policy(PPO),
        DummyVecEnv([Road] * 4),
        n_steps=64,
        seed=0,
        device="cpu",
        policy_kwargs=dict(questions=QUESTIONS, net_arch=[16], action_names=["walk", "jump"]),
    )
    model.learn(2048, callback=QACallback())
    path = tmp_path_factory.mktemp("model") / "road.zip"
    model.save(path)
    return path


def make(n_envs, seed, render):
    return make_env(ENV, n_envs=n_envs, seed=seed, render=render)


@pytest.fixture(scope="module")
def played(model):
    return play(load_agent(model), make, Plan(episodes=40, seed=500, n_envs=4, question="fall[k=3]", threshold=0.3))


class Page(HTMLParser):
    """What a page holds; its elements must be closed in order."""

    VOID = {"meta", "link", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        self.links += [given[name] for name in ("src", "href", "srcset", "action", "poster") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def images(self):
        return [given for tag, given in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "r.html"
    told = ["report", str(model), "--env", ENV, "--out", str(out), "--episodes", "24", "--seed", "500"]
    assert main([*told, "--question", "fall[k=3]", "--threshold", "0.3", "--clips", "2"]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_holds_all_that_it_shows(page):
    parsed = Page(page)
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "url(" not in page and "@import" not in page and "<script" not in page
    assert "default-src 'none'" in page
    assert all(given.get("alt") for given in parsed.images())
    assert [tag for tag, _ in parsed.tags].count("h1") == 1


def test_the_page_says_what_was_played_and_what_it_means(page):
    text = " ".join(Page(page).words)
    for words in (
        "What was played",
        "What a veto would stop",
        "Misses",
        "False alarms",
        "Answers against truth",
        "What each number is",
    ):
        assert words in text
    assert "500 to 523, one an episode" in text and "averted" in text and "disrupted" in text
    assert "Will I <fall> within {k} steps" in text and "<fall>" not in page  # escaped
    for name in ("fall[k=1]", "fall[k=3]", "past", "where", "half", "long"):
        assert name in text
    captions = [given for tag, given in Page(page).tags if tag == "caption"]
    tables = [given for tag, given in Page(page).tags if tag == "table"]
    assert len(captions) == len(tables) >= 10


def test_pictures_are_what_they_say(page):
    kinds = {"svg": 0, "moving": 0, "still": 0}
    for given in Page(page).images():
        head, data = given["src"].split(",", 1)
        raw = base64.b64decode(data, validate=True)
        if head == "data:image/svg+xml;base64":
            assert raw.lstrip().startswith(b"<?xml") and b"<svg" in raw
            assert not re.search(rb'href="(?!#)', raw)  # nothing from outside
            kinds["svg"] += 1
            continue
        assert head == "data:image/webp;base64" and len(raw) <= 400_000
        with image.open(io.BytesIO(raw)) as picture:
            assert picture.size == (int(given["width"]), int(given["height"]))
            moving = given["class"] == "clip"
            assert (picture.n_frames > 1) == moving
        kinds["moving" if moving else "still"] += 1
    assert kinds["moving"] == kinds["still"] == 4  # two misses, two false alarms
    assert kinds["svg"] >= 4 + 5  # a curve of risk each, and the answers


def test_without_a_way_to_draw_it_says_so(model, tmp_path):
    out = tmp_path / "r.html"
    told = ["report", str(model), "--env", "ReportBlind-v0", "--out", str(out), "--episodes", "16", "--seed", "500"]
    assert main([*told, "--question", "fall[k=3]", "--no-act"]) == 0
    text = " ".join(Page(out.read_text()).words)
    assert "No frames: the environment draws no frames" in text and "The veto was not tried" in text


def test_another_way_from_the_same_seed_is_noticed(played):
    moment = choose(played, 1)[0]
    assert isinstance(film(played, moment, make), Clip)

    def fickle(n_envs, seed, render):
        return make_env(ENV, '{"fickle": true}', n_envs=n_envs, seed=seed, render=render)

    told = [film(played, moment, fickle) for _ in range(6)]
    assert any(isinstance(each, str) and "went another way" in each for each in told)


def test_scores_and_their_intervals(played):
    parts, left_out = question_parts(played)
    assert left_out == 0 and [part.question.name for part in parts] == ["fall", "past", "where", "half", "long"]
    for part in parts:
        for row in part.rows:
            assert row.error.low <= row.error.estimate <= row.error.high
            if np.isfinite(row.skill.estimate):
                assert row.skill.estimate == pytest.approx(1 - row.error.estimate / row.constant)
        assert len(part.wrong) == len(part.rows)
    fall = next(each for each in played.record.answered() if each.instance.key == "fall[k=3]")
    squared = np.square(fall.answer.probability - fall.truth)
    row = next(row for row in parts[0].rows if row.instance.key == "fall[k=3]")
    assert row.error.estimate == pytest.approx(squared.mean(), rel=1e-5) and row.count == len(fall.truth)
    worst, wrong = int(squared.argmax()), next(w for w in parts[0].wrong if w.key == "fall[k=3]")
    assert (wrong.episode, wrong.step) == (fall.episode[worst], fall.elapsed[worst])
    assert parts[0].survival and parts[4].survival and not parts[1].survival


def test_where_decisions_stand(played):
    """Falls are told at the right episode and step."""
    each = next(each for each in played.record.answered() if each.instance.key == "fall[k=1]")
    for episode, trace in enumerate(played.watched.traces):
        here = each.episode == episode
        assert each.elapsed[here].tolist() == list(range(len(trace.rewards)))
        np.testing.assert_array_equal(each.truth[here], trace.catastrophe)


def trace(risk, catastrophe, rewards=None):
    n = len(risk)
    rewards = np.zeros(n) if rewards is None else np.array(rewards, float)
    return Trace(
        np.zeros(n),
        rewards,
        np.array(risk, float),
        np.zeros(n, bool),
        np.zeros(n, bool),
        np.array(catastrophe, bool),
        False,
    )


def by_hand(played, watched, acting=None):
    return Played(
        played.plan, played.qa, played.risk, Episodes(tuple(watched)), acting and Episodes(tuple(acting)), played.record
    )


def test_thresholds_by_hand(played):
    watched = [trace([0.1, 0.6], [0, 1]), trace([0.1, 0.1], [0, 1]), trace([0.35, 0.0], [0, 0]), trace([0, 0], [0, 0])]
    table = {each["threshold"]: each for each in thresholds(by_hand(played, watched))}
    assert (table[0.3]["n_warned"], table[0.3]["n_false"], table[0.3]["flags_per_1000"]) == (1, 1, 250.0)
    assert (table[0.1]["n_warned"], table[0.7]["n_warned"]) == (2, 0)
    assert table[0.3]["warned"].estimate == 0.5


def test_averted_and_disrupted_by_hand(played):
    watched = [trace([0.9], [1], [-1]), trace([0.9], [1], [-1]), trace([0.9], [0], [2]), trace([0.0], [0], [2])]
    acting = [trace([0.9], [0], [1]), trace([0.9], [1], [-1]), trace([0.9], [1], [0]), trace([0.0], [0], [2])]
    for n in (0, 1, 2):
        acting[n].vetoed[:] = True
    told = changed(by_hand(played, watched, acting))
    assert [told[name][0] for name in ("averted", "brought about", "disrupted")] == [1, 1, 1]
    assert told["return"][1].estimate == 0.0 and told["return of disrupted"][1].estimate == -2.0


def test_the_worst_come_first(played):
    moments = choose(played, 3)
    misses = [moment for moment in moments if moment.kind == "miss"]
    alarms = [moment for moment in moments if moment.kind == "false alarm"]
    assert 0 < len(misses) <= 3 and 0 < len(alarms) <= 3
    for moment in misses:
        here = played.watched.traces[moment.episode]
        assert (
            here.catastrophe[moment.step] and moment.risk == here.risk[max(moment.step - 2, 0) : moment.step + 1].max()
        )
    assert [(m.flagged, m.risk) for m in misses] == sorted((m.flagged, m.risk) for m in misses)
    fall = next(each for each in played.record.answered() if each.instance.key == "fall[k=3]")
    assert alarms[0].risk == pytest.approx(fall.answer.probability[fall.truth == 0].max())
    for moment in alarms:
        coming = played.watched.traces[moment.episode].catastrophe[moment.step : moment.step + 3]
        assert not coming.any()


def test_survival_by_hand():
    """Of four futures one has the event at 1, one is cut after 1, one has it at 2, one goes on: 3/4, then 3/4 * 1/2."""
    seen, low, high = survival_intervals([1, 1, 2, 3], [1, 0, 1, 0], 2, episode=[0, 1, 2, 3])
    np.testing.assert_allclose(seen, [1.0, 0.75, 0.375])
    assert (low <= seen).all() and (seen <= high).all() and high[1] > seen[1]
    assert np.isnan(survival_intervals([1, 2], [1, 0], 2, episode=[7, 7])[1]).all()
    assert np.isnan(survival_intervals([1, 1], [0, 0], 2, episode=[0, 1])[0][2])  # nobody was followed for so long


def test_an_answerer_alone_is_reported_on(tmp_path):
    questions = [
        Question("Will I fall within 2 steps if I choose {action}?", eventually("fallen", within=2), name="fall")
    ]
    model = PPO(qa_policy(PPO), Road(), policy_kwargs=dict(questions=questions), device="cpu", seed=0)
    QuestionAnswerer.from_model(model).save(tmp_path / "a.qa")
    out = tmp_path / "r.html"
    assert (
        main(["report", str(tmp_path / "a.qa"), "--env", ENV, "--out", str(out), "--episodes", "4", "--clips", "0"])
        == 0
    )
    Page(out.read_text())


def test_without_a_question_about_actions(tmp_path):
    model = PPO(qa_policy(PPO), Road(), policy_kwargs=dict(questions=QUESTIONS[1:2]), device="cpu", seed=0)
    model.save(tmp_path / "m.zip")
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "m.zip"), "--env", ENV, "--out", str(out), "--episodes", "3"]) == 0
    text = " ".join(Page(out.read_text()).words)
    assert "no yes-or-no question about" in text and "Am I past it?" in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--episodes", "0"], "episodes=0; expected at least 1"),
        (["--threshold", "1.5"], "threshold=1.5; expected one in"),
        (["--question", "fall"], "--question got 'fall'; expected a yes/no question about {action}, one of"),
        (["--out", "no/such/folder/r.html"], "expected a folder that is there"),
        (["--clips", "-1"], "--clips got -1"),
        (["--catastrophe", "crashed"], "'crashed' never appeared in info"),
        (["--env", "CartPole-v1"], "expected those of the agent"),
    ],
)
def test_bad_input(model, tmp_path, monkeypatch, capsys, given, told):
    monkeypatch.chdir(tmp_path)
    more = ["--env", ENV] if "--env" not in given else []
    assert main(["report", str(model), *more, "--episodes", "2", *given]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_an_extra_that_is_missing(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(model), "--env", ENV]) == 1
    assert (
        "the report needs matplotlib, which is not installed; expected it; pip install 'sb3-qa[cli,demo]'"
        in capsys.readouterr().err
    )
