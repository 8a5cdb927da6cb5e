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
from minictrl.scorers.text import chat, in_batches, plain, render, scorer_tokenizer

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
    if not questions:
        return torch.zeros(0)
    rows, (this, other) = as_tokens(tokenizer, questions)
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

    return in_batches(model, tokenizer, device, rows, read)


def as_tokens(tokenizer, questions: list[str]) -> tuple[list[dict], tuple[int, int]]:
    """(rows, (yes, no)): each question as the model reads it, and the next token of its answers.

    The answers are cut into tokens where they stand, because there "Yes" may be another token than
    alone: SentencePiece puts a space before a text. Raises ValueError if no token parts them.
    """
    asked = [render(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    between = gap(tokenizer)
    texts = [question + between + answer for question in asked for answer in ANSWERS]
    special = not tokenizer.chat_template  # as in `encoded`
    ids = tokenizer(texts, add_special_tokens=special)["input_ids"]
    rows, answers = [], set()
    for yes, no in zip(ids[::2], ids[1::2], strict=True):
        parted = [i for i, pair in enumerate(zip(yes, no)) if pair[0] != pair[1]]
        at = parted[0] if parted else len(yes) - 1
        answers.add((yes[at], no[at]))
        rows.append({"input_ids": yes[:at][-tokenizer.model_max_length :]})
    if len(answers) > 1 or len(set(*answers)) == 1:
        raise ValueError(
            f"model {tokenizer.name_or_path}: no one token parts {' and '.join(ANSWERS)}; use "
            "another"
        )
    return rows, *answers


def gap(tokenizer) -> str:
    """The white space between a question and its answer: Llama 2's template has a space there."""
    if not tokenizer.chat_template:
        return " "
    question = [{"role": "user", "content": "a"}]
    asked = chat(tokenizer, question, add_generation_prompt=True)
    try:
        whole = chat(tokenizer, [*question, {"role": "assistant", "content": ANSWERS[0]}])
    except ValueError:  # the template has no answers
        return ""
    between = whole.removeprefix(asked).partition(ANSWERS[0])[0]
    return "" if between.strip() else between
