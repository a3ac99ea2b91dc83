"""The rate of false alarms, estimated from flags that were let through: held against a chain where it is known."""

import numpy as np
import pytest

from sb3_qa import QAError
from sb3_qa.scores import false_alarm_rate
from sb3_qa.testing import ActionWalk


def walks(rng, n_episodes, let_through):
    """Flags of a veto on whether the end comes within 2 steps, in an ActionWalk with an agent that goes to and fro.

    Left is flagged in cells 1 and 2, and let through with a probability that depends on the cell; a veto goes right. Of
    each flag: cell, outcome, that probability, whether it was executed, and the episode.
    """
    steps = np.cumsum(ActionWalk(cells=5, slip=0.2)._transitions(), axis=2)
    rows = []
    for episode in range(n_episodes):
        cell, flags = 2, []
        for _ in range(15):
            action, p = int(rng.integers(2)), let_through[cell % len(let_through)]
            if action == 0 and cell <= 2:
                shown = rng.random() < p
                flags.append([cell, p, shown, 0, False])
                action = 0 if shown else 1
            cell = int(np.searchsorted(steps[action, cell], rng.random(), side="right"))
            for flag in flags:
                if flag[3] < 2:
                    flag[3] += 1
                    flag[4] = flag[4] or cell == 0
            if cell == 0:
                break
        # A time limit cuts whatever has not seen two steps by then; what has is known.
        rows += [(f[0], float(f[4]) if cell == 0 or f[3] == 2 else np.nan, f[1], f[2], episode) for f in flags]
    return [np.array(column) for column in zip(*rows, strict=True)]


def truth_by_cell(let_through):
    """P(no catastrophe within 2 steps | cell, left is executed, then the veto as before), exact."""
    transitions = ActionWalk(cells=5, slip=0.2)._transitions()
    left, right = transitions[0], transitions[1]
    followed = 0.5 * right + 0.5 * left
    for cell in (1, 2):
        p = let_through[cell % len(let_through)]
        followed[cell] = 0.5 * right[cell] + 0.5 * (p * left[cell] + (1 - p) * right[cell])
    return 1.0 - left @ (followed @ np.eye(5)[0])


class TestOnAKnownChain:
    @pytest.mark.parametrize("let_through", [[0.2], [0.05], [0.1, 0.6]])
    def test_unbiased_and_covering(self, let_through):
        """Over 300 repetitions; of those that were seen, the plain share would be of other cells when chances differ."""
        rng = np.random.default_rng(0)
        estimates, covered, naive, truths = [], [], [], []
        for _ in range(300):
            cell, outcome, p, shown, episode = walks(rng, 60, let_through)
            truth = truth_by_cell(let_through)[cell.astype(int)].mean()
            rate = false_alarm_rate(outcome, p, shown, episode=episode)
            if np.isnan(rate.estimate):
                continue
            known = shown.astype(bool) & ~np.isnan(outcome)
            naive.append(1 - outcome[known].mean() - truth)
            estimates.append(rate.estimate - truth)
            covered.append(rate.low <= truth <= rate.high)
            truths.append(truth)
        assert len(estimates) > 250
        error = np.std(estimates) / np.sqrt(len(estimates))
        assert abs(np.mean(estimates)) < 4 * error
        assert error < 0.02
        assert np.mean(covered) > 0.92
        assert 0.2 < np.mean(truths) < 0.8
        if len(let_through) > 1:
            assert abs(np.mean(naive)) > 8 * np.std(naive) / np.sqrt(len(naive))


class TestByHand:
    def test_each_stands_for_as_many_as_its_probability_says(self):
        rate = false_alarm_rate([1, 0, 0, np.nan], [0.5, 0.5, 0.25, 0.5], [1, 1, 1, 1])
        assert rate.estimate == pytest.approx(6 / 8)
        assert rate.low < rate.estimate < rate.high

    def test_vetoed_ones_are_not_looked_at(self):
        assert false_alarm_rate([1, 0, 1, 1], [0.1] * 4, [1, 1, 0, 0]) == false_alarm_rate([1, 0], [0.1] * 2, [1, 1])

    def test_outcomes_of_one_episode_count_for_less(self):
        outcome = np.repeat([1, 0, 0, 1, 0], 10)
        alone = false_alarm_rate(outcome, np.full(50, 0.1), np.ones(50))
        together = false_alarm_rate(outcome, np.full(50, 0.1), np.ones(50), episode=np.repeat(np.arange(5), 10))
        assert alone.estimate == together.estimate == pytest.approx(0.6)
        assert together.high - together.low > 2 * (alone.high - alone.low)
        same = false_alarm_rate(np.zeros(50), np.full(50, 0.1), np.ones(50), episode=np.repeat(np.arange(5), 10))
        assert same.low == pytest.approx(false_alarm_rate(np.zeros(5), np.full(5, 0.1), np.ones(5)).low)

    def test_nothing_is_known(self):
        assert np.isnan(false_alarm_rate([np.nan, 1], [0.1, 0.1], [1, 0])).all()
        assert np.isnan(false_alarm_rate([], [], [])).all()

    def test_refused(self):
        with pytest.raises(QAError, match="a probability of 0 of what was executed"):
            false_alarm_rate([1], [0.0], [1])
        with pytest.raises(QAError, match="an outcome that is neither"):
            false_alarm_rate([0.5], [0.1], [1])
        with pytest.raises(QAError, match="outcome of shape"):
            false_alarm_rate([1, 0], [0.1], [1])
