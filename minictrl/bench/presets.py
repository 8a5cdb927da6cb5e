"""Sampling with the GPU presets' policies at their own shapes, against transformers' `generate`.

Random weights in bfloat16, so there is nothing to download. Unit: response tokens per second.
"""

from collections.abc import Iterator

import torch

from minictrl.bench.sampling import against_generate
from minictrl.bench.timing import LeftOut, random_model
from minictrl.data import load_prompts
from minictrl.models import load_policy

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
    """One row per shape, whatever the policy; --quick measures the first."""
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
