"""A causal language model as a judge, by the probability of its next token: no text is sampled.

It is a scorer like any other: `--judge` and `--reward` take it, and the exact win rates of
`winrate.py` hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minictrl.data import Prompt
from minictrl.lm.hub import from_hub
from minictrl.scorers.text import in_batches, plain, render, scorer_tokenizer

QUESTION = """Below are a prompt and a response to it.

[Prompt]
{prompt}

[Response]
{text}

Is this a good response? Answer Yes or No."""
ANSWERS = ("Yes", "No")


def load_generative(name: str, role: str, label: str, device: torch.device):
    """(model, tokenizer, evaluate): evaluate(prompts, texts) gives (B,) log-odds of Yes against No.

    Yes and No are answers to QUESTION.
    """
    if label:
        raise ValueError(
            f"{role} model {name}#{label}: is a causal language model, without labels; leave "
            f"#{label} out"
        )
    model = from_hub(AutoModelForCausalLM, f"{role} model", name, dtype="auto").eval()
    tokenizer = scorer_tokenizer(model, name, role)

    def evaluate(prompts: list[Prompt], texts: list[str]) -> Tensor:
        asked = [
            QUESTION.format(prompt=plain(x).strip(), text=y.strip())
            for x, y in zip(prompts, texts, strict=True)
        ]
        return log_odds(model, tokenizer, device, asked)

    return model, tokenizer, evaluate


def log_odds(model: nn.Module, tokenizer, device: torch.device, questions: list[str]) -> Tensor:
    """log P(Yes) - log P(No) as the next token after each question, float32 (B,)."""
    asked = [render(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    space = "" if tokenizer.chat_template else " "
    this, other = (
        tokenizer(space + answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS
    )
    if space and this == other:  # the space is a token of its own
        asked = [question + space for question in asked]
        this, other = (
            tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS
        )
    if this == other:
        raise ValueError(
            f"model {tokenizer.name_or_path}: {' and '.join(ANSWERS)} begin with one token; use "
            "another"
        )
    head = model.get_output_embeddings()

    def read(inputs: dict[str, Tensor]) -> Tensor:
        last = inputs["attention_mask"].sum(1) - 1  # (B,), padded on the right
        row = torch.arange(len(last), device=last.device)

        def answer(hidden: Tensor) -> Tensor:  # (B, L, D) -> (B, 1, 2), in float32
            state = hidden[row, last][:, None].float()
            bias = None if head.bias is None else head.bias[[this, other]].float()
            return F.linear(state, head.weight[[this, other]].float(), bias)

        head.forward = answer  # the family may still cap or scale it
        try:
            logits = model(**inputs).logits[:, 0]  # (B, 2)
        finally:
            del head.forward
        return logits[:, 0] - logits[:, 1]  # the rest of the vocabulary cancels

    return in_batches(model, tokenizer, device, asked, read, open_end=True)
