"""Draws of tokens as a function of (seed, prompt, sample, t) alone, whatever the batch."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # tokens of the vocabulary in a block of the two-level draw


def draw(logits: Iterable[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """(token, log pi(token)), each (R,), by the inverse CDF in two levels: a block of the
    vocabulary, a token in it.

    logits: (r, V) each, R rows together. u: (R, 2) float64 in [0, 1), a number for each level: with
    one for both, an error of rounding in a block's boundary would move every token's. Sums are
    vectorised, a long cumulative sum is not.
    """
    picked, first = [], 0
    for piece in logits:
        probs, whole = piece.softmax(-1), piece.shape[-1] // BLOCK * BLOCK
        sums = probs[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)  # (r, blocks)
        if whole < piece.shape[-1]:
            sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], -1)
        block = _inverse_cdf(sums, u[first : first + len(piece), 0])
        token = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)  # (r, BLOCK)
        inside = probs.gather(-1, token.clamp(max=piece.shape[-1] - 1))
        picked.append((block, inside.masked_fill_(token >= piece.shape[-1], 0.0)))
        first += len(piece)
    block, inside = map(torch.cat, zip(*picked))  # (R,), (R, BLOCK)
    i = _inverse_cdf(inside, u[:, 1])
    return (block * BLOCK + i).clamp(max=piece.shape[-1] - 1), inside.gather(-1, i[:, None])[
        :, 0
    ].log().float()


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum(weights); never one of weight 0. weights: (R, n),
    u: (R,).
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    i = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return i.clamp(max=weights.shape[-1] - 1)  # only NaN gets that far: `sample` reports it


def uniforms(seed: int, keys: np.ndarray, samples: np.ndarray, T: int) -> np.ndarray:
    """(R, T, 2) float64 in [0, 1), each a hash of (seed, prompt's key, sample's index, t, which): a
    generator without a state, so that no draw depends on what else is in the batch. keys: (R,)
    uint64, samples: (R,)."""
    x = _mix(_mix(np.uint64(seed % 2**64) ^ keys) + samples.astype(np.uint64))
    x = _mix(x[:, None] + np.arange(2 * T, dtype=np.uint64))
    return ((x >> np.uint64(11)) * 2.0**-53).reshape(len(keys), T, 2)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the
    result.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def prompt_keys(prompts: list[str]) -> np.ndarray:
    """(B,) uint64: a hash of the prompt's text and of how often it came before, so that equal
    prompts draw apart.
    """
    seen = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(f"{seen[prompt]} {prompt}".encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
        seen[prompt] += 1
    return np.array(keys, dtype=np.uint64)
