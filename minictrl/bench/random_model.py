"""Policies with random weights: any shape, and nothing to download."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM


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
