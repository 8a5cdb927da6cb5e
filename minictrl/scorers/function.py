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

from minictrl.data import Prompt, equal, key
from minictrl.files import digest

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
    rows = Rows(name, function, columns)
    rows.check()

    def call(prompts: list[Prompt], texts: list[str]) -> list:
        # the function may change them
        prompts, fields = copy.deepcopy((list(prompts), rows.fields(prompts)))
        with own_modules():
            scores = function(prompts, list(texts), **fields)
            if isinstance(scores, (dict, set, frozenset, str)) or not hasattr(scores, "__iter__"):
                raise TypeError(f"it gives a {type(scores).__name__}; {RULE}")
            return list(islice(scores, len(texts) + 1))  # it may never end

    def evaluate(prompts: list[Prompt], texts: list[str]) -> Tensor:
        if rows.needed:
            rows.check_needed([key(prompt) for prompt in prompts])
        return as_float32(scores_of(call, prompts, texts, name), name)

    return [function_name, *texts.values(), rows.read()], evaluate, rows.add


class Rows:
    """What a function reads of the prompts' rows, behind (prompts, texts).

    name: of the scorer. columns: the other fields of each prompt's row, by `data.key`.
    """

    def __init__(self, name: str, function: Callable, columns: dict[str, dict]):
        self.name, self.columns = name, columns
        self.known = {column for row in columns.values() for column in row}  # that any row has
        arguments = list(inspect.signature(function).parameters.values())
        self.taken, arguments = [p.name for p in arguments[:2]], arguments[2:]
        self.all = any(p.kind is p.VAR_KEYWORD for p in arguments)  # `**`
        named = [] if self.all else [p for p in arguments if p.kind is not p.VAR_POSITIONAL]
        self.names = [p.name for p in named]
        self.needed = [p.name for p in named if p.default is p.empty]

    def wanted(self) -> list[str]:
        return sorted(self.known) if self.all else [x for x in self.names if x in self.known]

    def fields(self, prompts: list[Prompt]) -> dict[str, list]:
        """What the function is called with: of each prompt a value, None where its row lacks it."""
        rows = [self.columns.get(key(prompt), {}) for prompt in prompts]
        return {column: [row.get(column) for row in rows] for column in self.wanted()}

    def read(self) -> dict[str, list] | None:
        """What the function reads, by prompt; None if nothing."""
        wanted = self.wanted()
        rows = self.columns.items()
        return {prompt: [row.get(c) for c in wanted] for prompt, row in rows} if wanted else None

    def add(self, prompt: Prompt, row: dict):
        """The row of a prompt. Raises ValueError if it has another one already."""
        read = {column: x for column, x in row.items() if self.all or column in self.names}
        stored = self.columns.setdefault(key(prompt), read)
        self.known |= stored.keys()
        for column, value in read.items():
            before = stored.get(column)
            if not equal(before, value):
                raise ValueError(
                    f"{self.name} reads {column}, which is {str(value)[:40]!r} here and was "
                    f"{str(before)[:40]!r} where the prompt {key(prompt)[:60]!r} was calibrated; "
                    "give all rows of a prompt the same, or make two prompts of it"
                )

    def check(self) -> None:
        """Raises ValueError if a row, or all of them, lack a column that the function needs."""
        missing = [column for column in self.needed if column not in self.known]
        if missing:
            raise ValueError(
                f"{self.name} takes {', '.join(missing)}, which no prompt's row has (it has "
                f"{', '.join(sorted(self.known)) or 'nothing else'}); rename the column or the "
                "argument"
            )
        if self.taken[1:] in (["prompt"], ["prompts"]):
            raise ValueError(
                f"{self.name}: its second argument is called {self.taken[1]}, and it is given the "
                "texts there: it gets (prompts, texts), in this order"
            )
        clash = sorted(set(self.taken) & set(self.wanted()))
        if clash:
            raise ValueError(
                f"{self.name}: its first two arguments have the name of a column, {clash[0]}; "
                "rename the column or the argument"
            )
        self.check_needed(list(self.columns))

    def check_needed(self, prompts: list[str]) -> None:
        """Raises ValueError if the row of a prompt (`data.key`) lacks a column."""
        for column in self.needed:
            without = [x for x in prompts if self.columns.get(x, {}).get(column) is None]
            if without:
                raise ValueError(
                    f"{self.name} takes {column}, which the rows of {len(without)} of "
                    f"{len(prompts)} prompts lack, the first {without[0][:60]!r}: add it, or give "
                    "the argument a default"
                )


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
            others, ours = taken(names), settings()
            go_to(*(place or ours))
            sys.modules.update(own)
            sys.meta_path.insert(0, Finder)
            sys.path.append(folder)
            try:
                with warnings.catch_warnings():
                    yield
            finally:
                place = settings()
                go_to(*ours)
                own.update(taken(names))
                sys.modules.update(others)
                sys.meta_path.remove(Finder)
                with suppress(ValueError):  # the user's file may have removed it
                    sys.path.remove(folder)

    return imports


def settings() -> tuple[Path, torch.dtype, torch.device]:
    """The working directory, and torch's default type and device."""
    return Path.cwd(), torch.get_default_dtype(), torch.get_default_device()


def go_to(folder: Path, dtype: torch.dtype, device: torch.device):
    """Sets `settings`."""
    os.chdir(folder)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None if device.type == "cpu" else device)


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
    """The function of a file, which is run for it, as a module named by its path's digest (pickle
    reads a name's dots). name: of the scorer; file: the path as it was given.
    """
    module_spec = importlib.util.spec_from_file_location(f"function_{digest(str(path))}", path)
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
