"""Means over seeds and prompts with their errors: what new seeds and new prompts would do.

A method's runs, one a seed, are evaluated on the same prompts: seeds and prompts are crossed. A
value is mean + seed's effect + prompt's effect + the rest, all of them random, so

    Var(mean) = var_seeds / S + var_prompts / P + var_rest / (S P).

The two-way analysis of variance estimates each part; one that comes out negative is 0. Without
that, two seeds that happen to agree would have an error near 0, which the rest alone excludes. A
bootstrap that resamples seeds and prompts (Owen, arXiv 0712.1111) has the same aim, but takes
1 - 1/S of the part of the seeds, and counts the rest three times.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of an interval
POWER = 0.8  # the share of experiments that show a difference as large as `Estimate.detectable`


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and the degrees of freedom of that."""

    mean: float
    stderr: float
    df: float

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the interval that holds the true mean in 95 % of all experiments."""
        half = t_quantile(self.df) * self.stderr
        return self.mean - half, self.mean + half

    @property
    def detectable(self) -> float:
        """The smallest true value whose interval is above 0 in 80 % of all experiments."""
        return (t_quantile(self.df) + t_quantile(self.df, 2 * POWER - 1)) * self.stderr


def crossed(values) -> Estimate:
    """The mean of values (S, P) of S seeds on the same P prompts; nan without a seed.

    A difference of two methods is `crossed` of their differences, seed by seed and prompt by
    prompt. With one seed the error is that over prompts alone. Degrees of freedom: Satterthwaite's.
    """
    values = np.asarray(values, dtype=float)
    if not values.size:
        return Estimate(math.nan, math.nan, math.nan)
    S, P = values.shape
    mean, of_seeds, of_prompts = values.mean(), values.mean(1), values.mean(0)
    prompts = variance(of_prompts)
    if S == 1 or P == 1:  # with one prompt there is no error: prompts is nan
        return Estimate(mean.item(), prompts**0.5, P - 1)
    seeds = variance(of_seeds)
    rest = values - of_prompts - of_seeds[:, None] + mean
    rest = (rest**2).sum() / ((S - 1) * (P - 1)) / (S * P)  # which is in both of the others
    total = max(seeds, rest) + max(prompts - rest, 0)
    spread = seeds**2 / (S - 1) + prompts**2 / (P - 1)
    df = max(S - 1, total**2 / spread) if spread else P - 1  # S - 1 are those of the seeds alone
    return Estimate(mean.item(), total**0.5, df)


def variance(values: np.ndarray) -> float:
    """That of the mean of independent values (n,)."""
    return values.var(ddof=1).item() / len(values) if len(values) > 1 else math.nan


def t_quantile(df: float, level: float = LEVEL) -> float:
    """Student's t that |t| is below with probability `level`.

    With t = sqrt(df) tan(a), the angle a has a density in proportion to cos(a)^(df - 1).
    """
    if math.isnan(df):
        return math.nan
    edges = np.linspace(0, math.pi / 2, 2001)
    angles = (edges[1:] + edges[:-1]) / 2
    cdf = (np.cos(angles) ** (df - 1)).cumsum()
    at = np.interp(level, cdf / cdf[-1], edges[1:])
    return math.sqrt(df) * math.tan(at)
