"""Reading facts from infos and steps."""

from functools import partial

import numpy as np
import pytest

from sb3_qa.errors import QAError
from sb3_qa.facts import FactReader
from sb3_qa.questions import Catalogue, Choice, Number, Question
from sb3_qa.truth import Step, after, always, eventually, now, steps_until


def reader_of(*questions):
    return FactReader(Catalogue(list(questions)))


def ask(fact, answer=None, name="q", truth=now, **slots):
    text = "?" + "".join(f" {{{slot}}}" for slot in slots)
    return Question(text, truth(fact), *([] if answer is None else [answer]), name=name, **slots)


def step(info=None, *, obs=0.0, action=1, reward=0.0, terminated=False, truncated=False):
    return Step(obs, action, reward, terminated, truncated, {} if info is None else info)


def read_one(question, value):
    """The float that a question's fact is read as when info tells ``value``."""
    read = reader_of(question).read([{"fact": value}])
    assert read.shape == (1, 1) and read.dtype == np.float32
    return read[0, 0]


class TestInfoKeys:
    def test_rows_are_environments_and_columns_facts(self):
        reader = reader_of(ask("speed", Number(0, 40), "speed"), ask("crashed", name="crashed"))
        facts = reader.read([{"speed": 3.5, "crashed": True, "more": "x"}, {"crashed": False}])
        speed, crashed = (reader.column[n] for n in (1, 0))  # of the targets: sigmoids come first
        assert facts.shape == (2, 2) and facts.dtype == np.float32
        assert facts[:, crashed].tolist() == [1, 0]
        assert facts[0, speed] == 3.5 and np.isnan(facts[1, speed])
        assert not reader.needs_steps

    @pytest.mark.parametrize(
        ("value", "number"),
        [
            (True, 1),
            (False, 0),
            (np.bool_(True), 1),
            (1, 1),
            (0.0, 0),
            (np.int64(1), 1),
            (np.float32(0), 0),
            (np.array(True), 1),
            (np.array(0), 0),
        ],
    )
    def test_yes_or_no(self, value, number):
        assert read_one(ask("fact"), value) == number

    @pytest.mark.parametrize(
        ("value", "number"),
        [(2.5, 2.5), (-3, -3), (np.float64(1.5), 1.5), (np.int8(-7), -7), (np.array(0.25), 0.25), (True, 1)],
    )
    def test_number(self, value, number):
        assert read_one(ask("fact", Number(-1, 1)), value) == number

    @pytest.mark.parametrize(
        ("value", "index"),
        [("left", 0), ("right", 2), (1, 1), (np.int64(2), 2), (np.str_("middle"), 1), (np.array(1), 1)],
    )
    def test_choice_by_option_and_by_index(self, value, index):
        assert read_one(ask("fact", Choice("left", "middle", "right")), value) == index

    @pytest.mark.parametrize(("value", "index"), [(3, 0), (np.int64(1), 1), (2.0, 2), (np.float32(3), 0)])
    def test_choice_of_numbers_is_by_option_alone(self, value, index):
        assert read_one(ask("fact", Choice(3, 1, 2)), value) == index

    def test_an_option_may_be_a_tuple(self):
        assert read_one(ask("fact", Choice((0, 0), (0, 1))), (0, 1)) == 1

    def test_absent_or_none_is_not_known(self):
        for answer in (None, Number(0, 1), Choice("a", "b")):
            facts = reader_of(ask("fact", answer)).read([{"fact": None}, {}])
            assert np.isnan(facts).all() and facts.shape == (2, 1)

    def test_some_known_and_some_not(self):
        facts = reader_of(ask("fact")).read([{"fact": True}, {}, {"fact": np.False_}])
        np.testing.assert_equal(facts[:, 0], [1, np.nan, 0])

    @pytest.mark.parametrize(
        ("answer", "value", "got", "expected"),
        [
            (None, 2, "gave 2", "True or False"),
            (None, 0.5, "gave 0.5", "True or False"),
            (None, float("nan"), "gave nan", "True or False"),
            (None, "yes", "gave 'yes'", "a single number or bool"),
            (None, "1", "gave '1'", "a single number or bool"),
            (None, b"1", "gave b'1'", "a single number or bool"),
            (None, [True], "gave [True]", "a single number or bool"),
            (None, np.array([True]), "gave array([ True])", "a single number or bool"),
            (None, 1j, "gave 1j", "a single number or bool"),
            (Number(0, 1), "0.5", "gave '0.5'", "a single number or bool"),
            (Number(0, 1), {}, "gave {}", "a single number or bool"),
            (Number(0, 1), np.zeros(2), "gave array([0., 0.])", "a single number or bool"),
            (Number(0, 1), float("nan"), "gave nan", "a finite number"),
            (Number(0, 1), np.float32("inf"), "gave inf", "a finite number"),
            (Choice("a", "b"), "c", "gave 'c'", "one of the options ('a', 'b') or its index"),
            (Choice("a", "b"), 2, "gave 2", "one of the options ('a', 'b') or its index"),
            (Choice("a", "b"), -1, "gave -1", "one of the options ('a', 'b') or its index"),
            (Choice("a", "b"), ["a"], "gave ['a']", "one of the options ('a', 'b') or its index"),
            (Choice("a", "b"), np.array(["a"]), "gave array(['a']", "one of the options ('a', 'b') or its index"),
            (Choice(3, 1, 2), 0, "gave 0", "one of the options (3, 1, 2);"),
        ],
    )
    def test_other_types_are_refused(self, answer, value, got, expected):
        with pytest.raises(QAError) as refusal:
            read_one(ask("fact", answer, name="mine"), value)
        message = str(refusal.value)
        assert "question 'mine'" in message and got in message and f"expected {expected}" in message
        assert message.count("; ") == 2

    def test_one_bad_environment_is_enough(self):
        with pytest.raises(QAError, match="gave 7"):
            reader_of(ask("fact")).read([{"fact": True}, {"fact": 7}])

    def test_an_event_is_yes_or_no_whatever_its_answer(self):
        question = Question("When?", steps_until("fact", cap=5), Number(0, 5))
        assert read_one(question, True) == 1
        with pytest.raises(QAError, match="expected True or False"):
            read_one(question, 3)


class TestSlots:
    def test_a_key_with_slots(self):
        reader = reader_of(ask("near_{car}", name="near", car=["van", "bus"]))
        assert reader.n_facts == 2 and reader.column == [0, 1]
        assert reader.read([{"near_van": True, "near_bus": False}]).tolist() == [[1, 0]]

    def test_a_callable_takes_slots_by_keyword(self):
        def near(step, car, *, far):
            return step.info[car] < far

        reader = reader_of(ask(near, name="near", far=[1, 5], car=["van", "bus"]))
        facts = reader.read([{}], [step({"van": 3, "bus": 0.5})])
        # (far, car): (1, van), (1, bus), (5, van), (5, bus)
        assert facts[:, reader.column].tolist() == [[0, 1, 1, 1]]

    def test_only_the_slots_it_names(self):
        reader = reader_of(ask(lambda step, far: step.obs < far, car=["van", "bus"], far=[1, 5]))
        assert reader.n_facts == 2  # one for each value of `far`, shared by the cars
        assert reader.read([{}], [step(obs=3)])[:, reader.column].tolist() == [[0, 1, 0, 1]]

    def test_a_slot_goes_before_a_default(self):
        reader = reader_of(ask(lambda step, far=0, near=-1: near < step.obs < far, far=5))
        assert reader.read([{}], [step(obs=3)]).tolist() == [[1]]

    def test_a_slot_that_is_named_as_the_step_is_not_passed(self):
        reader = reader_of(ask(lambda step: step.obs < 5, step=[1, 2]))
        assert reader.read([{}], [step(obs=3)]).tolist() == [[1]] and reader.n_facts == 1

    def test_partials_methods_and_objects(self):
        class Near:
            def __call__(self, step, far):
                return step.obs < far

            def method(self, step, far):
                return step.obs < far

        for fact in (Near(), Near().method, partial(lambda offset, step, far: step.obs < far + offset, 0)):
            reader = reader_of(ask(fact, far=[1, 5]))
            assert reader.read([{}], [step(obs=3)])[:, reader.column].tolist() == [[0, 1]]

    def test_the_horizon_of_a_window_may_be_in_its_fact(self):
        question = Question("Nearer than {k} in {k}?", after(lambda step, k: step.obs < k, steps="k"), k=[1, 5])
        reader = reader_of(question)
        assert reader.read([{}], [step(obs=3)])[:, reader.column].tolist() == [[0, 1]]


class TestSharing:
    def test_a_fact_asked_about_often_is_read_once(self):
        calls = []

        def hit(step):
            calls.append(step)
            return True

        reader = reader_of(
            Question("In {k}?", eventually(hit, within="k"), name="soon", k=[1, 5]),
            Question("After {k}?", after(hit, steps="k"), name="after", k=[1, 5]),
            Question("Now?", now(hit), name="now"),
            Question("Never?", always("hit", during=3), name="never"),
            Question("Hit?", now("hit"), name="hit"),
        )
        assert reader.n_facts == 2 and len(reader.column) == 6
        reader.read([{"hit": True}], [step()])
        assert len(calls) == 1

    def test_but_not_as_another_kind_of_answer(self):
        reader = reader_of(
            ask("fact", name="yesno"),
            ask("fact", Number(0, 1), name="number"),
            ask("fact", Choice("a", "b"), name="ab"),
            ask("fact", Choice("b", "a"), name="ba"),
        )
        assert reader.n_facts == 4 and sorted(reader.column) == [0, 1, 2, 3]

    def test_two_callables_are_two_facts(self):
        reader = reader_of(
            *(ask(lambda step, n=n: step.obs > n, name=f"q{n}") for n in range(3)),
        )
        assert reader.read([{}], [step(obs=1.5)]).tolist() == [[1, 1, 0]]


class TestCallables:
    def test_get_the_step(self):
        got = []
        reader = reader_of(ask(lambda step: bool(got.append(step))))
        steps = [step({"a": 1}, obs=5, action=2, reward=-1.5, terminated=True), step({"a": 2}, truncated=True)]
        assert reader.needs_steps
        assert reader.read([s.info for s in steps], steps).tolist() == [[0], [0]]
        assert got == steps

    def test_with_keys_beside_them(self):
        reader = reader_of(ask("fact", Number(0, 9), "key"), ask(lambda step: step.reward > 0, name="call"))
        facts = reader.read([{"fact": 4}, {"fact": 5}], [step(reward=1), step(reward=-1)])
        assert facts[:, reader.column].tolist() == [[1, 4], [0, 5]]

    def test_options_none_and_numpy(self):
        values = iter(["b", None, np.int64(0), np.array(1)])
        reader = reader_of(ask(lambda step: next(values), Choice("a", "b")))
        np.testing.assert_equal(reader.read([{}] * 4, [step()] * 4)[:, 0], [1, np.nan, 0, 1])

    def test_a_key_error_is_an_absent_fact(self):
        reader = reader_of(ask(lambda step: step.info["fact"]))
        np.testing.assert_equal(reader.read([{}] * 2, [step(), step({"fact": True})])[:, 0], [np.nan, 1])

    def test_another_error_is_told_with_the_question(self):
        reader = reader_of(ask(lambda step: step.info["fact"].real / 0, name="mine"))
        with pytest.raises(QAError) as refusal:
            reader.read([{}], [step({"fact": 1, "other": 2})])
        message = str(refusal.value)
        assert "question 'mine' raised ZeroDivisionError" in message and "['fact', 'other']" in message
        assert isinstance(refusal.value.__cause__, ZeroDivisionError)

    def test_wrong_types_are_refused(self):
        with pytest.raises(QAError, match=r"question 'mine' gave \(1, 2\); expected a single number"):
            reader_of(ask(lambda step: (1, 2), name="mine")).read([{}], [step()])


class TestResets:
    def test_a_fact_that_needs_an_action_is_not_known_there(self):
        reader = reader_of(ask(lambda step: step.action + 1 > 2, name="acted"), ask("hit", name="hit"))
        facts = reader.read([{"hit": True}], [step({"hit": True}, action=None)])
        np.testing.assert_equal(facts[:, reader.column], [[np.nan, 1]])
        assert reader.read([{}], [step(action=3)])[0, reader.column[0]] == 1

    def test_a_fact_that_does_not_is_known(self):
        reader = reader_of(ask(lambda step: step.reward == 0.0 and not step.terminated))
        assert reader.read([{}], [step(action=None)]).tolist() == [[1]]

    def test_wrong_types_are_refused_even_there(self):
        with pytest.raises(QAError, match="gave 'x'"):
            reader_of(ask(lambda step: "x")).read([{}], [step(action=None)])


class TestNeverSeen:
    def test_is_refused_naming_question_fact_and_keys(self):
        reader = reader_of(ask("crashed", name="crash"))
        reader.read([{"crash": True, "speed": 1.0}])
        with pytest.raises(QAError) as refusal:
            reader.check_seen({"speed": 1.0, "crash": True, "qa/risk": 0.5})
        message = str(refusal.value)
        assert "the fact 'crashed' of question 'crash' never appeared" in message
        assert "info had 'crash'" in message and "qa/risk" not in message  # the likest first, and not our own
        assert "; expected " in message and "step.info.get('crashed', False)" in message

    def test_names_the_key_with_its_slots(self):
        reader = reader_of(ask("near_{car}", name="near", car=["van", "bus"]))
        reader.read([{"near_van": False}])
        with pytest.raises(QAError, match="the fact 'near_bus' of question 'near' never appeared"):
            reader.check_seen({"near_van": False})

    @pytest.mark.parametrize("info", [{}, {"qa/risk": 0.5}])  # what we tell ourselves does not count
    def test_an_empty_info_is_called_empty(self, info):
        with pytest.raises(QAError, match="info was empty"):
            reader_of(ask("crashed")).check_seen(info)

    def test_a_callable_is_seen_when_it_has_given_a_value(self):
        reader = reader_of(ask(lambda step: step.info["crashed"], name="crash"))
        reader.read([{}], [step()])
        with pytest.raises(QAError, match=r"the callable fact .* of question 'crash' never appeared; info had 'speed'"):
            reader.check_seen({"speed": 1})
        reader.read([{}], [step({"crashed": False})])
        reader.check_seen({"speed": 1})

    @pytest.mark.parametrize(("answer", "value"), [(None, False), (Number(0, 1), 0), (Choice("a", "b"), "a")])
    def test_once_in_one_environment_is_enough(self, answer, value):
        reader = reader_of(ask("fact", answer))
        reader.read([{}, {"fact": value}])
        reader.read([{}, {}])
        reader.check_seen({})

    def test_none_does_not_count(self):
        reader = reader_of(ask("fact"))
        reader.read([{"fact": None}])
        with pytest.raises(QAError, match="never appeared; it was None whenever it was there; expected"):
            reader.check_seen({"fact": None})
