"""How the time of sampling grows with its work: exponent 1 is in proportion."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from minictrl.bench.timing import random_model, seconds
from minictrl.data import load_prompts
from minictrl.models import load_policy
from minictrl.sampling import sample

START = {"K": 100, "prompts": 8, "length": 24, "layers": 3}
VARIED = {
    "K": (10, 30, 100, 300, 1000),
    "prompts": (2, 8, 32, 128),
    "length": (8, 16, 32, 64, 128),
    "layers": (2, 4, 8, 16, 32),
}


def growth(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """The exponent e of time ~ work^e, a row for each of VARIED; --quick takes two values of each.

    A GPT-2 with random weights, whatever the policy.
    """
    for varied, all_values in VARIED.items():
        values = all_values[:2] if quick else all_values
        times = [sampling_time(device, **START | {varied: value}) for value in values]
        exponent, _ = np.polyfit(np.log(values), np.log(times), 1).tolist()
        spent = ", ".join(f"{time:.2f}" for time in times)
        others = {name: value for name, value in START.items() if name != varied}
        setting = f"{varied} {values}: {spent} s; {others}"
        yield dict(ours=exponent, theirs=1.0, ratio=exponent, unit="exponent", setting=setting)


def sampling_time(device: torch.device, K: int, prompts: int, length: int, layers: int) -> float:
    _, tokenizer = load_policy("reviews")
    model = random_model("gpt2", 192, layers, heads=3, vocabulary=len(tokenizer)).to(device)
    texts = load_prompts("reviews")[:prompts]
    work = partial(sample, model, tokenizer, texts, max_new_tokens=length, seed=0)
    work(num_samples=2)  # a warm-up
    return seconds(partial(work, num_samples=K))
