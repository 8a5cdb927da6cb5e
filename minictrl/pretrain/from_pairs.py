"""SFT policy, reward model and judge, transformers' models, from the preference pairs of a task, a
file or a data set.

For whoever has no reward model: the policy learns the chosen answers, then two Bradley-Terry
classifiers, each on the pairs of half the prompts, so that the judge has seen other pairs than the
reward model. They start from that policy, or from any encoder or causal model (`base`). They are
written to OUT/policy, OUT/reward, OUT/judge, for `python train.py --task TASK --policy OUT/policy
--reward OUT/reward --judge OUT/judge`.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minictrl.config import TASKS
from minictrl.files import digest, reading, write_json
from minictrl.lm.device import resolve_device
from minictrl.lm.identity import identity
from minictrl.lm.prompts import check_ids
from minictrl.models import load_policy, load_scorer
from minictrl.pretrain.fitting import (
    answer_logprobs,
    answer_rows,
    fit,
    load_start,
    mean,
    save_fitted,
    size,
)
from minictrl.pretrain.pairs import Pair, load_pairs
from minictrl.pretrain.preferences import beats
from minictrl.scorers.text import encoded, render, spaced, written

LEAST = 1e-3  # nats by which a held-out loss falls if something is learned


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
    data_split: str = "train",
    skip_bad: bool | None = None,
) -> dict[str, float]:
    """Train and save the three models; print and return what they do on held-out pairs.

    policy: what to start from (default: the task's). base: what reward model and judge start from,
    an encoder or a causal model (default: the trained policy); without a policy, they are all that
    is made. limit: the most pairs, of training and of test. column, data_split, skip_bad: as in
    `load_pairs`. Pairs with more than max_tokens tokens on a side are counted and left out. The
    same call again goes on where an interrupted one stopped. Returns sft_nll (nats a token of the
    chosen answers; not of a policy that was there already), reward and judge (pair accuracies, ties
    half), and their 95 % intervals (`wilson`).
    Raises ValueError as `load_pairs` and `load_policy` do, on a base that is no model, on too few
    pairs, and if `out` holds anything else.
    """
    name = policy_of(task, policy, base)
    for flag, value in {"epochs": epochs, "batch": batch, "lr": lr}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value}: use a positive number")
    place, out = resolve_device(device), Path(out)
    rules = dict(column=column, data_split=data_split, skip_bad=skip_bad)
    train, test = read_pairs(task, limit, seed, **rules)
    halves = halved(task, train, test)
    options = dict(epochs=epochs, batch=batch, micro_batch=micro_batch, lr=lr, seed=seed)
    settings = dict(options, task=task, policy=policy, base=base, limit=limit, tokens=max_tokens)
    settings["pairs"] = digest(train, test)  # other pairs under the same name are another job
    if name is not None:
        model, tokenizer = load_policy(name)
        settings["weights"] = digest(model, *identity(model, tokenizer))  # as is another model
        rows = policy_rows(model, tokenizer, [train, test], max_tokens)
    if base is not None:
        classifier = load_start(base)
        settings["base_weights"] = digest(classifier[0], *identity(*classifier))
        sides = pair_rows(*classifier, [*halves, test], max_tokens)
    claim(out, settings)
    result = {}
    if name is not None and not (out / "policy" / "config.json").is_file():
        result["sft_nll"] = sft(model.to(place), tokenizer, *rows, out / "policy", **options)
        save_fitted(model.cpu(), tokenizer, out / "policy")
    start = base or str(out / "policy")
    if base is None:
        sides = pair_rows(*load_start(start), [*halves, test], max_tokens)
    return result | train_scorers(start, out, sides, test, place, **options)


def policy_of(task: str, policy: str | None, base: str | None) -> str | None:
    """The policy to start from; None where a base is all there is. Raises ValueError on neither."""
    name = policy or TASKS.get(task, {}).get("policy")
    if name is None and base is None:
        raise ValueError(
            f"--task {task}: has no policy of its own; name one to start from with --policy, or "
            "with --base what a reward model starts from"
        )
    return name


def read_pairs(task: str, limit: int | None, seed: int, **rules) -> list[list[Pair]]:
    """Training and test pairs in random order, at most `limit` of each. rules: of `load_pairs`."""
    parts = [load_pairs(task, split, **rules) for split in ("train", "test")]
    for pairs in parts:
        random.Random(seed).shuffle(pairs)
    return [pairs[:limit] for pairs in parts]


def train_scorers(
    start: str, out: Path, sides: list[list], test: list[Pair], device: torch.device, **options
) -> dict[str, float]:
    """Trains the reward model and the judge where `out` lacks them; returns what they do on test.

    sides: `pair_rows` of the reward model's half, the judge's half and the test.
    """
    *parts, held_out = sides
    result = {}
    for part, role in zip(parts, ("reward", "judge")):
        if not (out / role / "config.json").is_file():
            bradley_terry(start, out / role, part, held_out, device, **options)
        scorer = load_scorer(str(out / role), role, device=device)
        result |= report(role, chosen_share(scorer, test), len(test), len(part))
    return result


def report_nats(role: str, what: str, after: float, before: float) -> None:
    """Prints the held-out loss before and after training, and says so where it has not fallen."""
    print(f"{role}: {after:.3f} nats {what}, {before:.3f} before")
    if not after < before - LEAST:
        print(
            f"{role}: it has learned nothing of what is held out, whatever its accuracy: try more "
            "pairs, more --epochs, or another --lr"
        )


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
    as what was made with other settings, of other pairs or from other weights.
    """
    file, stored = out / "pretrain.json", {}
    if file.is_file():
        with reading(file, "give a new directory"):
            stored = dict(json.loads(file.read_bytes()))
        if stored == settings:
            return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        other = [name for name, value in settings.items() if stored.get(name) != value]
        raise ValueError(
            f"--out {out}: holds something already, of other settings, pairs or weights "
            f"({', '.join(other)}); give a new directory"
        )
    out.resolve().mkdir(parents=True, exist_ok=True)  # a link may point to what is not there
    write_json(file, settings)


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of n (Wilson 1927): for small n and shares near 1."""
    z = 1.96
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
    report_nats("policy", f"a token of {len(held_out)} held-out answers", after, before)
    return after


def pair_rows(model, tokenizer, parts: list[list[Pair]], max_tokens: int) -> list[list]:
    """Of each part the (chosen, rejected) rows as a classifier reads them, without the long
    ones.
    """
    causal, rows = hasattr(model, "score"), []
    for pairs in parts:
        texts = [
            [written(tokenizer, pair[0], pair[side], causal=causal) for pair in pairs]
            for side in (1, 2)
        ]
        chosen, rejected = (encoded(tokenizer, side, truncation=False) for side in texts)
        check_ids(model, tokenizer, [row["input_ids"] for row in chosen + rejected])
        both = list(zip(chosen, rejected, strict=True))
        rows.append(short(both, max_tokens, tokenizer.model_max_length))
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
    report_nats(out.name, "a held-out pair (log 2 = 0.693)", after, before)
    save_fitted(model.cpu(), tokenizer, out)


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


def chosen_share(score: Callable, pairs: list[Pair]) -> float:
    """Share of pairs whose chosen answer scores higher, a tie counting one half."""
    prompts = [prompt for prompt, _, _ in pairs]
    chosen, rejected = (score(prompts, [pair[side] for pair in pairs]) for side in (1, 2))
    return float(beats(chosen, rejected).mean())
