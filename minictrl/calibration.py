"""The calibrated reward of Eq. 12."""

import torch
from torch import Tensor


def calibrated_reward(r: Tensor, r_ref: Tensor) -> Tensor:
    """C_hat(x, y), the share of pi_ref's samples that y beats, a tie counting one half (Eq. 12,
    empirical calibration).

    r: (B,) or (B, M) rewards, any monotone scale. r_ref: (B, K) rewards of y ~ pi_ref(.|x), never
    pooled over prompts. Returns r's shape, in [0, 1], a multiple of 1/(2K), in float32 at least.
    The cost is M log K a prompt, not M K. Raises ValueError on shapes that do not match or a reward
    that is not finite.
    """
    if r_ref.ndim != 2 or r.ndim not in (1, 2) or len(r) != len(r_ref) or not r_ref.shape[1]:
        raise ValueError(
            f"r {tuple(r.shape)} and r_ref {tuple(r_ref.shape)}: must be (B,) or (B, M), and (B, K) with K at least 1; "
            "give each prompt its own row"
        )
    for name, rewards in (("r", r), ("r_ref", r_ref)):
        if not rewards.isfinite().all():
            bad = (~rewards.isfinite()).sum()
            raise ValueError(f"{name} has {bad} rewards that are not finite; drop or rescore them")
    dtype = torch.promote_types(torch.promote_types(r.dtype, r_ref.dtype), torch.float32)
    # (B, K), (B, M)
    z, y = r_ref.to(dtype).sort(-1).values, r.to(dtype).reshape(len(r), -1).contiguous()
    # (B, M) twice the wins and ties' halves
    beaten = torch.searchsorted(z, y) + torch.searchsorted(z, y, right=True)
    return (beaten.to(dtype) / (2 * z.shape[1])).reshape(r.shape)
