"""Exact win rates of inference-time procedures from M samples a prompt: no sample is drawn to be
thrown away.

A new procedure is one function (select (P, M), n, threshold (P,)) -> weights (P, M) and its name in
WEIGHTS.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from minictrl.procedures.cells import REWIND_QUANTILE


def win_rate(
    select: Tensor, judge: Tensor, select_ref: Tensor, judge_ref: Tensor, procedure: str, n: int
) -> tuple[float, float]:
    """(win rate, standard error) of T(pi) over T(pi_ref), N draws each, over all N-subsets of M
    samples (Definition 4).

    select, judge: (P, M) what T selects by and what decides the win, of M responses of pi; *_ref:
    (P, M') of pi_ref. An unbiased U-statistic for every n up to M, from one draw. Tied scores share
    the selection, and half a win. Standard error over prompts: s / sqrt(P), exactly what a
    bootstrap over prompts tends to but for P / (P - 1) in its square; nan where P is 1. Raises
    ValueError on shapes that do not match, scores that are not finite, an unknown procedure, or M <
    n.
    """
    scores = {"select": select, "judge": judge, "select_ref": select_ref, "judge_ref": judge_ref}
    _validate(scores, procedure, n)
    select, judge, select_ref, judge_ref = (each.double() for each in scores.values())
    threshold = rewind_threshold(select_ref)  # (P,)
    weight, weight_ref = (WEIGHTS[procedure](each, n, threshold) for each in (select, select_ref))
    wins = (weight * beaten(judge, judge_ref, weight_ref)).sum(1)  # (P,)
    return wins.mean().item(), (wins.std().item() if len(wins) > 1 else math.nan) / math.sqrt(
        len(wins)
    )


# ---- weights: the probability that each of M responses is the one kept, when N of them are drawn
# in random order ----


def standard(select: Tensor, n: int, threshold: Tensor) -> Tensor:
    return torch.full_like(select, 1 / select.shape[1])


def bon(select: Tensor, n: int, threshold: Tensor) -> Tensor:
    """Rank i of M, 1 the lowest, is the best of N with probability C(i - 1, N - 1) / C(M, N)."""
    M = select.shape[1]
    return by_rank(select, [math.comb(m, n) / math.comb(M, n) for m in range(M + 1)])


def won(select: Tensor, n: int, threshold: Tensor) -> Tensor:
    """The same in the reverse order."""
    M = select.shape[1]
    return by_rank(select, [1 - math.comb(M - m, n) / math.comb(M, n) for m in range(M + 1)])


def rewind(select: Tensor, n: int, threshold: Tensor) -> Tensor:
    """The first draw at or above the threshold, else the N-th (App. G)."""
    M, above = select.shape[1], select >= threshold[:, None]
    passing = above.sum(1, keepdim=True)  # (P, 1)
    fails = torch.tensor(
        [math.comb(M - a, n) / math.comb(M, n) for a in range(M + 1)], dtype=select.dtype
    )[passing]
    return torch.where(
        above, (1 - fails) / passing.clamp(min=1), fails / (M - passing).clamp(min=1)
    )


def rewind_threshold(select_ref: Tensor) -> Tensor:
    """(P,) the 85th percentile of each prompt's select_ref (P, M): just above the sample there, but
    for ties.

    Given that sample, those above are a fair draw of pi_ref's upper 15 %; with it, pi would gain 4
    points at M = 64.
    """
    order = pad(select_ref.sort(1).values, (1, 0), value=-math.inf)
    k = min(round(REWIND_QUANTILE * select_ref.shape[1]), select_ref.shape[1] - 1)
    at, after = order[:, k], order[:, k + 1]
    return torch.where(at == after, at, torch.nextafter(at, after))


WEIGHTS = {"standard": standard, "bon": bon, "won": won, "rewind": rewind}


def by_rank(select: Tensor, cdf: list[float]) -> Tensor:
    """cdf[m]: the probability that the response kept is among the m lowest. Equal scores share
    theirs equally.
    """
    order = select.sort(1).values
    # (P, M)
    below, up_to = torch.searchsorted(order, select), torch.searchsorted(order, select, right=True)
    cdf = torch.tensor(cdf, dtype=select.dtype)
    return (cdf[up_to] - cdf[below]) / (up_to - below)


def beaten(judge: Tensor, judge_ref: Tensor, weight_ref: Tensor) -> Tensor:
    """(P, M) the weight of the reference responses that each response beats, ties half: judge (P,
    M), *_ref (P, M').
    """
    order, by = judge_ref.sort(1)
    cumulative = pad(weight_ref.gather(1, by).cumsum(1), (1, 0))  # (P, M' + 1)
    below, up_to = torch.searchsorted(order, judge), torch.searchsorted(order, judge, right=True)
    return (cumulative.gather(1, below) + cumulative.gather(1, up_to)) / 2


def _validate(scores: dict[str, Tensor], procedure: str, n: int) -> None:
    for name, each in scores.items():
        same_responses = each.shape == scores[name.replace("judge", "select")].shape
        if each.ndim != 2 or not same_responses or len(each) != len(scores["select"]):
            shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in scores.items())
            raise ValueError(
                f"{shapes}: must be (P, M), select as judge, with one P; score the same responses twice"
            )
        if not each.isfinite().all():
            raise ValueError(
                f"{name} has {(~each.isfinite()).sum()} scores that are not finite; drop or rescore them"
            )
    if procedure not in WEIGHTS:
        raise ValueError(f"unknown procedure {procedure!r}; known: {', '.join(WEIGHTS)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n {n!r}: must be a whole number of at least 1; use 1 for a single draw")
    M = min(scores["select"].shape[1], scores["select_ref"].shape[1])
    if M < (1 if procedure == "standard" else n):
        raise ValueError(
            f"n {n} with {M} samples a prompt: there must be at least n; draw {n} or more, or lower n"
        )
