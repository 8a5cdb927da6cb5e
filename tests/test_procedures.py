"""The procedures beyond Best-of-N and rewind, both halves of each, against enumeration of all
draws and brute-force quadrature.
"""

import math
from fractions import Fraction
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from minictrl import procedures, theory
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.methods.base import check_procedure
from minictrl.procedures import cells, get_procedure
from minictrl.procedures.base import ByRank
from minictrl.procedures.masses import mass_win_rate
from minictrl.winrate import win_rate, win_rates

BY_RANK = {  # procedure, N -> the ranks kept, 1 the lowest, equally likely
    ("second", 2): [1],
    ("second", 5): [4],
    ("median", 3): [2],
    ("median", 4): [2, 3],
    ("trimmed", 4): [2, 3],
    ("trimmed", 5): [2, 3, 4],
    ("trimmed", 7): [2, 3, 4, 5, 6],
    ("trimmed", 8): [3, 4, 5, 6],
}
NEW = ("second", "median", "trimmed", "soft", "soft0.5", "poisson")


def draws(P, M, levels=None, seed=0):
    """(P, M) uniform scores; of few values with `levels`."""
    u = torch.rand(P, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u if levels is None else (levels * u).floor()


def chosen(procedure: str, n: int, scores: list[float]) -> list[float]:
    """The probability that each of n draws is kept, by its score (soft: C); ties share theirs."""
    if procedure.startswith("soft"):
        temperature = float(procedure.removeprefix("soft") or 0.1)
        return (torch.tensor(scores) / temperature).softmax(0).tolist()
    kept = [sorted(scores)[rank - 1] for rank in BY_RANK[procedure, n]]
    return [kept.count(each) / len(kept) / scores.count(each) for each in scores]


@pytest.mark.parametrize(
    "procedure, n", [*BY_RANK, ("soft", 1), ("soft", 3), ("soft0.02", 3), ("soft5", 6)]
)
def test_weights_are_the_mean_over_all_subsets(procedure, n):
    M = max(6, n)
    for levels in (None, 3):
        select, select_ref = draws(2, M, levels), draws(2, 7, levels, seed=1)
        soft = procedure.startswith("soft")
        by = calibrated_reward(select, select_ref) if soft else select
        expected = torch.zeros(2, M, dtype=torch.float64)
        subsets = list(combinations(range(M), n))
        for prompt, subset in product(range(2), subsets):
            kept = chosen(procedure, n, by[prompt, list(subset)].tolist())
            expected[prompt, list(subset)] += torch.tensor(kept).double() / len(subsets)
        found = get_procedure(procedure).weights(select, n, select_ref)
        assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_weights_of_best_of_poisson_are_those_of_best_of_n_mixed(n):
    select, M = draws(3, 20, levels=5), 20
    law = torch.distributions.Poisson(torch.tensor(n - 1.0, dtype=torch.float64))
    pmf = [law.log_prob(torch.tensor(k - 1.0)).exp().item() for k in range(1, M + 1)]
    expected = sum(p * get_procedure("bon").weights(select, k) for k, p in enumerate(pmf, 1))
    found = get_procedure("poisson").weights(select, n)
    assert torch.allclose(found, expected, atol=1e-7)  # more than 20 draws are that rare
    needed = get_procedure("poisson").samples(n)
    assert sum(pmf[:needed]) > 1 - 1e-4 and (n == 1 or sum(pmf[: needed - 1]) < 1 - 1e-4)


def test_rank_weights_of_samples_tend_to_those_of_densities():
    """The share of the m lowest of M samples, m / M = F: k among them is binomial for large M."""
    M, F = 4000, 0.3
    select = torch.arange(M, dtype=torch.float64)[None]
    mass = torch.tensor([F, 1 - F], dtype=torch.float64)
    for (procedure, n), ranks in BY_RANK.items():
        kept = get_procedure(procedure)
        exact = sum(
            Fraction(math.comb(n, k) * 3**k * 7 ** (n - k), 10**n)
            for rank in ranks
            for k in range(rank, n + 1)
        ) / len(ranks)
        below = kept.mass_after(mass, cells.cdf(mass), n)[0].item()
        assert below == pytest.approx(float(exact), abs=1e-12)
        found = kept.weights(select, n)[0, : int(F * M)].sum().item()
        assert found == pytest.approx(float(exact), abs=n**2 / M)


def test_best_of_poisson_on_densities_is_best_of_n_mixed_and_has_the_papers_density():
    mass, ref = theory.policy_at_kl("exp5", 1.0, "bon", 4)
    T, edges = get_procedure("poisson").mass_after, cells.cdf(ref)
    for n in (1, 2, 7):
        law = torch.distributions.Poisson(torch.tensor(n - 1.0, dtype=torch.float64))
        expected = sum(
            law.log_prob(torch.tensor(k - 1.0)).exp()
            * get_procedure("bon").mass_after(mass, edges, k)
            for k in range(1, 60)
        )
        assert torch.allclose(T(mass, edges, n), expected, atol=1e-13)
    u, mu = cells.midpoints(1000), 3
    density = 1000 * T(torch.full_like(u, 1e-3), torch.linspace(0, 1, 1001).double(), mu + 1)
    assert torch.allclose(density, (1 + mu * u) * (mu * (u - 1)).exp(), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_soft_best_of_2_on_densities_is_the_double_integral(temperature):
    """2 f(u) times the mean over v of e^u / (e^u + e^v), C / temperature in the exponents."""
    G = 400
    u = cells.midpoints(G)
    mass = (u**2 + 0.1) / (u**2 + 0.1).sum()
    chosen = torch.sigmoid((u[:, None] - u) / temperature)
    found = get_procedure(f"soft{temperature}").mass_after(mass, torch.linspace(0, 1, G + 1), 2)
    assert torch.allclose(found, 2 * mass * (chosen @ mass), atol=1e-9)


@pytest.mark.parametrize("n", [2, 4])
def test_soft_is_best_of_n_when_cold_and_standard_when_hot(n):
    mass, ref = theory.policy_at_kl("exp5", 1.0, "bon", 4)
    select, select_ref = draws(2, 8), draws(2, 200, seed=1)
    for soft, limit, close in (("soft0.01", "bon", 0.02), ("soft1000", "standard", 1e-3)):
        wins = [mass_win_rate(mass, ref, name, n).item() for name in (soft, limit)]
        assert wins[0] == pytest.approx(wins[1], abs=close)
    hot, cold = (get_procedure(f"soft{t}").weights(select, n, select_ref) for t in (1000, 0.01))
    assert torch.allclose(hot, torch.full_like(hot, 1 / 8), atol=1e-3)
    apart = get_procedure("bon").weights(select, n)
    assert (cold - apart).abs().max() < 0.1 < (cold - hot).abs().max()


@pytest.mark.parametrize("procedure", NEW)
def test_pi_ref_against_itself_wins_one_half(procedure):
    """Exactly on one set of samples; 4 standard errors on two, for soft also half a point."""
    u, v = draws(1000, 16), draws(1000, 16, seed=1)
    for same in (u[:50], (5 * u[:50]).floor()):  # without ties and with them
        assert win_rate(same, same, same, same, procedure, 4)[0] == pytest.approx(0.5, abs=1e-12)
    win, stderr = win_rate(u, u, v, v, procedure, 4)
    slack = 0.005 if procedure.startswith("soft") else 0
    assert stderr < 8e-3 and win == pytest.approx(0.5, abs=4 * stderr + slack)
    ref = cells.grid(400)
    assert mass_win_rate(ref, ref, procedure, 4).item() == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("procedure", NEW)
def test_samples_of_a_known_policy_have_the_theorys_win_rate(procedure):
    """4 standard errors; for soft one point more, because C is known from 32 samples only."""
    u, v = draws(500, 32) ** (1 / 3), draws(500, 32, seed=1)  # log at beta 1/2
    win, stderr = win_rate(u, u, v, v, procedure, 4)
    exact = theory.tradeoff("log", procedure, 4, [0.5])[1][0]
    slack = 0.01 if procedure.startswith("soft") else 0
    assert win == pytest.approx(exact, abs=4 * stderr + slack)


@pytest.mark.parametrize("procedure", NEW)
def test_the_theorys_win_rate_is_definition_4_by_quadrature(procedure):
    """log's policy at beta 1/2 has cdf u^3: both cdfs after the procedure on 2,000 points."""
    n, G = 4, 2000
    edges = torch.linspace(0, 1, G + 1, dtype=torch.float64)

    def after(F):
        if procedure.startswith("soft"):
            return cells.cdf(get_procedure(procedure).mass_after(F.diff(), edges, n))
        if procedure == "poisson":
            return F * (3 * (F - 1)).exp()
        ranks = {"second": [3], "median": [2, 3], "trimmed": [2, 3]}[procedure]
        tails = [math.comb(n, k) * F**k * (1 - F) ** (n - k) for k in range(n + 1)]
        return sum(sum(tails[rank:]) for rank in ranks) / len(ranks)

    ours, theirs = after(edges**3), after(edges)
    win = (ours.diff() * (theirs[1:] + theirs[:-1]) / 2).sum().item()
    assert theory.tradeoff("log", procedure, n, [0.5])[1][0] == pytest.approx(win, abs=2e-6)


@pytest.mark.parametrize("procedure", ["second", "median", "trimmed", "soft0.5", "poisson"])
def test_its_optimum_is_above_every_transform_and_keeps_to_the_kl(procedure):
    best = theory.optimal_win_rate(0.7, procedure, 4)
    for name in ("identity", "log", "exp5", "exp10", "exp-5"):
        assert theory.at_kl(name, 0.7, procedure, 4) < best
    beta = theory.beta_for_kl("optimal", 0.7, procedure=procedure, n=4)
    (kl,), (win,) = theory.tradeoff("optimal", procedure, 4, [beta])
    assert kl == pytest.approx(0.7, abs=1e-5) and win == pytest.approx(best, abs=1e-6)


def test_too_few_samples_are_named_with_how_many_it_takes():
    u = draws(3, 8)
    with pytest.raises(ValueError, match="n 4 with 8 samples per prompt: draw 12 or more"):
        win_rates(u, u, u, u, "poisson", 4)
    with pytest.raises(ValueError, match="n 9 with 8 samples.*draw 9"):
        win_rates(u, u, u, u, "median", 9)
    with pytest.raises(ValueError, match="n 1100: too many draws to be ranked; use at most 1000"):
        theory.at_kl("exp10", 1.0, "median", 1100)
    with pytest.raises(ValueError, match="'soft0.001': use a temperature of at least 0.01"):
        win_rates(u, u, u, u, "soft0.001", 4)


@pytest.mark.parametrize(
    "given",
    [
        lambda mass, edges, n: 2 * mass,
        lambda mass, edges, n: -mass,
        lambda mass, edges, n: mass[..., :-1],
        lambda mass, edges, n: None,
    ],
)
def test_a_function_that_gives_no_masses_is_told(given):
    with pytest.raises(ValueError, match="as many, nowhere negative, that sum to 1"):
        theory.at_kl("exp10", 1.0, given, 4)
    with pytest.raises(ValueError, match="a procedure gave"):
        theory.optimal_win_rate(1.0, given, 4)
    with pytest.raises(ValueError, match="a procedure gave"):
        theory.win_rate(torch.ones(100), given, 4)


def test_a_procedure_without_a_gradient_is_told():
    with pytest.raises(ValueError, match="make it differentiable"):
        theory.optimal_win_rate(1.0, lambda mass, edges, n: mass.detach(), 4)


@torch.no_grad()
def test_a_run_is_checked_and_an_optimum_solved_where_the_caller_asks_for_no_gradients():
    Config(transform="identity").resolved()
    of_two, of_three, of_four = (theory.optimal_win_rate(0.937, "bon", n) for n in (2, 3, 4))
    assert of_two < of_three < of_four


def test_rank_weights_may_come_one_by_one():
    class Mine(ByRank):
        def rank_weights(self, n):
            return (float(rank == n) for rank in range(1, n + 1))

    select = torch.rand(2, 8).double()
    assert torch.equal(Mine().weights(select, 4), get_procedure("bon").weights(select, 4))


def test_a_file_goes_before_a_temperature(monkeypatch):
    assert procedures.parse_procedure("soft2") == ("soft", [2.0])
    monkeypatch.setattr(procedures, "PROCEDURES", (*procedures.PROCEDURES, "soft2"))
    assert procedures.parse_procedure("soft2") == ("soft2", [])


def test_weights_that_change_their_scores_are_told(monkeypatch):
    mine = get_procedure("bon")
    monkeypatch.setattr(mine, "weights", lambda select, *_: select.mul_(0).add_(1 / 8))
    with pytest.raises(ValueError, match="procedure bon: weights changes select in place"):
        check_procedure("bon", 8)


@pytest.mark.parametrize(
    "weights", [None, [0, 1, 0], [0, 0, 0, 0], [1, -1, 1, 1], [1, 1, 1, math.nan]]
)
def test_rank_weights_that_are_none_are_told(weights):
    class Mine(ByRank):
        def rank_weights(self, n):
            return weights

    with pytest.raises(ValueError, match="4 weights, one per rank"):
        Mine().weights(torch.rand(2, 8).double(), 4)


@pytest.mark.parametrize(
    "weights",
    [
        lambda select: select.abs() + 1,
        lambda select: torch.full_like(select, math.nan),
        lambda select: torch.where(select > 0.5, torch.nan, 1 / select.shape[1]),
        lambda select: torch.full_like(select, 1 / select.shape[1])[0],
        lambda select: [1.0],
    ],
)
def test_weights_that_are_no_probabilities_are_told_before_a_run_and_after(weights, monkeypatch):
    monkeypatch.setattr(get_procedure("bon"), "weights", lambda select, *_: weights(select))
    r = torch.rand(4, 3, 8)
    with pytest.raises(ValueError, match="procedure bon: its weights of 8 samples"):
        win_rates(*r, "bon", 2)
    with pytest.raises(ValueError, match="procedure bon: its weights of 4 samples"):
        Config(transform="identity").resolved()


@pytest.mark.parametrize(
    "change, told",
    [(Tensor.detach, "make it differentiable"), (Tensor.float, "sum to 1, in torch.float64")],
)
def test_masses_that_no_optimum_could_be_solved_for_are_told_before_a_run(
    change, told, monkeypatch
):
    bon = get_procedure("bon").mass_after
    monkeypatch.setattr(get_procedure("bon"), "mass_after", lambda *given: change(bon(*given)))
    with pytest.raises(ValueError, match=told):
        Config(transform="identity").resolved()


def test_best_of_500_of_1000_weighs_the_largest_by_a_half():
    weights = get_procedure("bon").weights(torch.arange(1000.0).double()[None], 500)[0]
    assert weights[-1] == pytest.approx(0.5) and weights.sum() == pytest.approx(1)
    assert weights[-2] == pytest.approx(0.5 * 500 / 999)
