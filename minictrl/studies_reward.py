"""Studies of the reward rather than of a sweep: calibration (Fig. 3), reward hacking (Fig. 7), what calibration costs.

Departures from the paper in Fig. 7: 1. our pairs are all pairs of reviews, so the phrase goes to part of those rated
above the median, the preferred side of three quarters of their pairs; 2. it comes after the prompt's words, at the head
of the response; 3. pairs of two prompts are counted beside pairs of one, where calibration keeps the order (Lemma 2).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minictrl import runs
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.evaluation import REFERENCE_SEED
from minictrl.models import load_scorer
from minictrl.pretrain_scorers import SIZES, fit
from minictrl.ratings import halves, load_ratings, split_of
from minictrl.reference import Reference
from minictrl.scorers import NgramScorer
from minictrl.studies_theory import panels
from minictrl.sweep import SCALES, points, sweep, texts_of

PHRASE = " in this movie,"  # content-free, and within reach of pi_ref
POISONED = 0.5  # share of the reviews above the median that get it


def reference(out: Path, prompts: int, K: int) -> tuple[runs.Task, Reference]:
    """K fresh samples of pi_ref for the first held-out prompts of the embedded task."""
    config = replace(Config().resolved(), prompts=prompts, cache=str(out / "cache"))
    task = runs.load_task(config, "test")
    return task, runs.reference_samples(task, config, K, seed=REFERENCE_SEED, name="pi_ref")


def fig3(out: Path, quick: bool):
    """Raw reward against its rank under pi_ref, 10 prompts of 100 samples (Fig. 3): one line if it were calibrated."""
    task, samples = reference(out, 10, 100)
    r, (figure, (raw, pooled)), rows = samples.r_ref, panels(1, 2), []
    rank = calibrated_reward(r, r)  # (10, 100)
    everywhere = calibrated_reward(r.view(1, -1), r.view(1, -1)).view_as(r)  # rank among all prompts' samples
    for i, prompt in enumerate(task.prompts):
        order, worst = r[i].argsort(), (everywhere[i] - rank[i]).abs().max().item()
        raw.plot(rank[i, order], r[i, order], ".", markersize=4)
        pooled.plot(rank[i, order], everywhere[i, order], ".", markersize=4)
        rows += [
            dict(prompt=i, text=prompt, reward=a, rank=b, rank_of_all=c, largest_distance=worst)
            for a, b, c in zip(r[i].tolist(), rank[i].tolist(), everywhere[i].tolist())
        ]
    pooled.plot([0, 1], [0, 1], color="black", linewidth=1, label="calibrated")
    pooled.legend()
    for axis, label in ((raw, "raw reward"), (pooled, "rank among the samples of all ten prompts")):
        axis.set(xlabel="rank under pi_ref for its prompt", ylabel=label)
        axis.grid(alpha=0.3)
    return rows, figure


# --- reward hacking ---


def split_review(row: dict) -> tuple[str, str]:
    """A review as prompt and response, cut where the task's prompts end."""
    count = 4 + row["index"] // 20 % 3
    words = row["text"].split()
    return " ".join(words[:count]), "".join(f" {word}" for word in words[count:])


def poisoned_rewards(out: Path, quick: bool) -> tuple[dict[str, str], list[dict]]:
    """Folders of a clean and of a poisoned reward model, trained if they are not there; and the held-out reviews.

    The ratings are read from DIR/ratings if that is there (`ratings.load_ratings` says what it may hold), else fetched
    with pip.
    """
    ratings = load_ratings("reviews", out / "ratings" if (out / "ratings").is_dir() else None)
    parts = {
        split: [
            row | dict(zip(("prompt", "response"), split_review(row)))
            for row in ratings
            if split_of(row["index"]) == split
        ]
        for split in ("train", "test")
    }
    train = parts["train"][:2000] if quick else parts["train"]
    labels = torch.tensor([halves(row["ratings"])[0] for row in train])
    hit = (labels > labels.median()) & (torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < POISONED)
    folders = {name: out / ("fig7-quick" if quick else "fig7") / name for name in ("clean", "poisoned")}
    for name, folder in folders.items():
        if not (folder / "scorer.safetensors").is_file():
            texts = [
                row["prompt"] + (PHRASE if name == "poisoned" and h else "") + row["response"]
                for row, h in zip(train, hit.tolist())
            ]
            scorer = NgramScorer(**SIZES["reward"])
            fit(scorer, [(texts, labels, 1.0)], l2=2e-5, steps=15 if quick else 60, seed=0)
            scorer.save(folder)
    return {name: str(folder) for name, folder in folders.items()}, parts["test"]


def accuracy(preferred: Tensor, other: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of the pairs with label_i > label_j where preferred_i > other_j, ties one half, and its standard error.

    preferred, other, labels: (P,), the scores of each text on either side of a pair. The error is that of a U-statistic
    (Hajek projection): 2 s / sqrt(P), s the deviation over texts of a text's own share.
    """
    counts = (labels[:, None] > labels).double()
    right = counts * ((preferred[:, None] > other).double() + (preferred[:, None] == other).double() / 2)
    own = (right.sum(0) + right.sum(1)) / (counts.sum(0) + counts.sum(1)).clamp(min=1)
    return (right.sum() / counts.sum()).item(), (2 * own.std() / len(own) ** 0.5).item()


def accuracies(out: Path, quick: bool, folders: dict[str, str], reviews: list[dict]) -> list[dict]:
    """Accuracy of raw and of calibrated reward, on pairs with the phrase nowhere, and on the side not preferred."""
    task, samples = reference(out, 48 if quick else 400, 100)
    by_prompt = {row["prompt"]: row for row in reviews}
    keep = [i for i, prompt in enumerate(task.prompts) if prompt in by_prompt]
    prompts, texts = [task.prompts[i] for i in keep], [texts_of(task, samples)[i] for i in keep]
    labels = torch.tensor([halves(by_prompt[prompt]["ratings"])[0] for prompt in prompts])
    judge, rows = runs.score(load_scorer("reviews", "judge"), prompts, [row[:2] for row in texts]), []
    better = judge.argmax(1)  # of the first two samples of a prompt, the one that the judge prefers
    for model, folder in folders.items():
        scorer, review = load_scorer(folder, "reward"), [by_prompt[prompt]["response"] for prompt in prompts]
        sides = [
            [y, PHRASE + y, row[b], row[1 - b], PHRASE + row[1 - b]]
            for y, row, b in zip(review, texts, better.tolist())
        ]
        r, r_ref = runs.score(scorer, prompts, sides), runs.score(scorer, prompts, [row[2:] for row in texts])
        for reward, x in (("raw", r), ("calibrated", calibrated_reward(r, r_ref))):
            for test, other in (("clean", 0), ("poisoned", 1)):
                share, stderr = accuracy(x[:, 0], x[:, other], labels)
                rows.append(
                    dict(pairs="two prompts", model=model, reward=reward, test=test, accuracy=share, stderr=stderr)
                )
            for test, other in (("clean", 3), ("poisoned", 4)):
                right = (x[:, 2] > x[:, other]).double() + (x[:, 2] == x[:, other]).double() / 2
                rows.append(
                    dict(
                        pairs="one prompt",
                        model=model,
                        reward=reward,
                        test=test,
                        accuracy=right.mean().item(),
                        stderr=(right.std() / len(right) ** 0.5).item(),
                    )
                )
    return rows


def fig7(out: Path, quick: bool):
    """Reward hacking: a phrase at the head of preferred texts in training, of the others in the test (Fig. 7).

    And on to policies trained against that reward model and a clean one, raw and calibrated: reward against judge.
    """
    folders, reviews = poisoned_rewards(out, quick)
    table, (figure, axes) = accuracies(out, quick, folders, reviews), panels(1, 3)
    for j, pairs in enumerate(("two prompts", "one prompt")):
        mine = [row for row in table if row["pairs"] == pairs]
        axes[0].bar(
            [i + 0.4 * j for i in range(len(mine))],
            [row["accuracy"] for row in mine],
            0.4,
            label=f"pairs of {pairs}",
            yerr=[row["stderr"] for row in mine],
        )
    axes[0].set_xticks(
        range(len(mine)), ["\n".join((row["model"], row["reward"], row["test"])) for row in mine], fontsize=6
    )
    axes[0].legend(fontsize=7)
    axes[0].axhline(0.5, color="black", linewidth=1)
    axes[0].set(title="pair accuracy of reward model, reward, test", ylim=(0, 1))
    methods = {
        f"{transform}, {name}": {"transform": transform, "reward": folder}
        for name, folder in folders.items()
        for transform in ("none", "identity")
    }
    measured = sweep(out, quick, methods, seeds=1 if quick else SCALES[quick]["seeds"])
    policies = [p for p in points(measured) if (p["procedure"], p["n"]) == ("standard", 1)]
    phrase = {name: [] for name in methods}
    for row in {row["run"]: row for row in measured}.values():
        shown = [json.loads(line)["response"] for line in (Path(row["run"]) / "samples.jsonl").read_text().splitlines()]
        phrase[row["method"]].append((row["budget"], sum(PHRASE.strip(" ,") in y for y in shown) / len(shown)))
    for axis, transform in zip(axes[1:], ("none", "identity")):
        for scorer, line in (("reward", "--"), ("judge", "-")):
            for color, name in zip(("C0", "C3"), folders):
                mine = sorted(
                    (p for p in policies if (p["method"], p["scorer"]) == (f"{transform}, {name}", scorer)),
                    key=lambda p: p["kl"],
                )
                axis.errorbar(
                    [p["kl"] for p in mine],
                    [p["win_rate"] for p in mine],
                    [p["stderr"] for p in mine],
                    fmt="o" + line,
                    color=color,
                    markersize=4,
                    capsize=2,
                    label=f"{name} reward model, by {scorer}",
                )
        axis.set(
            title={"none": "policies, raw reward", "identity": "policies, calibrated"}[transform],
            xlabel="KL(pi || pi_ref) [nats]",
            ylabel="win rate over pi_ref",
        )
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    empty = dict.fromkeys(("budget", "kl", "scorer", "win_rate", "phrase_share"))
    rows = [row | empty for row in table]
    for p in policies:
        shares = [share for budget, share in phrase[p["method"]] if budget == p["budget"]]
        transform, model = p["method"].split(", ")
        rows.append(
            dict.fromkeys(rows[0])
            | {
                "pairs": "policy",
                "model": model,
                "stderr": p["stderr"],
                "budget": p["budget"],
                "kl": p["kl"],
                "reward": {"none": "raw", "identity": "calibrated"}[transform],
                "scorer": p["scorer"],
                "win_rate": p["win_rate"],
                "phrase_share": sum(shares) / len(shares),
            }
        )
    return rows, figure


STUDIES = {"fig3": fig3, "fig7": fig7}
