"""The models of the task `reviews` in `assets/`: students of the teachers, small enough to ship.

policy   a GPT-2 with the pruned teacher's tokens: learns its likeliest tokens at every step of what it wrote
         and of the training reviews, and the reviews' own tokens
reward   a causal classifier that starts from the student policy, after the reward teacher
judge    the lower layers of MiniLM with the tokens that reviews need, after the judge teacher

Plain transformers directories in half precision. A step whose result is there is skipped.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minictrl.models import load_policy, load_scorer, save_policy
from minictrl.pretrain.hub import fit
from minictrl.pretrain.packages import minilm
from minictrl.pretrain.ratings import halves, split_of
from minictrl.pretrain.teachers import SHARPNESS, fit_scorer, load_start, report_accuracy
from minictrl.pretrain.vocabulary import prune

TEMPERATURE = .8  # of the teacher's distributions, as of what it wrote


# --- what the policy teacher says ---

@dataclass
class Lessons:
    """Texts, and the teacher's likeliest next tokens at the last positions of each."""

    rows: list[tuple[list[int], range]]  # token ids; which rows of `ids` say what the last len(range) tokens could be
    ids: Tensor  # (n, top) int32
    logprobs: Tensor  # (n, top) float16

    def __add__(self, other: Lessons) -> Lessons:
        n = len(self.ids)
        rows = self.rows + [(line, range(n + part.start, n + part.stop)) for line, part in other.rows]
        return Lessons(rows, torch.cat([self.ids, other.ids]), torch.cat([self.logprobs, other.logprobs]))


def written_lessons(folder: Path, tokenizer) -> Lessons:
    """Of the shards that `write_text` has written."""
    rows, ids, logprobs, n = [], [], [], 0
    for path in sorted(folder.glob("*.jsonl.gz")):
        shard = load_file(path.with_name(path.name.replace(".jsonl.gz", ".safetensors")))
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            prompts = tokenizer([json.loads(line)["prompt"] for line in lines])["input_ids"]
        tokens = shard["tokens"].int()  # (prompts, M, T)
        ends = (tokens == tokenizer.eos_token_id).int()
        kept = ends.cumsum(-1) - ends == 0  # EOS counts, nothing after it does
        ids.append(shard["ids"].int()[kept])
        logprobs.append(shard["logprobs"][kept])
        for prompt, group, counts in zip(prompts, tokens.tolist(), kept.sum(-1).tolist()):
            for line, count in zip(group, counts):
                rows.append((prompt + line[:count], range(n, n + count)))
                n += count
    return Lessons(rows, torch.cat(ids), torch.cat(logprobs))


@torch.inference_mode()
def review_lessons(model: nn.Module, tokenizer, texts: list[str], folder: Path, *, top: int = 32) -> Lessons:
    """Of the training reviews: what the teacher expects after each token. Kept in `folder`, a file for 500 reviews."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [[*line, tokenizer.eos_token_id] for line in tokenizer(texts)["input_ids"]]
    lines = sorted((line for line in lines if len(line) > 2), key=len)
    for first in range(0, len(lines), 500):
        file, ids, logprobs = folder / f"{first:05}.safetensors", [], []
        if file.is_file():
            continue
        for i in range(first, min(first + 500, len(lines)), 20):
            part = lines[i:min(i + 20, first + 500)]
            batch = nn.utils.rnn.pad_sequence([torch.tensor(line) for line in part], batch_first=True)
            best = (model(batch).logits / TEMPERATURE).log_softmax(-1).topk(top)  # right padding, causal: no mask needed
            for j, line in enumerate(part):
                ids.append(best.indices[j, :len(line) - 1].int())
                logprobs.append(best.values[j, :len(line) - 1].half())
        save_file({"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    saved, rows, n = [load_file(file) for file in sorted(folder.glob("*.safetensors"))], [], 0
    for line in lines:
        rows.append((line, range(n, n + len(line) - 1)))
        n += len(line) - 1
    return Lessons(rows, *(torch.cat([part[name] for part in saved]) for name in ("ids", "logprobs")))


# --- policy ---

def train_student_policy(reviews: Lessons, written: Lessons, teacher: nn.Module, tokenizer, out: Path, *,
                         n_embd: int = 128, n_layer: int = 4, n_head: int = 4, dropout: float = 0., epochs: int = 4,
                         repeat: int = 2, batch: int = 64, lr: float = 3e-3, hard: float = .3, seed: int = 0):
    """A GPT-2 whose tokens' embeddings begin as the main directions of the teacher's.

    The loss is the cross-entropy to the teacher's likeliest tokens, and in reviews, which come `repeat` times an epoch,
    for the share `hard` that to the token itself.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=teacher.config.vocab_size, n_positions=128, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        activation_function="gelu_pytorch_tanh", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    table = teacher.get_input_embeddings().weight.detach().float()
    directions = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    start = directions.U[:, :n_embd] * directions.S[:n_embd]
    model.get_input_embeddings().weight.data.copy_(start * .04 / start.std())
    lessons = reviews + written
    rows = [(line, part) for line, part in lessons.rows]
    rows = repeat * rows[:len(reviews.rows)] + rows[len(reviews.rows):]
    own = len(reviews.ids)
    length = sum(len(part) for _, part in rows) / len(rows)

    def loss(chunk: list) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(line) for line, _ in chunk], batch_first=True)
        counts = torch.tensor([len(line) for line, _ in chunk])[:, None] - 1  # tokens that are predicted
        taught = torch.tensor([len(part) for _, part in chunk])[:, None]
        at = torch.arange(ids.shape[1] - 1)
        kept = (at < counts) & (at >= counts - taught)  # (B, L - 1)
        index = torch.cat([torch.arange(part.start, part.stop) for _, part in chunk])  # (n,)
        logq = model.lm_head(model.transformer(ids).last_hidden_state[:, :-1][kept]).log_softmax(-1)  # (n, V)
        p = lessons.logprobs[index].float().softmax(-1)
        soft = -(p * logq.gather(1, lessons.ids[index].long())).sum(-1)
        exact = -logq.gather(1, ids[:, 1:][kept][:, None])[:, 0]
        share = hard * (index < own)
        return ((1 - share) * soft + share * exact).sum() / length

    fit(model, rows, loss, out.name, epochs=epochs, batch=batch, micro_batch=max(1, batch // 4), lr=lr, seed=seed,
        weight_decay=.1, checkpoint=out.with_name(f"{out.name}.checkpoint"))
    save_policy(model.half(), tokenizer, out)


# --- reward model and judge ---

def labels_of(teacher, reviews: list[dict], written: list[str], half: int) -> tuple[list[str], Tensor]:
    """(texts, labels) to learn from: the teacher's scores; of a review their mean with the raters' own preference.

    A difference of labels is the log-odds of a preference.
    """
    own = [row["text"] for row in reviews]
    scores = teacher([""] * (len(own) + len(written)), own + written)
    human = SHARPNESS * torch.tensor([halves(row["ratings"])[half] for row in reviews])
    human += scores[:len(own)].mean() - human.mean()
    return own + written, torch.cat([(scores[:len(own)] + human) / 2, scores[len(own):]])


def lowest_layers(folder: str, layers: int, texts: list[str], vocab_size: int) -> tuple[nn.Module, object]:
    """MiniLM's lowest layers, with the tokens that the texts use most."""
    model, tokenizer = load_start(folder, 0)
    model.base_model.encoder.layer = model.base_model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory() as temporary:
        return prune(model, tokenizer, texts, vocab_size, Path(temporary))


STEPS = ("policy", "reward", "judge")


def train_students(reviews: list[dict], teachers: Path, out: Path, *, only: str | None = None, seed: int = 0):
    """Every student that `out` lacks; `only`: one of STEPS."""
    out.mkdir(parents=True, exist_ok=True)
    train = [row for row in reviews if split_of(row["index"]) == "train"]
    texts = [row["text"] for row in train]
    for step in STEPS if only is None else (only,):
        if (out / step / "config.json").is_file():
            continue
        if step == "policy":
            teacher, tokenizer = load_policy(str(teachers / "pruned"))
            train_student_policy(review_lessons(teacher, tokenizer, texts, teachers / "read"),
                                 written_lessons(teachers / "text", tokenizer), teacher, tokenizer, out / "policy",
                                 seed=seed)
            continue
        half = 0 if step == "reward" else 1
        written = written_texts(teachers / "text")
        labelled = labels_of(load_scorer(str(teachers / step), step), train, written, half)
        if step == "reward":
            model, tokenizer = load_start(str(out / "policy"), 0)
            options = dict(epochs=3, lr=1e-3)
        else:
            model, tokenizer = lowest_layers(minilm(teachers), 3, texts + written, 8000)
            options = dict(epochs=3, lr=2e-4)
        fit_scorer(model, tokenizer, *labelled, out / step, sharpness=1., seed=seed, **options)
        save_policy(AutoModelForSequenceClassification.from_pretrained(out / step).half(),
                    AutoTokenizer.from_pretrained(out / step), out / step)
        print(f"{step}: {report_accuracy(load_scorer(str(out / step), step), reviews)}", flush=True)


def written_texts(folder: Path) -> list[str]:
    """What the policy teacher wrote, prompts included, one text a prompt in each shard."""
    texts = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [row["prompt"] + row["texts"][0] for row in map(json.loads, lines)]
    return texts
