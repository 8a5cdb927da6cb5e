"""What a step draws and trains on: seeds, orders, learning rates, statistics, prefix rewards."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_methods import method, rollout

import train
from minictrl import evaluation
from minictrl.baselines import prefix_rewards
from minictrl.budget import Budget
from minictrl.config import CALIBRATION, TEST, TEST_REF, Config
from minictrl.reference import Reference
from minictrl.rollout import (
    batch_of,
    check_sampler,
    indices_of_step,
    reference_key,
    reference_samples,
    rollout_stats,
    sample_and_score,
    score,
    shown_responses,
)
from minictrl.task import load_task
from minictrl.update import schedule


@pytest.fixture(scope="module")
def task():
    return load_task(Config(prompts=3, max_new_tokens=6).resolved(), "train")


def test_no_two_draws_share_a_seed_and_no_two_runs():
    draws = [CALIBRATION, TEST_REF, TEST, *range(1, 1001)]
    configs = [Config(seed=seed) for seed in range(5)]
    seeds = [config.seed_for(draw) for config in configs for draw in draws]
    assert len(set(seeds)) == len(seeds)


def test_a_pass_visits_each_item_once_in_an_order_of_its_own():
    passes = []
    for seed in range(2):
        visited = torch.cat([indices_of_step(step, 12, 5, seed) for step in range(5)])[:24]
        passes += visited.tolist()[:12], visited.tolist()[12:]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4  # of two seeds and two epochs
    assert indices_of_step(0, 3, 8, 0).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_the_learning_rate_warms_up_for_5_steps_and_falls_to_0():
    found = [schedule(step, 10, train.WARMUP) for step in range(10)]
    assert found == pytest.approx([0.2, 0.36, 0.48, 0.56, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_an_update_has_the_settings_of_its_run_and_step(monkeypatch):
    monkeypatch.setattr("minictrl.update.update", lambda *args, **options: options)
    sizes = dict(minibatch=48, micro_batch=7)
    config = Config(**sizes, lr=1e-3, steps=10, ppo_epochs=3, seed=2)
    found = train.run_update(None, None, method("ppo"), 6, config)
    expected = sizes | {"epochs": 3, "seed": config.seed_for(7), "lr": pytest.approx(4e-4)}
    assert found == expected


def test_each_text_is_scored_once_with_its_own_prompt():
    asked = []

    def scorer(prompts, texts):
        asked.extend(zip(prompts, texts))
        return torch.tensor([float(f"{len(x)}{len(y)}") for x, y in zip(prompts, texts)])

    found = score(scorer, ["a", "bb"], [["x", "x", "yy"], ["x", "zzz", "zzz"]])
    assert found.tolist() == [[11, 11, 12], [21, 23, 23]]
    assert asked == [("a", "x"), ("a", "yy"), ("bb", "x"), ("bb", "zzz")]


def test_a_rollouts_statistics_are_means_over_responses_and_tokens():
    batch, (r, C_hat) = rollout(), torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = rollout_stats(batch, r, C_hat)
    entropy = -batch.old_logprobs[batch.mask.bool()].mean()
    k1 = (batch.old_logprobs - batch.ref_logprobs).sum(1).mean()
    means = {"reward": r.mean(), "C_hat": C_hat.mean(), "entropy": entropy, "kl_ref": k1}
    for name, mean in means.items():
        assert found[name] == pytest.approx(mean.item())


def test_a_larger_K_goes_on_with_the_draw_and_another_seed_draws_others(task, tmp_path):
    def draw(K, seed=0, cache="a"):
        return reference_samples(task, K, seed=seed, cache=str(tmp_path / cache), name="").tokens

    few, more, whole = draw(4), draw(9), draw(9, cache="b")
    assert torch.equal(more, whole) and torch.equal(few, whole[:, :4])
    assert not torch.equal(draw(4, seed=1), few)


def test_another_seed_length_or_reward_model_is_another_key(task):
    longer = replace(task, max_new_tokens=7)
    other = replace(task, reward=replace(task.reward, digest="another"))
    keys = {reference_key(each, 0) for each in (task, longer, other)} | {reference_key(task, 1)}
    assert len(keys) == 4


def test_shown_responses_are_the_first_of_each_prompt_with_its_reward(task):
    index = torch.tensor([2, 0, 1])
    samples, r = sample_and_score(task, task.policy, index, num_samples=4, seed=0)
    shown = shown_responses(task, index, samples.texts, r)
    prompts = [task.texts[i] for i in (2, 0, 1)]
    assert shown == list(zip(prompts, [texts[0] for texts in samples.texts], r[:, 0].tolist()))


def test_a_functions_prefix_rewards_are_those_of_the_text_so_far(task, tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, texts): return [len(x) + 1000 * len(y) for x, y in zip(prompts, texts)]"
    )
    own = Config(prompts=3, max_new_tokens=6, reward=f"{tmp_path}/f.py:f").resolved()
    task = load_task(own, "train")
    samples, _ = sample_and_score(task, task.policy, [0, 1, 2], num_samples=2, seed=0)
    found = prefix_rewards(task, batch_of(task, torch.arange(3), samples), 3).view(3, 2, 6)
    lengths = samples.mask.sum(-1)
    for p, g, t in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(6)):
        text = task.tokenizer.decode(samples.tokens[p, g, :t]) if t < lengths[p, g] else ""
        assert found[p, g, t] == len(task.prompts[p]) + 1000 * len(text)


def test_a_step_draws_its_own_prompts_and_is_worth_R_at_the_beta_that_follows_its_kl(
    task, monkeypatch, tmp_path
):
    """Seven steps of a policy that stays pi_ref."""
    ppo, seen, logged = method("ppo", transform="exp-10", batch=2, G=4, K=8, seed=3), [], []
    keep = lambda self, *given: seen.append(given)  # noqa: E731
    monkeypatch.setattr(type(ppo), "with_loss_inputs", keep, raising=False)
    of_the_method = {"kl_ref": 9.0}  # which takes no column's place
    monkeypatch.setattr(train, "run_update", lambda *args: of_the_method)
    training = SimpleNamespace(
        learner=None,
        tracker=None,
        budget=Budget(1.0, ppo.beta_for),
        steps=lambda: range(7),
        log=lambda batch, stats: logged.append(stats),
    )
    config = replace(ppo.config, baseline="loo")
    reference = reference_samples(task, 8, seed=0, cache=str(tmp_path), name="")
    train.online(training, config, task, ppo, reference, task.policy)
    budget = Budget(1.0, ppo.beta_for)
    for step, (batch, drawn, beta) in enumerate(seen):
        assert beta == (budget.follow(logged[step]["kl_ref"]) if step >= 5 else budget.beta)
        index, seed = indices_of_step(step, 3, 2, 3), config.seed_for(step + 1)
        expected = reference[index]
        assert torch.equal(drawn.r_ref, expected.r_ref)
        assert torch.equal(batch.prompt_index, index.repeat_interleave(4))
        if step not in (0, 6):
            continue
        _, r = sample_and_score(
            task, task.policy, index, num_samples=4, seed=seed, reference=expected
        )
        Phi_C = ppo.Phi.of_rewards(r, drawn.r_ref)
        R = ppo.Phi.in_nats(Phi_C, beta, drawn.r_ref).flatten().float()
        torch.testing.assert_close(batch.R, R)
        assert logged[step]["Phi"] == pytest.approx(Phi_C.mean().item())
    assert len(seen) == 7 and seen[-1][2] != seen[0][2]


def test_an_offline_step_trains_on_its_own_rows_at_the_runs_beta(task, monkeypatch, tmp_path):
    """And its last measures the KL, by a draw of its own."""
    qrpo = method("qrpo", transform="exp10", batch=2, G=4, K=8, seed=3, steps=3)
    seen, draws, logged = [], [], []
    monkeypatch.setattr(train, "run_update", lambda learner, batch, *_: seen.append(batch) or {})
    end = lambda *given: draws.append(given[4]) or (None, None, {"kl_ref": 0.1})  # noqa: E731
    monkeypatch.setattr(train, "draw_rollout", end)
    training = SimpleNamespace(
        learner=None,
        budget=Budget(None, None, beta=0.7 * qrpo.beta),
        steps=lambda: range(3),
        log=lambda batch, stats: logged.append(stats),
    )
    reference = reference_samples(task, 8, seed=0, cache=str(tmp_path), name="")
    train.offline(training, qrpo.config, task, qrpo, reference, task.policy)
    rows = qrpo.rows(reference, 0.7 * qrpo.beta)
    for step, batch in enumerate(seen):
        index = indices_of_step(step, 24, 8, 3)
        assert torch.equal(batch.R, rows.R[index]) and torch.equal(batch.tokens, rows.tokens[index])
        assert torch.equal(batch.prompt, task.ids[batch.prompt_index])
    assert draws == [3] and logged == [{}, {}, {"kl_ref": 0.1}]


def test_a_response_that_is_a_reference_sample_has_its_reward_in_training_and_evaluation(
    task, monkeypatch, tmp_path
):
    reference = reference_samples(task, 4, seed=0, cache=str(tmp_path), name="")
    moved = replace(reference, r_ref=reference.r_ref + 9)
    draw = dict(num_samples=4, seed=0)  # the same
    assert torch.equal(
        sample_and_score(task, task.policy, [0, 1, 2], **draw, reference=moved)[1], moved.r_ref
    )
    monkeypatch.setattr(Reference, "with_known_rewards", lambda self, r, *_: 0 * r + 9)
    config = Config(G=2, max_new_tokens=6, cache=str(tmp_path)).resolved()
    _, _, r, _ = train.draw_rollout(task, task.policy, torch.arange(3), reference, 0, config)
    pi, _, _ = evaluation.draw_both(task, task.policy, None, config, 2)
    assert (r == 9).all() and (pi.scores["reward"] == 9).all()


def test_the_sampler_is_checked_on_the_longest_samples(task, tmp_path):
    reference = reference_samples(task, 20, seed=0, cache=str(tmp_path), name="")
    check_sampler(task, reference)
    lengths, logprobs = task.mask.sum(1)[:, None] + reference.mask.sum(-1), reference.logprobs
    assert lengths.min() < lengths.max()
    wrong = torch.where((lengths == lengths.max())[..., None], logprobs - 1, logprobs)
    with pytest.raises(ValueError, match="nats a token from"):
        check_sampler(task, replace(reference, logprobs=wrong))
