"""A function of the user's as a reward model or judge: FILE.py:NAME."""

import ast
import copy
import importlib.util
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from minictrl.data import Prompt, key

OURS = Path(__file__).parent.parent  # the package, which a function may import
RULE = "return a list of one number per text; it gets the lists (prompts, texts)"
LOCK = threading.RLock()  # sys.modules is one for all threads
MOST_KEPT = 0.9  # of the values of a function, where float32 makes others of them equal


def load_function(
    spec: str, role: str, columns: dict[str, dict]
) -> tuple[list, Callable[[list, list], Tensor], Callable[[Prompt, dict], None]]:
    """(what a score depends on, evaluate, add_row) of FILE.py:NAME, a function
    (prompts, texts, **columns) -> B numbers. `add_row` gives it the row of a prompt that is new.

    columns: of each prompt (`data.key`), the other fields of its row. The function is given those
    that it names, or all if it takes `**`; each as a list of B values. Raises ValueError if there
    is no such file, function or column, or the file can't be run; `evaluate` does where the
    function raises, naming the prompt, or gives something else than B numbers; `add_row` does where
    a prompt already has a row that the function would read something else in.
    """
    file, _, function_name = spec.rpartition(":")
    path, name = Path(file).resolve(), f"{role} {spec}"
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {file}; give FILE.py:NAME")
    texts = sources(path)
    own_modules = beside(path, texts)
    with own_modules():
        function = find_function(name, function_name, path, file)
    names, needed = argument_names(function)

    def known() -> list[str]:
        return sorted({column for row in columns.values() for column in row})

    def wanted() -> list[str]:
        there = known()
        return there if names is None else [column for column in names if column in there]

    missing = [column for column in needed if column not in known()]
    if missing:
        raise ValueError(
            f"{name} takes {', '.join(missing)}, which no prompt's row has (it has "
            f"{', '.join(known()) or 'nothing else'}); rename the column or the argument"
        )
    check_rows(name, needed, columns, list(columns))

    def call(prompts: list[Prompt], texts: list[str]) -> list:
        rows = [columns.get(key(prompt), {}) for prompt in prompts]
        fields = {column: [row.get(column) for row in rows] for column in wanted()}
        prompts, fields = copy.deepcopy((list(prompts), fields))  # the function may change them
        with own_modules():
            scores = function(prompts, list(texts), **fields)
            if isinstance(scores, (dict, set, frozenset, str)) or not hasattr(scores, "__iter__"):
                raise TypeError(f"it gives a {type(scores).__name__}; {RULE}")
            return list(islice(scores, len(texts) + 1))  # it may never end

    def evaluate(prompts: list[Prompt], texts: list[str]) -> Tensor:
        if needed:
            check_rows(name, needed, columns, [key(prompt) for prompt in prompts])
        return as_float32(scores_of(call, prompts, texts, name), name)

    def add_row(prompt: Prompt, row: dict):
        read = {column: x for column, x in row.items() if names is None or column in names}
        stored = columns.setdefault(key(prompt), read)
        for column, value in read.items():
            if stored.get(column) != value:
                raise ValueError(
                    f"{name} reads {column}, which is {str(value)[:40]!r} here and was "
                    f"{str(stored.get(column))[:40]!r} where the prompt {key(prompt)[:60]!r} was "
                    "calibrated; a prompt has one row: make its rows equal, or two prompts of it"
                )

    used = {prompt: [row.get(column) for column in wanted()] for prompt, row in columns.items()}
    return [function_name, *texts.values(), used if wanted() else None], evaluate, add_row


def sources(path: Path) -> dict[Path, str]:
    """The text of a file of Python, and of what it imports from beside it, in the order of paths
    but for the file itself, which is first.
    """
    texts, todo = {}, [path]
    while todo:
        file = todo.pop()
        if file in texts or OURS in file.parents:
            continue
        texts[file] = file.read_bytes().decode(errors="replace")
        for name, folder in imported(file, texts[file], path.parent):
            at = folder / name.replace(".", "/")
            todo += [x for x in (Path(f"{at}.py"), at / "__init__.py") if x.is_file()]
    return {path: texts.pop(path)} | dict(sorted(texts.items()))


def beside(path: Path, files: Iterable[Path]) -> Callable[[], AbstractContextManager]:
    """A context in which a file of Python imports these files from beside it before all else, as
    modules of its own, because two functions' helpers may have one name. Its working directory and
    torch's default type are its own too, and our gradients stay as they are.
    """
    folder = str(path.parent)
    inside = [file for file in files if file != path and file.is_relative_to(folder)]
    names = {file.relative_to(folder).parts[0].removesuffix(".py") for file in inside}
    names, own, place = names - sys.stdlib_module_names, {}, None

    class Finder:
        """Finds these names alone: what else lies there hides no package."""

        @staticmethod
        def find_spec(name: str, where=None, target=None):
            return PathFinder.find_spec(name, [folder]) if name in names else None

    @contextmanager
    def imports():
        nonlocal place
        with LOCK, torch.set_grad_enabled(torch.is_grad_enabled()):
            others, ours = taken(names), (Path.cwd(), torch.get_default_dtype())
            go_to(*(place or ours))
            sys.modules.update(own)
            sys.meta_path.insert(0, Finder)
            sys.path.append(folder)
            try:
                yield
            finally:
                place = Path.cwd(), torch.get_default_dtype()
                go_to(*ours)
                own.update(taken(names))
                sys.modules.update(others)
                sys.meta_path.remove(Finder)
                with suppress(ValueError):  # the user's file may have removed it
                    sys.path.remove(folder)

    return imports


def go_to(folder: Path, dtype: torch.dtype):
    """Sets the working directory and torch's default type."""
    os.chdir(folder)
    torch.set_default_dtype(dtype)


def taken(names: set[str]) -> dict[str, ModuleType]:
    """The modules of these names and what is in them, which are no longer in sys.modules."""
    return {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names
    }


def imported(file: Path, text: str, beside: Path) -> Iterator[tuple[str, Path]]:
    """(module, folder that it is looked for in) of each import in a file's text."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):  # which is said where it is imported
        nodes = []
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, beside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else beside
            module = node.module or ""
            yield module, folder
            yield from ((f"{module}.{alias.name}".strip("."), folder) for alias in node.names)


def scores_of(call: Callable, prompts: list[Prompt], texts: list[str], name: str) -> Tensor:
    """call(prompts, texts) as float64 (B,). Raises ValueError where it fails, naming the prompt, or
    gives something else than B numbers.
    """

    def numbers(prompts: list, texts: list[str]) -> Tensor:
        scores = call(prompts, texts)
        try:
            return torch.as_tensor(scores, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{error}; {RULE}") from None

    try:
        exact = numbers(prompts, texts)
    except (Exception, SystemExit) as error:  # whatever the user's function does
        at = culprit(numbers, prompts, texts)
        raise ValueError(f"{name} fails with {describe(error)}{at}") from error
    if exact.shape != (len(texts),):
        raise ValueError(
            f"{name} gave {tuple(exact.shape)} for {len(texts)} texts: return one number per text"
        )
    return exact


def as_float32(exact: Tensor, name: str) -> Tensor:
    """The scores (B,) as float32; warns if a tenth of those that differ then tie."""
    scores = exact.float()
    if 0 < len(scores.unique()) <= MOST_KEPT * len(exact.unique()):
        warnings.warn(
            f"{name}: scores that differ tie as float32, which has 7 digits; return smaller ones, "
            "without their common part",
            stacklevel=2,
        )
    return scores


def find_function(name: str, function_name: str, path: Path, file: str) -> Callable:
    """The function of a file, which is run for it, as a module named by its path. name: of the
    scorer; file: the path as it was given.
    """
    module_spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where a dataclass looks for it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise ValueError(f"{name}: {file} fails with {describe(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{name}: {file} has no function {function_name!r}")
    try:
        inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}; give a function that is written in it") from None
    return function


def argument_names(function: Callable) -> tuple[list[str] | None, list[str]]:
    """(the columns that a function takes behind (prompts, texts), those without a default).

    None: it takes `**`, which stands for all.
    """
    arguments = list(inspect.signature(function).parameters.values())[2:]
    if any(p.kind is p.VAR_KEYWORD for p in arguments):
        return None, []
    named = [p for p in arguments if p.kind is not p.VAR_POSITIONAL]
    return [p.name for p in named], [p.name for p in named if p.default is p.empty]


def check_rows(name: str, needed: list[str], columns: dict[str, dict], prompts: list[str]):
    """Raises ValueError if the row of a prompt lacks a column that the function needs.

    columns: rows by prompt (`data.key`).
    """
    for column in needed:
        without = [prompt for prompt in prompts if columns.get(prompt, {}).get(column) is None]
        if without:
            raise ValueError(
                f"{name} takes {column}, which the rows of {len(without)} of {len(prompts)} "
                f"prompts lack, the first {without[0][:60]!r}: add it, or give the argument a "
                "default"
            )


def culprit(call: Callable, prompts: list, texts: list[str]) -> str:
    """Which prompt and text the function fails on, if it is one alone."""
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            call([prompt], [text])
        except (Exception, SystemExit):
            return f" on the prompt {str(prompt)[:60]!r} and the text {text[:60]!r}"
    return ""


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
