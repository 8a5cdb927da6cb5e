"""What a run works on: its models and its prompts, checked together."""

import json
import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from minictrl.config import Config
from minictrl.data import Prompt, key, load_rows
from minictrl.files import digest
from minictrl.lm.device import resolve_device
from minictrl.lm.identity import identity
from minictrl.lm.prompts import check_ids, check_lengths, encode_prompts, eos_ids, left_pad
from minictrl.models import Scorer, load_policy, load_scorer
from minictrl.scorers.text import as_text, render


@dataclass(frozen=True)
class Task:
    """A run's models and prompts. P prompts of at most L tokens."""

    policy: nn.Module
    tokenizer: object
    reward: Scorer
    prompts: list  # as given: text or chat messages, what scorers read
    texts: list[str]  # as the policy reads them
    ids: Tensor  # (P, L) left-padded
    mask: Tensor  # (P, L)
    max_new_tokens: int

    @property
    def cache_keys(self) -> list:
        """Each prompt as policy and scorers read it: its text, and what it was if not that."""
        both = zip(self.texts, self.prompts, strict=True)
        return [text if text == prompt else [text, key(prompt)] for text, prompt in both]

    @cached_property
    def digest(self) -> str:
        """Of pi_ref: its weights, its config, its tokenizer, what ends a response.

        Hashed when it is first asked for, and so before anything is trained.
        """
        model, tokenizer = self.policy, self.tokenizer
        ends = [eos_ids(model, tokenizer).tolist(), tokenizer.pad_token_id]
        return digest(model, *identity(model, tokenizer), ends)


def load_task(config: Config, split: str) -> Task:
    """Models and prompts of a run. Raises ValueError on what is wrong (`read_prompts`)."""
    model, tokenizer = load_policy(config.policy)
    prompts, texts, encoded = read_prompts(config, split, model, tokenizer)
    model.to(resolve_device(config.device))
    ids, mask = left_pad(encoded, tokenizer.pad_token_id, model.device)
    reward = scorer_of(config, "reward")
    return Task(model, tokenizer, reward, prompts, texts, ids, mask, config.max_new_tokens)


def rows_of(config: Config, split: str) -> list[tuple[Prompt, dict]]:
    """A run's prompts, each with the other columns of its row."""
    return load_rows(config.task, split, column=config.column, data_split=config.data_split)


def scorer_of(config: Config, role: str) -> Scorer | None:
    """A run's reward model or judge; a function gets the columns of the prompts. None: no judge."""
    name, columns = getattr(config, role), {}
    if name is None:
        return None
    if ".py:" in name:
        rows = rows_of(config, "train") + rows_of(config, "test")
        columns = {key(prompt): row for prompt, row in rows}
    return load_scorer(name, role, device=config.device, columns=columns)


def text_of(config: Config, tokenizer, prompt: Prompt) -> str:
    """A prompt as the policy reads it."""
    return render(tokenizer, prompt, **json.loads(config.template_args or "{}"))


def read_prompts(
    config: Config, split: str, model: nn.Module, tokenizer
) -> tuple[list, list[str], list[list[int]]]:
    """(prompts, their texts for the policy, token ids): they fit the context with their response.

    Those that are longer than max_prompt_tokens are left out, with a warning if they are the
    user's. Raises ValueError where none is left, or one doesn't fit the model's context.
    """
    if config.template_args and not tokenizer.chat_template:
        raise ValueError(
            f"--template-args {config.template_args}: {config.policy} has no chat template; leave "
            "them out"
        )
    prompts, texts, encoded, longer = [], [], [], 0
    limit = config.max_prompt_tokens or math.inf
    for prompt, _ in rows_of(config, split):
        text = text_of(config, tokenizer, prompt)
        ids = encode_prompts(tokenizer, [text])[0]
        if len(ids) > limit:
            longer += 1
            continue
        prompts.append(prompt)
        texts.append(text)
        encoded.append(ids)
        if len(prompts) == config.prompts:
            break
    if not prompts:
        why = f"longer than --max-prompt-tokens {limit}; use more"
        if not longer:
            why = "a training prompt too; give other data"
        raise ValueError(f"--task {config.task}: every {split} prompt is {why}")
    warn_of_prompts(config, split, tokenizer, prompts, longer)
    check_ids(model, tokenizer, encoded)
    check_lengths(model, texts, encoded, config.max_new_tokens)
    return prompts, texts, encoded


def warn_of_prompts(config: Config, split: str, tokenizer, prompts: list, longer: int) -> None:
    """What is odd about a run's prompts. longer: how many were too long."""
    if longer and config.own_prompts:
        warnings.warn(
            f"--max-prompt-tokens {config.max_prompt_tokens}: {longer} longer prompts of "
            f"{config.task} are left out; use more to keep them",
            stacklevel=3,
        )
    if len(prompts) < (config.prompts or 0):
        warnings.warn(
            f"--prompts {config.prompts}: {config.task} has {len(prompts)} for {split}, all are "
            "taken",
            stacklevel=3,
        )
    held = [prompt for prompt in prompts if as_text(tokenizer, prompt) != prompt]
    if held:
        warnings.warn(
            f"{len(held)} of {len(prompts)} prompts hold control tokens of {config.policy}, the "
            f"first {str(held[0])[:60]!r}: they are read as text; for turns, give "
            '{"messages": …}',
            stacklevel=3,
        )
    if tokenizer.chat_template and isinstance(prompts[0], str):
        warnings.warn(
            f"{config.policy} answers chats, and these prompts are texts: it continues each as it "
            'stands; give {"messages": …} for answers',
            stacklevel=3,
        )


def try_scorers(scorers: list[Scorer | None], prompts: list) -> None:
    """One text a scorer for each pattern of roles among the prompts: what fails, fails now.

    scorers: None stands for one that a run doesn't have.
    """
    patterns = {
        "text" if isinstance(prompt, str) else tuple(m["role"] for m in prompt): prompt
        for prompt in prompts
    }
    for scorer in filter(None, scorers):
        scorer(list(patterns.values()), ["."] * len(patterns))
        if scorer.tokenizer is None:
            warn_of_function(scorer, prompts[0])


def warn_of_function(scorer: Scorer, prompt: Prompt) -> None:
    """Warns if a text's score depends on the texts beside it, or on chance: scores of many calls
    are compared with each other.
    """
    texts = [" Yes.", " No, not at all."]
    together = scorer([prompt] * 2, texts)
    alone = torch.cat([scorer([prompt], [text]) for text in texts])
    if not torch.allclose(together, alone, rtol=1e-3):
        warnings.warn(
            f"{scorer.role} {scorer.name} gave {together.tolist()} for two texts together and "
            f"{alone.tolist()} for each alone: scores of different calls are compared, so let a "
            "text's score depend on itself and its prompt alone",
            stacklevel=3,
        )
