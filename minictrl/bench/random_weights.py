"""Sampling from models with random weights, whatever the policy, so that nothing is downloaded: how
its time grows with the work, what it makes of a GPU's memory, and the GPU presets' shapes.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minictrl.bench.sampling import K, against_generate
from minictrl.bench.timing import LeftOut, describe, seconds
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts
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
    """The exponent e of time ~ work^e of a GPT-2, 1 being in proportion, a row for each of VARIED;
    --quick takes two values of each.
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


# --- a GPU ---

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # bytes/s, SXM, 80 GB or more
SHORT, LONG = 64, 128  # response tokens


def decode_roofline(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """% of the memory's rate that a decode step of K rows for each of 16 prompts reaches.

    A GPT-2 with 1.09 B weights in bfloat16; 4 prompts with --quick.
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


# --- the presets ---

PROMPTS = 4
# As published: family, width, layers, heads, vocabulary, key-value heads and width inside the MLP.
# Then how many of the embedded task's prompts make a prompt as long as the preset's (up to 400
# tokens), and the response tokens, cut at 64 to keep a row under a minute.
SHAPES = {
    "SmolLM2-135M": ("llama", 576, 30, 9, 49152, 3, 1536, 2, 24),
    "helpful, Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 151936, 2, 4864, 15, 64),
    "harmless, SmolLM2-360M": ("llama", 960, 32, 15, 49152, 5, 2560, 15, 64),
    "tldr, Pythia-1B": ("gpt_neox", 2048, 16, 8, 50304, 8, 8192, 46, 53),
}


def presets(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """Response tokens per second against transformers' `generate`, in bfloat16, one row per shape;
    --quick measures the first.
    """
    if device.type != "cuda":
        raise LeftOut("needs a GPU")
    _, tokenizer = load_policy("reviews")
    prompts = load_prompts("reviews")
    for name in list(SHAPES)[: 1 if quick else None]:
        *sizes, key_value_heads, inner, joined, T = SHAPES[name]
        model = random_model(
            *sizes,
            num_key_value_heads=key_value_heads,
            intermediate_size=inner,
            max_position_embeddings=2048,
            tie_word_embeddings="neox" not in sizes[0],
        ).to(device, torch.bfloat16)
        texts = [" ".join(prompts[i::PROMPTS][:joined]) for i in range(PROMPTS)]
        name = f"{name}, random weights"
        yield against_generate(name, model, tokenizer, texts, T, ["dynamic"], repeats=1)


# --- models ---


def random_model(family: str, width: int, layers: int, heads: int, vocabulary: int, **others):
    """A causal LM in eval mode. It almost never draws EOS: responses have the full length."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        **others,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model
