"""Graded preferences: a difference of two labels says how much one text is preferred."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(scores: Tensor, labels: Tensor, sharpness: float = math.inf) -> Tensor:
    """Bradley-Terry cross-entropy, the mean over all pairs of the batch with label_i > label_j,
    each weighing the same.

    -p log sigmoid(s_i - s_j) - (1 - p) log sigmoid(s_j - s_i) with p = sigmoid(sharpness (label_i -
    label_j)): a small difference is a weak preference; by default p = 1. scores, labels: (B,).
    Returns a scalar, in nats per pair; 0 if all labels are equal.
    """
    if scores.shape != labels.shape or scores.dim() != 1:
        raise ValueError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)}: both must be (B,)"
        )
    gap, difference = scores[:, None] - scores, labels[:, None] - labels
    better = (difference > 0).to(scores.dtype)
    p = 1.0 if sharpness == math.inf else torch.sigmoid(sharpness * difference)
    return ((F.softplus(gap) - p * gap) * better).sum() / better.sum().clamp(min=1)


def pair_accuracy(
    scores: Tensor, labels: Tensor, *, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Share of the pairs with different labels that the scores order rightly, a tie of the scores
    counting one half.

    scores, labels: (B,). Returns (accuracy, its standard error by bootstrap over texts). Raises
    ValueError on shapes that differ, a score that is not finite, or labels that are all equal.
    """
    if scores.shape != labels.shape or scores.dim() != 1 or not scores.isfinite().all():
        raise ValueError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)}: both must be (B,), "
            "scores finite"
        )
    counts = (labels[:, None] > labels).double()
    right = (
        (scores[:, None] > scores).double() + 0.5 * (scores[:, None] == scores).double()
    ) * counts
    if not counts.any():
        raise ValueError("all labels are equal: pair accuracy needs two labels that differ")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(scores), (resamples, len(scores)), generator=generator)
    weight = torch.zeros(resamples, len(scores), dtype=torch.float64).scatter_add_(
        1, draws, torch.ones_like(draws).double()
    )
    accuracies = ((weight @ right) * weight).sum(1) / ((weight @ counts) * weight).sum(1)
    return float(right.sum() / counts.sum()), float(accuracies[accuracies.isfinite()].std())
