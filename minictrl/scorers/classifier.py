"""A sequence classifier as a reward model or judge.

A causal one is read where the text ends, and so it can read every prefix of a response in one
forward pass: `prefix_scores`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from minictrl.data import Prompt
from minictrl.lm.hub import from_hub
from minictrl.lm.prompts import left_pad
from minictrl.scorers.text import (
    by_length,
    encoded,
    in_batches,
    once_closed,
    scorer_tokenizer,
    written,
)

GAP = " \0"  # in a response's place; a chat template may strip its space
# a label's logit is by itself its log-odds, or its score
APART = ("multi_label_classification", "regression")


def load_classifier(name: str, role: str, label: str, device: torch.device):
    """(model, tokenizer, evaluate, prefixes): evaluate(prompts, texts) gives (B,) scores.

    prefixes(prompts, tokens, mask) is that of `prefix_scores`, None where the model isn't causal.
    """
    model = from_hub(AutoModelForSequenceClassification, f"{role} model", name, dtype="auto").eval()
    head = getattr(model, "score", None)  # of a causal model, read at the last token
    named = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokenizer = scorer_tokenizer(model, name, role)
    # where the config names no padding token of the tokenizer's, transformers can't find the end
    at_end = head is not None and tokenizer.pad_token_id != named
    padding = None if at_end else tokenizer.pad_token_id
    names = model.config.id2label
    labels = [str(names.get(i, f"LABEL_{i}")) for i in range(model.config.num_labels)]
    if label not in (labels if len(labels) > 1 else ["", *labels]):
        raise ValueError(
            f"{role} model {name}: has {len(labels)} labels ({', '.join(labels)}), not one score; "
            f"give {name}#{labels[-1]} for the log-odds of a label, or another model"
        )
    if head is not None:  # in float32 where the model isn't: `set_precision`
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    def of_logits(logits: Tensor) -> Tensor:  # (…, labels) -> (…)
        logits, this = logits.float(), labels.index(label) if label else 0
        if len(labels) == 1 or model.config.problem_type in APART:
            return logits[..., this]
        others = torch.cat([logits[..., :this], logits[..., this + 1 :]], -1)
        return logits[..., this] - others.logsumexp(-1)

    def read(inputs: dict[str, Tensor]) -> Tensor:
        if not at_end:
            return of_logits(model(**inputs).logits)
        states = model.base_model(**inputs).last_hidden_state  # (B, L, D)
        last = inputs["attention_mask"].sum(1) - 1
        return of_logits(head(states[torch.arange(len(last)), last]))

    def evaluate(prompts: list[Prompt], texts: list[str]) -> Tensor:
        pairs, causal = zip(prompts, texts, strict=True), head is not None
        whole = [written(tokenizer, x, y, causal=causal) for x, y in pairs]
        return in_batches(model, tokenizer, device, encoded(tokenizer, whole), read)

    def prefixes(
        prompts: list[Prompt], tokens: Tensor, mask: Tensor, *, trial: bool = False
    ) -> Tensor:
        around = surroundings(tokenizer, prompts, padding)
        # a policy's embeddings may have rows beyond its tokens, which read as nothing
        tokens = tokens.where(tokens < len(tokenizer), tokenizer.pad_token_id)
        scores = prefix_scores(model, tokenizer, device, of_logits, around, tokens, mask)
        if trial:
            ids = [a + y + b for (a, b), y in zip(around, tokens[:, :-1].tolist(), strict=True)]
            rows = [{"input_ids": row[-tokenizer.model_max_length :]} for row in ids]
            alone = in_batches(model, tokenizer, device, rows, read)
            check_alone(scores, alone, model.dtype)
        return scores

    return model, tokenizer, evaluate, None if head is None else prefixes


# --- every prefix of a response at once ---


def check_alone(scores: Tensor, alone: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if the last of a response's scores (B, T) isn't that of its tokens read
    alone (B,), to the rounding of the model's dtype.
    """
    off = (scores[:, -1] - alone).abs()
    if off.max() > torch.finfo(dtype).eps ** 0.5 * max(1, scores.abs().max()):
        i = off.argmax()
        raise ValueError(
            f"a response scores {scores[i, -1]:.4g} among its prefixes and {alone[i]:.4g} alone"
        )


def prefix_scores(
    model: nn.Module,
    tokenizer,
    device: torch.device,
    of_logits: Callable[[Tensor], Tensor],
    around: list[tuple[list[int], list[int]]],
    tokens: Tensor,
    mask: Tensor,
) -> Tensor:
    """(B, T): [b, t] is the score of the first t tokens of response b; behind its end, of none.

    around: what stands before and behind each response. tokens, mask: (B, T) responses in the
    model's own tokens. The scores are those of the text, if it is cut into the same tokens when it
    is read again: a policy may also have drawn "mo" and "vie" where the text has "movie". A prompt
    that with the response is too long for the model's context loses its beginning. Raises
    ValueError if the response alone is.
    """
    T, S = tokens.shape[1], len(around[0][1])
    room = tokenizer.model_max_length - (T - 1) - S
    if room < 1:
        raise ValueError(
            f"reward model {tokenizer.name_or_path}: its context of {tokenizer.model_max_length} "
            f"tokens is shorter than a response of {T}; use --baseline loo"
        )
    heads, tails = [head[-room:] for head, _ in around], torch.tensor([tail for _, tail in around])
    longest = max(map(len, heads)) + T - 1 + S
    if longest > (window := window_of(model)):
        raise ValueError(
            f"reward model {tokenizer.name_or_path}: its layers see {window:g} tokens back, and a "
            f"prompt with its response has up to {longest}; use --baseline loo"
        )
    tokens, tails, lengths = tokens.to(device), tails.to(device), mask.sum(1).int().tolist()

    def read(rows: list[int]) -> Tensor:
        longest = max(lengths[i] for i in rows)
        head, head_mask = left_pad([heads[i] for i in rows], tokenizer.pad_token_id, device)
        sees, positions, at = prefix_layout(head_mask, longest, S)
        bias = torch.zeros(sees.shape, dtype=model.dtype, device=device)
        bias = bias.masked_fill(~sees, torch.finfo(model.dtype).min)[:, None]  # (n, 1, L, L)
        ids = [head, tokens[rows, : longest - 1], tails[rows].repeat(1, longest)]
        states = model.base_model(
            torch.cat(ids, 1).long(), attention_mask=bias, position_ids=positions, use_cache=False
        ).last_hidden_state
        scores = of_logits(model.score(states[:, at]))  # (n, longest)
        return nn.functional.pad(scores, (0, T - longest))

    sizes = [len(head) + (1 + S) * n for head, n in zip(heads, lengths, strict=True)]
    scores = by_length(model, device, sizes, read)
    return torch.where(mask.cpu() > 0, scores, scores[:, :1])


def window_of(model: nn.Module) -> float:
    """How many tokens back every layer sees; infinite without sliding or chunked attention."""
    config = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size")
    return min(getattr(config, name, None) or math.inf for name in names)


def surroundings(
    tokenizer, prompts: list[Prompt], padding: int | None
) -> list[tuple[list[int], list[int]]]:
    """Token ids before and behind a response, as a causal classifier reads it.

    `padding` behind it is not read, be it EOS: the score is then that of the last token before.
    """
    whole = [written(tokenizer, prompt, GAP, causal=True) for prompt in prompts]
    split = (text.rpartition(GAP[1]) for text in whole)  # the last: a prompt may hold one
    parts = [(before.removesuffix(GAP[0]), behind) for before, _, behind in split]
    special = not tokenizer.chat_template  # as in `encoded`
    tokens = tokenizer(["".join(part) for part in parts], add_special_tokens=special)
    around = []
    for i, (ids, (before, behind)) in enumerate(zip(tokens["input_ids"], parts, strict=True)):
        ids = once_closed(tokenizer, before + behind, ids)
        first = tokens.char_to_token(i, len(before))  # of what comes behind
        first, last = len(ids) if first is None else first, len(ids)
        while last > first and ids[last - 1] == padding:
            last -= 1
        around.append((ids[:first], ids[first:last]))
    return around


def prefix_layout(head_mask: Tensor, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each token sees (B, L, L), its position (B, L), and the columns (T,) to read.

    A row is a prompt (B, H), padded on the left, y_1 … y_{T-1}, and for each of the T prefixes the
    S tokens that end a text, which see the prompt, their prefix and themselves.
    """
    device, H = head_mask.device, head_mask.shape[1]
    t, main = torch.arange(T, device=device), H + T - 1
    prefix = t.repeat_interleave(S)  # that an end belongs to: its tokens
    column = torch.arange(main + T * S, device=device)
    sees = torch.cat([column[:main], H - 1 + prefix])[:, None] >= column  # (L, L)
    sees[:, main:] = False
    sees[main:, main:] = torch.block_diag(*T * [torch.ones(S, S, device=device).tril()]) > 0
    real = nn.functional.pad(head_mask, (0, T - 1 + T * S), value=1) > 0  # (B, L)
    sees = sees & real[:, None] | torch.eye(len(column), dtype=torch.bool, device=device)
    positions = torch.cat([column[:main], H + prefix + column[:S].repeat(T)])
    positions = positions - (H - head_mask.sum(1, keepdim=True))
    return sees, positions.clamp(min=0), main + t * S + S - 1 if S else H - 1 + t
