"""Questions: what is refused when one is made, its instances and keys, and the compiled catalogue."""

import copy
import pickle
from functools import partial

import cloudpickle
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sb3_qa.errors import QAError
from sb3_qa.questions import NAME_LENGTH, NUMBER_ATOMS, TOLD, Catalogue, Choice, Number, Question, YesNo, nearest
from sb3_qa.truth import Truth, after, always, eventually, lowest, now, peak, steps_until, total

SOON = eventually("crashed", within="k")


def near(step, k):
    return step.info["distance"] < k


def _never_called(step, limit):
    raise AssertionError("a fact is not read when its question is made")


class _Word(str):
    pass


REFUSED = {
    # The text
    "no words": (lambda: Question("", now("a")), "the text ''", "words"),
    "blank words": (lambda: Question("  ", now("a")), "the text '  '", "words"),
    "text is no text": (lambda: Question(7, now("a")), "the text 7", "words"),
    "open brace": (lambda: Question("Will {k?", SOON, k=5), "'Will {k?'", "braces do not match"),
    "closed brace": (lambda: Question("Will k}?", SOON, k=5), "'Will k}?'", "braces do not match"),
    "empty braces": (lambda: Question("Will {}?", SOON, k=5), "with {}", "name of a slot"),
    "numbered braces": (lambda: Question("Will {0}?", SOON, k=5), "with {0}", "name of a slot"),
    "attribute in braces": (lambda: Question("Will {k.real}?", SOON, k=5), "with {k.real}", "name of a slot"),
    "format that does not fit": (lambda: Question("{k:q}", SOON, k=5), "format", "leave the format out"),
    "format with a slot": (lambda: Question("{k:{w}}", SOON, k=5), "format", "leave the format out"),
    # The truth and its fact
    "truth is a fact": (lambda: Question("Soon?", "crashed"), "truth='crashed'", "now('crashed')"),
    "truth is a class": (lambda: Question("Soon?", Truth), "truth=<class", "operator of sb3_qa.truth"),
    "no fact": (lambda: now(None), "now() got None", "info key or a callable"),
    "empty fact": (lambda: peak("", over=2), "peak() got ''", "info key or a callable"),
    "fact is a truth": (lambda: eventually(now("a"), within=2), "eventually() got Truth", "info key or a callable"),
    "fact with unknown slot": (lambda: Question("Near?", now("near_{car}")), "no slots", "give car=[...]"),
    "fact with bad braces": (lambda: Question("Near?", now("near_{car")), "'near_{car'", "braces"),
    "fact without argument": (
        lambda: Question("Near?", now(lambda: True)),
        "too many positional",
        "callable of a Step",
    ),
    "fact wants more": (lambda: Question("Near?", now(_never_called)), "'limit'", "callable of a Step"),
    "fact key names the horizon": (
        lambda: Question("In {k}?", eventually("near_{k}", within="k"), k=[1, 5]),
        "slot 'k', which is its horizon",
        "one event for all horizons",
    ),
    "fact takes the horizon": (
        lambda: Question("In {k}?", always(near, during="k"), k=[1, 5]),
        "slot 'k', which is its horizon",
        "one event for all horizons",
    ),
    # Horizons and discounts
    "horizon 0": (lambda: eventually("a", within=0), "within=...) got a horizon of 0", "at least 1"),
    "horizon negative": (lambda: always("a", during=-3), "during=...) got a horizon of -3", "at least 1"),
    "horizon half": (lambda: after("a", steps=2.5), "steps=...) got a horizon of 2.5", "whole number"),
    "horizon infinite": (lambda: total("a", over=float("inf")), "over=...) got a horizon of inf", "whole number"),
    "horizon nan": (lambda: lowest("a", over=float("nan")), "over=...) got a horizon of nan", "whole number"),
    "horizon bool": (lambda: peak("a", over=True), "over=...) got a horizon of True", "whole number"),
    "horizon none": (lambda: steps_until("a", cap=None), "cap=...) got a horizon of None", "name of a slot"),
    "horizon list": (lambda: steps_until("a", cap=[3]), "cap=...) got a horizon of [3]", "name of a slot"),
    "horizon in words": (lambda: eventually("a", within="5"), "within=...) got '5'", "within=5"),
    "horizon slot 0": (lambda: Question("In {k}?", SOON, k=[5, 0]), "slot 'k', got a horizon of 0", "at least 1"),
    "horizon slot word": (lambda: Question("In {k}?", SOON, k="five"), "slot 'k', got a horizon of 'five'", "whole"),
    "horizon slot bool": (lambda: Question("In {k}?", SOON, k=True), "slot 'k', got a horizon of True", "whole"),
    "discount 0": (lambda: total("a", over=3, discount=0), "discount=0", "(0, 1]"),
    "discount above 1": (lambda: total("a", over=3, discount=1.01), "discount=1.01", "(0, 1]"),
    "discount nan": (lambda: total("a", over=3, discount=float("nan")), "discount=nan", "(0, 1]"),
    "discount word": (lambda: total("a", over=3, discount="0.9"), "discount='0.9'", "(0, 1]"),
    "discount bool": (lambda: total("a", over=3, discount=True), "discount=True", "(0, 1]"),
    # Slots
    "slot without values": (lambda: Question("In {k}?", SOON), "no slots", "give k=[...]"),
    "another slot": (lambda: Question("In {k}, {car}?", SOON, k=5), "['k']", "give car=[...]"),
    "horizon slot without values": (lambda: Question("Soon?", SOON), "no slots", "give k=[...]"),
    "unknown slot": (lambda: Question("Soon?", now("a"), j=[1]), "the slot 'j'", "expected no slots; write {j}"),
    "misspelt slot": (lambda: Question("In {k}?", SOON, k=5, kk=5), "the slot 'kk'", "expected ['k']; write {kk}"),
    "no values": (lambda: Question("In {k}?", SOON, k=[]), "k=[]", "at least one value"),
    "values none": (lambda: Question("In {k}?", SOON, k=None), "k=None", "at least one value"),
    "repeated value": (lambda: Question("In {k}?", SOON, k=[5, 1, 5]), "k=[5, 1, 5]", "each once"),
    "values that read alike": (lambda: Question("{c}?", now("a"), c=[1, "1"]), "c=[1, '1']", "each once"),
    "values that cannot be keys": (lambda: Question("{c}?", now("a"), c=[[1], [2]]), "[[1], [2]]", "hashable"),
    "action with values": (
        lambda: Question("If {action}?", now("a"), action=["left"]),
        "the slot 'action'",
        "every action; leave it out",
    ),
    "action as the horizon": (
        lambda: Question("If {action}?", eventually("a", within="action")),
        "the slot 'action'",
        "every action; leave it out",
    ),
    "slot named as an argument": (lambda: Question("Is {name} near?", now("a")), "the slot 'name'", "rename the slot"),
    # The answer
    "class YesNo": (lambda: Question("Soon?", now("a"), YesNo), "the class YesNo", "YesNo(...)"),
    "class Number": (lambda: Question("Soon?", now("a"), answer=Number), "the class Number", "Number(...)"),
    "answer is no answer": (lambda: Question("Soon?", now("a"), bool), "answer=<class 'bool'>", "YesNo(), Choice("),
    "answer none": (lambda: Question("Soon?", now("a"), None), "answer=None", "YesNo(), Choice("),
    "eventually a number": (lambda: Question("Soon?", eventually("a", within=2), Number(0, 1)), "Number(", "YesNo()"),
    "always a choice": (lambda: Question("Soon?", always("a", during=2), Choice(1, 2)), "Choice(", "YesNo()"),
    "total yes or no": (lambda: Question("Sum?", total("a", over=2)), "YesNo()", "Number(low, high) for total()"),
    "peak yes or no": (lambda: Question("Top?", peak("a", over=2)), "YesNo()", "Number(low, high) for peak()"),
    "lowest a choice": (lambda: Question("Low?", lowest("a", over=2), Choice(1, 2)), "Choice(", "for lowest()"),
    "steps a choice": (lambda: Question("When?", steps_until("a", cap=9), Choice(1, 2)), "Choice(", "Number(0, 9)"),
    "steps beyond the range": (
        lambda: Question("When, in {k}?", steps_until("a", cap="k"), Number(0, 9), k=[5, 10]),
        "high=9",
        "Number(0, 10)",
    ),
    "steps below the range": (lambda: Question("?", steps_until("a", cap=9), Number(2, 9)), "low=2", "Number(0, 9)"),
    "no option": (lambda: Choice(), "Choice got ()", "two different options"),
    "one option": (lambda: Choice("left"), "Choice got ('left',)", "two different options"),
    "an option twice": (lambda: Choice("a", "b", "a"), "('a', 'b', 'a')", "two different options"),
    "an option that is untold": (lambda: Choice(None, "a"), "Choice got (None, 'a')", "write 'none'"),
    "a list of options": (lambda: Choice(["left", "right"]), "one list", "Choice(*options)"),
    "options that cannot be keys": (lambda: Choice(["a"], ["b"]), "[['a'], ['b']]", "hashable"),
    "low above high": (lambda: Number(4, 0), "low=4, high=0", "low < high"),
    "low equals high": (lambda: Number(4, 4.0), "low=4, high=4.0", "low < high"),
    "bound infinite": (lambda: Number(0, float("inf")), "the bound inf", "finite"),
    "bound nan": (lambda: Number(float("nan"), 1), "the bound nan", "finite"),
    "bound word": (lambda: Number("0", 1), "the bound '0'", "finite"),
    "bound bool": (lambda: Number(False, 1), "the bound False", "finite"),
    # The name
    "name too long": (lambda: Question("Soon?", now("a"), name="x" * 25), "x" * 25, "1 to 24 letters"),
    "name empty": (lambda: Question("Soon?", now("a"), name=""), "name=''", "1 to 24 letters"),
    "name blank": (lambda: Question("Soon?", now("a"), name="  "), "name='  '", "1 to 24 letters"),
    "name with a comma": (lambda: Question("Soon?", now("a"), name="a,b"), "name='a,b'", "1 to 24 letters"),
    "name with brackets": (lambda: Question("Soon?", now("a"), name="a[k=1]"), "name='a[k=1]'", "1 to 24 letters"),
    "name with a slash": (lambda: Question("Soon?", now("a"), name="a/b"), "name='a/b'", "1 to 24 letters"),
    "name on two lines": (lambda: Question("Soon?", now("a"), name="a\n"), "name='a\\n'", "1 to 24 letters"),
    "name is no word": (lambda: Question("Soon?", now("a"), name=5), "name=5", "1 to 24 letters"),
    "name told by wrappers": (lambda: Question("Soon?", now("a"), name="risk"), "name='risk'", "give name=..."),
    "text makes such a name": (lambda: Question("Catastrophe?", now("a")), "name='catastrophe'", "give name=..."),
    # The list
    "no list": (lambda: Catalogue(Question("Soon?", now("a"))), "Question('Soon?'", "a list"),
    "empty list": (lambda: Catalogue([]), "got []", "a list"),
    "a generator": (lambda: Catalogue(q for q in [Question("Soon?", now("a"))]), "generator", "a list"),
    "repeated name": (
        lambda: Catalogue([Question("A?", now("a"), name="q"), Question("B?", now("b"), name="q")]),
        "the name 'q' 2 times",
        "each once",
    ),
}


@pytest.mark.parametrize(("make", "got", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_got_expected_and_mend(make, got, expected):
    with pytest.raises(QAError) as refusal:
        make()
    message = str(refusal.value)
    assert got in message and expected in message
    assert " got " in message
    assert message.count("; ") >= 2 and "; expected " in message
    assert message.index(" got ") < message.index("; expected ") < message.rindex("; ")


def test_a_list_of_other_things_is_refused():
    with pytest.raises(
        QAError, match=r"questions holds 'Soon\?'; expected only Question objects; make it with Question"
    ):
        Catalogue([Question("Soon?", now("a")), "Soon?"])


def test_a_refusal_is_a_value_error():
    with pytest.raises(ValueError, match="low < high"):
        Number(1, 0)


class TestInstances:
    def test_without_slots_a_question_is_its_own_instance(self):
        question = Question("How fast am I going?", now("speed"), Number(0, 40), name="speed")
        (instance,) = question.instances
        assert (instance.key, instance.text, dict(instance.slots), instance.horizon) == (
            "speed",
            "How fast am I going?",
            {},
            None,
        )
        assert instance.question is question and not instance.per_action

    def test_one_for_each_value_in_the_order_given(self):
        question = Question("Within {k} steps?", SOON, k=[10, 1, 5], name="crash")
        assert [i.key for i in question.instances] == ["crash[k=10]", "crash[k=1]", "crash[k=5]"]
        assert [i.text for i in question.instances] == [f"Within {k} steps?" for k in (10, 1, 5)]
        assert [i.horizon for i in question.instances] == [10, 1, 5]

    def test_several_slots_are_combined(self):
        question = Question(
            "{car} within {k}, {car}?", eventually("hit_{car}", within="k"), k=[1, 2], car=["van", "bus"]
        )
        assert [(i.text, i.slots["k"], i.slots["car"]) for i in question.instances] == [
            ("van within 1, van?", 1, "van"),
            ("bus within 1, bus?", 1, "bus"),
            ("van within 2, van?", 2, "van"),
            ("bus within 2, bus?", 2, "bus"),
        ]
        assert question.instances[1].key.endswith("[k=1][car=bus]")

    def test_a_horizon_need_not_be_in_the_text(self):
        question = Question("Soon?", SOON, k=[1, 2], name="soon")
        assert [(i.key, i.text, i.horizon) for i in question.instances] == [
            ("soon[k=1]", "Soon?", 1),
            ("soon[k=2]", "Soon?", 2),
        ]

    def test_a_horizon_may_be_a_number(self):
        (instance,) = Question("Soon?", always("a", during=7)).instances
        assert instance.horizon == 7 and dict(instance.slots) == {}

    def test_action_stays_in_the_text(self):
        question = Question("Within {k} steps if I choose {action}, {action}?", SOON, k=[3])
        assert question.per_action and "action" not in question.slots
        (instance,) = question.instances
        assert instance.text == "Within 3 steps if I choose {action}, {action}?" and instance.per_action

    def test_doubled_braces_are_literal(self):
        question = Question("Is {{x}} {k}?", SOON, k=2)
        assert question.instances[0].text == "Is {x} 2?" and not question.per_action

    @pytest.mark.parametrize(
        ("values", "kept"),
        [
            (5, (5,)),
            ([5.0], (5,)),
            (np.int64(5), (5,)),
            (np.array([1, 5]), (1, 5)),
            (range(1, 3), (1, 2)),
            ((k for k in (2, 1)), (2, 1)),
        ],
    )
    def test_values_are_kept_as_plain_whole_numbers(self, values, kept):
        slots = Question("{k}?", SOON, k=values).slots
        assert slots == {"k": kept} and all(type(k) is int for k in slots["k"])

    def test_a_word_is_one_value_and_other_slots_may_be_anything(self):
        question = Question("Near the {car} ({far})?", now("a"), name="near", car="van", far=np.array([0.5, 2]))
        assert question.slots == {"car": ("van",), "far": (0.5, 2.0)}
        assert [i.key for i in question.instances] == ["near[car=van][far=0.5]", "near[car=van][far=2.0]"]
        assert all(type(far) is float for far in question.slots["far"])

    def test_a_numpy_horizon_is_a_horizon(self):
        assert eventually("a", within=np.int32(4)).horizon == 4

    def test_steps_until_needs_no_answer(self):
        assert Question("When, in {k}?", steps_until("a", cap="k"), k=[5, 9]).answer == Number(0, 9)
        assert Question("When?", steps_until("a", cap=3), Number(1, 3)).answer == Number(1, 3)

    @pytest.mark.parametrize("answer", [YesNo(), Number(0, 1), Choice("a", "b")])
    @pytest.mark.parametrize("truth", [now("a"), after("a", steps=2)])
    def test_now_and_after_take_any_answer(self, truth, answer):
        assert Question("?", truth, answer).answer == answer

    def test_facts_of_other_slots_and_builtins_are_taken(self):
        Question("Is the {car} near?", eventually("near_{car}", within=3), car=["van", "bus"])
        Question("Nearer than {limit}?", now(_never_called), limit=[1, 2])
        Question("Nearer than {k}, in {k}?", after(near, steps="k"), k=[1, 2])  # a truth of its own for each k
        Question("Near?", now(partial(near, k=3)))
        Question("Near?", now(bool))


class TestNames:
    def test_given(self):
        assert Question("Soon?", now("a"), name="a-b_c. 9").name == "a-b_c. 9"

    def test_made_from_the_text(self):
        assert Question("Will I crash within {k} steps?", SOON, k=1).name == "will_i_crash_within_k_st"
        assert Question("¿?", now("a")).name == "question"

    def test_the_longest_still_fits_the_logger(self):
        name = Question("?", now("a"), name="n" * NAME_LENGTH).name
        assert len(f"qa/{name}/accuracy") <= 36

    @given(st.text(min_size=1).filter(lambda text: text.strip() and not set("{}") & set(text)))
    def test_one_made_from_any_text_could_have_been_given(self, text):
        assume(not any(word in text.lower() for word in TOLD))
        name = Question(text, now("a")).name
        assert Question("?", now("a"), name=name).name == name

    @pytest.mark.parametrize("name", TOLD)
    def test_what_wrappers_tell_is_taken(self, name):
        with pytest.raises(QAError, match=f"name='{name}', as which wrappers tell 'qa/{name}' themselves"):
            Question("?", now("a"), name=name)

    def test_what_wrappers_tell_is_free_where_slots_tell_it_apart(self):
        assert Question("In {k}?", SOON, name="risk", k=[1]).instances[0].key == "risk[k=1]"


def examples():
    return [
        Question("Soon?", SOON, name="soon", k=[1, 2]),
        Question("Which?", after("lane", steps="k"), Choice("a", "b"), k=[1, 2]),
        Question("How much if {action}?", total("gain", over=5, discount=0.9), Number(0, 4)),
    ]


class TestValue:
    @pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
    def test_pickle(self, dumps):
        for question in examples():
            again = pickle.loads(dumps(question))
            assert again == question and hash(again) == hash(question)
            assert again.instances == question.instances and again.answer == question.answer

    def test_a_callable_fact_travels_by_cloudpickle(self):
        limit = 3
        question = Question("Near?", now(lambda step: step < limit))
        assert pickle.loads(cloudpickle.dumps(question)).truth.fact(2) is True

    def test_deepcopy(self):
        assert copy.deepcopy(examples()) == examples()

    def test_equal_when_all_is_equal(self):
        assert examples() == examples() and len(set(examples() + examples())) == 3

    @pytest.mark.parametrize(
        "other",
        [
            Question("Soon!", SOON, name="soon", k=[1, 2]),
            Question("Soon?", eventually("hit", within="k"), name="soon", k=[1, 2]),
            Question("Soon?", SOON, name="other", k=[1, 2]),
            Question("Soon?", SOON, name="soon", k=[1, 3]),
            Question("Soon?", always("crashed", during="k"), name="soon", k=[1, 2]),
        ],
    )
    def test_different_when_anything_is_different(self, other):
        assert other != examples()[0]

    def test_is_not_changed(self):
        with pytest.raises(AttributeError):
            examples()[0].text = "Later?"

    def test_repr_names_text_and_name(self):
        assert repr(examples()[0]) == "Question('Soon?', name='soon')"

    def test_numpy_options_are_kept_plain(self):
        assert [type(option) for option in Choice(*np.arange(2)).options] == [int, int]

    def test_truths_tell_events_from_others(self):
        events = [eventually("a", within=1), always("a", during=1), steps_until("a", cap=1)]
        others = [now("a"), after("a", steps=1), total("a", over=1), peak("a", over=1), lowest("a", over=1)]
        assert all(truth.is_event for truth in events) and not any(truth.is_event for truth in others)
        assert [truth.event_when for truth in events] == [True, False, True]


OPERATORS = {
    "event": lambda k: (eventually("a", within=k), YesNo()),
    "always": lambda k: (always("a", during=k), YesNo()),
    "steps": lambda k: (steps_until("a", cap=k), YesNo()),
    "yesno": lambda k: (after("a", steps=k), YesNo()),
    "choice2": lambda k: (after("a", steps=k), Choice("l", "r")),
    "choice5": lambda k: (after("a", steps=k), Choice(*"abcde")),
    "number": lambda k: (peak("a", over=k), Number(0, 1)),
}


@st.composite
def question_lists(draw):
    questions = []
    for n in range(draw(st.integers(1, 6))):
        truth, answer = OPERATORS[draw(st.sampled_from(sorted(OPERATORS)))]("k")
        horizons = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
        text = "{k} {c} {action}?" if draw(st.booleans()) else "{k} {c}?"
        cars = draw(st.sampled_from([["van"], ["van", "bus"]]))
        questions.append(Question(text, truth, answer, f"q{n}", k=horizons, c=cars))
    return questions


class TestCatalogue:
    @given(question_lists())
    def test_columns(self, questions):
        catalogue = Catalogue(questions)
        targets = catalogue.targets
        # Contiguous from 0 to the end.
        assert [t.start for t in targets] == [0, *(t.stop for t in targets[:-1])]
        assert targets[-1].stop == catalogue.n_logits == sum(t.width for t in targets)
        # States before actions; in each part sigmoids before softmaxes, softmaxes of one width together.
        order = [
            (t.question.per_action, t.kind in ("choice", "number"), t.width if t.kind in ("choice", "number") else 0)
            for t in targets
        ]
        assert order == sorted(order)
        assert catalogue.n_state_logits == sum(t.width for t in targets if not t.question.per_action)

    @given(question_lists())
    def test_every_instance_has_its_target(self, questions):
        catalogue = Catalogue(questions)
        assert list(catalogue.instances) == [i.key for q in questions for i in q.instances]
        assert set(catalogue.target_of) == set(catalogue.instances)
        for key, instance in catalogue.instances.items():
            target = catalogue.target_of[key]
            assert target.question is instance.question and target.slots["c"] == instance.slots["c"]
            if target.kind == "event":
                assert target.width == target.horizon == max(instance.question.slots["k"])
            else:
                assert target.horizon == instance.horizon and target.slots == instance.slots

    @given(question_lists())
    def test_horizons_of_an_event_share_a_target_and_nothing_else_does(self, questions):
        catalogue = Catalogue(questions)
        sharing = {}
        for key, instance in catalogue.instances.items():
            identity = (instance.question.name, instance.slots["c"])
            if not instance.question.truth.is_event:
                identity += (instance.horizon,)
            sharing.setdefault(identity, set()).add(id(catalogue.target_of[key]))
        assert all(len(shared) == 1 for shared in sharing.values())
        assert len(sharing) == len(catalogue.targets)

    def test_by_hand(self):
        catalogue = Catalogue(
            [
                Question("Which, if {action}?", after("lane", steps=1), Choice(*"lmr"), "lane_if"),
                Question("In {k} if {action}?", SOON, name="crash_if", k=[1, 4]),
                Question("How fast?", now("speed"), Number(0, 40), "speed"),
                Question("In {k}?", SOON, name="crash", k=[2, 3]),
                Question("Which?", now("lane"), Choice(*"lmr"), "lane"),
                Question("Now?", now("crashed"), name="crashed"),
            ]
        )
        assert [(t.question.name, t.kind, t.start, t.width) for t in catalogue.targets] == [
            ("crash", "event", 0, 3),
            ("crashed", "yesno", 3, 1),
            ("lane", "choice", 4, 3),
            ("speed", "number", 7, NUMBER_ATOMS),
            ("crash_if", "event", 7 + NUMBER_ATOMS, 4),
            ("lane_if", "choice", 11 + NUMBER_ATOMS, 3),
        ]
        assert catalogue.n_state_logits == 7 + NUMBER_ATOMS

    def test_find(self):
        catalogue = Catalogue(examples())
        assert catalogue.find("soon[k=2]").horizon == 2

    @pytest.mark.parametrize("word", ["soon", "soon[k=3]", "son[k=1]"])
    def test_find_names_the_nearest(self, word):
        with pytest.raises(QAError) as refusal:
            Catalogue(examples()).find(word)
        message = str(refusal.value)
        assert repr(word) in message and "'soon[k=1]'" in message and "expected one of" in message

    def test_nearest_comes_first_and_the_rest_is_counted(self):
        known = [f"crash[k={k}]" for k in range(1, 10)] + ["speed"]
        assert nearest("sped", known).startswith("'speed'")
        assert nearest("crash[k=7]", known).startswith("'crash[k=7]'") and "(and 4 more)" in nearest("crash", known)
        assert nearest("???", ["a", "b"]) == "'a', 'b'"

    def test_pickle(self):
        again = pickle.loads(pickle.dumps(Catalogue(examples())))
        assert [t.start for t in again.targets] == [t.start for t in Catalogue(examples()).targets]
        assert list(again.instances) == list(Catalogue(examples()).instances)
