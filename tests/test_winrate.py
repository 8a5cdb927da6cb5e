"""minictrl/winrate.py against enumeration of subsets and orders, the theory, and a bootstrap."""

from itertools import combinations, permutations
from statistics import mean

import pytest
import torch

from minictrl import theory
from minictrl.procedures import PROCEDURES, get_procedure
from minictrl.procedures.rewind import threshold_of
from minictrl.winrate import kept_scores, win_rate

SCORES = ("select", "judge", "select_ref", "judge_ref")


def scores(*shape, seed=0, levels=4):
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).float()


def kept(select, drawn, procedure, threshold):
    """The indices that the procedure may end with, from the drawn ones, equally likely."""
    if procedure == "rewind":
        return [next((i for i in drawn if select[i] >= threshold), drawn[-1])]
    best = (max if procedure == "bon" else min)(select[i] for i in drawn)
    return [i for i in drawn if select[i] == best]


def own_rewind(select, n, threshold):
    """What rewind keeps of the samples that its threshold is from: E[q^N] for q of a Beta law; of
    one draw that draw."""
    if n == 1:
        return [1 / len(select)] * len(select)
    below = int((select < threshold).sum())
    q = torch.distributions.Beta(below, len(select) + 1 - below) if below else None
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    density = q.log_prob(grid).exp() if below else torch.zeros_like(grid)
    fails = (density * grid**n).mean().item()
    tied = (select == threshold).any()  # else the threshold is just above a sample: no fair draw
    fair = (select < threshold).double()
    if below > 1 and not tied:  # one sample's worth, of those that tie there
        at = select == select[select < threshold].max()
        fair -= at / at.sum()
    shares = torch.where(select < threshold, fails * fair / fair.sum(), 0.0)
    return (shares + (select >= threshold) * (1 - fails) / (len(select) - below)).tolist()


@pytest.mark.parametrize("n", [2, 8])
def test_rewind_weighs_samples_that_tie_as_if_their_ties_were_broken_at_random(n):
    """Four of 32 are above the threshold, and those below it tie: one of them is no fair draw."""
    select = torch.tensor([[2.0] * 4 + [1.0] * 27 + [0.0]])
    equal = torch.tensor([[1.0] * 4 + [0.0] * 28])
    noise = torch.Generator().manual_seed(0)
    for r in (select, equal):
        broken = r + 1e-3 * torch.rand(4000, 32, generator=noise)
        expected = get_procedure("rewind").weights(broken, n).mean(0)
        found = get_procedure("rewind").weights(r, n)[0]
        for value in r.unique():
            at = r[0] == value
            assert found[at].sum().item() == pytest.approx(expected[at].sum().item(), abs=2e-3)


@pytest.mark.parametrize("procedure", ["bon", "won", "rewind"])
@pytest.mark.parametrize("n", [1, 3])
def test_win_rate_is_the_mean_over_all_subsets(procedure, n):
    # few levels: ties everywhere
    select, judge, select_ref, judge_ref = (scores(3, 6, seed=s) for s in range(4))
    draw = permutations if procedure == "rewind" else combinations
    wins = []
    for x in range(3):
        threshold = threshold_of(select_ref)[x]
        ours = [kept(select[x], drawn, procedure, threshold) for drawn in draw(range(6), n)]
        theirs = [kept(select_ref[x], drawn, procedure, threshold) for drawn in draw(range(6), n)]
        p, q = (
            [sum((i in k) / len(k) for k in each) / len(each) for i in range(6)]
            for each in (ours, theirs)
        )
        if procedure == "rewind":  # its threshold is one of these samples
            q = own_rewind(select_ref[x], n, threshold)
        wr = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0  # noqa: E731
        wins.append(
            sum(p[i] * q[j] * wr(judge[x, i], judge_ref[x, j]) for i in range(6) for j in range(6))
        )
    assert win_rate(select, judge, select_ref, judge_ref, procedure, n)[0] == pytest.approx(
        mean(wins), abs=1e-6 if procedure == "rewind" else 1e-12
    )


@pytest.mark.parametrize("procedure", ["standard", "bon", "won", "rewind"])
@pytest.mark.parametrize("M, n", [(32, 32), (64, 32), (16, 2)])
def test_pi_ref_against_itself_wins_one_half(procedure, M, n):
    u, v = torch.rand(2, 50_000, M, generator=torch.Generator().manual_seed(0))
    win, stderr = win_rate(u, u, v, v, procedure, n)
    assert stderr < 2.5e-3 and win == pytest.approx(0.5, abs=4 * stderr)


def test_counts_of_subsets_may_be_larger_than_a_float():
    u = torch.rand(1, 2100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert win_rate(u, u, u, u, "bon", 256)[0] == pytest.approx(0.5)
    best = get_procedure("bon").weights(u, 256)[0, u.argmax()]
    assert best == pytest.approx(256 / 2100)


def test_one_draw_is_the_standard_win_rate_and_all_draws_keep_the_extremes():
    a, b = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    standard = win_rate(a, a, b, b, "standard", 99)[0]
    assert standard == pytest.approx((a[:, :, None] > b[:, None]).double().mean().item())
    assert (
        win_rate(a, a, b, b, "bon", 1)[0]
        == win_rate(a, a, b, b, "won", 1)[0]
        == win_rate(a, a, b, b, "rewind", 1)[0]
        == pytest.approx(standard)
    )
    assert win_rate(a, a, b, b, "bon", 8)[0] == pytest.approx(
        (a.amax(1) > b.amax(1)).double().mean().item()
    )
    assert win_rate(a, a, b, b, "won", 8)[0] == pytest.approx(
        (a.amin(1) > b.amin(1)).double().mean().item()
    )


@pytest.mark.parametrize("procedure, n", [("standard", 1), ("bon", 4), ("won", 4), ("rewind", 32)])
def test_samples_of_a_known_policy_have_the_theorys_win_rate(procedure, n):
    """4 standard errors; for rewind 1 point more, because its threshold is estimated from 64
    samples.
    """
    u, v = torch.rand(2, 2000, 64, generator=torch.Generator().manual_seed(0))
    u = u ** (1 / 3)  # the log transform at beta 1/2
    win, stderr = win_rate(u, u, v, v, procedure, n)
    exact = theory.tradeoff("log", procedure, n, [0.5])[1][0]
    assert win == pytest.approx(exact, abs=4 * stderr + (0.01 if procedure == "rewind" else 0))


def test_standard_error_is_the_bootstraps_over_prompts():
    """2,000 resamples know a standard deviation to 1.6 %: 4 of those."""
    a, b = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    wins = torch.tensor([win_rate(a[[i]], a[[i]], b[[i]], b[[i]], "bon", 2)[0] for i in range(50)])
    resamples = torch.randint(50, (2000, 50), generator=torch.Generator().manual_seed(1))
    bootstrap = wins[resamples].mean(1).std() * (50 / 49) ** 0.5
    assert win_rate(a, a, b, b, "bon", 2)[1] == pytest.approx(bootstrap.item(), rel=0.064)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_weights_are_a_distribution(procedure):
    select = scores(5, 12)
    for select_ref in (scores(5, 12, seed=1).double(), None):
        weights = get_procedure(procedure).weights(select.double(), 4, select_ref)
        assert weights.sum(1).tolist() == pytest.approx([1] * 5) and (weights >= 0).all()


def test_rewinds_threshold_is_just_above_the_sample_whose_level_is_85_per_cent():
    """Of 19 samples the k-th is at k / 20 on average."""
    threshold = threshold_of(torch.arange(19.0, 0, -1)[None]).item()
    assert 17 < threshold < 17.001
    assert threshold_of(torch.tensor([[0.0] * 10 + [1.0] * 9])) == 1  # which ties


def test_two_samples_are_enough_to_rewind():
    weights = get_procedure("rewind").weights(torch.tensor([[0.0, 1]]).double(), 2)
    assert weights.tolist() == [pytest.approx([1 / 6, 5 / 6])]  # E[q^2] of Beta(1, 2)


def test_selection_and_judge_may_disagree():
    u, v = torch.rand(2, 200, 16, generator=torch.Generator().manual_seed(0))
    assert win_rate(u, -u, v, -v, "bon", 8)[0] == pytest.approx(
        1 - win_rate(u, u, v, v, "bon", 8)[0]
    )


@pytest.mark.parametrize(
    "change, procedure, n, message",
    [
        ({}, "bon", 7, "n 7 with 6 samples per prompt.*draw 7 or more"),
        (
            {"select_ref": torch.zeros(3, 8), "judge_ref": torch.zeros(3, 8)},
            "rewind",
            7,
            "n 7 with 6 samples per prompt",
        ),
        ({}, "beam", 2, "unknown procedure 'beam'; known: standard, bon, won, rewind"),
        ({}, "won", 0, "n 0"),
        ({"judge": torch.zeros(3, 5)}, "bon", 2, r"judge \(3, 5\)"),
        (dict.fromkeys(SCORES, torch.zeros(0, 4)), "bon", 2, "with one P of at least 1"),
        (
            {"select_ref": torch.zeros(2, 6), "judge_ref": torch.zeros(2, 6)},
            "bon",
            2,
            r"select_ref \(2, 6\)",
        ),
        (
            {"judge_ref": torch.full((3, 6), torch.nan)},
            "bon",
            2,
            "judge_ref has 18 scores that are not finite",
        ),
    ],
)
def test_bad_scores_are_named(change, procedure, n, message):
    given = dict.fromkeys(SCORES, torch.zeros(3, 6)) | change
    with pytest.raises(ValueError, match=message):
        win_rate(*given.values(), procedure, n)


def test_what_is_kept_of_a_verifiers_scores_is_pass_at_n():
    """1 - C(wrong, N) / C(M, N) for Best-of-N, C(right, N) / C(M, N) for Worst-of-N."""
    right = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0], [0] * 8])
    best = kept_scores(right, right, "bon", 3)[0]
    worst = kept_scores(1 - right, right, "won", 3)[0]
    torch.testing.assert_close(best, torch.tensor([1 - 20 / 56, 0.0]).double())
    torch.testing.assert_close(worst, torch.tensor([20 / 56, 1.0]).double())
    assert kept_scores(right, 1 - right, "standard", 1)[1].tolist() == [0.75, 1.0]
