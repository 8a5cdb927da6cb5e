"""Comparisons that the paper does not have: every method at equal KL and what it costs, another N,
training prompts, parts of the calibration. They read the runs of the same sweep (`sweep.py`).
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

from minictrl import runs, theory
from minictrl.figures import WIN_RATE, errorbars, panels, title
from minictrl.methods import ONLINE
from minictrl.sampling import sample
from minictrl.studies.sweep import METHODS, SCALES, SCORERS, at_kl, common_kl, points, sweep
from minictrl.studies.trained import over_n


def summary(out: Path, quick: bool):
    """Every method at the KL where most have runs: win rates, distance to the optimum, cost."""
    rows = sweep(out, quick, METHODS)
    kl, table, drawn = common_kl(rows), [], []
    for name in dict.fromkeys(row["method"] for row in rows):
        spent = cost(
            Path(max((r for r in rows if r["method"] == name), key=lambda r: r["kl"])["run"])
        )
        entry = {"method": name, "kl": kl}
        for procedure in ("bon", "won"):
            for scorer in SCORERS:
                win, stderr = at_kl(rows, kl, name, procedure, 4, scorer)
                entry |= {f"{procedure}4_{scorer}": win, f"{procedure}4_{scorer}_stderr": stderr}
                drawn.append(
                    dict(
                        method=name, procedure=procedure, scorer=scorer, win_rate=win, stderr=stderr
                    )
                )
            win = entry[f"{procedure}4_reward"]
            entry |= {
                f"{procedure}4_below_optimum": 100
                * (theory.optimal_win_rate(kl, procedure, 4) - win),
                f"{procedure}4_gain_per_million_calls": (win - 0.5) / spent["calls"] * 1e6,
                f"{procedure}4_gain_per_minute": (win - 0.5) / spent["seconds"] * 60,
            }
        table.append(entry | {f"train_{key}": value for key, value in spent.items()})
    figure, axes = panels(1, 2)
    for axis, procedure in zip(axes, ("bon", "won")):
        axis.axvline(theory.optimal_win_rate(kl, procedure, 4), color="black", label="optimum")
        by_method(axis, drawn, procedure, 4, kl)
    return table, figure


def by_method(axis, rows: list[dict], procedure: str, n: int, kl: float):
    """Win rates of a procedure by reward and by judge, a line of the picture for each method; nan
    is left out.
    """
    mine = [row for row in rows if row["procedure"] == procedure and row["win_rate"] > 0]
    errorbars(axis, mine, "win_rate", "method", by="scorer", xerr="stderr", fmt="o")
    axis.set(title=f"{title(procedure, n)} at {kl:g} nats", xlabel=WIN_RATE)
    axis.legend()


def tuned(out: Path, quick: bool):
    """What a policy trained for Best-of-N loses at another N, at equal KL; theory beside it.

    Paper: Both exp transforms are above the baselines at every N.
    """
    sizes, budgets, table = (2, 4, 32), (2.0,) if quick else (0.5, 1.0, 2.0), []
    methods = {f"bon_fp {n}": {"transform": "bon_fp", "n": n} for n in (2, 32)}
    methods |= {name: METHODS[name] for name in ("bon_fp", "exp5", "exp10")}
    rows = sweep(out, quick, methods, budgets=budgets)
    kl = common_kl(rows)
    for name, settings in methods.items():
        Phi, N = settings["transform"], settings.get("n", 4)
        if Phi == "bon_fp":
            Phi = theory.fixed_point("bon_fp", "bon", N, theory.beta_for_kl("bon_fp", kl, n=N))
        for n, scorer in product(sizes, SCORERS):
            win, stderr = at_kl(rows, kl, name, "bon", n, scorer)
            table.append(
                dict(
                    tuned="bon_fp 4" if name == "bon_fp" else name,
                    used_at=n,
                    scorer=scorer,
                    kl=kl,
                    win_rate=win,
                    stderr=stderr,
                    theory=theory.at_kl(Phi, kl, "bon", n),
                )
            )
    figure, (axis,) = panels(1, 1)
    over_n(axis, table, "used_at", by="tuned")
    axis.set_title(f"Best-of-N at {kl:g} nats, by reward; dashed: theory")
    return table, figure


def held_out(out: Path, quick: bool):
    """Training prompts against held-out ones: distance to the optimum at the measured KL, in
    points.
    """
    names = ("none", "identity", "exp10", "ipo", "qrpo exp10", "pkpo bon")
    methods, budgets, table = (
        {name: METHODS[name] for name in names},
        (2.0,) if quick else (1.0,),
        [],
    )
    for split in ("train", "test"):
        for p in points(sweep(out, quick, methods, budgets=budgets, split=split)):
            if (p["procedure"], p["n"]) == ("bon", 4):
                table.append(
                    {"split": split} | p | {"below_optimum": 100 * (p["optimal"] - p["win_rate"])}
                )
    figure, (axis,) = panels(1, 1, width=7)
    drawn = [row | {"error": 100 * row["stderr"]} for row in table if row["scorer"] == "reward"]
    errorbars(axis, drawn, "method", "below_optimum", by="split", yerr="error", fmt="o")
    axis.set(title="Best-of-4 by reward", ylabel="points below the optimum at the measured KL")
    axis.legend(title="prompts")
    return table, figure


def ablation(out: Path, quick: bool):
    """What of the calibration matters: raw reward, minus the prompt's median, standardised per
    prompt, K samples.

    A constant per prompt doesn't move the optimum: `median` gains only by what it does for the
    baseline.

    Paper: “Calibration based on the median rewards per prompt” is named for Worst-of-N (Sec. 5.5);
    K = 100 throughout.
    """
    methods = {name: {"transform": name} for name in ("none", "median", "standardised")}
    methods |= {
        f"{name} K {K}": {"transform": name, "K": K}
        for name in ("identity", "exp10")
        for K in (10, 30, 300)
    }
    # K = 100: the sweep's own runs
    methods |= {name: METHODS[name] for name in ("identity", "exp10")}
    rows = sweep(out, quick, methods, budgets=(2.0,) if quick else (0.5, 1.0, 2.0))
    kl, cases, table = common_kl(rows), (("standard", 1), ("bon", 4)), []
    for name, (procedure, n), scorer in product(methods, cases, SCORERS):
        win, stderr = at_kl(rows, kl, name, procedure, n, scorer)
        table.append(
            dict(
                variant=name + " K 100" * (name in ("identity", "exp10")),
                procedure=procedure,
                n=n,
                scorer=scorer,
                kl=kl,
                win_rate=win,
                stderr=stderr,
                below_optimum=100 * (theory.optimal_win_rate(kl, procedure, n) - win),
            )
        )
    figure, axes = panels(1, 2, width=6)
    for axis, (procedure, n) in zip(axes, cases):
        by_method(axis, [row | {"method": row["variant"]} for row in table], procedure, n, kl)
    return table, figure


def cost(run: Path) -> dict[str, float]:
    """Reward calls, tokens and seconds of a run's training, cached samples not timed.

    Calls: the calibration's (raw rewards take theirs for beta), one a response and, with --baseline
    prefix, one a token.
    """
    config, _ = runs.load_config(run)
    last, online = runs.read_metrics(run)[-1], config.method in ONLINE
    calls = config.prompts * config.K + online * config.steps * config.batch * config.G
    calls += last["tokens"] * (online and config.baseline == "prefix")
    return {"calls": calls, "tokens": last["tokens"], "seconds": last["seconds"]}


def overhead(out: Path, quick: bool):
    """The share of calibration in a run of train.py (App. E): reward calls, tokens, seconds,
    forward passes of a token.

    A backward pass counts two. The calibration of 32 prompts is timed, nothing cached, and scaled
    to all prompts.

    Paper: About 29 % of the training time at K = 100 and 80 epochs.
    """
    # the default's, if it is there
    budget = min(SCALES[quick]["budgets"], key=lambda kl: abs(kl - 1))
    run = Path(sweep(out, quick, {"exp10": METHODS["exp10"]}, budgets=(budget,), seeds=1)[0]["run"])
    config, _ = runs.load_config(run)
    task, part, start = (
        runs.load_task(config, "train"),
        min(32, config.prompts),
        time.perf_counter(),
    )
    samples = sample(
        task.policy,
        task.tokenizer,
        task.texts[:part],
        num_samples=config.K,
        max_new_tokens=task.max_new_tokens,
        seed=0,
    )
    drawn = time.perf_counter()
    runs.score(task.reward, task.prompts[:part], samples.texts)
    scored, scale, total = time.perf_counter(), config.prompts / part, cost(run)
    tokens = int(samples.mask.sum()) * scale
    names = ["reward_calls", "tokens", "forward_passes", "seconds"]
    calibration = config.prompts * config.K, tokens, tokens, (scored - start) * scale
    training = (
        total["calls"] - calibration[0],
        total["tokens"],
        total["tokens"] * (2 + 3 * config.ppo_epochs),
        total["seconds"],
    )
    rows = [
        {
            "stage": "calibration",
            **dict(zip(names, calibration)),
            "seconds_sampling": (drawn - start) * scale,
        },
        {"stage": "training", **dict(zip(names, training)), "seconds_sampling": None},
    ]
    for row in rows:
        row |= {
            f"share_of_{name}": row[name] / sum(other[name] for other in rows) for name in names
        }
    figure, (axis,) = panels(1, 1)
    share = [100 * rows[0][f"share_of_{name}"] for name in names]
    axis.bar(names, 100, label="training")
    axis.bar(names, share, label="calibration")
    axis.axhline(29, color="black", linestyle=":", label="the paper's share of time")
    axis.set(
        title=f"{run.name}: K = {config.K}, {config.prompts} prompts, {config.steps} steps",
        ylabel="share [%]",
    )
    axis.legend()
    return rows, figure


STUDIES = (summary, tuned, held_out, ablation, overhead)
