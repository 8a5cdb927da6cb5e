"""Pictures: those of a run, and what the pictures of the studies share. Without matplotlib there
are none.
"""

import math
from pathlib import Path

from minictrl import evaluation, runs, theory
from minictrl.files import in_one_step

STYLE = {
    "text.parse_math": False,  # a $ in a run's name is a $
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 7,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
}
TITLES = {
    "standard": "standard",
    "bon": "Best-of-{n}",
    "won": "Worst-of-{n}",
    "rewind": "rewind-and-repeat, {n} draws",
    "second": "second best of {n}",
    "median": "median of {n}",
    "trimmed": "one of the middle half of {n}",
    "soft": "soft Best-of-{n}",
    "poisson": "Best-of-Poisson, {n} draws on average",
}
CURVES = ("C_hat", "kl_ref", "beta", "reward", "entropy", "approx_kl")
CURVES += ("explained_variance", "grad_norm")
KL, WIN_RATE = "KL(pi || pi_ref) [nats]", "win rate over pi_ref"
COLORS = {  # of a transform, a method or a scorer, in every picture
    "identity": "C0", "log": "C1", "exp5": "C2", "exp10": "C3", "exp-5": "C4", "exp-10": "C5",
    "bon_fp": "black", "won_fp": "black", "optimal": "black", "rewind": "black", "Best-of-n": "C1",
    "none": "C7", "ipo": "C6", "bonbon": "C8", "bond": "C9", "grpo": "gold", "grpo_fixed": "peru",
    "qrpo exp10": "darkred", "qrpo exp-10": "darkred", "pkpo": "navy", "pkpo won": "navy",
    "bon_fp 2": "C6", "bon_fp 4": "black", "bon_fp 32": "C7", "reward": "C0", "judge": "C3",
    "theory": "C7", "pi_ref": "black",
}  # fmt: skip


def draw(run: Path, suffix: str, table: list[dict]) -> str:
    """tradeoff.png and training.png in the run; says what was drawn, or what is missing for it.

    suffix: of the evaluation's files.
    """
    try:
        import matplotlib
    except ImportError:
        return "no pictures: pip install matplotlib"
    with matplotlib.rc_context(STYLE):
        tradeoff_png = run / f"tradeoff{suffix}.png"
        save(draw_win_rates(run, suffix, table), tradeoff_png)
        save(draw_training(run), run / "training.png")
    return f"pictures: {tradeoff_png}, {run / 'training.png'}"


def draw_win_rates(run: Path, suffix: str, table: list[dict]):
    """Measured win rates, with two standard errors, on the curves of the run's transform and of the
    optimum.
    """
    config = runs.load_config(run)
    n = config.n if config.procedure in ("bon", "won") else 4
    Phi = evaluation.Phi_of(config)
    drawn = {(row["procedure"], row["n"]) for row in table}
    cases = [("standard", 1), ("bon", n), ("won", n), evaluation.aligned_for(config)]
    cases = [case for case in dict.fromkeys(cases) if case in drawn]
    figure, axes = panels(1, len(cases), width=4.2)
    for axis, (procedure, n) in zip(axes, cases):
        rows = [
            row | {"stderr": 2 * row["stderr"], "kl_stderr": 2 * row["kl_stderr"]}
            for row in table
            if (row["procedure"], row["n"]) == (procedure, n)
        ]
        draw_tradeoff(
            axis,
            rows,
            procedure,
            n,
            by="scorer",
            expected={} if table[0]["theory"] is None else {"theory": Phi},
            K=config.K,
        )
        axis.legend(loc="lower right")
    split = "training" if suffix.startswith("-train") else "held-out"
    prompts = f"{table[0]['prompts']} {split} prompts"
    figure.suptitle(f"{run.resolve().name}: {prompts}, bars are two standard errors", fontsize=10)
    return figure


def draw_training(run: Path):
    """The learning curves of metrics.jsonl."""
    rows, budget = runs.finished_metrics(run), runs.load_config(run).kl
    names = [name for name in CURVES if rows[-1].get(name) is not None]
    figure, axes = panels(math.ceil(len(names) / 4), min(4, len(names)), width=3.2, height=2.4)
    for axis, name in zip(axes, names):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows])
        axis.set(title=name, xlabel="step")
        if name == "kl_ref" and budget:
            axis.axhline(budget, color="black", linestyle="--", linewidth=1)
    for axis in axes[len(names) :]:
        axis.remove()
    return figure


# --- what the studies share ---


def panels(rows: int, columns: int, width: float = 5.2, height: float = 4.0):
    """A matplotlib figure and its axes in reading order; width and height of one of them in
    inches.
    """
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def log_y(axis, numbers: tuple[int, ...] = (1,)):
    """A logarithmic y axis with plain numbers, at `numbers` of each decade: matplotlib's own are
    TeX, which STYLE has off.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=numbers))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure, path: Path):
    """A PNG, under a temporary name first, so that what is there is whole."""
    with in_one_step(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def title(procedure: str, n: int | str) -> str:
    return TITLES.get(procedure, f"{procedure}, N = {{n}}").format(n=n)


def errorbars(
    axis,
    rows: list[dict],
    x: str,
    y: str,
    *,
    by: str,
    xerr: str | None = None,
    yerr: str | None = None,
    dashed: str | None = None,
    fmt: str = "o-",
):
    """A line with error bars for each value of the column `by`, in the order of the rows. All names
    are columns'.

    dashed: drawn as a second line of the same colour, without points (theory). None is not drawn.
    """
    for name in dict.fromkeys(row[by] for row in rows):
        line = {
            key: [math.nan if row[key] is None else row[key] for row in rows if row[by] == name]
            for key in (x, y, xerr, yerr, dashed)
            if key
        }
        style = dict(fmt=fmt, label=name, color=COLORS.get(name))
        drawn = axis.errorbar(line[x], line[y], line.get(yerr), line.get(xerr), **style)
        if dashed:
            axis.plot(line[x], line[dashed], "--", linewidth=1, color=drawn[0].get_color())


def draw_tradeoff(
    axis,
    rows: list[dict],
    procedure: str,
    n: int,
    *,
    by: str,
    expected: dict[str, theory.TransformLike],
    K: int | None = None,
):
    """Measured win rates against KL, a line for each value of column `by`, on the optimum (black)
    and theory (dashed).

    rows: of this procedure and n, with kl, kl_stderr, win_rate, stderr. expected: name ->
    transform, in its colour; with a K that of K samples. Where the rewards of all rows tie there is
    no optimum to draw.
    """
    errorbars(axis, rows, "kl", "win_rate", by=by, xerr="kl_stderr", yerr="stderr")
    axis.set(title=title(procedure, n), xlabel=KL, ylabel=WIN_RATE)
    if rows and all(row.get("optimal", 0) is None for row in rows):
        return
    top = 1.2 * max([row["kl"] for row in rows], default=1.0)
    kls = [top * (i / 12) ** 2 for i in range(13)]
    axis.plot(
        kls,
        [theory.optimal_win_rate(kl, procedure, n) for kl in kls],
        color="black",
        label="optimum",
    )
    for name, transform in expected.items():
        wins = [theory.at_kl(transform, kl, procedure, n, K=K) for kl in kls]
        label = name if name == "theory" else None  # another's points are labelled
        axis.plot(kls, wins, "--", linewidth=1, color=COLORS.get(name), label=label)
        axis.set_ylabel(f"{WIN_RATE} (dashed: theory)")
