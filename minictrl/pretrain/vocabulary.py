"""A model with the tokens that a kind of text needs, and no others."""

import json
from collections import Counter
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer


def prune(
    model: nn.Module, tokenizer, texts: list[str], size: int, folder: Path
) -> tuple[nn.Module, object]:
    """The model, changed in place, with the `size` tokens that the texts use most; its tokenizer.

    BPE or WordPiece. A token stays with those it is merged from; letters and special tokens always
    stay: every text can still be written, in more tokens where one is gone. A text all of whose
    tokens are left is cut as before. Writes the tokenizer to `folder`.
    """
    tokenizer.save_pretrained(folder)
    core = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab, bpe = tokenizer.get_vocab(), core["model"]["type"] == "BPE"
    order = sorted(kept_tokens(tokenizer, core, texts, size), key=vocab.get)
    new = {token: i for i, token in enumerate(order)}
    old = core["model"]["vocab"]
    core["model"]["vocab"] = {token: i for token, i in new.items() if token in old}
    if bpe:
        core["model"]["merges"] = [x for x in core["model"]["merges"] if "".join(x) in new]
    core["added_tokens"] = [
        token | {"id": new[token["content"]]}
        for token in core["added_tokens"]
        if token["content"] in new
    ]
    for token in ((core["post_processor"] or {}).get("special_tokens") or {}).values():
        token["ids"] = [new[name] for name in token["tokens"]]
    core["padding"] = core["truncation"] = None
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    small = AutoTokenizer.from_pretrained(folder)
    keep_rows(model, [vocab[token] for token in order])
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            if hasattr(config, name):
                setattr(config, name, getattr(small, name))
    return model, small


def kept_tokens(tokenizer, core: dict, texts: list[str], size: int) -> set[str]:
    """Special tokens, letters (of WordPiece those of ASCII), then the most frequent ones."""
    vocab, bpe = tokenizer.get_vocab(), core["model"]["type"] == "BPE"
    parts = {"".join(pair): pair for pair in core["model"].get("merges", [])}
    names = {i: token for token, i in vocab.items()}
    kept = {names[i] for i in tokenizer.all_special_ids}
    kept |= {token for token in vocab if len(token) == 1 and (bpe or token.isascii())}
    kept |= {f"##{token}" for token in kept} & set(vocab)

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
    return kept


def keep_rows(model: nn.Module, rows: list[int]):
    """These rows of the embeddings, and of the head of a language model."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    table.weight = nn.Parameter(table.weight.detach()[rows].clone())
    table.num_embeddings, table.padding_idx = len(rows), None
    if head is not None:
        head.weight = table.weight if tied else nn.Parameter(head.weight.detach()[rows].clone())
        head.out_features = len(rows)
    model.config.vocab_size = len(rows)
