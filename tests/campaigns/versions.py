"""The suite with the oldest and with the newest of everything that pyproject.toml allows.

    python tests/campaigns/versions.py oldest=python3.10 newest=python3.13 --out DIR

Each NAME=PYTHON is a virtual environment DIR/NAME, made once: `oldest` installs the minimum of each
requirement, any other name what pip chooses. An older torch brings CUDA's libraries: 7 GB. What
pytest prints goes to DIR/NAME.txt; arguments after -- go to pytest. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "transformers", "numpy")


def minimums() -> list[str]:
    """Each requirement of the package and of its tests, at the least version that it allows."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|test) = \[(.*)\]", text, re.MULTILINE)
    return [re.sub(r">=([\d.]+).*", r"==\1", each) for each in re.findall(r'"(.*?)"', str(lists))]


def environment(folder: Path, python: str, oldest: bool) -> str:
    """The Python of the virtual environment in `folder`; makes it if it isn't finished."""
    inside, done = str(folder / "bin/python"), folder / "installed"
    if not done.exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        exact = minimums() if oldest else []
        install = [inside, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]", *exact]
        subprocess.run(install, check=True)
        done.touch()
    return inside


def tested(inside: str, log: Path, arguments: list[str]) -> tuple[list[str], str]:
    """(the versions of Python and of `SHOWN`, the last line of pytest)."""
    versions = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, "
    shown = subprocess.check_output([inside, "-c", f"{versions}{SHOWN}))"], text=True).split()
    with open(log, "w") as file:
        subprocess.run([inside, "-m", "pytest", *arguments], cwd=ROOT, stdout=file, stderr=file)
    return shown, log.read_text().splitlines()[-1].strip("= ")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own, rest = argv, []
    if "--" in argv:
        own, rest = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("combinations", nargs="+", metavar="NAME=PYTHON")
    parser.add_argument("--out", type=Path, required=True, help="a directory with room for 15 GB")
    args = parser.parse_args(own)
    rows = []
    for each in args.combinations:
        name, _, python = each.partition("=")
        inside = environment(args.out / name, python, name == "oldest")
        rows.append((name, *tested(inside, args.out / f"{name}.txt", rest)))
    print("| | Python |", " | ".join(SHOWN), "| result |")
    print("|" + " --- |" * (len(SHOWN) + 3))
    for name, shown, result in rows:
        print(f"| {name} |", " | ".join(shown), f"| {result} |")
    return any("failed" in row[-1] or "error" in row[-1] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
