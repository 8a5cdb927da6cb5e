"""A model with the tokens that a kind of text needs, and no others: its tokenizer and embeddings, cut."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer


def prune(model: nn.Module, tokenizer, texts: list[str], size: int, folder: Path) -> tuple[nn.Module, object]:
    """The model, changed in place, and a tokenizer with the `size` tokens that the texts use most.

    BPE or WordPiece. A token stays with those that it is merged from, letters and special tokens always stay: every text
    can still be written, in more tokens where one is gone. What is left has the order of its old ids, so that a text
    whose tokens are all left is cut as before. Writes the tokenizer to `folder`.
    """
    tokenizer.save_pretrained(folder)
    core = json.loads((folder / "tokenizer.json").read_text())
    vocab, bpe = tokenizer.get_vocab(), core["model"]["type"] == "BPE"
    parts = {"".join(pair): pair for pair in core["model"].get("merges", [])}
    names = {i: token for token, i in vocab.items()}
    kept = {names[i] for i in tokenizer.all_special_ids}
    kept |= {token for token in vocab if len(token if bpe else token.removeprefix("##")) == 1
             and (bpe or token.isascii())}

    def add(token: str):
        if token not in kept:
            kept.add(token)
            for part in parts.get(token, ()):
                add(part)

    counts = Counter(i for ids in tokenizer(texts)["input_ids"] for i in ids)
    for i, _ in counts.most_common():
        if len(kept) >= size:
            break
        add(names[i])
    order = sorted(kept, key=vocab.get)
    new = {token: i for i, token in enumerate(order)}
    core["model"]["vocab"] = {token: new[token] for token in order if token in core["model"]["vocab"]}
    if bpe:
        core["model"]["merges"] = [pair for pair in core["model"]["merges"] if "".join(pair) in kept]
    core["added_tokens"] = [token | {"id": new[token["content"]]} for token in core["added_tokens"]
                            if token["content"] in kept]
    for token in ((core["post_processor"] or {}).get("special_tokens") or {}).values():
        token["ids"] = [new[name] for name in token["tokens"]]
    core["padding"] = core["truncation"] = None
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    small = AutoTokenizer.from_pretrained(folder)
    rows = [vocab[token] for token in order]
    for get, put in ((model.get_input_embeddings, model.set_input_embeddings),
                     (model.get_output_embeddings, model.set_output_embeddings)):
        if get() is not None:
            layer = get()
            layer.weight = nn.Parameter(layer.weight.detach()[rows].clone())
            if isinstance(layer, nn.Embedding):
                layer.num_embeddings, layer.padding_idx = len(rows), None
            else:
                layer.out_features = len(rows)
    model.config.vocab_size = len(rows)
    model.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        for config in (model.config, getattr(model, "generation_config", None)):
            if config is not None and hasattr(config, name):
                setattr(config, name, getattr(small, name))
    return model, small
