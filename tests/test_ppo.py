"""PPO's functions against sums, enumerations and autograd; every policy here is small enough to be
enumerated.
"""

import math

import pytest
import torch

from minictrl.ppo import (
    explained_variance,
    gae,
    k3,
    loo_advantages,
    masked_mean,
    policy_loss,
    prefix_values,
    token_rewards,
    value_loss,
)

LENGTHS = torch.tensor([1, 3, 5, 4])
MASK = (torch.arange(5) < LENGTHS[:, None]).long()


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_garbage(x):
    """x with a NaN wherever MASK is 0."""
    return x.masked_fill(MASK == 0, math.nan)


# --- a policy of at most two tokens over {EOS, a, b}: 7 responses, the first of length 1 ---

RESPONSES = torch.tensor([[0, 0]] + [[first, second] for first in (1, 2) for second in (0, 1, 2)])
RESPONSE_MASK = torch.tensor([[1, 0]] + 6 * [[1, 1]])
R = 2 * randn(7, seed=1)


def response_logprobs(logits):
    """(4, 3) logits, row 0 for the first token, row a for the token after a -> (7, 2)
    log-probabilities.
    """
    table = logits.log_softmax(-1)
    first, second = RESPONSES.T
    return torch.stack([table[0, first], table[first, second]], 1) * RESPONSE_MASK


def exact_objective(logits, ref_logits):
    logp, ref_logp = response_logprobs(logits).sum(1), response_logprobs(ref_logits).sum(1)
    return (logp.exp() * (R - logp + ref_logp)).sum()


def surrogate(logits, ref_logits, lam=1.0):
    """policy_loss in expectation: all responses, each weighted by its probability."""
    logprobs, ref_logprobs = response_logprobs(logits), response_logprobs(ref_logits)
    old = logprobs.detach()
    rewards = token_rewards(R, old, ref_logprobs, RESPONSE_MASK)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), RESPONSE_MASK, lam=lam)
    weights = old.sum(1, keepdim=True).exp() * len(old)
    return policy_loss(logprobs, old, advantages * weights, RESPONSE_MASK)[0]


def test_token_rewards_are_minus_k1_and_R_at_the_last_response_token():
    logprobs, ref_logprobs, R = randn(4, 5), randn(4, 5, seed=1), randn(4, seed=2)
    rewards = token_rewards(R, with_garbage(logprobs), with_garbage(ref_logprobs), MASK)
    for b, length in enumerate(LENGTHS):
        expected = ref_logprobs[b] - logprobs[b]
        expected[length - 1] += R[b]
        expected[length:] = 0
        assert torch.allclose(rewards[b], expected)


def test_expected_k1_is_the_kl_from_pi_to_pi_ref():
    """Fails with the log-ratio the wrong way round: minus k1 would then sum to +KL(pi ||
    pi_ref).
    """
    logprobs, ref_logprobs = response_logprobs(randn(4, 3)), response_logprobs(randn(4, 3, seed=1))
    p, q = logprobs.sum(1).exp(), ref_logprobs.sum(1).exp()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    )
    returns = token_rewards(torch.zeros(7), logprobs, ref_logprobs, RESPONSE_MASK).sum(1)
    assert kl > 0.1 and torch.isclose((p * returns).sum(), -kl)


def test_gae_is_the_double_sum_over_later_deltas():
    rewards, values, gamma, lam = randn(4, 5), randn(4, 5, seed=1), 0.9, 0.7
    advantages, returns = gae(with_garbage(rewards), with_garbage(values), MASK, gamma, lam)
    for b, length in enumerate(LENGTHS.tolist()):
        V = values[b, :length].tolist() + [0]
        delta = [rewards[b, t] + gamma * V[t + 1] - V[t] for t in range(length)]
        expected = [
            sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
            for t in range(length)
        ]
        assert torch.allclose(advantages[b, :length], torch.stack(expected))
    assert torch.allclose(returns, advantages + values * MASK) and not advantages[MASK == 0].any()


def test_gae_with_lam_1_is_the_reward_to_go_minus_the_value():
    rewards, values = randn(4, 5) * MASK, randn(4, 5, seed=1) * MASK
    advantages, returns = gae(rewards, values, MASK, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns * MASK, to_go * MASK) and torch.allclose(
        advantages, (to_go - values) * MASK
    )


def test_garbage_behind_the_mask_changes_neither_loss_nor_gradient_nor_stats():
    logprobs, old, advantages = randn(4, 5), randn(4, 5, seed=1) / 4, randn(4, 5, seed=2)
    results = []
    for spoil in (torch.clone, with_garbage):
        x = spoil(logprobs).requires_grad_()
        loss, stats = policy_loss(x, spoil(old), spoil(advantages), MASK)
        loss = loss + value_loss(x, spoil(old), MASK)
        loss.backward()
        results.append(
            torch.cat(
                [
                    x.grad.flatten(),
                    torch.stack(
                        [loss.detach(), *stats.values(), explained_variance(x, spoil(old), MASK)]
                    ),
                ]
            )
        )
    assert torch.equal(*results) and not x.grad[MASK == 0].any()


def test_first_minibatch_has_ratio_1_and_the_policy_gradient_without_weights_by_length():
    logprobs, advantages = randn(4, 5).requires_grad_(), randn(4, 5, seed=1)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, MASK)
    loss.backward()
    # every token of every response: -A / B, for any length
    assert torch.equal(logprobs.grad, -advantages * MASK / 4)
    assert stats["approx_kl"] == 0 and stats["clipfrac"] == 0


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1, 9.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1, 1, -1, 2, 9]], dtype=torch.float64)
    logprobs, mask = ratio.log().requires_grad_(), torch.tensor([[1, 1, 1, 1, 1, 0]])
    loss, stats = policy_loss(logprobs, torch.zeros_like(ratio), advantages, mask)
    loss.backward()
    assert torch.isclose(loss, torch.tensor(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2), dtype=torch.float64))
    assert torch.allclose(
        -logprobs.grad, torch.tensor([[0, -1.5, 0.5, 0, 2.2, 0]], dtype=torch.float64)
    )
    assert math.isclose(stats["clipfrac"], 4 / 5, rel_tol=1e-6)
    expected = [r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)]
    assert math.isclose(stats["approx_kl"], sum(expected) / 5)


def test_k1_in_the_reward_has_the_gradient_of_the_exact_objective():
    logits, ref_logits = randn(4, 3).requires_grad_(), randn(4, 3, seed=2)
    (gradient,) = torch.autograd.grad(surrogate(logits, ref_logits), logits)
    (exact,) = torch.autograd.grad(-exact_objective(logits, ref_logits), logits)
    assert torch.allclose(gradient, exact, atol=1e-12)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl_instead():
    """Why the KL is in the reward: k3 has the right mean, but differentiated sample by sample it
    follows another KL.
    """
    logits, ref_logits = randn(4, 3).requires_grad_(), randn(4, 3, seed=2)
    logp, ref_logp = response_logprobs(logits).sum(1), response_logprobs(ref_logits).sum(1)
    estimate = k3(logp, ref_logp)
    forward_kl, reverse_kl = ref_logp.exp() @ (ref_logp - logp), logp.exp() @ (logp - ref_logp)
    of_k3, of_forward, of_reverse = (
        torch.autograd.grad(x, logits, retain_graph=True)[0]
        for x in (logp.exp().detach() @ estimate, forward_kl, reverse_kl)
    )
    assert torch.isclose(logp.exp() @ estimate, reverse_kl)  # the value is right
    assert (
        torch.allclose(of_k3, of_forward) and (of_k3 - of_reverse).norm() > 0.2 * of_reverse.norm()
    )


def test_loo_baseline_is_the_mean_of_the_others_and_keeps_the_gradient_unbiased():
    returns = randn(3, 4)
    advantages = loo_advantages(returns)
    for p in range(3):
        for i in range(4):
            others = [returns[p, j] for j in range(4) if j != i]
            assert torch.isclose(advantages[p, i], returns[p, i] - sum(others) / 3)
    # All pairs of samples from a three-armed softmax: the expected gradient is that of E[r],
    # exactly.
    logits, r = randn(3).requires_grad_(), randn(3, seed=1)
    logp = logits.log_softmax(0)
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    pairs = loo_advantages(torch.stack([r[i], r[j]], 1)) * torch.stack([logp[i], logp[j]], 1)
    (gradient,) = torch.autograd.grad(
        ((logp[i] + logp[j]).exp().detach() * pairs.mean(1)).sum(), logits
    )
    assert torch.allclose(
        gradient, torch.autograd.grad(logits.softmax(0) @ r, logits)[0], atol=1e-12
    )


def test_value_loss_and_explained_variance_by_hand():
    returns, mask = torch.tensor([[1.0, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    values = torch.tensor([[1.0, 2, 3], [6, 7, 7]])
    assert value_loss(values, returns, mask) == 4 / 4 / 2
    assert math.isclose(explained_variance(values, returns, mask), 1 - 0.75 / 1.25, rel_tol=1e-6)
    assert (
        explained_variance(returns, returns, mask) == 1
        and explained_variance(0 * values, returns, mask) == 0
    )
    for same in (1.0, 0.1):  # the variance of 0.1 in float32 is no 0
        assert explained_variance(values, torch.full((2, 3), same), mask) == 0
    assert explained_variance(values, math.nan * returns, mask).isnan()


def test_a_masked_mean_is_exact_in_half_precision():
    assert masked_mean(torch.full((300, 300), 10.0).half(), torch.ones(300, 300).half()) == 10
    assert masked_mean(torch.ones(2, 2), torch.full((2, 2), 0.5)) == 1


def test_gradient_ascent_on_responses_of_two_lengths_reaches_the_tilt():
    """pi = pi_ref e^R / Z over whole responses, EOS-only included; a mean over tokens would end
    elsewhere.
    """
    ref_logits = randn(4, 3, seed=2)
    logits = ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        surrogate(logits, ref_logits).backward()
        optimizer.step()
    pi = response_logprobs(logits).sum(1).exp()
    tilt = (response_logprobs(ref_logits).sum(1) + R).softmax(0)
    assert (pi - tilt).abs().sum() / 2 < 1e-3


@pytest.mark.parametrize("baseline", ["value", "loo"])
def test_ppo_on_a_one_token_bandit_reaches_the_tilted_reference(baseline):
    """20 arms, pi_ref e^{Phi/beta} / Z with Phi(u) = u: total variation .42 at the start, < .003 at
    the end.

    So near with 512 samples a step because at the optimum R - k1 is log Z for every arm: the
    gradient's noise ends too.
    """
    torch.manual_seed(0)
    ref_logprobs = (0.7 * torch.randn(20)).log_softmax(0)
    # the arms in ascending order of reward
    C = ref_logprobs.exp().cumsum(0) - ref_logprobs.exp() / 2
    R = C / 0.25
    tilt = (ref_logprobs + R).softmax(0)
    logits, value = ref_logprobs.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    start = (logits.softmax(0) - tilt).abs().sum() / 2
    optimizer = torch.optim.Adam([logits, value], lr=0.05)
    B, steps, mask = 512, 200, torch.ones(512, 1)
    for step in range(steps):
        y = torch.multinomial(logits.detach().softmax(0), B, replacement=True)
        old = logits.detach().log_softmax(0)[y, None]
        rewards = token_rewards(R[y], old, ref_logprobs[y, None], mask)
        advantages, returns = gae(rewards, value.detach().expand(B, 1), mask)
        if baseline == "loo":
            advantages = loo_advantages(rewards.sum(1).view(8, 64)).view(B, 1)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        for _ in range(2):
            loss, stats = policy_loss(logits.log_softmax(0)[y, None], old, advantages, mask)
            optimizer.zero_grad()
            (loss + value_loss(value.expand(B, 1), returns, mask)).backward()
            optimizer.step()
    assert start > 0.4 and (logits.softmax(0) - tilt).abs().sum() / 2 < 0.003
    assert stats["approx_kl"] < 0.02


def test_prefix_values_are_the_mean_of_the_others_where_prefixes_are_alike():
    """And nothing is read behind the mask."""
    mask = (torch.arange(4) < torch.tensor([1, 2, 4, 4, 4])[:, None]).float()
    to_go = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    hidden = to_go.masked_fill(mask == 0, torch.nan)
    alike = torch.full((5, 4), 0.3).masked_fill(mask == 0, torch.nan)
    values = prefix_values(hidden, alike, mask)
    assert values[2, 2] == pytest.approx(float(to_go[3:, 2].mean()), abs=1e-6)
    assert values[2, 0] == pytest.approx(float(to_go[[0, 1, 3, 4], 0].mean()), abs=1e-6)
    assert (values[mask == 0] == 0).all()


def test_prefix_values_are_the_ridge_regression_on_the_others():
    C_hat, to_go = torch.rand(2, 9, 1, generator=torch.Generator().manual_seed(0)).double()
    values = prefix_values(to_go, C_hat, torch.ones(9, 1))
    x = C_hat ** torch.arange(1, 4)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x = torch.cat([torch.ones(9, 1), x], 1).double()
    ridge = 0.02 * 9 * torch.tensor([0, 1, 1, 1]).double().diag()
    for i in range(9):
        others = torch.arange(9) != i
        gram = x[others].T @ x[others] + ridge
        weights = torch.linalg.solve(gram, x[others].T @ to_go[others])
        assert torch.allclose(values[i], x[i] @ weights)


def test_the_last_response_left_keeps_its_value_of_one_token_earlier():
    mask = (torch.arange(4) < torch.tensor([2, 4, 2])[:, None]).float()
    values = prefix_values(randn(3, 4), randn(3, 4, seed=1), mask)
    assert values[1, 1] != 0 and (values[1, 2:] == values[1, 1]).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_prefix_values_of_any_numbers_are_float32(dtype):
    to_go = torch.tensor([[5, 3], [7, 2], [4, 4], [9, 1]]) * 6400
    C_hat, mask = torch.rand(4, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2)
    values = prefix_values(to_go.to(dtype), C_hat, mask)
    torch.testing.assert_close(values, prefix_values(to_go.double(), C_hat, mask).float())


@pytest.mark.parametrize("alive", [1, 2, 5, 16])
def test_a_prefix_value_has_not_seen_its_own_sample(alive):
    generator = torch.Generator().manual_seed(0)
    to_go, C_hat = torch.rand(2, alive, 3, generator=generator)
    mask = torch.ones(alive, 3)
    before = prefix_values(to_go, C_hat, mask)
    to_go[0] += 5.0
    assert torch.allclose(prefix_values(to_go, C_hat, mask)[0], before[0], atol=1e-5)


@pytest.mark.parametrize("mask", [torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1, 1], [0, 0]])])
def test_left_padding_and_empty_responses_are_refused(mask):
    with pytest.raises(ValueError, match="right-padded"):
        token_rewards(torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 2), mask)


def test_shapes_that_do_not_match_are_refused():
    mask = torch.ones(2, 3)
    for call in (
        lambda: token_rewards(torch.zeros(2, 1), mask, mask, mask),
        lambda: gae(mask, mask[:, :2], mask),
        lambda: token_rewards(torch.zeros(2), mask, mask[:1], mask),
        lambda: loo_advantages(torch.ones(4, 1)),
        lambda: policy_loss(mask, mask, mask[:, :2], mask),
    ):
        with pytest.raises(ValueError, match="must be|must have one shape"):
            call()


@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16])
def test_rewards_of_another_dtype_round_no_value(kind):
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.6, 0.7]])
    expected = gae(rewards, values, torch.ones(1, 3))
    for got, want in zip(gae(rewards.to(kind), values, torch.ones(1, 3)), expected):
        torch.testing.assert_close(got, want)


def test_masks_are_0_and_1_and_clip_is_positive():
    x = torch.zeros(2, 2)
    for mask in ([[0.5, 0.5], [1, 1]], [[2.0, 1], [1, 1]], [[math.nan, 1], [1, 1]]):
        with pytest.raises(ValueError, match="0 and 1 alone"):
            value_loss(x, x + 1, torch.tensor(mask))
    for clip in (-1, 0, math.nan, "x"):
        with pytest.raises(ValueError, match="clip"):
            policy_loss(x, x, x, x + 1, clip=clip)
    with pytest.raises(ValueError, match="lam 'x': must be a number"):
        gae(x, x, x + 1, lam="x")


def test_nothing_is_broadcast_without_a_word():
    x, mask = torch.zeros(3, 2), torch.ones(3, 2)
    for call in (
        lambda: masked_mean(x, torch.ones(2)),
        lambda: masked_mean(x, torch.ones(3, 1)),
        lambda: k3(x, x[:, :1]),
        lambda: explained_variance(x[0], x, mask),
        lambda: explained_variance(x, x[:, :1], mask),
    ):
        with pytest.raises(ValueError, match="must have one shape|must be"):
            call()


def test_losses_of_half_precision_do_not_overflow():
    """float16 ends at 65,504."""
    zeros, mask = torch.zeros(2, 400, dtype=torch.float16), torch.ones(2, 400)
    rewards = token_rewards(torch.tensor([1e5, 1.0]), zeros, zeros, mask)
    assert rewards[:, -1].tolist() == [1e5, 1.0]
    assert value_loss(zeros + 300, zeros, mask) == 45_000
    loss, _ = policy_loss(zeros, zeros, zeros + 200, mask)
    assert loss == -80_000
