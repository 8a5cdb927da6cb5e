"""A task name or a .jsonl file -> prompts. A prompt is text, or a list of chat messages {"role", "content"}."""

from __future__ import annotations

import json
from pathlib import Path

from minictrl.config import TASKS

ASSETS = Path(__file__).parent / "assets"
Prompt = str | list[dict]


def load_prompts(task_or_file: str, split: str = "train") -> list[Prompt]:
    """The prompts of a task or of a .jsonl file, in a fixed order.

    split: "train" for calibration and RL, "test" for evaluation; no prompt is in both. Every tenth line of a file is
    "test". Raises ValueError on an unknown task or split, and on a bad line of a file, naming its number.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")
    if task_or_file.endswith(".jsonl"):
        prompts = read_jsonl(Path(task_or_file))
        if len(prompts) < 10:
            raise ValueError(f"{task_or_file} has {len(prompts)} prompts: give at least 10, every tenth is for evaluation")
        return [prompt for i, prompt in enumerate(prompts) if (i % 10 == 9) == (split == "test")]
    if task_or_file not in TASKS:
        raise ValueError(f"unknown task {task_or_file!r}: use one of {', '.join(TASKS)}, or a .jsonl file")
    return json.loads((ASSETS / "prompts.json").read_text())[split]


def read_jsonl(path: Path) -> list[Prompt]:
    """Prompts of a file with {"prompt": text or messages} or {"messages": [...]} a line; blank lines are skipped."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a .jsonl file with a \"prompt\" a line")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): put one object a line") from None
        prompt = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
        if not is_prompt(prompt):
            raise ValueError(f"{path}, line {number}: give \"prompt\", a text that is not empty, or \"messages\", a list "
                             f"of {{\"role\": …, \"content\": …}}; it holds {line.decode(errors='replace')[:80]}")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt: put {{\"prompt\": …}} on each line")
    return prompts


def is_prompt(value) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
