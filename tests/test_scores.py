"""Scores: hand-computed cases, independent implementations, properties, and refusals."""

import functools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchmetrics.functional import classification as tm

from sb3_qa import scores
from sb3_qa.errors import QAError

SEEDS = range(5)


def random_answers(seed, n=500):
    """Probabilities in float32, as a network gives them, with ties and outcomes that depend on them."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.7, 2.0, n).astype(np.float32)
    p[: n // 4] = np.round(p[: n // 4], 1) + np.float32(0.01)
    p = np.clip(p, 0, np.float32(0.999))
    return p, (rng.random(n) < p**1.5).astype(np.int64)


def random_choices(seed, n=300, n_options=4):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(n_options, 0.5), n)
    return p, np.array([rng.choice(n_options, p=row) for row in p])


answers = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40).map(
    lambda pairs: tuple(np.array(column) for column in zip(*pairs, strict=True))
)


class TestByHand:
    def test_brier(self):
        assert scores.brier([0.9, 0.2, 0.5], [1, 0, 1]) == pytest.approx((0.01 + 0.04 + 0.25) / 3)

    def test_log_loss(self):
        assert scores.log_loss([0.8, 0.5], [1, 0]) == pytest.approx(-(np.log(0.8) + np.log(0.5)) / 2)

    def test_a_certain_wrong_answer_costs_the_floor(self):
        assert scores.log_loss([0.0], [1]) == pytest.approx(-np.log(1e-7))
        assert scores.log_loss([1.0], [0], floor=1e-3) == pytest.approx(-np.log(1e-3))

    def test_auroc_counts_ties_half(self):
        # Pairs (yes, no): 0.5 > 0.2 wins, 0.5 = 0.5 ties, 0.9 wins twice: 3.5 of 4.
        assert scores.auroc([0.5, 0.9, 0.2, 0.5], [1, 1, 0, 0]) == 3.5 / 4

    def test_auroc_takes_any_score(self):
        assert scores.auroc([-3.0, 7.0], [0, 1]) == 1.0

    def test_average_precision(self):
        # From the top: yes (precision 1), no, yes (2/3), no; each yes gains half of the recall.
        assert scores.average_precision([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)

    def test_average_precision_takes_ties_as_one_threshold(self):
        assert scores.average_precision([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]) == 0.25

    def test_calibration_error(self):
        # Bin [0, 0.5): mean 0.2, frequency 0.5; bin [0.5, 1]: mean 0.8, frequency 1. Two answers in each.
        error = scores.calibration_error([0.1, 0.3, 0.7, 0.9], [0, 1, 1, 1], bins=2)
        assert error == pytest.approx((0.3 + 0.2) / 2)

    def test_an_edge_belongs_to_the_bin_above_and_1_to_the_last(self):
        count = scores.reliability([0.0, 0.1, 0.3, 0.7, 1.0], [0, 0, 0, 1, 1], bins=10).count
        assert count.tolist() == [1, 1, 0, 1, 0, 0, 0, 1, 0, 1]

    def test_reliability(self):
        diagram = scores.reliability([0.1, 0.3, 0.9], [0, 1, 1], bins=4)
        np.testing.assert_allclose(diagram.probability, [0.1, 0.3, np.nan, 0.9])
        np.testing.assert_array_equal(diagram.frequency, [0, 1, np.nan, 1])
        np.testing.assert_array_equal(diagram.count, [1, 1, 0, 1])
        assert np.isnan([diagram.low[2], diagram.high[2]]).all()
        # One yes in one trial: (1 + z^2/2 -+ z sqrt(z^2/4)) / (1 + z^2) = 1 / (1 + z^2) and 1, with z = 1.96.
        assert diagram.low[3] == pytest.approx(1 / (1 + 1.959964**2), rel=1e-6)
        assert diagram.high[3] == 1.0

    def test_accuracy_takes_the_first_of_equals(self):
        assert scores.accuracy([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]], [0, 1, 1]) == pytest.approx(2 / 3)

    def test_brier_choice(self):
        # (0.3^2 + 0.2^2 + 0.1^2) and (0.2^2 + 0.2^2 + 0)
        score = scores.brier_choice([[0.7, 0.2, 0.1], [0.2, 0.8, 0.0]], [0, 1])
        assert score == pytest.approx((0.14 + 0.08) / 2)

    def test_absolute_error(self):
        assert scores.absolute_error([1.0, -2.0], [3.0, 0.5]) == pytest.approx((2 + 2.5) / 2)

    def test_score_beside_the_best_constant(self):
        result = scores.score([0.8, 0.2, 0.1, 0.1], [1, 0, 0, 0])
        assert result["base_rate"] == result["frequency"] == 0.25
        assert result["count"] == 4
        assert result["brier"] == pytest.approx((0.04 + 0.04 + 0.01 + 0.01) / 4)
        assert result["constant_brier"] == pytest.approx(0.25 * 0.75)
        assert result["brier_skill"] == pytest.approx(1 - 0.025 / 0.1875)
        assert result["auroc"] == 1.0
        assert result["constant_auroc"] == 0.5
        assert result["constant_calibration_error"] == 0.0

    def test_score_beside_a_given_constant(self):
        result = scores.score([0.8, 0.2], [1, 0], base_rate=0.1)
        assert result["base_rate"] == 0.1
        assert result["frequency"] == 0.5
        assert result["constant_brier"] == pytest.approx((0.81 + 0.01) / 2)
        assert result["constant_calibration_error"] == pytest.approx(0.4)
        assert result["brier_skill"] == pytest.approx(1 - 0.04 / 0.41)

    def test_what_the_data_cannot_settle_is_nan(self):
        result = scores.score([0.2, 0.1], [0, 0])
        assert np.isnan([result["auroc"], result["constant_auroc"], result["brier_skill"]]).all()
        assert np.isnan(scores.average_precision([0.2, 0.1], [0, 0]))
        assert scores.average_precision([0.2, 0.1], [1, 1]) == 1.0


class TestAgainstOthers:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_torchmetrics_binary(self, seed):
        p, y = random_answers(seed)
        tp, ty = torch.tensor(p), torch.tensor(y)
        assert scores.auroc(p, y) == pytest.approx(tm.binary_auroc(tp, ty).item(), abs=1e-5)
        assert scores.average_precision(p, y) == pytest.approx(tm.binary_average_precision(tp, ty).item(), abs=1e-5)
        for bins in (7, 15):
            theirs = tm.binary_calibration_error(tp, ty, n_bins=bins, norm="l1").item()
            assert scores.calibration_error(p, y, bins) == pytest.approx(theirs, abs=1e-5)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_torchmetrics_multiclass(self, seed):
        p, option = random_choices(seed)
        theirs = tm.multiclass_accuracy(torch.tensor(p), torch.tensor(option), num_classes=4, average="micro")
        assert scores.accuracy(p, option) == pytest.approx(theirs.item(), abs=1e-6)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_torch_losses(self, seed):
        p, y = random_answers(seed)
        theirs = torch.nn.functional.binary_cross_entropy(torch.tensor(p).double(), torch.tensor(y).double())
        assert scores.log_loss(p, y) == pytest.approx(theirs.item(), rel=1e-4)
        assert scores.brier(p, y) == pytest.approx(np.mean((p.astype(float) - y) ** 2))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_scipy_mann_whitney(self, seed):
        p, y = random_answers(seed)
        u = stats.mannwhitneyu(p[y == 1], p[y == 0]).statistic
        assert scores.auroc(p, y) == pytest.approx(u / (y.sum() * (1 - y).sum()))

    @pytest.mark.parametrize(("events", "count"), [(0, 5), (5, 5), (3, 10), (1, 1000)])
    @pytest.mark.parametrize("level", [0.8, 0.95])
    def test_scipy_wilson(self, events, count, level):
        theirs = stats.binomtest(events, count).proportion_ci(level, method="wilson")
        low, high = scores.wilson_interval(events, count, level=level)
        assert (low, high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))

    def test_scipy_bootstrap(self):
        values = np.random.default_rng(0).exponential(size=80)
        ours = scores.bootstrap_interval(values, level=0.9, n_resamples=20_000)
        theirs = stats.bootstrap(
            (values,), np.mean, confidence_level=0.9, n_resamples=20_000, method="percentile", rng=1
        ).confidence_interval
        assert ours.low == pytest.approx(theirs.low, abs=0.01)
        assert ours.high == pytest.approx(theirs.high, abs=0.01)

    def test_wilson_bounds_hold_the_frequency_at_both_ends(self):
        count = np.arange(1, 200)
        assert np.all(scores.wilson_interval(np.zeros(199), count)[0] == 0.0)
        assert np.all(scores.wilson_interval(count, count)[1] == 1.0)


class TestProperties:
    @given(answers)
    def test_bounds(self, pair):
        p, y = pair
        assert 0 <= scores.brier(p, y) <= 1
        assert 0 <= scores.calibration_error(p, y) <= 1
        assert scores.log_loss(p, y) >= 0
        for ranked in (scores.auroc(p, y), scores.average_precision(p, y)):
            assert np.isnan(ranked) or 0 <= ranked <= 1 + 1e-12

    @given(answers)
    def test_calibration_error_is_the_gap_of_the_reliability_diagram(self, pair):
        p, y = pair
        diagram = scores.reliability(p, y, bins=15)
        assert diagram.count.sum() == p.size
        gap = np.nansum(np.abs(diagram.probability - diagram.frequency) * diagram.count) / p.size
        assert scores.calibration_error(p, y) == pytest.approx(gap)
        seen = diagram.count > 0
        assert np.all((diagram.low <= diagram.frequency)[seen] & (diagram.frequency <= diagram.high)[seen])

    @given(answers)
    def test_no_constant_beats_the_base_rate(self, pair):
        p, y = pair
        best = scores.score(p, y)["constant_brier"]
        assert scores.score(p, y, base_rate=float(p[0]))["constant_brier"] >= best - 1e-12

    @given(answers)
    def test_swapping_yes_and_no_mirrors_auroc(self, pair):
        p, y = pair
        if np.unique(y).size == 2:
            assert scores.auroc(p, y) == pytest.approx(1 - scores.auroc(p, ~y))

    @given(answers)
    def test_two_options_are_twice_the_binary_brier(self, pair):
        p, y = pair
        assert scores.brier_choice(np.stack([1 - p, p], axis=1), y) == pytest.approx(2 * scores.brier(p, y))

    def test_the_shape_does_not_matter_as_long_as_it_is_one(self):
        p, y = random_answers(0)
        grid = (-1, 4)
        assert scores.score(p, y) == scores.score(p.reshape(grid), y.reshape(grid))

    def test_the_inputs_stay_as_they_were(self):
        p, y = np.array([0.0, 1.0]), np.array([0.0, 1.0])
        scores.log_loss(p, y)
        scores.score(p, y)
        assert p.tolist() == y.tolist() == [0.0, 1.0]

    def test_a_calibrated_answerer_scores_its_own_variance(self):
        p = np.random.default_rng(3).random(200_000)
        y = np.random.default_rng(4).random(p.size) < p
        assert scores.brier(p, y) == pytest.approx(np.mean(p * (1 - p)), abs=2e-3)
        assert scores.calibration_error(p, y) < 5e-3


class TestIntervals:
    def test_the_mean_of_a_normal_sample(self):
        values = np.random.default_rng(0).normal(size=400)
        interval = scores.bootstrap_interval(values)
        error = values.std() / 20
        assert interval.estimate == pytest.approx(values.mean())
        assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
        assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)

    def test_it_covers_the_truth_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        covered = 0
        for seed in range(300):
            _, low, high = scores.bootstrap_interval(rng.normal(size=60), level=0.8, n_resamples=300, seed=seed)
            covered += low <= 0 <= high
        assert 0.8 - 0.07 < covered / 300 < 0.8 + 0.07  # three standard errors

    def test_one_seed_one_interval(self):
        values = np.arange(10.0)
        assert scores.bootstrap_interval(values, seed=1) == scores.bootstrap_interval(values, seed=1)
        assert scores.bootstrap_interval(values, seed=1) != scores.bootstrap_interval(values, seed=2)

    @pytest.mark.parametrize(
        "statistic", [np.median, functools.partial(np.quantile, q=0.9), max, lambda x: float(np.sort(x)[-2])]
    )
    def test_any_statistic_with_or_without_an_axis(self, statistic):
        values = np.random.default_rng(0).random(30)
        interval = scores.bootstrap_interval(values, statistic, n_resamples=200)
        assert interval.estimate == statistic(values)
        assert values.min() <= interval.low <= interval.high <= values.max()

    def test_axis_or_not_is_the_same(self):
        values = np.random.default_rng(0).random(30)
        assert scores.bootstrap_interval(values, lambda x: x.mean()) == pytest.approx(scores.bootstrap_interval(values))

    def test_many_units_are_resampled_in_blocks(self):
        values = np.random.default_rng(0).random(3_000_000)
        _, low, high = scores.bootstrap_interval(values, n_resamples=5)
        assert 0.499 < low < high < 0.501

    def test_one_unit_says_nothing_of_the_spread(self):
        estimate, low, high = scores.bootstrap_interval([3.0])
        assert estimate == 3.0
        assert np.isnan([low, high]).all()

    def test_a_ratio_weighs_episodes_by_their_steps(self):
        interval = scores.ratio_interval([1, 0, 1], [10, 80, 10], scale=1000)
        assert interval.estimate == pytest.approx(20.0)  # and not the mean of the ratios, 66.7
        assert interval.low == 0.0
        assert interval.high == pytest.approx(100.0)

    def test_equal_denominators_make_a_ratio_a_mean(self):
        hits = np.random.default_rng(0).integers(0, 3, 50)
        ratio = scores.ratio_interval(hits, np.full(50, 20), scale=20, level=0.9, n_resamples=500, seed=7)
        assert ratio == pytest.approx(scores.bootstrap_interval(hits, level=0.9, n_resamples=500, seed=7))

    def test_no_events_no_width(self):
        assert scores.ratio_interval([0, 0], [5, 9]) == (0.0, 0.0, 0.0)


BINARY = [scores.brier, scores.log_loss, scores.auroc, scores.average_precision, scores.calibration_error]
BINARY += [scores.reliability, scores.score]
PROBABILITY = [function for function in BINARY if function not in (scores.auroc, scores.average_precision)]


class TestRefusals:
    @pytest.mark.parametrize("function", BINARY)
    @pytest.mark.parametrize(
        ("p", "y", "says"),
        [
            ([0.1, 0.2], [1], r"shape \(2,\) and outcome of shape \(1,\)"),
            ([[0.1], [0.2]], [1, 0], r"shape \(2, 1\)"),
            ([], [], "without any value"),
            ([0.1, np.nan], [0, 1], "1 of 2 values of (probability|score) not finite"),
            ([0.1, 0.2], [0, np.nan], "outcome not finite"),
            ([0.1, 0.2], [0, 0.5], "an outcome of .*0 or 1 each"),
            ([0.1, 0.2], [0, -1], "0 or 1 each"),
            (["high", "low"], [0, 1], "numpy cannot read"),
        ],
    )
    def test_answers_and_outcomes(self, function, p, y, says):
        with pytest.raises(QAError, match=says):
            function(p, y)

    @pytest.mark.parametrize("function", PROBABILITY)
    @pytest.mark.parametrize("p", [[-0.1, 0.5], [0.5, 1.1]])
    def test_outside_the_unit_interval(self, function, p):
        with pytest.raises(QAError, match=r"within \[0, 1\].*sigmoid"):
            function(p, [0, 1])

    @pytest.mark.parametrize("function", [scores.accuracy, scores.brier_choice])
    @pytest.mark.parametrize(
        ("p", "option", "says"),
        [
            ([0.5, 0.5], [0], r"\(n, n_options\)"),
            ([[0.5, 0.5]], [0, 1], "one row and one index"),
            ([[0.5, 0.6]], [0], "sums of rows"),
            ([[1.5, -0.5]], [0], "softmax to logits"),
            ([[0.5, 0.5]], [2], "option from 2 to 2"),
            ([[0.5, 0.5]], [-1], "option from -1"),
            ([[0.5, 0.5]], [0.5], "not whole"),
            ([[np.inf, 0.5]], [0], "not finite"),
        ],
    )
    def test_choices(self, function, p, option, says):
        with pytest.raises(QAError, match=says):
            function(p, option)

    @pytest.mark.parametrize(
        "call",
        [
            lambda: scores.calibration_error([0.5], [1], bins=0),
            lambda: scores.reliability([0.5], [1], bins=2.5),
            lambda: scores.reliability([0.5], [1], bins=True),
            lambda: scores.log_loss([0.5], [1], floor=0.5),
            lambda: scores.score([0.5], [1], base_rate=1.5),
            lambda: scores.score([0.5], [1], base_rate=float("nan")),
            lambda: scores.wilson_interval([3], [2]),
            lambda: scores.wilson_interval([-1], [2]),
            lambda: scores.wilson_interval([1], [2], level=95),
            lambda: scores.absolute_error([1.0], [1.0, 2.0]),
            lambda: scores.absolute_error([1.0], [np.inf]),
            lambda: scores.bootstrap_interval([]),
            lambda: scores.bootstrap_interval([[1.0, 2.0]]),
            lambda: scores.bootstrap_interval([1.0, np.nan]),
            lambda: scores.bootstrap_interval([1.0, 2.0], level=1.0),
            lambda: scores.bootstrap_interval([1.0, 2.0], n_resamples=0),
            lambda: scores.bootstrap_interval([1.0, 2.0], lambda x: x),
            lambda: scores.bootstrap_interval([1.0, 2.0], lambda x, axis=None: np.mean(x)),
            lambda: scores.ratio_interval([1.0, 2.0], [1.0]),
            lambda: scores.ratio_interval([1.0, 2.0], [1.0, 0.0]),
            lambda: scores.ratio_interval([1.0, 2.0], [1.0, 1.0], scale=np.inf),
        ],
    )
    def test_says_what_was_got_what_was_expected_and_the_mend(self, call):
        with pytest.raises(QAError, match=r"^Got .+, expected .+: .+\.$"):
            call()

    def test_is_a_value_error(self):
        with pytest.raises(ValueError, match="Got"):
            scores.brier([2.0], [1])

    def test_empty_bins_and_single_classes_do_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores.reliability([0.0, 1.0], [0, 1])
            scores.score([0.0], [0])
