"""How the time of calibration grows with its work: 1 is in proportion."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from minictrl.bench.random_model import random_gpt2
from minictrl.bench.timing import seconds
from minictrl.data import load_prompts
from minictrl.models import load_policy, load_scorer
from minictrl.rollout import score
from minictrl.sampling import sample

START = {"K": 100, "prompts": 8, "length": 24, "depth": 3}
VARIED = {
    "K": (10, 30, 100, 300, 1000),
    "prompts": (2, 8, 32, 128),
    "length": (8, 16, 32, 64, 128),
    "depth": (2, 4, 6, 8, 12),  # 1 to 89 M parameters
}


def growth(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """The exponent e of time ~ work^e, one row for each of VARIED; --quick takes two values.

    Random GPT-2s of width 64 depth sample, and the embedded reward model scores.
    """
    for varied, values in VARIED.items():
        points = [START | {varied: value} for value in (values[:2] if quick else values)]
        sizes, times = zip(*(measure(device, **point) for point in points))
        x = sizes if varied == "depth" else [point[varied] for point in points]
        exponent = float(np.polyfit(np.log(x), np.log(times), 1)[0])
        spent = ", ".join(f"{a:,} {b:.2f} s" for a, b in zip(x, times))
        setting = f"time against {'parameters' if varied == 'depth' else varied}: {spent}"
        yield dict(ours=exponent, theirs=1.0, ratio=exponent, unit="exponent", setting=setting)


def measure(device: torch.device, K: int, prompts: int, length: int, depth: int):
    """(parameters, seconds) of sampling and scoring."""
    _, tokenizer = load_policy("reviews")
    model, reward = random_gpt2(depth, tokenizer).to(device), load_scorer("reviews", "reward")
    texts = load_prompts("reviews")[:prompts]

    def calibrate(M: int) -> None:
        samples = sample(model, tokenizer, texts, num_samples=M, max_new_tokens=length, seed=0)
        score(reward, texts, samples.texts)

    calibrate(2)  # a warm-up
    return model.num_parameters(), seconds(lambda: calibrate(K))
