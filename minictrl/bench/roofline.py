"""Decoding on a GPU, against the time that its memory needs to move the bytes (the roofline)."""

from collections.abc import Iterator
from functools import partial

import torch

from minictrl.bench.sampling import K
from minictrl.bench.timing import LeftOut, describe, random_model, seconds
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts
from minictrl.models import load_policy
from minictrl.sampling import sample

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # bytes/s, SXM, 80 GB or more
SHORT, LONG = 64, 128  # response tokens


def decode_roofline(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """% of the memory's rate that a decode step of K rows for each of 16 prompts reaches.

    A GPT-2 with 1.09 B random weights in bfloat16, whatever the policy; 4 prompts with --quick.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    known = [name for name in BANDWIDTH if name in gpu]
    if not known:
        raise LeftOut(f"needs a GPU whose memory's rate is known: {', '.join(BANDWIDTH)}")
    _, tokenizer = load_policy("reviews")
    model = random_model("gpt2", 1792, 28, heads=28, vocabulary=len(tokenizer))
    model.to(device, torch.bfloat16)
    texts = load_prompts("reviews")[: 4 if quick else 16]
    share = decode_rate(model, tokenizer, texts) / BANDWIDTH[known[0]]
    setting = f"{describe('random GPT-2', model)}, bfloat16, {K * len(texts)} rows decoded together"
    unit = "% of the memory's rate"
    yield dict(ours=100 * share, theirs=100.0, ratio=share, unit=unit, setting=setting)


def decode_rate(model, tokenizer, texts: list[str]) -> float:
    """Bytes per second that a decode step of a GPT-2 has to read, with K rows per text.

    It reads the weights, the keys and values of each prompt once, and those of each row, here of
    the mean length. The time of a step is from the difference between two lengths, so that reading
    the prompts is not in it.
    """
    rows = K * len(texts)

    def time(T: int) -> float:
        drawn = {"num_samples": K, "max_new_tokens": T, "batch_size": rows}
        work = partial(sample, model, tokenizer, texts, seed=0, **drawn)
        return min(seconds(work) for _ in range(3))

    step = (time(LONG) - time(SHORT)) / (LONG - SHORT)
    prompt_tokens = sum(map(len, encode_prompts(tokenizer, texts)))
    tokens = prompt_tokens + rows * (SHORT + LONG) / 2
    per_token = 2 * model.config.num_hidden_layers * model.config.hidden_size
    numbers = model.num_parameters() + tokens * per_token
    return numbers * model.dtype.itemsize / step
