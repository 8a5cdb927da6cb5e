"""The paper's figures that are theory, and two questions beyond it: finite K, and an N that the
user does not know.

Every study returns (rows, figure); `reproduce.py` writes them. Win rates are compared at equal KL.
"""

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minictrl import theory
from minictrl.figures import COLORS, KL, WIN_RATE, panels, title
from minictrl.procedures import cells
from minictrl.procedures.bon import mass_after as bon
from minictrl.procedures.masses import mass_win_rate
from minictrl.transforms import get_transform

CLOSED = ["identity", "log", "exp5", "exp10", "exp-5", "exp-10"]
BEST_OF = (2, 3, 4, 6, 8, 16, 32)
U, DENSITY = "calibrated reward u = C", "density (pi_ref: 1)"


def budgets(quick: bool) -> Tensor:
    """KLs of a curve in nats, closer to each other where it is steep."""
    return 2.5 * torch.linspace(0.07, 1, 12 if quick else 50, dtype=torch.float64) ** 2


def style(name: str) -> dict:
    """Colour and line of a transform: those that are solved for are black and dashed."""
    return dict(
        color=COLORS[name], linestyle="--" if name in theory.FIXED_POINTS else "-", label=name
    )


def curves(axis, transforms: list[str], procedure: str, n: int, kls: Tensor) -> list[dict]:
    """Draws the trade-off of each transform and of Best-of-n, whose policy is that of `log`;
    returns their rows.
    """
    sizes = torch.tensor(BEST_OF)
    frontier = (sizes.log() - (sizes - 1) / sizes).tolist()  # KL of Best-of-n
    best_of = [(f"best-of-{size}", "log", kl) for size, kl in zip(BEST_OF, frontier)]
    rows = []
    for label, name, kl in [
        (name, name, kl) for name, kl in product(transforms, kls.tolist())
    ] + best_of:
        win = theory.at_kl(name, kl, procedure, n)
        gap = 100 * (theory.optimal_win_rate(kl, procedure, n) - win)
        rows.append(
            dict(
                procedure=procedure,
                n=n,
                transform=label,
                kl_nats=kl,
                win_rate=win,
                points_below_optimum=gap,
            )
        )
    for name in transforms:
        axis.plot(kls, [row["win_rate"] for row in rows if row["transform"] == name], **style(name))
    wins = [row["win_rate"] for row in rows[-len(BEST_OF) :]]
    axis.plot(frontier, wins, "o", color=COLORS["log"], label="Best-of-n of pi_ref, n = 2 … 32")
    axis.set(title=title(procedure, n), xlabel=KL, ylabel=WIN_RATE)
    return rows


def fig2(out: Path, quick: bool):
    """Best-of-4 and Worst-of-4 against KL for every transform (Fig. 2), and how far each is from
    the optimum.
    """
    figure, axes = panels(2, 2)
    kls, rows = budgets(quick), []
    for axis, gap_axis, procedure in zip(axes[:2], axes[2:], ("bon", "won")):
        mine = curves(axis, [*CLOSED, f"{procedure}_fp"], procedure, 4, kls)
        for name in CLOSED:
            gap_axis.plot(
                kls,
                [row["points_below_optimum"] for row in mine if row["transform"] == name],
                **style(name),
            )
        axis.legend(loc="lower right")
        gap_axis.set(
            xlabel=KL, ylabel="win rate below the optimum [points]", ylim=(0.01, 40), yscale="log"
        )
        rows += mine
    return rows, figure


def fig11(out: Path, quick: bool):
    """Standard, Best-of-2 and 4, Worst-of-2 and 4 against KL (Fig. 11)."""
    figure, axes = panels(3, 2, height=3.6)
    rows, cases = [], [("standard", 1), ("bon", 2), ("bon", 4), ("won", 2), ("won", 4)]
    for axis, (procedure, n) in zip([axes[0], *axes[2:]], cases):
        solved = [] if procedure == "standard" else [f"{procedure}_fp"]
        rows += curves(axis, CLOSED + solved, procedure, n, budgets(quick))
    handles, labels = axes[2].get_legend_handles_labels()
    axes[1].legend(
        handles,
        [label.replace("bon_fp", "bon_fp, won_fp") for label in labels],
        loc="center",
        fontsize=10,
    )
    axes[1].axis("off")
    return rows, figure


def transforms(out: Path, quick: bool):
    """The transforms themselves, and the policy that each makes of pi_ref at 1 nat."""
    figure, axes = panels(2, 2)
    u, rows = cells.midpoints(50 if quick else 500), []
    families = [
        [
            ("identity", 1),
            ("log", 1),
            ("exp5", 1),
            ("exp10", 1),
            ("bon_fp", 2),
            ("bon_fp", 4),
            ("bon_fp", 32),
        ],
        [
            ("identity", 1),
            ("log", 1),
            ("exp-5", 1),
            ("exp-10", 1),
            ("won_fp", 2),
            ("won_fp", 4),
            ("won_fp", 8),
        ],
    ]
    for family, shape, density, use in zip(
        families, axes[:2], axes[2:], ("Best-of-N", "Worst-of-N")
    ):
        for name, n in family:
            beta = theory.beta_for_kl(name, 1.0, n=n)
            Phi = get_transform(name, n=n, beta=beta, K=None)(u)
            f = cells.tilt(Phi, 1 / beta, torch.full_like(u, 1 / len(u))).exp()
            rising = (Phi - Phi[0]) / (Phi[-1] - Phi[0])
            line = dict(
                color=COLORS[name],
                label=name if n == 1 else f"{name}, N = {n}",
                linestyle={1: "-", 2: ":", 4: "--", 8: "-.", 32: "-."}[n],
            )
            shape.plot(u, rising, **line)
            density.plot(u, f, **line)
            rows += [
                dict(transform=name, n=n, beta=beta, u=x, Phi=p, Phi_0_to_1=s, density=d)
                for x, p, s, d in zip(u.tolist(), Phi.tolist(), rising.tolist(), f.tolist())
            ]
        shape.set(title=f"for {use}", ylabel="Phi, scaled to rise from 0 to 1", xlabel=U)
        density.set(ylabel="density at 1 nat (pi_ref: 1)", xlabel=U, yscale="log", ylim=(1e-3, 100))
        density.legend()
    return rows, figure


def rewind(out: Path, quick: bool):
    """Rewind-and-repeat at the 85th percentile, 32 draws at most (App. G): win rate, draws needed,
    and the optimum.
    """
    figure, (win_axis, draws_axis, density_axis) = panels(1, 3)
    kls, names, threshold = budgets(quick), [*CLOSED, "optimal"], cells.REWIND_QUANTILE
    rows = curves(win_axis, names, "rewind", 32, kls)
    for row in rows:
        name = row["transform"] if row["transform"] in names else "log"
        mass, ref = theory.policy_at_kl(name, row["kl_nats"], "rewind", 32)
        q = mass[cells.centres(ref) < threshold].sum()
        row["mean_draws"] = ((1 - q**32) / (1 - q)).item()
    for name in names:
        draws_axis.plot(
            kls, [row["mean_draws"] for row in rows if row["transform"] == name], **style(name)
        )
    pi_ref_draws = (1 - threshold**32) / (1 - threshold)
    draws_axis.axhline(pi_ref_draws, color="grey", linewidth=1, linestyle=":", label="pi_ref")
    draws_axis.set(title="cost", xlabel=KL, ylabel="mean number of draws", ylim=(0, 14))
    draws_axis.legend(ncols=2)
    for kl in (0.25, 0.5, 1.0):
        mass, ref = theory.policy_at_kl("optimal", kl, "rewind", 32)
        density_axis.plot(cells.centres(ref), mass / ref, label=f"{kl:g} nats")
    density_axis.axvline(threshold, color="grey", linewidth=1, linestyle=":", label="threshold")
    density_axis.set(
        title="the optimum for it",
        xlabel=U,
        ylabel=DENSITY,
        yscale="log",
        ylim=(1e-4, 1e3),
        xlim=(0.7, 1.005),
    )
    density_axis.legend()
    return rows, figure


def finite_k(out: Path, quick: bool):
    """What an empirical calibration with K samples costs each transform at equal KL, on average
    over prompts.
    """
    figure, axes = panels(1, 2)
    cases = [
        ("identity", "standard", 1),
        ("log", "standard", 1),
        ("exp5", "bon", 2),
        ("exp10", "bon", 4),
        ("bon_fp", "bon", 4),
        ("exp-5", "won", 2),
        ("exp-10", "won", 4),
        ("won_fp", "won", 4),
    ]
    sizes, kls, rows = (
        (10, 30, 100) if quick else (10, 30, 100, 300),
        (1.0,) if quick else (0.25, 1.0, 2.0),
        [],
    )
    for (name, procedure, n), kl, K in product(cases, kls, sizes):
        exact, win = theory.at_kl(name, kl, procedure, n), theory.at_kl(name, kl, procedure, n, K=K)
        rows.append(
            dict(
                transform=name,
                procedure=procedure,
                n=n,
                kl_nats=kl,
                K=K,
                win_rate=win,
                continuous=exact,
                points_lost=100 * (exact - win),
            )
        )
    for name, procedure, n in cases:
        lost = [
            row["points_lost"] for row in rows if row["transform"] == name and row["kl_nats"] == 1
        ]
        line = style(name) | {"label": f"{name}, {title(procedure, n)}", "marker": "o"}
        axes[procedure == "won"].plot(sizes, lost, **line)
    for axis in axes:
        axis.plot(sizes, [20 / K for K in sizes], color="grey", linestyle=":", label="slope 1/K")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="calibration samples K",
            ylabel="win rate lost at 1 nat [points]",
        )
        axis.set_xticks(sizes, sizes)
        axis.legend()
    return rows, figure


def any_n(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """Best-of-N of a user whose N is uniform over 1 .. n: (n, G), which mass_win_rate averages
    over.
    """
    return torch.stack([bon(mass, u, N) for N in range(1, n + 1)])


def mix(out: Path, quick: bool):
    """The best transform for an unknown N in 1 .. 32, and what one tuned for N loses at another N,
    at equal KL.
    """
    sizes = (1, 4, 32) if quick else (1, 2, 4, 8, 16, 32)
    used = {f"Best-of-{N}": (bon, N) for N in sizes} | {"1 .. 32": (any_n, 32)}
    policies = {f"optimal for {at}": ("optimal", *T) for at, T in used.items()}
    policies |= {name: (name, "bon", 1) for name in ("log", "exp5", "exp10", "exp20", "exp40")}
    rows = []
    for kl, (tuned, (name, *solved_for)) in product(
        (1.0,) if quick else (0.25, 0.5, 1.0, 2.0), policies.items()
    ):
        mass, ref = theory.policy_at_kl(name, kl, *solved_for)
        for at, T in used.items():
            win = mass_win_rate(mass, ref, *T).item()
            loss = 100 * (theory.optimal_win_rate(kl, *T) - win)
            rows.append(
                dict(kl_nats=kl, transform=tuned, used_at=at, win_rate=win, points_lost=loss)
            )
    figure, (table, curve) = panels(1, 2, width=6.4, height=5.2)
    lost = torch.tensor([row["points_lost"] for row in rows if row["kl_nats"] == 1]).view(
        len(policies), len(used)
    )
    table.imshow(lost.clamp(max=10), cmap="Reds", aspect="auto")
    for i, j in product(range(len(policies)), range(len(used))):
        color = "white" if lost[i, j] > 6 else "black"
        table.text(j, i, f"{abs(lost[i, j]):.2f}", ha="center", va="center", color=color)
    table.grid(False)
    table.set_xticks(range(len(used)), [at.removeprefix("Best-of-") for at in used])
    table.set_yticks(range(len(policies)), policies)
    table.set(
        xlabel="N it is used at (1 .. 32: uniform over them)",
        title="points lost to the optimum at 1 nat",
    )
    for at, T in used.items():
        mass, ref = theory.policy_at_kl("optimal", 1.0, *T)
        line = dict(color="black", linewidth=2) if at == "1 .. 32" else dict(linestyle="--")
        curve.plot(cells.centres(ref), mass / ref, label=f"optimal for {at}", **line)
    curve.set(
        title="the optimal policies at 1 nat",
        xlabel=U,
        ylabel=DENSITY,
        yscale="log",
        ylim=(1e-3, 1e4),
        xlim=(0.5, 1.005),
    )
    curve.legend()
    return rows, figure


STUDIES = (fig2, fig11, transforms, rewind, finite_k, mix)
