"""What a model computes depends on, beside its weights: its config and its tokenizer."""

import json

# of a config: where it came from, not what it computes
PROVENANCE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}


def config_of(model) -> dict:
    """A model's config without what says only where it came from."""
    config = model.config.to_dict()
    return {name: value for name, value in config.items() if name not in PROVENANCE}


def tokenizer_of(tokenizer) -> list:
    """All that turns text into ids and back: vocabulary and rules, special tokens, length limit.

    The state that the last call left (truncation, padding) is no part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules = {name: x for name, x in rules.items() if name not in ("truncation", "padding")}
    return [
        rules,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.model_max_length,
        getattr(tokenizer, "clean_up_tokenization_spaces", None),
    ]
