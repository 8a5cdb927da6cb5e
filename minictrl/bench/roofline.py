"""Decoding on a GPU, against the time that its memory needs to move the bytes (the roofline)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minictrl.bench.random_model import random_gpt2
from minictrl.bench.sampling import K
from minictrl.bench.timing import LeftOut, seconds
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts
from minictrl.models import load_policy
from minictrl.sampling import sample

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # bytes/s, SXM, 80 GB or more
SHORT, LONG = 64, 128  # response tokens


def decode_roofline(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """% of the memory's rate that a decode step reaches, at the best number of rows.

    A GPT-2 with 1.09 B random weights in bfloat16, whatever the policy.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    known = [name for name in BANDWIDTH if name in gpu]
    if not known:
        raise LeftOut(f"needs a GPU whose memory's rate is known: {', '.join(BANDWIDTH)}")
    _, tokenizer = load_policy("reviews")
    model = random_gpt2(28, tokenizer).to(device, torch.bfloat16)
    shares = {}
    for prompts in (4,) if quick else (1, 4, 16):
        moved = decode_rate(model, tokenizer, load_prompts("reviews")[:prompts])
        shares[K * prompts] = moved / BANDWIDTH[known[0]]
    best = max(shares.values())
    by_rows = ", ".join(f"{rows} {100 * share:.0f} %" for rows, share in shares.items())
    setting = f"{gpu}, GPT-2 with 1.09 B random weights, bfloat16; rows decoded together: {by_rows}"
    unit = "% of the memory's rate"
    yield dict(ours=100 * best, theirs=100.0, ratio=best, unit=unit, setting=setting)


def decode_rate(model, tokenizer, texts: list[str]) -> float:
    """Bytes per second that a decode step of K rows per text has to read, halfway between the two
    lengths: the weights, the keys and values of each prompt once, and those of each row.

    The time of a step is from the difference between the lengths, so that reading the prompts is
    not in it.
    """
    rows = K * len(texts)

    def decode(T: int) -> None:
        drawn = {"num_samples": K, "max_new_tokens": T, "batch_size": rows}
        sample(model, tokenizer, texts, seed=0, **drawn)

    short = min(seconds(lambda: decode(SHORT)) for _ in range(3))
    long = min(seconds(lambda: decode(LONG)) for _ in range(3))
    tokens = sum(map(len, encode_prompts(tokenizer, texts))) + rows * (SHORT + LONG) / 2
    config = model.config  # of a GPT-2: every head has keys and values of its own
    numbers = model.num_parameters() + tokens * 2 * config.num_hidden_layers * config.hidden_size
    return model.dtype.itemsize * numbers * (LONG - SHORT) / (long - short)
