"""Prompts and texts as a model reads them, and the scores of many texts in batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging

from minictrl.data import Prompt
from minictrl.lm.device import out_of_memory, resident
from minictrl.lm.hub import from_hub
from minictrl.lm.prompts import check_ids

logging.set_verbosity_error()
logging.disable_progress_bar()

# Tokens that a scorer reads at a time: what a GPU fills (halved when it runs out of memory), and
# what stays in a CPU's cache.
BATCH_TOKENS = {"cuda": 16_384, "cpu": 4_096}


def render(tokenizer, prompt: Prompt, **template_args) -> str:
    """The prompt as the tokenizer's model reads it: a text as it is, chat messages by its template,
    or else as HH's.
    """
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return plain(prompt)
    return chat(tokenizer, prompt, add_generation_prompt=True, **template_args)


def plain(prompt: Prompt) -> str:
    """Chat messages as HH-RLHF writes them, for a model without a template: "\\n\\nHuman: …
    \\n\\nAssistant:".
    """
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in prompt) + "\n\nAssistant:"


def chat(tokenizer, messages: list[dict], **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} fails on messages of {roles} "
            f"({error}): "
            "change the messages, or take the template out of its tokenizer_config.json"
        ) from None


def written(tokenizer, prompt: Prompt, text: str, *, causal: bool) -> str | tuple[str, str]:
    """Prompt and response as a classifier reads them.

    In its chat template, if it has one. Else a text prompt goes on as the response. Chat messages
    and the answer are one text for a causal model, and a pair of texts for an encoder, as such
    models are trained: `tokenizer(question, answer)`. A causal model also gets EOS, where it is
    read.
    """
    if tokenizer.chat_template:
        if isinstance(prompt, str):
            warnings.warn(
                f"{tokenizer.name_or_path} reads chats, and these prompts are texts that the "
                "policy continues; it reads each as a message, and the response as the answer",
                stacklevel=2,
            )
            prompt = [{"role": "user", "content": prompt}]
        return chat(tokenizer, [*prompt, {"role": "assistant", "content": text}])
    if not causal and not isinstance(prompt, str):
        question = prompt[0]["content"] if len(prompt) == 1 else plain(prompt)
        return question, text
    text = text if isinstance(prompt, str) else " " * bool(text) + text.lstrip()
    return plain(prompt) + text + (tokenizer.eos_token or "" if causal else "")


def encoded(tokenizer, texts: list[str | tuple[str, str]]) -> list[dict[str, list[int]]]:
    """A dict per text: its token ids, and where there are pairs which of the two a token is of."""
    special = not tokenizer.chat_template  # a template writes BOS and the like itself
    options = dict(add_special_tokens=special, truncation=True)
    kinds = {type(text) for text in texts}
    names = ["input_ids", "token_type_ids"] if tuple in kinds else ["input_ids"]
    if len(kinds) > 1:
        rows = [tokenizer(*([x] if isinstance(x, str) else x), **options) for x in texts]
        return [{name: row[name] for name in names if name in row} for row in rows]
    columns = tokenizer(texts, **options) if texts else {}
    columns = {name: columns[name] for name in names if name in columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return [row["input_ids"] for row in encoded(tokenizer, texts)]


def longest_text(model: nn.Module, tokenizer) -> int:
    """Tokens that a scorer can read at once."""
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            longest = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from there
    return min(tokenizer.model_max_length, longest)


def scorer_tokenizer(model: nn.Module, name: str, role: str):
    """Its tokenizer, padding on the right; a text that is too long loses its beginning."""
    tokenizer = from_hub(
        AutoTokenizer,
        f"tokenizer of {role} model",
        name,
        padding_side="right",
        truncation_side="left",
    )
    tokenizer.model_max_length = longest_text(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= known:
        raise ValueError(
            f"{role} model {name}: its tokenizer has no pad, UNK or EOS token that the model "
            "knows; set pad_token in its tokenizer_config.json"
        )
    # a causal classifier reads the last token that isn't it
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def in_batches(
    model: nn.Module, tokenizer, device: torch.device, texts: list, read: Callable
) -> Tensor:
    """read(inputs) -> (B,) of all texts, or pairs of texts, in batches alike in length."""
    rows = encoded(tokenizer, texts)
    lengths = [len(row["input_ids"]) for row in rows]
    check_ids(model, tokenizer, [row["input_ids"] for row in rows])
    if max(lengths, default=0) >= tokenizer.model_max_length:
        warnings.warn(
            f"{tokenizer.name_or_path}: texts of more than {tokenizer.model_max_length} tokens "
            "lose their beginning",
            stacklevel=2,
        )

    def read_rows(part: list[int]) -> Tensor:
        inputs = tokenizer.pad([rows[i] for i in part], return_tensors="pt").to(device)
        return read(dict(inputs))

    return by_length(model, tokenizer, device, lengths, read_rows)


@torch.inference_mode()
def by_length(
    model: nn.Module, tokenizer, device: torch.device, lengths: list[int], read: Callable
) -> Tensor:
    """read(rows) -> (len(rows), …) of all rows, float32 on the CPU, in batches alike in length."""
    if not lengths:
        return torch.zeros(0)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts, budget, first = [], BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]), 0
    with resident(model, device):
        while first < len(order):
            rows = order[first : first + max(1, budget // max(1, lengths[order[first]]))]
            try:
                parts.append(read(rows).float().cpu())
                first += len(rows)
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise ValueError(
                        f"out of memory with one text of {tokenizer.name_or_path}: use a smaller "
                        "scorer, or --device cpu"
                    ) from None
            budget //= 2
    return torch.cat(parts)[torch.tensor(order).argsort()]
