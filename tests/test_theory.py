"""minictrl/theory.py against closed forms, simulation, and numbers computed by other code on a
400,000-point grid.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minictrl import theory
from minictrl.procedures import PROCEDURES, cells, get_procedure
from minictrl.procedures.masses import mass_win_rate
from minictrl.procedures.optimum import ascend
from minictrl.transforms import get_transform

TRANSFORMS = ["identity", "log", "exp5", "exp10", "exp-5", "exp-10"]


# at 1 nat: beta, standard, BoN 2, 4, 32, WoN 2, 4, 32
ONE_NAT = {
    "identity": (0.136064, 0.86458, 0.87333, 0.87700, 0.87991, 0.93680, 0.97446, 0.99420),
    "log": (0.188487, 0.86311, 0.86311, 0.86311, 0.86311, 0.94413, 0.98588, 0.99999),
    "exp5": (34.1979, 0.83897, 0.89640, 0.91922, 0.93107, 0.85850, 0.85719, 0.84622),
    "exp10": (5315.25, 0.80102, 0.89049, 0.93510, 0.95365, 0.78911, 0.77117, 0.75105),
    "exp-5": (0.0171803, 0.85669, 0.84356, 0.83523, 0.82654, 0.94819, 0.99121, 1.00000),
    "exp-10": (0.000958474, 0.84789, 0.82474, 0.80948, 0.79351, 0.94752, 0.99267, 1.00000),
}


@pytest.mark.parametrize("name", ONE_NAT)
def test_beta_and_win_rates_at_one_nat(name):
    beta, *wins = ONE_NAT[name]
    assert theory.beta_for_kl(name, 1.0) == pytest.approx(beta, rel=4e-6)
    for (procedure, n), win in zip(
        [("standard", 1)] + [(p, n) for p in ("bon", "won") for n in (2, 4, 32)], wins
    ):
        # they are rounded to 5 digits
        assert theory.at_kl(name, 1.0, procedure, n) == pytest.approx(win, abs=6e-6)


@pytest.mark.parametrize(
    "procedure, n, beta, kl, win",
    [
        ("bon", 4, 0.1, 0.8909, 0.93117),
        ("bon", 4, 0.02, 1.9833, 0.98348),
        ("bon", 2, 0.1, 1.0970, 0.90725),
        ("bon", 32, 0.02, 0.6079, 0.99577),
        ("won", 4, 0.1, 0.6836, 0.97500),
        ("won", 2, 0.1, 1.0136, 0.95000),
    ],
)
def test_optimum_at_known_points(procedure, n, beta, kl, win):
    (our_kl,), (our_win,) = theory.tradeoff("optimal", procedure, n, [beta])
    assert our_kl == pytest.approx(kl, abs=1e-4) and our_win == pytest.approx(win, abs=6e-6)


def test_log_transform_gives_best_of_n():
    for N in (2, 5, 64):
        (kl,), (win,) = theory.tradeoff("log", "standard", 1, [1 / (N - 1)])
        assert kl == pytest.approx(math.log(N) - (N - 1) / N, abs=1e-6)
        assert win == pytest.approx(N / (N + 1), abs=1e-6)
        for n in (1, 3, 200):  # the same for every N of the procedure
            assert theory.tradeoff("log", "bon", n, [1 / (N - 1)])[1][0] == pytest.approx(
                N / (N + 1), abs=2e-6
            )


@pytest.mark.parametrize("name", TRANSFORMS + ["exp50", "exp-50", "bon_fp", "won_fp"])
def test_beta_for_kl_inverts_the_kl_and_the_kl_falls_with_beta(name):
    betas = [theory.beta_for_kl(name, kl) for kl in (0.01, 0.3, 1.0, 3.0)]
    kl, win = theory.tradeoff(name, "bon", 4, betas)
    assert kl.dtype == np.float64 and kl == pytest.approx([0.01, 0.3, 1.0, 3.0], rel=1e-6)
    assert np.all(np.diff(betas) < 0) and np.all(np.diff(win) > 0) and np.all(win > 0.5)


def test_best_and_worst_of_one_are_the_standard_win_rate():
    for name in TRANSFORMS:
        one = [theory.at_kl(name, 0.7, procedure, 1) for procedure in PROCEDURES]
        assert max(one) - min(one) < 1e-9


@pytest.mark.parametrize(
    "procedure, n", [("standard", 1), ("bon", 2), ("bon", 32), ("won", 4), ("rewind", 32)]
)
def test_no_transform_beats_the_optimum_at_its_kl(procedure, n):
    for kl in (0.2, 1.0):
        best = theory.optimal_win_rate(kl, procedure, n)
        # 1e-6: the solver's grid
        assert all(theory.at_kl(name, kl, procedure, n) < best + 1e-6 for name in TRANSFORMS)
    if procedure == "standard":
        assert theory.at_kl("identity", kl, procedure, n) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("N", [2, 4, 32, 256])
@pytest.mark.parametrize("beta", [1.0, 0.05, 0.005])
def test_best_of_n_converges_to_corollary_2(N, beta):
    best = ascend("bon", N, ref := cells.grid(4000), beta=beta)
    F, u = cells.cdf(ref * best.log_ratio.exp()), cells.cdf(ref)
    integrand = (F * u) ** (N - 1)
    slices = (integrand[1:] + integrand[:-1]) / 2 * ref  # trapezoid rule
    Phi = -(N**2) * (slices.flip(0).cumsum(0).flip(0) - slices / 2)
    # both are O(1/cells^2) from the integral
    assert (Phi - best.Phi - Phi[-1]).abs().max() < 3e-5 * N
    assert best.residual < 1e-7 and (best.log_ratio - best.Phi / beta).std() < 1e-4


def test_the_papers_plain_iteration_oscillates_where_ours_converges():
    ref, beta, log_ratio, wins = cells.grid(400), 0.02, torch.zeros(400, dtype=torch.float64), []
    for _ in range(60):
        mass = (ref * log_ratio.exp()).requires_grad_()
        win = mass_win_rate(mass, ref, "bon", 32)
        (Phi,) = torch.autograd.grad(win, mass)
        log_ratio = cells.tilt(Phi, 1 / beta, ref)
        wins.append(win.item() - beta * cells.kl(log_ratio, ref))
    assert max(wins[-10:]) - min(wins[-10:]) > 0.05
    assert ascend("bon", 32, ref, beta=beta).residual < 1e-7


def test_best_of_n_win_rate_is_concave_in_the_density():
    f, g = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    f, g = f / f.mean(), (g / g.mean()).sort().values
    for n in (2, 16):
        middle = theory.win_rate((f + g) / 2, "bon", n)
        assert middle > (theory.win_rate(f, "bon", n) + theory.win_rate(g, "bon", n)) / 2 + 1e-3


def second_best(mass, u, n):
    """A procedure of one's own: the second best of N draws is kept."""
    F = cells.cdf(mass)
    return (F**n + n * F ** (n - 1) * (1 - F)).diff()


@dataclass
class Called:
    """A function with a state, which a dataclass gives no hash."""

    what: object

    def __call__(self, *args):
        return self.what(*args)


def test_a_transform_or_procedure_needs_no_hash():
    exp10, won = Called(get_transform("exp10")), Called(get_procedure("won").mass_after)
    assert theory.at_kl(exp10, 1.0, "bon", 4) == theory.at_kl("exp10", 1.0, "bon", 4)
    assert theory.beta_for_kl(exp10, 1.0) == theory.beta_for_kl("exp10", 1.0)
    expected = theory.optimal_win_rate(0.5, "won", 2)
    assert theory.optimal_win_rate(0.5, won, 2) == pytest.approx(expected, abs=1e-6)


def test_a_procedure_whose_state_has_changed_is_solved_anew():
    class Power:
        power = 2

        def __call__(self, mass, u, n):
            return (cells.cdf(mass) ** self.power).diff()

    procedure = Power()
    before = theory.optimal_win_rate(1.0, procedure, 1)
    procedure.power = 8
    assert before == pytest.approx(theory.optimal_win_rate(1.0, "bon", 2), abs=1e-6)
    after = theory.optimal_win_rate(1.0, procedure, 1)
    assert after == pytest.approx(theory.optimal_win_rate(1.0, "bon", 8), abs=1e-6)


def test_a_procedure_may_write_into_what_it_is_given():
    def tail(mass, u, n):
        mass[..., u[1:] <= 0.5] *= 0.1
        u *= 0
        return mass / mass.sum(-1, keepdim=True)

    def same(mass, u, n):
        mass = torch.where(u[1:] <= 0.5, 0.1 * mass, mass)
        return mass / mass.sum(-1, keepdim=True)

    expected = theory.at_kl("exp10", 1.0, "bon", 4), theory.beta_for_kl("exp10", 1.0)
    for kl in (0.0, 1.0):
        assert theory.at_kl("exp10", kl, tail, 1) == theory.at_kl("exp10", kl, same, 1)
    best = [theory.optimal_win_rate(1.0, procedure, 1) for procedure in (tail, same)]
    assert best[0] == best[1]
    assert (theory.at_kl("exp10", 1.0, "bon", 4), theory.beta_for_kl("exp10", 1.0)) == expected


@pytest.mark.parametrize("procedure, n", [("bon", 3), ("won", 3), ("rewind", 5), (second_best, 3)])
def test_win_rate_agrees_with_simulation(procedure, n):
    """4 standard errors: a false failure has a chance of 3e-4 over the four."""
    draws = 200_000
    generator = torch.Generator().manual_seed(1)
    y, z = torch.rand(2, draws, n, generator=generator, dtype=torch.float64)
    y = y ** (1 / 3)  # cdf u^3: the log transform at beta 1/2

    def keep(x):
        if procedure == "rewind":
            passed = x >= 0.85
            first = torch.where(passed.any(1), passed.double().argmax(1), n - 1)
            return x.gather(1, first[:, None])[:, 0]
        return x.sort(1).values[:, {"bon": n - 1, "won": 0, second_best: n - 2}[procedure]]

    wins = (keep(y) > keep(z)).double()
    ours = theory.tradeoff("log", procedure, n, [0.5])[1][0]
    assert ours == pytest.approx(wins.mean().item(), abs=4 * wins.std().item() / draws**0.5)


def test_a_new_procedure_gets_its_optimum_from_one_function():
    beta = 0.1
    u, Phi = theory.optimal_transform(second_best, 4, beta)
    f = torch.softmax(Phi / beta, 0) * len(u)
    kl, win = theory.kl(f), theory.win_rate(f, second_best, 4)
    assert win == pytest.approx(theory.optimal_win_rate(kl, second_best, 4), abs=2e-6)
    for name in TRANSFORMS:
        assert theory.at_kl(name, kl, second_best, 4) < win
    assert Phi[-1].abs() < 1e-4
    assert theory.beta_for_kl("optimal", kl, procedure=second_best, n=4) == pytest.approx(
        beta, rel=1e-3
    )


def test_win_rate_of_a_density_holds_on_coarse_grids_sharp_densities_and_large_n():
    u = cells.midpoints(2000)
    f = 64 * u**63
    assert theory.kl(f) == pytest.approx(math.log(64) - 63 / 64, abs=1e-4)
    for n in (1, 4, 256):
        assert theory.win_rate(f, "bon", n) == pytest.approx(64 / 65, abs=2e-5)
    assert theory.win_rate(torch.ones(10), "won", 7) == pytest.approx(0.5, abs=1e-9)


def test_finite_k_tends_to_the_continuous_theory_and_costs_win_rate():
    exact = theory.at_kl("exp10", 1.0, "bon", 4)
    cost = [exact - theory.at_kl("exp10", 1.0, "bon", 4, K=K) for K in (10, 100, 1000)]
    assert cost[0] > 0.01 > cost[1] > cost[2] and abs(cost[2]) < 1e-3


def test_mean_partition_function_of_finite_k_is_uniform_over_its_values():
    """E over prompts of Z = sum_k gap_k e^{Phi(k/K)} is the mean of e^{Phi(k/K)}: C_hat is uniform
    on them; 4 s.e.
    """
    K = 20
    weight = (2 * torch.arange(K + 1, dtype=torch.float64) / K).exp()
    Z = (cells.spacings(K) * weight).sum(1)
    assert Z.mean().item() == pytest.approx(
        weight.mean().item(), abs=4 * Z.std().item() / len(Z) ** 0.5
    )


def test_a_transform_with_a_plateau_names_its_largest_kl():
    half = lambda u: (u > 0.5).double()  # noqa: E731
    assert theory.at_kl(half, 0.69, "standard", 1) == pytest.approx(0.75, abs=0.02)
    with pytest.raises(ValueError, match="largest of this transform is 0.6931 nats"):
        theory.beta_for_kl(half, 0.7)


def test_a_measured_kl_of_zero_or_less_is_the_reference():
    wins = [
        theory.at_kl(name, kl, "bon", 4) for name in ("exp10", "optimal") for kl in (0.0, -1e-3)
    ]
    assert wins == pytest.approx([0.5] * 4, abs=1e-9)
    assert theory.optimal_win_rate(40.0, "bon", 32) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["exp50", "exp-50", "identity", "log"])
def test_extreme_transforms_and_betas_neither_overflow_nor_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl, win = theory.tradeoff(name, "won", 4, [1e-9, 1.0, 1e9, 1e300])
    assert np.isfinite(kl).all() and kl.min() >= -1e-12
    assert np.isfinite(win).all() and 0.4999 < win.min() and win.max() <= 1


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda: theory.tradeoff("exp10", "bon", 0, [1.0]), "n 0.*from 1 to"),
        (lambda: theory.tradeoff("exp10", "bon", 2.5, [1.0]), "n 2.5"),
        (lambda: theory.tradeoff("exp10", "beam", 4, [1.0]), "'beam'.*standard, bon, won, rewind"),
        (lambda: theory.tradeoff("exp", "bon", 4, [1.0]), "'exp'.*identity, log"),
        (lambda: theory.tradeoff("none", "bon", 4, [1.0]), "'none' has no theory"),
        (lambda: theory.tradeoff("exp10", "bon", 4, [1.0, 0.0]), "beta 0.*positive"),
        (lambda: theory.optimal_transform("bon", 4, -1.0), "beta -1.*positive"),
        (lambda: theory.optimal_transform("bon", 4, 1e-12), "beta 1e-12.*larger beta"),
        (lambda: theory.beta_for_kl("exp10", 0.0), "kl 0.*positive"),
        (lambda: theory.beta_for_kl("exp10", math.nan), "kl nan"),
        (lambda: theory.beta_for_kl("exp10", 50.0), "kl 50.*16 nats"),
        (lambda: theory.beta_for_kl("won_fp", 8.0, n=32), "kl 8 is out of reach"),
        (lambda: theory.beta_for_kl(lambda u: 0 * u, 1.0), "largest of this transform is 0 nats"),
        (lambda: theory.win_rate(torch.tensor([2.0, -1.0, 2.0]), "bon", 4), "nowhere negative"),
        (lambda: theory.win_rate(torch.full((10,), 1.1), "bon", 4), "integrates to 1.1"),
        (lambda: theory.kl(torch.ones(2, 5)), r"density \(2, 5\)"),
        (lambda: theory.beta_for_kl("exp10", None), "kl None: must be a number"),
        (lambda: theory.at_kl("exp10", "far", "bon", 4), "kl 'far': must be a number"),
        (lambda: theory.at_kl(10, 1.0, "bon", 4), "unknown transform 10"),
        (lambda: theory.at_kl("exp10", 1.0, 3, 4), "unknown procedure 3"),
        (lambda: theory.beta_for_kl("optimal", 1.0, n=1000), "0 nats; ask for less.*smaller n"),
    ],
)
def test_bad_input_names_the_value_the_rule_and_the_fix(call, names):
    with pytest.raises(ValueError, match=names) as error:
        call()
    assert "\n" not in str(error.value)


# --- rewards with ties ---


@pytest.mark.parametrize("transform", ["identity", "exp10", "exp-5"])
def test_a_verifiers_theory_is_that_of_one_number(transform):
    """Two levels, right with probability p and q: KL and win rates in closed form."""
    p, q, n = 0.2, 0.5, 4
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    levels = torch.tensor([[1 - p, p], [1 - p, p]], dtype=torch.float64)
    for procedure, right in (
        ("standard", lambda s: s), ("bon", lambda s: 1 - (1 - s) ** n), ("won", lambda s: s**n)
    ):  # fmt: skip
        win = (1 + right(q) - right(p)) / 2  # a tie is half a win
        assert theory.at_kl(transform, kl, procedure, n, levels=levels) == pytest.approx(win)
    # no policy is further away than one that is always right
    always = (1 + 1 - (1 - (1 - p) ** n)) / 2
    assert theory.at_kl(transform, 9.0, "bon", n, levels=levels) == pytest.approx(always, abs=1e-5)


def test_many_levels_are_the_continuous_theory_and_prompts_share_their_beta():
    uniform = torch.full((1, 4000), 1 / 4000, dtype=torch.float64)
    for procedure, n in (("standard", 1), ("bon", 4), ("won", 4)):
        expected = theory.at_kl("exp10", 1.0, procedure, n)
        found = theory.at_kl("exp10", 1.0, procedure, n, levels=uniform)
        assert found == pytest.approx(expected, abs=1e-4)
    levels = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]], dtype=torch.float64)
    with pytest.raises(ValueError, match="stand in place of K"):
        theory.at_kl("identity", 0.2, "bon", 4, K=10, levels=levels)
    with pytest.raises(ValueError, match="sum to 1 per prompt"):
        theory.at_kl("identity", 0.2, "bon", 4, levels=levels / 2)
    with pytest.raises(ValueError, match="none below 0"):
        theory.at_kl("identity", 0.2, "bon", 4, levels=[[1.5, -0.5]])
    mass, _ = theory.policy_at_kl("identity", 0.2, "bon", 4, levels=levels)
    u = torch.tensor([[0.25, 0.5, 0.75], [0.1, 0.35, 0.75]], dtype=torch.float64)
    R = (mass[:, [0, 2]] / levels[:, [0, 2]]).log().diff() / u[:, [0, 2]].diff()
    torch.testing.assert_close(R[0], R[1])  # 1 / beta


def test_levels_serve_every_transform_and_prompts_that_have_one():
    r_ref = torch.tensor([[0.0] * 6 + [1.0] * 2, [1.0] * 8])
    for transform in TRANSFORMS:
        win = theory.at_kl(transform, 0.3, "bon", 4, levels=theory.levels_of(r_ref))
        assert 0.5 < win < 1
    # nothing is ever solved: no policy differs from pi_ref
    alike = theory.levels_of(torch.zeros(5, 8))
    assert theory.at_kl("identity", 1.0, "bon", 4, levels=alike) == pytest.approx(0.5)


def test_an_empty_top_level_changes_nothing():
    for kl in (0.3, 2.0):
        some = [theory.at_kl("exp10", kl, "bon", 4, levels=x) for x in ([[0.5, 0.5]], [[1.0]])]
        more = [[[0.5, 0.5, 0.0]], [[1.0, 0.0]]]
        assert [theory.at_kl("exp10", kl, "bon", 4, levels=x) for x in more] == pytest.approx(some)


def test_levels_are_those_of_an_array_and_refuse_rewards_that_are_not_finite():
    r_ref = torch.tensor([[0.0, 1, 1, 2], [2, 2, 2, 2]])
    assert torch.equal(theory.levels_of(r_ref.numpy()), theory.levels_of(r_ref))
    assert theory.tied(r_ref.tolist(), "bon", 2) == theory.tied(r_ref, "bon", 2)
    for wrong in (torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf)):
        with pytest.raises(ValueError, match="not finite"):
            theory.tied(wrong, "bon", 4)
    with pytest.raises(ValueError, match=r"must be \(prompts, samples\)"):
        theory.levels_of([0.0, 1.0])


def test_levels_are_the_shares_of_equal_rewards():
    r = torch.tensor([[3.0, 1, 3, 2], [5, 5, 5, 5], [1.0, 1, 2, 2]])
    assert theory.levels_of(r)[:2].tolist() == [[0.25, 0.25, 0, 0.5], [0, 0, 0, 1]]
    assert theory.tied(r, "standard", 1)
    assert not theory.tied(torch.tensor([[1.0, 2.0]]), "standard", 1)


def test_what_ties_depends_on_the_procedure():
    """100 samples of which 10 share a value: so many draws of one tie, 1 % after one draw."""
    r = torch.rand(50, 100, generator=torch.Generator().manual_seed(0))
    cases = [("standard", 1), ("bon", 4), ("bon", 32), ("won", 4), ("won", 32)]
    assert not any(theory.tied(r, *case) for case in cases)
    for at, ends in ((r.topk(10).indices, "bon"), ((-r).topk(10).indices, "won")):
        capped = r.scatter(1, at, 2.0 if ends == "bon" else -1.0)
        for procedure, n in cases:
            assert theory.tied(capped, procedure, n) == (n == 1 or procedure == ends)
    assert not any(theory.tied((300 * r[:, :20]).round(), *case) for case in cases)
    assert all(theory.tied((4 * r).round(), *case) for case in cases)


@pytest.mark.parametrize("low, high", [(0.0, 0.8), (0.25, 1.0)])
def test_where_a_reward_does_not_tie_its_levels_are_narrow(low, high):
    """A capped reward, and one with refusals, against their exact law: narrow levels and a whole
    one."""
    r = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)).clamp(low, high)
    narrow = torch.full((1, 4000), (high - low) / 4000, dtype=torch.float64)
    ends = [torch.full((1, 1), x, dtype=torch.float64) for x in (low, 1 - high)]
    exact = torch.cat([ends[0], narrow, ends[1]], 1)
    for procedure, n in (("standard", 1), ("bon", 4), ("won", 4)):
        expected = theory.at_kl("exp10", 1.0, procedure, n, levels=exact)
        found = theory.at_kl("exp10", 1.0, procedure, n, levels=theory.levels_of(r))
        assert found == pytest.approx(expected, abs=0.005)  # of 200 samples


@pytest.mark.parametrize("n", [4, 32])
def test_the_law_of_K_samples_is_that_of_its_spacings_for_any_N(n):
    """The best of n from the distribution functions themselves, which have no cells to tie in."""
    K, kl = 30, 1.5
    ref = cells.spacings(K)  # (prompts, K + 1)
    Phi = get_transform("exp10")(torch.arange(K + 1).double() / K)
    mass = ref * cells.tilt_to_kl(Phi, kl, ref)[0].exp()
    t = (torch.arange(200).double() + 0.5) / 200  # in a spacing
    u = ref.cumsum(-1)[..., None] - ref[..., None] * (1 - t)
    F = mass.cumsum(-1)[..., None] - mass[..., None] * (1 - t)
    density = n * F ** (n - 1) * mass[..., None] / len(t)
    expected = (density * u**n).sum((1, 2)).mean().item()
    assert theory.at_kl("exp10", kl, "bon", n, K=K) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_levels_have_a_win_rate_after_every_procedure(procedure):
    """pi_ref itself wins one half; rewind's threshold may be the edge of an empty level."""
    r_ref = torch.tensor([[0.0] * 17 + [1.0] * 3, list(range(20))])
    levels = theory.levels_of(r_ref)
    assert mass_win_rate(levels, levels, procedure, 4).item() == pytest.approx(0.5)
    assert 0.5 < theory.at_kl("identity", 0.2, procedure, 4, levels=levels) < 1


# --- cells ---


def test_a_slope_is_the_flatter_of_both_sides_and_0_at_a_peak():
    values, at = torch.tensor([0.0, 1, 3, 3, 2, -1]), torch.arange(6.0)
    assert cells.slopes(values, at).tolist() == [1, 1, 0, 0, -1, -3]
    assert torch.equal(cells.slopes(values, 2 * at), cells.slopes(values, at) / 2)


def test_the_largest_kl_is_the_mean_of_the_prompts():
    ref = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    expected = -(math.log(0.5) + math.log(0.1)) / 2
    assert cells.largest_kl(torch.tensor([0.0, 1.0]), ref) == pytest.approx(expected)


def test_a_tradeoff_of_K_samples_is_at_its_own_kl():
    beta = theory.beta_for_kl("exp10", 1.0)
    (kl,), (win,) = theory.tradeoff("exp10", "bon", 4, [beta], K=30)
    assert 0.8 < kl < 1.2 and win == pytest.approx(theory.at_kl("exp10", kl, "bon", 4, K=30))


def test_the_optimum_of_the_standard_win_rate_is_the_identity():
    """Between the solver's cells too."""
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    Phi = get_transform("optimal", procedure="standard", beta=0.2)(u)
    assert (Phi - (u - 1)).abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [0.5, 0.85])
def test_rewind_keeps_a_level_that_its_threshold_lies_in_and_none_that_ends_there(wrong):
    """A draw is right with probability 0.6: three tries. wrong: pi_ref's mass below."""
    mass, ref = torch.tensor([[0.4, 0.6], [wrong, 1 - wrong]], dtype=torch.float64)
    after = get_procedure("rewind").mass_after(mass, cells.cdf(ref), 3)
    assert after.tolist() == pytest.approx([0.4**3, 1 - 0.4**3])
