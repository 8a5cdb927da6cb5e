"""One draw, no selection."""

import torch
from torch import Tensor

from minictrl.procedures import base


class Procedure(base.Procedure):
    def mass_after(self, mass: Tensor, edges: Tensor, n: int) -> Tensor:
        return mass

    def weights(self, select: Tensor, n: int, select_ref: Tensor | None = None) -> Tensor:
        return torch.full_like(select, 1 / select.shape[1])

    def samples(self, n: int) -> int:
        return 1
