"""Exact win rates of inference-time procedures from M samples per prompt (Definition 4).

Every subset of N samples is counted, by the weights of `procedures/`: no sample is drawn to be
thrown away.
"""

import math

from torch import Tensor
from torch.nn.functional import pad

from minictrl.calibration import ranks
from minictrl.checks import alike, finite, whole
from minictrl.procedures import get_procedure


def win_rate(
    select: Tensor, judge: Tensor, select_ref: Tensor, judge_ref: Tensor, procedure: str, n: int
) -> tuple[float, float]:
    """(win rate of T(pi) over T(pi_ref), N draws each; its standard error).

    select, judge: (P, M) scores of M responses of pi to each of P prompts; *_ref: (P, M') of
    pi_ref's. T keeps a response by `select`; of the two that are kept, the one with the higher
    `judge` wins. A U-statistic, over all N-subsets: every N up to M from one draw. Unbiased but for
    soft and rewind, whose weights and threshold come from the same M samples (docs/results.md), and
    poisson, which counts more than M draws as M. Tied scores share the selection, and count half a
    win. The standard error is that of a mean over prompts, nan for one prompt. Raises ValueError on
    shapes that do not match, scores that are not finite, an unknown procedure, or M < N.
    """
    return mean_stderr(win_rates(select, judge, select_ref, judge_ref, procedure, n))


def mean_stderr(each: Tensor) -> tuple[float, float]:
    """Mean over prompts (P,) and its standard error, nan for one prompt."""
    stderr = each.std().item() if len(each) > 1 else math.nan
    return each.mean().item(), stderr / math.sqrt(len(each))


def win_rates(
    select: Tensor, judge: Tensor, select_ref: Tensor, judge_ref: Tensor, procedure: str, n: int
) -> Tensor:
    """(P,) the win rate of each prompt, in float64 on the CPU. Arguments and errors as those of
    `win_rate`.
    """
    scores = {"select": select, "judge": judge, "select_ref": select_ref, "judge_ref": judge_ref}
    scores = dict(zip(scores, alike(**scores)))
    _validate(scores, procedure, n)
    select, judge, select_ref, judge_ref = (each.cpu().double() for each in scores.values())
    weight, weight_ref = weights(select, select_ref, procedure, int(n))
    return (weight * beaten(judge, judge_ref, weight_ref)).sum(1)


def weights(select: Tensor, select_ref: Tensor, procedure: str, n: int) -> tuple[Tensor, Tensor]:
    """(P, M) and (P, M'): how often each response of pi and of pi_ref is kept. Scores in
    float64 on the CPU.

    Raises ValueError if these aren't probabilities.
    """
    weigh = get_procedure(procedure).weights
    both = weigh(select, n, select_ref), weigh(select_ref, n)
    for each, (P, M) in zip(both, (select.shape, select_ref.shape)):
        right = isinstance(each, Tensor) and each.shape == (P, M)
        if not (right and each.min() >= -1e-9 and (each.sum(1) - 1).abs().max() <= 1e-6):
            raise ValueError(
                f"procedure {procedure}: its weights of {M} samples are no probabilities; return a "
                f"tensor {P, M}, nowhere negative, that sums to 1 per prompt"
            )
    return both


def kept_scores(
    select: Tensor, select_ref: Tensor, procedure: str, n: int
) -> tuple[Tensor, Tensor]:
    """(P,) each: the mean score of the response that pi and pi_ref keep after the procedure."""
    select, select_ref = select.cpu().double(), select_ref.cpu().double()
    weight, weight_ref = weights(select, select_ref, procedure, n)
    return (weight * select).sum(1), (weight_ref * select_ref).sum(1)


def beaten(judge: Tensor, judge_ref: Tensor, weight_ref: Tensor) -> Tensor:
    """(P, M) the weight of the reference responses that each response beats, ties half.

    judge: (P, M). judge_ref, weight_ref: (P, M').
    """
    cumulative = pad(weight_ref.gather(1, judge_ref.argsort(1)).cumsum(1), (1, 0))  # (P, M' + 1)
    below, up_to = ranks(judge, judge_ref)  # (P, M)
    return (cumulative.gather(1, below) + cumulative.gather(1, up_to)) / 2


def _validate(scores: dict[str, Tensor], procedure: str, n: int) -> None:
    P = len(scores["select"])
    for name, each in scores.items():
        selected = scores["select_ref" if name.endswith("_ref") else "select"]
        if each.ndim != 2 or each.shape != selected.shape or not 0 < len(each) == P:
            shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in scores.items())
            raise ValueError(
                f"{shapes}: must be (P, M), select as judge, with one P of at least 1; "
                "score the same responses twice"
            )
    finite("scores", **scores)
    whole("n", n)
    M = min(scores["select"].shape[1], scores["select_ref"].shape[1])
    least = get_procedure(procedure).samples(n)
    if M < least:
        raise ValueError(f"n {n} with {M} samples per prompt: draw {least} or more, or lower n")
