"""Studies of the reward: its calibration (Fig. 3), reward hacking (Fig. 7).

Departures from the paper in Fig. 7: 1. our pairs are all pairs of reviews, so the phrase goes to
part of those rated above the median, the preferred side of three quarters of their pairs; 2. it
comes after the prompt's words, at the head of the response; 3. pairs of two prompts are counted
beside pairs of one, where calibration keeps the order (Lemma 2).
"""

from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from minictrl.calibration import calibrated_reward
from minictrl.figures import KL, WIN_RATE, errorbars, panels
from minictrl.models import load_scorer, model_of
from minictrl.pretrain.fitting import load_start, save_fitted
from minictrl.pretrain.preferences import beats, pair_accuracy
from minictrl.pretrain.ratings import cut, halves, load_ratings, split_of, words_of_prompt
from minictrl.pretrain.teachers import SHARPNESS, fit_scorer
from minictrl.results import read_samples
from minictrl.rollout import score
from minictrl.studies.sweep import judged, reference, sweep
from minictrl.studies.tables import Rows, column, points, where, zipped
from minictrl.winrate import mean_stderr

PHRASE = " in this movie,"  # content-free, and within reach of pi_ref
POISONED = 0.5  # share of the reviews above the median that get it
POINT = ("stderr", "budget", "kl", "scorer", "win_rate")
REWARDS = {"none": "raw", "identity": "calibrated"}  # transform -> what it trains on


def fig3(out: Path, quick: bool):
    """Raw reward against its rank under pi_ref, 10 prompts of 100 samples: one line if it were
    calibrated (Fig. 3).

    Paper: Most prompts deviate from y = x, and each by another amount.
    """
    figure, (raw, pooled) = panels(1, 2)
    rows = []
    task, r, _ = reference(out, 10, 100)
    rank = calibrated_reward(r, r)  # (10, 100)
    together = r.view(1, -1)
    everywhere = calibrated_reward(together, together).view_as(r)
    for i, prompt in enumerate(task.prompts):
        largest = (everywhere[i] - rank[i]).abs().max().item()
        raw.plot(rank[i], r[i], ".")
        pooled.plot(rank[i], everywhere[i], ".")
        columns = {"reward": r[i], "rank": rank[i], "rank_of_all": everywhere[i]}
        for point in zipped(columns):
            rows.append({"prompt": i, "text": prompt} | point | {"largest_distance": largest})
    pooled.plot([0, 1], [0, 1], color="black", linewidth=1, label="calibrated")
    pooled.legend()
    raw.set(xlabel="rank under pi_ref for its prompt", ylabel="raw reward")
    pooled.set(xlabel="rank under pi_ref for its prompt", ylabel="rank among all samples")
    return rows, figure


# --- reward hacking ---


def fig7(out: Path, quick: bool):
    """Reward hacking: a phrase at the head of preferred texts in training, of the others in the
    test (Fig. 7).

    And on to policies trained against that reward model and a clean one, raw and calibrated: reward
    against judge.

    Paper: On the poisoned test the calibrated reward keeps a higher accuracy than the raw one. (On
    pairs of one prompt calibration keeps the order, Lemma 2: but for ties nothing can change.)
    """
    reviews = load_reviews(out)
    models = reward_models(out, quick, reviews["train"])
    held_out = {prompt: (response, label) for prompt, response, label in reviews["test"]}
    table = accuracies(out, quick, models, held_out)
    trained = policies(out, quick, models)
    figure, axes = panels(1, 3)
    drawn = [row | {"case": f"{row['model']}, {row['reward']}, {row['test']}"} for row in table]
    errorbars(axes[0], drawn, "accuracy", "case", by="pairs", xerr="stderr", fmt="o")
    axes[0].axvline(0.5, color="black", linewidth=1)
    axes[0].set(title="pair accuracy of reward model, reward, test", xlim=(0, 1))
    axes[0].legend(title="pairs of")
    for axis, reward in zip(axes[1:], REWARDS.values()):
        mine = where(trained, reward=reward)
        mine.sort(key=lambda row: (row["model"], row["scorer"] == "judge", row["kl"]))
        drawn = [row | {"line": f"{row['model']} model, by {row['scorer']}"} for row in mine]
        errorbars(axis, drawn, "kl", "win_rate", by="line", yerr="stderr")
        axis.set(title=f"policies, {reward} reward", xlabel=KL, ylabel=WIN_RATE)
        axis.legend()
    return [dict.fromkeys(trained[0]) | row for row in table] + trained, figure


def load_reviews(out: Path) -> dict[str, list[tuple[str, str, float]]]:
    """split -> (prompt, response, label) of each review, cut where the task's prompts end.

    The ratings are read from DIR/ratings if that is there (`ratings.load_ratings` says what it may
    hold), else fetched with pip.
    """
    reviews = {"train": [], "prompts": [], "test": []}
    folder = out / "ratings"
    for row in load_ratings(folder if folder.is_dir() else None):
        prompt, response = cut(row["text"], words_of_prompt(row["index"]))
        label, _ = halves(row["ratings"])
        reviews[split_of(row["index"])].append((prompt, response, label))
    return reviews


def reward_models(out: Path, quick: bool, reviews: list) -> dict[str, str]:
    """Folders of a clean and of a poisoned reward model, trained if they are not there.

    Classifiers that start from the task's policy, Bradley-Terry on the first half of the raters.
    """
    reviews = reviews[:2000] if quick else reviews
    labels = torch.tensor([label for _, _, label in reviews])
    generator = torch.Generator().manual_seed(0)
    hit = torch.rand(len(labels), generator=generator) < POISONED
    hit &= labels > labels.median()
    marks = {"clean": [""] * len(hit), "poisoned": [PHRASE * each for each in hit.tolist()]}
    folders = {}
    for name, phrases in marks.items():
        folder = out / ("fig7-quick" if quick else "fig7") / name
        folders[name] = str(folder)
        if not (folder / "config.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            texts = [x + phrase + y for (x, y, _), phrase in zip(reviews, phrases)]
            model, tokenizer = load_start(model_of("reviews", "policy"))
            options = dict(sharpness=SHARPNESS, epochs=1 if quick else 3, lr=1e-3, seed=0)
            fit_scorer(model, tokenizer, texts, labels, folder, **options)
            save_fitted(model, tokenizer, folder)
    return folders


def accuracies(out: Path, quick: bool, models: dict[str, str], reviews: dict) -> Rows:
    """Accuracy of raw and of calibrated reward, on pairs with the phrase nowhere, and on the side
    not preferred. reviews: prompt -> (response, label).
    """
    task, _, texts = reference(out, 48 if quick else 400, 100)
    better = judged(task, [row[:2] for row in texts]).argmax(1).tolist()
    prompts, labels, sides, samples = [], [], [], []
    for prompt, row, b in zip(task.prompts, texts, better):
        if prompt not in reviews:
            continue
        review, label = reviews[prompt]
        winner, loser = row[b], row[1 - b]  # pi_ref's first two samples, as the judge has them
        prompts.append(prompt)
        labels.append(label)
        sides.append([review, PHRASE + review, winner, loser, PHRASE + loser])
        samples.append(row[2:])
    rows = []
    for model, folder in models.items():
        scorer = load_scorer(folder, "reward")
        r = score(scorer, prompts, sides)
        r_ref = score(scorer, prompts, samples)
        C_hat = calibrated_reward(r, r_ref)
        for reward, scores in (("raw", r), ("calibrated", C_hat)):
            for row in on_pairs(scores, torch.tensor(labels)):
                rows.append({"model": model, "reward": reward} | row)
    return rows


def on_pairs(scores: Tensor, labels: Tensor) -> Rows:
    """Accuracy on pairs of two prompts and of one. scores: (P, 5), of what `accuracies` lists."""
    review, marked_review, winner, loser, marked_loser = scores.unbind(1)
    rows = []
    for test, other in (("clean", review), ("poisoned", marked_review)):
        share, stderr = pair_accuracy(review, labels, other)
        rows.append({"pairs": "two prompts", "test": test, "accuracy": share, "stderr": stderr})
    for test, other in (("clean", loser), ("poisoned", marked_loser)):
        share, stderr = mean_stderr(beats(winner, other))
        rows.append({"pairs": "one prompt", "test": test, "accuracy": share, "stderr": stderr})
    return rows


def policies(out: Path, quick: bool, models: dict[str, str]) -> Rows:
    """Standard win rates of policies trained on the raw and the calibrated reward of both models,
    and how many of their responses have the phrase."""
    kinds = {f"{kind}, {model}": (kind, model) for model, kind in product(models, REWARDS)}
    methods = {
        name: {"transform": kind, "reward": models[model]} for name, (kind, model) in kinds.items()
    }
    measured, rows = sweep(out, quick, methods), []
    for point in where(points(measured), procedure="standard"):
        kind, model = kinds[point["method"]]
        made = set(column(measured, "run", method=point["method"], budget=point["budget"]))
        texts = [row["response"] for run in made for row in read_samples(Path(run))]
        row = {"pairs": "policy", "model": model, "reward": REWARDS[kind], "test": None}
        row |= {"accuracy": None} | {name: point[name] for name in POINT}
        rows.append(row | {"phrase_share": fmean(PHRASE.strip(" ,") in text for text in texts)})
    return rows


STUDIES = (fig3, fig7)
