"""A task's name or a user's data -> prompts, each with the other columns of its row.

A prompt is text, which the policy continues as it stands, or a list of chat messages {"role",
"content"}, which it answers. JSON and CSV are read here; .parquet, directories of `datasets`, and
what is on the hub or in a local copy of it (`hub.py`), by `datasets`.
"""

import csv
import glob
import json
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from minictrl.config import DATA_RULE, FORMATS, HUB, TASKS, is_data
from minictrl.lm.hub import hub_name, unreachable

ASSETS = Path(__file__).parent / "assets"
NAMES = ("prompt", "messages", "conversations")  # columns that a prompt may be in
PLAIN = {"Value", "List", "LargeList", "Sequence", "ClassLabel", "Json"}  # kinds in `datasets`
TYPE = "'_type': '(\\w+)'"  # where it says so
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its roles
Prompt = str | list[dict]


def load_prompts(task_or_file: str, split: str = "train") -> list[Prompt]:
    """The prompts of a task or of a user's data, in a fixed order, each once.

    split: "train" for calibration and RL, "test" for evaluation; no prompt is in both. Every tenth
    prompt of a user's data is "test". Raises ValueError on an unknown task or split, data that
    can't be read, and a bad line, naming its number.
    """
    return [row[0] for row in load_rows(task_or_file, split)]


def load_rows(
    task_or_file: str, split: str, *, column: str | None = None, data_split: str = "train"
) -> list[tuple[Prompt, dict]]:
    """(prompt, the other columns of its row) of each prompt, as `load_prompts`."""
    check_split(split)
    name = str(task_or_file)
    if not name:
        raise ValueError("--task '': give a task, a file or a data set")
    if name not in TASKS:
        rows = convert(read_own(name, data_split), partial(row_of, column=column))
        rows = unique(rows, whose=name)
        if len(rows) < 10:
            raise ValueError(
                f"{name} has {len(rows)} prompts: give at least 10, every tenth for evaluation"
            )
        test = held_out(prompt for prompt, _ in rows)
        return [row for row in rows if (key(row[0]) in test) == (split == "test")]
    source = TASKS[name].get("data")
    if source is None:
        return [(prompt, {}) for prompt in json.loads((ASSETS / "prompts.json").read_text())[split]]
    train = unique(convert(read_hub(source, "train"), row_of, skip_bad=True))
    if split == "train":
        return train
    seen = {key(prompt) for prompt, _ in train}
    test = unique(convert(read_hub(source, "test"), row_of, skip_bad=True))
    return [row for row in test if key(row[0]) not in seen]


def held_out(prompts: Iterable[Prompt]) -> set[str]:
    """The keys of every tenth prompt, each counted once: those of a user's data for evaluation."""
    return set(list(dict.fromkeys(map(key, prompts)))[9::10])


def check_split(split: str):
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")


# --- rows of a file or a data set: (where, row) ---


def read_own(name: str, data_split: str = "train") -> Iterable[tuple[str, object]]:
    """The rows of a user's file, directory or data set on the hub."""
    if not is_data(name):
        raise ValueError(f"unknown task {name!r}: {DATA_RULE}")
    if name.endswith((".jsonl", ".json")):
        return read_json(Path(name))
    if name.endswith(".csv"):
        return read_csv(Path(name))
    return read_hub(HUB | {"name": name, "train": data_split}, "train")


def read_json(path: Path) -> Iterable[tuple[str, object]]:
    """The rows of a file, one JSON value a line, blank lines skipped; a .json may be one list."""
    if not path.is_file():
        raise ValueError(f'{path} is no file in {Path.cwd()}: give one with a "prompt" in each row')
    text, empty = path.read_bytes(), True
    if path.suffix == ".json" and text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = parse_json(text, str(path), "give a list of objects")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, "put one object a line")
            empty = False
    if empty:
        raise ValueError(f'{path} holds no prompt: put {{"prompt": …}} on each line')


def parse_json(text: bytes | str, where: str, rule: str) -> object:
    """A value of JSON. Raises ValueError, with the rule, on what is none, or holds half a
    character, which is no text.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): {rule}") from None
    return value


def read_csv(path: Path) -> Iterable[tuple[str, dict]]:
    """The rows of a file with a header: text as it stands, because 007 is no number, NA no gap, and
    None where a cell is empty.
    """
    if not path.is_file():
        raise ValueError(f'{path} is no file: give a .csv file with a column "prompt"')
    csv.field_size_limit(2**31 - 1)
    header, names = None, set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(filter(None, csv.reader(file, strict=True))):
                if header is None:
                    header, names = cells, set(cells)
                    continue
                if len(cells) > len(header) or len(names) < len(header):
                    raise csv.Error(
                        f"row {number} has {len(cells)} cells for {len(names)} names: name each "
                        "column once, and put quotes around a text with commas"
                    )
                cells += [""] * (len(header) - len(cells))
                yield f"{path}, row {number}", {x: y or None for x, y in zip(header, cells)}
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: is no CSV in UTF-8 with a header ({error})") from None
    if header is None:
        raise ValueError(f"{path} holds no prompt: give a header, and a row for each")


def read_hub(source: dict, split: str) -> Iterable[tuple[str, dict]]:
    """The rows of a file, of a directory of `datasets`, or of a data set on the hub or in a local
    copy of it (`hub.py`)."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data set {source['name']} needs `datasets`: pip install -e '.[hub]'"
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below
    name, part = hub_name(source["name"]), source[split]
    where = f"{name}{'/' + source['folder'] if source['folder'] else ''}, {part}"
    saved, suffix = Path(name, "dataset_dict.json").is_file(), Path(name).suffix
    try:
        if suffix in FORMATS:
            file = glob.escape(name)  # else [1] is a pattern
            rows = datasets.load_dataset(FORMATS[suffix], data_files=file, split="train")
        elif saved or Path(name, "state.json").is_file():
            rows = datasets.load_from_disk(f"{name}/{part}" if saved else name)
            check_inside(name, [file["filename"] for file in rows.cache_files])
        else:
            builder = datasets.load_dataset_builder(name, data_dir=source["folder"])
            files = (builder.config.data_files or {}).values()
            check_inside(name, [file for each in files for file in each])
            builder.download_and_prepare()
            rows = builder.as_dataset(split=part)
        kinds = rows.features.to_dict().items()
        media = [c for c, kind in kinds if not set(re.findall(TYPE, str(kind))) <= PLAIN]
        rows = rows.remove_columns(media)  # a picture may be a path, which is not followed
        return [(f"{where} row {number}", row) for number, row in enumerate(rows, 1)]
    except Exception as error:  # of `datasets`, pyarrow and pandas, on what a file holds
        raise ValueError(unreachable("data set", name, error.__cause__ or error)) from None


def check_inside(name: str, files: Iterable[str]):
    """Raises ValueError on files of a directory that lie outside of it, or of the hub that don't
    lie there."""
    for file in map(str, files):
        inside = "://" in file
        if Path(name).is_dir():
            inside = not inside and Path(file).resolve().is_relative_to(Path(name).resolve())
        if not inside:
            raise ValueError(f"it names {file}, which lies outside of it")


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


def row_of(row, column: str | None = None) -> tuple[Prompt, dict]:
    """(prompt, the other columns) of a row."""
    prompt, column = prompt_of(row, column), column or column_of(row)
    return prompt, {name: value for name, value in row.items() if name != column}


def prompt_of(row, column: str | None = None) -> Prompt:
    """The prompt of a row: what its column holds, or the first of NAMES that it has, or what comes
    before the last answer of "chosen", HH's transcript or messages. Of a conversation that ends
    with an answer, what comes before it.

    A prompt that the messages of "chosen" begin with, a system message apart, is a chat: all of
    them but the answer.
    """
    given, row = row, row if isinstance(row, dict) else {}
    chosen, column = unpacked(row.get("chosen")), column or column_of(row)
    if column is None and isinstance(chosen, str) and "\n\nHuman:" in chosen:
        return parse_hh(chosen)[:-1]
    if isinstance(chosen, str) and chosen.startswith("\n\nHuman:"):
        with suppress(ValueError):  # an answer that only begins like a transcript
            chosen = parse_hh(chosen)
    before = [message(m) for m in chosen[:-1]] if isinstance(chosen, list) else []
    prompt = row.get(column) if column else before
    prompt = messages_in(prompt) if column == "prompt" else unpacked(prompt)
    if isinstance(prompt, list):
        prompt = [message(m) for m in prompt]
        if column != "prompt" and prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()
    first = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if is_prompt(first) and is_prompt(before):
        system = before[0]["role"] == "system" and first[0]["role"] != "system"
        turns = before[1:] if system else before
        if turns[: len(first)] == first:
            return before
    if is_prompt(prompt):
        return prompt
    raise ValueError(
        f'give "{column or "prompt"}", a text that is not empty, or "messages" (ShareGPT\'s '
        '"conversations"), a list of {"role": system, user or assistant, "content": …} that ends '
        f"with the user's, or name the column (--column); it holds {str(given)[:80]}"
    )


def column_of(row: dict) -> str | None:
    """The first of NAMES that a row has."""
    return next((name for name in NAMES if row.get(name) is not None), None)


def unpacked(value):
    """Messages that are written as JSON, as a CSV has them, as their list; all else as it is.
    Raises ValueError on messages as Python prints them, which is how pandas writes a CSV.
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with suppress(ValueError):
            return parse_json(value, "", "")
        if re.match(r"\s*\[\{'(role|from|content|value)': ", value):
            raise ValueError(
                f"{value[:60]} are messages as Python prints them: write them with json.dumps, or "
                "the data as .jsonl or .parquet"
            )
    return value


def messages_in(value):
    """`unpacked` messages; a text that is a list of something else is a text."""
    found = unpacked(value)
    if isinstance(value, str) and isinstance(found, list):
        return found if all(message(m)["role"] for m in found) else value
    return found


def message(m) -> dict:
    """{"role", "content"} of a chat message as people have it: ShareGPT's names, parts of text."""
    m = m if isinstance(m, dict) else {}
    role, content = m.get("role") or m.get("from"), m.get("content", m.get("value"))
    if isinstance(content, list):  # of {"type": "text", "text": …}
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    role = SHAREGPT.get(role, role) if isinstance(role, str) else None
    return {"role": role, "content": content}


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
    """Whether this is a text, or a list of `message`s, that a response can follow."""
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            m["role"] in ("system", "user", "assistant") and isinstance(m["content"], str)
            for m in value
        )
        and value[-1]["role"] == "user"
        and bool(value[-1]["content"].strip())
    )


def key(prompt: Prompt) -> str:
    """A prompt as a key of dicts."""
    if not isinstance(prompt, str):
        prompt = [[m["role"], m["content"]] for m in prompt]
    return json.dumps(prompt)


def equal(x, y) -> bool:
    """Whether two values of rows are the same; NaN is the same as NaN."""
    one, other = (json.dumps(value, sort_keys=True, default=str) for value in (x, y))
    return one == other


def unique(rows: Iterable[tuple], whose: str | None = None) -> list[tuple]:
    """The first row of each prompt, which is what a row begins with. whose: the data's name, to
    warn where another row of the prompt holds something else.
    """
    first, others = {}, 0
    for row in rows:
        found = first.setdefault(key(row[0]), row)
        others += found is not row and not equal(found, row)
    if others and whose:
        warnings.warn(
            f"{others} rows of {whose} repeat a prompt with other columns: its first row is taken; "
            "to keep both, make the prompts differ",
            stacklevel=2,
        )
    return list(first.values())
