"""The paper's figures that need trained policies. All read the runs of one sweep (`sweep.py`).

Win rates are by reward model and by judge on held-out prompts, error bars one standard error over seeds. Beside the
measured curves: the theory of each transform (dashed, same colour) and the optimum for the procedure (black).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from minictrl import evaluation, runs, theory, winrate
from minictrl.config import Config
from minictrl.models import load_scorer
from minictrl.studies_theory import TITLES, panels
from minictrl.sweep import (
    AWARE,
    METHODS,
    OTHERS,
    SCORERS,
    at_kl,
    common_kl,
    mean_stderr,
    points,
    scores,
    sweep,
    texts_of,
)

ALIGNED = {
    "standard": ("identity", "log"),
    "bon": AWARE["bon"],
    "won": AWARE["won"],
    "rewind": ("identity", "exp5", "exp10", "rewind"),
}
COLORS = {
    name: f"C{i}"
    for i, name in enumerate(("exp10", "none", "ipo", "identity", "bonbon", "bond", "grpo", "exp5", "log", "bon_fp"))
}
COLORS |= {
    "exp-10": "C0",
    "exp-5": "C7",
    "won_fp": "C9",
    "qrpo exp10": "darkred",
    "qrpo exp-10": "darkred",
    "pkpo bon": "navy",
    "pkpo won": "navy",
    "rewind": "navy",
}


# --- figures of the sweep ---


def curve(axis, rows: list[dict], methods, procedure: str, n: int, scorer: str, *, best: bool = True):
    """Measured curves with error bars, the theory of their transforms, and the optimum."""
    chosen = [p for p in points(rows) if (p["procedure"], p["n"], p["scorer"]) == (procedure, n, scorer)]
    kls = [max([p["kl"] for p in chosen], default=1.0) * (i / 24) ** 2 for i in range(25)]
    if best:
        axis.plot(kls, [theory.optimal_win_rate(kl, procedure, n) for kl in kls], color="black", label="optimum")
    for name in methods:
        line = sorted((p for p in chosen if p["method"] == name), key=lambda p: p["kl"])
        style = dict(color=COLORS.get(name, "grey"))
        axis.errorbar(
            [p["kl"] for p in line],
            [p["win_rate"] for p in line],
            [p["stderr"] for p in line],
            [p["kl_stderr"] for p in line],
            fmt="o-",
            markersize=4,
            capsize=2,
            label=name,
            **style,
        )
        transform = METHODS.get(name, {}).get("transform", "none")
        if best and transform not in theory.FIXED_POINTS and transform != "none":
            axis.plot(kls, [theory.at_kl(transform, kl, procedure, n) for kl in kls], "--", linewidth=1, **style)
    axis.set(
        title=f"{TITLES[procedure].format(n=n)}, by {scorer}",
        xlabel="KL(pi || pi_ref) [nats]",
        ylabel="win rate over pi_ref",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)


def figure_of(out: Path, quick: bool, cases: list[tuple[str, int]]):
    """A column for each (procedure, n), a row for each scorer; the table has every method of the sweep."""
    rows, (figure, axes) = sweep(out, quick, METHODS), panels(2, len(cases))
    for i, scorer in enumerate(SCORERS):
        for axis, (procedure, n) in zip(axes[i * len(cases) :], cases):
            curve(axis, rows, dict.fromkeys([*ALIGNED[procedure], "identity", *OTHERS]), procedure, n, scorer)
    return [p for p in points(rows) if (p["procedure"], p["n"]) in cases], figure


def fig4(out: Path, quick: bool):
    """Standard, Best-of-4 and Worst-of-4 win rate against KL, every method (Fig. 4)."""
    return figure_of(out, quick, [("standard", 1), ("bon", 4), ("won", 4)])


def fig5(out: Path, quick: bool):
    """Best-of-2 and 32, Worst-of-2 (Fig. 5)."""
    return figure_of(out, quick, [("bon", 2), ("bon", 32), ("won", 2)])


def fig8(out: Path, quick: bool):
    """Best-of-32 and Worst-of-32 (Fig. 8)."""
    return figure_of(out, quick, [("bon", 32), ("won", 32)])


def which_t(out: Path, quick: bool):
    """Which t of exp_t is best at which N, at equal KL: measured, and by theory, which trains nothing (Sec. 5.6)."""
    rows, (figure, axes), table = sweep(out, quick, METHODS), panels(1, 2), []
    for axis, (procedure, names) in zip(
        axes, (("bon", ("identity", "exp5", "exp10")), ("won", ("identity", "exp-5", "exp-10")))
    ):
        kl = common_kl(rows, names)
        for name in names:
            for n in (2, 4, 32):
                for scorer in SCORERS:
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
            mine = [
                row
                for row in table
                if (row["procedure"], row["transform"], row["scorer"]) == (procedure, name, "reward")
            ]
            style, x = dict(color=COLORS[name]), range(3)
            axis.errorbar(
                x,
                [row["win_rate"] for row in mine],
                [row["stderr"] for row in mine],
                fmt="o-",
                capsize=2,
                label=name,
                **style,
            )
            axis.plot(x, [row["theory"] for row in mine], "--", linewidth=1, **style)
        axis.set_xticks(x, [f"N = {n}" for n in (2, 4, 32)])
        axis.set(
            title=f"{TITLES[procedure].format(n='N')} at {kl:g} nats, by reward; dashed: theory",
            ylabel="win rate over pi_ref",
        )
        axis.legend(fontsize=8)
    return table, figure


def best_of(out: Path, quick: bool) -> list[dict]:
    """Best-of-n itself as rows of a sweep: fresh samples of pi_ref, an exact U-statistic, the KL that a continuous
    reward has, log n - (n - 1)/n (an upper bound with ties)."""
    P, M, fresh = (24, 32, 64) if quick else (200, 64, 256)
    config = replace(Config().resolved(), prompts=P, cache=str(out / "cache"))
    task, judge = runs.load_task(config, "test"), load_scorer(config.judge, "judge")
    reference = runs.reference_samples(task, config, M + fresh, seed=evaluation.REFERENCE_SEED, name="pi_ref")
    both = {"reward": reference.r_ref, "judge": runs.score(judge, task.prompts, texts_of(task, reference))}
    rows = []
    for size in (2, 4, 8):
        kl = math.log(size) - (size - 1) / size
        for procedure, n in (("standard", 1), ("bon", 4), ("won", 4)):
            weight = best_of_weights(both["reward"][:, M:], size, procedure, n)
            weight_ref = winrate.WEIGHTS[procedure](both["reward"][:, :M].double(), n, torch.empty(0))
            for scorer in SCORERS:
                wins = (
                    weight * winrate.beaten(both[scorer][:, M:].double(), both[scorer][:, :M].double(), weight_ref)
                ).sum(1)
                rows.append(
                    {"method": "Best-of-n", "budget": size, "seed": 0, "run": ""}
                    | dict(
                        zip(
                            evaluation.FIELDS,
                            (
                                procedure,
                                n,
                                scorer,
                                wins.mean().item(),
                                wins.std().item() / P**0.5,
                                kl,
                                0.0,
                                theory.at_kl("log", kl, procedure, n),
                                theory.optimal_win_rate(kl, procedure, n),
                                P,
                                M,
                            ),
                        )
                    )
                )
    return rows


def best_of_weights(select: Tensor, size: int, procedure: str, n: int) -> Tensor:
    """(P, M) the probability that each of M responses is the one kept, when the procedure draws n from Best-of-`size`.

    Over all ways to fill n groups of `size` without repetition. Worst-of-n: it is above the m lowest if every group
    has one above them, by inclusion and exclusion. Raises ValueError on fewer than n * size samples.
    """
    M = select.shape[1]
    if M < n * size:
        raise ValueError(f"{M} samples a prompt: {procedure} {n} of Best-of-{size} needs {n * size}; draw more")
    if procedure != "won":
        return winrate.bon(select.double(), n * size, torch.empty(0))
    below = [[Fraction(math.comb(m, j * size), math.comb(M, j * size)) for j in range(n + 1)] for m in range(M + 1)]
    cdf = [float(1 - sum((-1) ** j * math.comb(n, j) * p for j, p in enumerate(row))) for row in below]
    return winrate._by_rank(select.double(), cdf)


def against_grpo(out: Path, quick: bool, cases: list[tuple[str, int]], methods: tuple[str, ...]):
    rows = sweep(out, quick, {name: METHODS[name] for name in methods}) + best_of(out, quick)
    figure, axes = panels(len(cases), 2)
    for i, (procedure, n) in enumerate(cases):
        for axis, scorer in zip(axes[2 * i :], SCORERS):
            curve(axis, rows, [*methods, "Best-of-n"], procedure, n, scorer)
    return [p for p in points(rows) if (p["procedure"], p["n"]) in cases], figure


def fig6(out: Path, quick: bool):
    """CTRL with identity, GRPO, and Best-of-n itself: standard win rate (Fig. 6)."""
    return against_grpo(out, quick, [("standard", 1)], ("identity", "grpo", "none"))


def fig10(out: Path, quick: bool):
    """CTRL, GRPO, BoND and Best-of-n: standard and Best-of-4 (Fig. 10)."""
    return against_grpo(out, quick, [("standard", 1), ("bon", 4)], ("identity", "exp10", "grpo", "bond"))


def fig9(out: Path, quick: bool):
    """Raw judge and reward of a response minus those of pi_ref's, against KL (Fig. 9): one a prompt and run."""
    rows, (figure, axes), table, seen = sweep(out, quick, METHODS), panels(1, 2), [], set()
    for row in rows:
        if row["run"] not in seen and not seen.add(row["run"]):
            shown = [json.loads(line) for line in (Path(row["run"]) / "samples.jsonl").read_text().splitlines()]
            gains = {s: sum(x[s] - x[f"{s}_reference"] for x in shown) / len(shown) for s in SCORERS}
            table.append(
                {"method": row["method"], "budget": row["budget"], "seed": row["seed"], "kl": row["kl"]} | gains
            )
    for axis, scorer in zip(axes, SCORERS[::-1]):
        for name in ("identity", "exp10", *OTHERS):
            groups = [
                [r for r in table if (r["method"], r["budget"]) == (name, b)]
                for b in sorted({r["budget"] for r in table})
            ]
            at = sorted(
                (mean_stderr([r["kl"] for r in g])[0], *mean_stderr([r[scorer] for r in g])) for g in groups if g
            )
            axis.errorbar(*zip(*at), fmt="o-", markersize=4, capsize=2, label=name, color=COLORS[name])
        axis.set(title=f"raw {scorer}", xlabel="KL(pi || pi_ref) [nats]", ylabel="mean score minus pi_ref's")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return table, figure


def fig12(out: Path, quick: bool):
    """Rewind-and-repeat, 85th percentile, at most 32 draws: win rate and how many draws were made (Fig. 12)."""
    methods = {name: METHODS[name] for name in ("none", "identity", "exp5", "exp10")}
    methods["rewind"] = {"transform": "optimal", "procedure": "rewind"}
    found, (figure, axes), rows = sweep(out, quick, methods), panels(1, 3), []
    for row in {row["run"]: row for row in found}.values():
        s = scores(Path(row["run"]))
        draws = mean_draws(s["reward"], winrate.rewind_threshold(s["reward_ref"]), 32)
        for scorer in SCORERS:
            wins, stderr = winrate.win_rate(s["reward"], s[scorer], s["reward_ref"], s[f"{scorer}_ref"], "rewind", 32)
            rows.append(
                row
                | dict(
                    procedure="rewind",
                    n=32,
                    scorer=scorer,
                    win_rate=wins,
                    stderr=stderr,
                    theory=None,
                    draws=draws,
                    optimal=theory.optimal_win_rate(row["kl"], "rewind", 32),
                )
            )
    for axis, scorer in zip(axes, SCORERS):
        curve(axis, rows, list(methods), "rewind", 32, scorer)
    for name in methods:
        mine = sorted((r["kl"], r["draws"]) for r in rows if r["method"] == name and r["scorer"] == "reward")
        axes[2].plot(*zip(*mine), "o", markersize=4, label=name, color=COLORS[name])
    axes[2].set(
        title="draws needed (32 at most)",
        xlabel="KL(pi || pi_ref) [nats]",
        ylabel="mean number of draws",
        ylim=(0, None),
    )
    axes[2].legend(fontsize=7)
    draws = {(r["method"], r["budget"]): [] for r in rows}
    for r in rows:
        draws[r["method"], r["budget"]].append(r["draws"])
    return [p | {"draws": mean_stderr(draws[p["method"], p["budget"]])[0]} for p in points(rows)], figure


def mean_draws(select: Tensor, threshold: Tensor, n: int) -> float:
    """Draws of rewind-and-repeat on average, unbiased: the sum over m < n of the chance that m of M (P, M) all fail."""
    M, fails = select.shape[1], (select < threshold[:, None]).sum(1)
    expected = torch.tensor([sum(math.comb(f, m) / math.comb(M, m) for m in range(n)) for f in range(M + 1)])
    return expected[fails].mean().item()


STUDIES = {
    "fig4": fig4,
    "fig5": fig5,
    "fig6": fig6,
    "fig8": fig8,
    "fig9": fig9,
    "fig10": fig10,
    "fig12": fig12,
    "which_t": which_t,
}
