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
