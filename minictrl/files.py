"""Files that are written in one step: a reader never sees half of one."""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` once it is on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs share a cache
    try:
        with writing(path):
            yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ValueError if safetensors can't write, which names no file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path}: can't be written ({error}); make room, and give the same command again "
            "(train.py: with --resume)"
        ) from None


def write_json(path: Path, value):
    """JSON in one step; a number that is not finite is null, because JSON has no NaN."""
    with in_one_step(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1) + "\n")


def finite(value):
    """The value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


NUMBER, TEXT, PERHAPS = (int, float), (str,), (int, float, type(None))  # kinds of columns


def check_columns(rows, columns: dict[str, tuple[type, ...]]):
    """Raises ValueError unless rows are a list of dicts that have these columns, of these types."""
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        for name, kinds in columns.items():
            if not isinstance(row, dict) or not isinstance(row.get(name, ...), kinds):
                raise ValueError(f"row {number} has no {name} of a right kind: {str(row)[:60]}")
    if not rows or not isinstance(rows, list):
        raise ValueError("it has no rows")


@contextmanager
def reading(path: Path, again: str) -> Iterator[None]:
    """Names the file, and how to make it again, if what is read is not what was written."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"{path}: is damaged ({why[0]}); {again}") from None


def read_rows(path: Path) -> list:
    """The values of a file with one JSON value a line (a text may hold other ends of lines)."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_rows(path: Path, rows: Iterable):
    """What `read_rows` reads, in one step."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with in_one_step(path) as temporary:
        temporary.write_text(lines, encoding="utf-8")


def markdown(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_csv(path: Path, rows: list[dict]):
    """A table of rows with the same keys, in one step likewise; floats to 8 digits."""
    with in_one_step(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(
            {key: f"{x:.8g}" if isinstance(x, float) else x for key, x in row.items()}
            for row in rows
        )
