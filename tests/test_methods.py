import itertools
import math
from dataclasses import replace

import pytest
import torch

from minictrl import baselines, ppo, theory, transforms
from minictrl.batch import Batch
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.methods import get_method
from minictrl.methods.base import check_R
from minictrl.methods.bonbon import bonbon_loss
from minictrl.methods.grpo import grpo_advantages
from minictrl.methods.ipo import ipo_loss
from minictrl.methods.maxpo import leave_two_out_advantages
from minictrl.methods.pkpo import beats_best_of, max_at_n_advantages
from minictrl.methods.qrpo import qrpo_loss, reference_R
from minictrl.reference import Reference
from minictrl.rollout import rollout_stats
from minictrl.update import Learner


def method(name="ppo", **settings):
    return get_method(name)(Config(method=name, **settings).resolved())


def rollout(P=6, G=4, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (P * G,), generator=g)
    mask = (torch.arange(T) < lengths[:, None]).float()
    return Batch(
        prompt_index=torch.arange(P).repeat_interleave(G),
        mask=mask,
        tokens=torch.randint(9, (P * G, T), generator=g),
        R=3 * torch.rand(P * G, generator=g),
        old_logprobs=-torch.rand(P * G, T, generator=g) * mask,
        ref_logprobs=-torch.rand(P * G, T, generator=g) * mask,
    )


def reference(P=6, K=20, T=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return Reference(
        torch.randn(P, K, generator=g),
        torch.randint(9, (P, K, T), generator=g).int(),
        -torch.rand(P, K, T, generator=g),
        torch.ones(P, K, T, dtype=torch.bool),
    )


def test_the_baseline_is_the_mean_of_all_other_returns_and_a_prompts_own_for_raw_rewards():
    batch = rollout()
    k1 = batch.old_logprobs - batch.ref_logprobs
    returns = batch.R - k1.sum(1)
    for transform, group in (("exp10", 24), ("none", 4)):
        config = Config(transform=transform, G=4)
        advantages = baselines.loo(batch, None, None, None, config).advantages
        for i in range(24):
            others = [j for j in range(24) if j != i and j // group == i // group]
            expected = returns[i] - returns[others].mean()
            assert advantages[i, 0] == pytest.approx(float(expected), abs=1e-5)
            # the last token answers for itself and the reward alone
            last = int(batch.mask[i].sum()) - 1
            expected = batch.R[i] - k1[i, last] - returns[others].mean()
            assert advantages[i, last] == pytest.approx(float(expected), abs=1e-5)


def test_a_value_head_turns_it_into_gae_on_rewards_without_their_mean(monkeypatch):
    batch, zeros = rollout(), torch.zeros(24, 5)
    monkeypatch.setattr(baselines, "in_pieces", lambda *args: zeros)
    learner = Learner(None, None, None)  # its forward is replaced
    found = baselines.value(batch, None, None, learner, Config(G=4, lam=1.0))
    others = (batch.R.sum() - batch.R) / 23  # a mean with its own R would shrink the gradient
    returns = batch.R - others - batch.kl()
    assert torch.allclose(found.advantages[:, 0], returns, atol=1e-5)
    assert torch.allclose(found.returns, found.advantages)


def test_a_value_baseline_is_what_the_head_reads(monkeypatch):
    monkeypatch.setattr(baselines, "in_pieces", lambda batch, size, read: read(batch))
    monkeypatch.setattr(baselines, "forward", lambda policy, head, rows: (None, 2 * rows.mask))
    batch = rollout()
    found = baselines.value(batch, None, None, Learner(None, None, None), Config(G=4, lam=1.0))
    assert torch.equal(found.values, 2 * batch.mask)
    torch.testing.assert_close(found.advantages, found.returns - found.values)


def test_gaes_lambda_is_the_runs(monkeypatch):
    batch = rollout()
    monkeypatch.setattr(baselines, "in_pieces", lambda *args: torch.zeros(24, 5))
    monkeypatch.setattr(baselines, "prefix_rewards", lambda *args: torch.zeros(6, 20))
    monkeypatch.setattr(ppo, "prefix_values", lambda *args: torch.zeros(24, 5))
    centred = replace(batch, R=ppo.loo_advantages(batch.R[None])[0])
    for lam, (baseline, rewarded) in itertools.product(
        (0.5, 1.0), ((baselines.value, centred), (baselines.prefix, batch))
    ):
        learner = Learner(None, None, None)
        found = baseline(batch, None, torch.zeros(6, 3), learner, Config(G=4, lam=lam))
        rewards = baselines.token_rewards(rewarded)
        expected, _ = ppo.gae(rewards, torch.zeros(24, 5), batch.mask, lam=lam)
        assert torch.equal(found.advantages, expected)


def test_the_prefix_gives_values_that_explain_the_reward_to_go(monkeypatch):
    """R is a quadratic in C_hat of the prefix, k1 is 0: explained but for the ridge, and GAE's
    advantages are what is left.
    """
    batch = rollout(P=40)
    x = torch.rand(160, 1, generator=torch.Generator().manual_seed(2))
    batch = replace(batch, ref_logprobs=batch.old_logprobs, R=2 + x[:, 0] ** 2)
    prefix = x.expand(160, 5).reshape(40, 20)
    monkeypatch.setattr(baselines, "prefix_rewards", lambda *args: None)
    monkeypatch.setattr(baselines, "calibrated_reward", lambda *args: prefix)
    found = baselines.prefix(batch, None, torch.zeros(40, 1), None, Config(G=4, lam=1.0))
    assert found.advantages.abs().max() < 0.1
    left = (batch.R[:, None] - found.values) * batch.mask
    assert torch.allclose(found.advantages, left, atol=1e-5)


def test_pkpo_for_best_of_1_is_the_calibrated_reward():
    generator = torch.Generator().manual_seed(0)
    r, r_ref = (torch.randn(6, size, generator=generator).round() for size in (4, 20))
    for settings in ({"procedure": "bon", "n": 1}, {"procedure": "standard", "n": 4}):
        pkpo = method("pkpo", **settings, G=4)
        assert torch.allclose(pkpo.reward(r, r_ref, None, 0.5), calibrated_reward(r, r_ref) / 0.5)


def test_pkpos_reward_is_its_advantage_with_its_baseline():
    generator = torch.Generator().manual_seed(0)
    r, r_ref = (torch.randn(6, size, generator=generator) for size in (5, 20))
    g = beats_best_of(r, r_ref, 4)
    found = method("pkpo", n=4, G=5).reward(r, r_ref, None, 0.5)
    assert torch.equal(found, max_at_n_advantages(g, 4, baseline=True) / 0.5)


def test_maxpos_reward_is_its_advantage_which_needs_a_sample_more_than_n():
    generator = torch.Generator().manual_seed(0)
    r, r_ref = (torch.randn(6, size, generator=generator) for size in (5, 20))
    found = method("maxpo", n=4, G=5).reward(r, r_ref, None, 0.5)
    assert torch.equal(found, leave_two_out_advantages(beats_best_of(r, r_ref, 4), 4) / 0.5)
    with pytest.raises(ValueError, match="n of at most 3"):
        method("maxpo", n=4, G=4)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_beating_the_best_of_n_is_counted_over_all_subsets_with_ties(n):
    r, r_ref = torch.tensor([[-1.0, 0, 1, 2]]), torch.tensor([[0.0, 1, 1, -1, 2, 0]])
    found = beats_best_of(r, r_ref, n)[0]
    for y, estimate in zip(r[0], found, strict=True):
        bests = [max(subset) for subset in itertools.combinations(r_ref[0].tolist(), n)]
        wins = [float(y > best) + float(y == best) / 2 for best in bests]
        assert float(estimate) == pytest.approx(sum(wins) / len(wins))


def test_bond_puts_the_best_of_n_beside_each_response():
    batch, ref = rollout(), reference()
    found = method("bond", G=4).with_loss_inputs(batch, ref, 1 / 4)  # beta 1/4: the best of 5
    best = ref.r_ref.view(6, 4, 5).argmax(2) + torch.arange(0, 20, 5)
    assert found.tokens.shape == (24, 2, 5) and torch.equal(found.tokens[:, 0], batch.tokens)
    expected = ref.tokens[torch.arange(6)[:, None], best].long()
    assert torch.equal(found.tokens[:, 1].view(6, 4, 5), expected)


def test_the_beta_of_a_budget_is_that_of_what_the_method_converges_to():
    assert method(transform="exp10").beta == pytest.approx(theory.beta_for_kl("exp10", 1.0))
    ipo = method("ipo", kl=0.5)
    assert ipo.beta == pytest.approx(theory.beta_for_kl("identity", 0.5))
    assert method("grpo").beta == pytest.approx(1 / math.sqrt(2))
    assert method(transform="none").beta is None
    best_of = method("bond").best_of
    assert best_of(theory.beta_for_kl("log", math.log(8) - 7 / 8)) == 8


def test_a_methods_phi_and_beta_are_for_its_procedure_n_and_K():
    settings = dict(transform="optimal", procedure="won", n=8)
    optimal, u = method(**settings), torch.linspace(0, 1, 11)
    assert optimal.beta == theory.beta_for_kl("optimal", 1.0, procedure="won", n=8)
    expected = transforms.get_transform("optimal", procedure="won", n=8, beta=optimal.beta)
    assert torch.equal(optimal.Phi(u), expected(u))
    log = method(transform="log", K=10)
    assert log.Phi(torch.zeros(1)).exp().item() == pytest.approx(1 / 20)


def test_an_online_reward_is_phi_over_the_steps_beta_with_its_floor():
    online, generator = method(transform="exp-10"), torch.Generator().manual_seed(0)
    r, r_ref = (torch.randn(6, size, generator=generator) for size in (40, 20))
    Phi_C, beta = online.Phi.of_rewards(r, r_ref), 0.7 * online.beta
    found = online.reward(r, r_ref, Phi_C, beta)
    assert (
        torch.equal(found, online.Phi.in_nats(Phi_C, beta, r_ref)) and (found > Phi_C / beta).any()
    )


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda R: R.T, r"its R is \(3, 2\); return a tensor \(2, 3\)"),
        (lambda R: R.tolist(), "its R is list"),
        (lambda R: R.log(), "its R is nan where rewards are numbers"),
        (lambda R: R * 1e13, "rewards of up to 1 make R"),
    ],
)
def test_R_is_a_number_to_learn_from_for_each_reward(change, told):
    r = torch.tensor([[-1.0, 0.5, 1], [1, 1, 1]])
    check_R(r, r, "mine")
    with pytest.raises(ValueError, match=told):
        check_R(change(r), r, "mine")


def test_rows_of_a_batch_are_as_many_as_its_responses():
    tokens, mask = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"R \(2, 2\): give it 4 rows"):
        Batch(torch.arange(4), tokens, mask, R=torch.zeros(2, 2))


def test_an_online_loss_is_the_surrogate_at_the_runs_clip_plus_the_value_heads():
    batch = rollout()
    batch = replace(batch, advantages=torch.randn(24, 5), returns=torch.randn(24, 5))
    logprobs, values = batch.ref_logprobs, torch.randn(24, 5)
    surrogate = batch.old_logprobs, batch.advantages, batch.mask
    expected, _ = ppo.policy_loss(logprobs, *surrogate, 0.05)
    assert expected != ppo.policy_loss(logprobs, *surrogate)[0]
    online = method(clip=0.05)
    assert online.loss(logprobs, None, batch)[0] == expected
    loss, stats = online.loss(logprobs, values, batch)
    assert stats["value_loss"] == ppo.value_loss(values, batch.returns, batch.mask)
    assert loss == expected + stats["value_loss"]


@pytest.mark.parametrize("name, n", [("ipo", 2), ("bonbon", 5)])
def test_a_row_of_pairs_is_the_best_and_the_worst_of_n_and_the_loss_is_of_their_sums(name, n):
    ref, offline = reference(), method(name, seed=3)
    rows = offline.rows(ref, 1 / 4)  # for BoNBoN the best of 5
    assert rows.tokens.shape == (6 * (20 // n), 2, 5)
    for prompt, logprobs in zip(rows.prompt_index, rows.ref_logprobs):
        known = (ref.logprobs[prompt] == logprobs[:, None]).all(2).int()  # (2, K)
        assert known.sum(1).tolist() == [1, 1]
        best, worst = ref.r_ref[prompt, known.argmax(1)]
        assert best > worst
    assert not torch.equal(rows.tokens, method(name, seed=4).rows(ref, 1 / 4).tokens)
    logprobs = -torch.rand(rows.mask.shape, generator=torch.Generator().manual_seed(0))
    sums = (*logprobs.sum(-1).T, *rows.ref_logprobs.sum(-1).T)
    expected = ipo_loss(*sums, tau=1 / 4) if name == "ipo" else bonbon_loss(*sums, n=5)
    assert offline.loss(logprobs, None, rows)[0] == expected


def test_bonds_loss_is_its_own_responses_surrogate_and_the_bests_likelihood():
    batch, ref, bond = rollout(), reference(), method("bond", G=4, clip=0.05)
    ref = replace(ref, mask=torch.arange(5) < torch.arange(1, 21).clamp(max=5)[:, None])
    ref = replace(ref, mask=ref.mask.expand(6, 20, 5))
    batch = replace(batch, advantages=torch.randn(24, 5), returns=torch.randn(24, 5))
    rows = bond.with_loss_inputs(batch, ref, 1 / 4)
    assert torch.equal(rows.mask[:, 0], batch.mask)
    lengths = ref.mask.sum(2).gather(1, ref.r_ref.view(6, 4, 5).argmax(2) + torch.arange(0, 20, 5))
    assert torch.equal(rows.mask[:, 1].sum(1).view(6, 4), lengths)
    logprobs, values = -torch.rand(24, 2, 5) * rows.mask, torch.randn(24, 2, 5)
    own, _ = ppo.policy_loss(
        logprobs[:, 0], batch.old_logprobs, batch.advantages, batch.mask, clip=0.05
    )
    best = logprobs[:, 1].sum(1).mean()
    value = ppo.value_loss(values[:, 0], batch.returns, batch.mask)
    assert bond.loss(logprobs, values, rows)[0] == pytest.approx(float((own - best) / 2 + value))
    assert bond.loss(logprobs, None, rows)[0] == pytest.approx(float((own - best) / 2))


def test_qrpos_loss_is_of_the_sums_of_a_response_and_its_prompts_own_log_Z():
    ref, qrpo = reference(), method("qrpo", transform="exp10")
    ref = replace(ref, r_ref=ref.r_ref.round())  # of ties each prompt has its own
    rows = qrpo.rows(ref, 5000.0)
    R = reference_R(qrpo, ref.r_ref, 5000.0)
    log_Z = R.exp().mean(1).log().repeat_interleave(20).float()
    torch.testing.assert_close(rows.log_Z, log_Z)
    logprobs = -torch.rand(120, 5)
    sums = logprobs.sum(1), rows.ref_logprobs.sum(1)
    assert qrpo.loss(logprobs, None, rows)[0] == qrpo_loss(*sums, rows.R, rows.log_Z)


def test_grpos_reward_is_the_standardised_one_over_the_steps_beta():
    r = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method("grpo").reward(r, None, None, 0.3), grpo_advantages(r) / 0.3)


def test_grpo_on_fixed_rollouts_has_the_published_loss():
    """Of each response the mean over its tokens of -min(ratio A, clipped ratio A) + k3."""
    ref, fixed = reference(), method("grpo_fixed", clip=0.05)
    lengths = torch.arange(1, 21).clamp(max=5)
    ref = replace(ref, mask=(torch.arange(5) < lengths[:, None]).expand(6, 20, 5))
    rows = fixed.rows(ref, 0.5)
    logprobs = rows.ref_logprobs + 0.2 * torch.randn(120, 5)
    A = 2 * grpo_advantages(ref.r_ref).view(120, 1)
    logratio = logprobs - rows.ref_logprobs
    ratio = logratio.exp()
    each = -torch.minimum(ratio * A, ratio.clamp(0.95, 1.05) * A) + (-logratio).exp() - 1 + logratio
    expected = ((each * rows.mask).sum(1) / lengths.repeat(6)).mean()
    torch.testing.assert_close(fixed.loss(logprobs, None, rows)[0], expected)


def test_an_offline_step_has_as_many_rows_as_an_online_one_has_responses():
    for name, rows in (("qrpo", 15), ("ipo", 15), ("tpo", 3)):
        assert method(name, batch=3, G=5).rows_per_step == rows


def test_offline_rows_are_the_reference_samples():
    ref = reference()
    qrpo = method("qrpo")
    rows = qrpo.rows(ref, 0.1)
    assert len(rows) == 120 and torch.equal(rows.tokens[25], ref.tokens[1, 5].long())
    value, _ = qrpo.loss(rows.ref_logprobs, None, rows)
    assert value > 0  # pi_ref is not the optimum
    assert method("ipo").rows(ref, 0.1).tokens.shape == (60, 2, 5)


def test_grpo_on_fixed_rollouts_starts_at_pi_ref_and_raises_what_is_above_the_groups_mean():
    ref = reference()
    fixed = method("grpo_fixed")
    rows = fixed.rows(ref, 0.5)
    logprobs = rows.ref_logprobs.clone().requires_grad_()
    value, _ = fixed.loss(logprobs, None, rows)
    value.backward()
    assert value.abs() < 1e-5  # advantages of a group sum to 0, k3 is 0
    above = (ref.r_ref > ref.r_ref.mean(1, keepdim=True)).flatten()
    assert (logprobs.grad[above] < 0).all() and (logprobs.grad[~above] > 0).all()


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
    qrpo = method("qrpo")
    rows = qrpo.rows(ref, beta)
    size = K / levels
    u = [(j * size + (size - 1) / 2) / (K - 1) for j in range(levels)]
    log_Z = math.log(sum(math.exp(x / beta) for x in u) / levels)
    assert torch.allclose(rows.log_Z, torch.full((2 * K,), log_Z), atol=1e-4)
    # The tilt itself, e^R / Z, has no loss, and its probabilities add up to one.
    at_optimum = (rows.R - rows.log_Z)[:, None]
    assert at_optimum.exp().mean() == pytest.approx(1, abs=1e-4)
    assert qrpo.loss(at_optimum, None, replace(rows, ref_logprobs=torch.zeros(2 * K, 1)))[0] < 1e-10


def test_each_response_weighs_the_same_in_grpo_on_fixed_rollouts():
    mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 1, 1]]]).bool()
    ref = Reference(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, 4).int(), -mask.float(), mask)
    fixed = method("grpo_fixed")
    rows = fixed.rows(ref, 0.5)
    logprobs = (-mask[0].float()).requires_grad_()
    fixed.loss(logprobs, None, rows)[0].backward()
    short, long = logprobs.grad.sum(1)
    assert short == pytest.approx(-float(long))


def test_the_standard_error_of_the_kl_is_that_over_prompts():
    of_prompt = torch.tensor([0.1, 0.5, 0.9])
    batch = Batch(
        prompt_index=torch.arange(3).repeat_interleave(4),
        tokens=torch.zeros(12, 1),
        mask=torch.ones(12, 1),
        old_logprobs=of_prompt.repeat_interleave(4)[:, None],
        ref_logprobs=torch.zeros(12, 1),
    )
    ones = torch.ones(3, 4)
    stats = rollout_stats(batch, ones, ones)
    assert stats["kl_ref_stderr"] == pytest.approx(0.4 / math.sqrt(3))


def test_a_prompt_that_comes_twice_in_a_step_is_one_prompt():
    kl = torch.tensor([0.0, 2.0]).repeat(16)
    batch = Batch(
        prompt_index=torch.tensor([0, 1]).repeat(16),
        tokens=torch.zeros(32, 1),
        mask=torch.ones(32, 1),
        old_logprobs=kl[:, None],
        ref_logprobs=torch.zeros(32, 1),
    )
    ones = torch.ones(8, 4)
    assert rollout_stats(batch, ones, ones)["kl_ref_stderr"] == pytest.approx(1.0)


def test_grpos_beta_is_checked_at_the_scale_of_what_it_trains_on():
    r_ref = 1e8 * torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    for name in ("grpo", "grpo_fixed"):
        method = get_method(name)(Config(method=name, beta=0.7).resolved())
        method.check_beta(0.7, r_ref)
        with pytest.raises(ValueError, match="nothing can follow"):
            method.check_beta(1e-9, r_ref)


@pytest.mark.parametrize("transform", ["exp20", "exp80", "exp-80"])
def test_rs_grpos_own_beta_is_one_that_it_can_follow(transform):
    """Its R has the group's mean below it, so a large Phi does not make it large."""
    r_ref = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    beta = get_method("rs_grpo")(Config(method="rs_grpo", transform=transform).resolved()).beta
    settings = Config(method="rs_grpo", transform=transform, beta=beta).resolved()
    method = get_method("rs_grpo")(settings)
    method.check_beta(beta, r_ref)
    with pytest.raises(ValueError, match="nothing can follow"):
        method.check_beta(1e-9, r_ref)


def test_a_regression_on_log_Z_needs_two_reference_samples():
    with pytest.raises(ValueError, match="--K 1: a prompt's samples are compared"):
        Config(method="a2po", K=1, kl=0.3).resolved()


def test_rs_grpo_takes_no_transform_that_only_begins_like_one(monkeypatch):
    monkeypatch.setitem(transforms.CLOSED_FORMS, "expo", lambda u: u)
    with pytest.raises(ValueError, match="--transform expo: rs_grpo has exp<t>"):
        Config(method="rs_grpo", transform="expo").resolved()
