"""Graded preferences: a difference of two labels says how much one text is preferred."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minictrl.winrate import mean_stderr


def bradley_terry_loss(scores: Tensor, labels: Tensor, sharpness: float) -> Tensor:
    """Bradley-Terry cross-entropy, the mean over all pairs of the batch with label_i > label_j,
    each weighing the same.

    -p log sigmoid(s_i - s_j) - (1 - p) log sigmoid(s_j - s_i) with p = sigmoid(sharpness (label_i -
    label_j)): a small difference is a weak preference. scores, labels: (B,). Returns a scalar, in
    nats per pair; 0 if all labels are equal.
    """
    if scores.shape != labels.shape or scores.dim() != 1:
        raise ValueError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)}: both must be (B,)"
        )
    gap, difference = scores[:, None] - scores, labels[:, None] - labels
    better = (difference > 0).to(scores.dtype)
    p = torch.sigmoid(sharpness * difference)
    return ((F.softplus(gap) - p * gap) * better).sum() / better.sum().clamp(min=1)


def beats(x: Tensor, y: Tensor) -> Tensor:
    """1 where x > y, 0.5 where they tie, else 0."""
    return ((x - y).sign().double() + 1) / 2


def pair_accuracy(
    scores: Tensor, labels: Tensor, others: Tensor | None = None
) -> tuple[float, float]:
    """Share of the pairs with label_i > label_j where score_i > score_j, a tie of the scores
    counting one half; and its standard error.

    scores, labels: (B,). others: (B,) the scores that count for j, where the side of a pair changes
    the text. The error is that of a ratio of U-statistics (Hajek projection): 2 s / sqrt(B), s the
    deviation over texts of what a text's pairs add to the share. Raises ValueError on shapes that
    differ, a score that is not finite, or labels that are all equal.
    """
    others = scores if others is None else others
    for each in (scores, others):
        if each.shape != labels.shape or each.dim() != 1 or not each.isfinite().all():
            raise ValueError(
                f"scores {tuple(each.shape)}, labels {tuple(labels.shape)}: both must be (B,), "
                "scores finite"
            )
    counts = (labels[:, None] > labels).double()
    if not counts.any():
        raise ValueError("all labels are equal: pair accuracy needs two labels that differ")
    right = counts * beats(scores[:, None], others)
    pairs_of = counts.sum(0) + counts.sum(1)  # of each text, on either side
    share = right.sum() / counts.sum()
    added = (right.sum(0) + right.sum(1) - share * pairs_of) / pairs_of.mean()
    _, stderr = mean_stderr(added)
    return share.item(), 2 * stderr
