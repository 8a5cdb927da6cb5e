"""The reference samples of the calibration, y ~ pi_ref(.|x) with their rewards, drawn once and kept
on disk.

They are kept by chunks of prompts, a file each, named by a digest of all that its samples depend
on: policy, reward model, prompts, sampling. So a second run samples nothing, a larger K or more
prompts draw only what is missing, and an interruption loses one chunk at most.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minictrl.files import in_one_step

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

    def save(self, path: Path, digest: str):
        """Writes all tensors with their check sum and a digest of what they depend on."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        sha256 = torch.tensor(list(check_sum(tensors).encode()), dtype=torch.uint8)
        with in_one_step(path) as temporary:
            save_file(tensors | {"sha256": sha256}, temporary, {"digest": digest})

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> Reference | None:
        """What `save` wrote; None if there is no file, it has another digest, or it is damaged.

        One that is damaged gives a warning.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                if digest not in (None, metadata["digest"]):
                    return None
                tensors = {f.name: file.get_tensor(f.name) for f in fields(cls)}
                sha256 = bytes(file.get_tensor("sha256").tolist()).decode()
            if sha256 != check_sum(tensors):
                raise ValueError("its check sum is another")
            return cls(**tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}); its samples are drawn again", stacklevel=2)
            return None


def check_sum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors by name, in hex."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def digest(*parts) -> str:
    """16 hex digits of strings, numbers, lists, dicts and modules (their weights)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            sha.update(check_sum(part.state_dict()).encode())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"|")
    return sha.hexdigest()[:16]


def cached(
    draw: Callable[[list[int], int, int], Reference],
    prompts: list[str],
    K: int,
    cache: Path,
    key: str,
    progress=lambda chunks: chunks,
) -> Reference:
    """K samples for each prompt, from the cache as far as they are there; the rest is drawn and
    added to it.

    draw(index, first_sample, num_samples) -> Reference of the samples first_sample, … of the
    prompts of an index. key: `digest` of the policy, the reward model and the sampling. progress
    wraps the list of chunks.
    """
    cache.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in progress(range(0, len(prompts), CHUNK)):
        chunk = prompts[first : first + CHUNK]
        name = digest(key, chunk)
        path = cache / f"{name}.safetensors"
        have = Reference.load(path, name)
        missing = K - (0 if have is None else have.r_ref.shape[1])
        if missing > 0:
            new = draw(list(range(first, first + len(chunk))), K - missing, missing)
            have = new if have is None else join([have, new], dim=1)
            have.save(path, name)
        parts.append(have[:, :K])
    return join(parts)


def join(parts: list[Reference], dim: int = 0) -> Reference:
    """More prompts (dim 0) or more samples of the same prompts (dim 1)."""
    return Reference(
        *(torch.cat([getattr(part, f.name) for part in parts], dim) for f in fields(Reference))
    )
