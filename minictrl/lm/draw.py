"""Draws of tokens as a function of (seed, prompt, sample, t) alone, whatever the batch."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens of the vocabulary in a block of the two-level draw


def draw(logits: Iterable[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """(token, log pi(token)), each (R,), by the inverse CDF in two levels: a block of the
    vocabulary, a token in it.

    logits: (r, V) each, R rows together. u: (R, 2) float64 in [0, 1), a number for each level: with
    one for both, a rounding error in a block's boundary would shift all of its tokens. Sums are
    vectorised, a long cumulative sum is not.
    """
    blocks, insides, first = [], [], 0
    for piece in logits:
        probs = whole_blocks(piece).softmax(-1).unflatten(-1, (-1, BLOCK))  # (r, blocks, BLOCK)
        block = _inverse_cdf(probs.sum(-1), u[first : first + len(piece), 0])
        blocks.append(block)
        insides.append(probs[torch.arange(len(block), device=block.device), block])
        first += len(piece)
    block, inside = torch.cat(blocks), torch.cat(insides)  # (R,), (R, BLOCK)
    i = _inverse_cdf(inside, u[:, 1])
    return block * BLOCK + i, inside.gather(-1, i[:, None])[:, 0].log().float()


def whole_blocks(logits: Tensor) -> Tensor:
    """Logits (…, V), V filled up to a multiple of BLOCK by tokens of probability 0."""
    missing = -logits.shape[-1] % BLOCK
    return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum(weights); never one of weight 0. weights: (R, n),
    u: (R,).
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    i = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return i % weights.shape[-1]  # only NaN gets past the end: `sample` reports it


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
