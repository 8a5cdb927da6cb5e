import math
from functools import partial

import pytest
import torch

from minictrl import theory
from minictrl.budget import Budget, empirical_beta
from minictrl.checks import OutOfReach
from minictrl.config import Config
from minictrl.evaluation import Phi_of
from minictrl.methods import get_method


def test_raw_rewards_get_the_beta_of_their_own_tilt():
    """Normal rewards: KL = s^2 / (2 beta^2); 4,000 samples know the KL of 0.5 nats to a few per
    cent.
    """
    r_ref = 3 * torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    assert empirical_beta(r_ref, 0.5) == pytest.approx(3.0, rel=0.03)
    with pytest.raises(ValueError, match="use a smaller KL"):
        empirical_beta(r_ref[:, :5], 4.0)
    with pytest.raises(ValueError, match="kl -1: must be positive"):
        empirical_beta(r_ref, -1.0)


def test_a_beta_far_from_the_rewards_scale_is_found():
    """One sample far below the others, and a reward of ten values whose Phi spans e^40."""
    r_ref = torch.arange(32.0).expand(8, 32).clone()
    beta = empirical_beta(r_ref, 1.0)
    r_ref[:, 0] = -1e9
    assert empirical_beta(r_ref, 1.0) == pytest.approx(beta, rel=0.05)
    Phi = -torch.exp(-40 * torch.arange(10).double() / 10).repeat(4, 10)
    beta = empirical_beta(Phi, 0.5)
    shares = (Phi / beta).softmax(1)
    assert torch.special.xlogy(shares, 100 * shares).sum(1).mean() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="reach 2.30 nats with 100 samples"):
        empirical_beta(Phi, 2.31)
    with pytest.raises(ValueError, match="reach 0.00 nats"):
        empirical_beta(torch.ones(3, 5), 0.1)


@pytest.mark.parametrize("transform, share", [("identity", 0.8), ("exp10", 0.5), ("exp-10", 2.0)])
def test_a_policy_that_lags_behind_and_misses_the_theorys_kl_is_brought_to_its_budget(
    transform, share
):
    budget = Budget(1.0, lambda kl: theory.beta_for_kl(transform, kl))
    kl, kls = 0.0, []
    for _ in range(100):
        beta = budget.follow(kl)
        kl += 0.2 * (share * theory.tradeoff(transform, "bon", 4, [beta])[0].item() - kl)
        kls.append(kl)
    assert kls[29] == pytest.approx(1.0, rel=0.05)  # two thirds of a default run
    assert kl == pytest.approx(1.0, rel=0.01)
    assert budget.target == pytest.approx(1 / share, rel=0.01)


@pytest.mark.parametrize(
    "transform, procedure, n",
    [("bon_fp", "bon", 4), ("won_fp", "won", 4), ("optimal", "rewind", 8)],
)
def test_a_step_of_a_fixed_point_has_the_Phi_of_its_own_beta(transform, procedure, n):
    """So e^{Phi/beta} is at the KL that the step asks for. With ties the Phi stays."""
    config = Config(transform=transform, procedure=procedure, n=n, kl=0.5).resolved()
    method = get_method("ppo")(config)
    r_ref = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    for kl in (0.5, 1.5, 0.2):
        beta = method.beta_at(kl, r_ref)
        found, _ = theory.tradeoff(method.Phi, procedure, n, [beta])
        assert found[0] == pytest.approx(kl, rel=1e-3)
    Phi = method.Phi
    method.beta_at(0.4, r_ref.round())
    assert method.Phi is Phi


@pytest.mark.parametrize("name", ["bond", "bonbon"])
def test_the_n_of_best_of_n_is_that_of_the_samples_where_they_tie(name):
    r_ref = torch.randint(4, (40, 100), generator=torch.Generator().manual_seed(0)).float()
    method = get_method(name)(Config(method=name).resolved())
    ppo = get_method("ppo")(Config(transform="log").resolved())
    assert method.beta_at(1.0, r_ref) == ppo.beta_at(1.0, r_ref) < 0.9 * method.beta


def test_a_step_may_ask_for_more_than_the_samples_reach_so_that_a_policy_that_lags_is_pulled():
    """A budget of 4 nats is in reach of 100 samples (4.62), the 6.6 that a lagging step asks for
    are not: without them bon_fp ends at 1.2 nats.
    """
    method = get_method("ppo")(Config(transform="bon_fp", kl=4.0).resolved())
    budget = Budget(4.0, method.beta_for)
    start = budget.beta
    assert budget.follow(1.0) == pytest.approx(method.beta_for(budget.target * math.exp(0.5)))
    assert budget.target > 4.0 and budget.beta < start / 10
    with pytest.raises(ValueError, match="out of reach of 100 samples"):
        get_method("ppo")(Config(transform="bon_fp", kl=5.0).resolved())


def test_a_step_that_asks_for_a_spike_is_answered_by_less():
    """For N = 32 bon_fp can be solved at 2 nats, but not at 2.7, which a lagging step asks for."""
    method = get_method("ppo")(Config(transform="bon_fp", n=32, kl=2.0).resolved())
    r_ref = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    with pytest.raises(OutOfReach, match="spike"):
        method.beta_at(2.7, r_ref)
    budget = Budget(2.0, lambda kl: method.beta_at(kl, r_ref))
    start = budget.beta
    assert 0 < budget.follow(0.1) < start


def test_what_is_out_of_reach_of_the_samples_is_not_asked_for():
    """4.6 nats would be more than log 20, so it asks for half of that way in logarithms, twice."""
    r_ref = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    budget, asked = Budget(2.5, lambda kl: empirical_beta(r_ref, kl)), 2.5 * math.exp(0.5 * 1.2 / 4)
    assert budget.follow(0.0) == pytest.approx(empirical_beta(r_ref, asked))
    assert budget.target * math.exp(0.5) == pytest.approx(asked)


@pytest.mark.parametrize("kl, lag", [(0.4, 0.6), (0.5, 0.8), (0.4, 0.9)])
def test_a_policy_that_lags_is_brought_to_its_budget_where_rewards_tie(kl, lag):
    """Half of pi_ref's samples are right, so that 0.69 nats are the most."""
    config = Config(kl=kl, K=100, reward="v.py:f").resolved()
    r_ref = torch.arange(100.0).lt(50).float().expand(8, -1)
    method = get_method("ppo")(config)
    budget = Budget(kl, partial(method.beta_for, r_ref=r_ref))

    def reached(beta):
        """The KL of a policy that gets a share of the way: e^{Phi/beta} / Z on two levels."""
        low, high = method.Phi.of_rewards(r_ref[:1, [60, 0]], r_ref[:1])[0].tolist()
        p = 1 / (1 + math.exp(-(high - low) / beta))
        return lag * sum(x * math.log(2 * x) for x in (p, 1 - p) if x > 0)

    at = 0.0
    for _ in range(100):  # it moves a third of the way in a step
        at += (reached(budget.follow(at)) - at) / 3
    assert at == pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize(
    "procedure, share, kl", [("bon", 0.3, 0.3), ("bon", 0.4, 0.2), ("won", 0.5, 0.3)]
)
def test_pkpos_beta_of_a_verifier_is_the_slope_of_its_best_win_rate(procedure, share, kl):
    """dW/dq over dKL/dq, q the share of right responses at this KL."""

    def kept(q):
        return 1 - (1 - q) ** 4 if procedure == "bon" else q**4

    def away(q):
        return q * math.log(q / share) + (1 - q) * math.log((1 - q) / (1 - share))

    low, high = share, 1 - 1e-12
    for _ in range(100):
        q = (low + high) / 2
        low, high = (q, high) if away(q) < kl else (low, q)
    step = 1e-6  # the win rate is (1 + kept(q) - kept(share)) / 2
    slope = (kept(q + step) - kept(q - step)) / 2 / (away(q + step) - away(q - step))
    config = Config(method="pkpo", procedure=procedure, kl=kl, K=100, reward="v.py:f").resolved()
    r_ref = torch.arange(100.0).lt(100 * share).float().expand(8, -1)
    assert get_method("pkpo")(config).beta_for(kl, r_ref) == pytest.approx(slope, rel=0.01)


def test_a_constant_per_prompt_changes_no_beta():
    r_ref = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).double()
    moved = r_ref + 1e9 * torch.arange(8)[:, None]
    assert empirical_beta(moved, 1.0) == pytest.approx(empirical_beta(r_ref, 1.0), rel=1e-4)


def test_a_step_asks_and_the_target_drifts_within_bounds():
    budget = Budget(1.0, lambda kl: kl)  # its beta is the KL that it asks for
    assert budget.follow(1e3) == pytest.approx(math.exp(-1.5 * 1.2))
    for kl_ref, end in ((1e3, 1 / 20), (1e-3, 4)):
        for _ in range(100):
            budget.follow(kl_ref)
        assert budget.target == pytest.approx(end)


def test_where_the_budget_alone_is_in_reach_the_target_is_moved_back_to_it():
    def beta_at(kl):
        if kl != 1:
            raise OutOfReach("far")
        return 0.5

    budget = Budget(1.0, beta_at)
    assert budget.follow(0.1) == 0.5 and budget.target == 1


def test_maxrls_beta_of_a_verifier_is_the_slope_of_its_log_win_rate():
    """d log E[C] / dKL where 0.6 of the responses are right, and 0.3 of pi_ref's: C_hat is 0.35 or
    0.85.
    """
    q, share = 0.6, 0.3
    kl = q * math.log(q / share) + (1 - q) * math.log((1 - q) / (1 - share))
    slope = 0.5 / (0.35 + 0.5 * q) / math.log(q * (1 - share) / share / (1 - q))
    config = Config(method="maxrl", kl=kl, K=100, reward="v.py:f").resolved()
    r_ref = torch.arange(100.0).lt(30).float().expand(8, -1)
    assert get_method("maxrl")(config).beta_for(kl, r_ref) == pytest.approx(slope, rel=1e-4)


def test_a_fixed_beta_stays():
    budget = Budget(None, None, beta=0.3)
    assert budget.follow(5.0) == 0.3


@pytest.mark.parametrize("transform", ["identity", "exp10", "bon_fp"])
def test_a_verifiers_beta_and_floor_are_those_of_its_levels(transform):
    """Right with probability 0.2: C_hat is 0.4 or 0.9, not uniform, and the optimum is so far from
    pi_ref as was asked; a continuous reward's floor would leave no difference between the two."""
    method = get_method("ppo")(Config(transform=transform).resolved())
    r_ref = (torch.arange(100) < 20).float().expand(3, -1)
    beta = method.beta_for(1.5, r_ref)
    R = method.Phi.in_nats(method.Phi.of_rewards(r_ref, r_ref), beta, r_ref).double()
    p = R.softmax(1)
    kl = (p * (p * 100).log()).sum(1)
    torch.testing.assert_close(kl, torch.full((3,), 1.5).double(), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"--kl 2.0: these rewards reach 1.61 nats"):
        method.beta_for(2.0, r_ref)


def test_a_prompts_R_does_not_depend_on_the_others_of_its_batch():
    """One whose samples tie, one whose samples don't."""
    method = get_method("ppo")(Config(transform="exp-10").resolved())
    r_ref = torch.stack([(torch.arange(100) < 20).float(), torch.linspace(0, 1, 100)])
    beta = method.beta_for(1.0)
    both = method.Phi.in_nats(method.Phi.of_rewards(r_ref, r_ref), beta, r_ref)
    for i in range(2):
        own = r_ref[i : i + 1]
        assert torch.equal(
            both[i : i + 1], method.Phi.in_nats(method.Phi.of_rewards(own, own), beta, own)
        )


def test_the_theory_beside_a_run_with_ties_is_of_the_Phi_it_was_trained_with():
    """Three levels: the beta that 0.6 nats come to is far from the one that Phi is solved at."""
    config = Config(transform="optimal", n=32, kl=0.6, K=32).resolved()
    method = get_method("ppo")(config)
    r_ref = torch.randint(3, (20, 32), generator=torch.Generator().manual_seed(0)).float()
    assert method.beta_for(0.6, r_ref) != pytest.approx(method.beta, rel=0.5)
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(Phi_of(config)(u), method.Phi(u))


def test_numbers_that_are_no_budget_are_refused():
    for settings in ((math.nan,), (0.0,), (-1.0,), (None, lambda kl: 1.0, -1.0)):
        with pytest.raises(ValueError, match="must be"):
            Budget(*settings) if len(settings) > 1 else Budget(*settings, lambda kl: 1.0)
    with pytest.raises(ValueError, match="kl_ref nan"):
        Budget(1.0, lambda kl: 1.0).follow(math.nan)
    for r_ref in (torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(ValueError, match="must be .prompts, samples."):
            empirical_beta(r_ref, 0.1)


@pytest.mark.parametrize("transform, beta", [("identity", 1e-30), ("exp80", 1e-5), ("none", 1e-38)])
def test_a_beta_that_nothing_can_follow_is_named(transform, beta):
    method = get_method("ppo")(Config(transform=transform, beta=beta).resolved())
    r_ref = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="--beta .*use a larger --beta"):
        method.check_beta(beta, r_ref)
    method.check_beta(1e30 if transform == "exp80" else 0.1, r_ref)


def test_an_outlier_among_raw_rewards_takes_no_kl_budget_away():
    """R of the outlier is -1e9 nats, which the beta of the budget allows for."""
    method = get_method("ppo")(Config(transform="none", kl=1.0).resolved())
    r_ref = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    r_ref[0, 0] = -1e9
    assert method.beta_for(1.0, r_ref) < 2
    method.check_beta(method.config.beta, r_ref)
