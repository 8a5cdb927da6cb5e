"""RESULTS.md from what the studies left: `python -m minictrl.studies.results DIR [--page FILE]`.

A study has its picture, the paper's finding from its docstring, ours in a sentence that is computed
from its CSV, and a table. One that has not been run is left out.
"""

from __future__ import annotations

import csv
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path

from minictrl.cli import Parser, run_script
from minictrl.figures import title
from minictrl.reproduce import STUDIES
from minictrl.studies.sweep import AWARE, SCORERS, at_kl, common_kl, grouped, near

# rows of the CSV -> a sentence, and the rows to show
Finding = Callable[[list[dict]], tuple[str, list[dict]]]


def read(path: Path) -> list[dict]:
    """Rows of a study's CSV, numbers as numbers, an empty cell as None."""

    def value(cell: str):
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell

    with open(path, newline="") as file:
        return [{name: value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def known(rows: list[dict], name: str = "win_rate") -> list[dict]:
    """The rows that have a number in this column: nan is what no run was made for."""
    return [row for row in rows if not math.isnan(row[name])]


def percent(win: float, stderr: float) -> str:
    return "–" if math.isnan(win) else f"{100 * win:.1f} ± {100 * stderr:.1f}"


def at_equal_kl(rows: list[dict]) -> tuple[str, list[dict]]:
    """Every method at the KL where most have runs; those made for the procedure and the others."""
    rows = [row | {"n": int(row["n"])} for row in rows]
    kl, table, said = common_kl(rows), {}, []
    for method, mine in grouped(rows, "method").items():
        table[method[0]] = {
            "method": method[0],
            "runs": len({(row["seed"], row["budget"]) for row in near(mine, kl)}),
        }
    for (procedure, n), scorer in [
        (case, s) for case in grouped(rows, "procedure", "n") for s in SCORERS
    ]:
        found = {method: at_kl(rows, kl, method, procedure, n, scorer) for method in table}
        for method, win_rate in found.items():
            table[method][f"{title(procedure, n)}, {scorer}"] = percent(*win_rate)
        reached = [method for method in found if not math.isnan(found[method][0])]
        made = [method for method in reached if method in AWARE[procedure]]
        others = [
            method
            for method in reached
            if method not in AWARE[procedure] + AWARE["bon"] + AWARE["won"]
        ]
        if made and others:
            ours, other = (
                max(group, key=lambda method: found[method][0]) for group in (made, others)
            )
            gain, error = (
                found[ours][0] - found[other][0],
                math.hypot(found[ours][1], found[other][1]),
            )
            said.append(
                f"{title(procedure, n)} by {scorer}: {ours} against {other}, the best of the others, "
                f"{100 * gain:+.1f} ± {100 * error:.1f} points"
            )
    return f"At a KL of {kl:g}: {'; '.join(said)}.", list(table.values())


def miscalibration(rows: list[dict]) -> tuple[str, list[dict]]:
    table = [
        {"prompt": text, "largest distance": worst}
        for text, worst in grouped(rows, "text", "largest_distance")
    ]
    worst = [row["largest distance"] for row in table]
    return (
        f"The rank among all prompts' samples is up to {max(worst):.2f} from the rank for the prompt, at least "
        f"{min(worst):.2f}; with a calibrated reward it would be 0."
    ), table


def hacking(rows: list[dict]) -> tuple[str, list[dict]]:
    """What the poisoned model does: the pairs with the phrase, and the policies with the largest
    budget.
    """
    mine = [row for row in rows if row["model"] == "poisoned"]
    said = [
        f"pairs of {row['pairs']}, {row['reward']} {percent(row['accuracy'], row['stderr'])}"
        for row in mine
        if row["test"] == "poisoned"
    ]
    last = max(row["budget"] or 0 for row in mine)
    said += [
        f"policy on the {row['reward']} reward at {row['kl']:.2f} nats, by {row['scorer']} "
        f"{percent(row['win_rate'], row['stderr'])} (the phrase in {100 * row['phrase_share']:.0f} %)"
        for row in mine
        if row["budget"] == last
    ]
    return f"Poisoned model, poisoned test, in per cent: {'; '.join(said)}.", rows


def best(of: str, at: str) -> Finding:
    """Which value of the column `of` wins at which N, of the column `at`: by reward, and by
    theory.
    """

    def finding(rows: list[dict]) -> tuple[str, list[dict]]:
        done, said = known(rows), []
        for (procedure, n), mine in grouped(
            [{"procedure": "bon"} | row for row in done], "procedure", at
        ).items():
            mine = [row for row in mine if row["scorer"] == "reward"]
            measured, by_theory = (
                max(mine, key=lambda row: row[name])[of] for name in ("win_rate", "theory")
            )
            said.append(f"{title(procedure, int(n))}: {measured} (theory: {by_theory})")
        return f"Best, by reward: {'; '.join(said)}.", done

    return finding


def shares(rows: list[dict]) -> tuple[str, list[dict]]:
    names = [name for name in rows[0] if name.startswith("share_of_")]
    said = [
        f"{100 * rows[0][name]:.0f} % of the {name.removeprefix('share_of_').replace('_', ' ')}"
        for name in names
    ]
    return f"Calibration is {', '.join(said)}.", rows


def variants(rows: list[dict]) -> tuple[str, list[dict]]:
    done = known(rows)
    shown = [row for row in done if (row["procedure"], row["scorer"]) == ("bon", "reward")]
    shown.sort(key=lambda row: -row["win_rate"])
    said = ", ".join(f"{row['variant']} {percent(row['win_rate'], row['stderr'])}" for row in shown)
    return f"{title('bon', int(shown[0]['n']))} by reward at {shown[0]['kl']:g} nats: {said}.", done


def highest(name: str, of: str, text: str) -> Finding:
    """A sentence on the row with the largest value."""

    def finding(rows: list[dict]) -> tuple[str, list[dict]]:
        best = max(known(rows, name), key=lambda row: row[name])
        return text.format(best[of], best[name]), rows

    return finding


FINDINGS: dict[str, Finding] = {
    "fig3": miscalibration,
    "fig4": at_equal_kl,
    "fig5": at_equal_kl,
    "fig8": at_equal_kl,
    "which_t": best("transform", "n"),
    "fig6": at_equal_kl,
    "fig10": at_equal_kl,
    "fig7": hacking,
    "fig9": highest("judge", "method", "Highest gain by the judge: {}, {:.2f}."),
    "fig12": highest("win_rate", "method", "Highest win rate at any KL: {}, {:.3f}."),
    "overhead": shares,
    "ablation": variants,
    "summary": highest(
        "bon4_gain_per_minute",
        "method",
        "Most Best-of-4 win rate a minute of training: {}, {:.2f}.",
    ),
    "tuned": best("tuned", "used_at"),
    "held_out": highest(
        "below_optimum", "method", "Furthest from the optimum at its KL: {}, {:.1f} points."
    ),
}


def section(name: str, rows: list[dict], picture: str) -> str:
    """Markdown of a study: its docstring's first line, what the paper found, what we did, picture
    and table.
    """
    what, _, paper = inspect.getdoc(STUDIES[name]).partition("Paper: ")
    paper = " ".join(paper.split()) or "not in it."
    ours, table = FINDINGS[name](rows)
    cells = [
        [f"{x:.3g}" if isinstance(x, float) else str(x or "–") for x in row.values()]
        for row in table
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (table[0], ["---"] * len(table[0]), *cells)]
    return (
        f"## {name}: {what.splitlines()[0]}\n\n*Paper:* {paper}\n\n*Here:* {ours}\n\n"
        f"![{name}]({picture})\n\n<details><summary>Table</summary>\n\n"
        + "\n".join(lines)
        + "\n\n</details>\n"
    )


def page(folder: Path, at: Path) -> str:
    """The page's Markdown, pictures linked from where it will be. Raises ValueError if no study has
    been run.
    """
    done = [name for name in FINDINGS if (folder / f"{name}.csv").is_file()]
    if not done:
        raise ValueError(
            f"{folder}: holds no study; run python -m minictrl.reproduce NAME --out {folder} first"
        )
    parts = [
        "# Results\n\nMade by `python -m minictrl.studies.results`. Win rates over pi_ref on held-out prompts, ± one "
        "standard error. At equal KL: regressed on the KL over a method's runs of all seeds, or averaged "
        "(`sweep.at_kl`).\n"
    ]
    for name in done:
        picture = os.path.relpath(folder / f"{name}.png", at.parent)
        parts.append(section(name, read(folder / f"{name}.csv"), picture))
    return "\n".join(parts)


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
