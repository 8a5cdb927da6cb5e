"""The reward model and the judge of the embedded task: n-gram scorers of a text, trained with the
Bradley-Terry loss.

A text is a set of words, word pairs and character n-grams of its words. Each n-gram i has a rarity
c_i and a value v_i; the score is sum_g sum_{i in g} v_i / sqrt(sum_{i in g} c_i^2), g = words or
characters. With v_i = c_i theta_i that is the inner product of theta with unit-length feature
vectors, so neither length nor repetition pays by itself.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TOKEN = re.compile(r"[\w']+|[^\w\s]")
GROUPS = 3  # words; word pairs; character n-grams inside words


@lru_cache(maxsize=1 << 17)
def _hash(ngram: str, buckets: int) -> int:
    return crc32(ngram.encode("utf-8")) % buckets  # Python's own hash changes from run to run


@lru_cache(maxsize=1 << 16)
def _characters(word: str, shortest: int, longest: int, buckets: int) -> array:
    padded = f" {word} "
    grams = {
        padded[i : i + n] for n in range(shortest, longest + 1) for i in range(len(padded) - n + 1)
    }
    return array("q", sorted(crc32(b"#" + gram.encode("utf-8")) % buckets for gram in grams))


class NgramScorer(nn.Module):
    """Text -> score, any monotone scale, higher is better; a sum over hashed n-grams as the
    module's docstring says.

    buckets: rows of the table. characters: shortest and longest n-gram inside a word, its ends
    counted as spaces.
    """

    def __init__(self, buckets: int = 1 << 19, characters: tuple[int, int] = (2, 6)):
        super().__init__()
        if buckets < 1 or not 1 <= characters[0] <= characters[1]:
            raise ValueError(
                f"buckets {buckets}, characters {characters}: use buckets >= 1 and 1 <= shortest <= longest"
            )
        self.config = {"buckets": buckets, "characters": list(characters)}
        self.value = nn.Parameter(torch.zeros(buckets))
        self.register_buffer("rarity", torch.ones(buckets))

    def features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Row numbers of the distinct n-grams, all texts in one (n,) tensor, and where each of the
        B * 2 bags begins.
        """
        buckets, (shortest, longest) = self.config["buckets"], self.config["characters"]
        ids, offsets = array("q"), []
        for text in texts:
            words = TOKEN.findall(text.lower())
            pairs = map(" ".join, zip(["<"] + words, words + [">"]))
            offsets.append(len(ids))
            ids.extend([_hash(pair, buckets) for pair in dict.fromkeys(pairs)])
            offsets.append(len(ids))
            words = dict.fromkeys(words)
            ids.extend([_hash(word, buckets) for word in words])
            offsets.append(len(ids))
            for word in words:
                ids.extend(_characters(word, shortest, longest, buckets))
        rows = (
            torch.frombuffer(ids, dtype=torch.int64) if ids else torch.zeros(0, dtype=torch.int64)
        )
        return rows, torch.tensor(offsets, dtype=torch.int64)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Scores (B,) of the bags of `features`."""
        table = torch.stack([self.value, self.rarity.square()], -1)
        sums = F.embedding_bag(ids, table, offsets, mode="sum").view(-1, GROUPS, 2)
        return (sums[..., 0] / sums[..., 1].clamp(min=1e-6).sqrt()).sum(-1)

    @torch.inference_mode()
    def score(self, texts: list[str]) -> Tensor:
        """Scores (B,) of the texts."""
        # the n-grams of all would be hundreds of MB
        parts = (texts[i : i + 1024] for i in range(0, max(1, len(texts)), 1024))
        return torch.cat([self(*self.features(part)) for part in parts])

    def save(self, folder: str | Path) -> None:
        """Write folder/scorer.safetensors, in half precision."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(
            weights,
            Path(folder) / "scorer.safetensors",
            metadata={"config": json.dumps(self.config)},
        )

    @classmethod
    def load(cls, folder: str | Path) -> NgramScorer:
        """The scorer that `save` wrote, in float32 and eval mode. Raises ValueError on a folder
        that holds none.
        """
        path = Path(folder) / "scorer.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no scorer.safetensors: name a directory that NgramScorer.save wrote"
            )
        with safe_open(path, "pt") as file:
            scorer = cls(**json.loads(file.metadata()["config"]))
            scorer.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        return scorer.eval().requires_grad_(False)


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
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)}: both must be (B,), scores finite"
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
