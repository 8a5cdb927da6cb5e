"""Prompts as token ids, and what ends a response."""

import torch
from torch import Tensor

LONGEST_CHARACTER = 4  # bytes, which may be a token each


class Rendered(str):
    """A text that a chat template has written, with BOS if it is to have one; with more behind it
    it is one still.
    """

    def __add__(self, text: str) -> "Rendered":
        return Rendered(super().__add__(text))


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, with the special tokens that the tokenizer puts before a text by
    itself (BOS), but not before a `Rendered` one, nor where it already begins with BOS. An EOS that
    it puts behind is left out, because the response is to follow. Raises ValueError on no prompts,
    text or token.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts[:40]!r}: give a list of texts")
    if not prompts:
        raise ValueError("no prompts: give a list of at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {i} is {type(prompt).__name__}: must be text (render chat messages first)"
            )
        check_text(f"prompt {i}", prompt)
    bos = tokenizer.bos_token
    whole = [isinstance(p, Rendered) or (bos and p.startswith(bos)) for p in prompts]
    ids = [tokenizer(p, add_special_tokens=not has)["input_ids"] for p, has in zip(prompts, whole)]
    ids = [without_eos(tokenizer, p, row) for p, row in zip(prompts, ids, strict=True)]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(
                f"prompt {i} ({prompts[i]!r}) has no tokens: a prompt needs at least one"
            )
    return ids


def check_text(name: str, text: str) -> None:
    """Raises ValueError on half a character, a lone surrogate, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text[:60]!r}: holds half a character; take it out") from None


def without_eos(tokenizer, text: str, ids: list[int]) -> list[int]:
    """The token ids of a text, without an EOS that the tokenizer puts behind it."""
    if ids[-1:] != [tokenizer.eos_token_id]:
        return ids
    own = 0  # EOS that the text ends with
    while text.endswith(tokenizer.eos_token * (own + 1)):
        own += 1
    return ids[:-1] if ids[-own - 1 :] == [tokenizer.eos_token_id] * (own + 1) else ids


def left_pad(ids: list[list[int]], pad: int, device=None) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (B, L) int64, padded on the left to the longest."""
    L = max(map(len, ids))
    rows = torch.tensor([[pad] * (L - len(r)) + list(r) for r in ids], device=device)
    return rows, torch.tensor([[0] * (L - len(r)) + [1] * len(r) for r in ids], device=device)


def response_texts(tokenizer, prompt_ids: list[list[int]], responses: list[list[int]]) -> list[str]:
    """The text of each response, as it goes on after its prompt.

    A tokenizer that marks spaces (Llama 2) drops the one that a text begins with, so a response is
    decoded behind the end of its prompt, whose own text is then cut off.
    """
    ends = [tuple(ids[-LONGEST_CHARACTER:]) for ids in prompt_ids]
    known = {end: last_text(tokenizer, end) for end in set(ends)}
    heads = [known[end][1] for end in ends]
    rows = [[*known[end][0], *row] for end, row in zip(ends, responses, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    parted = [i for i, head in enumerate(heads) if not texts[i].startswith(head)]
    for i in parted:  # a character whose bytes are shared by prompt and response
        heads[i], texts[i] = "", tokenizer.decode(responses[i], skip_special_tokens=True)
    return [text[len(head) :] for head, text in zip(heads, texts, strict=True)]


def last_text(tokenizer, ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """(tokens, text) at the end of token ids: the last token, or so many that they are whole
    characters, because some tokens are single bytes.
    """
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[-count:], skip_special_tokens=True)
        if "\ufffd" not in text:
            break
    return ids[-count:], text


def known_ends(model, tokenizer) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS, then those of the generation config
    (chat models have two); without either that of the model's config. Raises ValueError on what is
    no token.
    """
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None and tokenizer.eos_token_id is None:
        given = getattr(model.config, "eos_token_id", None)
    given = given if isinstance(given, (list, tuple)) else [given]
    ids = [i for i in (tokenizer.eos_token_id, *given) if i is not None]
    for i in ids:
        if type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(
                f"{tokenizer.name_or_path}: eos_token_id {i!r} is no token; put it right in "
                "generation_config.json, or in config.json if there is none"
            )
    return ids


def eos_ids(model, tokenizer) -> Tensor:
    """`known_ends`, each once, in order. Raises ValueError if there are none."""
    ids = known_ends(model, tokenizer)
    if not ids:
        raise ValueError(
            "the tokenizer has no eos_token: set tokenizer.eos_token, or no response can end"
        )
    return torch.tensor(sorted(set(ids)))


def known_ids(model) -> int:
    """How many token ids a model's embedding has a row for."""
    return len(model.get_input_embeddings().weight)


def check_ids(model, tokenizer, ids: list[list[int]]) -> None:
    """Raise ValueError on a token that the model's embedding lacks."""
    known = known_ids(model)
    largest = max((i for row in ids for i in row), default=0)
    if largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer writes {token!r} as token {largest}, and the "
            f"model knows {known}: give the model its own tokenizer"
        )


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
            "shorten it or the response (train.py: --max-prompt-tokens leaves it out, "
            "--max-new-tokens cuts the response)"
        )
