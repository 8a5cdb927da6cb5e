"""SFT policy, reward model and judge from the preference pairs of a task or a .jsonl file, with
transformers' models.

For whoever has no reward model: the policy learns the chosen answers, then two Bradley-Terry
classifiers, each on the pairs of half the prompts, so that the judge has seen other pairs than the
reward model. They start from that policy, or from any encoder or causal model (`base`). They are
written to OUT/policy, OUT/reward, OUT/judge, for `python train.py --task TASK --policy OUT/policy
--reward OUT/reward --judge OUT/judge`.
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
from minictrl.exchange import continuations
from minictrl.files import digest, load_tensors, reading, save_tensors, write_json
from minictrl.lm.device import halving, resolve_device
from minictrl.lm.hub import from_hub
from minictrl.lm.logprobs import sequence_logprobs
from minictrl.lm.prompts import check_ids, encode_prompts, left_pad
from minictrl.models import load_policy, load_scorer, save_policy
from minictrl.pretrain.pairs import Pair, load_pairs
from minictrl.pretrain.preferences import beats
from minictrl.scorers.text import encoded, render, scorer_tokenizer, spaced, written
from minictrl.update import Learner

SAVE_SECONDS = 300  # between checkpoints
RNG = "rng"  # dropout's generator in a checkpoint, beside what a `Learner` has


def train_pairs_task(
    task: str,
    out: Path,
    *,
    policy: str | None = None,
    base: str | None = None,
    epochs: int = 1,
    batch: int = 64,
    micro_batch: int = 16,
    lr: float = 1e-5,
    max_tokens: int = 1024,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    column: str | None = None,
    skip_bad: bool | None = None,
) -> dict[str, float]:
    """Train and save the three models; print and return what they do on held-out pairs.

    policy: what to start from (default: the task's). base: what reward model and judge start from,
    an encoder or a causal model (default: the trained policy); without a policy, they are all that
    is made. limit: the most pairs, of training and of test. column, skip_bad: as in `load_pairs`.
    Pairs with more than max_tokens tokens on a side are counted and left out. The same call again
    goes on where an interrupted one stopped. Returns sft_nll (nats a token of the chosen answers;
    not of a policy that was there already), reward and judge (pair accuracies, ties half), and
    their 95 % intervals (`wilson`).
    Raises ValueError as `load_pairs` and `load_policy` do, on a base that is no model, on too few
    pairs, and if `out` holds anything else.
    """
    name = policy or TASKS.get(task, {}).get("policy")
    if name is None and base is None:
        raise ValueError(
            f"--task {task}: has no policy of its own; name one to start from with --policy, or "
            "with --base what a reward model starts from"
        )
    for flag, value in {"epochs": epochs, "batch": batch, "lr": lr}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value}: use a positive number")
    place, out = resolve_device(device), Path(out)
    train, test = (
        load_pairs(task, split, column=column, skip_bad=skip_bad) for split in ("train", "test")
    )
    for pairs in (train, test):
        random.Random(seed).shuffle(pairs)
    train, test = train[:limit], test[:limit]
    halves = halved(task, train, test)
    options = dict(epochs=epochs, batch=batch, micro_batch=micro_batch, lr=lr, seed=seed)
    settings = dict(options, task=task, policy=policy, base=base, limit=limit, tokens=max_tokens)
    settings["pairs"] = digest(train, test)  # other pairs under the same name are another job
    if name is not None:
        model, tokenizer = load_policy(name)
        rows = policy_rows(model, tokenizer, [train, test], max_tokens)
    if base is not None:
        sides = pair_rows(base, [*halves, test], max_tokens)
    claim(out, settings)
    result = {}
    if name is not None and not (out / "policy" / "config.json").is_file():
        result["sft_nll"] = sft(model.to(place), tokenizer, *rows, out / "policy", **options)
        save_fitted(model.cpu(), tokenizer, out / "policy")
    start = base or str(out / "policy")
    if base is None:
        sides = pair_rows(start, [*halves, test], max_tokens)
    *parts, held_out = sides
    for part, role in zip(parts, ("reward", "judge")):
        if not (out / role / "config.json").is_file():
            bradley_terry(start, out / role, part, held_out, place, **options)
        scorer = load_scorer(str(out / role), role, device=device)
        result |= report(role, chosen_share(scorer, test), len(test), len(part))
    return result


def report(role: str, share: float, pairs: int, trained_on: int) -> dict[str, float]:
    """Prints a model's accuracy on held-out pairs; returns it with its 95 % interval."""
    low, high = wilson(share * pairs, pairs)
    print(
        f"{role}: {100 * share:.1f} % of {pairs} held-out pairs in the right order "
        f"(95 % interval {100 * low:.0f} to {100 * high:.0f}), trained on {trained_on}"
    )
    if low <= 0.5:
        print(f"{role}: it is not shown to have learned anything, because 50 % is chance")
    return {role: share, f"{role}_low": low, f"{role}_high": high}


def halved(task: str, train: list[Pair], test: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs that the reward model learns from, and the judge's, by prompt. Raises ValueError if
    a half or the test has none.
    """
    halves = [], []
    for pair in train:
        halves[crc32(json.dumps(pair[0]).encode()) % 2].append(pair)
    if not all((*halves, test)):
        raise ValueError(
            f"--task {task}: {len(halves[0])} pairs for the reward model, {len(halves[1])} for the "
            f"judge, {len(test)} held out (every tenth prompt): each needs one; give more pairs, "
            "of more prompts, or a larger --limit"
        )
    return halves


def claim(out: Path, settings: dict):
    """Makes `out`, and notes the settings there. Raises ValueError if it holds anything else, such
    as what was made with other settings or of other pairs.
    """
    file = out / "pretrain.json"
    if file.is_file():
        with reading(file, "give a new directory"):
            if json.loads(file.read_bytes()) == settings:
                return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out {out}: holds something already, of other settings or pairs; give a new "
            "directory"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of n (Wilson 1927): for small n and shares near 1."""
    centre, width = right + z**2 / 2, z * math.sqrt(right * (n - right) / n + z**2 / 4)
    return (centre - width) / (n + z**2), (centre + width) / (n + z**2)


def policy_rows(model, tokenizer, parts: list[list[Pair]], max_tokens: int) -> list[list]:
    """Of each part the `sft_rows`, without those that are too long for the model."""
    context = getattr(model.config, "max_position_embeddings", None)
    rows = [short(sft_rows(tokenizer, pairs), max_tokens, context) for pairs in parts]
    check_ids(model, tokenizer, [ids for part in rows for row in part for ids in row])
    return rows


def sft_rows(tokenizer, pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and chosen answers, which follow messages without a template after a
    space.
    """
    answers = []
    for prompt, chosen, _ in pairs:
        if not tokenizer.chat_template:
            chosen = spaced(prompt, chosen)
        answers.append((render(tokenizer, prompt), chosen))
    return answer_rows(tokenizer, answers)


def sft(model: nn.Module, tokenizer, train: list, held_out: list, out: Path, **options) -> float:
    """Fit the chosen answers (`sft_rows`) in place; nats per token of the held-out ones afterwards,
    EOS included.
    """

    def loss(part: list) -> Tensor:  # the mean over answers of a token's mean
        lengths = torch.tensor([len(y) for _, y in part], device=model.device)
        return -(answer_logprobs(model, tokenizer, part) / lengths).sum()

    before = mean(loss, held_out, options["micro_batch"])
    fit(model, train, loss, out, **options)
    after = mean(loss, held_out, options["micro_batch"])
    print(
        f"policy: {after:.3f} nats a token of {len(held_out)} held-out answers, {before:.3f} before"
    )
    return after


def answer_rows(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, answer) pairs of texts; an answer ends with EOS."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    answers = [continuations(tokenizer, prompt, [answer])[0] for prompt, answer in pairs]
    return [(x, [*y, tokenizer.eos_token_id]) for x, y in zip(prompts, answers)]


def answer_logprobs(model: nn.Module, tokenizer, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(y | x) in nats of the rows of `answer_rows`, (B,)."""
    mask, tokens = (
        nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
        for part in ([torch.ones(len(y)) for _, y in rows], [torch.tensor(y) for _, y in rows])
    )
    prompts = left_pad([x for x, _ in rows], tokenizer.pad_token_id, model.device)
    return sequence_logprobs(model, *prompts, tokens, mask).sum(1)


def pair_rows(start: str, parts: list[list[Pair]], max_tokens: int) -> list[list]:
    """Of each part the (chosen, rejected) rows as the classifier `start` reads them, without the
    long ones.
    """
    model, tokenizer = load_start(start)
    causal, rows = hasattr(model, "score"), []
    for pairs in parts:
        chosen, rejected = (
            encoded(tokenizer, [written(tokenizer, x[0], x[side], causal=causal) for x in pairs])
            for side in (1, 2)
        )
        check_ids(model, tokenizer, [row["input_ids"] for row in chosen + rejected])
        rows.append(short(list(zip(chosen, rejected, strict=True)), max_tokens))
    return rows


def bradley_terry(
    start: str, out: Path, train: list, held_out: list, device: torch.device, **options
):
    """Train a classifier with one label on `pair_rows`: -log sigmoid(r(x, chosen) - r(x,
    rejected)), in nats a pair. start: a directory or hub name of a causal model or an encoder."""
    model, tokenizer = load_start(start)
    model.to(device)

    def loss(part: list) -> Tensor:
        both = [side for row in part for side in row]  # chosen, rejected, chosen, …
        inputs = tokenizer.pad(both, return_tensors="pt").to(device)
        scores = model(**inputs).logits.float().view(-1, 2)
        return F.softplus(scores[:, 1] - scores[:, 0]).sum()

    before = mean(loss, held_out, options["micro_batch"])
    fit(model, train, loss, out, **options)
    after = mean(loss, held_out, options["micro_batch"])
    print(f"{out.name}: {after:.3f} nats a held-out pair, {before:.3f} before, log 2 = 0.693")
    save_fitted(model.cpu(), tokenizer, out)


def load_start(start: str, frozen: int = 0) -> tuple[nn.Module, object]:
    """(classifier with one label, tokenizer) of a directory, with a new head, be it one already;
    the same head in each call.

    The score head of a causal model begins at zero and is read at EOS, which then can't be what
    pads: the head is read at the last token that isn't padding. frozen: so many of its lowest
    layers, and the embeddings, are not trained.
    """
    torch.manual_seed(0)
    model = from_hub(
        AutoModelForSequenceClassification,
        "base of the reward model",
        start,
        new_head=True,
        num_labels=1,
        dtype=torch.float32,
    )
    if "ForSequenceClassification" in str(model.config.architectures):
        for head in (m for m in model.modules() if getattr(m, "out_features", 0) == 1):
            head.reset_parameters()
    tokenizer = scorer_tokenizer(model, start, "reward")
    if hasattr(model, "score"):
        nn.init.zeros_(model.score.weight)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            eos = tokenizer.eos_token_id
            others = (tokenizer.unk_token_id, 0, 1)
            tokenizer.pad_token_id = next(i for i in others if i not in (None, eos))
            model.config.pad_token_id = tokenizer.pad_token_id
    if frozen:
        for module in (model.get_input_embeddings(), *model.base_model.layers[:frozen]):
            module.requires_grad_(False)
    return model, tokenizer


def fit(
    model: nn.Module,
    rows: list,
    loss: Callable[[list], Tensor],
    out: Path,
    *,
    epochs: int,
    batch: int,
    micro_batch: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
):
    """AdamW on loss(rows), a sum over them, in random batches of similar length; bfloat16 autocast
    on a GPU.

    out: where `save_fitted` will put the model. Beside it a checkpoint is written every few
    minutes, from which an interrupted call goes on. Out of GPU memory, a batch is tried again in
    smaller micro-batches. Raises ValueError if one row alone doesn't fit.
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
    torch.manual_seed(seed)  # of dropout
    checkpoint = checkpoint_of(out)
    first, saved = resume(checkpoint, model, optimizer), time.monotonic()
    for step, chunk in enumerate(bar := tqdm(schedule, out.name, disable=None)):
        if step < first:
            continue
        if time.monotonic() - saved > SAVE_SECONDS:
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
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise ValueError(
                f"{out.name}: the gradient of step {step + 1} of {len(schedule)} is not finite, "
                f"and has changed no weight; use a lower --lr than {lr:g}, or --device cpu"
            )
        optimizer.step()
        bar.set_postfix_str(f"loss {total:.3f}")
    model.eval()


def checkpoint_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


def save_fitted(model: nn.Module, tokenizer, out: Path):
    """The model as a directory; the checkpoint of its `fit` has had its day.

    Where a token of text pads, the config alone names it: read again as a special token it would
    cut texts otherwise.
    """
    if tokenizer.pad_token_id not in tokenizer.added_tokens_decoder:
        tokenizer.pad_token = None
    save_policy(model, tokenizer, out)
    checkpoint_of(out).unlink(missing_ok=True)


def resume(checkpoint: Path, model: nn.Module, optimizer) -> int:
    """Weights, optimizer and dropout's generator as `save_step` left them; the step to go on with,
    0 without a file.
    """
    if not checkpoint.is_file():
        return 0
    with reading(checkpoint, "delete it, and the same command starts this model again"):
        state, metadata = load_tensors(checkpoint)
        torch.set_rng_state(state.pop(RNG))
        Learner(model, None, optimizer).restore(state)
    return int(metadata["step"])


def save_step(checkpoint: Path, model: nn.Module, optimizer, step: int):
    state = Learner(model, None, optimizer).state() | {RNG: torch.get_rng_state()}
    save_tensors(checkpoint, state, {"step": str(step)})


def shuffled(rows: list, batch: int, rng: random.Random) -> list[list]:
    """One pass in batches; inside a batch the long rows come first, so that a micro-batch pads
    little.
    """
    order = rng.sample(rows, len(rows))
    return [
        sorted(order[i : i + batch], key=size, reverse=True) for i in range(0, len(order), batch)
    ]


def size(row: tuple) -> int:
    """Tokens of the longer one of a row's two sides, or of its prompt and answer together."""
    if isinstance(row[0], dict):
        return max(len(side["input_ids"]) for side in row)
    return sum(map(len, row))


def short(rows: list, max_tokens: int, context: int | None = None) -> list:
    """The rows that are not too long; says how many are. Raises ValueError if all are."""
    longest, rule = max_tokens, f"--max-tokens {max_tokens}"
    if context and context < max_tokens:
        longest, rule = context, f"the model's context of {context} tokens"
    kept = [row for row in rows if size(row) <= longest]
    if not kept:
        raise ValueError(
            f"{rule}: all {len(rows)} pairs are longer; use a larger one, or shorter pairs"
        )
    if len(kept) < len(rows):
        left = len(rows) - len(kept)
        print(f"{left} of {len(rows)} pairs are longer than {longest} tokens and left out")
    return kept


@torch.no_grad()
def mean(loss: Callable[[list], Tensor], rows: list, micro_batch: int) -> float:
    rows = sorted(rows, key=size)

    def total(micro_batch: int) -> float:
        parts = (rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch))
        return sum(float(loss(part)) for part in parts)

    return halving(micro_batch, total)[0] / len(rows)


def chosen_share(score: Callable, pairs: list[Pair]) -> float:
    """Share of pairs whose chosen answer scores higher, a tie counting one half."""
    prompts = [prompt for prompt, _, _ in pairs]
    chosen, rejected = (score(prompts, [pair[side] for pair in pairs]) for side in (1, 2))
    return float(beats(chosen, rejected).mean())
