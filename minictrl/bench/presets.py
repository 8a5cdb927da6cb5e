"""The GPU presets at their own shapes, with random weights: nothing to download.

Each preset's policy (its architecture, in bfloat16) samples K = 100 responses per prompt, against
transformers' generate; then one update of 64 responses in float32, as train.py makes it. `python -m
minictrl.bench --rows presets`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from minictrl.bench.scaling import generate, known_rates, rate, seconds, update_mfu, update_step
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts
from minictrl.models import load_policy
from minictrl.sampling import sample
from minictrl.update import freeze

K = 100  # samples per prompt
B, ROWS = 4, 64  # prompts that are sampled for, responses of an update


def shape(config_class, width: int, layers: int, heads: int, inner: int, V: int, **others):
    return config_class(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=V,
        max_position_embeddings=2048,
        **others,
    )


def grouped(kv_heads: int) -> dict:
    """What Llama and Qwen2 share: fewer key-value heads, and a head tied to the embedding."""
    return {"num_key_value_heads": kv_heads, "tie_word_embeddings": True}


# Name -> (the policy's architecture, prompt tokens, response tokens), the shapes of their published
# configs.
SHAPES = {
    "SmolLM2-135M": (shape(LlamaConfig, 576, 30, 9, 1536, 49152, **grouped(3)), 16, 24),
    "helpful, Qwen2.5-0.5B": (shape(Qwen2Config, 896, 24, 14, 4864, 151936, **grouped(2)), 128, 64),
    "harmless, SmolLM2-360M": (shape(LlamaConfig, 960, 32, 15, 2560, 49152, **grouped(5)), 128, 64),
    "tldr, Pythia-1B": (shape(GPTNeoXConfig, 2048, 16, 8, 8192, 50304), 400, 53),
}


def preset_rows(device: torch.device, quick: bool) -> Iterator[dict] | str:
    """One row per shape, as soon as it is measured: response tokens per second of `sample` and of
    `generate`, and the update's rate and memory. Responses are cut at 64 tokens, which keeps a
    row under a minute."""
    if device.type != "cuda":
        return "needs a GPU"
    _, tokenizer = load_policy("reviews")
    names = list(SHAPES)[:1] if quick else list(SHAPES)
    return (one_shape(name, tokenizer, device) for name in names)


def one_shape(name: str, tokenizer, device: torch.device) -> dict:
    config, length, T = SHAPES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    texts = long_prompts(tokenizer, length)
    longest = max(map(len, encode_prompts(tokenizer, texts)))
    drawn = {"num_samples": K, "max_new_tokens": T}

    def ours() -> float:
        return float(sample(model, tokenizer, texts, seed=0, **drawn).mask.sum())

    def theirs() -> float:
        return generate(model, tokenizer, texts, B, "dynamic", **drawn)

    torch.cuda.reset_peak_memory_stats(device)
    speed = [best_of_two(work) for work in (ours, theirs)]
    memory = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    model.float()
    freeze(model, None)
    step, tokens = update_step(model, B=ROWS, prompt=longest, T=T, micro_batch=16)
    spent = min(seconds(step) for _ in range(2))
    known = known_rates(device)
    flops = known[1][2] if known else float("nan")
    return {
        "ours": speed[0],
        "theirs": speed[1],
        "ratio": speed[0] / speed[1],
        "unit": "tokens/s",
        "setting": (
            f"{name}, {model.num_parameters() / 1e6:.0f} M random weights, bfloat16, "
            f"{torch.cuda.get_device_name(device)}, {B} prompts of {longest} tokens, K = {K}, {T} new tokens, "
            f"peak {memory:.1f} GB; an update of {ROWS} responses in float32: {tokens / spent:.0f} tokens/s, "
            f"MFU {100 * update_mfu(model, tokens, spent, flops):.0f} % of float32's rate, "
            f"peak {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
        ),
    }


def long_prompts(tokenizer, length: int) -> list[str]:
    """B texts of about `length` tokens: prompts of the embedded task in a row."""
    prompts = load_prompts("reviews")
    per_prompt = len(encode_prompts(tokenizer, [" ".join(prompts[:20])])[0]) / 20
    count = max(1, round(length / per_prompt))
    return [" ".join(prompts[i * count : (i + 1) * count]) for i in range(B)]


def best_of_two(work) -> float:
    """Tokens per second of the faster of two calls: the first warms up."""
    return max(rate(work) for _ in range(2))
