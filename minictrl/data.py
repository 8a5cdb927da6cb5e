"""A task's name or a .jsonl file -> prompts.

A prompt is text, which the policy continues as it stands, or a list of chat messages {"role",
"content"}, which it answers. Public data sets (`data` and `pairs` of an entry of TASKS) are read
with `datasets`, from the hub or a local copy (`hub.py`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from minictrl.config import TASKS
from minictrl.lm.hub import hub_name, unreachable

ASSETS = Path(__file__).parent / "assets"
Prompt = str | list[dict]


def load_prompts(task_or_file: str, split: str = "train") -> list[Prompt]:
    """The prompts of a task or of a .jsonl file, in a fixed order, each once.

    split: "train" for calibration and RL, "test" for evaluation; no prompt is in both. Every tenth
    prompt of a file is "test". Raises ValueError on an unknown task or split, data that can't be
    read, and a bad line, naming its number.
    """
    check_split(split)
    task_or_file = str(task_or_file)
    if task_or_file.endswith(".jsonl"):
        prompts = unique(convert(read_jsonl(Path(task_or_file)), prompt_of))
        if len(prompts) < 10:
            raise ValueError(
                f"{task_or_file} has {len(prompts)} prompts: give at least 10, every tenth for "
                "evaluation"
            )
        return [prompt for i, prompt in enumerate(prompts) if (i % 10 == 9) == (split == "test")]
    source = task(task_or_file).get("data")
    if source is None:
        return json.loads((ASSETS / "prompts.json").read_text())[split]
    train = unique(convert(read_hub(source, "train"), prompt_of, skip_bad=source["skip_bad"]))
    if split == "train":
        return train
    seen = {json.dumps(prompt) for prompt in train}
    test = unique(convert(read_hub(source, "test"), prompt_of, skip_bad=source["skip_bad"]))
    return [prompt for prompt in test if json.dumps(prompt) not in seen]


def check_split(split: str):
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")


def task(name: str) -> dict:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: use one of {', '.join(TASKS)}, or a .jsonl file")
    return TASKS[name]


# --- rows of a file or a data set: (where, row) ---


def read_jsonl(path: Path) -> Iterable[tuple[str, object]]:
    """The rows of a file, one JSON value a line; blank lines are skipped."""
    if not path.is_file():
        raise ValueError(f'{path} is no file: give a .jsonl file with a "prompt" a line')
    empty = True
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
                json.dumps(value, ensure_ascii=False).encode()  # half a character is no text
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): put one object a line"
                ) from None
            yield f"{path}, line {number}", value
            empty = False
    if empty:
        raise ValueError(f'{path} holds no prompt: put {{"prompt": …}} on each line')


def read_hub(source: dict, split: str) -> Iterable[tuple[str, dict]]:
    """The rows of a data set on the hub, or of a local copy of it (`hub.py`)."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data set {source['name']} needs `datasets`: pip install -e '.[hub]'"
        ) from None
    datasets.disable_progress_bars()
    name, part = hub_name(source["name"]), source[split]
    where = f"{name}{'/' + source['folder'] if source['folder'] else ''}, {part}"
    try:
        rows = datasets.load_dataset(name, data_dir=source["folder"], split=part)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(unreachable("data set", name, error)) from None
    return ((f"{where} row {number}", row) for number, row in enumerate(rows, 1))


# --- a row -> a prompt, or a pair ---


def convert(
    rows: Iterable[tuple[str, object]], function: Callable, *, skip_bad: bool = False
) -> list:
    """function(row) of every row. A row it refuses raises ValueError that says where, or is counted
    and left out.
    """
    good, bad = [], []
    for where, row in rows:
        try:
            good.append(function(row))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{where}: {error}") from None
            bad.append(f"{where}: {error}")
    if bad:
        warnings.warn(
            f"{len(bad)} of {len(bad) + len(good)} rows left out, the first {bad[0]}", stacklevel=2
        )
    return good


def prompt_of(row) -> Prompt:
    """The prompt of a row: its "prompt", its "messages", or what comes before the last answer of
    HH's "chosen".
    """
    row = row if isinstance(row, dict) else {}
    if "prompt" not in row and isinstance(row.get("chosen"), str):
        return parse_hh(row["chosen"])[:-1]
    prompt = row.get("prompt", row.get("messages"))
    if is_prompt(prompt):
        return prompt
    raise ValueError(
        'give "prompt", a text that is not empty, or "messages", a list of {"role": system, user '
        f'or assistant, "content": …}} that ends with the user\'s; it holds {str(row)[:80]}'
    )


def parse_hh(text: str) -> list[dict]:
    """Messages of a transcript "\\n\\nHuman: … \\n\\nAssistant: …", HH-RLHF's format; the last may
    be empty.

    Raises ValueError unless human and assistant take turns, from a human's to an assistant's, none
    of them empty.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = [{"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2]]
    contents = [part.strip() for part in parts[1::2]]
    if (
        before.strip()
        or not roles
        or roles != ["user", "assistant"] * (len(roles) // 2)
        or not all(contents[:-1])
    ):
        raise ValueError(
            'no transcript of "\\n\\nHuman: …" and "\\n\\nAssistant: …" in turns, the assistant '
            f"last; it holds {text[:60]!r}…"
        )
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def is_prompt(value) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and m.get("role") in ("system", "user", "assistant")
            and isinstance(m.get("content"), str)
            for m in value
        )
        and value[-1]["role"] == "user"
    )


def unique(prompts: Iterable[Prompt]) -> list[Prompt]:
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())
