"""What is said to a user on one line, and limits of what a user gives. Without torch, so that a bad
flag is told at once.
"""

import re
import shlex

MOST = 1_000_000  # of whatever is counted: more is a slip, and would run for ever
DEVICES = re.compile(r"auto|cpu|cuda(?::(0|[1-9][0-9]*))?")
LONGEST = 1000  # characters of a message


def first_line(error: Exception) -> str:
    """The first line of an error, with the second where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def one_line(text: object) -> str:
    """A message on one line that a terminal shows as it is, without the middle of a long one."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 200]} … {line[-200:]}"


def command(*words: object) -> str:
    """`python WORDS`, to paste: of a path with a space in its name, too."""
    return f"python {shlex.join(map(str, words))}"
