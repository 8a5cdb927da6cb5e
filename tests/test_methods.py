import math
from functools import partial

import pytest
import torch

from minictrl import methods, theory
from minictrl.config import Config
from minictrl.reference import Reference


def rollout(P=6, G=4, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (P * G,), generator=g)
    mask = (torch.arange(T) < lengths[:, None]).float()
    C_hat = torch.rand(P * G, generator=g)
    return {
        "mask": mask,
        "tokens": torch.randint(9, (P * G, T), generator=g),
        "R": 3 * C_hat,
        "r": C_hat.log(),
        "C_hat": C_hat,
        "old_logprobs": -torch.rand(P * G, T, generator=g) * mask,
        "ref_logprobs": -torch.rand(P * G, T, generator=g) * mask,
    }


def reference(P=6, K=20, T=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return Reference(
        torch.randn(P, K, generator=g),
        torch.randint(9, (P, K, T), generator=g).int(),
        -torch.rand(P, K, T, generator=g),
        torch.ones(P, K, T, dtype=torch.bool),
    )


def test_the_baseline_is_the_mean_of_all_other_returns_and_a_prompts_own_for_raw_rewards():
    rows = rollout()
    k1 = rows["old_logprobs"] - rows["ref_logprobs"]
    returns = rows["R"] - k1.sum(1)
    for transform, group in (("exp10", 24), ("none", 4)):
        advantages = methods.ppo_advantages(
            dict(rows), Config(transform=transform, G=4), 1.0, reference()
        )
        for i in range(24):
            others = [j for j in range(24) if j != i and j // group == i // group]
            expected = rows["R"][i] - k1[i].sum() - returns[others].mean()
            assert advantages[i, 0] == pytest.approx(float(expected), abs=1e-5)
            # the last token answers for itself and the reward alone
            last = int(rows["mask"][i].sum()) - 1
            assert advantages[i, last] == pytest.approx(
                float(rows["R"][i] - k1[i, last] - returns[others].mean()), abs=1e-5
            )


def test_a_value_head_turns_it_into_gae_on_rewards_without_their_mean():
    rows = rollout() | {"values": torch.zeros(24, 5)}
    advantages = methods.ppo_advantages(rows, Config(G=4, lam=1.0), 1.0, reference())
    returns = rows["R"] - rows["R"].mean() - (rows["old_logprobs"] - rows["ref_logprobs"]).sum(1)
    assert torch.allclose(advantages[:, 0], returns, atol=1e-5) and torch.allclose(
        rows["returns"], advantages
    )


def test_the_prefix_gives_values_that_explain_the_reward_to_go():
    """R is a quadratic in C_hat of the prefix, k1 is 0: explained but for the ridge, and GAE's
    advantages are what is left.
    """
    rows = rollout(P=40)
    rows["ref_logprobs"], x = (
        rows["old_logprobs"],
        torch.rand(160, 1, generator=torch.Generator().manual_seed(2)),
    )
    rows |= {"C_hat_prefix": x.expand(160, 5), "R": 2 + x[:, 0] ** 2}
    advantages = methods.ppo_advantages(rows, Config(G=4, lam=1.0), 1.0, reference(40))
    assert advantages.abs().max() < 0.1
    assert torch.allclose(
        advantages, (rows["R"][:, None] - rows["values"]) * rows["mask"], atol=1e-5
    )


def test_pkpo_for_best_of_1_is_ppo_on_the_identity_transform():
    rows = rollout()
    a = methods.pkpo_advantages(dict(rows), Config(procedure="bon", n=1, G=4), 0.5, reference())
    b = methods.ppo_advantages(
        dict(rows) | {"R": rows["C_hat"] / 0.5}, Config(G=4), 0.5, reference()
    )
    assert torch.allclose(a, b, atol=1e-5)


def test_bond_puts_the_best_of_n_beside_each_response():
    rows, ref = rollout(), reference()
    # beta 1/4: the best of 5
    methods.bond_advantages(rows, Config(G=4, transform="log"), 1 / 4, ref)
    best = ref.r_ref.view(6, 4, 5).argmax(2) + torch.arange(0, 20, 5)
    assert rows["tokens"].shape == (24, 2, 5)
    assert torch.equal(
        rows["tokens"][:, 1].view(6, 4, 5), ref.tokens[torch.arange(6)[:, None], best].long()
    )


def test_raw_rewards_get_the_beta_of_their_own_tilt():
    """Normal rewards: KL = s^2 / (2 beta^2); 4,000 samples know the KL of 0.5 nats to a few per
    cent.
    """
    r_ref = 3 * torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    assert methods.empirical_beta(r_ref, 0.5) == pytest.approx(3.0, rel=0.03)
    with pytest.raises(ValueError, match="use a smaller KL"):
        methods.empirical_beta(r_ref[:, :5], 4.0)


def test_a_budget_becomes_the_beta_of_what_the_method_converges_to():
    assert methods.beta_for(Config(transform="exp10").resolved(), 1.0) == pytest.approx(
        theory.beta_for_kl("exp10", 1.0)
    )
    assert methods.beta_for(Config(method="ipo").resolved(), 0.5) == pytest.approx(
        theory.beta_for_kl("identity", 0.5)
    )
    assert methods.beta_for(Config(method="grpo").resolved(), 1.0) == pytest.approx(
        1 / math.sqrt(2)
    )
    assert methods.beta_for(Config(transform="none").resolved(), 1.0) is None
    assert methods.best_of(theory.beta_for_kl("log", math.log(8) - 7 / 8)) == 8


def test_offline_rows_are_the_reference_samples():
    ref = reference()
    rows, loss = methods.qrpo(ref, Phi=lambda u: u, beta=0.1, seed=0)
    assert len(rows["of"]) == 120 and torch.equal(rows["tokens"][25], ref.tokens[1, 5].long())
    value, _ = loss(rows["ref_logprobs"], None, rows)
    assert value > 0  # pi_ref is not the optimum
    pairs, _ = methods.ipo(ref, beta=0.1, seed=0)
    assert pairs["tokens"].shape == (60, 2, 5)


def test_grpo_on_fixed_rollouts_starts_at_pi_ref_and_raises_what_is_above_the_groups_mean():
    ref = reference()
    rows, loss = methods.grpo_fixed(ref, beta=0.5, clip=0.2)
    logprobs = rows["ref_logprobs"].clone().requires_grad_()
    value, _ = loss(logprobs, None, rows)
    value.backward()
    assert value.abs() < 1e-5  # advantages of a group sum to 0, k3 is 0
    above = (ref.r_ref > ref.r_ref.mean(1, keepdim=True)).flatten()
    assert (logprobs.grad[above] < 0).all() and (logprobs.grad[~above] > 0).all()


@pytest.mark.parametrize("transform, share", [("identity", 0.8), ("exp10", 0.5), ("exp-10", 2.0)])
def test_a_policy_that_falls_short_of_the_theorys_kl_or_beyond_and_lags_behind_is_brought_to_its_budget(
    transform, share
):
    config = Config(transform=transform, n=4)
    asked, kl = 1.0, 0.0
    for _ in range(100):
        asked, beta = methods.keep_to_budget(asked, kl, 1.0, partial(methods.beta_for, config))
        kl += 0.3 * (share * theory.tradeoff(transform, "bon", 4, [beta])[0].item() - kl)
    assert kl == pytest.approx(1.0, rel=0.01) and asked == pytest.approx(1 / share, rel=0.01)


def test_what_is_out_of_reach_of_the_samples_is_not_asked_for():
    config, r_ref = (
        Config(transform="none", n=4),
        torch.randn(8, 20, generator=torch.Generator().manual_seed(0)),
    )
    beta_at = partial(methods.beta_for, config, r_ref=r_ref)
    # 4.3 is more than log 20
    assert methods.keep_to_budget(2.5, 0.0, 2.5, beta_at) == (2.5, beta_at(2.5))


@pytest.mark.parametrize("levels", [3, 10])
def test_qrpos_log_Z_is_that_of_rewards_with_few_distinct_values(levels):
    """R = u / beta. The j-th of `levels` equal groups of K = 30 draws has u = (j K / levels + (K /
    levels - 1) / 2) / (K - 1).
    """
    K, beta = 30, 0.1
    of = torch.arange(levels).repeat_interleave(K // levels).float()
    ref = Reference(
        of.expand(2, K).clone(),
        torch.zeros(2, K, 1).int(),
        torch.zeros(2, K, 1),
        torch.ones(2, K, 1).bool(),
    )
    rows, loss = methods.qrpo(ref, Phi=lambda u: u, beta=beta, seed=0)
    size = K / levels
    u = [(j * size + (size - 1) / 2) / (K - 1) for j in range(levels)]
    log_Z = math.log(sum(math.exp(x / beta) for x in u) / levels)
    assert torch.allclose(rows["log_Z"], torch.full((2 * K,), log_Z), atol=1e-4)
    # The tilt itself, e^R / Z, has no loss, and its probabilities add up to one.
    at_optimum = (rows["R"] - rows["log_Z"])[:, None]
    assert at_optimum.exp().mean() == pytest.approx(1, abs=1e-4)
    assert loss(at_optimum, None, rows | {"ref_logprobs": torch.zeros(2 * K, 1)})[0] < 1e-10


def test_each_response_weighs_the_same_in_grpo_on_fixed_rollouts():
    mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 1, 1]]]).bool()
    ref = Reference(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, 4).int(), -mask.float(), mask)
    rows, loss = methods.grpo_fixed(ref, beta=0.5, clip=0.2)
    logprobs = (-mask[0].float()).requires_grad_()
    loss(logprobs, None, rows)[0].backward()
    short, long = logprobs.grad.sum(1)
    assert short == pytest.approx(-float(long))


def test_the_standard_error_of_the_kl_is_that_over_prompts():
    of_prompt = torch.tensor([0.1, 0.5, 0.9])
    rows = {
        "old_logprobs": of_prompt.repeat_interleave(4)[:, None],
        "ref_logprobs": torch.zeros(12, 1),
        "mask": torch.ones(12, 1),
    }
    ones = torch.ones(3, 4)
    stats = methods.rollout_metrics(rows, ones, ones, ones)
    assert stats["kl_ref_stderr"] == pytest.approx(0.4 / math.sqrt(3))
