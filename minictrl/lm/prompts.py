"""Prompts as token ids, and what ends a response."""

import torch
from torch import Tensor


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, with the special tokens the tokenizer adds by itself (BOS), but
    never BOS twice: a prompt that a chat template has written already begins with it. Raises
    ValueError on no prompts, text or token."""
    if not prompts:
        raise ValueError("no prompts: give a list of at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {i} is {type(prompt).__name__}: must be text (render chat messages first)"
            )
    bos = tokenizer.bos_token
    ids = [
        tokenizer(p, add_special_tokens=not (bos and p.startswith(bos)))["input_ids"]
        for p in prompts
    ]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(
                f"prompt {i} ({prompts[i]!r}) has no tokens: a prompt needs at least one"
            )
    return ids


def left_pad(ids: list[list[int]], pad: int, device=None) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (N, P) int64, padded on the left to the longest."""
    P = max(map(len, ids))
    rows = torch.tensor([[pad] * (P - len(r)) + list(r) for r in ids], device=device)
    return rows, torch.tensor([[0] * (P - len(r)) + [1] * len(r) for r in ids], device=device)


def eos_ids(model, tokenizer) -> Tensor:
    """Every token that ends a response: the tokenizer's EOS and the generation config's (chat
    models have two).
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(ids if isinstance(ids, (list, tuple)) else [ids]) | {tokenizer.eos_token_id}
    ids = sorted(i for i in ids if i is not None)
    if not ids:
        raise ValueError(
            "the tokenizer has no eos_token: set tokenizer.eos_token, or no response can end"
        )
    return torch.tensor(ids)


def check_lengths(model, prompts, ids, max_new_tokens: int) -> None:
    """Raise ValueError on a prompt that does not leave room for the response in the model's
    context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context and len(ids[longest]) + max_new_tokens > context:
        raise ValueError(
            f"prompt {longest} ({prompts[longest][:40]!r}…) has {len(ids[longest])} tokens; with "
            f"max_new_tokens={max_new_tokens} that is more than the model's context of {context}: "
            "shorten the prompt or the response"
        )
