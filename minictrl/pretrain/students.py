"""The models of the task `reviews` in `assets/`: students of the teachers, small enough to ship.

policy   a GPT-2 with the pruned teacher's tokens: learns what the teacher expected at every step
         of what it wrote and of the training reviews, and the reviews' own tokens
reward   a causal classifier that starts from the student policy, distilled from the reward
         teacher
judge    the lowest layers of MiniLM with the tokens that reviews need, distilled from the judge
         teacher

Plain transformers directories in half precision. A step whose result is there is skipped; one that
was interrupted goes on.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minictrl.files import save_tensors
from minictrl.models import load_policy, load_scorer
from minictrl.pretrain.fitting import fit, load_start, save_fitted
from minictrl.pretrain.packages import minilm
from minictrl.pretrain.ratings import halves, of_split, read_gzipped
from minictrl.pretrain.teachers import SHARPNESS, fit_scorer, report_accuracy
from minictrl.pretrain.text import TEMPERATURE
from minictrl.pretrain.vocabulary import prune

STEPS = ("policy", "reward", "judge")
SIZE = dict(n_embd=160, n_layer=4, n_head=5)  # of the policy
LAYERS, VOCABULARY = 3, 8000  # of the judge
REPEAT, HARD = 2, 0.3  # of the reviews in an epoch; the share of their own tokens in the loss


def train_students(reviews: list[dict], teachers: Path, out: Path, *, only: str | None, seed: int):
    """Every student that `out` lacks; `only`: one of STEPS."""
    out.mkdir(parents=True, exist_ok=True)
    train = of_split(reviews, "train")
    for step in STEPS if only is None else (only,):
        if (out / step / "config.json").is_file():
            continue
        if step == "policy":
            model, tokenizer = load_policy(str(teachers / "pruned"))
            texts = [row["text"] for row in train]
            train_student_policy(
                review_lessons(model, tokenizer, texts, teachers / "read"),
                written_lessons(teachers / "text", tokenizer),
                model,
                tokenizer,
                out / "policy",
                seed=seed,
            )
        else:
            half = STEPS.index(step) - 1
            texts = [row["text"] for row in train] + written_texts(teachers / "text")
            labels = labels_of(teacher_scores(teachers / step, step, texts), train, half)
            start = out / "policy" if step == "reward" else minilm(teachers)
            train_student_scorer(texts, labels, str(start), out / step, seed=seed)
            print(
                f"{step}: {report_accuracy(load_scorer(str(out / step), step), reviews)}",
                flush=True,
            )


# --- what the policy teacher says ---


@dataclass
class Lessons:
    """Texts, and the teacher's likeliest tokens at the last positions of each.

    rows: (token ids, range) of a text: which rows of `ids` say what its last tokens could be.
    ids, logprobs: (n, top), int32 and float16.
    """

    rows: list[tuple[list[int], range]]
    ids: Tensor
    logprobs: Tensor

    def __add__(self, other: Lessons) -> Lessons:
        n = len(self.ids)
        rows = [(line, range(n + part.start, n + part.stop)) for line, part in other.rows]
        return Lessons(
            self.rows + rows,
            torch.cat([self.ids, other.ids]),
            torch.cat([self.logprobs, other.logprobs]),
        )


def written_lessons(folder: Path, tokenizer) -> Lessons:
    """Of the shards that `write_text` has written."""
    rows, ids, logprobs, n = [], [], [], 0
    for path in sorted(folder.glob("*.jsonl.gz")):
        shard = load_file(folder / f"{path.name.partition('.')[0]}.safetensors")
        prompts = tokenizer([row["prompt"] for row in read_gzipped(path)])["input_ids"]
        tokens = shard["tokens"].int()  # (prompts, M, T)
        ends = (tokens == tokenizer.eos_token_id).int()
        kept = ends.cumsum(-1) - ends == 0  # EOS counts, nothing after it does
        ids.append(shard["ids"].int()[kept])
        logprobs.append(shard["logprobs"][kept])
        for prompt, group, counts in zip(
            prompts, tokens.tolist(), kept.sum(-1).tolist(), strict=True
        ):
            for line, count in zip(group, counts, strict=True):
                rows.append((prompt + line[:count], range(n, n + count)))
                n += count
    return Lessons(rows, torch.cat(ids), torch.cat(logprobs))


def written_texts(folder: Path) -> list[str]:
    """What the policy teacher wrote, prompts included: of each prompt in a shard the first text."""
    return [
        row["prompt"] + row["texts"][0]
        for path in sorted(folder.glob("*.jsonl.gz"))
        for row in read_gzipped(path)
    ]


@torch.inference_mode()
def review_lessons(
    model: nn.Module, tokenizer, texts: list[str], folder: Path, *, top: int = 32
) -> Lessons:
    """Of reviews: what the teacher expects after each token. Kept in `folder`, in pieces of 500."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [[*line, tokenizer.eos_token_id] for line in tokenizer(texts)["input_ids"]]
    lines = sorted((line for line in lines if len(line) > 2), key=len)
    for first in range(0, len(lines), 500):
        file, ids, logprobs = folder / f"{first:05}.safetensors", [], []
        if file.is_file():
            continue
        for i in range(first, min(first + 500, len(lines)), 20):
            part = [torch.tensor(line) for line in lines[i : i + 20]]
            batch = nn.utils.rnn.pad_sequence(part, batch_first=True)  # on the right, and causal:
            logits = model(batch).logits / TEMPERATURE  # no mask is needed
            best = logits.log_softmax(-1).topk(top)
            ids += [
                row[: len(line) - 1].int() for row, line in zip(best.indices, part, strict=True)
            ]
            logprobs += [
                row[: len(line) - 1].half() for row, line in zip(best.values, part, strict=True)
            ]
        save_tensors(file, {"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}, {})
    saved, rows, n = [load_file(file) for file in sorted(folder.glob("*.safetensors"))], [], 0
    for line in lines:
        rows.append((line, range(n, n + len(line) - 1)))
        n += len(line) - 1
    return Lessons(
        rows, *(torch.cat([part[name] for part in saved]) for name in ("ids", "logprobs"))
    )


# --- policy ---


def small_gpt2(teacher: nn.Module, tokenizer, **size: int) -> GPT2LMHeadModel:
    """A GPT-2 whose embeddings are the main directions of the teacher's, all else at random."""
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=teacher.config.vocab_size,
            n_positions=128,
            **size,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    )
    table = teacher.get_input_embeddings().weight.detach()
    U, S, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    start = (U * S)[:, : size["n_embd"]]
    model.get_input_embeddings().weight.data.copy_(start * 0.04 / start.std())
    return model


def train_student_policy(
    reviews: Lessons,
    written: Lessons,
    teacher: nn.Module,
    tokenizer,
    out: Path,
    *,
    epochs: int = 4,
    lr: float = 3e-3,
    seed: int = 0,
    **size: int,
):
    """Trains and saves a `small_gpt2`. size: n_embd, n_layer, n_head, if not SIZE.

    The loss is the cross-entropy to the teacher's likeliest tokens; in reviews, which come REPEAT
    times in an epoch, for the share HARD that to the token itself.
    """
    torch.manual_seed(seed)
    model = small_gpt2(teacher, tokenizer, **SIZE | size)
    lessons, of_reviews = reviews + written, len(reviews.ids)
    rows = REPEAT * lessons.rows[: len(reviews.rows)] + lessons.rows[len(reviews.rows) :]
    length = sum(len(part) for _, part in rows) / len(rows)

    def loss(chunk: list) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(line) for line, _ in chunk], batch_first=True)
        counts = torch.tensor([len(line) for line, _ in chunk])[:, None]
        taught = torch.tensor([len(part) for _, part in chunk])[:, None]
        at = torch.arange(1, ids.shape[1])
        kept = (at < counts) & (at >= counts - taught)  # (B, L - 1): there is a lesson on it
        index = torch.cat([torch.arange(part.start, part.stop) for _, part in chunk])  # (n,)
        hidden = model.transformer(ids).last_hidden_state[:, :-1][kept]
        logq = model.lm_head(hidden).log_softmax(-1)  # (n, V)
        own = ids[:, 1:][kept]  # (n,) the text's own tokens
        share = HARD * (index < of_reviews)
        each = distillation_loss(logq, own, lessons.ids[index], lessons.logprobs[index], share)
        return each.sum() / length

    options = dict(epochs=epochs, batch=64, micro_batch=16, lr=lr, seed=seed)
    fit(model, rows, loss, out, weight_decay=0.1, **options)
    save_fitted(model.half(), tokenizer, out)


def distillation_loss(
    logq: Tensor, own: Tensor, ids: Tensor, logprobs: Tensor, share: Tensor
) -> Tensor:
    """(n,) nats: cross-entropy to the teacher's likeliest tokens, for a share to the own token.

    logq: (n, V) of the student. own: (n,) tokens. ids, logprobs: (n, top). share: (n,) in [0, 1].
    """
    p = logprobs.float().softmax(-1)
    soft = -(p * logq.gather(1, ids.long())).sum(-1)
    hard = -logq.gather(1, own[:, None])[:, 0]
    return (1 - share) * soft + share * hard


# --- reward model and judge ---


def train_student_scorer(texts: list[str], labels: Tensor, start: str, out: Path, *, seed: int):
    """A classifier on these labels: from a causal model as it is, or from the lowest LAYERS of a
    BERT with the VOCABULARY tokens that the texts use most.

    A difference of labels is the log-odds of a preference.
    """
    model, tokenizer = load_start(start)
    causal = hasattr(model, "score")
    if not causal:
        model.base_model.encoder.layer = model.base_model.encoder.layer[:LAYERS]
        model.config.num_hidden_layers = LAYERS
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = prune(model, tokenizer, texts, VOCABULARY, Path(folder))
    options = dict(sharpness=1.0, epochs=3, lr=1e-3 if causal else 2e-4, seed=seed)
    fit_scorer(model, tokenizer, texts, labels, out, **options)
    save_fitted(model.half(), tokenizer, out)


def teacher_scores(teacher: Path, role: str, texts: list[str]) -> Tensor:
    """(n,) what a teacher says of these texts, kept in its directory for the next attempt."""
    file = teacher / "scores.safetensors"
    if file.is_file():
        scores = load_file(file)["scores"]
        if len(scores) == len(texts):
            return scores
    scores = load_scorer(str(teacher), role)([""] * len(texts), texts)
    save_tensors(file, {"scores": scores}, {})
    return scores


def labels_of(scores: Tensor, reviews: list[dict], half: int) -> Tensor:
    """(n,) the teacher's scores; those of the reviews, which come first, are averaged with the mean
    rating by this half of their raters."""
    own = scores[: len(reviews)]
    human = SHARPNESS * torch.tensor([halves(row["ratings"])[half] for row in reviews])
    human += own.mean() - human.mean()
    return torch.cat([(own + human) / 2, scores[len(reviews) :]])
