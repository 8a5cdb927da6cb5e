"""The paper's figures that are theory, and two questions beyond it: finite K, and an N that the user does not know.

Every study returns (rows, figure); `reproduce.py` writes them. Win rates are compared at equal KL.
"""

from pathlib import Path

import torch
from torch import Tensor

from minictrl import cells, theory
from minictrl.transforms import get_transform

COLORS = {"identity": "C0", "log": "C1", "exp5": "C2", "exp10": "C3", "exp-5": "C4", "exp-10": "C5",
          "bon_fp": "black", "won_fp": "black", "optimal": "black"}  # fmt: skip
CLOSED = ["identity", "log", "exp5", "exp10", "exp-5", "exp-10"]
TITLES = {"standard": "standard", "bon": "Best-of-{n}", "won": "Worst-of-{n}", "rewind": "rewind-and-repeat, {n} draws"}
BEST_OF = (2, 3, 4, 6, 8, 16, 32)


def budgets(quick: bool) -> Tensor:
    """KLs of a curve in nats, closer to each other where it is steep."""
    return 2.5 * torch.linspace(0.07, 1, 12 if quick else 50, dtype=torch.float64) ** 2


def panels(rows: int, columns: int, width: float = 5.2, height: float = 4.0):
    """A matplotlib figure and its axes in reading order."""
    from matplotlib.figure import Figure  # here, for only the pictures need it

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def curves(axis, gap_axis, transforms: list[str], procedure: str, n: int, kls: Tensor) -> list[dict]:
    """Draws each transform's trade-off, and in `gap_axis` its distance to the optimum; returns their rows."""
    best = [theory.optimal_win_rate(kl, procedure, n) for kl in kls.tolist()]
    rows = []
    for name in transforms:
        wins = [theory.at_kl(name, kl, procedure, n) for kl in kls.tolist()]
        gaps = [100 * (top - win) for top, win in zip(best, wins)]
        style = dict(color=COLORS[name], linestyle="--" if COLORS[name] == "black" else "-", label=name)
        axis.plot(kls, wins, **style)
        if gap_axis is not None and max(gaps) > 1e-3:
            gap_axis.plot(kls, gaps, **style)
        rows += [
            dict(procedure=procedure, n=n, transform=name, kl_nats=kl, win_rate=win, points_below_optimum=gap)
            for kl, win, gap in zip(kls.tolist(), wins, gaps)
        ]
    sizes = torch.tensor(BEST_OF)
    frontier = (sizes.log() - (sizes - 1) / sizes).tolist()  # KL of Best-of-n, whose policy is that of `log`
    wins = [theory.at_kl("log", kl, procedure, n) for kl in frontier]
    axis.plot(frontier, wins, "o", color=COLORS["log"], markersize=4, label="Best-of-n of pi_ref, n = 2 … 32")
    rows += [
        dict(procedure=procedure, n=n, transform=f"best-of-{size}", kl_nats=kl, win_rate=win,
             points_below_optimum=100 * (theory.optimal_win_rate(kl, procedure, n) - win))
        for size, kl, win in zip(BEST_OF, frontier, wins)
    ]  # fmt: skip
    axis.set(title=TITLES[procedure].format(n=n), xlabel="KL(pi || pi_ref) [nats]", ylabel="win rate over pi_ref")
    axis.grid(alpha=0.3)
    return rows


def fig2(out: Path, quick: bool):
    """Best-of-4 and Worst-of-4 against KL for every transform (Fig. 2), and how far each is from the optimum."""
    figure, axes = panels(2, 2)
    kls, rows = budgets(quick), []
    for axis, gap, procedure in zip(axes[:2], axes[2:], ("bon", "won")):
        rows += curves(axis, gap, CLOSED + [f"{procedure}_fp"], procedure, 4, kls)
        axis.legend(fontsize=8, loc="lower right")
        gap.set(xlabel="KL(pi || pi_ref) [nats]", ylabel="win rate below the optimum [points]")
        gap.set(ylim=(0.01, 40), yscale="log")
        gap.grid(alpha=0.3)
    return rows, figure


def fig11(out: Path, quick: bool):
    """Standard, Best-of-2 and 4, Worst-of-2 and 4 against KL (Fig. 11)."""
    figure, axes = panels(3, 2, height=3.6)
    kls, rows = budgets(quick), []
    cases = [("standard", 1), ("bon", 2), ("bon", 4), ("won", 2), ("won", 4)]
    for axis, (procedure, n) in zip([axes[0]] + axes[2:], cases):
        fixed = [] if procedure == "standard" else [f"{procedure}_fp"]
        rows += curves(axis, None, CLOSED + fixed, procedure, n, kls)
    handles, labels = axes[2].get_legend_handles_labels()
    axes[1].legend(handles, [label.replace("bon_fp", "bon_fp, won_fp") for label in labels], loc="center")
    axes[1].axis("off")
    return rows, figure


def transforms(out: Path, quick: bool):
    """The transforms themselves, and the policy that each makes of pi_ref at 1 nat."""
    figure, axes = panels(2, 2)
    u, rows = cells.midpoints(50 if quick else 500), []
    families = [
        [("identity", 1), ("log", 1), ("exp5", 1), ("exp10", 1), ("bon_fp", 2), ("bon_fp", 4), ("bon_fp", 32)],
        [("identity", 1), ("log", 1), ("exp-5", 1), ("exp-10", 1), ("won_fp", 2), ("won_fp", 4), ("won_fp", 8)],
    ]
    for family, shape, density in zip(families, axes[:2], axes[2:]):
        for name, n in family:
            beta = theory.beta_for_kl(name, 1.0, n=n)
            Phi = get_transform(name, n=n, beta=beta, K=None)(u)
            log_f = cells.tilt(Phi, 1 / beta, torch.full_like(u, 1 / len(u)))
            rising = (Phi - Phi[0]) / (Phi[-1] - Phi[0])
            fixed = name in theory.FIXED_POINTS
            style = dict(color="black" if fixed else COLORS[name], label=f"{name}, N = {n}" if fixed else name,
                         linestyle={2: ":", 4: "--", 8: "-.", 32: "-."}.get(n, "-"))  # fmt: skip
            shape.plot(u, rising, **style)
            density.plot(u, log_f.exp(), **style)
            rows += [
                dict(transform=name, n=n, beta=beta, u=x, Phi=p, Phi_0_to_1=s, density=f)
                for x, p, s, f in zip(u.tolist(), Phi.tolist(), rising.tolist(), log_f.exp().tolist())
            ]
        shape.set(ylabel="Phi, scaled to rise from 0 to 1", xlabel="calibrated reward u = C")
        density.set(ylabel="density at 1 nat (pi_ref: 1)", xlabel="calibrated reward u = C")
        density.set(yscale="log", ylim=(1e-3, 100))
        density.legend(fontsize=8)
        shape.grid(alpha=0.3)
        density.grid(alpha=0.3)
    axes[0].set_title("for Best-of-N")
    axes[1].set_title("for Worst-of-N")
    return rows, figure


def rewind(out: Path, quick: bool):
    """Rewind-and-repeat at the 85th percentile, 32 draws at most (App. G): win rate, draws needed, and the optimum."""
    figure, (win_axis, draws_axis, density_axis) = panels(1, 3)
    kls = budgets(quick)
    names = CLOSED + ["optimal"]
    rows = curves(win_axis, None, names, "rewind", 32, kls)
    for row in rows:
        name = row["transform"] if row["transform"] in names else "log"
        mass, ref = theory.policy_at_kl(name, row["kl_nats"], "rewind", 32)
        q = mass[cells.centres(ref) < theory.REWIND_QUANTILE].sum()
        row["mean_draws"] = ((1 - q**32) / (1 - q)).item()
    for name in names:
        draws = [row["mean_draws"] for row in rows if row["transform"] == name]
        draws_axis.plot(kls, draws, color=COLORS[name], label=name, linestyle="--" if name == "optimal" else "-")
    q = theory.REWIND_QUANTILE
    draws_axis.axhline((1 - q**32) / (1 - q), color="grey", linewidth=1, linestyle=":", label="pi_ref")
    draws_axis.set(title="cost", xlabel="KL(pi || pi_ref) [nats]", ylabel="mean number of draws", ylim=(0, 14))
    for kl in (0.25, 0.5, 1.0):
        mass, ref = theory.policy_at_kl("optimal", kl, "rewind", 32)
        density_axis.plot(cells.centres(ref), mass / ref, label=f"{kl:g} nats")
    density_axis.axvline(q, color="grey", linewidth=1, linestyle=":", label="threshold")
    density_axis.set(title="the optimum for it", xlabel="calibrated reward u = C", ylabel="density (pi_ref: 1)")
    density_axis.set(yscale="log", ylim=(1e-4, 1e3), xlim=(0.7, 1.005))
    density_axis.legend(fontsize=8)
    draws_axis.legend(fontsize=8, ncols=2)
    draws_axis.grid(alpha=0.3)
    density_axis.grid(alpha=0.3)
    return rows, figure


def finite_k(out: Path, quick: bool):
    """What an empirical calibration with K samples costs each transform at equal KL, on average over prompts."""
    figure, axes = panels(1, 2)
    cases = [("identity", "standard", 1), ("log", "standard", 1), ("exp5", "bon", 2), ("exp10", "bon", 4),
             ("bon_fp", "bon", 4), ("exp-5", "won", 2), ("exp-10", "won", 4), ("won_fp", "won", 4)]  # fmt: skip
    sizes, rows = (10, 30, 100) if quick else (10, 30, 100, 300), []
    for name, procedure, n in cases:
        for kl in (1.0,) if quick else (0.25, 1.0, 2.0):
            exact = theory.at_kl(name, kl, procedure, n)
            for K in sizes:
                win = theory.at_kl(name, kl, procedure, n, K=K)
                rows.append(dict(transform=name, procedure=procedure, n=n, kl_nats=kl, K=K, win_rate=win,
                                 continuous=exact, points_lost=100 * (exact - win)))  # fmt: skip
    for axis, kinds in zip(axes, (("standard", "bon"), ("won",))):
        for name, procedure, n in cases:
            lost = [row["points_lost"] for row in rows if row["transform"] == name and row["kl_nats"] == 1]
            if procedure in kinds:
                style = dict(color=COLORS[name], linestyle="--" if COLORS[name] == "black" else "-")
                axis.plot(sizes, lost, "o", label=f"{name}, {TITLES[procedure].format(n=n)}", **style)
        axis.plot(sizes, [20 / K for K in sizes], color="grey", linestyle=":", label="slope 1/K")
        axis.set(xscale="log", yscale="log", xlabel="calibration samples K", ylabel="win rate lost at 1 nat [points]")
        axis.set_xticks(sizes, sizes)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return rows, figure


def any_n(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """Best-of-N of a user whose N is uniform over 1 .. n: (n, G), which mass_win_rate averages over."""
    return torch.stack([theory.bon(mass, u, N) for N in range(1, n + 1)])


def mix(out: Path, quick: bool):
    """The best transform for an unknown N in 1 .. 32, and what one tuned for N loses at another N, at equal KL."""
    sizes = (1, 4, 32) if quick else (1, 2, 4, 8, 16, 32)
    used = {f"Best-of-{N}": (theory.bon, N) for N in sizes} | {"1 .. 32": (any_n, 32)}
    rows = []
    for kl in (1.0,) if quick else (0.25, 0.5, 1.0, 2.0):
        policies = {f"optimal for {at}": theory.policy_at_kl("optimal", kl, *T) for at, T in used.items()}
        closed = ("log", "exp5", "exp10", "exp20", "exp40")
        policies |= {name: theory.policy_at_kl(name, kl, "bon", 1) for name in closed}
        for tuned, (mass, ref) in policies.items():
            for at, T in used.items():
                win = theory.mass_win_rate(mass, ref, *T).item()
                loss = 100 * (theory.optimal_win_rate(kl, *T) - win)
                rows.append(dict(kl_nats=kl, transform=tuned, used_at=at, win_rate=win, points_lost=loss))
    figure, (table, curve) = panels(1, 2, width=6.4, height=5.2)
    at_1 = [row for row in rows if row["kl_nats"] == 1]
    names = list(dict.fromkeys(row["transform"] for row in at_1))
    lost = torch.tensor([row["points_lost"] for row in at_1]).view(len(names), len(used))
    table.imshow(lost.clamp(max=10), cmap="Reds", aspect="auto")
    for i, j in torch.cartesian_prod(torch.arange(len(names)), torch.arange(len(used))).tolist():
        color = "white" if lost[i, j] > 6 else "black"
        table.text(j, i, f"{abs(lost[i, j]):.2f}", ha="center", va="center", color=color)
    table.set_xticks(range(len(used)), [at.replace("Best-of-", "") for at in used])
    table.set_yticks(range(len(names)), names)
    table.set(xlabel="N it is used at (1 .. 32: uniform over them)", title="points lost to the optimum at 1 nat")
    for tuned in names:
        if "optimal" in tuned:
            mass, ref = theory.policy_at_kl("optimal", 1.0, *used[tuned.removeprefix("optimal for ")])
            style = dict(color="black", linewidth=2) if ".." in tuned else dict(linestyle="--")
            curve.plot(cells.centres(ref), mass / ref, label=tuned, **style)
    curve.set(yscale="log", ylim=(1e-3, 1e4), xlim=(0.5, 1.005), xlabel="calibrated reward u = C")
    curve.set(ylabel="density (pi_ref: 1)", title="the optimal policies at 1 nat")
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    return rows, figure


STUDIES = {"fig2": fig2, "fig11": fig11, "transforms": transforms, "rewind": rewind, "finite_k": finite_k, "mix": mix}
