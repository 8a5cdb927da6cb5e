"""Pictures of a run: its points on the theory's curves, and its learning curves. Without matplotlib there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minictrl import evaluation, runs, theory

COLOURS = {"reward": "#1f77b4", "judge": "#d62728", "theory": "#444444", "optimal": "#aaaaaa"}


def draw(run: Path, table: list[dict]) -> str:
    """tradeoff.png and training.png in the run; says what was drawn, or what is missing for it."""
    try:
        import matplotlib
    except ImportError:
        return "no pictures: pip install matplotlib"
    matplotlib.use("Agg")
    tradeoff(run, table)
    training(run)
    return f"pictures: {run / 'tradeoff.png'}, {run / 'training.png'}"


def tradeoff(run: Path, table: list[dict]):
    """Measured win rates, with two standard errors, on the curves of the run's transform and of the best possible one."""
    import matplotlib.pyplot as plt
    config, _ = runs.load_config(run)
    n = config.n if config.procedure in ("bon", "won") else 4
    panels = [("standard", 1), ("bon", n), ("won", n)]
    kls = np.linspace(0, max(2., 1.5 * table[0]["kl"]), 25)
    curve = evaluation.curve_of(config, run)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharex=True, layout="constrained")
    for axis, (procedure, n) in zip(axes, panels):
        axis.plot(kls, [theory.optimal_win_rate(kl, procedure, n) for kl in kls], color=COLOURS["optimal"], label="best possible")
        if curve is not None:
            axis.plot(kls, [theory.at_kl(curve, kl, procedure, n) for kl in kls], "--", color=COLOURS["theory"],
                      label=f"theory, {config.transform}")
        for row in table:
            if (row["procedure"], row["n"]) == (procedure, n):
                axis.errorbar(row["kl"], row["win_rate"], 2 * row["stderr"], 2 * row["kl_stderr"], fmt="o", capsize=2,
                              color=COLOURS[row["scorer"]], label=f"measured by {row['scorer']}")
        axis.set(title=procedure if procedure == "standard" else f"{'Best' if procedure == 'bon' else 'Worst'}-of-{n}",
                 xlabel="KL(π ‖ π_ref) [nats per response]", ylabel="win rate over π_ref")
        axis.grid(alpha=.3)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{run.name}: {table[0]['prompts']} held-out prompts, bars are two standard errors", fontsize=10)
    save(figure, run / "tradeoff.png")


def training(run: Path):
    """The learning curves of metrics.jsonl."""
    import matplotlib.pyplot as plt
    rows = runs.read_metrics(run)
    names = [name for name in ("C_hat", "kl_ref", "reward", "entropy", "approx_kl", "explained_variance", "grad_norm")
             if rows[-1][name] is not None]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], color=COLOURS["reward"])
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=.3)
    save(figure, run / "training.png")


def save(figure, path: Path):
    import matplotlib.pyplot as plt
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    plt.close(figure)
