"""Comparisons that the paper does not have: every method at equal KL and what it costs, another N, training prompts,
parts of the calibration. They read the runs of the same sweep (`sweep.py`).
"""

from __future__ import annotations

import time
from pathlib import Path

from minictrl import runs, theory
from minictrl.sampling import sample
from minictrl.studies_theory import TITLES, panels
from minictrl.sweep import METHODS, SCALES, SCORERS, at_kl, common_kl, points, sweep


def summary(out: Path, quick: bool):
    """Every method at the largest KL that all reach: win rates, distance to the optimum, what they cost."""
    rows = sweep(out, quick, METHODS)
    kl, (figure, axes), table = common_kl(rows, of=0.75), panels(1, 2), []
    for name in METHODS:
        spent = cost(Path(max((r for r in rows if r["method"] == name), key=lambda r: r["kl"])["run"]))
        entry = {"method": name, "kl": kl}
        for procedure in ("bon", "won"):
            best = theory.optimal_win_rate(kl, procedure, 4)
            for scorer in SCORERS:
                entry[f"{procedure}4_{scorer}"], entry[f"{procedure}4_{scorer}_stderr"] = at_kl(
                    rows, kl, name, procedure, 4, scorer
                )
            gain = entry[f"{procedure}4_reward"] - 0.5
            entry |= {
                f"{procedure}4_below_optimum": 100 * (best - 0.5 - gain),
                f"{procedure}4_gain_per_million_calls": gain / spent["calls"] * 1e6,
                f"{procedure}4_gain_per_minute": gain / spent["seconds"] * 60,
            }
        table.append(entry | {f"train_{key}": value for key, value in spent.items()})
    for axis, procedure in zip(axes, ("bon", "won")):
        order = sorted(
            (row for row in table if row[f"{procedure}4_reward"] > 0), key=lambda row: row[f"{procedure}4_reward"]
        )
        for scorer, marker in zip(SCORERS, "os"):
            axis.errorbar(
                [row[f"{procedure}4_{scorer}"] for row in order],
                range(len(order)),
                fmt=marker,
                capsize=2,
                label=scorer,
                xerr=[row[f"{procedure}4_{scorer}_stderr"] for row in order],
            )
        axis.axvline(theory.optimal_win_rate(kl, procedure, 4), color="black", label="optimum")
        axis.set_yticks(range(len(order)), [row["method"] for row in order])
        axis.set(title=f"{TITLES[procedure].format(n=4)} at {kl:g} nats", xlabel="win rate over pi_ref")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return table, figure


def tuned(out: Path, quick: bool):
    """What a policy trained for Best-of-N loses at another N, at equal KL; theory beside it."""
    sizes, budgets = (2, 4, 32), (2.0,) if quick else (0.5, 1.0, 2.0)
    methods = {f"bon_fp {n}": {"transform": "bon_fp", "n": n} for n in sizes if n != 4} | {
        name: METHODS[name] for name in ("bon_fp", "exp5", "exp10")
    }
    rows = sweep(out, quick, methods, budgets=budgets)
    kl, (figure, axes), table = common_kl(rows), panels(1, 1), []
    for name in methods:
        N = methods[name].get("n", 4)
        transform = (
            theory.fixed_point("bon_fp", "bon", N, theory.beta_for_kl("bon_fp", kl, n=N)) if "fp" in name else name
        )
        for n in sizes:
            for scorer in SCORERS:
                win, stderr = at_kl(rows, kl, name, "bon", n, scorer)
                table.append(
                    dict(
                        tuned=name.replace("bon_fp", "bon_fp 4") if name == "bon_fp" else name,
                        used_at=n,
                        scorer=scorer,
                        kl=kl,
                        win_rate=win,
                        stderr=stderr,
                        theory=theory.at_kl(transform, kl, "bon", n),
                    )
                )
    for name in dict.fromkeys(row["tuned"] for row in table):
        mine = [row for row in table if row["tuned"] == name and row["scorer"] == "reward"]
        line = axes[0].errorbar(
            range(3),
            [row["win_rate"] for row in mine],
            [row["stderr"] for row in mine],
            fmt="o-",
            capsize=2,
            label=name,
        )
        axes[0].plot(range(3), [row["theory"] for row in mine], "--", linewidth=1, color=line[0].get_color())
    axes[0].set_xticks(range(3), [f"N = {n}" for n in sizes])
    axes[0].set(title=f"Best-of-N at {kl:g} nats, by reward; dashed: theory", ylabel="win rate over pi_ref")
    axes[0].legend(fontsize=7)
    return table, figure


def held_out(out: Path, quick: bool):
    """Training prompts against held-out ones: distance to the optimum at the measured KL, in points."""
    names = ("none", "identity", "exp10", "ipo", "qrpo exp10", "pkpo bon")
    methods, table, (figure, axes) = {name: METHODS[name] for name in names}, [], panels(1, 1, width=7)
    for split in ("train", "test"):
        for p in points(sweep(out, quick, methods, budgets=(2.0,) if quick else (1.0,), split=split)):
            if (p["procedure"], p["n"]) == ("bon", 4):
                table.append({"split": split} | p | {"below_optimum": 100 * (p["optimal"] - p["win_rate"])})
        mine = [row for row in table if (row["split"], row["scorer"]) == (split, "reward")]
        axes[0].errorbar(
            [row["method"] for row in mine],
            [row["below_optimum"] for row in mine],
            [100 * row["stderr"] for row in mine],
            fmt="o",
            capsize=2,
            label=f"{split} prompts",
        )
    axes[0].set(title="Best-of-4 by reward", ylabel="points below the optimum at the measured KL")
    axes[0].legend()
    return table, figure


def ablation(out: Path, quick: bool):
    """What of the calibration matters: raw reward, minus the prompt's median, standardised per prompt, K samples.

    A constant per prompt moves neither the optimum nor a leave-one-out advantage: `median` has the value head.
    """
    methods = {
        "none": {"transform": "none"},
        "none, value head": {"transform": "none", "baseline": "value"},
        "median, value head": {"transform": "median", "baseline": "value"},
        "standardised": {"transform": "standardised"},
    }
    methods |= {f"{name} K {K}": {"transform": name, "K": K} for name in ("identity", "exp10") for K in (10, 30, 300)}
    methods |= {name: METHODS[name] for name in ("identity", "exp10")}  # K = 100: the sweep's own runs
    rows = sweep(out, quick, methods, budgets=(2.0,) if quick else (0.5, 1.0, 2.0), seeds=1 if quick else 5)
    kl, (figure, axes), table = common_kl(rows), panels(1, 2, width=6), []
    for name in methods:
        for procedure, n in (("standard", 1), ("bon", 4)):
            for scorer in SCORERS:
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
    for axis, (procedure, n) in zip(axes, (("standard", 1), ("bon", 4))):
        for scorer, marker in zip(SCORERS, "os"):
            mine = [row for row in table if (row["procedure"], row["scorer"]) == (procedure, scorer)]
            axis.errorbar(
                [row["win_rate"] for row in mine],
                [row["variant"] for row in mine],
                xerr=[row["stderr"] for row in mine],
                fmt=marker,
                capsize=2,
                label=scorer,
            )
        axis.set(title=f"{TITLES[procedure].format(n=n)} at {kl:g} nats", xlabel="win rate over pi_ref")
        axis.legend(fontsize=7)
    return table, figure


def cost(run: Path) -> dict[str, float]:
    """Reward calls (the calibration's included), tokens and seconds of a run's training, cached samples not timed."""
    config, _ = runs.load_config(run)
    last = runs.read_metrics(run)[-1]
    online = config.method not in ("qrpo", "ipo", "bonbon")
    calibrated = config.prompts * config.K * (config.transform != "none")
    return {
        "calls": calibrated + config.steps * config.batch * config.G * online,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
    }


def overhead(out: Path, quick: bool):
    """The share of calibration in a run of train.py (App. E): reward calls, tokens, seconds, forward passes of a token.

    A backward pass counts two. The calibration of 32 prompts is timed, nothing cached, and scaled to all prompts.
    """
    run = Path(
        sweep(out, quick, {"exp10": {"transform": "exp10"}}, budgets=SCALES[quick]["budgets"][1:2], seeds=1)[0]["run"]
    )
    config, _ = runs.load_config(run)
    task, part, start = runs.load_task(config, "train"), min(32, config.prompts), time.perf_counter()
    samples = sample(
        task.policy, task.tokenizer, task.texts[:part], num_samples=config.K, max_new_tokens=task.max_new_tokens, seed=0
    )
    drawn = time.perf_counter()
    runs.score(task.reward, task.prompts[:part], samples.texts)
    scored, scale, total = time.perf_counter(), config.prompts / part, cost(run)
    tokens = int(samples.mask.sum()) * scale
    stages = {
        "calibration": (config.prompts * config.K, tokens, tokens, (scored - start) * scale, (drawn - start) * scale),
        "training": (
            config.steps * config.batch * config.G,
            total["tokens"],
            total["tokens"] * (2 + 3 * config.ppo_epochs),
            total["seconds"],
            None,
        ),
    }
    names = ("reward_calls", "tokens", "forward_passes", "seconds", "seconds_sampling")
    rows = [{"stage": stage} | dict(zip(names, values)) for stage, values in stages.items()]
    for row in rows:
        row |= {f"share_of_{name}": row[name] / sum(other[name] for other in rows) for name in names[:4]}
    figure, (axis,) = panels(1, 1)
    bottom = [0.0] * 4
    for row in rows:
        share = [100 * row[f"share_of_{name}"] for name in names[:4]]
        axis.bar([name.replace("_", " ") for name in names[:4]], share, bottom=bottom, label=row["stage"])
        bottom = [a + b for a, b in zip(bottom, share)]
    axis.axhline(29, color="black", linestyle=":", label="the paper's share of time")
    axis.set(title=f"{run.name}: K = {config.K}, {config.prompts} prompts, {config.steps} steps", ylabel="share [%]")
    axis.legend()
    return rows, figure


STUDIES = {"summary": summary, "tuned": tuned, "held_out": held_out, "ablation": ablation, "overhead": overhead}
