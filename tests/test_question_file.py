"""Questions as data: what a file holds, what is refused and how, and the ways of a file into training and into wrappers."""

import json
import pickle
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from wrapping import QUESTIONS, Toy, make_model, toys

from sb3_qa import Choice, Number, QAError, Question, QuestionAnswerer, Step, YesNo
from sb3_qa.callbacks import QACallback
from sb3_qa.facts import FactOf, check_facts
from sb3_qa.question_file import dump_questions, load_questions
from sb3_qa.truth import after, always, eventually, lowest, now, peak, steps_until, total
from sb3_qa.wrappers import AnswerQuestions, VecAnswerQuestions


def off_road(step):
    """A fact that is named in a file."""
    return bool(step.obs[0] > 1.0)


NOT_A_FUNCTION = 3

TOML = """
[[questions]]
name = "crash"
text = "Will it crash within {k} steps after {action}?"
truth = { eventually = "crashed", within = "k" }
k = [1, 3]

[[questions]]
name = "speed"
text = "How fast is it?"
truth = { now = "speed" }
answer = { number = [0, 10] }

[[questions]]
name = "lane"
text = "Which lane is it in {k} steps from now?"
truth = { after = "lane", steps = "k" }
answer = { choice = ["left", "right"] }
k = 2

[[questions]]
text = "Does it tilt?"
name = "tilted"
truth = { always = { obs = 3, above = -1.5, below = 1 }, during = 4 }

[[questions]]
text = "How far is it?"
name = "far"
truth = { total = { obs = [0] }, over = 3, discount = 0.5 }
answer = { number = [-10, 10] }

[[questions]]
text = "When does it end?"
name = "end"
truth = { steps_until = { step = "terminated" }, cap = 6 }

[[questions]]
text = "Will it leave the road?"
name = "off"
answer = "yes/no"
truth = { eventually = "test_question_file:off_road", within = 2 }

[[questions]]
text = "Is it in the right lane?"
name = "right"
truth = { now = { info = "lane", equals = 1 } }
"""
YAML = """
questions:
  - name: crash
    text: Will it crash within {k} steps after {action}?
    truth: {eventually: crashed, within: k}
    k: [1, 3]
  - {name: speed, text: 'How fast is it?', truth: {now: speed}, answer: {number: [0, 10]}}
"""
EXPECTED = [
    Question(
        "Will it crash within {k} steps after {action}?", eventually("crashed", within="k"), k=[1, 3], name="crash"
    ),
    Question("How fast is it?", now("speed"), answer=Number(0, 10), name="speed"),
    Question("Which lane is it in {k} steps from now?", after("lane", steps="k"), Choice("left", "right"), "lane", k=2),
    Question("Does it tilt?", always(FactOf(obs=(3,), above=-1.5, below=1), during=4), name="tilted"),
    Question("How far is it?", total(FactOf(obs=(0,)), over=3, discount=0.5), Number(-10, 10), name="far"),
    Question("When does it end?", steps_until(FactOf(step="terminated"), cap=6), name="end"),
    Question("Will it leave the road?", eventually(off_road, within=2), name="off"),
    Question("Is it in the right lane?", now(FactOf(info="lane", equals=1)), name="right"),
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "questions.toml"
    file.write_text(TOML)
    return file


def step(obs=(0.0, 0.0, 0.0, 0.0), **info):
    return Step(obs if isinstance(obs, dict) else np.array(obs, np.float32), 0, 2.0, True, False, info)


class TestLoading:
    def test_toml(self, path):
        assert load_questions(path) == load_questions(str(path)) == EXPECTED

    def test_yaml_and_json(self, tmp_path):
        pytest.importorskip("yaml")
        (tmp_path / "q.yml").write_text(YAML)
        (tmp_path / "list.yaml").write_text(YAML.replace("questions:\n", ""))
        (tmp_path / "q.json").write_text(json.dumps({"questions": dump_questions(EXPECTED)}))
        assert load_questions(tmp_path / "q.yml") == load_questions(tmp_path / "list.yaml") == EXPECTED[:2]
        assert load_questions(tmp_path / "q.json") == EXPECTED

    def test_plain_data_in_place(self):
        entry = dict(text="How fast is it?", name="speed", truth=dict(now="speed"), answer=dict(number=[0, 10]))
        assert load_questions([entry]) == load_questions({"questions": [entry]}) == [EXPECTED[1]]
        assert load_questions([EXPECTED[0], entry]) == EXPECTED[:2]  # beside one that is made already
        assert "answer" in entry  # what was given is left as it was

    def test_questions_pass_through(self):
        assert load_questions(EXPECTED) is EXPECTED

    def test_what_is_kept_out_of_training_is_there_and_back(self):
        """A model that is saved with it must not teach it when it goes on."""
        question = Question("Is it above {x}?", now("above_{x}"), x=[1, 2, 3], name="above", holdout=["above[x=2]"])
        (back,) = load_questions(dump_questions([question]))
        assert back == question and back.holdout == {"above[x=2]"}

    def test_there_and_back(self):
        data = json.loads(json.dumps(dump_questions([*EXPECTED, *QUESTIONS])))
        back = load_questions([entry | {"name": f"x{n}"} for n, entry in enumerate(data)])
        for question, again in zip([*EXPECTED, *QUESTIONS], back, strict=True):
            assert (question.text, question.truth, question.answer) == (again.text, again.truth, again.answer)
            assert question.slots == again.slots

    @pytest.mark.parametrize(
        ("truth", "answer"),
        [(peak("speed", over=3), Number(0, 1)), (lowest("speed", over=3), Number(0, 1)), (now("a:b"), YesNo())],
    )
    def test_there_and_back_of_the_others(self, truth, answer):
        questions = [Question("What?", truth, answer)]
        assert load_questions(dump_questions(questions)) == questions

    def test_a_lambda_cannot_be_written_down(self):
        class Walker:
            def fell(self, step):
                return True

        for fact in (lambda step: True, Walker().fell):
            with pytest.raises(
                QAError, match=r"question 'x', fact got <.*cannot be written down as data; expected .* def"
            ):
                dump_questions([Question("What?", now(fact), name="x")])

    def test_options_that_cannot_be_written_down(self):
        question = Question("What?", now("pair"), Choice((0, 1), (1, 0)), name="x")
        with pytest.raises(QAError, match=r"question 'x' holds \(0, 1\); expected words and numbers"):
            dump_questions([question])


class TestFacts:
    @pytest.mark.parametrize(
        ("fact", "of", "expected"),
        [
            (FactOf(obs=(1,)), step((0.0, 2.5)), 2.5),
            (FactOf(obs=(-1,), above=2), step((0.0, 2.5)), True),
            (FactOf(obs=(-1,), above=2.5), step((0.0, 2.5)), False),
            (FactOf(obs=(-1,), below=2.5), step((0.0, 2.5)), False),
            (FactOf(obs=(0, 1), equals=4), step(((3, 4), (5, 6))), True),
            (FactOf(obs=(0,), above=1, below=2), step((1.5,)), True),
            (FactOf(obs=(0,), above=1, below=2), step((2.5,)), False),
            (FactOf(obs=(0,), key="left"), step({"left": np.array([7.0])}), 7.0),
            (FactOf(obs=(), key="left"), step({"left": 3}), 3),
            (FactOf(info="lane", equals="left"), step(lane="left"), True),
            (FactOf(info="lane", equals="left"), step(), None),
            (FactOf(step="reward"), step(), 2.0),
            (FactOf(step="reward", below=0), step(), False),
            (FactOf(step="terminated"), step(), True),
        ],
    )
    def test_values(self, fact, of, expected):
        value = fact(of)
        assert value == expected and type(value) is type(expected)
        assert pickle.loads(pickle.dumps(fact)) == fact

    @pytest.mark.parametrize(
        ("fact", "space", "words"),
        [
            (
                FactOf(obs=(4,)),
                spaces.Box(-1, 1, (4,)),
                r"expected an index of one number in .* shape \(4,\); give 1 whole",
            ),
            (FactOf(obs=(0,)), spaces.Box(-1, 1, (4, 2)), r"shape \(4, 2\); give 2 whole number"),
            (FactOf(obs=(0,), key="a"), spaces.Box(-1, 1, (4,)), "observations are no dictionary"),
            (FactOf(obs=(0,)), spaces.Dict(a=spaces.Box(-1, 1, (4,))), r"expected a key of .* 'a'; write obs = \"a\""),
            (FactOf(obs=(4,), key="a"), spaces.Dict(a=spaces.Box(-1, 1, (4,))), r"shape \(4,\)"),
            (FactOf(obs=(), key="a"), spaces.Dict(a=spaces.Box(-1, 1, (4,))), r"shape \(4,\)"),
        ],
    )
    def test_entries_that_observations_do_not_have(self, fact, space, words):
        with pytest.raises(QAError, match=rf"question 'x' got the fact \{{'obs': .*{words}"):
            check_facts([Question("What?", now(fact), Number(0, 1), "x")], space)

    def test_they_are_refused_when_the_model_is_made(self):
        question = dict(text="What?", name="x", truth=dict(now=dict(obs=9, above=0.5)))
        with pytest.raises(QAError, match=r"question 'x' got the fact .*in observations of the shape \(4,\)"):
            make_model(toys(), questions=[question])

    def test_entries_that_they_have(self):
        both = spaces.Dict(a=spaces.Box(-1, 1, (1,)), b=spaces.Discrete(3))
        for fact, space in (
            (FactOf(obs=(-4,)), spaces.Box(-1, 1, (4,))),
            (FactOf(obs=(), key="a"), both),
            (FactOf(obs=(), key="b"), both),
        ):
            check_facts([Question("What?", now(fact), Number(0, 1), "x")], space)


GOOD = dict(text="Is it?", name="it", truth=dict(now="it"))


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (dict(truth=None), "got truth = None; expected one operator, of after, always"),
            (dict(truth=dict(soon="it")), "got truth = .*; expected one operator"),
            (dict(truth=dict(now="it", after="it", steps=1)), "expected one operator"),
            (dict(truth=dict(eventually="it")), "got eventually without within; expected a number of steps"),
            (dict(truth=dict(eventually="it", within=0)), "horizon of 0; expected a whole number of steps, at least 1"),
            (dict(truth=dict(now="it", within=3)), "truth got the key 'within'; expected now; leave it out"),
            (dict(truth=dict(now=3)), "got the fact 3; expected the name of an info key"),
            (dict(truth=dict(now=dict(obs=0, info="it"))), "with one of obs, info and step"),
            (
                dict(truth=dict(now=dict(obs=0, over=1))),
                "fact got the key 'over'; expected obs, index, above, below, equals",
            ),
            (dict(truth=dict(now=dict(obs=0.5))), r"got the index \(0.5,\) into obs; expected whole numbers"),
            (dict(truth=dict(now=dict(obs=True))), r"got the index \(True,\)"),
            (dict(truth=dict(now=dict(obs=0, index=1))), "got obs = 0 and index; expected the key of a dictionary"),
            (dict(truth=dict(now=dict(obs=0, above="1"))), "got above = '1'; expected a number"),
            (dict(truth=dict(now=dict(obs=0, equals=[1]))), r"got equals = \[1\]; expected a word, a number or a bool"),
            (dict(truth=dict(now=dict(step="obs"))), "got step = 'obs'; expected one of reward, terminated, truncated"),
            (dict(truth=dict(now=dict(info=""))), "got info = ''; expected a key of info"),
            (dict(truth=dict(now=dict(info="{k}", above=1))), "expected a key of info, without slots where compared"),
            (
                dict(truth=dict(now="no_such.module:f")),
                "importing 'no_such.module' raised ModuleNotFoundError.*PYTHONPATH",
            ),
            (dict(truth=dict(now="test_question_file:nothing")), "in 'test_question_file', which has no 'nothing'"),
            (dict(truth=dict(now="test_question_file:NOT_A_FUNCTION")), "which is int 3; expected a function"),
            (dict(answer="maybe"), "got answer = 'maybe'; expected \"yes/no\""),
            (dict(answer=dict(choice=["a"])), r"Choice got \('a',\); expected at least two"),
            (dict(answer=dict(choice="ab")), "got answer = "),
            (dict(answer=dict(number=[1, 0])), "Number got low=1, high=0; expected low < high"),
            (dict(answer=dict(number=[1])), "Number got the bound None"),
            (dict(anwser="yes/no"), "got the slot 'anwser', which its text does not use"),
            (dict(text=""), "got the text ''; expected words"),
            (dict(text="Is {it}?"), r"expected some for the slot 'it'; give it=\[...\]"),
            (dict(name="a,b"), "got name='a,b'"),
            ({"self": 1}, "got the key 'self'; expected the name of a slot"),
        ],
    )
    def test_entries(self, tmp_path, change, words):
        file = tmp_path / "q.json"
        other = dict(text="Was it?", truth=dict(now="it"))
        file.write_text(json.dumps([other, GOOD | change]))
        with pytest.raises(QAError, match=rf"q.json, question 2 \('.*'\).*{words}") as error:
            load_questions(file)
        assert error.value.__cause__ is None or "import" in str(error.value)

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("q.toml", "[[questions]\n", r"q.toml cannot be read \(.*line 1.*\); expected TOML; mend that line"),
            ("q.json", "{", r"q.json cannot be read \(.*line 1.*\); expected JSON"),
            ("q.toml", "", r"q.toml holds None; expected a list of questions; write \[\[questions\]\]"),
            ("q.json", "3", "q.json holds 3; expected a list of questions"),
            ("q.json", "[]", r"q.json holds \[\]; expected a list"),
            ("q.json", "[3]", "q.json, question 1 is 3; expected a table with text and truth"),
            ("q.toml", "[[question]]", r"q.toml got the key 'question'; expected questions; write \[\[questions\]\]"),
            ("q.json", '[{"text": "Is it?"}]', r"question 1 \('Is it\?'\) has \['text'\]; expected a truth too"),
            ("q.json", '[{"truth": {"now": "it"}}]', r"question 1 has \['truth'\]; expected a text too"),
            ("q.json", json.dumps([GOOD, GOOD]), r"q.json: questions got the name 'it' 2 times"),
            ("q.txt", "", r"got '.*q.txt'; expected a list of Question, or a file ending in .toml, .yaml, .yml, .json"),
        ],
    )
    def test_files(self, tmp_path, name, text, words):
        (tmp_path / name).write_text(text)
        with pytest.raises(QAError, match=words):
            load_questions(tmp_path / name)

    def test_yaml_that_is_none(self, tmp_path):
        pytest.importorskip("yaml")
        (tmp_path / "q.yaml").write_text("questions: [")
        with pytest.raises(QAError, match=r"q.yaml cannot be read \((.|\n)*line 1(.|\n)*expected YAML"):
            load_questions(tmp_path / "q.yaml")

    def test_yaml_is_loaded_safely(self, tmp_path):
        pytest.importorskip("yaml")
        (tmp_path / "q.yaml").write_text("questions: !!python/object/apply:os.system ['true']")
        with pytest.raises(QAError, match="cannot be read"):
            load_questions(tmp_path / "q.yaml")

    def test_missing_file(self, tmp_path):
        with pytest.raises(
            QAError, match=r"there is no file .*nothing.toml in .*; expected a question file; check the path"
        ):
            load_questions(tmp_path / "nothing.toml")

    def test_readers_that_are_not_installed(self, tmp_path, monkeypatch, path):
        (tmp_path / "q.yaml").write_text(YAML)
        for module in ("yaml", "tomllib", "tomli"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            QAError,
            match=r"q.yaml, unless it is TOML or JSON, needs yaml, which is not installed; .*pip install 'sb3-qa\[files\]'",
        ):
            load_questions(tmp_path / "q.yaml")
        with pytest.raises(QAError, match=r"TOML file needs Python 3.11, or tomli; .*pip install 'sb3-qa\[files\]'"):
            load_questions(path)

    def test_what_is_no_list_at_all(self):
        for given in (None, 3, QUESTIONS[0]):
            with pytest.raises(QAError, match=r"expected a list of Question"):
                make_model(toys(), questions=given)


class TestTraining:
    @pytest.mark.parametrize("form", ["path", "string", "data"])
    def test_a_file_trains_as_its_questions_do(self, path, form):
        given = {"path": path, "string": str(path), "data": dump_questions(EXPECTED)}[form]
        weights = []
        for questions in (EXPECTED, given):
            model = make_model(VecAnswerQuestions(toys(2)), questions=questions)
            model.learn(64, QACallback())
            weights.append(model.policy.qa_head.flat.detach().clone())
            labels = {key: model.logger.name_to_value.get(f"qa/{key}/loss") for key in ("tilted", "far", "end", "off")}
        assert (weights[0] == weights[1]).all()
        assert labels

    def test_a_saved_model_does_not_need_the_file(self, path, tmp_path):
        model = make_model(toys(), questions=str(path))
        given = model.policy_kwargs
        model.learn(32, QACallback())
        assert given["questions"] == str(path)  # what the user holds is left alone
        model.save(tmp_path / "model.zip")
        path.write_text("damaged")
        again = PPO.load(tmp_path / "model.zip")
        assert list(again.policy.qa_head.catalogue.questions) == EXPECTED
        again.set_env(toys())
        again.learn(32, QACallback())

    def test_facts_of_data_are_kept_by_a_frozen_answerer(self, path, tmp_path):
        QuestionAnswerer.from_model(make_model(toys(), questions=path)).save(tmp_path / "x.qa")
        frozen = QuestionAnswerer.load(tmp_path / "x.qa")
        facts = [question.truth.fact for question in frozen.catalogue.questions]
        expected = [question.truth.fact for question in EXPECTED]
        expected[6] = "off_road"  # a function is kept by name only, and nothing is imported for it
        assert facts == expected

    def test_on_a_command_line(self, path):
        """As rl_zoo3 does with --hyperparams policy_kwargs:"dict(questions='questions.toml')", and with its YAML."""
        policy_kwargs = eval(f"dict(questions={str(path)!r}, net_arch=[8])")
        model = PPO("QAMlpPolicy", toys(), policy_kwargs=policy_kwargs, n_steps=32, batch_size=32, device="cpu")
        assert list(model.policy.qa_head.catalogue.questions) == EXPECTED


class TestWrappers:
    @pytest.fixture
    def saved(self, path, tmp_path):
        QuestionAnswerer.from_model(make_model(toys(), questions=path)).save(tmp_path / "x.qa")
        return str(tmp_path / "x.qa")

    def test_the_questions_of_a_file_are_answered(self, saved, tmp_path):
        some = tmp_path / "some.json"
        some.write_text(json.dumps(dump_questions(EXPECTED[:2])))
        wrapper = AnswerQuestions.wrapper_spec(questions=str(some), qa=saved)
        gym.register("QuestionToy-v0", Toy, additional_wrappers=(wrapper,))
        try:
            env = gym.make("QuestionToy-v0", disable_env_checker=True)
            keys = {key for key in env.reset(seed=0)[1] if key.startswith("qa/")}
            assert keys == {"qa/crash[k=1]", "qa/crash[k=3]", "qa/speed"}
            assert env.spec.additional_wrappers[0].kwargs["questions"] == ["crash[k=1]", "crash[k=3]", "speed"]
        finally:
            del gym.registry["QuestionToy-v0"]

    def test_an_answerer_of_other_questions(self, saved, tmp_path):
        file = tmp_path / "other.json"
        file.write_text(json.dumps([dict(text="Is it?", name="it", truth=dict(now="it"))]))
        with pytest.raises(QAError, match="got an answerer that was not taught 'it'; .*expected one of"):
            AnswerQuestions(Toy(), file, qa=saved)
        file.write_text(json.dumps([dict(text="How slow is it?", name="speed", truth=dict(now="it"))]))
        with pytest.raises(
            QAError, match=r"whose 'speed' is 'How fast is it\?'; expected 'How slow is it\?', as in the"
        ):
            AnswerQuestions(Toy(), file, qa=saved)

    def test_a_word_is_no_list(self, saved):
        with pytest.raises(QAError, match="got questions='speed'; expected a list of instances' keys, a question file"):
            AnswerQuestions(Toy(), "speed", qa=saved)
