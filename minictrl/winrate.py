"""Exact win rates of inference-time procedures from M samples a prompt: no sample is drawn to be thrown away."""

import math

import torch
from torch import Tensor

PROCEDURES = ("standard", "bon", "won", "rewind")
REWIND_QUANTILE = 0.85  # of pi_ref's rewards for the prompt (App. G)


def win_rate(
    select: Tensor, judge: Tensor, select_ref: Tensor, judge_ref: Tensor, procedure: str, n: int
) -> tuple[float, float]:
    """(win rate, standard error) of T(pi) over T(pi_ref), N samples each, over all N-subsets of the M at hand (Definition 4).

    select, judge: (P, M) what T selects by and what decides the win, of M responses of pi; *_ref (P, M') of pi_ref.
    The mean over prompts is an unbiased U-statistic; all n up to M come from one draw. Ties share selection, and half a win.
    Standard error: s / sqrt(P) over prompts, what a bootstrap over prompts tends to (times sqrt(P / (P - 1))); nan if P is 1.
    Raises ValueError on shapes that do not match, scores that are not finite, an unknown procedure, or M < n.
    """
    scores = {"select": select, "judge": judge, "select_ref": select_ref, "judge_ref": judge_ref}
    _validate(scores, procedure, n)
    select, judge, select_ref, judge_ref = (each.double() for each in scores.values())
    threshold = select_ref.quantile(REWIND_QUANTILE, dim=1, interpolation="higher")  # (P,)
    weight = selection_weights(select, procedure, n, threshold)  # (P, M)
    weight_ref = selection_weights(select_ref, procedure, n, threshold)
    wins = (weight * beaten(judge, judge_ref, weight_ref)).sum(1)  # (P,)
    return wins.mean().item(), (wins.std().item() if len(wins) > 1 else math.nan) / math.sqrt(len(wins))


def selection_weights(select: Tensor, procedure: str, n: int, threshold: Tensor | None = None) -> Tensor:
    """(P, M) probability that each response is the one kept, when N of the M are drawn without replacement, in any order.

    Rank i of M wins Best-of-N with weight C(i - 1, N - 1) / C(M, N), the worst by the reverse order; equal scores share.
    rewind: the first draw at or above `threshold` (P,), else the N-th.
    """
    P, M = select.shape
    if procedure == "standard":
        return torch.full_like(select, 1 / M)
    if procedure == "rewind":
        above = select >= threshold[:, None]
        passing = above.sum(1, keepdim=True)  # (P, 1)
        none_of_n = torch.tensor([math.comb(M - a, n) / math.comb(M, n) for a in range(M + 1)], dtype=select.dtype)[passing]
        return torch.where(above, (1 - none_of_n) / passing.clamp(min=1), none_of_n / (M - passing).clamp(min=1))
    best = [math.comb(m, n) / math.comb(M, n) for m in range(M + 1)]  # P(all N among the m lowest)
    lowest = best if procedure == "bon" else [1 - each for each in reversed(best)]  # P(the one kept is among the m lowest)
    cdf = torch.tensor(lowest, dtype=select.dtype)
    order = select.sort(1).values
    below, up_to = torch.searchsorted(order, select), torch.searchsorted(order, select, right=True)  # (P, M) ranks of a tie
    return (cdf[up_to] - cdf[below]) / (up_to - below)


def beaten(judge: Tensor, judge_ref: Tensor, weight_ref: Tensor) -> Tensor:
    """(P, M) the weight of the reference responses that each response beats, ties half: judge (P, M), *_ref (P, M')."""
    order, by = judge_ref.sort(1)
    cumulative = torch.nn.functional.pad(weight_ref.gather(1, by).cumsum(1), (1, 0))  # (P, M' + 1)
    below, up_to = torch.searchsorted(order, judge), torch.searchsorted(order, judge, right=True)
    return (cumulative.gather(1, below) + cumulative.gather(1, up_to)) / 2


def _validate(scores: dict[str, Tensor], procedure: str, n: int) -> None:
    for name, each in scores.items():
        if each.ndim != 2 or each.shape != scores[name.replace("judge", "select")].shape or len(each) != len(scores["select"]):
            shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in scores.items())
            raise ValueError(f"{shapes}: must be (P, M), select as judge, with one P; score the same responses twice")
        if not each.isfinite().all():
            raise ValueError(f"{name} has {(~each.isfinite()).sum()} scores that are not finite; drop or rescore them")
    if procedure not in PROCEDURES:
        raise ValueError(f"unknown procedure {procedure!r}; known: {', '.join(PROCEDURES)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n {n!r}: must be a whole number of at least 1; use 1 for a single draw")
    M = min(scores["select"].shape[1], scores["select_ref"].shape[1])
    if M < (1 if procedure == "standard" else n):
        raise ValueError(f"n {n} with M {M} samples a prompt: M must be at least n; draw {n} or more, or lower n")
