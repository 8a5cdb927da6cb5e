"""Files that are written in one step, so that a reader never sees half of one, and known again by
a check sum, so that damage is seen.
"""

import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minictrl.messages import first_line

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` once it is on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs share a cache
    try:
        with writing(path):
            yield temporary
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def all_in_one_step(folder: Path) -> Iterator[Path]:
    """A temporary directory, whose files take the places of those of their names in `folder` once
    all are on the disk. Where there is no room for one of them, what was there stays.
    """
    with tempfile.TemporaryDirectory(prefix="new-", dir=folder) as temporary:
        yield Path(temporary)
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)


def save_text(path: Path, text: str):
    with in_one_step(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path):
    """Wait until a file is on the disk. safetensors' are readable by their owner alone: any is made
    as readable as a new file is here.
    """
    path.chmod(0o666 & ~UMASK)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def delete_leftovers(path: Path):
    """Delete what killed writers of `path` have left. Only where no one else writes it now."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink()


def check_writable(folder: Path):
    """Raises ValueError on a directory that no file can be made in."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder}: can't be written ({error.strerror}); give another path, or make room"
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file where writing fails. ValueError on a full disk, and on safetensors' errors."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            error.filename = error.filename or str(path)
            raise
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path}: can't be written ({why}); make room, and give the same command again "
            "(train.py: with --resume)"
        ) from None


def lock(path: Path, *, wait: bool) -> TextIO:
    """An open file beside `path` that keeps others away until it is closed, or the process ends.

    Raises BlockingIOError if another one has it and `wait` is not asked for.
    """
    file = open(path.with_name(f".{path.name}.lock"), "w")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file


# --- check sums ---


def check_sum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors by name, in hex."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def digest(*parts) -> str:
    """16 hex digits of strings, numbers, lists, dicts and modules (their weights)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            sha.update(check_sum(part.state_dict()).encode())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"|")
    return sha.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Of a file, in hex, as sha256sum prints it."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            sha.update(part)
    return sha.hexdigest()


# --- tensors ---


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """A safetensors file in one step, with a digest of all that it holds."""
    seal = digest(check_sum(tensors), layout(tensors), metadata)
    one = {"sealed": json.dumps([metadata, seal])}  # safetensors writes several in any order
    with in_one_step(path) as temporary:
        save_file(tensors, temporary, one)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote. Raises ValueError, without the path, if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            sealed = (file.metadata() or {}).get("sealed")
            if sealed is None:
                raise ValueError("it has no check sum")
            metadata, seal = json.loads(sealed)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(first_line(error)) from None
    if seal != digest(check_sum(tensors), layout(tensors), metadata):
        raise ValueError("its check sum is another")
    return tensors, metadata


def layout(tensors: dict[str, Tensor]) -> dict[str, list]:
    """Type and shape of each tensor."""
    return {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}


# --- JSON ---


def write_json(path: Path, value):
    """JSON in one step; a number that is not finite is null, because JSON has no NaN."""
    save_text(path, json.dumps(without_nan(value), indent=1) + "\n")


def write_sealed(path: Path, value: dict):
    """JSON in one step, with its own digest as "sha256"."""
    write_json(path, value | {"sha256": digest(without_nan(value))})


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote, or JSON without a digest. Raises ValueError, without the path, if
    it is no JSON or has another digest.
    """
    value = json.loads(path.read_bytes())
    if isinstance(value, dict) and value.pop("sha256", None) not in (None, digest(value)):
        raise ValueError('it has changed since it was written; delete its "sha256" if you did that')
    return value


def without_nan(value):
    """The value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {name: without_nan(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


NUMBER, TEXT, NUMBER_OR_NONE = (int, float), (str,), (int, float, type(None))  # kinds of columns


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
    """Names the file, and how to make it again, if it is missing or not what was written."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        what = f"is damaged ({first_line(error)})"
        if isinstance(error, FileNotFoundError):
            what = "there is no such file"
        raise ValueError(f"{path}: {what}; {again}") from None


def read_rows(path: Path) -> list:
    """The values of a file with one JSON value a line (a text may hold other ends of lines)."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_rows(path: Path, rows: Iterable):
    """What `read_rows` reads, in one step."""
    save_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
