"""The paper's figures that need trained policies. All read the runs of one sweep (`sweep.py`).

Win rates are by reward model and by judge on held-out prompts, error bars one standard error over
seeds. Beside the measured curves: the theory of each transform (dashed, same colour) and the
optimum for the procedure (black).
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from minictrl import evaluation, runs, theory, winrate
from minictrl.config import Config
from minictrl.figures import KL, WIN_RATE, errorbars, panels, title, tradeoff
from minictrl.models import load_scorer
from minictrl.procedures import get_procedure, rewind
from minictrl.studies.sweep import (
    AWARE,
    METHODS,
    OTHERS,
    SCORERS,
    at_kl,
    common_kl,
    grouped,
    mean_stderr,
    pi_ref,
    points,
    scores,
    shown,
    sweep,
)

# --- win rate against KL ---


def curves(axis, table: list[dict], methods, procedure: str, n: int, scorer: str):
    """Measured curves of these methods, the theory of their transforms, and the optimum."""
    found = grouped(sorted(table, key=lambda p: p["kl"]), "method", "procedure", "n", "scorer")
    rows = [p for name in methods for p in found[name, procedure, n, scorer]]
    transforms = {name: METHODS.get(name, {}).get("transform", "none") for name in methods}
    expected = {
        name: x for name, x in transforms.items() if x != "none" and x not in theory.FIXED_POINTS
    }
    tradeoff(axis, rows, procedure, n, by="method", expected=expected)
    axis.set_title(f"{title(procedure, n)}, by {scorer}")
    axis.legend()


def against_kl(
    rows: list[dict], cases: list[tuple[str, int]], methods: tuple[str, ...] | None = None
):
    """A column for each (procedure, n), a row for each scorer, with means over seeds; the table has
    every run.

    methods: those drawn (default: those made for the procedure, and those made for none).
    """
    table, (figure, axes) = points(rows), panels(2, len(cases))
    for axis, (scorer, (procedure, n)) in zip(axes, product(SCORERS, cases)):
        drawn = methods or dict.fromkeys([*AWARE[procedure], "identity", *OTHERS])
        curves(axis, table, drawn, procedure, n, scorer)
    kept = ("method", "budget", "seed", *evaluation.FIELDS)
    return [
        {name: row.get(name) for name in kept}
        for row in rows
        if (row["procedure"], row["n"]) in cases
    ], figure


def fig4(out: Path, quick: bool):
    """Standard, Best-of-4 and Worst-of-4 win rate against KL, every method (Fig. 4).

    Paper: Identity is above IPO, BoNBoN and BoND on helpfulness and harmlessness, on par on
    summarisation; exp10 gains up to 3 % (helpfulness) and 8 % (summarisation) on Best-of-4, exp-10
    up to 5 % on Worst-of-4 over the best other method.
    """
    return against_kl(sweep(out, quick, METHODS), [("standard", 1), ("bon", 4), ("won", 4)])


def fig5(out: Path, quick: bool):
    """Best-of-2 and 32, Worst-of-2 (Fig. 5).

    Paper: exp5 is better for N = 2, exp10 for N = 4, as the analysis says, and both are above all
    others for all N.
    """
    return against_kl(sweep(out, quick, METHODS), [("bon", 2), ("bon", 32), ("won", 2)])


def fig8(out: Path, quick: bool):
    """Best-of-32 and Worst-of-32 (Fig. 8).

    Paper: The gains on Best-of-N are larger than at N = 4.
    """
    return against_kl(sweep(out, quick, METHODS), [("bon", 32), ("won", 32)])


def fig6(out: Path, quick: bool):
    """CTRL with identity, GRPO, and Best-of-n itself: standard win rate (Fig. 6).

    Paper: CTRL is similar to GRPO and closes the gap to Best-of-n.
    """
    return against_best_of(out, quick, [("standard", 1)], ("identity", "grpo", "none"))


def fig10(out: Path, quick: bool):
    """CTRL, GRPO, BoND and Best-of-n: standard and Best-of-4 (Fig. 10).

    GRPO online and, as in the paper (App. E.1), on the fixed K rollouts of pi_ref.

    Paper: CTRL is above GRPO on Best-of-4 and comparable on the standard win rate.
    """
    return against_best_of(
        out,
        quick,
        [("standard", 1), ("bon", 4)],
        ("identity", "exp10", "grpo", "grpo_fixed", "bond"),
    )


def against_best_of(out: Path, quick: bool, cases: list[tuple[str, int]], methods: tuple[str, ...]):
    rows = sweep(out, quick, {name: METHODS[name] for name in methods}) + best_of(out, quick)
    return against_kl(rows, cases, (*methods, "Best-of-n"))


def best_of(out: Path, quick: bool) -> list[dict]:
    """Best-of-n itself as rows of a sweep: fresh samples of pi_ref, an exact U-statistic, the KL
    that a continuous reward has, log n - (n - 1)/n (an upper bound with ties)."""
    P, M, fresh = (24, 32, 64) if quick else (200, 64, 256)
    config = Config(prompts=P, cache=str(out / "cache")).resolved()
    task, r, texts = pi_ref(config, M + fresh)
    both = {
        "reward": r,
        "judge": runs.score(load_scorer(config.judge, "judge"), task.prompts, texts),
    }
    select_ref, select, rows = r[:, :M].double(), r[:, M:], []
    for size, (procedure, n) in product((2, 4, 8), (("standard", 1), ("bon", 4), ("won", 4))):
        kl = math.log(size) - (size - 1) / size
        weight = best_of_weights(select, size, procedure, n)
        weight_ref = get_procedure(procedure).weights(select_ref, n, torch.empty(0))
        for scorer, x in both.items():
            # (P,)
            wins = (weight * winrate.beaten(x[:, M:].double(), x[:, :M].double(), weight_ref)).sum(
                1
            )
            rows.append(
                dict(
                    method="Best-of-n",
                    budget=size,
                    seed=0,
                    procedure=procedure,
                    n=n,
                    scorer=scorer,
                    win_rate=wins.mean().item(),
                    stderr=wins.std().item() / P**0.5,
                    kl=kl,
                    kl_stderr=0.0,
                    theory=theory.at_kl("log", kl, procedure, n),
                    optimal=theory.optimal_win_rate(kl, procedure, n),
                )
            )
    return rows


def best_of_weights(select: Tensor, size: int, procedure: str, n: int) -> Tensor:
    """(P, M) the probability that each of M responses is the one kept, when the procedure draws n
    from Best-of-`size`.

    Over all ways to fill n groups of `size` without repetition. Worst-of-n: it is above the m
    lowest if every group has one above them, by inclusion and exclusion. Raises ValueError on fewer
    than n * size samples.
    """
    M = select.shape[1]
    if M < n * size:
        raise ValueError(
            f"{M} samples a prompt: {procedure} {n} of Best-of-{size} needs {n * size}; draw more"
        )
    if procedure != "won":
        return winrate.bon(select.double(), n * size, torch.empty(0))
    below = [
        [Fraction(math.comb(m, j * size), math.comb(M, j * size)) for j in range(n + 1)]
        for m in range(M + 1)
    ]
    cdf = [
        float(1 - sum((-1) ** j * math.comb(n, j) * p for j, p in enumerate(row))) for row in below
    ]
    return winrate.by_rank(select.double(), cdf)


# --- other pictures of the sweep ---


def which_t(out: Path, quick: bool):
    """Which t of exp_t is best at which N, at equal KL: measured, and by theory, which trains
    nothing (Sec. 5.6).

    Paper: exp5 for Best-of-2, exp10 for Best-of-4, as theory says without training.
    """
    rows, sizes, table, (figure, axes) = sweep(out, quick, METHODS), (2, 4, 32), [], panels(1, 2)
    families = {"bon": ("identity", "exp5", "exp10"), "won": ("identity", "exp-5", "exp-10")}
    for axis, (procedure, names) in zip(axes, families.items()):
        kl = common_kl(rows, names)
        for name, n, scorer in product(names, sizes, SCORERS):
            win, stderr = at_kl(rows, kl, name, procedure, n, scorer)
            table.append(
                dict(
                    procedure=procedure,
                    n=n,
                    transform=name,
                    scorer=scorer,
                    kl=kl,
                    win_rate=win,
                    stderr=stderr,
                    theory=theory.at_kl(name, kl, procedure, n),
                )
            )
        over_n(axis, [row for row in table if row["procedure"] == procedure], "n", by="transform")
        axis.set_title(f"{title(procedure, 'N')} at {kl:g} nats, by reward; dashed: theory")
    return table, figure


def over_n(axis, table: list[dict], n: str, *, by: str):
    """Win rates by reward against the N of column `n`, and theory's beside them."""
    mine = [row for row in table if row["scorer"] == "reward"]
    errorbars(axis, mine, n, "win_rate", by=by, yerr="stderr", dashed="theory")
    axis.set_xscale("log", base=2)
    sizes = sorted({row[n] for row in mine})
    axis.set_xticks(sizes, sizes)
    axis.set(xlabel="N", ylabel=WIN_RATE)
    axis.legend()


def fig9(out: Path, quick: bool):
    """Raw judge and reward of a response minus those of pi_ref's, against KL (Fig. 9): one a prompt
    and run.

    Paper: CTRL is above the other methods in expected raw judge reward too.
    """
    rows, table, (figure, axes) = sweep(out, quick, METHODS), [], panels(1, 2)
    for row in {row["run"]: row for row in rows}.values():
        gains = {s: fmean(x[s] - x[f"{s}_reference"] for x in shown(row["run"])) for s in SCORERS}
        table.append({name: row[name] for name in ("method", "budget", "seed", "kl")} | gains)
    for axis, scorer in zip(axes, SCORERS[::-1]):
        means = []
        for (method, _), group in grouped(table, "method", "budget").items():
            gain, stderr = mean_stderr([row[scorer] for row in group])
            means.append(
                dict(method=method, kl=fmean(row["kl"] for row in group), gain=gain, stderr=stderr)
            )
        means.sort(key=lambda row: row["kl"])
        drawn = [
            row for name in ("identity", "exp10", *OTHERS) for row in means if row["method"] == name
        ]
        errorbars(axis, drawn, "kl", "gain", by="method", yerr="stderr")
        axis.set(title=f"raw {scorer}", xlabel=KL, ylabel="mean score minus pi_ref's")
        axis.legend()
    return table, figure


def fig12(out: Path, quick: bool):
    """Rewind-and-repeat, 85th percentile, at most 32 draws: win rate and how many draws were made
    (Fig. 12).

    Paper: exp transforms are above the baselines; aligned policies need fewer draws.
    """
    methods = {name: METHODS[name] for name in ("none", "identity", "exp5", "exp10")}
    methods["rewind"] = {"transform": "optimal", "procedure": "rewind"}
    rows, (figure, axes) = [], panels(1, 3)
    for row in {row["run"]: row for row in sweep(out, quick, methods)}.values():
        s, best = scores(Path(row["run"])), theory.optimal_win_rate(row["kl"], "rewind", 32)
        draws = mean_draws(s["reward"], rewind.threshold_of(s["reward_ref"]), 32)
        for scorer in SCORERS:
            win, stderr = winrate.win_rate(
                s["reward"], s[scorer], s["reward_ref"], s[f"{scorer}_ref"], "rewind", 32
            )
            rows.append(
                row
                | dict(
                    procedure="rewind",
                    n=32,
                    scorer=scorer,
                    win_rate=win,
                    stderr=stderr,
                    theory=None,
                    optimal=best,
                    draws=draws,
                )
            )
    draws = {
        key: fmean(r["draws"] for r in group)
        for key, group in grouped(rows, "method", "budget").items()
    }
    table = [p | {"draws": draws[p["method"], p["budget"]]} for p in points(rows)]
    for axis, scorer in zip(axes, SCORERS):
        curves(axis, table, methods, "rewind", 32, scorer)
    errorbars(
        axes[2],
        [row for row in rows if row["scorer"] == "reward"],
        "kl",
        "draws",
        by="method",
        fmt="o",
    )
    axes[2].set(
        title="draws needed (32 at most)", xlabel=KL, ylabel="mean number of draws", ylim=(0, None)
    )
    axes[2].legend()
    return table, figure


def mean_draws(select: Tensor, threshold: Tensor, n: int) -> float:
    """Draws of rewind-and-repeat on average, unbiased: the sum over m < n of the chance that m of M
    (P, M) all fail.
    """
    M, fails = select.shape[1], (select < threshold[:, None]).sum(1)
    expected = torch.tensor(
        [sum(math.comb(f, m) / math.comb(M, m) for m in range(n)) for f in range(M + 1)]
    )
    return expected[fails].mean().item()


STUDIES = (fig4, fig5, fig6, fig8, fig9, fig10, fig12, which_t)
