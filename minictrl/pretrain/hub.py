"""SFT policy, reward model and judge from the preference pairs of a task or a .jsonl file, with
transformers' models.

For whoever has no reward model: the policy learns the chosen answers, then two Bradley-Terry
classifiers start from it, each on the pairs of half the prompts, so that the judge has seen other
pairs than the reward model. They are written to OUT/policy, OUT/reward, OUT/judge, for `python
train.py --task TASK --policy OUT/policy --reward OUT/reward --judge …`.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from minictrl.config import TASKS
from minictrl.files import in_one_step
from minictrl.lm.device import halving, resolve_device
from minictrl.lm.logprobs import sequence_logprobs
from minictrl.lm.prompts import encode_prompts, left_pad
from minictrl.models import load_policy, load_scorer, save_policy
from minictrl.pretrain.pairs import Pair, load_pairs
from minictrl.scorers.text import render, scorer_tokenizer, token_ids, written

SAVE_SECONDS = 300  # between checkpoints


def train_pairs_task(
    task: str,
    out: Path,
    *,
    policy: str | None = None,
    epochs: int = 1,
    batch: int = 64,
    micro_batch: int = 16,
    lr: float = 1e-5,
    max_tokens: int = 1024,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    skip_bad: bool | None = None,
) -> dict[str, float]:
    """Train and save the three models; print and return what they do on held-out pairs.

    policy: what to start from (default: the task's). limit: the most pairs, of training and of
    test. Pairs with more than max_tokens tokens on a side are counted and left out. Returns sft_nll
    (nats a token of the chosen answers), reward and judge (pair accuracies, ties half), and their
    standard errors. Raises ValueError as `load_pairs` and `load_policy` do.
    """
    name = policy or TASKS.get(task, {}).get("policy")
    if name is None:
        raise ValueError(
            f"--task {task}: has no policy of its own; name one to start from with --policy"
        )
    place, out = resolve_device(device), Path(out)
    train, test = (load_pairs(task, split, skip_bad=skip_bad) for split in ("train", "test"))
    for pairs in (train, test):
        random.Random(seed).shuffle(pairs)
    train, test = train[:limit], test[:limit]
    model, tokenizer = load_policy(name)
    options = dict(epochs=epochs, batch=batch, micro_batch=micro_batch, lr=lr, seed=seed)
    nll = sft(model.to(place), tokenizer, train, test, max_tokens, **options)
    result = {"sft_nll": nll}
    save_policy(model.cpu(), tokenizer, out / "policy")
    for half, role in enumerate(("reward", "judge")):
        part = [pair for pair in train if crc32(json.dumps(pair[0]).encode()) % 2 == half]
        bradley_terry(out / "policy", out / role, part, max_tokens, place, **options)
        result[role], result[f"{role}_stderr"] = pair_accuracy(
            load_scorer(str(out / role), role, device=device), test
        )
        print(
            f"{role}: {100 * result[role]:.1f} ± {100 * result[f'{role}_stderr']:.1f} % of "
            f"{len(test)} held-out "
            f"pairs in the right order, trained on {len(part)}"
        )
    return result


def sft(
    model: nn.Module, tokenizer, train: list[Pair], test: list[Pair], max_tokens: int, **options
) -> float:
    """Fit the chosen answers in place; nats per token of the held-out ones afterwards, EOS
    included.
    """

    def rows(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
        answers = [(render(tokenizer, prompt), chosen) for prompt, chosen, _ in pairs]
        return short(answer_rows(tokenizer, answers), max_tokens)

    def loss(part: list) -> Tensor:  # the mean over answers of a token's mean
        return -(
            answer_logprobs(model, tokenizer, part)
            / torch.tensor([len(y) for _, y in part]).to(model.device)
        ).sum()

    held_out = rows(test)
    before = mean(loss, held_out, options["micro_batch"])
    fit(model, rows(train), loss, "sft", **options)
    after = mean(loss, held_out, options["micro_batch"])
    print(
        f"policy: {after:.3f} nats a token of {len(held_out)} held-out answers, {before:.3f} before"
    )
    return after


def answer_rows(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, answer) pairs of texts; an answer ends with EOS."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return [(x, [*y, tokenizer.eos_token_id]) for x, y in zip(prompts, answers)]


def answer_logprobs(model: nn.Module, tokenizer, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(y | x) in nats of the rows of `answer_rows`, (B,)."""
    mask, tokens = (
        nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
        for part in ([torch.ones(len(y)) for _, y in rows], [torch.tensor(y) for _, y in rows])
    )
    prompts = left_pad([x for x, _ in rows], tokenizer.pad_token_id, model.device)
    return sequence_logprobs(model, *prompts, tokens, mask).sum(1)


def bradley_terry(
    start: Path, out: Path, pairs: list[Pair], max_tokens: int, device: torch.device, **options
):
    """Train a classifier with one label from a policy's weights: -log sigmoid(r(x, chosen) - r(x,
    rejected)).
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, dtype=torch.float32
    ).to(device)
    tokenizer = scorer_tokenizer(model, str(start), "reward")
    nn.init.zeros_(model.score.weight)
    chosen, rejected = (
        token_ids(
            tokenizer, [written(tokenizer, pair[0], pair[side], causal=True) for pair in pairs]
        )
        for side in (1, 2)
    )

    def loss(part: list) -> Tensor:
        ids = [side for row in part for side in row]  # chosen, rejected, chosen, …
        scores = (
            model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device))
            .logits.float()
            .view(-1, 2)
        )
        return F.softplus(scores[:, 1] - scores[:, 0]).sum()

    fit(model, short(list(zip(chosen, rejected)), max_tokens), loss, out.name, **options)
    save_policy(model.cpu(), tokenizer, out)


def fit(
    model: nn.Module,
    rows: list,
    loss: Callable[[list], Tensor],
    name: str,
    *,
    epochs: int,
    batch: int,
    micro_batch: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
    checkpoint: Path | None = None,
):
    """AdamW on loss(rows), a sum over them, in random batches of similar length; bfloat16 autocast
    on a GPU.

    checkpoint: a file that is written every few minutes, and from which an interrupted call goes
    on. Out of GPU memory, a batch is tried again in smaller micro-batches. Raises ValueError if one
    row alone doesn't fit.
    """
    gpu = model.device.type == "cuda"
    if gpu:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    rng = random.Random(seed)
    schedule = [chunk for _ in range(epochs) for chunk in shuffled(rows, batch, rng)]
    model.train()
    first, saved = resume(checkpoint, model, optimizer), time.monotonic()
    for step, chunk in enumerate(bar := tqdm(schedule, name, disable=None)):
        if step < first:
            continue
        if checkpoint and time.monotonic() - saved > SAVE_SECONDS:
            save_step(checkpoint, model, optimizer, step)
            saved = time.monotonic()
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / len(schedule))

        def gradients(micro_batch: int, chunk=chunk) -> float:
            optimizer.zero_grad()
            total = 0.0
            for i in range(0, len(chunk), micro_batch):
                with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
                    value = loss(chunk[i : i + micro_batch]) / len(chunk)
                value.backward()
                total += float(value.detach())
            return total

        total, micro_batch = halving(micro_batch, gradients)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {total:.3f}")
    model.eval()


def resume(checkpoint: Path | None, model: nn.Module, optimizer) -> int:
    """Weights, optimizer and dropout's generator as `save_step` left them; the step to go on with,
    0 without a file.
    """
    if checkpoint is None or not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, map_location=model.device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    return state["step"]


def save_step(checkpoint: Path, model: nn.Module, optimizer, step: int):
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": step,
    }
    with in_one_step(checkpoint) as temporary:
        torch.save(state, temporary)


def shuffled(rows: list, batch: int, rng: random.Random) -> list[list]:
    """One pass in batches; inside a batch the long rows come first, so that a micro-batch pads
    little.
    """
    order = rng.sample(rows, len(rows))
    return [
        sorted(order[i : i + batch], key=size, reverse=True) for i in range(0, len(order), batch)
    ]


def size(row: tuple[list[int], list[int]]) -> int:
    return max(len(row[0]), len(row[1])) if row else 0


def short(rows: list, max_tokens: int) -> list:
    kept = [row for row in rows if size(row) <= max_tokens]
    if not kept:
        raise ValueError(
            f"max_tokens {max_tokens}: all {len(rows)} pairs are longer; use a larger one"
        )
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} pairs are longer than {max_tokens} tokens and "
            "left out"
        )
    return kept


@torch.no_grad()
def mean(loss: Callable[[list], Tensor], rows: list, micro_batch: int) -> float:
    rows = sorted(rows, key=size)
    return sum(
        float(loss(rows[i : i + micro_batch])) for i in range(0, len(rows), micro_batch)
    ) / len(rows)


def pair_accuracy(score: Callable, pairs: list[Pair]) -> tuple[float, float]:
    """(share of pairs whose chosen answer scores higher, a tie counting one half; its standard
    error).
    """
    prompts = [prompt for prompt, _, _ in pairs]
    chosen, rejected = (score(prompts, [pair[side] for pair in pairs]) for side in (1, 2))
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return float(right.mean()), float(right.std()) / math.sqrt(len(right))
