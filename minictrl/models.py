"""Policies, reward models and judges: a name -> a model, loading and saving. Text, not ids, crosses between them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from minictrl.config import TASKS
from minictrl.data import ASSETS

logging.set_verbosity_error()
logging.disable_progress_bar()


def load_policy(name_or_path: str) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a task, a hub name, a directory or a .gguf file; in eval mode, float32, on the CPU.

    Raises ValueError if there is no such model.
    """
    name = TASKS[name_or_path]["policy"] if name_or_path in TASKS else name_or_path
    path = ASSETS / "policy" if name == "reviews" else name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def save_policy(model: nn.Module, tokenizer, path: Path):
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, in one step."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def load_scorer(name_or_path: str, role: str):
    """score(prompts, texts) -> Tensor (B,) of a reward model or a judge, for a task's, a hub's or a directory's model.

    role: "reward" or "judge". A score is any monotone scale, higher is better. The returned function raises ValueError
    on a score that is not finite: a NaN silently loses every comparison.
    """
    if role not in ("reward", "judge"):
        raise ValueError(f"unknown role {role!r}: use reward or judge")
    from minictrl.scorers import NgramScorer
    scorer = NgramScorer.load(ASSETS / role)

    def score(prompts: list, texts: list[str]) -> Tensor:
        scores = scorer.score([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return finite(scores, name_or_path, role)

    return score


def finite(scores: Tensor, name: str, role: str) -> Tensor:
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise ValueError(f"{role} model {name} gave {bad} of {scores.numel()} scores that are not finite: use another")
    return scores.float().cpu()
