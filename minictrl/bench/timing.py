"""What the rows share: how a row is timed and told."""

import time
from collections.abc import Callable
from statistics import median

import torch


class LeftOut(Exception):
    """A row can't be measured on this machine; the message says what it needs."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rate(work: Callable[[], float]) -> float:
    """Amount of work per second; `work` does it and returns how much it was."""
    amounts = []
    spent = seconds(lambda: amounts.append(work()))
    return amounts[0] / spent


def compare(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> dict:
    """Medians of two rates, which are measured in turn, and of the ratios of neighbours.

    A machine that slows down does so for both neighbours, so their ratio stays.
    """
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    return {
        "ours": median(a for a, _ in pairs),
        "theirs": median(b for _, b in pairs),
        "ratio": median(a / b for a, b in pairs),
    }


def describe(policy: str, model) -> str:
    """The policy, its size and the machine, for a row's setting."""
    name = policy.rpartition("/")[2]
    millions = model.num_parameters() / 1e6
    machine = f"CPU, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        machine = torch.cuda.get_device_name(model.device)
    return f"{name}, {millions:.3g} M parameters, {machine}"
