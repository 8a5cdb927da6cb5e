"""What an evaluation makes of its samples: KL, the table, its files, and how it is printed."""

from types import SimpleNamespace

import pytest
import torch
from test_update import model, rows  # noqa: F401

from minictrl import evaluation, results, theory, winrate
from minictrl.calibration import calibrated_reward, leave_one_out_calibration
from minictrl.config import Config
from minictrl.evaluation import Scored
from minictrl.lm.logprobs import response_logits
from minictrl.sampling import Samples
from minictrl.transforms import get_transform


def scored(P, M, seed, levels=None):
    """Random scores of responses that are named by their prompt and number."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, P, M, generator=generator)
    scores = scores if levels is None else (levels * scores).floor()
    texts = [[f"{seed} {p} {m}" for m in range(M)] for p in range(P)]
    return Scored(texts, dict(zip(("reward", "judge"), scores)))


def test_the_kl_of_a_response_is_that_of_its_tokens_distributions(model, rows):  # noqa: F811
    """sum over tokens and the vocabulary of pi (log pi - log pi_ref), prompt by prompt."""
    torch.manual_seed(1)
    ref = type(model)(model.config).eval()
    with torch.no_grad():
        found = evaluation.kl_of(model, ref, rows)
        for i in range(len(rows)):
            inputs = rows.prompt[[i]], rows.prompt_mask[[i]], rows.tokens[[i]], rows.mask[[i]]
            p, q = (response_logits(each, *inputs)[0].log_softmax(-1) for each in (model, ref))
            assert found[i] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_a_prompts_kl_is_the_mean_of_its_first_16_responses(monkeypatch):
    tokens = 100 * torch.arange(3)[:, None, None] + torch.arange(20)[:, None]  # (3, 20, 1)
    samples = Samples(tokens, torch.ones(3, 20, 1), torch.zeros(3, 20, 1), [])
    task = SimpleNamespace(ids=torch.zeros(3, 2), mask=torch.ones(3, 2), policy=None)
    monkeypatch.setattr(evaluation, "kl_of", lambda policy, ref, batch: batch.tokens[:, 0].float())
    assert evaluation.kl_by_prompt(None, task, samples, 7).tolist() == [7.5, 107.5, 207.5]


def test_a_row_is_the_win_rate_by_its_scorer_of_what_the_reward_selects():
    pi, pi_ref = scored(5, 8, 0), scored(5, 8, 1)
    kls, cases = torch.tensor([0.5, 0.75, 1, 1.25, 1.5]), [("standard", 1), ("bon", 4)]
    Phi = get_transform("exp10")
    table, wins = evaluation.table_of(Config(K=20).resolved(), pi, pi_ref, kls, Phi, cases)
    assert [(row["procedure"], row["n"]) for row in table[::2]] == cases
    for row in table:
        case, name = (row["procedure"], row["n"]), row["scorer"]
        ours, theirs = pi.scores, pi_ref.scores
        each = winrate.win_rates(ours["reward"], ours[name], theirs["reward"], theirs[name], *case)
        assert torch.equal(wins[f"{case[0]}-{case[1]}-{name}"], each)
        assert (row["win_rate"], row["stderr"]) == winrate.mean_stderr(each)
        assert (row["kl"], row["kl_stderr"]) == winrate.mean_stderr(kls)
        assert row["theory"] == theory.at_kl(Phi, row["kl"], *case, K=20)
        assert row["optimal"] == theory.optimal_win_rate(row["kl"], *case)


def test_where_rewards_tie_the_theory_is_that_of_pi_refs_levels():
    pi, pi_ref = scored(6, 20, 0, levels=3), scored(6, 20, 1, levels=3)
    Phi, kls = get_transform("exp10"), torch.full((6,), 0.3)
    [row, _], _ = evaluation.table_of(Config().resolved(), pi, pi_ref, kls, Phi, [("bon", 2)])
    levels = theory.levels_of(pi_ref.scores["reward"])
    assert row["theory"] == theory.at_kl(Phi, row["kl"], "bon", 2, levels=levels)
    assert row["optimal"] is None and "pass" not in row


def test_of_a_verifier_the_table_has_pass_at_n():
    """3 of 4 right, and 1 of 4."""
    pi, pi_ref = (
        Scored([], {"reward": torch.tensor([x])}) for x in ([1.0, 1, 0, 1], [0, 0, 1.0, 0])
    )
    cases = [("standard", 1), ("bon", 2), ("won", 2)]
    table, _ = evaluation.table_of(Config().resolved(), pi, pi_ref, torch.ones(1), None, cases)
    found = [(row["pass"], row["pass_ref"]) for row in table]
    assert found == [pytest.approx(x) for x in ((3 / 4, 1 / 4), (1, 1 / 2), (1 / 2, 0))]


def test_the_samples_are_the_first_and_the_best_of_the_first_four():
    pi, pi_ref = scored(3, 6, 0), scored(3, 6, 1)
    pi.scores["reward"][:, 5] = 2.0  # the best of all is none of the first four
    C_hat = evaluation.C_hats(pi, pi_ref)
    r_ref = pi_ref.scores["reward"]
    assert torch.equal(C_hat["C_hat"], calibrated_reward(pi.scores["reward"], r_ref))
    assert torch.equal(C_hat["C_hat_reference"], leave_one_out_calibration(r_ref))
    for i, row in enumerate(evaluation.sample_rows(["a", "b", "c"], pi, pi_ref, C_hat)):
        assert (row["prompt"], row["response"], row["reference"]) == (
            "abc"[i],
            f"0 {i} 0",
            f"1 {i} 0",
        )
        for end, policy in (("", pi), ("_reference", pi_ref)):
            best = int(policy.scores["reward"][i, :4].argmax())
            assert row[f"best{end}"] == policy.texts[i][best]
            assert row[f"best_C_hat{end}"] == C_hat[f"C_hat{end}"][i, best]
            assert row[f"C_hat{end}"] == C_hat[f"C_hat{end}"][i, 0]
            assert row[f"judge{end}"] == policy.scores["judge"][i, 0]


def test_a_table_is_printed_in_per_cent():
    row = {"procedure": "bon", "n": 4, "scorer": "reward", "win_rate": 0.6123, "stderr": 0.0104}
    row |= {"theory": 0.65, "optimal": None, "kl": 0.9876, "kl_stderr": 0.0213}
    row |= {"prompts": 200, "samples": 32, "pass": 0.5, "pass_ref": 0.25}
    judge = row | {"scorer": "judge", "win_rate": 0.55, "stderr": 0.02}
    head, _, line = results.printed([row, judge]).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["bon", "4", "61.2 ± 1.0", "55.0 ± 2.0", "65.0", "–", "50.0", "25.0"]
    found = results.headline(Config(kl=1.0), "test", row)
    assert found == "200 test prompts, 32 responses each, KL 0.988 ± 0.021 nats (--kl 1)"
