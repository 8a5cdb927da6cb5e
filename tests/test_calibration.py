"""minictrl/calibration.py: Eq. 12 and Lemmas 2 to 4."""

import pytest
import torch

from minictrl.calibration import calibrated_reward


def rewards(*shape, seed=0, ties=False):
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (2 * draws).round() if ties else draws


@pytest.mark.parametrize("ties", [False, True])
def test_calibration_is_eq_12_as_a_double_loop(ties):
    r, r_ref = rewards(4, 7, ties=ties), rewards(4, 9, seed=1, ties=ties)
    C_hat = calibrated_reward(r, r_ref)
    for x in range(4):
        for y in range(7):
            wr = sum(1.0 if r[x, y] > z else 0.5 if r[x, y] == z else 0.0 for z in r_ref[x])
            assert C_hat[x, y].item() == pytest.approx(wr / 9, abs=1e-6)
    assert torch.equal(calibrated_reward(r[:, 3], r_ref), C_hat[:, 3])


def test_increasing_maps_of_the_reward_change_nothing():
    r, r_ref = rewards(5, 20, ties=True), rewards(5, 30, seed=1, ties=True)
    scale = torch.tensor([1.0, 2, 3, 4, 5])[:, None]  # a map of its own for each prompt
    assert torch.equal(
        calibrated_reward(r, r_ref), calibrated_reward((scale * r).exp(), (scale * r_ref).exp())
    )


def test_order_is_kept_with_ties():
    r = rewards(1, 50, ties=True)
    by_reward = calibrated_reward(r, rewards(1, 40, seed=1, ties=True))[0][r[0].argsort()]
    assert (by_reward.diff() >= 0).all()


def test_reference_samples_are_uniform():
    """C_hat of a fresh draw is uniform on k/K: chi-square with 10 degrees of freedom, a false
    failure once in 1e4.
    """
    C_hat = calibrated_reward(rewards(20_000), rewards(20_000, 10, seed=1))
    counts = torch.bincount((10 * C_hat).round().long(), minlength=11)
    assert ((counts - 20_000 / 11) ** 2 / (20_000 / 11)).sum() < 35.6


def test_callers_tensors_stay_and_integers_are_fine():
    r, r_ref = torch.tensor([2, 0]), torch.tensor([[3, 1, 2], [5, 5, 5]])
    before = r_ref.clone()
    assert calibrated_reward(r, r_ref).tolist() == pytest.approx([0.5, 0.0])
    assert torch.equal(r_ref, before)
    assert torch.equal(calibrated_reward(r.tolist(), r_ref.tolist()), calibrated_reward(r, r_ref))


@pytest.mark.parametrize(
    "r, r_ref, message",
    [
        (torch.zeros(3), torch.zeros(2, 5), r"r \(3,\) and r_ref \(2, 5\)"),
        (torch.zeros(2), torch.zeros(2, 0), "K at least 1"),
        (torch.zeros(0), torch.zeros(0, 5), "B and K at least 1"),
        (torch.zeros(2), torch.zeros(2), "own row"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2, 5), "r has 1 rewards that are not finite"),
        (torch.zeros(2), torch.full((2, 5), torch.inf), "r_ref has 10 rewards"),
    ],
)
def test_bad_rewards_are_named(r, r_ref, message):
    with pytest.raises(ValueError, match=message):
        calibrated_reward(r, r_ref)


def test_large_whole_numbers_do_not_tie():
    r, r_ref = torch.tensor([[2**24 + 1]]), torch.tensor([[2**24]])
    assert calibrated_reward(r, r_ref).item() == 1.0
