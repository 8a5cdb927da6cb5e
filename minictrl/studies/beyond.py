"""Comparisons that the paper does not have: another N, training prompts, parts of the calibration,
what a run costs, where Best-of-N stops helping. They read the runs of the same sweep (`sweep.py`).
"""

import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minictrl import runs, theory
from minictrl.config import Config
from minictrl.figures import WIN_RATE, errorbars, panels, title
from minictrl.methods import get_method
from minictrl.procedures import get_procedure
from minictrl.rollout import sample_and_score
from minictrl.studies.sweep import SCALES, VARIANTS, Scores, redrawn, sweep
from minictrl.studies.tables import (
    SCORERS,
    Rows,
    below_optimum,
    common_kl,
    grouped,
    measured_at_kl,
    points,
    where,
)
from minictrl.studies.trained import draw_over_n
from minictrl.task import load_task
from minictrl.winrate import beaten, mean_stderr

RESAMPLES = 1000  # of the prompts, by `hedge`


def draw_by_variant(axis, rows: Rows, text: str):
    """Win rates by reward and by judge, a line of the picture for each variant; nan is left out."""
    known = [row for row in rows if row["win_rate"] > 0]
    errorbars(axis, known, "win_rate", "variant", by="scorer", xerr="stderr", fmt="o")
    axis.set(title=text, xlabel=WIN_RATE)
    axis.legend()


def tuned(out: Path, quick: bool):
    """What a policy trained for Best-of-N loses at another N, at equal KL; theory beside it.

    Paper: Both exp transforms are above the baselines at every N.
    """
    methods = {f"bon_fp {n}": {"transform": "bon_fp", "n": n} for n in (2, 32)}
    methods |= {name: VARIANTS[name] for name in ("bon_fp", "exp5", "exp10")}
    rows = sweep(out, quick, methods, budgets=(2.0,) if quick else None)
    figure, (axis,) = panels(1, 1)
    kl, table = common_kl(rows), []
    for name, settings in methods.items():
        Phi = settings["transform"]
        if Phi == "bon_fp":
            N = settings.get("n", 4)
            beta = theory.beta_for_kl("bon_fp", kl, n=N)
            Phi = theory.fixed_point("bon_fp", "bon", N, beta)
        for n in (2, 4, 32):
            row = {"tuned": "bon_fp 4" if name == "bon_fp" else name, "used_at": n}
            expected = {"theory": theory.at_kl(Phi, kl, "bon", n)}
            table += [row | found | expected for found in measured_at_kl(rows, kl, name, "bon", n)]
    draw_over_n(axis, where(table, scorer="reward"), "used_at", by="tuned", dashed="theory")
    axis.set_title(f"Best-of-N at {kl:g} nats, by reward; dashed: theory")
    return table, figure


def held_out(out: Path, quick: bool):
    """Training prompts against held-out ones: distance to the optimum at the measured KL, in
    points.
    """
    names = ("none", "identity", "exp10", "ipo", "qrpo exp10", "pkpo")
    methods = {name: VARIANTS[name] for name in names}
    budgets = (2.0,) if quick else (1.0,)
    figure, (axis,) = panels(1, 1, width=7)
    table = []
    for split in ("train", "test"):
        rows = sweep(out, quick, methods, budgets=budgets, split=split)
        for point in points(where(rows, procedure="bon", n=4)):
            gap = 100 * (point["optimal"] - point["win_rate"])
            table.append({"split": split} | point | {"below_optimum": gap})
    drawn = [row | {"error": 100 * row["stderr"]} for row in where(table, scorer="reward")]
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
    for name, K in product(("identity", "exp10"), (10, 30, 300)):
        methods[f"{name} K {K}"] = {"transform": name, "K": K}
    methods |= {name: VARIANTS[name] for name in ("identity", "exp10")}  # K = 100, as in the sweep
    rows = sweep(out, quick, methods, budgets=(2.0,) if quick else None)
    cases = (("standard", 1), ("bon", 4))
    kl, table = common_kl(rows), []
    for name, (procedure, n) in product(methods, cases):
        variant = f"{name} K 100" if name in ("identity", "exp10") else name
        row = {"variant": variant, "procedure": procedure, "n": n}
        for found in measured_at_kl(rows, kl, name, procedure, n):
            gap = below_optimum(found["win_rate"], kl, procedure, n)
            table.append(row | found | {"below_optimum": gap})
    figure, axes = panels(1, 2, width=6)
    for axis, (procedure, n) in zip(axes, cases):
        text = f"{title(procedure, n)} at {kl:g} nats"
        draw_by_variant(axis, where(table, procedure=procedure, n=n), text)
    return table, figure


def overhead(out: Path, quick: bool):
    """The share of calibration in a run of train.py (App. F): reward calls, tokens, seconds,
    forward passes of a token.

    A backward pass counts two. The calibration of 32 prompts is timed, nothing cached, and scaled
    to all prompts.

    Paper: About 29 % of the training time at K = 100 and 80 epochs.
    """
    budget = min(SCALES[quick]["seeds"], key=lambda kl: abs(kl - 1))  # the default's if it can be
    method = {"exp10": VARIANTS["exp10"]}
    run = Path(sweep(out, quick, method, budgets=(budget,), seeds=1)[0]["run"])
    config = runs.load_config(run)
    total = cost(run)
    calibration = calibration_cost(config)
    training = {
        "reward_calls": total["calls"] - calibration["reward_calls"],
        "tokens": total["tokens"],
        "forward_passes": total["tokens"] * (2 + 3 * config.ppo_epochs),
        "seconds": total["seconds"],
    }
    sums = {name: value + calibration[name] for name, value in training.items()}
    rows = []
    for stage, spent in (("calibration", calibration), ("training", training)):
        shares = {f"share_of_{name}": spent[name] / sums[name] for name in sums}
        rows.append({"stage": stage} | spent | shares)
    figure, (axis,) = panels(1, 1)
    axis.bar(list(sums), 100, label="training")
    shares = [100 * rows[0][f"share_of_{name}"] for name in sums]
    axis.bar(list(sums), shares, label="calibration")
    axis.axhline(29, color="black", linestyle=":", label="the paper's share of time")
    title = f"{run.name}: K = {config.K}, {config.prompts} prompts"
    axis.set(title=title, ylabel="share [%]", ylim=(0, 130))  # the legend is above the bars
    axis.legend()
    return rows, figure


def cost(run: Path) -> dict[str, float]:
    """Reward calls, tokens and seconds of a run's training, cached samples not timed.

    Calls: the calibration's (raw rewards take theirs for beta), one per response
    of the policy and, where the baseline is `prefix`, one per token of these.
    """
    config = runs.load_config(run)
    last = runs.finished_metrics(run)[-1]
    method = get_method(config.method)
    calls = config.prompts * config.K
    rollouts = config.steps if method.online else 1  # offline: after the last step
    calls += rollouts * config.batch * config.G
    if method.uses_baseline and config.baseline == "prefix":
        calls += last["tokens"]
    return {"calls": calls, "tokens": last["tokens"], "seconds": last["seconds"]}


def calibration_cost(config: Config) -> dict[str, float]:
    """Reward calls, tokens, forward passes and seconds of a run's calibration."""
    task = load_task(config, "train")
    part = min(32, config.prompts)
    start = time.perf_counter()
    samples, _ = sample_and_score(task, task.policy, range(part), num_samples=config.K, seed=0)
    seconds = time.perf_counter() - start
    scale = config.prompts / part
    tokens = int(samples.mask.sum()) * scale
    return {
        "reward_calls": config.prompts * config.K,
        "tokens": tokens,
        "forward_passes": tokens,
        "seconds": seconds * scale,
    }


# --- where Best-of-N stops helping ---


def hedge(out: Path, quick: bool):
    """At which N does Best-of-N peak, by reward and by judge, against one response of pi_ref?

    For pi_ref and for one policy of each of four methods, up to half of the samples. peak_share: in
    how many of 1,000 resamples of the prompts the curve is highest at this N.

    Paper: not InfAlign's question but HedgeTune's (arXiv 2506.19248): while the reward goes on
    rising with N, the judge's opinion rises, then falls.
    """
    methods = {name: VARIANTS[name] for name in ("none", "identity", "exp10", "grpo")}
    rows = sweep(out, quick, methods, budgets=(2.0,) if quick else (1.0,), seeds=1)
    table = []
    for (method, run), group in grouped(rows, "method", "run").items():
        pi, pi_ref = redrawn(Path(run), group[0])
        most = group[0]["samples"] // 2
        if not table:  # every run's pi_ref has the same samples
            table += best_of_curve("pi_ref", *split_samples(pi_ref), most)
        table += best_of_curve(method, pi, pi_ref, most)
    figure, axes = panels(1, len(SCORERS))
    for axis, scorer in zip(axes, SCORERS):
        draw_over_n(axis, where(table, scorer=scorer), "n", by="method")
        axis.set_title(f"Best-of-N over one of pi_ref, by {scorer}")
    return table, figure


def split_samples(scores: Scores) -> tuple[Scores, Scores]:
    """Each prompt's samples in two: those that Best-of-N draws from, and those that it meets."""
    pairs = {name: x.tensor_split(2, dim=1) for name, x in scores.items()}
    return tuple({name: pair[half] for name, pair in pairs.items()} for half in (0, 1))


def best_of_curve(method: str, pi: Scores, pi_ref: Scores, most: int) -> Rows:
    """The win rate of Best-of-N of pi over one response of pi_ref, N = 1, 2, 4 .. most, by scorer.

    stderr is over prompts, which all N share: `peak_share` says which N is the best.
    """
    sizes = [2**i for i in range(most.bit_length())]
    kept = [get_procedure("bon").weights(pi["reward"].double(), n) for n in sizes]
    rows = []
    for scorer in SCORERS:
        one = torch.full_like(pi_ref[scorer].double(), 1 / pi_ref[scorer].shape[1])
        beats = beaten(pi[scorer].double(), pi_ref[scorer].double(), one)  # (P, M)
        wins = torch.stack([(weight * beats).sum(1) for weight in kept], 1)  # (P, sizes)
        for n, each, share in zip(sizes, wins.T, peak_shares(wins)):
            win_rate, stderr = mean_stderr(each)
            row = {"method": method, "scorer": scorer, "n": n}
            rows.append(row | {"win_rate": win_rate, "stderr": stderr, "peak_share": share})
    return rows


def peak_shares(wins: Tensor) -> list[float]:
    """How often each column of wins (P, sizes) has the highest mean, over resamples of the P."""
    P = len(wins)
    drawn = torch.randint(P, (RESAMPLES, P), generator=torch.Generator().manual_seed(0))
    peaks = wins[drawn].mean(1).argmax(1)
    return (peaks.bincount(minlength=wins.shape[1]) / RESAMPLES).tolist()


STUDIES = (tuned, held_out, ablation, overhead, hedge)
