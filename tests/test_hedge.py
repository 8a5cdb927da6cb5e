"""The study `hedge` where its answer is known: a judge that turns against the very best."""

import pytest
import torch

from minictrl.studies import beyond

TURN = 0.95  # of the reward's uniform law: above it the judge finds every response the worst


def win_rate(n: int) -> float:
    """Best-of-n of pi_ref over one response of it, by that judge, in closed form.

    A reward u has density n u^(n-1). Below TURN it beats those below u and those above TURN; above
    TURN only those above u.
    """
    below = (1 - TURN) * TURN**n + n / (n + 1) * TURN ** (n + 1)
    above = 1 - TURN**n - n / (n + 1) * (1 - TURN ** (n + 1))
    return below + above


def test_the_judges_peak_is_found_where_it_is_and_the_rewards_is_at_the_end():
    u = torch.rand(2000, 128, generator=torch.Generator().manual_seed(0))
    both = {"reward": u, "judge": torch.where(u < TURN, u, -u)}
    pi, pi_ref = beyond.split_samples(both)
    rows = beyond.best_of_curve("pi_ref", pi, pi_ref, 32)
    assert [row["n"] for row in rows] == 2 * [1, 2, 4, 8, 16, 32]
    for row in rows:  # 4 standard errors over prompts
        n = row["n"]
        exact = n / (n + 1) if row["scorer"] == "reward" else win_rate(n)
        assert row["win_rate"] == pytest.approx(exact, abs=4 * row["stderr"])
    peak = max(rows[6:], key=lambda row: win_rate(row["n"]))
    assert peak["n"] == 4 and peak["peak_share"] > 0.99
    assert rows[5]["peak_share"] == 1.0


def test_a_peak_that_the_prompts_do_not_agree_on_is_shared_out():
    wins = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    shares = beyond.peak_shares(wins)
    # the second of two columns wins where at least two of three resampled prompts prefer it
    assert shares[1] == pytest.approx(20 / 27, abs=4 * (20 / 27 * 7 / 27 / 1000) ** 0.5)
    assert sum(shares) == pytest.approx(1)
