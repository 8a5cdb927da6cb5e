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

from minictrl import theory
from minictrl.calibration import calibrated_reward
from minictrl.figures import panels, title
from minictrl.procedures import cells
from minictrl.procedures.masses import mass_map, mass_win_rate
from minictrl.procedures.optimum import ascend
from minictrl.transforms import get_transform

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

        def loss():
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


# ---- Lemmas 2 to 6, Theorems 2 to 5 ----


def check(claim: str, computed: str, deviation: float, allowed: float) -> dict:
    holds = "yes" if deviation <= allowed else "no"
    return dict(
        claim=claim, computed=computed, largest_deviation=deviation, allowed=allowed, holds=holds
    )


def nearly_continuous(seed: int, responses: int) -> tuple[Tensor, Tensor]:
    """(pi_ref, C), each (Y,), by rising reward: many responses with distinct rewards, unequally
    likely.
    """
    pi_ref = torch.rand(
        responses, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ) ** (1 + 2 * seed)
    pi_ref = pi_ref / pi_ref.sum()
    return pi_ref, cells.centres(pi_ref)  # Definition 2: what lies below, and half of itself


def lemmas_2_and_3() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    r, r_ref = (
        (2 * torch.randn(200, size, generator=generator, dtype=torch.float64)).round()
        for size in (60, 100)
    )
    C_hat = calibrated_reward(r, r_ref)
    falls = -C_hat.gather(1, r.argsort(1)).diff(dim=1).min().item()
    outside = max(-C_hat.min().item(), C_hat.max().item() - 1)
    maps = [torch.exp, torch.atan, lambda x: x**3 + x, lambda x: 5 * x - 100]
    moved = max((calibrated_reward(m(r), m(r_ref)) - C_hat).abs().max().item() for m in maps)
    return [
        check(
            "Lemma 2, ties",
            "C_hat (Eq. 12) leaves [0, 1], or falls where r rises",
            max(falls, outside, 0.0),
            0.0,
        ),
        check(
            "Lemma 3, ties",
            "C_hat of exp r, atan r, r^3 + r, 5r - 100 minus C_hat of r",
            moved,
            0.0,
        ),
    ]


def lemmas_4_and_5(responses: int, N: int = 4) -> list[dict]:
    rows, (distinct, _) = [], nearly_continuous(1, responses)
    tied, grain = torch.full((10,), 0.1, dtype=torch.float64), distinct.max().item()
    for ref, kind in ((distinct, "distinct rewards"), (tied, "10 values, tied")):
        C, F = cells.centres(ref), cells.cdf(ref)
        computed = "sup over u of |P(C <= u) - u|, at most the largest pi_ref(y)"
        rows.append(check(f"Lemma 4, {kind}", computed, (F[1:] - C).abs().max().item(), grain))
        for procedure, share in (("bon", C), ("won", 1 - C)):
            claimed, exact = N * ref * share ** (N - 1), mass_map(procedure)(ref, F, N)
            distance = (claimed - exact).abs().sum().item() / 2
            computed = f"total variation of {procedure}'s law to the claimed one, N = {N}"
            rows.append(check(f"Lemma 5, {kind}", computed, distance, grain))
    return rows


def lemma_6(quick: bool, delta: float = 0.05) -> tuple[list[dict], list[dict]]:
    """Rows, and for each K the mean over prompts of max_y |C_hat - C|, its 95 % quantile, and the
    bound on that.
    """
    prompts, points, rows = 500 if quick else 4000, [], []
    for ties, K in product((False, True), (10, 30, 100, 300, 1000)):
        z = torch.rand(prompts, K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
        z = (10 * z).floor() if ties else z  # ten rewards, equally likely
        y = torch.arange(10.0, dtype=torch.float64) if ties else cells.midpoints(1000)
        C = (y + 0.5) / 10 if ties else y
        error = (calibrated_reward(y.expand(prompts, -1), z) - C).abs().amax(1)  # (prompts,)
        bound, kind = (
            math.sqrt(math.log(2 / delta) / (2 * K)),
            "ties" if ties else "distinct rewards",
        )
        quantile = error.quantile(1 - delta).item()
        points.append(
            dict(kind=kind, K=K, mean=error.mean().item(), quantile=quantile, bound=bound)
        )
        if K in (30, 300):
            above, noise = (
                (error > bound).double().mean().item(),
                3 * math.sqrt(delta * (1 - delta) / prompts),
            )
            computed = f"share of {prompts} prompts above the DKW bound at delta {delta:g}, K = {K}"
            rows.append(check(f"Lemma 6, {kind}", computed, above, delta + noise))
    return rows, points


def theorems_2_to_4(responses: int) -> list[dict]:
    """One Phi on two models that share nothing, and the formulas of Theorem 3 against Definition
    4.
    """
    rows = []
    cases = [("exp10", 5000.0, "bon", 4), ("exp-5", 0.02, "won", 4), ("log", 0.2, "standard", 1)]
    for name, beta, procedure, N in cases:
        (kl,), (win,) = theory.tradeoff(name, procedure, N, [beta])
        off = []
        for seed in (0, 1):
            pi_ref, C = nearly_continuous(seed, responses)
            log_ratio = cells.tilt(get_transform(name, K=None)(C), 1 / beta, pi_ref)
            direct = mass_win_rate(pi_ref * log_ratio.exp(), pi_ref, procedure, N).item()
            off += [abs(direct - win), abs(cells.kl(log_ratio, pi_ref) - kl)]
        computed = f"W and KL of {name}, {procedure} {N}, on two models minus those in u"
        rows.append(check("Theorems 2 and 4", computed, max(off), 10 * pi_ref.max().item()))
    for procedure, N in (("bon", 2), ("bon", 32), ("won", 2), ("won", 32)):
        mass, ref = theory.policy_at_kl("exp5", 1.0, procedure, N)
        F, u = cells.cdf(mass), cells.cdf(ref)
        F, u = (F[1:] + F[:-1]) / 2, (u[1:] + u[:-1]) / 2
        eq_8, eq_9 = (
            1 - N * (F**N * u ** (N - 1) * ref).sum(),
            N * ((1 - F) ** N * (1 - u) ** (N - 1) * ref).sum(),
        )
        formula = eq_8 if procedure == "bon" else eq_9
        off = abs(formula.item() - mass_win_rate(mass, ref, procedure, N).item())
        rows.append(
            check(
                "Theorem 3",
                f"Eq. 8 or 9, {procedure} {N}, minus Definition 4, exp5 at 1 nat",
                off,
                1e-6,
            )
        )
    mass, ref = theory.policy_at_kl("exp5", 1.0, "bon", 2)
    Phi, beta = get_transform("exp5")(cells.centres(ref)), theory.beta_for_kl("exp5", 1.0)
    log_Z = torch.logsumexp(Phi / beta + ref.log(), 0)
    off = abs(((mass * Phi).sum() / beta - log_Z).item() - 1)
    return rows + [check("Theorem 3", "Eq. 10 minus the KL asked for, exp5 at 1 nat", off, 1e-6)]


def theorem_5() -> list[dict]:
    """The log-linear model: SFT + reward multi-task against KL-regularised reward, with the KL
    either way round.
    """
    generator = torch.Generator().manual_seed(0)
    # (prompts, responses, features)
    g = torch.randn(6, 40, 5, generator=generator, dtype=torch.float64)
    r, data = torch.rand(2, 6, 40, generator=generator, dtype=torch.float64)
    p_sft, beta = data / data.sum(1, keepdim=True), 0.2

    def minimise(loss) -> Tensor:
        return maximise(
            lambda theta: -loss((g @ theta).log_softmax(1)), torch.zeros(5, dtype=torch.float64)
        )

    sft = lambda logpi: -(p_sft * logpi).sum(1).mean()  # noqa: E731
    penalty = lambda logpi: -(logpi.exp() * r).sum(1).mean() / beta  # noqa: E731  L_ro is a loss: minus the reward
    p = (g @ minimise(sft)).log_softmax(1)
    multi_task = minimise(lambda logpi: sft(logpi) + penalty(logpi))
    p_to_pi = minimise(lambda logpi: (p.exp() * (p - logpi)).sum(1).mean() + penalty(logpi))
    pi_to_p = minimise(lambda logpi: (logpi.exp() * (logpi - p)).sum(1).mean() + penalty(logpi))
    computed = "theta of SFT + reward minus theta of KL + reward"
    return [
        check("Theorem 5, KL(p || pi)", computed, (multi_task - p_to_pi).abs().max().item(), 1e-6),
        check(
            "Theorem 5, KL(pi || p), as written",
            computed,
            (multi_task - pi_to_p).abs().max().item(),
            1e-6,
        ),
    ]


def lemmas(out: Path, quick: bool):
    """Lemmas 2 to 6 and Theorems 2 to 5: claim, what was computed, the largest deviation; Lemma 6
    is the picture.
    """
    responses = 2_000 if quick else 50_000
    dkw, points = lemma_6(quick)
    rows = (
        lemmas_2_and_3()
        + lemmas_4_and_5(responses)
        + dkw
        + theorems_2_to_4(responses)
        + theorem_5()
    )
    figure, (axis,) = panels(1, 1, width=6.4, height=4.6)
    for kind, marker in (("distinct rewards", "o-"), ("ties", "s--")):
        mine = [point for point in points if point["kind"] == kind]
        K = [point["K"] for point in mine]
        axis.plot(
            K,
            [point["quantile"] for point in mine],
            marker,
            color="C0",
            label=f"95 % of the prompts, {kind}",
        )
        axis.plot(K, [point["mean"] for point in mine], marker, color="C1", label=f"mean, {kind}")
    axis.plot(
        K,
        [point["bound"] for point in mine],
        color="black",
        label="DKW bound, delta = 0.05 (Lemma 6)",
    )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="calibration samples K",
        ylabel="max over y of |C_hat - C|",
    )
    axis.legend()
    return rows, figure


STUDIES = (theorem1, lemmas)
