"""The baselines by hand, by brute force over subsets, and on one prompt where the optimum is
known.
"""

import itertools
import math

import pytest
import torch
from scipy.special import exp1, expi

from minictrl import theory
from minictrl.budget import empirical_beta
from minictrl.calibration import leave_one_out_calibration
from minictrl.methods.base import best_and_worst
from minictrl.methods.bonbon import bonbon_beta, bonbon_loss
from minictrl.methods.bond import jeffreys_loss
from minictrl.methods.grpo import grpo_advantages
from minictrl.methods.ipo import ipo_loss
from minictrl.methods.pkpo import beats_best_of, max_at_n_advantages
from minictrl.methods.qrpo import qrpo_loss
from minictrl.methods.tea import tail_extrapolated_advantages
from minictrl.methods.tpo import tpo_loss
from minictrl.ppo import gae, loo_advantages, policy_loss
from minictrl.transforms import get_transform, log_partition, standardised

BETAS = {
    "identity": 0.136064,
    "log": 0.188487,
    "exp10": 5315.25,
    "exp-10": 0.000958474,
}  # KL = 1 nat


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def min_at_n_advantages(g, n, baseline=True):
    return -max_at_n_advantages(-g, n, baseline)


def total_variation(p, q):
    return (p - q).abs().sum() / 2


def minimise(loss, logits, steps=100):
    """L-BFGS on an exact loss of the logits of one prompt's policy; the policy's probabilities."""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


def ascend(advantages_of, arms, samples, steps, lr=0.1):
    """Policy gradient by policy_loss from a uniform pi_ref: advantages_of(arms drawn (P, G), k1 (P,
    G)) -> (P, G).
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(arms, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        y = torch.multinomial(
            logits.detach().softmax(0), math.prod(samples), True, generator=generator
        )
        logprobs = logits.log_softmax(0)[y, None]
        k1 = (logprobs.detach() + math.log(arms)).view(samples)
        advantages = advantages_of(y.view(samples), k1).view(-1, 1)
        optimizer.zero_grad()
        policy_loss(logprobs, logprobs.detach(), advantages, torch.ones_like(logprobs))[
            0
        ].backward()
        optimizer.step()
    return logits.detach().softmax(0)


# --- preference pairs, IPO, BoNBoN ---


def test_best_and_worst_of_each_group_by_hand():
    # K = 7: two groups of 3, one sample left
    r_ref = torch.tensor([[3.0, 1, 2, 5, 9, 4, 7], [1.0, 1, 1, 2, 0, 0, 8]])
    best, worst = best_and_worst(r_ref, 3)
    assert best.tolist() == [[0, 4], [0, 3]] and worst.tolist() == [[1, 5], [2, 5]]
    best, worst = best_and_worst(r_ref, 2)  # a tie is a pair of two different samples
    assert (best != worst).all() and best[1, 0] == 0 and worst[1, 0] == 1


def test_shuffled_groups_are_a_partition_and_differ():
    r_ref = randn(5, 12)
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.cat(best_and_worst(r_ref, 2, generator), 1) for _ in range(2)]
    assert all(torch.equal(p.sort(1).values, torch.arange(12).expand(5, 12)) for p in pairs)
    assert not torch.equal(*pairs)
    best, worst = best_and_worst(r_ref, 12, generator)
    assert torch.equal(best[:, 0], r_ref.argmax(1)) and torch.equal(worst[:, 0], r_ref.argmin(1))


def test_ipo_and_bonbon_losses_by_hand():
    chosen, rejected = torch.tensor([-1.0, -2]), torch.tensor([-3.0, -1])
    ref_chosen, ref_rejected = torch.tensor([-2.0, -2]), torch.tensor([-2.0, -3])
    h = [(-1 + 2) - (-3 + 2), (-2 + 2) - (-1 + 3)]  # 2, -2
    loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau=0.5)
    assert math.isclose(loss, ((h[0] - 1) ** 2 + (h[1] - 1) ** 2) / 2)
    target = 3 * (1 + 1 / 2 + 1 / 3)  # n = 4: (n - 1) sum of 1 / k
    loss = bonbon_loss(chosen, rejected, ref_chosen, ref_rejected, n=4, alpha=0.1)
    expected = 0.1 * 1.5 + 0.9 * ((h[0] - target) ** 2 + (h[1] - target) ** 2) / 2
    assert math.isclose(loss, expected, rel_tol=1e-6)
    loss = bonbon_loss(chosen, rejected, ref_chosen, ref_rejected, n=4)  # BoNBoN's own alpha
    expected = 0.005 * 1.5 + 0.995 * ((h[0] - target) ** 2 + (h[1] - target) ** 2) / 2
    assert math.isclose(loss, expected, rel_tol=1e-6)


def test_ipo_brings_the_log_ratio_of_one_pair_to_1_over_2_tau():
    ref = randn(2).log_softmax(0)
    pi = minimise(lambda logp: ipo_loss(logp[:1], logp[1:], ref[:1], ref[1:], tau=0.2), ref)
    h = (pi.log() - ref)[0] - (pi.log() - ref)[1]
    assert math.isclose(h, 1 / 0.4, rel_tol=1e-5)


def test_ipo_on_random_reference_pairs_is_the_identity_transform():
    """All pairs of 20 equally likely arms, ties included: the optimum is pi_ref e^{C / tau},
    exactly.
    """
    arms, tau = 20, 0.2
    r = torch.arange(arms).double() // 2  # each reward twice
    pairs = torch.cartesian_prod(torch.arange(arms), torch.arange(arms))
    best, worst = best_and_worst(r[pairs], n=2)
    chosen, rejected = pairs.gather(1, best)[:, 0], pairs.gather(1, worst)[:, 0]
    ref = torch.zeros(arms, dtype=torch.float64).log_softmax(0)
    pi = minimise(
        lambda logp: ipo_loss(logp[chosen], logp[rejected], ref[chosen], ref[rejected], tau), ref
    )
    C = ((r[:, None] > r).double() + (r[:, None] == r).double() / 2).mean(1)
    assert total_variation(pi, (C / tau).softmax(0)) < 1e-4


def test_bonbon_beta_is_the_published_value_and_the_mean_of_h_under_best_of_n():
    assert math.isclose(bonbon_beta(8), 0.0275482, rel_tol=1e-5)
    n, u = 4, torch.rand(20_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best, worst = best_and_worst(u, n)
    log_ratio = math.log(n) + (n - 1) * u.log()
    h = (log_ratio.gather(1, best) - log_ratio.gather(1, worst))[:, 0]
    assert abs(h.mean() - 1 / (2 * bonbon_beta(n))) < 4 * h.std() / math.sqrt(len(h))


# --- BoND ---


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_bond_reaches_best_of_n(weight):
    """200 arms under a given pi_ref: within TV .002, what the half of a tie costs the log of an
    arm's own mass.
    """
    n, ref = 4, (randn(200) / 2).log_softmax(0)
    cdf = ref.exp().cumsum(0)
    best_of_n = cdf**n - (cdf - ref.exp()) ** n
    R = (n - 1) * (cdf - ref.exp() / 2).log()

    # both terms in expectation; the backward one as the exact KL that the policy gradient follows
    def loss(logp):
        backward = -(logp.exp() * (R - logp + ref)).sum()
        return jeffreys_loss(backward, 200 * best_of_n * logp, weight)

    assert total_variation(minimise(loss, ref), best_of_n) < 0.002
    assert total_variation(ref.exp(), best_of_n) > 0.4


def test_jeffreys_loss_by_hand():
    assert math.isclose(
        jeffreys_loss(torch.tensor(3.0), torch.tensor([-1.0, -2]), weight=0.25),
        0.25 * 3 + 0.75 * 1.5,
    )
    assert jeffreys_loss(torch.tensor(3.0), torch.tensor([-1.0, -2])) == (3 + 1.5) / 2


# --- GRPO ---


def test_grpo_advantages_by_hand_and_their_blindness_to_scale():
    returns = torch.tensor([[1.0, 2, 3], [5, 5, 5]])
    assert torch.allclose(
        grpo_advantages(returns), torch.tensor([[-1.0, 0, 1], [0, 0, 0]]), atol=1e-5
    )
    assert torch.allclose(grpo_advantages(100 * returns), grpo_advantages(returns), atol=1e-5)


# --- QRPO ---


def log_Z_of(name, K):
    """log Z of a transform on C_hat = 0, 1/K, ..., 1."""
    u = torch.arange(K + 1, dtype=torch.float64)[None] / K
    return log_partition(get_transform(name, K=K)(u) / BETAS[name]).item()


@pytest.mark.parametrize("name", BETAS)
def test_log_partition_reaches_the_closed_form_as_K_grows(name):
    closed = {
        "identity": lambda b: b * math.expm1(1 / b),
        "log": lambda b: b / (1 + b),
        "exp10": lambda b: (expi(math.exp(10) / b) - expi(1 / b)) / 10,
        "exp-10": lambda b: (exp1(math.exp(-10) / b) - exp1(1 / b)) / 10,
    }[name]
    assert abs(log_Z_of(name, K=10**6) - math.log(closed(BETAS[name]))) < 1e-4


@pytest.mark.parametrize(
    "name, at_100, at_10", [("identity", 0.03, 0.25), ("log", 0.02, 0.20), ("exp10", 0.10, 0.87)]
)
def test_the_continuous_partition_is_off_at_finite_K(name, at_100, at_10):
    """By the published figures at KL = 1, to their two digits: why K is an argument."""
    values = {K: log_Z_of(name, K) for K in (10, 100, 10**6)}
    assert (
        abs(values[100] - values[10**6] - at_100) < 0.006
        and abs(values[10] - values[10**6] - at_10) < 0.006
    )


def test_leave_one_out_calibration_equals_the_double_loop_with_ties():
    r_ref = (2 * randn(4, 9)).round()  # many ties
    C_hat = leave_one_out_calibration(r_ref)
    for p, k in itertools.product(range(4), range(9)):
        wins = [
            float(r_ref[p, k] > r_ref[p, j]) + 0.5 * float(r_ref[p, k] == r_ref[p, j])
            for j in range(9)
            if j != k
        ]
        assert math.isclose(C_hat[p, k], sum(wins) / 8)


@pytest.mark.parametrize("name", BETAS)
def test_leave_one_out_draws_have_the_partition_function_of_K_minus_1_exactly(name):
    Phi, C_hat = get_transform(name, K=49), leave_one_out_calibration(randn(3, 50))
    log_Z = log_partition(Phi(C_hat) / BETAS[name])
    assert torch.allclose(log_Z, torch.full_like(log_Z, log_Z_of(name, K=49)))


def test_qrpo_loss_by_hand():
    loss = qrpo_loss(
        torch.tensor([-1.0, -2]), torch.tensor([-2.0, -2]), R=torch.tensor([3.0, 1]), log_Z=0.5
    )
    assert math.isclose(loss, ((3 - 0.5 - 1) ** 2 + (1 - 0.5 - 0) ** 2) / 2)


@pytest.mark.parametrize("name", BETAS)
def test_qrpo_on_the_calibration_draws_reaches_the_tilt_with_loss_0(name):
    """pi_ref uniform on its 30 draws: the regression's target is a normalised policy, so log
    Z_{K-1} is exact.
    """
    K = 30
    Phi = get_transform(name, K=K - 1)
    R = Phi(leave_one_out_calibration(randn(1, K))[0]) / BETAS[name]
    log_Z, ref = log_partition(R[None]), torch.full((K,), -math.log(K)).double()
    pi = minimise(lambda logp: qrpo_loss(logp, ref, R, log_Z[0]), ref, steps=500)
    assert total_variation(pi, (ref + R).softmax(0)) < 1e-3
    assert qrpo_loss((ref + R).log_softmax(0), ref, R, log_Z[0]) < 1e-12


# --- PKPO ---


@pytest.mark.parametrize("g", [[3.0, 1, 4, 1, 5, 9], [2.0, 7, 7, 0, 7, 2]])
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_max_and_min_at_n_equal_brute_force_over_subsets(g, baseline, n):
    G, subsets = len(g), list(itertools.combinations(range(len(g)), n))
    for best, advantages in ((max, max_at_n_advantages), (min, min_at_n_advantages)):
        expected = [
            G
            / len(subsets)
            * sum(
                best(g[j] for j in S) - baseline * best(g[j] for j in S if j != i)
                for S in subsets
                if i in S
            )
            for i in range(G)
        ]
        assert torch.allclose(
            advantages(torch.tensor([g]), n, baseline), torch.tensor([expected]), atol=1e-5
        )


def test_max_at_1_without_baseline_is_the_plain_reward():
    g = randn(3, 5)
    assert torch.allclose(max_at_n_advantages(g, 1, baseline=False), g)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("procedure", ["bon", "won"])
def test_expected_advantage_is_phi_of_corollary_2_up_to_a_constant(procedure, baseline):
    """E[A | C = u] against -N^2 int_u^1 cdf^(N-1) v^(N-1) dv (Worst-of-N: mirrored), for pi with
    cdf(u) = u^2.
    """
    N, u = 3, torch.tensor([0.2, 0.9], dtype=torch.float64)
    others = torch.rand(
        40_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).sqrt()
    advantages, g = {
        "bon": (max_at_n_advantages, lambda c: c**N),
        "won": (min_at_n_advantages, lambda c: 1 - (1 - c) ** N),
    }[procedure]
    mine = torch.stack(
        [
            advantages(g(torch.cat([c.expand(len(others), 1), others], 1)), N, baseline)[:, 0]
            for c in u
        ]
    )
    v = 0.2 + 0.7 * (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    integrand = (v**2 * v) ** (N - 1) if procedure == "bon" else ((1 - v**2) * (1 - v)) ** (N - 1)
    difference = mine[1] - mine[0]
    stderr = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean() - N**2 * 0.7 * integrand.mean()) < 4 * stderr and stderr < 0.02


@pytest.mark.parametrize("procedure", ["bon", "won"])
def test_pkpo_reaches_the_optimum_of_infalign(procedure):
    """25 arms, uniform pi_ref, N = 2, beta = .1: TV to the theory's density < .03 (that of pi_ref
    is > .5).
    """
    arms, N, beta = 25, 2, 0.1
    C = (torch.arange(arms).double() + 0.5) / arms
    advantages, g = {
        "bon": (max_at_n_advantages, C**N),
        "won": (min_at_n_advantages, 1 - (1 - C) ** N),
    }[procedure]
    pi = ascend(
        lambda y, k1: advantages(g[y], N) / beta + loo_advantages(-k1),
        arms,
        samples=(128, 16),
        steps=200,
    )
    u, Phi = (torch.as_tensor(x) for x in theory.optimal_transform(procedure, N, beta))
    density = (Phi / beta).softmax(0)
    optimum = torch.zeros(arms, dtype=torch.float64).index_add_(
        0, (u * arms).long().clamp_max(arms - 1), density
    )
    assert (
        total_variation(pi, optimum) < 0.03
        and total_variation(pi, torch.full_like(pi, 1 / arms)) > 0.5
    )


# --- bad input ---


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_and_worst(torch.zeros(2, 3), 4),
        lambda: max_at_n_advantages(torch.zeros(2, 3), 1),
        lambda: max_at_n_advantages(torch.zeros(2, 3), 4),
        lambda: max_at_n_advantages(torch.tensor([[math.nan, 2.0, 3.0]]), 2),
        lambda: max_at_n_advantages(torch.zeros(2, 3), 2.0),
        lambda: tail_extrapolated_advantages(torch.tensor([[-0.5, 0.5]]), 4),
        lambda: bonbon_beta(1),
        lambda: bonbon_beta(2.7),
        lambda: tpo_loss(*torch.zeros(3, 0, 2)),
        lambda: grpo_advantages(torch.zeros(3, 1)),
        lambda: leave_one_out_calibration(torch.tensor([[0.0, math.nan]])),
        lambda: leave_one_out_calibration(torch.zeros(3, 1)),
        lambda: qrpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1), 0.0),
        lambda: ipo_loss(*torch.zeros(4, 2), tau=0.0),
    ],
)
def test_bad_input_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("G, value", [(7, 1000.1), (100, 3.3)])
def test_a_group_of_equal_returns_has_no_advantage(G, value):
    assert not grpo_advantages(torch.full((2, G), value)).any()


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float16])
def test_whole_numbers_have_the_advantages_of_the_same_floats(dtype):
    x = torch.tensor([[1, 2, 3]])
    assert torch.allclose(grpo_advantages(x.to(dtype)).float(), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert torch.allclose(loo_advantages(x.to(dtype)), torch.tensor([[-1.5, 0.0, 1.5]]))
    mask = torch.ones(1, 3, dtype=dtype)
    to_go, _ = gae(torch.tensor([[0.1, 0.2, 0.7]]), torch.zeros_like(mask), mask, lam=1.0)
    assert torch.allclose(to_go, torch.tensor([[1.0, 0.9, 0.7]]))
    Phi = get_transform("bon_fp", beta=0.1)
    assert torch.allclose(
        Phi(torch.tensor([0, 1]).to(dtype)).float(), Phi(torch.tensor([0.0, 1.0]))
    )


def test_odd_rewards_are_refused_in_a_line():
    with pytest.raises(ValueError, match="n is 5: must be"):
        beats_best_of(torch.zeros(1, 2), torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="r_ref has . rewards that are not finite"):
        empirical_beta(torch.tensor([[0.0, float("inf")]]), 0.1)
    with pytest.raises(ValueError, match="there must be a response and a token"):
        gae(*torch.zeros(3, 1, 0))


def test_a_log_Z_of_another_shape_is_refused():
    R = torch.arange(6.0).view(2, 3)
    with pytest.raises(ValueError, match="must have one shape"):
        qrpo_loss(torch.zeros(6), torch.zeros(6), R.flatten(), log_partition(R))


def test_log_probabilities_of_tokens_are_refused_where_sums_are_asked_for():
    x = randn(3, 3)
    for call in (
        lambda: ipo_loss(x, x, x, x, tau=1.0),
        lambda: qrpo_loss(x, x, x, 0.0),
        lambda: tpo_loss(x[0], x[0], x[0]),
    ):
        with pytest.raises(ValueError, match="summed over its tokens"):
            call()


def test_regressions_of_half_precision_do_not_overflow():
    x = torch.zeros(4, dtype=torch.float16)
    assert ipo_loss(x, x, x, x, tau=1e-3) == pytest.approx(250_000)
    assert qrpo_loss(x, x, x + 300, 0.0) == 90_000


def test_a_reward_that_is_not_finite_beats_nothing():
    r = torch.zeros(2, 3)
    for bad, ref in ((r * math.nan, r), (r, r * math.nan), (r[:1], r)):
        with pytest.raises(ValueError, match="are not finite|rewards of the same prompts"):
            beats_best_of(bad, ref, 2)


def test_one_prompts_outlier_leaves_the_others_advantages():
    alone = grpo_advantages(torch.tensor([[0.0, 1, 0, 1]]))
    both = grpo_advantages(torch.tensor([[0.0, 1, 0, 1], [-1e9, 0, 1, 0]]))
    torch.testing.assert_close(both[:1], alone)
    assert grpo_advantages(torch.zeros(0, 4)).shape == (0, 4)


def test_rounding_is_no_scale_of_a_standardised_reward():
    r_ref = torch.tensor([[1, 1.0000001, 1, 1]])
    assert standardised(torch.tensor([[2.0]]), r_ref).item() == pytest.approx(1)
    assert standardised(torch.tensor([[2.0]]), torch.tensor([[1.0]])).item() == 1  # K = 1


@pytest.mark.parametrize("scale", [1e-200, 1e-44, 1e30, 1e200])
def test_beta_has_the_scale_of_the_rewards(scale):
    r_ref = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).double()
    assert empirical_beta(r_ref * scale, 1.0) / scale == pytest.approx(empirical_beta(r_ref, 1.0))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e4, 1e30])
def test_a_standardised_reward_has_no_scale(scale):
    r = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()
    r[2] = 0.3  # whose mean is not 0.3
    torch.testing.assert_close(grpo_advantages(r * scale), grpo_advantages(r))
    torch.testing.assert_close(standardised(r * scale, r * scale), standardised(r, r))
    assert not grpo_advantages(r)[2].any() and not standardised(r, r)[2].any()
