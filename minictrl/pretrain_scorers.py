"""Train the reward model (first half of the raters) and the judge (second half) of the task `reviews`."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minictrl.ratings import halves, load_ratings, split_of
from minictrl.scorers import GROUPS, NgramScorer, bradley_terry_loss, pair_accuracy

SIZES = {"reward": dict(buckets=1 << 18, characters=(2, 5)), "judge": dict(buckets=1 << 19, characters=(2, 6))}
WEIGHTS = torch.tensor([0.7, 1.0, 1.0])
LABELS = ("reward", "judge")  # the half of the raters that each learns from, in order


def fit(scorer: NgramScorer, sources: list[tuple[list[str], Tensor, float]], *, l2: float, steps: int, seed: int) -> None:
    """Fit the scorer in place to sources of (texts, labels (n,), weight): Bradley-Terry within each, ridge on theta.

    L-BFGS on theta, value = rarity * theta; rarity is the inverse document frequency in the first source.
    """
    bags = [scorer.features(texts) for texts, _, _ in sources]
    texts = len(sources[0][0])
    df = torch.bincount(bags[0][0], minlength=scorer.rarity.numel()).float()
    scorer.rarity.copy_(((1 + texts) / (1 + df)).log() + 1)
    theta = torch.zeros_like(scorer.rarity, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randperm(len(labels), generator=generator).split(2000) for _, labels, _ in sources]
    norms = [F.embedding_bag(ids, scorer.rarity.square()[:, None], offsets, mode="sum").clamp(min=1e-6).sqrt()
             for ids, offsets in bags]
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = l2 * theta.square().sum()
        values = (theta * scorer.rarity)[:, None]
        for (ids, offsets), norm, (_, labels, weight), parts in zip(bags, norms, sources, batches):
            scores = (F.embedding_bag(ids, values, offsets, mode="sum") / norm).view(-1, GROUPS) @ WEIGHTS
            loss = loss + weight * sum(bradley_terry_loss(scores[part], labels[part]) for part in parts) / len(parts)
        loss.backward()
        return loss

    optimizer.step(closure)
    scorer.value.data.copy_(theta.detach() * scorer.rarity)


def train_scorers(data_path: str | Path | None, out_dir: str | Path, seed: int = 0) -> str:
    """Write out_dir/reward and out_dir/judge, and print and return a Markdown report on the held-out reviews.

    data_path: what `load_ratings` takes. Deterministic on one machine; minutes on one core.
    """
    rows = {name: load_ratings(name, data_path) for name in ("reviews", "tweets", "editorials")}
    splits = {"reviews": [row for row in rows["reviews"] if split_of(row["index"]) == "train"],
              "tweets": rows["tweets"], "editorials": rows["editorials"]}
    test = [row for row in rows["reviews"] if split_of(row["index"]) == "test"]
    labels = {name: torch.tensor([halves(row["ratings"]) for row in part]) for name, part in (splits | {"test": test}).items()}
    scores, lines = {}, ["| scorer | labels | pair accuracy, % | s.e. | s |", "|---|---|---|---|---|"]
    for half, name in enumerate(LABELS):
        start = time.time()
        scorer = NgramScorer(**SIZES[name])
        sources = [([row["text"] for row in part], labels[source][:, half], 1.0 if source == "reviews" else 0.3)
                   for source, part in splits.items()]
        fit(scorer, sources, l2=2e-5, steps=60, seed=seed)
        scorer.save(Path(out_dir) / name)
        scores[name] = NgramScorer.load(Path(out_dir) / name).score([row["text"] for row in test])
        accuracy, stderr = pair_accuracy(scores[name], labels["test"][:, half])
        lines.append(f"| {name} | half {half + 1} | {100 * accuracy:.1f} | {100 * stderr:.1f} | {time.time() - start:.0f} |")
    for name, a, b in (("reward and judge agree", scores["reward"], scores["judge"]),
                       ("the raters' halves agree", *labels["test"].T)):
        accuracy, stderr = pair_accuracy(a, b)
        lines.append(f"| {name} | – | {100 * accuracy:.1f} | {100 * stderr:.1f} | |")
    report = "\n".join(lines)
    print(report)
    return report
