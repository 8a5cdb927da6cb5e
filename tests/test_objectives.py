"""The newer objectives against enumeration: expected gradients, and the policies where they end."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_losses import minimise, randn, total_variation
from test_methods import method, reference, rollout

from minictrl import theory
from minictrl.methods.maxpo import leave_two_out_advantages
from minictrl.methods.maxrl import mean_normalised
from minictrl.methods.pkpo import max_at_n_advantages
from minictrl.methods.qrpo import log_partition, qrpo_loss, reference_R
from minictrl.methods.tea import tail_extrapolated_advantages
from minictrl.methods.tpo import tpo_loss


def expected_gradient(advantages, x, logits, G):
    """E[mean_i A_i grad log pi(y_i)] by the logits, over all G draws of a policy on len(x) arms."""
    pi = logits.softmax(0)
    draws = torch.tensor(list(itertools.product(range(len(x)), repeat=G)))
    probability = pi[draws].prod(1)
    A = advantages(x[draws])
    scores = torch.eye(len(x), dtype=x.dtype)[draws] - pi  # (draws, G, arms)
    return (probability[:, None] * (A[..., None] * scores).mean(1)).sum(0)


def exact_gradient(objective, logits):
    """By the logits, of an objective of the probabilities."""
    logits = logits.clone().requires_grad_()
    objective(logits.softmax(0)).backward()
    return logits.grad


def best_of(n, g):
    """E[max of g over n draws of pi], by enumeration."""
    draws = torch.tensor(list(itertools.product(range(len(g)), repeat=n)))
    return lambda pi: (pi[draws].prod(1) * g[draws].amax(1)).sum()


# --- MaxPO ---


@pytest.mark.parametrize("g", [[3.0, 1, 4, 1, 5, 9], [2.0, 7, 7, 0, 7, 2]])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_maxpo_is_pkpo_minus_the_same_of_the_others_without_this_one(g, n):
    """The Leave-Two-Out baseline by its definition: of each j, what it adds to the maximum of the
    subsets without i, and that without both.
    """
    G = len(g)

    def added(j, pool):
        subsets = list(itertools.combinations([k for k in pool if k != j], n - 1))
        gains = [
            max([g[j], *(g[k] for k in S)]) - max((g[k] for k in S), default=0) for S in subsets
        ]
        return sum(gains) / len(gains)

    expected = []
    for i in range(G):
        others = [j for j in range(G) if j != i]
        baseline = sum(added(j, others) for j in others) / len(others)
        expected.append(n * (added(i, range(G)) - baseline))
    found = leave_two_out_advantages(torch.tensor([g]), n)
    assert torch.allclose(found, torch.tensor([expected]), atol=1e-5)
    assert found.sum().abs() < 1e-5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_maxpos_baseline_leaves_the_gradient_of_best_of_n_unbiased(n):
    g, logits = torch.tensor([0.1, 0.5, 0.5, 0.9]).double(), randn(4)
    found = expected_gradient(lambda x: leave_two_out_advantages(x, n), g, logits, G=4)
    assert torch.allclose(found, exact_gradient(best_of(n, g), logits))


def test_maxpo_has_less_variance_than_pkpo_where_responses_are_alike():
    g = 1 + 0.1 * randn(20_000, 8)
    maxpo = leave_two_out_advantages(g, 4)
    assert maxpo.square().mean() < max_at_n_advantages(g, 4).square().mean()


# --- TEA ---


def test_tea_for_n_of_G_is_pkpo():
    g = torch.rand(50, 5, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # ties
    found = tail_extrapolated_advantages(g, 5)
    assert torch.allclose(found, max_at_n_advantages(g, 5), atol=1e-6)


@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("s", [0.3, 0.9])
def test_tea_is_exact_where_the_tail_is_a_power_law(c, s):
    """P(g <= s) = s^c: n E[(s - best of n - 1)_+] = n s^(c(n-1)+1) / (c(n-1)+1), from a group of 4.

    The best of the other 3 goes over the midpoints of its quantiles.
    """
    n, points = 32, 100_000
    best = ((torch.arange(points).double() + 0.5) / points) ** (1 / (3 * c))
    g = torch.stack([torch.full_like(best, s), best, best / 2, 0 * best], 1)
    power = c * (n - 1) + 1
    found = tail_extrapolated_advantages(g, n)[:, 0].mean()
    assert float(found) == pytest.approx(n * s**power / power, abs=1e-4)


def test_tea_is_pkpo_for_smaller_n_and_runs_beyond_G_for_both_ends():
    r, r_ref = (randn(6, size, seed=size) for size in (4, 60))
    tea, pkpo = (method(name, n=4, G=4) for name in ("tea", "pkpo"))
    assert torch.equal(tea.reward(r, r_ref, None, 0.5), pkpo.reward(r, r_ref, None, 0.5))
    best = method("tea", n=32, G=4, beta=1.0).reward(r, r_ref, None, 1.0)
    worst = method("tea", n=32, G=4, beta=1.0, procedure="won").reward(-r, -r_ref, None, 1.0)
    assert torch.allclose(best, -worst, atol=1e-6)
    assert best.max() > 0 and (best.count_nonzero(1) <= 1).all()  # of each prompt the first alone


# --- MaxRL and RS-GRPO ---


def test_maxrls_advantages_are_unbiased_for_the_first_terms_of_the_log_likelihood():
    """-sum of (1 - p)^k / k up to k = G - 1, for a reward of 0 or 1."""
    G, x, logits = 4, torch.tensor([0.0, 1, 0]).double(), randn(3)
    found = expected_gradient(mean_normalised, x, logits, G)
    series = exact_gradient(lambda pi: -sum((1 - pi[1]) ** k / k for k in range(1, G)), logits)
    assert torch.allclose(found, series)


def test_the_advantages_of_a_log_by_hand():
    found = mean_normalised(torch.tensor([[1.0, 3], [0, 0], [-1, -3]]))
    assert torch.equal(found, torch.tensor([[-0.5, 0.5], [0, 0], [-0.5, 0.5]]))
    C = torch.tensor([[0.2, 0.8]])
    rs = method("rs_grpo", transform="exp-2", beta=0.5).reward(None, None, -(-2 * C).exp(), 0.5)
    weight = (-2 * C).exp()
    assert torch.allclose(rs, (weight / weight.mean() - 1) / -2 / 0.5)


@pytest.mark.parametrize(
    "name, transform, t",
    [("maxrl", "identity", 0), ("rs_grpo", "exp5", 5.0), ("rs_grpo", "exp-10", -10.0)],
)
def test_the_optimum_of_the_log_is_the_transforms_at_the_kl_that_was_asked_for(name, transform, t):
    """The exact objective on 400 arms, C their midpoints: log E[C] or log E[e^{tC}] / t, minus
    beta KL.
    """
    C, beta = (torch.arange(400).double() + 0.5) / 400, method(name, transform=transform).beta
    ref = torch.full_like(C, -math.log(400))

    def loss(logp):
        gain = (logp + t * C).logsumexp(0) / t if t else (logp.exp() * C).sum().log()
        return (logp.exp() * (logp - ref)).sum() - gain / beta

    pi = minimise(loss, ref, steps=2000)
    assert (pi * (pi.log() - ref)).sum().item() == pytest.approx(1.0, abs=0.01)
    Phi = C if not t else math.copysign(1, t) * (t * C).exp()
    assert total_variation(pi, (Phi / theory.beta_for_kl(transform, 1.0)).softmax(0)) < 0.01


# --- A*-PO ---


def test_a2pos_log_Z_is_that_of_each_prompts_reference_samples():
    a2po, ref = method("a2po", transform="exp10", G=4), reference()
    ref = replace(ref, r_ref=ref.r_ref.round())  # of ties each prompt has its own
    batch = a2po.with_loss_inputs(rollout(), ref, 5000.0)
    R = reference_R(a2po, ref.r_ref, 5000.0)
    expected = R.exp().mean(1).log().repeat_interleave(4)
    assert torch.allclose(batch.log_Z.double(), expected, atol=1e-5)


def test_a2po_has_no_loss_at_the_tilted_policy_and_ends_there():
    """8 responses, K = 8 samples that are these, on-policy weights held fixed within a step."""
    R = reference_R(method("a2po"), randn(1, 8), 0.2)[0]
    ref = torch.full_like(R, -math.log(8))
    log_Z, tilt = log_partition(R[None])[0], (ref + R).softmax(0)
    assert qrpo_loss(tilt.log(), ref, R, log_Z) < 1e-12
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    for _ in range(1000):
        logp = logits.log_softmax(0)
        loss = (logp.detach().exp() * (R - log_Z - (logp - ref)).square()).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= gradient
    assert total_variation(logits.softmax(0), tilt) < 1e-4


def test_a2pos_expected_gradient_is_twice_the_objectives():
    """E_{y ~ pi} of the regression's, against that of E[R] - KL, on 6 arms."""
    R, logits, ref = randn(6), randn(6, seed=1), randn(6, seed=2).log_softmax(0)
    logits.requires_grad_()
    logp = logits.log_softmax(0)
    each = [qrpo_loss(*(x[i : i + 1] for x in (logp, ref, R)), log_Z=0.7) for i in range(6)]
    (found,) = torch.autograd.grad(sum(logp.detach().exp() * torch.stack(each)), logits)

    def objective(pi):
        return (pi * (R - pi.log() + ref)).sum()

    assert torch.allclose(found, -2 * exact_gradient(objective, logits.detach()))


# --- TPO ---


def test_tpo_in_random_groups_ends_at_the_tilted_policy():
    """12 responses of unequal pi_ref in groups of 3, each in several; none knows log Z."""
    R, ref = randn(12), randn(12, seed=1).log_softmax(0)
    groups = torch.stack([torch.randperm(12).view(4, 3) for _ in range(4)]).flatten(0, 1)
    pi = minimise(lambda logp: tpo_loss(logp[groups], ref[groups], R[groups]), ref, steps=500)
    assert total_variation(pi, (ref + R).softmax(0)) < 1e-4
    assert tpo_loss((ref + R)[groups], ref[groups], R[groups]).abs() < 1e-12


def test_tpos_gradient_is_the_policys_share_minus_the_targets():
    R, ref = randn(5, 4), randn(5, 4, seed=1)
    logp = randn(5, 4, seed=2).requires_grad_()
    tpo_loss(logp, ref, R).backward()
    shares = (logp - ref).detach().softmax(1) - R.softmax(1)
    assert torch.allclose(logp.grad, shares / 5)


def test_tpos_rows_are_groups_of_a_prompts_samples_with_their_own_R():
    tpo, ref = method("tpo", G=8, transform="exp10"), reference()
    rows = tpo.rows(ref, 5000.0)
    assert rows.tokens.shape == (12, 8, 5) and tpo.rows_per_step == 32  # 2 groups of 8 among 20
    R = reference_R(tpo, ref.r_ref, 5000.0).float()
    for row in range(12):
        for j in range(8):
            prompt = rows.prompt_index[row]
            same = (ref.logprobs[prompt] == rows.ref_logprobs[row, j]).all(1)
            assert same.sum() == 1 and rows.R[row, j] == R[prompt, same.nonzero()[0, 0]]
    batch = replace(rows, prompt=torch.zeros(12, 3), prompt_mask=torch.ones(12, 3))
    batch = replace(batch, mask=batch.mask * (torch.arange(5) < 2))
    assert batch.cut().tokens.shape == (12, 8, 2) and batch.cut().R.shape == (12, 8)


def test_tpos_loss_is_of_the_sums_of_its_groups_which_are_the_seeds():
    ref = reference()
    tpo, other = (method("tpo", G=8, transform="exp10", seed=seed) for seed in (3, 4))
    rows = tpo.rows(ref, 5000.0)
    assert not torch.equal(rows.tokens, other.rows(ref, 5000.0).tokens)
    logprobs = -torch.rand(12, 8, 5, generator=torch.Generator().manual_seed(0))
    expected = tpo_loss(logprobs.sum(2), rows.ref_logprobs.sum(2), rows.R)
    assert tpo.loss(logprobs, None, rows)[0] == expected


@pytest.mark.parametrize(
    "advantages, n",
    [(max_at_n_advantages, 2), (leave_two_out_advantages, 2), (tail_extrapolated_advantages, 8)],
)
def test_advantages_of_whole_numbers_are_not_cut(advantages, n):
    g = torch.tensor([[0, 0, 1, 1]])
    torch.testing.assert_close(advantages(g, n), advantages(g.float(), n))
