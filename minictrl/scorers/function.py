"""A function of the user's as a reward model or judge: FILE.py:NAME."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minictrl.data import Prompt


def load_function(spec: str, role: str) -> tuple[str, Callable[[list, list], Tensor]]:
    """(source of the file, evaluate) of FILE.py:NAME, a function (prompts, texts) -> B numbers.

    Raises ValueError if there is no such file or function, or the file can't be run; `evaluate`
    does where the function raises, naming the prompt, or gives something else than B numbers.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{role} {spec}: there is no file {file}; give FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise ValueError(f"{role} {spec}: {file} fails with {describe(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{role} {spec}: {file} has no function {name!r}")

    def evaluate(prompts: list[Prompt], texts: list[str]) -> Tensor:
        try:
            scores = torch.as_tensor(list(function(prompts, texts)), dtype=torch.float32)
        except Exception as error:
            at = culprit(function, prompts, texts)
            raise ValueError(f"{role} {spec} fails with {describe(error)}{at}") from error
        if scores.shape != (len(texts),):
            raise ValueError(
                f"{role} {spec} gave {tuple(scores.shape)} for {len(texts)} texts: return one "
                "number per text"
            )
        return scores

    return path.read_text(), evaluate


def culprit(function: Callable, prompts: list, texts: list[str]) -> str:
    """Which prompt and text the function fails on, if it is one alone."""
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            list(function([prompt], [text]))
        except Exception:
            return f" on the prompt {str(prompt)[:60]!r} and the text {text[:60]!r}"
    return ""


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
