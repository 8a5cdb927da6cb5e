"""Prompts and texts as a model reads them, and the scores of many texts in batches."""

import json
import re
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging

from minictrl.data import Prompt
from minictrl.lm.device import halving, resident
from minictrl.lm.hub import from_hub
from minictrl.lm.prompts import Rendered, check_ids, known_ids, without_eos
from minictrl.messages import first_line

logging.set_verbosity_error()
logging.disable_progress_bar()

# Tokens that a scorer reads at a time: what a GPU fills (halved when it runs out of memory), and
# what stays in a CPU's cache.
BATCH_TOKENS = {"cuda": 16_384, "cpu": 4_096}


PATIENCE = 10  # seconds for a chat template
DATE = date(2024, 7, 26)  # a template's today, Llama 3.2's default: the real one would move rewards
CLOCK = re.compile(r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)""")  # in a template


def render(tokenizer, prompt: Prompt, /, **template_args) -> str:
    """The prompt as the tokenizer's model reads it: a text as it is, chat messages by its template,
    or else as HH's; control tokens in either are text (`as_text`).
    """
    prompt = as_text(tokenizer, prompt)
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return plain(prompt)
    return Rendered(chat(tokenizer, prompt, **{"add_generation_prompt": True} | template_args))


def as_text(tokenizer, prompt: Prompt) -> Prompt:
    """A prompt in which what the tokenizer reads as a control token is text: it ends no turn and
    opens none.

    A zero-width space goes behind the first character of each. A control token of one character
    can't be told from it, nor can a template's marks that are no tokens.
    """
    if not isinstance(prompt, str):
        return [m | {"content": as_text(tokenizer, m["content"])} for m in prompt]
    return re.sub(control_tokens(tokenizer), lambda m: f"{m[0][0]}\u200b{m[0][1:]}", prompt)


@lru_cache(maxsize=8)
def control_tokens(tokenizer) -> str:
    """A pattern of the tokenizer's special tokens, the longest first; as it is when first asked."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {*tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
    longest_first = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def plain(prompt: Prompt) -> str:
    """Chat messages as HH-RLHF writes them, for a model without a template: "\\n\\nHuman: …
    \\n\\nAssistant:".
    """
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    mark = rf"\n\n(?=({'|'.join(names.values())}):)"  # in a message it is text
    turns = [(names[m["role"]], re.sub(mark, "\n\n\u200b", m["content"])) for m in prompt]
    return "".join(f"\n\n{name}: {content}" for name, content in turns) + "\n\nAssistant:"


def chat(tokenizer, messages: list[dict], /, **options) -> str:
    """The messages as the tokenizer's template writes them on DATE, in transformers' sandbox: it
    reads no file. Raises ValueError if it fails, or takes more than PATIENCE seconds.
    """
    try:
        template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        template = CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), template)
        told = {"date_string": DATE.strftime("%d %b %Y")} | options | {"chat_template": template}
        with at_most(PATIENCE):
            return tokenizer.apply_chat_template(messages, tokenize=False, **told)
    except Exception as error:  # whatever the template does
        roles = ", ".join(m["role"] for m in messages)
        args = {name: x for name, x in options.items() if name != "add_generation_prompt"}
        given = f" with --template-args {json.dumps(args)}" if args else ""
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} fails on messages of {roles}{given} "
            f"({first_line(error)}): change {'the flag, ' if given else ''}the messages, or take "
            "the template out of its tokenizer_config.json"
        ) from None


@contextmanager
def at_most(seconds: float):
    """Raises TimeoutError in what takes longer; in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def spaced(prompt: Prompt, text: str) -> str:
    """A response as it follows a prompt without a template: messages and it are a space apart."""
    return text if isinstance(prompt, str) else " " * bool(text) + text.lstrip()


def written(tokenizer, prompt: Prompt, text: str, *, causal: bool) -> str | tuple[str, str]:
    """Prompt and response as a classifier reads them.

    In its chat template, if it has one. Else a text prompt goes on as the response. Chat messages
    and the answer are one text for a causal model, and a pair of texts for an encoder, as such
    models are trained: `tokenizer(question, answer)`. A causal model also gets EOS, where it is
    read.
    """
    prompt, text = as_text(tokenizer, prompt), as_text(tokenizer, text)
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
    return plain(prompt) + spaced(prompt, text) + (tokenizer.eos_token or "" if causal else "")


def encoded(
    tokenizer, texts: list[str | tuple[str, str]], *, truncation: bool = True
) -> list[dict[str, list[int]]]:
    """A dict per text: its token ids, and where there are pairs which of the two a token is of.

    A text that `written` has closed has one EOS, although the tokenizer may put its own behind.
    """
    special = not tokenizer.chat_template  # a template writes BOS and the like itself
    options = dict(add_special_tokens=special, truncation=truncation)
    kinds = {type(text) for text in texts}
    names = ["input_ids", "token_type_ids"] if tuple in kinds else ["input_ids"]
    if len(kinds) > 1:
        rows = [tokenizer([x], **options) for x in texts]  # a list, which pairs "" as well
        return [{name: row[name][0] for name in names if name in row} for row in rows]
    columns = tokenizer(texts, **options) if texts else {}
    columns = {name: columns[name] for name in names if name in columns}
    if kinds == {str} and special:
        pairs = zip(texts, columns["input_ids"], strict=True)
        columns["input_ids"] = [once_closed(tokenizer, text, ids) for text, ids in pairs]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def once_closed(tokenizer, text: str, ids: list[int]) -> list[int]:
    """The token ids of a text; one that ends with EOS gets no other from the tokenizer."""
    closed = tokenizer.eos_token and text.endswith(tokenizer.eos_token)
    return without_eos(tokenizer, text, ids) if closed else ids


def longest_text(model: nn.Module, tokenizer) -> int:
    """Tokens that a scorer can read at once."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 0
    longest = longest if longest > 0 else tokenizer.model_max_length  # XLNet has -1
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            longest = len(module.weight) - padding - 1  # RoBERTa counts from there
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
    try:
        model.get_input_embeddings()
    except NotImplementedError:  # CANINE reads characters
        raise ValueError(
            f"{role} model {name}: a {type(model).__name__} has no row for each token; give another"
        ) from None
    tokenizer.model_max_length = longest_text(model, tokenizer)
    if "attention_mask" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    tokenizer.pad_token = (
        padding_of(model, tokenizer)
        or tokenizer.pad_token
        or tokenizer.unk_token
        or tokenizer.eos_token
    )
    known = known_ids(model)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= known:
        raise ValueError(
            f"{role} model {name}: its tokenizer has no pad, UNK or EOS token that the model "
            "knows; set pad_token in its tokenizer_config.json"
        )
    # a causal classifier reads the last token that isn't it
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def padding_of(model: nn.Module, tokenizer) -> str | None:
    """The token that a model's config pads with; None if it names none that a text can have."""
    given = getattr(model.config.get_text_config(), "pad_token_id", None)
    known = min(len(tokenizer), known_ids(model))
    in_text = given is not None and 0 <= given < known
    return tokenizer.convert_ids_to_tokens(given) if in_text else None


def is_causal(model: nn.Module) -> bool:
    """Whether a scorer is a causal model: it has a score head, or an LM's."""
    return getattr(model, "score", None) is not None or model.get_output_embeddings() is not None


def set_precision(model: nn.Module, device: torch.device) -> None:
    """float32; bfloat16 of a causal model on a GPU, but for a score head, whose scores would be
    tied, and for what is no parameter, such as rotary frequencies.
    """
    if device.type != "cuda" or not is_causal(model):
        model.float()
        return
    for name, p in model.named_parameters():
        p.data = p.data.float() if name.startswith("score.") else p.data.bfloat16()


def in_batches(
    model: nn.Module, tokenizer, device: torch.device, rows: list[dict], read: Callable
) -> Tensor:
    """read(inputs) -> (B,) of all rows of token ids (`encoded`), in batches alike in length."""
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

    return by_length(model, device, lengths, read_rows)


@torch.inference_mode()
def by_length(model: nn.Module, device: torch.device, lengths: list[int], read: Callable) -> Tensor:
    """read(rows) -> (len(rows), …) of all rows, float32 on the CPU, in batches alike in length."""
    if not lengths:
        return torch.zeros(0)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts, budget, first = [], BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]), 0
    too_small = f"out of memory with one text of {model.name_or_path}: use a smaller scorer, "
    too_small += "or --device cpu"

    def read_next(size: int) -> Tensor:
        return read(order[first : first + size]).float().cpu()

    with resident(model, device):
        while first < len(order):
            longest = max(1, lengths[order[first]])
            size = min(max(1, budget // longest), len(order) - first)
            scores, fitting = halving(size, read_next, too_small)
            parts.append(scores)
            first += fitting
            if fitting < size:
                budget = fitting * longest
    return torch.cat(parts)[torch.tensor(order).argsort()]
