"""The leaderboard: `python -m minictrl.studies.leaderboard DIR` makes DIR/leaderboard.md from the
runs of the sweep in DIR, after it has trained and evaluated those that are missing.

One row a method, sorted, with the command that makes it; the paper's claims; and each study that
lies in DIR, with the paper's answer beside its picture. The runs' win rates are kept beside it, in
DIR/leaderboard.safetensors. A new method is a file in `methods/`, with its name in METHODS there;
then this trains it alone and compares it with the runs that docs/ keeps:

    python -m minictrl.studies.leaderboard DIR NAME --beside docs/leaderboard.safetensors
"""

import inspect
import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from minictrl import theory
from minictrl.cli import Parser, run_script
from minictrl.config import Config
from minictrl.figures import title
from minictrl.files import load_tensors, markdown, reading, save_tensors, save_text
from minictrl.reproduce import STUDIES
from minictrl.results import plus_minus
from minictrl.studies import sweep
from minictrl.studies.beyond import cost
from minictrl.studies.errors import Estimate, crossed
from minictrl.studies.sweep import OTHERS, VARIANTS
from minictrl.studies.tables import (
    SCORERS,
    Rows,
    ahead,
    below_optimum,
    column,
    common_slope,
    grouped,
    plain,
    where,
    wins_at,
)

CASES = (("bon", 4), ("won", 4), ("standard", 1))
KLS = (0.5, 1.0, 2.0)  # nats
CLAIMS = {  # the paper's -> the methods it is about, procedure, n, whether level is enough
    "exp10 is ahead of the paper's other methods on Best-of-4": (("exp10",), "bon", 4, False),
    "exp-10 or won_fp is ahead of them on Worst-of-4": (("exp-10", "won_fp"), "won", 4, False),
    "identity is level with the best, standard": (("identity",), "standard", 1, True),
}
PAPERS = ("identity", *OTHERS)  # the paper's methods that the claims are measured against
MARGIN = 0.01  # a method that is at most a point behind is level
HEAD = """# Leaderboard

Win rates over pi_ref in per cent, after the procedure, by reward / by judge, on {prompts} held-out
prompts with {samples} responses each. Runs are brought to each KL, in nats (`tables.wins_at`).

- ± is one standard error, of what new prompts and new seeds would do (`errors.py`); with one seed
  it is over prompts alone, with few it is itself uncertain: the claims' intervals count that in.
- *Behind the first*: a paired difference at KL {kl:g}, prompt by prompt and over the seeds that
  both have. The order is that of the means over all seeds, so a method may be level with the
  first although its mean is lower, or ahead of it.
- *Below the optimum*: the points by reward that are left to the best policy there is, at KL {kl:g}.
- *Seeds*: how many at KL {kl:g}.
- *Reward calls* are all of a run's, with the calibration's; *minutes* those of its steps:
  sampling, scoring and updates, without the calibration.
- Runs were made at commit {commits}.

A row is made by its command with `--kl` {budgets} and `--seed` 0, 1, …, and
`python evaluate.py RUN --prompts {prompts} --samples {samples}`; all of them by
`python -m minictrl.studies.leaderboard DIR{quick}`.
"""
NO_SLOPE = """
No method here has runs at two KLs, so nothing says what more KL is worth: a run that ended short of
the KL, or beyond it, stands here as if its share of the optimum's gain were the same there.
"""


def main(argv: list[str] | None = None):
    parser = Parser(
        "python -m minictrl.studies.leaderboard",
        "Makes DIR/leaderboard.md from the runs of a sweep.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the --out of minictrl.reproduce")
    add("methods", nargs="*", metavar="METHOD", help="train these alone (default: all)")
    sweep.add_scale(parser)
    add(
        "--beside",
        type=Path,
        metavar="FILE",
        help="another DIR's leaderboard.safetensors, of methods that DIR has no runs of",
    )
    args = parser.parse_args(argv)
    for name in args.methods:
        if name not in VARIANTS:
            parser.error(f"unknown method {name!r}; known: {', '.join(VARIANTS)}")
    sweep.resize(args)
    scale = sweep.SCALES[args.quick]
    beside = load_runs(args.beside, scale) if args.beside else []
    if beside:  # what would be refused at the end is refused now
        sweep.same_models([*beside, {"run": "today's default task", "made_from": sweep.digests()}])
    chosen = {name: VARIANTS[name] for name in args.methods or VARIANTS}
    sweep.sweep(args.folder, args.quick, chosen)
    scale["done"] = True  # the page has all runs that are there
    scale["seeds"] = sweep.seeds_in(args.folder, args.quick)
    rows = of_the_page(sweep.sweep(args.folder, args.quick, VARIANTS))
    mine = set(column(rows, "method"))
    rows += [row for row in beside if row["method"] not in mine]
    sweep.same_models(rows)
    save_runs(rows, args.folder / "leaderboard.safetensors")
    page = args.folder / "leaderboard.md"
    save_text(page, page_of(rows, args.folder, args.quick))
    print(f"{page}: {len(set(column(rows, 'method')))} methods")


# --- runs, as they are kept ---


def of_the_page(rows: Rows) -> Rows:
    """The rows of the page's procedures, each with its run's name, reward calls and seconds."""
    spent = {run: cost(Path(run)) for run in set(column(rows, "run"))}
    return [
        row | spent[row["run"]] | {"run": Path(row["run"]).name}
        for row in rows
        if (row["procedure"], row["n"]) in CASES
    ]


def save_runs(rows: Rows, path: Path):
    """Of each run its KLs and the win rates of its rows, by prompt: (1 + rows, P) float32; and its
    rows without them, with what it was made from.
    """
    runs = {name: group for (name,), group in grouped(rows, "run").items()}
    by_prompt = {
        name: torch.tensor(np.stack([group[0]["kls"], *column(group, "wins")])).float()
        for name, group in runs.items()
    }
    metadata = {}
    for name, group in runs.items():
        origin = {key: group[0][key] for key in ("made_from", "commit")}
        metadata[name] = json.dumps([row | origin for row in plain(group)])
    save_tensors(path, by_prompt, metadata)


def load_runs(path: Path, scale: dict) -> Rows:
    """The rows that `save_runs` wrote. Raises ValueError if the file is damaged or missing, or if
    its runs were not evaluated at the size of this scale.
    """
    with reading(path, "give a leaderboard.safetensors, such as the one in docs/"):
        by_prompt, metadata = load_tensors(path)
        found = [
            row | {"run": name, "kls": by_prompt[name][0].numpy(), "wins": wins.numpy()}
            for name, rows in metadata.items()
            for row, wins in zip(json.loads(rows), by_prompt[name][1:], strict=True)
        ]
    for row in found:
        if (row["prompts"], row["samples"]) != (scale["prompts"], scale["samples"]):
            change = "leave out" if scale is sweep.SCALES[True] else "add"
            raise ValueError(
                f"--beside {path}: its runs were evaluated on {row['prompts']} prompts with "
                f"{row['samples']} samples, yours are on {scale['prompts']} with "
                f"{scale['samples']}: {change} --quick"
            )
    return found


# --- the page ---


def page_of(rows: Rows, folder: Path, quick: bool) -> str:
    """Markdown of the whole page."""
    board = Board(rows)
    head = HEAD.format(
        prompts=rows[0]["prompts"],
        samples=rows[0]["samples"],
        kl=board.kl,
        budgets=", ".join(f"{kl:g}" for kl in sorted(set(column(rows, "budget")))),
        commits=commits(rows),
        quick=" --quick" if quick else "",
    )
    if not common_slope(rows, board.kl, procedure="bon", n=4, scorer="reward"):
        head += NO_SLOPE
    common = sweep.SCALES[quick]["train"]
    parts = [head, *(board.section(*case, common) for case in CASES), board.claims()]
    done = [name for name in STUDIES if (folder / f"{name}.csv").is_file()]
    return "\n".join(parts + [study(name) for name in done])


def commits(rows: Rows) -> str:
    """The commits of the runs, each with how many it made."""
    made = Counter(group[0]["commit"] for group in grouped(rows, "run").values())
    each = ((name or "unknown", count) for name, count in made.most_common())
    return ", ".join(f"{name[:7]}{name[40:]} ({count} runs)" for name, count in each)


class Board:
    """The methods of a sweep at the KLs of the leaderboard.

    kl: the one at which they are sorted and compared: 1 nat, or where more of them have runs.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        names = dict.fromkeys([*VARIANTS, *column(rows, "method")])  # known here, then the others
        self.methods = [name for name in names if where(rows, method=name)]
        self.wins = cache(  # seed -> (P,) win rates
            lambda method, kl, procedure, n, scorer: wins_at(
                rows, kl, method, procedure=procedure, n=n, scorer=scorer
            )
        )
        kls = sorted({*KLS, *column(rows, "budget")})
        self.kl = max(kls, key=lambda kl: (len(self.at(kl, "bon", 4)), kl == 1))
        self.kls = [kl for kl in kls if kl == self.kl or self.at(kl, "bon", 4)]

    def at(self, kl: float, procedure: str, n: int, scorer: str = "reward") -> dict[str, Estimate]:
        """method -> its win rate, the best first, of those that have runs at this KL."""
        found = {name: self.wins(name, kl, procedure, n, scorer) for name in self.methods}
        means = {name: crossed(list(wins.values())) for name, wins in found.items() if wins}
        return dict(sorted(means.items(), key=lambda item: -item[1].mean))

    def ahead(self, mine: str, other: str, procedure: str, n: int, scorer: str) -> Estimate:
        """How far one method is ahead of another."""
        case = (self.kl, procedure, n, scorer)
        return ahead(self.wins(mine, *case), self.wins(other, *case))

    def section(self, procedure: str, n: int, common: dict) -> str:
        """The table of a procedure. common: flags of every run."""
        order = list(self.at(self.kl, procedure, n))
        order += [name for name in self.methods if name not in order]
        first = order[0]
        columns = [f"KL {kl:g}" for kl in self.kls]
        more = ["behind the first", "below the optimum", "seeds", "reward calls", "minutes"]
        head, table = ["method", *columns, *more, "command"], []
        best = [f"*{100 * theory.optimal_win_rate(kl, procedure, n):.1f}*" for kl in self.kls]
        table.append(["*the best possible*", *best, *[""] * (len(more) + 1)])
        behind = {
            name: [self.ahead(first, name, procedure, n, by) for by in SCORERS]
            for name in order[1:]
        }
        for name in order:
            cells = self.line(name, procedure, n, behind.get(name, []))
            table.append([*cells, command(name, common)])
        lines = markdown(head, table)
        return f"## {title(procedure, n)}\n\n{lines}\n\n{smallest(behind)}\n"

    def line(self, name: str, procedure: str, n: int, behind: list[Estimate]) -> list[str]:
        """A method's row, but for its command."""
        cells = [name]
        for kl in self.kls:
            wins = [self.wins(name, kl, procedure, n, by) for by in SCORERS]
            cells.append(both([crossed(list(each.values())) for each in wins]))
            ended = column(where(self.rows, method=name, budget=kl), "kl")
            if ended and not wins[0]:
                cells[-1] += f" (ended at {fmean(ended):.2f})"
        mine = self.wins(name, self.kl, procedure, n, "reward")
        win_rate = crossed(list(mine.values())).mean
        below = f"{below_optimum(win_rate, self.kl, procedure, n):.1f}" if mine else "–"
        spent = {row["run"]: row for row in where(self.rows, method=name)}.values()
        calls = fmean(each["calls"] for each in spent) / 1000
        minutes = fmean(each["seconds"] for each in spent) / 60
        return [
            *cells,
            both(behind),
            below,
            str(len(mine)),
            f"{calls:.0f} thousand",
            f"{minutes:.1f}",
        ]

    def claims(self) -> str:
        """The paper's claims, each with its paired interval."""
        compared = self.at(self.kl, "bon", 4, "reward")
        others = [name for name in PAPERS if name in compared]
        lines = [
            f"## The paper's claims, at KL {self.kl:g}",
            "How far the method is ahead of the best of the paper's other ones with runs there "
            f"({', '.join(others)}), in points, with its 95 % interval. The best is picked by the "
            f"same runs, so a little of its lead is luck. Level: at most {100 * MARGIN:g} point "
            "behind.",
            markdown(
                ["claim", "by reward", "by judge"],
                [
                    [text, *(self.claim(*claim, by) for by in SCORERS)]
                    for text, claim in CLAIMS.items()
                ],
            ),
        ]
        return "\n\n".join(lines) + "\n"

    def claim(self, names: tuple, procedure: str, n: int, level: bool, scorer: str) -> str:
        """Whether one of the names is ahead, or level with, the best of the others."""
        order = list(self.at(self.kl, procedure, n, scorer))
        mine = [name for name in order if name in names]
        others = [name for name in order if name in PAPERS and name not in names]
        if not mine or not others:
            return "not run"
        pair = [self.wins(name, self.kl, procedure, n, scorer) for name in (mine[0], others[0])]
        seeds = pair[0].keys() & pair[1].keys()
        if not seeds:
            return "not run"
        found = ahead(*pair)
        low, high = found.interval
        least = -MARGIN if level else 0
        verdict = "yes" if low > least else "no" if high < least else "open"
        if len(seeds) == 1:
            verdict = "one seed"  # of what another would do its interval knows nothing
        points = f"{100 * found.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        return f"**{verdict}**: {mine[0]} over {others[0]} {points}"


def command(name: str, common: dict) -> str:
    """What trains a method."""
    if name not in VARIANTS:
        return "not known here"
    return f"`{Config(**VARIANTS[name] | common).resolved().command()}`"


def both(found: list[Estimate]) -> str:
    """By reward / by judge, in per cent with standard errors; – where there is none."""
    finite = [x for x in found if math.isfinite(x.mean)]
    cells = [f"{100 * x.mean:.1f}{plus_minus(100 * x.stderr, 1)}" for x in finite]
    return " / ".join(cells) or "–"


def smallest(behind: dict[str, list[Estimate]]) -> str:
    """What difference to the first this table can show (`Estimate.detectable`)."""
    found = []
    for i, scorer in enumerate(SCORERS):
        shown = [each[i].detectable for each in behind.values()]
        shown = [x for x in shown if math.isfinite(x)]
        if shown:
            found.append(f"{100 * median(shown):.1f} points by {scorer}")
    size = " and ".join(found) or "none: no two methods have runs of one seed"
    return (
        "The smallest difference to the first that this table shows in 80 % of all experiments, "
        f"the median over its rows: {size}."
    )


def study(name: str) -> str:
    """Markdown of a study: its question, the paper's answer, its picture and its CSV."""
    what, _, paper = (inspect.getdoc(STUDIES[name]) or "").partition("Paper: ")
    parts = [f"## {name}: {' '.join(what.split(chr(10) * 2)[0].split())}"]
    if paper:
        parts.append(f"*Paper:* {' '.join(paper.split())}")
    parts.append(f"![{name}]({name}.png)\n\n[{name}.csv]({name}.csv)")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_script(main)
