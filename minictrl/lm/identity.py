"""What a model computes depends on, beside its weights: its config and its tokenizer."""

import json

# of a config: where it came from, not what it computes
PROVENANCE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}


def identity(model, tokenizer) -> tuple[dict, list]:
    """(a model's config without what says only where it came from; all that turns text into ids and
    back, without the truncation and padding that the last call left).
    """
    config = {name: x for name, x in model.config.to_dict().items() if name not in PROVENANCE}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules = {name: x for name, x in rules.items() if name not in ("truncation", "padding")}
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    texts = [tokenizer.special_tokens_map, tokenizer.chat_template]
    return config, [rules, *texts, tokenizer.model_max_length, cleans]
