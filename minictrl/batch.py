"""What an update trains on, as one typed object; the axes of all tensors of training.

P prompts, G responses per prompt, so B = P G rows; K reference samples per prompt; L tokens of a
prompt, T tokens of a response. Masks are 1 where a token counts: EOS does, nothing after it does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """B rows, each a prompt with a response. A field that a method has no use for is None.

    Where a row has n responses to its prompt (a preference pair, a group of TPO), there is an axis
    more: (B, n, T) in place of (B, T), (B, n) in place of R's (B,).
    """

    prompt_index: Tensor  # (B,) which of the task's prompts the row answers
    tokens: Tensor  # (B, T) int64, right-padded
    mask: Tensor  # (B, T) float32
    prompt: Tensor | None = None  # (B, L) int64, left-padded
    prompt_mask: Tensor | None = None  # (B, L) int64
    old_logprobs: Tensor | None = None  # (B, T) nats, under the policy that drew the response
    ref_logprobs: Tensor | None = None  # (B, T) nats, under pi_ref
    R: Tensor | None = None  # (B,) nats: what the response is worth before its KL
    log_Z: Tensor | None = None  # (B,) nats, of the row's prompt
    values: Tensor | None = None  # (B, T) expected reward to go, before each token
    returns: Tensor | None = None  # (B, T) what a value head learns
    advantages: Tensor | None = None  # (B, T), or (B,) where a method takes one per response

    def __post_init__(self):
        for f in fields(self):
            x = getattr(self, f.name)
            if x is not None and len(x) != len(self):
                raise ValueError(f"{f.name} {tuple(x.shape)}: give it {len(self)} rows, as tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def _map(self, function) -> Batch:
        each = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Batch(**{name: x if x is None else function(name, x) for name, x in each})

    def __getitem__(self, index: Tensor) -> Batch:
        return self._map(lambda name, x: x[index])

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda name, x: x.to(device))

    def cut(self) -> Batch:
        """The same rows, as wide as their longest prompt and response."""
        T, L = int(self.mask.sum(-1).max()), int(self.prompt_mask.sum(1).max())

        def narrow(name: str, x: Tensor) -> Tensor:
            if x.dim() == 1 or name == "R":
                return x
            return x[:, -L:] if name in ("prompt", "prompt_mask") else x[..., :T]

        return self._map(narrow)

    def pieces(self, index: Tensor, size: int) -> tuple[Tensor, ...]:
        """The rows of an index in pieces of at most `size`, alike in length: little padding."""
        lengths = self.mask[index].sum(-1).view(len(index), -1).amax(1)
        return index[lengths.argsort(stable=True)].split(size)

    def kl(self) -> Tensor:
        """(B,) log pi/pi_ref of each response, in nats: k1, whose mean is KL(pi || pi_ref)."""
        return (self.old_logprobs - self.ref_logprobs).sum(1)
