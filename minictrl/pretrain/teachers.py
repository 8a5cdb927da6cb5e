"""The teachers of the task `reviews`: open models, fine-tuned on the training reviews.

policy   SmolLM2-135M-Instruct goes on from a review's first words
reward   MiniLM-L6, Bradley-Terry on the first half of the raters
judge    that policy with a score head, its upper half trained, on the second half of the raters
pruned   the policy with the tokens that its student has
text     what the pruned policy writes for first words of training reviews, in shards (`text.py`)

A step whose result is there is skipped; one that was interrupted goes on from its last checkpoint.
All but the text are plain transformers directories.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minictrl.models import load_policy, load_scorer
from minictrl.pretrain.english import nats_per_word
from minictrl.pretrain.fitting import answer_logprobs, answer_rows, fit, load_start, save_fitted
from minictrl.pretrain.packages import minilm, smollm2
from minictrl.pretrain.preferences import bradley_terry_loss, pair_accuracy
from minictrl.pretrain.ratings import cuts, halves, of_split
from minictrl.pretrain.text import prune_policy, write_text
from minictrl.scorers.text import encoded, written

SHARPNESS = 0.5  # of preferences, by the difference of the mean ratings (-4 to 4)
VOCABULARY = 6144  # tokens of SmolLM2 that the student has at least
STEPS = ("policy", "reward", "judge", "pruned", "text")


def train_teachers(reviews: list[dict], out: Path, *, only: str | None, shards: int, seed: int):
    """Every teacher that `out` lacks, then the text; `only`: one of STEPS."""
    out.mkdir(parents=True, exist_ok=True)
    for step in STEPS if only is None else (only,):
        if step == "text":
            write_text(reviews, out / "pruned", out / "text", shards=shards, seed=seed)
        elif (out / step / "config.json").is_file():
            continue
        elif step == "policy":
            train_policy_teacher(reviews, out / "policy", seed=seed)
        elif step == "reward":
            train_scorer(reviews, out / "reward", start=minilm(out), half=0, seed=seed)
        elif step == "judge":
            start = str(out / "policy")
            train_scorer(reviews, out / "judge", start=start, half=1, frozen=15, seed=seed)
        else:
            prune_policy(reviews, out / "policy", out / "pruned", VOCABULARY)


# --- policy ---


def train_policy_teacher(
    reviews: list[dict],
    out: Path,
    *,
    steps: int = 50,
    batch: int = 32,
    lr: float = 2e-4,
    seed: int = 0,
    start: str | None = None,
):
    """SmolLM2 learns to go on from a review's first words: all of its weights but the embeddings.

    start: another model. Prints nats a word of held-out reviews, before and after.
    """
    model, tokenizer = load_policy(start or smollm2())
    tokenizer.chat_template = None  # a review is a text, not a conversation
    model.get_input_embeddings().requires_grad_(False)
    train, held_out = cuts(reviews, "train"), cuts(reviews, "test")[:256]
    before = nats_per_word(model, tokenizer, held_out)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = answer_rows(tokenizer, [train[i] for i in order[: steps * batch]])
    tokens = sum(len(y) for _, y in rows) / len(rows)

    def loss(part: list) -> Tensor:
        return -answer_logprobs(model, tokenizer, part).sum() / tokens

    fit(model, rows, loss, out, epochs=1, batch=batch, micro_batch=8, lr=lr, seed=seed)
    save_fitted(model.cpu(), tokenizer, out)
    after = nats_per_word(model, tokenizer, held_out)
    print(
        f"policy: {after[0]:.2f} ± {after[1]:.2f} nats a word of {len(held_out)} held-out "
        f"reviews, {before[0]:.2f} ± {before[1]:.2f} before",
        flush=True,
    )


# --- reward model and judge ---


def train_scorer(
    reviews: list[dict],
    out: Path,
    *,
    start: str,
    half: int,
    epochs: int = 2,
    lr: float = 1e-4,
    frozen: int = 0,
    seed: int = 0,
):
    """A sequence classifier on the graded preferences of one half of the raters.

    start: a directory, of a causal model too, which gets a score head. frozen: so many of its
    lowest layers, and the embeddings, stay as they are. Prints the held-out pair accuracy.
    """
    model, tokenizer = load_start(start, frozen)
    train = of_split(reviews, "train")
    labels = torch.tensor([halves(row["ratings"])[half] for row in train])
    texts = [row["text"] for row in train]
    options = dict(sharpness=SHARPNESS, epochs=epochs, lr=lr, seed=seed)
    fit_scorer(model, tokenizer, texts, labels, out, **options)
    save_fitted(model.cpu(), tokenizer, out)
    print(f"{out.name}: {report_accuracy(load_scorer(str(out), out.name), reviews)}", flush=True)


def fit_scorer(
    model: nn.Module,
    tokenizer,
    texts: list[str],
    labels: Tensor,
    out: Path,
    *,
    sharpness: float,
    **options,
):
    """Bradley-Terry on all pairs of a batch, as `bradley_terry_loss` has it. labels: (texts,).

    out: beside it lies the checkpoint of an interrupted fit. options: of `fit`.
    """
    causal = hasattr(model, "score")
    read = encoded(tokenizer, [written(tokenizer, "", text, causal=causal) for text in texts])
    # a list of one label, because `fit` measures a row by the lengths of its lists
    rows = [(x["input_ids"], [label]) for x, label in zip(read, labels.tolist(), strict=True)]

    def scores(part: list) -> Tensor:
        inputs = tokenizer.pad({"input_ids": [row for row, _ in part]}, return_tensors="pt")
        ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
        return model(input_ids=ids, attention_mask=mask).logits.float()[:, 0]

    def loss(part: list) -> Tensor:  # `fit` has sorted the batch by length: eights pad little
        r = torch.cat([scores(part[i : i + 8]) for i in range(0, len(part), 8)])
        labels = torch.tensor([label for _, (label,) in part], device=r.device)
        return bradley_terry_loss(r, labels, sharpness) * len(part)

    fit(model, rows, loss, out, batch=32, micro_batch=32, **options)


def report_accuracy(score: Callable, reviews: list[dict]) -> str:
    """Held-out pair accuracy against either half of the raters, with standard errors."""
    rows = of_split(reviews, "test")
    scores = score([""] * len(rows), [row["text"] for row in rows])
    labels = torch.tensor([halves(row["ratings"]) for row in rows])
    values = [pair_accuracy(scores, labels[:, half]) for half in (0, 1)]
    return "held-out pairs in the right order: " + ", ".join(
        f"{100 * value:.1f} ± {100 * error:.1f} % by raters' half {half + 1}"
        for half, (value, error) in enumerate(values)
    )
