"""The paper's figures that are theory, and two questions beyond it: finite K, and an N that the
user does not know.

Every study returns (rows, figure); `reproduce.py` writes them. Win rates are compared at equal KL.
"""

import math
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minictrl import theory
from minictrl.figures import COLORS, KL, WIN_RATE, log_y, panels, title
from minictrl.procedures import cells
from minictrl.procedures.masses import mass_map, mass_win_rate
from minictrl.studies.tables import Rows, below_optimum, column, where, zipped
from minictrl.transforms import get_transform

CLOSED = ["identity", "log", "exp5", "exp10", "exp-5", "exp-10"]
BEST_OF = (2, 3, 4, 6, 8, 16, 32)
U, DENSITY = "calibrated reward u = C", "density (pi_ref: 1)"


def budgets(quick: bool) -> list[float]:
    """KLs of a curve in nats, closer to each other where it is steep."""
    steps = torch.linspace(0.07, 1, 12 if quick else 50, dtype=torch.float64)
    return (2.5 * steps**2).tolist()


def best_of_kl(n: int) -> float:
    """KL of Best-of-n with a continuous reward, an upper bound with ties."""
    return math.log(n) - (n - 1) / n


# --- the paper's figures ---


def rows_of(transforms: list[str], procedure: str, n: int, kls: list[float]) -> Rows:
    """Win rate against KL of each transform and of Best-of-n, whose policy is that of `log`."""
    cases = [(name, name, kl) for name, kl in product(transforms, kls)]
    cases += [(f"best-of-{size}", "log", best_of_kl(size)) for size in BEST_OF]
    rows = []
    for label, name, kl in cases:
        win_rate = theory.at_kl(name, kl, procedure, n)
        row = {
            "procedure": procedure,
            "n": n,
            "transform": label,
            "kl_nats": kl,
            "win_rate": win_rate,
            "points_below_optimum": below_optimum(win_rate, kl, procedure, n),
        }
        rows.append(row)
    return rows


def draw_lines(axis, rows: Rows, transforms: list[str], y: str):
    """A line for each transform against KL; those that are solved for are black."""
    for name in transforms:
        mine = where(rows, transform=name)
        axis.plot(column(mine, "kl_nats"), column(mine, y), color=COLORS[name], label=name)
    axis.set_xlabel(KL)


def draw_theory(axis, rows: Rows, transforms: list[str]):
    draw_lines(axis, rows, transforms, "win_rate")
    best_of = rows[-len(BEST_OF) :]
    kls = column(best_of, "kl_nats")
    win_rates = column(best_of, "win_rate")
    axis.plot(kls, win_rates, "o", color=COLORS["log"], label="Best-of-n of pi_ref, n = 2 … 32")
    axis.set(title=title(rows[0]["procedure"], rows[0]["n"]), ylabel=WIN_RATE)
    axis.legend(loc="lower right")


def fig2(out: Path, quick: bool):
    """Best-of-4 and Worst-of-4 against KL for every transform (Fig. 2)."""
    return every_transform([("bon", 4), ("won", 4)], quick)


def fig11(out: Path, quick: bool):
    """Standard, Best-of-2 and 4, Worst-of-2 and 4 against KL (Fig. 11)."""
    cases = [("standard", 1), ("bon", 2), ("bon", 4), ("won", 2), ("won", 4)]
    return every_transform(cases, quick)


def every_transform(cases: list[tuple[str, int]], quick: bool):
    """The trade-off of every transform for each (procedure, n), and how far it is from the best."""
    rows, (figure, axes) = [], panels(1, len(cases))
    for axis, (procedure, n) in zip(axes, cases):
        names = CLOSED if procedure == "standard" else [*CLOSED, f"{procedure}_fp"]
        mine = rows_of(names, procedure, n, budgets(quick))
        draw_theory(axis, mine, names)
        rows += mine
    return rows, figure


def transforms(out: Path, quick: bool):
    """The transforms themselves, and the policy that each makes of pi_ref at 1 nat."""
    rows, (figure, axes) = [], panels(2, 2)
    pi_ref = cells.grid(200 if quick else 500)
    u = cells.centres(pi_ref)  # dense near 0 and 1, where sharp policies are
    families = {
        "Best-of-N": (("identity", "log", "exp5", "exp10"), "bon_fp", (2, 4, 32)),
        "Worst-of-N": (("identity", "log", "exp-5", "exp-10"), "won_fp", (2, 4, 8)),
    }
    for axis, density_axis, (use, family) in zip(axes[:2], axes[2:], families.items()):
        closed, solved, sizes = family
        cases = [(name, 1) for name in closed]
        cases += [(solved, n) for n in sizes]
        for name, n in cases:
            beta = theory.beta_for_kl(name, 1.0, n=n)
            Phi = get_transform(name, n=n, beta=beta, K=None)(u)
            density = cells.tilt(Phi, 1 / beta, pi_ref).exp()
            scaled = (Phi - Phi[0]) / (Phi[-1] - Phi[0])
            axis.plot(u, scaled)
            density_axis.plot(u, density, label=f"{name}, N = {n}" if n > 1 else name)
            columns = {"u": u, "pi_ref": pi_ref, "density": density}
            columns |= {"Phi": Phi, "Phi_0_to_1": scaled}
            row = {"transform": name, "n": n, "beta": beta}
            rows += [row | point for point in zipped(columns)]
        axis.set(title=f"for {use}", ylabel="Phi, scaled to rise from 0 to 1", xlabel=U)
        density_axis.set(xlabel=U, ylabel=DENSITY, ylim=(1e-3, 100))
        log_y(density_axis)
        density_axis.legend()
    return rows, figure


def rewind(out: Path, quick: bool):
    """Rewind-and-repeat at the 85th percentile, 32 draws at most (App. G): win rate, draws needed,
    and the optimum.
    """
    figure, (win_axis, draws_axis, density_axis) = panels(1, 3)
    names, threshold = [*CLOSED, "optimal"], cells.REWIND_QUANTILE
    rows = rows_of(names, "rewind", 32, budgets(quick))
    for row in rows:
        name = row["transform"] if row["transform"] in names else "log"
        mass, ref = theory.policy_at_kl(name, row["kl_nats"], "rewind", 32)
        row["mean_draws"] = draws(mass[cells.centres(ref) < threshold].sum().item())
    draw_theory(win_axis, rows, names)
    draw_lines(draws_axis, rows, names, "mean_draws")
    draws_axis.axhline(draws(threshold), color="grey", label="pi_ref")
    draws_axis.set(title="cost", ylabel="mean number of draws", ylim=(0, 14))
    draws_axis.legend(ncols=2)
    for kl in (0.25, 0.5, 1.0):
        mass, ref = theory.policy_at_kl("optimal", kl, "rewind", 32)
        density_axis.plot(cells.centres(ref), mass / ref, label=f"{kl:g} nats")
    density_axis.axvline(threshold, color="grey", label="threshold")
    density_axis.set(title="the optimum for it", xlabel=U, xlim=(0.7, 1.005))
    density_axis.set(ylabel=DENSITY, ylim=(1e-4, 1e3))
    log_y(density_axis)
    density_axis.legend()
    return rows, figure


def draws(fails: float) -> float:
    """Draws of rewind-and-repeat on average, of at most 32, each rejected with probability
    `fails`.
    """
    return (1 - fails**32) / (1 - fails)


# --- beyond the paper ---


def finite_k(out: Path, quick: bool):
    """What an empirical calibration with K samples costs each transform at equal KL, on average
    over prompts.
    """
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
    sizes = (10, 30, 100) if quick else (10, 30, 100, 300)
    kls = (1.0,) if quick else (0.25, 1.0, 2.0)
    rows, (figure, axes) = [], panels(1, 2)
    for (name, procedure, n), kl, K in product(cases, kls, sizes):
        exact = theory.at_kl(name, kl, procedure, n)
        win_rate = theory.at_kl(name, kl, procedure, n, K=K)
        row = {
            "transform": name,
            "procedure": procedure,
            "n": n,
            "kl_nats": kl,
            "K": K,
            "win_rate": win_rate,
            "continuous": exact,
            "points_lost": 100 * (exact - win_rate),
        }
        rows.append(row)
    for name, procedure, n in cases:
        lost = column(rows, "points_lost", transform=name, kl_nats=1)
        label = f"{name}, {title(procedure, n)}"
        axes[procedure == "won"].plot(sizes, lost, "o-", color=COLORS[name], label=label)
    for axis in axes:
        axis.set(xlabel="calibration samples K", ylabel="win rate lost at 1 nat [points]")
        axis.set_xscale("log")
        axis.set_xticks(sizes, sizes)
        axis.set_xticks([], minor=True)
        log_y(axis, (1, 2, 5))
        axis.legend()
    return rows, figure


def any_n(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """Best-of-N of a user whose N is uniform over 1 .. n: (n, G), which mass_win_rate averages
    over.
    """
    bon = mass_map("bon")
    return torch.stack([bon(mass, u, N) for N in range(1, n + 1)])


def mix(out: Path, quick: bool):
    """The best transform for an unknown N in 1 .. 32, and what one tuned for N loses at another N,
    at equal KL.
    """
    sizes = (1, 4, 32) if quick else (1, 2, 4, 8, 16, 32)
    used = {f"Best-of-{N}": ("bon", N) for N in sizes} | {"1 .. 32": (any_n, 32)}
    policies = {f"optimal for {at}": ("optimal", *case) for at, case in used.items()}
    policies |= {name: (name, "bon", 1) for name in ("log", "exp5", "exp10", "exp20", "exp40")}
    kls = (1.0,) if quick else (0.25, 0.5, 1.0, 2.0)
    rows, (figure, (axis,)) = [], panels(1, 1, width=8)
    for kl, (tuned, (name, procedure, n)) in product(kls, policies.items()):
        mass, ref = theory.policy_at_kl(name, kl, procedure, n)
        for at, case in used.items():
            win_rate = mass_win_rate(mass, ref, *case).item()
            row = {
                "kl_nats": kl,
                "transform": tuned,
                "used_at": at,
                "win_rate": win_rate,
                "points_lost": below_optimum(win_rate, kl, *case),
            }
            rows.append(row)
    for tuned in policies:
        lost = column(rows, "points_lost", kl_nats=1, transform=tuned)
        axis.plot(list(used), lost, "o-", label=tuned)
    axis.set(title="at 1 nat", ylabel="points lost to the optimum", ylim=(-0.5, 16))
    axis.legend()
    return rows, figure


STUDIES = (fig2, fig11, transforms, rewind, finite_k, mix)
