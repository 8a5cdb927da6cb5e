"""A page of what the studies left: `python -m minictrl.studies.results DIR [--page FILE]`.

A study has its question and the paper's answer, from its docstring, its picture, and a link to its
CSV; one that compares trained methods also has their table at equal KL. One that has not been run
is left out.
"""

from __future__ import annotations

import csv
import inspect
import math
import os
from pathlib import Path

from minictrl.cli import Parser, run_script
from minictrl.figures import title
from minictrl.reproduce import STUDIES
from minictrl.studies.sweep import SCORERS, at_kl, common_kl, grouped, near

HEAD = """# Results

Win rates over pi_ref on held-out prompts in per cent, ± one standard error. At equal KL: regressed
on the KL over a method's runs of all seeds, or averaged (`sweep.at_kl`).
"""


def read(path: Path) -> list[dict]:
    """Rows of a study's CSV, numbers as numbers, an empty cell as None."""

    def value(cell: str):
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell

    with open(path, newline="") as file:
        return [{name: value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def at_equal_kl(rows: list[dict]) -> str:
    """Every method at the KL where most have runs, a row each, as a Markdown table."""
    rows = [row | {"n": int(row["n"])} for row in rows]
    kl = common_kl(rows)
    columns = [(*case, s) for case in grouped(rows, "procedure", "n") for s in SCORERS]
    heads = [f"{title(procedure, n)}, {scorer}" for procedure, n, scorer in columns]
    table = [[f"method, at {kl:g} nats", "runs", *heads]]
    for (method,), mine in grouped(rows, "method").items():
        runs = {(row["seed"], row["budget"]) for row in near(mine, kl)}
        wins = [percent(*at_kl(rows, kl, method, *column)) for column in columns]
        table.append([method, str(len(runs)), *wins])
    table.insert(1, ["---"] * len(table[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def percent(win: float, stderr: float) -> str:
    return "–" if math.isnan(win) else f"{100 * win:.1f} ± {100 * stderr:.1f}"


def section(name: str, folder: Path, at: Path) -> str:
    """Markdown of a study, its files linked from where the page will be."""
    what, _, paper = inspect.getdoc(STUDIES[name]).partition("Paper: ")
    question = " ".join(what.split("\n\n")[0].split())
    parts = [f"## {name}: {question}"]
    if paper:
        parts.append(f"*Paper:* {' '.join(paper.split())}")
    at_page = {end: os.path.relpath(folder / f"{name}.{end}", at.parent) for end in ("png", "csv")}
    parts.append(f"![{name}]({at_page['png']})\n\n[{name}.csv]({at_page['csv']})")
    rows = read(folder / f"{name}.csv")
    if {"method", "budget", "scorer"} <= set(rows[0]):
        parts.append(at_equal_kl(rows))
    return "\n\n".join(parts) + "\n"


def page(folder: Path, at: Path) -> str:
    """The page's Markdown. Raises ValueError if no study has been run."""
    done = [name for name in STUDIES if (folder / f"{name}.csv").is_file()]
    if not done:
        raise ValueError(
            f"{folder}: holds no study; run python -m minictrl.reproduce NAME --out {folder} first"
        )
    return "\n".join([HEAD, *(section(name, folder, at) for name in done)])


def main(argv: list[str] | None = None):
    parser = Parser("results", __doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of minictrl.reproduce")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default DIR/RESULTS.md")
    args = parser.parse_args(argv)
    at = args.page or args.folder / "RESULTS.md"
    text = page(args.folder, at)
    at.write_text(text)
    print(f"{at}: {text.count('## ')} studies")


if __name__ == "__main__":
    run_script(main)
