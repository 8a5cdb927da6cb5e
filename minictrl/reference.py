"""The reference samples of the calibration, y ~ pi_ref(.|x) with their rewards, drawn once and kept
on disk.

They are kept by chunks of prompts, a file each, named by a digest of all that its samples depend
on: policy, reward model, prompts, sampling. So a second run samples nothing, a larger K draws
only what is missing, more prompts the chunks that are not whole, and an interruption loses one
chunk at most.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minictrl.batch import Batch
from minictrl.files import delete_leftovers, digest, load_tensors, lock, save_tensors

CHUNK = 64  # prompts a file


@dataclass(frozen=True)
class Reference:
    """K samples of pi_ref for each of P prompts, up to T tokens, and their rewards."""

    r_ref: Tensor  # (P, K)    float32
    tokens: Tensor  # (P, K, T) int32
    logprobs: Tensor  # (P, K, T) float32, of the tokens under pi_ref
    mask: Tensor  # (P, K, T) bool

    def __getitem__(self, index) -> Reference:
        return Reference(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def of(cls, samples, r: Tensor) -> Reference:
        """`sampling.Samples` with their rewards r (P, K), on the CPU."""
        tokens, mask = samples.tokens.int().cpu(), samples.mask.bool().cpu()
        return cls(r, tokens, samples.logprobs.cpu(), mask)

    def rows(self, index: Tensor | slice = slice(None)) -> Batch:
        """All P K samples, a row each, or those of the index; (B, n) of them, side by side."""
        P, K = self.r_ref.shape
        return Batch(
            prompt_index=torch.arange(P).repeat_interleave(K)[index],
            tokens=self.tokens.flatten(0, 1)[index].long(),
            mask=self.mask.flatten(0, 1)[index].float(),
            ref_logprobs=self.logprobs.flatten(0, 1)[index],
        )

    def with_known_rewards(self, r: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rewards r (P, G) of responses (P, G, T) to the same prompts, but the one that is kept
        here where a response is one of the samples.

        A model's score of a text moves by a rounding with the texts beside it. Between equal
        responses that would make a tie a win or a loss.
        """
        ours, theirs = marked(tokens, mask), marked(self.tokens, self.mask)
        width = max(ours.shape[2], theirs.shape[2])
        ours, theirs = (F.pad(x, (0, width - x.shape[2]), value=-1) for x in (ours, theirs))
        r = r.clone()
        for p in range(len(r)):  # by prompt: (G, K, T) at a time
            same = (ours[p, :, None] == theirs[p]).all(2)  # (G, K)
            known = self.r_ref[p][same.int().argmax(1)].to(r)
            r[p] = torch.where(same.any(1).to(r.device), known, r[p])
        return r

    def save(self, path: Path, digest: str):
        """Writes all tensors with a digest of what they depend on."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        save_tensors(path, tensors, {"digest": digest})

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> Reference | None:
        """What `save` wrote; None if there is no file, it has another digest, or it is damaged.

        One that is damaged gives a warning.
        """
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path)
        except ValueError as error:
            warnings.warn(f"{path} is damaged ({error}); its samples are drawn again", stacklevel=2)
            return None
        return cls(**tensors) if digest in (None, metadata["digest"]) else None


def marked(tokens: Tensor, mask: Tensor) -> Tensor:
    """Tokens on the CPU, -1 behind the end."""
    return tokens.cpu().masked_fill(~mask.cpu().bool(), -1)


def cached(
    draw: Callable[[list[int], int, int], Reference],
    prompts: list,
    K: int,
    cache: Path,
    key: str,
    name: str = "samples",
) -> Reference:
    """K samples for each prompt, from the cache as far as they are there; the rest is drawn and
    added to it.

    draw(index, first_sample, num_samples) -> Reference of the samples first_sample, … of the
    prompts of an index. prompts: for each what goes into the digest of its chunk
    (`Task.cache_keys`). key: `digest` of the policy, the reward model and the sampling. name: of
    the progress bar. Of runs that need the same chunk at once, one draws it and the others wait for
    it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in tqdm(range(0, len(prompts), CHUNK), name, disable=None):
        chunk = prompts[first : first + CHUNK]
        made_of = digest(key, chunk)
        path = cache / f"{made_of}.safetensors"
        have = Reference.load(path, made_of)
        if count_of(have) < K:
            with lock(path, wait=True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # damage has been said
                    have = Reference.load(path, made_of) or have  # another run may have drawn it
                missing = K - count_of(have)
                if missing > 0:
                    delete_leftovers(path)
                    new = draw(list(range(first, first + len(chunk))), K - missing, missing)
                    if have is None:
                        have = new
                    else:  # equal responses tie, as in one draw
                        r = have.with_known_rewards(new.r_ref, new.tokens, new.mask)
                        have = join([have, replace(new, r_ref=r)], dim=1)
                    have.save(path, made_of)
        parts.append(have[:, :K])
    return join(parts)


def count_of(reference: Reference | None) -> int:
    """K, 0 without samples."""
    return 0 if reference is None else reference.r_ref.shape[1]


def join(parts: list[Reference], dim: int = 0) -> Reference:
    """More prompts (dim 0) or more samples of the same prompts (dim 1)."""
    return Reference(
        *(torch.cat([getattr(part, f.name) for part in parts], dim) for f in fields(Reference))
    )
