import copy
import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from minictrl import ppo
from minictrl.batch import Batch
from minictrl.update import Learner, all_logprobs, forward, freeze, make_learner, update


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=31,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


@pytest.fixture
def rows(model):
    generator = torch.Generator().manual_seed(1)
    lengths, prompts = (
        torch.randint(1, 9, (24,), generator=generator),
        torch.randint(1, 6, (24,), generator=generator),
    )
    mask = (torch.arange(8) < lengths[:, None]).float()
    rows = Batch(
        prompt_index=torch.arange(24),
        prompt=torch.randint(31, (24, 5), generator=generator),
        prompt_mask=(torch.arange(5) >= 5 - prompts[:, None]).long(),
        tokens=torch.randint(31, (24, 8), generator=generator),
        mask=mask,
        advantages=torch.randn(24, 8, generator=generator),
        returns=torch.randn(24, 8, generator=generator) * mask,
    )
    rows.old_logprobs = all_logprobs(model, rows, 24)
    return rows


def loss(logprobs, values, rows):
    return ppo.policy_loss(logprobs, rows.old_logprobs, rows.advantages, rows.mask)


def sgd(model):
    return Learner(model, None, torch.optim.SGD(model.parameters(), lr=0.0))


def test_the_ratio_is_exactly_one_on_the_first_minibatch(model, rows):
    """As an update reads the rows; in another order a kernel may round otherwise."""
    (piece,) = rows.pieces(torch.arange(24), 24)
    part = rows[piece].cut()
    assert torch.equal(forward(model, None, part)[0], part.old_logprobs)


def test_micro_batches_of_any_size_give_the_gradient_of_the_minibatch(model, rows):
    steps = []
    for micro_batch in (24, 7, 1):
        learner = make_learner(copy.deepcopy(model), value_head=False)
        learner.optimizer = torch.optim.SGD(learner.policy.parameters(), lr=1.0)
        update(learner, rows, loss, lr=1.0, minibatch=24, micro_batch=micro_batch, epochs=1, seed=0)
        steps.append(torch.cat([p.detach().flatten() for p in learner.policy.parameters()]))
    for step in steps[1:]:
        assert (step - steps[0]).abs().max() < 1e-5


def test_statistics_are_means_over_rows_and_an_epoch_visits_each_row_once(model, rows):
    def lengths(logprobs, values, part):
        return 0 * logprobs.sum(), {"length": part.mask.sum(1).mean()}

    learner = sgd(model)
    stats = update(learner, rows, lengths, lr=0.0, minibatch=7, micro_batch=3, epochs=3, seed=0)
    assert stats["length"] == pytest.approx(rows.mask.sum().item() / 24)
    assert learner.updates == 3 * 4


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda logprobs, values, part: logprobs.sum(), "is <class 'torch.Tensor'>"),
        (lambda logprobs, values, part: (logprobs.sum(1), {}), r"is a tensor \(7,\)"),
        (lambda logprobs, values, part: (logprobs.detach().sum(), {}), "depends on the policy"),
        (lambda logprobs, values, part: None, "return .loss, statistics"),
    ],
)
def test_a_loss_that_is_none_is_told(model, rows, wrong, told):
    with pytest.raises(ValueError, match=f"the method's loss.*{told}"):
        update(sgd(model), rows, wrong, lr=0.0, minibatch=7, micro_batch=7, epochs=1, seed=0)


def test_a_statistic_may_be_a_float(model, rows):
    def half(logprobs, values, part):
        return 0 * logprobs.sum(), {"half": 0.5}

    stats = update(sgd(model), rows, half, lr=0.0, minibatch=7, micro_batch=3, epochs=1, seed=0)
    assert stats["half"] == pytest.approx(0.5)


def test_another_seed_is_another_order(model, rows):
    orders = []
    for seed in (0, 0, 1):
        seen = []

        def first(logprobs, values, part, seen=seen):
            seen.append(int(part.prompt_index))
            return 0 * logprobs.sum(), {}

        options = dict(lr=0.0, minibatch=1, micro_batch=1, epochs=1, seed=seed)
        update(sgd(model), rows, first, **options)
        assert sorted(seen) == list(range(24))
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]


def test_an_update_is_adams_on_a_clipped_gradient_by_hand(model, rows):
    """A step with a gradient g of norm 1, then one with none: betas 0.9 and 0.95, an eps of 0.23 /
    sqrt(n), no decay.
    """
    learner = make_learner(model, value_head=False)
    weights, gradients = [], []
    for scale in (1e3, 0.0):

        def scaled(logprobs, values, part, scale=scale):
            return scale * loss(logprobs, values, part)[0], {}

        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        options = dict(lr=0.5, minibatch=24, micro_batch=24, epochs=1, seed=0)
        update(learner, rows, scaled, **options)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    g, eps = gradients[0], 0.23 / len(weights[0]) ** 0.5
    assert g.norm() == pytest.approx(1, abs=1e-4) and not gradients[1].any()
    first = 0.5 * g / (g.abs() + eps)
    second = 0.5 * (0.9 * g / 1.9) / ((0.95 / 1.95) ** 0.5 * g.abs() + eps)
    assert torch.allclose(weights[0] - weights[1], first, atol=1e-5)
    assert torch.allclose(weights[1] - weights[2], second, atol=1e-5)


def test_padding_and_order_do_not_change_log_probabilities(model, rows):
    whole, _ = forward(model, None, rows)
    for piece in rows.pieces(torch.randperm(24), 5):
        part, _ = forward(model, None, rows[piece].cut())
        assert (part - whole[piece][:, : part.shape[1]]).abs().max() < 1e-5


def test_a_pair_of_responses_in_a_row_is_two_rows(model, rows):
    pairs = Batch(
        prompt_index=torch.arange(12),
        prompt=rows.prompt[:12],
        prompt_mask=rows.prompt_mask[:12],
        tokens=torch.stack([rows.tokens[:12], rows.tokens[12:]], 1),
        mask=torch.stack([rows.mask[:12], rows.mask[12:]], 1),
    )
    logprobs, _ = forward(model, None, pairs)
    assert (logprobs[:, 0] - rows.old_logprobs[:12]).abs().max() < 1e-5


def test_the_value_head_starts_at_zero(model, rows):
    learner = make_learner(model, value_head=True)
    _, values = forward(model, learner.value_head, rows)
    assert torch.equal(values, torch.zeros_like(values))


def test_a_value_heads_rate_is_larger_by_a_constant_and_the_policys_is_its_own(model, rows):
    learner = make_learner(model, value_head=True, lr=1e-6)
    update(learner, rows, loss, lr=5e-7, minibatch=24, micro_batch=24, epochs=1, seed=0)
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    assert rates == pytest.approx([5e-7, 5e-4])


def test_the_learner_is_restored_with_critic_and_moments(model, rows):
    def value_loss(logprobs, values, rows):
        return loss(logprobs, values, rows)[0] + ppo.value_loss(values, rows.returns, rows.mask), {}

    def step(learner, seed):
        update(learner, rows, value_loss, lr=1e-2, minibatch=8, micro_batch=8, epochs=1, seed=seed)

    a = make_learner(copy.deepcopy(model), value_head=True)
    step(a, 0)
    state = copy.deepcopy(a.state())
    step(a, 1)
    b = make_learner(copy.deepcopy(model), value_head=True)
    b.restore(state)
    step(b, 1)
    for p, q in zip(
        [*a.policy.parameters(), *a.value_head.parameters()],
        [*b.policy.parameters(), *b.value_head.parameters()],
    ):
        assert torch.equal(p, q)


def test_out_of_memory_takes_smaller_micro_batches_then_says_so(model, rows):
    sizes = []

    def hungry(logprobs, values, rows, limit):
        sizes.append(len(logprobs))
        if len(logprobs) > limit:
            raise torch.OutOfMemoryError
        return loss(logprobs, values, rows)

    options = dict(lr=0.0, minibatch=24, micro_batch=24, epochs=1, seed=0)
    update(sgd(model), rows, lambda *args: hungry(*args, limit=6), **options)
    assert sizes == [24, 12, 6, 6, 6, 6]
    with pytest.raises(ValueError, match="one response at a time"):
        update(sgd(model), rows, lambda *args: hungry(*args, limit=0), **options)


@pytest.mark.parametrize("layers, blocks", [(1, {1}), (2, {0, 1}), (None, {0, 1})])
def test_only_the_top_blocks_and_the_last_norm_are_trained(model, rows, layers, blocks):
    before = copy.deepcopy(model.state_dict())
    freeze(model, 1)
    freeze(model, layers)  # a second call undoes the first
    learner = make_learner(model, value_head=False)
    update(learner, rows, loss, lr=1e-2, minibatch=24, micro_batch=24, epochs=1, seed=0)
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert {name.split(".h.")[1][0] for name in moved if ".h." in name} == {str(i) for i in blocks}
    assert not {name for name in moved if ".h." not in name} - {
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    assert "transformer.ln_f.weight" in moved


def test_an_output_embedding_of_its_own_is_not_trained_either():
    untied = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)
    )
    freeze(untied, 2)
    assert (
        not untied.lm_head.weight.requires_grad
        and untied.transformer.h[0].attn.c_attn.weight.requires_grad
    )


def test_a_value_head_learns_at_the_presets_learning_rate(model, rows):
    """A target that is linear in the hidden state, 200 updates at a policy's 1e-6."""
    policy = model.requires_grad_(False)
    policy.transformer.ln_f.requires_grad_(True)
    learner = make_learner(policy, value_head=True, lr=1e-6)
    truth = torch.nn.Linear(policy.config.hidden_size, 1)
    target = forward(policy, truth, rows)[1].detach()
    rows = dataclasses.replace(rows, returns=target)

    def value_loss(logprobs, values, rows):
        return ppo.value_loss(values, rows.returns, rows.mask), {}

    for seed in range(200):
        options = dict(minibatch=24, micro_batch=24, epochs=1, seed=seed)
        update(learner, rows, value_loss, lr=1e-6, **options)
    _, values = forward(policy, learner.value_head, rows)
    assert ppo.explained_variance(values, target, rows.mask) > 0.5
