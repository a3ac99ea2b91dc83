"""Answers: distributions by hand, arithmetic with numpy, and answers that do not contradict each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sb3_qa.answers import Answer, ChoiceAnswer, NumberAnswer, YesNoAnswer
from sb3_qa.errors import QAError
from sb3_qa.head import decode, survival
from sb3_qa.questions import NUMBER_ATOMS, Choice, Number, Question
from sb3_qa.truth import after, always, eventually, now, steps_until


def f32(values):
    return np.array(values, np.float32)


def logit(p):
    p = np.asarray(p, np.float64)
    return f32(np.log(p) - np.log1p(-p))


def instances(truth, answer=None, text="{k}?", **slots):
    return Question(text, truth, *([] if answer is None else [answer]), **slots).instances


class TestYesNo:
    def test_by_hand(self):
        answer = YesNoAnswer(f32([0.0, 0.5, 0.25, 1.0]))
        assert answer.value is answer.probability and len(answer) == 4
        expected = [0, np.log(2), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), 0]
        np.testing.assert_allclose(answer.entropy, expected, atol=1e-6)

    def test_every_action(self):
        answer = YesNoAnswer(f32([[0.1, 0.5], [0.2, 0.9], [0.3, 0.4]]))
        assert answer.value.shape == answer.entropy.shape == (3, 2)

    def test_of_one_observation(self):
        answer = YesNoAnswer(np.float32(0.25))
        assert float(answer) == 0.25 and answer.entropy.shape == ()


class TestChoice:
    ANSWER = ChoiceAnswer(("left", "middle", "right"), f32([[0.2, 0.5, 0.3], [1, 0, 0], [0.25, 0.25, 0.5]]))

    def test_by_hand(self):
        assert self.ANSWER.value.tolist() == [1, 0, 2] and self.ANSWER.value.dtype == np.float32
        assert self.ANSWER.best.tolist() == ["middle", "left", "right"]
        expected = [-(0.2 * np.log(0.2) + 0.5 * np.log(0.5) + 0.3 * np.log(0.3)), 0, 1.5 * np.log(2)]
        np.testing.assert_allclose(self.ANSWER.entropy, expected, atol=1e-6)

    def test_every_action(self):
        answer = ChoiceAnswer(("a", "b"), f32([[[0.1, 0.9], [0.8, 0.2]]]))
        assert answer.value.tolist() == [[1, 0]] and answer.best.tolist() == [["b", "a"]]
        assert answer.entropy.shape == (1, 2)

    def test_options_may_be_tuples_and_numbers(self):
        answer = ChoiceAnswer(((0, 0), (0, 1), 7), f32([[0.1, 0.9, 0], [0, 0, 1]]))
        assert answer.best.tolist() == [(0, 1), 7]

    def test_of_one_observation(self):
        assert ChoiceAnswer(("a", "b"), f32([0.1, 0.9])).best == "b"


class TestNumber:
    # Atoms 0, 1, 2: the probability of 0 lies over [0, 0.5], of 1 over [0.5, 1.5], of 2 over [1.5, 2].
    ANSWER = NumberAnswer(f32([0, 1, 2]), f32([[0.2, 0.5, 0.3], [0, 1, 0], [0.5, 0, 0.5]]))

    def test_mean_and_entropy(self):
        np.testing.assert_allclose(self.ANSWER.mean, [1.1, 1.0, 1.0], atol=1e-6)
        assert (self.ANSWER.value == self.ANSWER.mean).all()
        expected = [-(0.2 * np.log(0.2) + 0.5 * np.log(0.5) + 0.3 * np.log(0.3)), 0, np.log(2)]
        np.testing.assert_allclose(self.ANSWER.entropy, expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("p", "values"),
        [
            (0.0, [0, 0, 0]),
            (0.1, [0.25, 0.6, 0.1]),
            (0.2, [0.5, 0.7, 0.2]),
            (0.45, [1.0, 0.95, 0.45]),
            (0.5, [1.1, 1.0, 0.5]),
            (0.85, [1.75, 1.35, 1.85]),
            (1.0, [2, 1.5, 2]),
        ],
    )
    def test_quantile(self, p, values):
        quantile = self.ANSWER.quantile(p)
        assert quantile.dtype == np.float32 and quantile.shape == (3,)
        np.testing.assert_allclose(quantile, values, atol=1e-5)

    def test_quantile_of_uneven_atoms(self):
        answer = NumberAnswer(f32([0, 2, 10]), f32([[0.25, 0.5, 0.25]]))  # over [0, 1], [1, 6], [6, 10]
        assert [answer.quantile(p).item() for p in (0.125, 0.5, 0.875)] == pytest.approx([0.5, 3.5, 8])

    def test_interval(self):
        low, high = self.ANSWER.interval(0.7)
        np.testing.assert_allclose(low, self.ANSWER.quantile(0.15))
        np.testing.assert_allclose(high, self.ANSWER.quantile(0.85))
        for level, ends in ((0.0, [1.1, 1.1]), (1.0, [0, 2])):
            np.testing.assert_allclose([x[0] for x in self.ANSWER.interval(level)], ends, atol=1e-5)

    def test_every_action_and_one_observation(self):
        answer = NumberAnswer(f32([0, 1]), f32([[[0.5, 0.5], [0.25, 0.75]]]))
        assert answer.mean.tolist() == [[0.5, 0.75]] and answer.quantile(0.5).shape == (1, 2)
        one = NumberAnswer(f32([0, 1]), f32([0.25, 0.75]))
        assert float(one) == 0.75 and one.quantile(0.25) == pytest.approx(0.5) and one.entropy.shape == ()

    @pytest.mark.parametrize("p", [-0.01, 1.01, float("nan"), float("inf"), "0.9", None, np.array([0.1, 0.9])])
    def test_what_is_no_probability_is_refused(self, p):
        with pytest.raises(QAError, match=r"quantile got p=.*; expected one probability in \[0, 1\]; give"):
            self.ANSWER.quantile(p)
        with pytest.raises(QAError, match=r"interval got level=.*; expected one probability in \[0, 1\]; give"):
            self.ANSWER.interval(p)

    def test_the_top_is_found_though_float32_does_not_sum_to_one(self):
        p = f32([0.1] * 9 + [0.0999])
        assert p.sum() < 1 - 1e-6
        assert NumberAnswer(f32(range(10)), p[None]).quantile(1.0) == 9
        assert NumberAnswer(f32(range(10)), p[None], whole=True).quantile(1.0) == 9

    @given(
        arrays(np.float64, (3, 6), elements=st.floats(0, 1)),
        st.lists(st.floats(0, 1), min_size=2, max_size=2),
        st.booleans(),
    )
    def test_quantiles_rise_within_the_support(self, weights, ps, whole):
        weights[:, 0] += 1e-3
        answer = NumberAnswer(f32([-3, -1, 0, 0.5, 4, 9]), f32(weights / weights.sum(axis=1, keepdims=True)), whole)
        lower, higher = (answer.quantile(p) for p in sorted(ps))
        assert (lower <= higher).all() and (lower >= -3).all() and (higher <= 9).all()

    @given(arrays(np.float64, 6, elements=st.floats(0.01, 1)), st.floats(0.001, 0.999))
    def test_quantile_inverts_the_distribution(self, weights, p):
        support, mass = f32([-3, -1, 0, 0.5, 4, 9]), weights / weights.sum()
        x = float(NumberAnswer(support, f32(mass)[None]).quantile(p).item())
        edges = [-3, *((support[1:] + support[:-1]) / 2), 9]
        below = sum(
            m * np.clip((x - low) / (high - low), 0, 1) for m, low, high in zip(mass, edges, edges[1:], strict=False)
        )
        assert below == pytest.approx(p, abs=1e-3)


class TestWhole:
    ANSWER = NumberAnswer(f32([1, 2, 3]), f32([[0.7, 0.2, 0.1], [0, 0, 1]]), whole=True)

    @pytest.mark.parametrize(
        ("p", "steps"), [(0.0, [1, 1]), (0.7, [1, 3]), (0.71, [2, 3]), (0.9, [2, 3]), (1.0, [3, 3])]
    )
    def test_quantile_is_a_number_of_steps(self, p, steps):
        assert self.ANSWER.quantile(p).tolist() == steps

    def test_interval(self):
        low, high = self.ANSWER.interval(0.5)
        assert low.tolist() == [1, 3] and high.tolist() == [2, 3]


class TestArithmetic:
    ANSWERS = (
        YesNoAnswer(f32([0.25, 0.5])),
        ChoiceAnswer(("a", "b"), f32([[0.75, 0.25], [0.25, 0.75]])),
        NumberAnswer(f32([0, 4]), f32([[0.75, 0.25], [0.25, 0.75]])),
    )

    @pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
    def test_an_answer_stands_for_its_value(self, answer):
        value = np.array(answer.value)
        for got, expected in (
            (-2.0 * answer, -2 * value),
            (answer - 1, value - 1),
            (1 - answer, 1 - value),
            (answer / 4, value / 4),
            (answer**2, value**2),
            (-answer, -value),
            (abs(answer), abs(value)),
            (np.exp(answer), np.exp(value)),
            (np.array([3.0, 4.0]) * answer, np.array([3.0, 4.0]) * value),
            (answer + answer, value + value),
            (answer > 0.3, value > 0.3),
            (answer == value, [True, True]),
            (np.maximum(answer, 0.4), np.maximum(value, 0.4)),
            (np.add.reduce(answer), value.sum()),
            (np.asarray(answer), value),
            (np.asarray(answer, dtype=np.float64), value),
            (np.mean(answer), value.mean()),
            (np.clip(answer, 0.3, 0.6), np.clip(value, 0.3, 0.6)),
            (np.where(answer > 0.3, answer, 0), np.where(value > 0.3, value, 0)),
            (np.stack([answer, answer], axis=1), np.stack([value, value], axis=1)),
            (list(answer), list(value)),
        ):
            assert not isinstance(got, Answer)
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
    def test_answers_with_each_other(self, answer):
        np.testing.assert_allclose(answer * self.ANSWERS[0], np.asarray(answer) * np.asarray(self.ANSWERS[0]))

    def test_in_place_makes_an_array_and_leaves_the_answer(self):
        answer = risk = YesNoAnswer(f32([0.25, 0.5]))
        risk *= 2
        assert isinstance(risk, np.ndarray) and risk.tolist() == [0.5, 1.0]
        assert answer.probability.tolist() == [0.25, 0.5]
        reward = np.zeros(2)
        reward += answer
        assert reward.tolist() == [0.25, 0.5]

    def test_a_copy_is_a_copy(self):
        answer = YesNoAnswer(f32([0.25, 0.5]))
        np.array(answer)[:] = 7
        assert answer.probability.tolist() == [0.25, 0.5]
        assert np.shares_memory(np.asarray(answer), answer.probability)

    def test_indexing(self):
        answer = self.ANSWERS[2]
        assert answer[1] == 3.0 and answer[:1].tolist() == [1.0] and len(answer) == 2

    def test_is_no_condition(self):
        with pytest.raises(QAError, match="expected a comparison; write e.g. answer.probability > 0.5"):
            bool(YesNoAnswer(f32([0.0])))

    def test_repr(self):
        assert repr(self.ANSWERS[0]) == "YesNoAnswer([0.25 0.5 ])"
        assert repr(NumberAnswer(f32([0, 1]), f32([0.25, 0.75]))) == "NumberAnswer(0.75)"


class TestDecode:
    HAZARDS = (0.5, 0.2, 0.75)  # survival 1, 0.5, 0.4, 0.1

    def test_survival(self):
        np.testing.assert_allclose(survival(logit(self.HAZARDS)), [1, 0.5, 0.4, 0.1], atol=1e-6)

    @pytest.mark.parametrize(("k", "p"), [(1, 0.5), (2, 0.6), (3, 0.9)])
    def test_eventually_and_always(self, k, p):
        logits = logit([self.HAZARDS])
        (yes,) = (i for i in instances(eventually("a", within="k"), k=[1, 2, 3]) if i.horizon == k)
        (holds,) = (i for i in instances(always("a", during="k"), k=[1, 2, 3]) if i.horizon == k)
        assert decode(yes, logits).probability == pytest.approx([p], abs=1e-6)
        assert decode(holds, logits).probability == pytest.approx([1 - p], abs=1e-6)

    @pytest.mark.parametrize(
        ("cap", "probabilities", "mean"),
        [(1, [1.0], 1.0), (2, [0.5, 0.5], 1.5), (3, [0.5, 0.1, 0.4], 1.9)],  # the cap stands for all that comes later
    )
    def test_steps_until(self, cap, probabilities, mean):
        (instance,) = (i for i in instances(steps_until("a", cap="k"), k=[1, 2, 3]) if i.horizon == cap)
        answer = decode(instance, logit([self.HAZARDS]))
        np.testing.assert_allclose(answer.probabilities, [probabilities], atol=1e-6)
        assert answer.support.tolist() == list(range(1, cap + 1)) and answer.mean == pytest.approx([mean], abs=1e-6)

    def test_steps_until_is_whole(self):
        (instance,) = instances(steps_until("a", cap=3), text="?")
        answer = decode(instance, logit([self.HAZARDS]))
        assert [answer.quantile(p).item() for p in (0.4, 0.55, 0.7)] == [1, 2, 3]

    def test_yes_or_no(self):
        (instance,) = instances(now("a"), text="?")
        np.testing.assert_allclose(decode(instance, logit([[0.3], [0.9]])).probability, [0.3, 0.9], atol=1e-6)

    def test_choice(self):
        (instance,) = instances(now("a"), Choice("l", "r"), text="?")
        answer = decode(instance, f32([[0, np.log(3)]]))
        np.testing.assert_allclose(answer.probabilities, [[0.25, 0.75]], atol=1e-6)
        assert answer.best.tolist() == ["r"]

    def test_number(self):
        (instance,) = instances(after("a", steps=1), Number(-1, 3), text="?")
        logits = np.zeros((2, NUMBER_ATOMS), np.float32)
        logits[1, -1] = 200  # nearly certain of the highest
        answer = decode(instance, logits)
        assert answer.mean == pytest.approx([1, 3], abs=1e-5)
        assert answer.quantile(1.0)[0] == 3 and answer.quantile(0.0)[0] == -1

    LOGITS = arrays(np.float32, (2, 6), elements=st.floats(-200, 200, width=32))

    @given(LOGITS)
    def test_a_longer_horizon_is_never_less_likely(self, logits):
        soon = [decode(i, logits).probability for i in instances(eventually("a", within="k"), k=range(1, 7))]
        stay = [decode(i, logits).probability for i in instances(always("a", during="k"), k=range(1, 7))]
        steps = [decode(i, logits).mean for i in instances(steps_until("a", cap="k"), k=range(1, 7))]
        assert (np.diff(soon, axis=0) >= 0).all() and (np.diff(stay, axis=0) <= 0).all()
        assert (np.diff(steps, axis=0) >= -1e-5).all()
        for p in (*soon, *stay):
            assert (p >= 0).all() and (p <= 1).all()

    @given(LOGITS)
    def test_steps_until_is_a_distribution_that_agrees_with_eventually(self, logits):
        (steps,) = instances(steps_until("a", cap=6), text="?")
        answer = decode(steps, logits)
        assert (answer.probabilities >= 0).all()
        np.testing.assert_allclose(answer.probabilities.sum(axis=-1), 1, atol=1e-5)
        soon = [decode(i, logits).probability for i in instances(eventually("a", within="k"), k=range(1, 6))]
        np.testing.assert_allclose(np.cumsum(answer.probabilities, axis=-1)[:, :-1].T, soon, atol=1e-5)

    @given(LOGITS)
    def test_survival_never_rises(self, logits):
        alive = survival(logits)
        assert (alive[:, 0] == 1).all() and (np.diff(alive, axis=-1) <= 0).all() and (alive >= 0).all()
