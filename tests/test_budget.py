import pytest
import torch

from minictrl import theory
from minictrl.budget import Budget, beta_for, empirical_beta


def test_raw_rewards_get_the_beta_of_their_own_tilt():
    """Normal rewards: KL = s^2 / (2 beta^2); 4,000 samples know the KL of 0.5 nats to a few per
    cent.
    """
    r_ref = 3 * torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    assert empirical_beta(r_ref, 0.5) == pytest.approx(3.0, rel=0.03)
    with pytest.raises(ValueError, match="use a smaller KL"):
        empirical_beta(r_ref[:, :5], 4.0)


@pytest.mark.parametrize("transform, share", [("identity", 0.8), ("exp10", 0.5), ("exp-10", 2.0)])
def test_a_policy_that_falls_short_of_the_theorys_kl_or_beyond_and_lags_behind_is_brought_to_its_budget(
    transform, share
):
    settings = dict(procedure="bon", n=4, K=100)
    budget = Budget(1.0, lambda kl: beta_for(transform, kl, **settings))
    kl = 0.0
    for _ in range(100):
        beta = budget.follow(kl)
        kl += 0.3 * (share * theory.tradeoff(transform, "bon", 4, [beta])[0].item() - kl)
    assert kl == pytest.approx(1.0, rel=0.01)
    assert budget.target == pytest.approx(1 / share, rel=0.01)


def test_what_is_out_of_reach_of_the_samples_is_not_asked_for():
    r_ref = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    budget = Budget(2.5, lambda kl: empirical_beta(r_ref, kl))
    start = budget.beta
    assert budget.follow(0.0) == start and budget.target == 2.5  # 4.3 is more than log 20


def test_a_fixed_beta_stays():
    budget = Budget(None, None, beta=0.3)
    assert budget.follow(5.0) == 0.3
