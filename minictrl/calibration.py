"""The calibrated reward of Eq. 12: C_hat(x, y), the share of pi_ref's samples that y beats."""

import torch
from torch import Tensor

from minictrl.checks import alike, finite, real


def calibrated_reward(r: Tensor, r_ref: Tensor) -> Tensor:
    """C_hat(x, y), the share of pi_ref's samples that y beats, a tie counting one half (Eq. 12).

    r: (B,) or (B, M) rewards, any monotone scale. r_ref: (B, K) rewards of y ~ pi_ref(.|x), never
    pooled over prompts. Returns r's shape, in [0, 1], a multiple of 1/(2K), in float32 at least.
    The cost is (K + M) log K per prompt, not M K. Raises ValueError on shapes that do not match or
    a reward that is not finite.
    """
    r, r_ref = alike(r=r, r_ref=r_ref)
    if r_ref.ndim != 2 or r.ndim not in (1, 2) or len(r) != len(r_ref) or not r_ref.numel():
        raise ValueError(
            f"r {tuple(r.shape)} and r_ref {tuple(r_ref.shape)}: must be (B,) or (B, M), and "
            "(B, K) with B and K at least 1; give each prompt its own row"
        )
    z, y = finite("rewards", r_ref=r_ref, r=r)
    below, up_to = ranks(y.reshape(len(r), -1), z)  # (B, M); a tie is in up_to alone
    return ((below + up_to).to(z) / (2 * z.shape[1])).reshape(r.shape)


def leave_one_out_calibration(r_ref: Tensor) -> Tensor:
    """C_hat of each calibration sample against the prompt's other K - 1 samples (Eq. 12).

    r_ref: (P, K) rewards of y ~ pi_ref(.|x). Returns (P, K) in [0, 1], a tie counting one half.
    With it the calibration's samples can be trained on (qrpo). Raises ValueError as
    `calibrated_reward` does.
    """
    r_ref = real("r_ref", r_ref)
    if r_ref.ndim != 2 or r_ref.shape[1] < 2:
        raise ValueError(
            f"r_ref is {tuple(r_ref.shape)}: must be (prompts, samples) with at least 2 samples "
            "per prompt, which are compared with each other"
        )
    (z,) = finite("rewards", r_ref=r_ref)
    below, up_to = ranks(z, z)
    return (below + up_to - 1).to(z) / (2 * (z.shape[1] - 1))  # - 1: no sample meets itself


def ranks(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(below, up_to): how many of z (B, K) are less than each of y (B, M), and how many are at
    most that. (B, M) each.
    """
    ordered, y = z.sort(-1).values.contiguous(), y.contiguous()
    return torch.searchsorted(ordered, y), torch.searchsorted(ordered, y, right=True)
