"""Is it more than chance? Intervals and a test for counts of hits, in plain Python.

All say what other samples of the same kind would give. None knows what training the models again
with another seed would give.
"""

from __future__ import annotations

import math

Z = 1.959964  # of the normal distribution, 95 % lies within Z standard deviations


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `hits` in `count` samples were seen, within [0, 1].

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share, weight = hits / count, Z**2 / count
    centre = share + weight / 2
    half = Z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    return max(0.0, low), min(1.0, high)


def mcnemar(only_a: int, only_b: int) -> float:
    """The probability of a split at least as uneven, if both models were equally good.

    Each sample that one model alone gets right is then a fair coin's toss: the p value is the
    two-sided one of the binomial distribution, exact for any counts.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions
    or percentages", 1947; the exact form as in Fagerland, Lydersen and Laake, "The McNemar test
    for binary matched-pairs data", 2013. Dietterich, "Approximate statistical tests for comparing
    supervised classification learning algorithms", 1998, has McNemar's test for classifiers.

    Args:
        only_a: samples that model a gets right and model b gets wrong.
        only_b: the reverse.
    """
    tosses = only_a + only_b
    ways = outcomes = 1  # integers, which neither overflow nor round
    for heads in range(min(only_a, only_b)):
        outcomes = outcomes * (tosses - heads) // (heads + 1)
        ways += outcomes
    return min(1.0, 2 * ways / (1 << tosses))


def paired_difference(only_a: int, only_b: int, count: int) -> tuple[float, float]:
    """The 95 % interval of model a's share of hits less model b's, on the same samples.

    The interval is Wald's after one more sample of each kind of disagreement. Its centre therefore
    lies a little nearer to zero than the difference seen.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", 2012.

    Args:
        only_a: samples that model a gets right and model b gets wrong.
        only_b: the reverse.
        count: all samples.
    """
    a, b = (only_a + 1) / (count + 2), (only_b + 1) / (count + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (count + 2))
    return max(-1.0, a - b - half), min(1.0, a - b + half)
