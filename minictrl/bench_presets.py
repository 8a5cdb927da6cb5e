"""The GPU presets at their own shapes, with random weights: nothing to download.

Each preset's policy (its architecture, in bfloat16) samples K = 100 responses per prompt, against transformers'
generate; then one update of 64 responses in float32, as train.py makes it. `python -m minictrl.bench --rows presets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from minictrl.bench_scaling import GPUS, seconds
from minictrl.data import load_prompts
from minictrl.methods import online_loss
from minictrl.models import load_policy
from minictrl.sampling import encode_prompts, left_pad, sample
from minictrl.update import freeze, make_learner, update

K = 100  # samples per prompt
B, ROWS = 4, 64  # prompts that are sampled for, responses of an update


def llama(config_class, width: int, layers: int, heads: int, kv: int, inner: int, V: int):
    return config_class(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=inner,
        vocab_size=V,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def neox(width: int, layers: int, heads: int, inner: int, V: int):
    return GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=V,
        max_position_embeddings=2048,
    )


# Name -> (the policy's architecture, prompt tokens, response tokens), the shapes of their published configs.
SHAPES = {
    "SmolLM2-135M": (llama(LlamaConfig, 576, 30, 9, 3, 1536, 49152), 16, 24),
    "helpful, Qwen2.5-0.5B": (llama(Qwen2Config, 896, 24, 14, 2, 4864, 151936), 128, 64),
    "harmless, SmolLM2-360M": (llama(LlamaConfig, 960, 32, 15, 5, 2560, 49152), 128, 64),
    "tldr, Pythia-1B": (neox(2048, 16, 8, 8192, 50304), 400, 53),
}


def preset_rows(device: torch.device, quick: bool) -> Iterator[dict] | str:
    """One row per shape, as soon as it is measured: response tokens per second of `sample` and of
    `generate`, and the update's rate and memory. Responses are cut at 64 tokens, which keeps a
    row under a minute."""
    if device.type != "cuda":
        return "needs a GPU"
    names = list(SHAPES)[:1] if quick else list(SHAPES)
    return (one_shape(name, device) for name in names)


def one_shape(name: str, device: torch.device) -> dict:
    config, length, T = SHAPES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    _, tokenizer = load_policy("reviews")
    texts = long_prompts(tokenizer, length)
    ids, mask = left_pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id, device)

    def ours() -> None:
        sample(model, tokenizer, texts, num_samples=K, max_new_tokens=T, seed=0)

    def theirs() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=K,
            min_new_tokens=T,
            max_new_tokens=T,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )

    torch.cuda.reset_peak_memory_stats(device)
    spent = [best_of_two(work) for work in (ours, theirs)]
    memory = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    rate, mfu, update_memory = one_update(model.float(), ids.shape[1], T, device)
    tokens = B * K * T
    return {
        "ours": tokens / spent[0],
        "theirs": tokens / spent[1],
        "ratio": spent[1] / spent[0],
        "unit": "tokens/s",
        "setting": (
            f"{name}, {model.num_parameters() / 1e6:.0f} M random weights, bfloat16, "
            f"{torch.cuda.get_device_name(device)}, {B} prompts of {ids.shape[1]} tokens, K = {K}, {T} new tokens, "
            f"peak {memory:.1f} GB; an update of {ROWS} responses in float32: {rate:.0f} tokens/s, "
            f"MFU {100 * mfu:.0f} % of float32's rate, peak {update_memory:.1f} GB"
        ),
    }


def long_prompts(tokenizer, length: int) -> list[str]:
    """B texts of about `length` tokens: prompts of the embedded task in a row."""
    prompts = load_prompts("reviews")
    per_prompt = len(encode_prompts(tokenizer, [" ".join(prompts[:20])])[0]) / 20
    count = max(1, round(length / per_prompt))
    return [" ".join(prompts[i * count : (i + 1) * count]) for i in range(B)]


def best_of_two(work) -> float:
    """Seconds of the faster of two calls: the first warms up."""
    return min(seconds(work) for _ in range(2))


def one_update(model, length: int, T: int, device: torch.device) -> tuple[float, float, float]:
    """(tokens per second, share of the card's float32 rate, peak GB) of one optimizer step on ROWS responses."""
    freeze(model, None)
    V = model.config.vocab_size
    ids = torch.randint(V, (ROWS, length + T), device=device)
    ones = torch.ones(ROWS, T, device=device)
    rows = {
        "prompt": ids[:, :length],
        "prompt_mask": torch.ones(ROWS, length, device=device, dtype=torch.long),
        "tokens": ids[:, length:],
        "mask": ones,
        "old_logprobs": -ones,
        "advantages": ones,
        "returns": ones,
    }
    learner = make_learner(model, value_head=True)
    loss = partial(online_loss, clip=0.2)
    options = {"lr": 1e-6, "minibatch": ROWS, "micro_batch": 16, "epochs": 1, "seed": 0}
    spent = best_of_two(lambda: update(learner, rows, loss, **options))
    known = [name for name in GPUS if name in torch.cuda.get_device_name(device)]
    flops = GPUS[known[-1]][2] if known else float("nan")
    mfu = 6 * model.num_parameters() * ids.numel() / spent / flops
    return ids.numel() / spent, mfu, torch.cuda.max_memory_allocated(device) / 1e9
