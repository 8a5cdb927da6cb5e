"""What the scripts share: flags in full, and a bad input as one line."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from minictrl.messages import MOST, one_line


def whole(least: int = 1) -> Callable[[str], int]:
    """For argparse: a whole number from `least` to MOST."""

    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = MOST + 1
        if not least <= number <= MOST:
            raise argparse.ArgumentTypeError(
                f"{text}: use a whole number of at least {least} and at most {MOST}"
            )
        return number

    return parsed


def positive(text: str) -> float:
    """For argparse: a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: use positive numbers")
    return number


class Parser(argparse.ArgumentParser):
    """Flags in full only, and a bad one is one line, without the usage."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(map(str, args))
        for before, arg in zip(["an argument", *args], args):
            if arg == "" or re.fullmatch("--[a-zA-Z-]+=", arg):
                self.error(f"{arg or before} is empty: give a value, or leave it out")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see --help\n")


def check_file(parser: Parser, flag: str, path: Path | None):
    """A file that is to be written at the end can be: its directory is there, and it is none."""
    if not path:
        return
    folder = path.absolute().parent
    if path.is_dir():
        parser.error(f"{flag} {path}: is a directory; give a file in it")
    if not folder.is_dir():
        parser.error(f"{flag} {path}: there is no such directory; make it first")
    if not os.access(folder, os.W_OK):
        parser.error(f"{flag} {path}: its directory can't be written; give another path")


def program() -> str:
    """What was run, as the user typed it: train.py, or python -m minictrl.bench."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run_script(main):
    """Run a script's main: bad input is one line on stderr and exit status 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an ASCII locale has no "±"
    try:
        sys.exit(main())
    except BrokenPipeError:  # `evaluate.py RUN | head`: what was asked for is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            room = "" if isinstance(error, FileNotFoundError) else ", or make room for it"
            error = f"{error.filename}: {error.strerror}; give another path{room}"
        print(f"{program()}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"{program()}: stopped; the same command goes on (train.py: with --resume, once --out "
            "has a config.json)",
            file=sys.stderr,
        )
        sys.exit(130)
