"""The paper's theorems and lemmas as computations: `theorem1` on tabular policies, `lemmas` claim
by claim.

Rewards are random, with ties where a claim is said to hold with ties. Each returns (rows, figure)
for `reproduce.py`.
"""

import math
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minictrl.figures import panels, title
from minictrl.procedures import cells
from minictrl.procedures.masses import mass_win_rate
from minictrl.procedures.optimum import ascend

# ---- Theorem 1: a few prompts, 30 responses each, 12 values of the reward ----


def tabular_prompt(
    seed: int, responses: int = 30, values: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    """(pi_ref (Y,), level (Y,), ref (values,)): the rank of each response's reward, and pi_ref's
    mass of each rank.
    """
    generator = torch.Generator().manual_seed(seed)
    pi_ref = torch.rand(responses, generator=generator, dtype=torch.float64) ** 2 + 1e-3
    pi_ref = pi_ref / pi_ref.sum()
    reward = torch.randint(values, (responses,), generator=generator)
    level = reward.unique(return_inverse=True)[1]
    return pi_ref, level, at_levels(pi_ref, level)


def at_levels(pi: Tensor, level: Tensor) -> Tensor:
    return torch.zeros(int(level.max()) + 1, dtype=pi.dtype).index_add(0, level, pi)


def tied_win_rate(pi: Tensor, level: Tensor, ref: Tensor, procedure: str, n: int) -> Tensor:
    return mass_win_rate(at_levels(pi, level), ref, procedure, n)


def value(pi: Tensor, pi_ref: Tensor, win: Tensor, beta: float) -> Tensor:
    """W - beta KL."""
    return win - beta * torch.special.xlogy(pi, pi / pi_ref).sum()


def max_at_n(pi_ref: Tensor, level: Tensor, procedure: str, n: int):
    """pi -> E of the best (worst) of N draws of pi of g(y), where g(y) = P(y beats the best (worst)
    of N of pi_ref).

    Summed over all N-tuples of responses: no cdf, no formula of Lemma 5.
    """
    extreme = torch.maximum if procedure == "bon" else torch.minimum

    def tuples(pi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        probability, kept = pi, x
        for _ in range(n - 1):
            probability, kept = probability[..., None] * pi, extreme(kept[..., None], x)
        return probability.flatten(), kept.flatten()

    probability, kept = tuples(pi_ref, level)
    # (Y,)
    g = ((level[:, None] > kept).double() + (level[:, None] == kept).double() / 2) @ probability
    return lambda pi: torch.dot(*tuples(pi, g))


def maximise(objective, start: Tensor) -> Tensor:
    """argmax of objective(x) by L-BFGS from `start`, its memory cleared each round, until a round
    gains nothing.
    """
    x, best = start.clone().requires_grad_(), -math.inf
    for _ in range(10):
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=300,
            tolerance_grad=1e-12,
            tolerance_change=0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def loss(optimizer=optimizer):
            optimizer.zero_grad()
            negative = -objective(x)
            negative.backward()
            return negative

        gained = -optimizer.step(loss).item() - best  # the objective where this round began
        best += gained
        if gained < 1e-9:
            break
    return x.detach()


def direct_ascent(win_rate, pi_ref: Tensor, beta: float) -> Tensor:
    """The policy that maximises win_rate(pi) - beta KL, on its logits; from pi_ref, by steps down
    to beta.
    """
    logits = pi_ref.log()
    for warmer in [each for each in (1.0, 0.3, 0.1, 0.05) if each > beta] + [beta]:
        logits = maximise(lambda x: value(pi := x.softmax(0), pi_ref, win_rate(pi), warmer), logits)  # noqa: B023
    return logits.softmax(0)


def em_iterates(
    ref: Tensor, procedure: str, n: int, beta: float, eta: float, steps: int
) -> list[float]:
    """Objective of each iterate of the paper's alternation (Eq. 5 and 6), damped by eta; eta = 1 is
    the paper's.
    """
    log_ratio, objective = torch.zeros_like(ref), []
    for _ in range(steps):
        mass = (ref * log_ratio.exp()).requires_grad_()
        win = mass_win_rate(mass, ref, procedure, n)
        (R,) = torch.autograd.grad(win, mass)
        objective.append(win.item() - beta * cells.kl(log_ratio, ref))
        log_ratio = cells.tilt(R, eta / beta, ref, (1 - eta) * log_ratio)
    return objective


def theorem1(out: Path, quick: bool):
    """Three ways to the optimum of a tabular problem with ties: EM, direct ascent, and direct
    ascent on max@N.
    """
    rows, cases = (
        [],
        [("standard", 1), ("bon", 2), ("bon", 8), ("won", 2), ("won", 4), ("rewind", 32)],
    )
    for seed in range(1 if quick else 2):
        pi_ref, level, ref = tabular_prompt(seed)
        for (procedure, n), beta in product(cases, (0.1, 0.02)):
            win_rate = partial(tied_win_rate, level=level, ref=ref, procedure=procedure, n=n)
            best_pi = direct_ascent(win_rate, pi_ref, beta)
            best, policies = (
                value(best_pi, pi_ref, win_rate(best_pi), beta).item(),
                {"direct": best_pi},
            )
            policies["EM"] = pi_ref * ascend(procedure, n, ref, beta=beta).log_ratio.exp()[level]
            if procedure in ("bon", "won") and n == 2:
                policies["max@N"] = direct_ascent(
                    max_at_n(pi_ref, level, procedure, n), pi_ref, beta
                )
            for solver, pi in policies.items():
                objective = value(pi, pi_ref, win_rate(pi), beta).item()
                rows.append(
                    dict(
                        prompt=seed,
                        procedure=procedure,
                        n=n,
                        beta=beta,
                        solver=solver,
                        objective=objective,
                        win_rate=win_rate(pi).item(),
                        above_direct=objective - best,
                        total_variation=(pi - best_pi).abs().sum().item() / 2,
                    )
                )
    figure, axes = panels(1, 2)
    _, _, ref = tabular_prompt(0)
    for axis, (procedure, n) in zip(axes, (("bon", 8), ("won", 3))):
        best = ascend(procedure, n, ref, beta=0.02)
        optimum = best.win_rate - 0.02 * best.kl
        for eta in (1.0, 0.5, 0.1):
            gaps = [max(optimum - J, 1e-16) for J in em_iterates(ref, procedure, n, 0.02, eta, 80)]
            axis.plot(gaps, label=f"eta = {eta:g}" + (" (the paper's)" if eta == 1 else ""))
        axis.set(yscale="log", ylim=(1e-12, 2), xlabel="iterations of the alternation (Eq. 5, 6)")
        axis.set(ylabel="objective below the optimum", title=f"{title(procedure, n)}, beta = 0.02")
        axis.legend()
    return rows, figure


STUDIES = (theorem1,)
