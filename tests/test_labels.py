"""The store of labels: targets and weights of the loss's cells, by hand and as the likelihood they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_qa.labels import ENDED, EventTimes, LabelStore
from sb3_qa.questions import NUMBER_ATOMS, Catalogue, Choice, Number, Question
from sb3_qa.truth import after, always, eventually, now, steps_until

ASKED = {
    "soon": Question("Soon?", eventually("a", within=4), name="soon"),
    "stay": Question("Always?", always("a", during=3), name="stay"),
    "now": Question("Now?", now("a"), name="now"),
    "lane": Question("Which?", now("lane"), Choice("left", "middle", "right"), "lane"),
    "speed": Question("How fast?", now("speed"), Number(-2, 5), "speed"),
    "soon_if": Question("Soon if {action}?", steps_until("a", cap=2), name="soon_if"),
    "lane_if": Question("Which if {action}?", after("lane", steps=1), Choice("left", "right"), "lane_if"),
}


def times(*pairs):
    known, event = zip(*pairs, strict=True)
    return EventTimes(np.array(known, np.int32), np.array(event, bool))


def one_event(pairs, cut_row=None, survival=((1.0, 0.5, 0.25, 0.2, 0.1),)):
    """The store of ``soon`` alone."""
    cut_row = np.full(len(pairs), -1) if cut_row is None else np.array(cut_row)
    curves = np.array(survival, np.float32).reshape(-1, 5)
    return LabelStore(Catalogue([ASKED["soon"]]).targets, [times(*pairs)], [], cut_row.astype(np.int32), [curves], None)


def cells(store):
    y, weight = store.dense(np.arange(len(store)))
    assert y.dtype == weight.dtype == np.float32 and y.shape == weight.shape == (len(store), store.n_columns)
    return y, weight


class TestByHand:
    @pytest.mark.parametrize(
        ("known", "event", "y", "weight"),
        [
            (1, True, [1, 0, 0, 0], [1, 0, 0, 0]),
            (3, True, [0, 0, 1, 0], [1, 1, 1, 0]),
            (4, True, [0, 0, 0, 1], [1, 1, 1, 1]),
            (5, True, [0, 0, 0, 0], [1, 1, 1, 1]),  # later than anybody asks
            (ENDED, False, [0, 0, 0, 0], [1, 1, 1, 1]),
        ],
    )
    def test_a_future_that_is_known(self, known, event, y, weight):
        got = cells(one_event([(known, event)]))
        assert got[0].tolist() == [y] and got[1].tolist() == [weight]

    @pytest.mark.parametrize(
        ("known", "y", "weight"),
        [
            # After the cut the survival curve there is 1, 0.5, 0.25, 0.2, 0.1: hazards 0.5, 0.5, 0.2, 0.5.
            (1, [0, 0.5, 0.5, 0.2], [1, 1, 0.5, 0.25]),
            (2, [0, 0, 0.5, 0.5], [1, 1, 1, 0.5]),
            (3, [0, 0, 0, 0.5], [1, 1, 1, 1]),
            (4, [0, 0, 0, 0], [1, 1, 1, 1]),
            (9, [0, 0, 0, 0], [1, 1, 1, 1]),
        ],
    )
    def test_a_future_that_is_cut_goes_on_by_the_curve_there(self, known, y, weight):
        got = cells(one_event([(known, False)], cut_row=[0]))
        np.testing.assert_allclose(got[0], [y], atol=1e-6)
        np.testing.assert_allclose(got[1], [weight], atol=1e-6)

    def test_an_event_before_the_cut_is_not_continued(self):
        got = cells(one_event([(2, True)], cut_row=[0]))
        assert got[0].tolist() == [[0, 1, 0, 0]] and got[1].tolist() == [[1, 1, 0, 0]]

    def test_each_row_goes_on_by_its_own_cut(self):
        curves = [(1.0, 0.9, 0.8, 0.7, 0.6), (1.0, 0.5, 0.5, 0.5, 0.5)]
        y, weight = cells(one_event([(1, False), (1, False), (2, False)], cut_row=[1, 0, 1], survival=curves))
        np.testing.assert_allclose(weight, [[1, 1, 0.5, 0.5], [1, 1, 0.9, 0.8], [1, 1, 1, 0.5]], atol=1e-6)
        np.testing.assert_allclose(y, [[0, 0.5, 0, 0], [0, 0.1, 1 / 9, 1 / 8], [0, 0, 0.5, 0]], atol=1e-6)

    def test_a_curve_that_has_come_to_nothing(self):
        y, weight = cells(one_event([(1, False)], cut_row=[0], survival=[(1.0, 0.0, 0.0, 0.0, 0.0)]))
        assert weight.tolist() == [[1, 1, 0, 0]] and y[0, :2].tolist() == [0, 1] and np.isfinite(y).all()

    def test_without_cuts(self):
        y, weight = cells(one_event([(2, True), (ENDED, False)], survival=()))
        assert y.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]] and weight.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]

    def test_yes_no_and_unknown(self):
        targets = Catalogue([ASKED["now"]]).targets
        known = times((1, True), (1, False), (0, False))
        # Runs into a cut, which is nothing to a question of one state.
        y, weight = cells(LabelStore(targets, [known], [], np.zeros(3, np.int32), [], None))
        assert y.tolist() == [[1], [0], [0]] and weight.tolist() == [[1], [1], [0]]

    def test_choice(self):
        targets = Catalogue([ASKED["lane"]]).targets
        option = np.array([2, 0, np.nan], np.float32)
        y, weight = cells(LabelStore(targets, [], [option], np.full(3, -1, np.int32), [], None))
        assert y.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
        assert weight.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]

    def test_number_by_hand(self):
        targets = Catalogue([Question("?", now("a"), Number(0, NUMBER_ATOMS - 1))]).targets
        value = np.array([3.0, 3.25, 0.0, 31.0, -7.0, 99.0, np.nan], np.float32)
        y, weight = cells(LabelStore(targets, [], [value], np.full(7, -1, np.int32), [], None))
        expected = np.zeros((7, NUMBER_ATOMS))
        expected[0, 3] = 1
        expected[1, [3, 4]] = 0.75, 0.25
        expected[2, 0] = expected[3, 31] = 1
        expected[4, 0] = expected[5, 31] = 1  # outside counts as the near end
        np.testing.assert_allclose(y, expected, atol=1e-6)
        assert (weight[:-1] == 1).all() and (weight[-1] == 0).all()

    def test_questions_of_all_kinds_in_their_columns(self):
        catalogue = Catalogue(list(ASKED.values()))
        # soon 0-3, stay 4-6, now 7, lane 8-10, speed 11-42, then about actions: soon_if 43-44, lane_if 45-46.
        curves = {
            "soon": np.array([[1, 0.5, 0.25, 0.2, 0.1]], np.float32),
            "stay": np.array([[1, 0.9, 0.6, 0.3]], np.float32),
            "soon_if": np.array([[1, 0.8, 0.4]], np.float32),
        }
        times_of = {
            "soon": times((2, True), (1, False)),
            "stay": times((3, True), (2, False)),
            "now": times((1, True), (0, False)),
            "soon_if": times((1, True), (1, False)),
        }
        values_of = {
            "lane": np.array([1, np.nan], np.float32),
            "speed": np.array([-2, 5], np.float32),
            "lane_if": np.array([np.nan, 1], np.float32),
        }
        names = [target.question.name for target in catalogue.targets]
        store = LabelStore(
            catalogue.targets,
            [times_of[name] for name in names if name in times_of],
            [values_of[name] for name in names if name in values_of],
            np.array([-1, 0], np.int32),
            [curves[name] for name in names if name in curves],
            np.zeros((2, 3), np.float32),
        )
        y, weight = cells(store)
        speed = slice(11, 11 + NUMBER_ATOMS)
        assert y[0, :11].tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0]
        assert weight[0, :11].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]
        np.testing.assert_allclose(y[:, speed], np.eye(NUMBER_ATOMS)[[0, -1]], atol=1e-5)
        assert (weight[:, speed] == 1).all()
        assert y[0, 43:].tolist() == [1, 0, 0, 0] and weight[0, 43:].tolist() == [1, 0, 0, 0]
        np.testing.assert_allclose(y[1, :11], [0, 0.5, 0.5, 0.2, 0, 0, 0.1, 0, 0, 0, 0], atol=1e-6)
        np.testing.assert_allclose(weight[1, :11], [1, 1, 0.5, 0.25, 1, 1, 1, 0, 0, 0, 0], atol=1e-6)
        np.testing.assert_allclose(y[1, 43:], [0, 0.2, 0, 1], atol=1e-6)
        assert weight[1, 43:].tolist() == [1, 1, 1, 1]

    def test_a_minibatch_is_the_rows_asked_for(self):
        store = one_event([(1, True), (1, False), (ENDED, False)], cut_row=[-1, 0, -1])
        y, weight = cells(store)
        rows = np.array([2, 1, 0, 1])
        got = store.dense(rows)
        assert (got[0] == y[rows]).all() and (got[1] == weight[rows]).all()

    def test_the_caller_may_keep_and_change_what_it_gets(self):
        store = one_event([(1, True), (1, False)], cut_row=[-1, 0])
        before = [x.copy() for x in cells(store)]
        for array in store.dense(np.array([0, 1])):
            array *= 7
        assert all((x == y).all() for x, y in zip(before, cells(store), strict=True))


class TestNumbers:
    @given(
        st.integers(-50, 50),
        st.integers(1, 100),
        st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=5),
    )
    def test_two_neighbouring_atoms_whose_mean_is_the_value(self, low, width, values):
        answer = Number(low, low + width)
        targets = Catalogue([Question("?", now("a"), answer)]).targets
        store = LabelStore(targets, [], [np.array(values, np.float32)], np.full(len(values), -1, np.int32), [], None)
        y, _ = cells(store)
        support = np.linspace(answer.low, answer.high, NUMBER_ATOMS)
        np.testing.assert_allclose(y @ support, np.clip(values, answer.low, answer.high), atol=1e-4 * width)
        np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-5)
        for row in y:
            places = np.flatnonzero(np.abs(row) > 1e-5)
            assert 1 <= len(places) <= 2 and np.ptp(places) <= 1 and (row > -1e-4).all()


@st.composite
def stores(draw):
    """Targets, times, cut rows and curves; about several events of several widths, and questions of other kinds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_rows, n_cuts = draw(st.integers(1, 8)), draw(st.integers(0, 3))
    questions = []
    for n, kind in enumerate(draw(st.lists(st.sampled_from(["event", "yesno", "choice"]), min_size=1, max_size=5))):
        text = draw(st.sampled_from(["?", "If {action}?"]))
        if kind == "event":
            questions.append(Question(text, eventually("a", within=draw(st.integers(1, 7))), name=f"q{n}"))
        elif kind == "yesno":
            questions.append(Question(text, now("a"), name=f"q{n}"))
        else:
            questions.append(Question(text, now("a"), Choice(*range(draw(st.integers(2, 4)))), name=f"q{n}"))
    targets = Catalogue(questions).targets
    cut_row = rng.integers(-1, n_cuts, n_rows).astype(np.int32)
    known_times, curves, values = [], [], []
    for target in targets:
        if target.kind == "event":
            event = rng.random(n_rows) < 0.4
            known = rng.integers(1, 10, n_rows)
            known[~event & (cut_row < 0)] = ENDED  # what is not cut has ended
            known_times.append(EventTimes(known.astype(np.int32), event))
            hazards = rng.random((n_cuts, target.width)) * rng.choice([0.1, 1.0])
            curve = np.cumprod(1 - hazards, axis=1)
            curves.append(np.concatenate([np.ones((n_cuts, 1)), curve], axis=1).astype(np.float32))
        elif target.kind == "yesno":
            known_times.append(EventTimes(rng.integers(0, 2, n_rows).astype(np.int32), rng.random(n_rows) < 0.5))
            known_times[-1].event[known_times[-1].known == 0] = False
        else:
            values.append(np.where(rng.random(n_rows) < 0.3, np.nan, rng.integers(0, target.width, n_rows)))
    return targets, known_times, [v.astype(np.float32) for v in values], cut_row, curves


def expected_log_likelihood(hazards, known, event, curve):
    """-E[log P(T)] under hazards 1..K, where T is the time of the event, more than K being one outcome.

    :param curve: survival after the cut, None where the future is not cut
    """
    width = len(hazards)

    def surprise(t):  # of the event coming at t, or after all K steps
        if t > width:
            return -sum(np.log(1 - h) for h in hazards)
        return -np.log(hazards[t - 1]) - sum(np.log(1 - h) for h in hazards[: t - 1])

    if event:
        return surprise(known)
    if curve is None or known >= width:
        return surprise(width + 1)
    left = width - known
    within = sum((curve[j - 1] - curve[j]) * surprise(known + j) for j in range(1, left + 1))
    return within + curve[left] * surprise(width + 1)


class TestLikelihood:
    @settings(max_examples=150)
    @given(stores(), st.integers(0, 2**32 - 1))
    def test_weighted_cross_entropies_sum_to_the_expected_log_likelihood(self, labels, seed):
        targets, known_times, values, cut_row, curves = labels
        y, weight = cells(LabelStore(*labels, None))
        guess = np.random.default_rng(seed).uniform(0.05, 0.95, y.shape)
        cross_entropy = weight * -(y * np.log(guess) + (1 - y) * np.log(1 - guess))
        known_times, curves, values = iter(known_times), iter(curves), iter(values)
        for target in targets:
            columns = slice(target.start, target.stop)
            if target.kind == "choice":
                option = next(values)
                for row in range(len(cut_row)):
                    told = [] if np.isnan(option[row]) else [int(option[row])]
                    assert np.flatnonzero(y[row, columns]).tolist() == told
                    assert (weight[row, columns] == len(told)).all()
                continue
            known, event = next(known_times)
            curve = next(curves) if target.kind == "event" else None
            for row, cut in enumerate(cut_row):
                if target.kind == "event":
                    expected = expected_log_likelihood(
                        guess[row, columns], known[row], event[row], curve[cut] if cut >= 0 else None
                    )
                else:
                    p = guess[row, target.start]
                    expected = known[row] * -np.log(p if event[row] else 1 - p)
                assert cross_entropy[row, columns].sum() == pytest.approx(expected, rel=1e-4, abs=1e-4)

    @given(stores())
    def test_no_cell_is_out_of_range(self, labels):
        y, weight = cells(LabelStore(*labels, None))
        assert (y >= 0).all() and (y <= 1).all() and (weight >= 0).all() and (weight <= 1).all()
