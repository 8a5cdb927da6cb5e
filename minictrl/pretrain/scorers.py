"""Train the reward model (first half of the raters) and the judge (second half) of the task
`reviews`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minictrl.pretrain.ratings import halves, load_ratings, split_of
from minictrl.scorers.ngram import GROUPS, NgramScorer, bradley_terry_loss, pair_accuracy

SIZES = {
    "reward": dict(buckets=1 << 18, characters=(2, 5)),
    "judge": dict(buckets=1 << 19, characters=(2, 6)),
}
SHARPNESS = 0.5  # of preferences, by the difference of the mean ratings (-4 to 4)
SOURCES = {"reviews": 1.0, "tweets": 0.3, "editorials": 0.3}  # weight of each source's mean loss
LABELS = ("reward", "judge")  # the half of the raters that each learns from, in order


def fit(
    scorer: NgramScorer,
    sources: list[tuple[list[str], Tensor, float]],
    *,
    l2: float = 2.5e-5,
    steps: int = 30,
    seed: int = 0,
) -> None:
    """Fit the scorer in place to sources of (texts, labels (n,), weight): Bradley-Terry within
    each, ridge on theta.

    L-BFGS on theta, value = rarity * theta; rarity is the inverse document frequency in the first
    source.
    """
    bags = [scorer.features(texts) for texts, _, _ in sources]
    texts = len(sources[0][0])
    df = torch.bincount(bags[0][0], minlength=scorer.rarity.numel()).float()
    scorer.rarity.copy_(((1 + texts) / (1 + df)).log() + 1)
    theta = torch.zeros_like(scorer.rarity, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randperm(len(labels), generator=generator).split(2000) for _, labels, _ in sources
    ]
    norms = [
        F.embedding_bag(ids, scorer.rarity.square()[:, None], offsets, mode="sum")
        .clamp(min=1e-6)
        .sqrt()
        for ids, offsets in bags
    ]
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=steps, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = l2 * theta.square().sum()
        values = (theta * scorer.rarity)[:, None]
        for (ids, offsets), norm, (_, labels, weight), parts in zip(bags, norms, sources, batches):
            scores = (
                (F.embedding_bag(ids, values, offsets, mode="sum") / norm).view(-1, GROUPS).sum(-1)
            )
            loss = loss + weight * sum(
                bradley_terry_loss(scores[part], labels[part], SHARPNESS) for part in parts
            ) / len(parts)
        loss.backward()
        return loss

    optimizer.step(closure)
    scorer.value.data.copy_(theta.detach() * scorer.rarity)


def tfidf_ridge(texts: list[str], labels: Tensor, held_out: list[str], **options) -> Tensor:
    """Scores of the held-out texts by the usual baseline, scikit-learn's TF-IDF and ridge
    regression.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectorizer = TfidfVectorizer(sublinear_tf=True, **options)
    ridge = Ridge(alpha=1.0, solver="sparse_cg").fit(
        vectorizer.fit_transform(texts), labels.numpy()
    )
    return torch.from_numpy(ridge.predict(vectorizer.transform(held_out))).float()


def train_scorers(data_path: str | Path | None, out_dir: str | Path, seed: int = 0) -> str:
    """Write out_dir/reward and out_dir/judge, print and return a Markdown report on the held-out
    reviews.

    data_path: what `load_ratings` takes. Deterministic on one machine; a few minutes on one core.
    The baseline's lines are there if scikit-learn is.
    """
    data = {name: load_ratings(name, data_path) for name in ("reviews", "tweets", "editorials")}
    data["test"] = [row for row in data["reviews"] if split_of(row["index"]) == "test"]
    data["reviews"] = [row for row in data["reviews"] if split_of(row["index"]) == "train"]
    texts = {name: [row["text"] for row in rows] for name, rows in data.items()}
    labels = {
        name: torch.tensor([halves(row["ratings"]) for row in rows]) for name, rows in data.items()
    }
    length = torch.tensor([len(text.split()) for text in texts["test"]]).float()
    lines = [
        "| on held-out reviews | pairs ordered rightly, % | s.e. | correlation with length |",
        "|---|---|---|---|",
    ]

    def report(name: str, scores: Tensor, truth: Tensor) -> None:
        accuracy, stderr = pair_accuracy(scores, truth)
        correlation = torch.corrcoef(torch.stack([scores, length]))[0, 1]
        lines.append(f"| {name} | {100 * accuracy:.1f} | {100 * stderr:.1f} | {correlation:+.2f} |")

    scores = {}
    for half, name in enumerate(LABELS):
        scorer, truth = NgramScorer(**SIZES[name]), labels["test"][:, half]
        sources = [
            (texts[source], labels[source][:, half], weight) for source, weight in SOURCES.items()
        ]
        fit(scorer, sources, seed=seed)
        scorer.save(Path(out_dir) / name)
        scores[name] = NgramScorer.load(Path(out_dir) / name).score(texts["test"])
        report(f"{name}, raters' half {half + 1}", scores[name], truth)
        for kind, options in (
            ("words and pairs", dict(ngram_range=(1, 2))),
            ("2 to 6 characters", dict(analyzer="char", ngram_range=(2, 6))),
        ):
            try:
                baseline = tfidf_ridge(
                    texts["reviews"], labels["reviews"][:, half], texts["test"], **options
                )
            except ImportError:
                continue
            report(f"TF-IDF + ridge, {kind}, raters' half {half + 1}", baseline, truth)
    report("reward model against the judge's order", scores["reward"], scores["judge"])
    report("raters' half 1 against half 2", *labels["test"].T)
    text = "\n".join(lines)
    print(text)
    return text
