"""One draw, no selection."""

import torch
from torch import Tensor


def mass_after(mass: Tensor, edges: Tensor, n: int) -> Tensor:
    return mass


def weights(select: Tensor, n: int, threshold: Tensor | None) -> Tensor:
    return torch.full_like(select, 1 / select.shape[1])
