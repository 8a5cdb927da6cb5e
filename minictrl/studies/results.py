"""A page of what the studies left: `python -m minictrl.studies.results DIR` makes DIR/RESULTS.md.

A study has its question and the paper's answer, from its docstring, its picture, and a link to its
CSV; one with the runs of trained methods also has their table at equal KL. One that has not been
run is left out.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
from pathlib import Path

from minictrl.cli import Parser, run_script
from minictrl.figures import title
from minictrl.reproduce import STUDIES
from minictrl.studies.tables import Rows, at_kl, common_kl, grouped, near

HEAD = """# Results

Win rates over pi_ref on held-out prompts in per cent, by reward / by judge, ± one standard error.
At equal KL: regressed on the KL over a method's runs of all seeds, or averaged
(`tables.win_rate_at`).
"""


def main(argv: list[str] | None = None):
    parser = Parser("results", __doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of minictrl.reproduce")
    folder = parser.parse_args(argv).folder
    done = [name for name in STUDIES if (folder / f"{name}.csv").is_file()]
    if not done:
        raise ValueError(
            f"{folder}: holds no study; run python -m minictrl.reproduce NAME --out {folder} first"
        )
    page = folder / "RESULTS.md"
    page.write_text("\n".join([HEAD, *(section(name, folder) for name in done)]))
    print(f"{page}: {len(done)} studies")


def section(name: str, folder: Path) -> str:
    """Markdown of a study."""
    what, _, paper = inspect.getdoc(STUDIES[name]).partition("Paper: ")
    question = " ".join(what.split("\n\n")[0].split())
    parts = [f"## {name}: {question}"]
    if paper:
        parts.append(f"*Paper:* {' '.join(paper.split())}")
    parts += [f"![{name}]({name}.png)", f"[{name}.csv]({name}.csv)"]
    rows = read(folder / f"{name}.csv")
    if {"method", "seed", "scorer"} <= set(rows[0]):
        parts.append(at_equal_kl(rows))
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> Rows:
    """Rows of a study's CSV, numbers as numbers, an empty cell as None."""

    def value(cell: str):
        try:
            return json.loads(cell)
        except ValueError:
            return cell or None

    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value(cell) for name, cell in row.items()} for row in rows]


def at_equal_kl(rows: Rows) -> str:
    """Every method at the KL where most have runs, a row each, as a Markdown table."""
    kl, cases = common_kl(rows), list(grouped(rows, "procedure", "n"))
    names = [title(procedure, n) for procedure, n in cases]
    table = [[f"method, at {kl:g} nats", "runs", *names], ["---"] * (2 + len(cases))]
    for (method,), mine in grouped(rows, "method").items():
        runs = grouped(near(mine, kl), "seed", "budget")
        table.append([method, str(len(runs)), *(cell(rows, kl, method, *case) for case in cases)])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def cell(rows: Rows, kl: float, method: str, procedure: str, n: int) -> str:
    """A method's win rate by reward and by judge, each with its standard error."""
    found = [
        (100 * x["win_rate"], 100 * x["stderr"]) for x in at_kl(rows, kl, method, procedure, n)
    ]
    return " / ".join("–" if math.isnan(win) else f"{win:.1f} ± {err:.1f}" for win, err in found)


if __name__ == "__main__":
    run_script(main)
