"""A causal language model as a judge, by the probability of the token it would answer with: no text
is sampled.

Asked about one response (`load_generative`) it is a scorer like any other: `--judge` and `--reward`
take it, and the exact win rates of `winrate.py` hold. Asked which of two is better
(`load_pairwise`) it is no scorer, and a win rate over all pairs of M and M' responses takes 2 M M'
questions a prompt: for studies, on pairs drawn by `winrate`'s weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minictrl.data import Prompt
from minictrl.lm.device import resolve_device
from minictrl.lm.hub import from_hub
from minictrl.scorers.text import in_batches, plain, render, scorer_tokenizer

QUESTION = """Below are a prompt and a response to it.

[Prompt]
{prompt}

[Response]
{text}

Is this a good response? Answer Yes or No."""

PAIR_QUESTION = """Below are a prompt and two responses to it.

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

Which response is better? Answer A or B."""


def load_generative(name: str, role: str, label: str, device: torch.device):
    """(model, tokenizer, function (prompts, texts) -> (B,) log-odds of Yes against No as the answer
    to QUESTION).
    """
    if label:
        raise ValueError(
            f"{role} model {name}#{label}: is a causal language model, without labels; leave #{label} out"
        )
    model, tokenizer = load_judge(name, role, device)

    def evaluate(prompts: list[Prompt], texts: list[str]) -> Tensor:
        asked = [
            QUESTION.format(prompt=plain(x).strip(), text=y.strip())
            for x, y in zip(prompts, texts, strict=True)
        ]
        return log_odds(model, tokenizer, device, asked, ("Yes", "No"))

    return model, tokenizer, evaluate


def load_pairwise(name: str, *, device: str = "auto") -> Callable[[list, list, list], Tensor]:
    """judge(prompts, texts, others) -> Tensor (B,): the probability that a text is better than the
    other one.

    Both orders are asked and averaged, so a judge that prefers a position, or says nothing of the
    two, counts one half, and judge(x, y, z) = 1 - judge(x, z, y). `wins` makes verdicts of it.
    Raises ValueError like `load_scorer`.
    """
    place = resolve_device(device)
    model, tokenizer = load_judge(name, "judge", place)

    def judge(prompts: list[Prompt], texts: list[str], others: list[str]) -> Tensor:
        rows = [
            (plain(x).strip(), y.strip(), z.strip())
            for x, y, z in zip(prompts, texts, others, strict=True)
        ]
        asked = [PAIR_QUESTION.format(prompt=x, first=y, second=z) for x, y, z in rows]
        asked += [PAIR_QUESTION.format(prompt=x, first=z, second=y) for x, y, z in rows]
        first, second = log_odds(model, tokenizer, place, asked, ("A", "B")).sigmoid().view(2, -1)
        if not (first + second).isfinite().all():
            raise ValueError(f"judge {name} gave probabilities that are not finite: use another")
        return (first + 1 - second) / 2

    return judge


def wins(probability: Tensor, tie: float = 1e-3) -> Tensor:
    """Verdicts 1, 0, or one half where the judge is within `tie` of undecided: wr(y, z | x) of a
    pairwise judge.
    """
    return (probability > 0.5 + tie).to(probability) / 2 + (probability >= 0.5 - tie).to(
        probability
    ) / 2


def load_judge(name: str, role: str, device: torch.device) -> tuple[nn.Module, object]:
    model = from_hub(
        AutoModelForCausalLM,
        f"{role} model",
        name,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    ).eval()
    return model, scorer_tokenizer(model, name, role)


def log_odds(
    model: nn.Module,
    tokenizer,
    device: torch.device,
    questions: list[str],
    answers: tuple[str, str],
) -> Tensor:
    """log P(first answer) - log P(second) as the next token after each question, float32 (B,)."""
    asked = [render(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    space = "" if tokenizer.chat_template else " "
    this, other = (
        tokenizer(space + answer, add_special_tokens=False)["input_ids"][0] for answer in answers
    )
    if space and this == other:  # the space is a token of its own
        asked = [question + space for question in asked]
        this, other = (
            tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers
        )
    if this == other:
        raise ValueError(
            f"judge {tokenizer.name_or_path}: {' and '.join(answers)} begin with one token; use another"
        )
    head = model.get_output_embeddings()

    def read(inputs: dict[str, Tensor]) -> Tensor:
        hidden = model.base_model(**inputs).last_hidden_state  # (B, L, D), padded on the right
        last = hidden[
            torch.arange(len(hidden), device=hidden.device), inputs["attention_mask"].sum(1) - 1
        ].float()
        rows, bias = (
            head.weight[[this, other]].float(),
            None if head.bias is None else head.bias[[this, other]].float(),
        )
        logits = F.linear(last, rows, bias)  # (B, 2): the rest of the vocabulary cancels
        return logits[:, 0] - logits[:, 1]

    return in_batches(model, tokenizer, device, asked, read)
