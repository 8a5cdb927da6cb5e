"""What the public functions say about numbers that they can't use, in one place."""

import numpy as np
import pytest
import torch

from minictrl import checks, ppo, theory, winrate
from minictrl.calibration import calibrated_reward
from minictrl.checks import unchanged
from minictrl.transforms import get_transform

SCORES = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "value",
    [0, -1, 1_000_001, 2.0, True, None, "4", np.float32(4), torch.tensor(1.5), np.array([1, 2])],
)
def test_what_is_no_count_is_refused(value):
    with pytest.raises(
        ValueError, match=r"n .*: must be a whole number; give one from 1 to 1000000"
    ):
        checks.whole("n", value)


@pytest.mark.parametrize("value", [4, np.int64(4), torch.tensor(4)])
def test_a_count_is_an_int(value):
    assert type(checks.whole("n", value)) is int


@pytest.mark.parametrize("value", ["1", b"1", True, None, [1.0], float("nan"), 1j, 10**400])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="kl .*: must be a number"):
        theory.beta_for_kl("exp10", value)


@pytest.mark.parametrize("value", [None, "a", ["a"], [[1.0], [1.0, 2.0]], SCORES * 1j, {1: 2}])
def test_what_is_no_tensor_of_numbers_is_refused(value):
    rule = "must be real numbers, in a tensor, an array or a list"
    for call in (
        lambda: calibrated_reward(value, SCORES),
        lambda: calibrated_reward(SCORES, value),
        lambda: winrate.win_rate(SCORES, SCORES, SCORES, value, "bon", 4),
        lambda: theory.win_rate(value, "bon", 4),
        lambda: theory.tradeoff("exp10", "bon", 4, value),
        lambda: get_transform("exp10")(value),
    ):
        with pytest.raises(ValueError, match=rule):
            call()


def test_arrays_and_lists_count_as_tensors_do():
    r, r_ref = SCORES[:, :2].double(), SCORES.double()
    expected = calibrated_reward(r, r_ref)
    backwards = r_ref.numpy()[:, ::-1]
    assert torch.equal(calibrated_reward(r.numpy(), backwards), expected)
    assert torch.equal(calibrated_reward(r.tolist(), r_ref.tolist()), expected)
    assert get_transform("identity")(0.5) == 0.5


def test_a_list_ties_with_the_float32_tensor_beside_it():
    assert calibrated_reward([0.1], torch.tensor([[0.1] * 4])).item() == 0.5
    wins = winrate.win_rate(*[torch.full((2, 4), 0.1)] * 2, *[[[0.1] * 4] * 2] * 2, "bon", 2)
    assert wins[0] == 0.5
    rows = [torch.tensor([0.1, 0.2], requires_grad=True)]
    assert torch.equal(checks.real("r", rows), torch.tensor([[0.1, 0.2]]))


def test_an_array_of_the_other_byte_order_is_read():
    assert checks.real("r", np.array([1.5, 3], ">f8")).tolist() == [1.5, 3]


def test_betas_may_come_one_by_one():
    expected = theory.tradeoff("exp10", "bon", 4, [3000.0, 5000.0])
    for betas in (iter([3000.0, 5000.0]), {3000.0: 0, 5000.0: 0}.keys()):
        assert np.array_equal(theory.tradeoff("exp10", "bon", 4, betas), expected)


def test_a_tensor_that_others_read_stays_as_it_is():
    r_ref = torch.ones(2, 3)
    with unchanged("--method mine", r_ref=r_ref):
        r_ref = r_ref - 1  # another tensor
    with pytest.raises(ValueError, match="--method mine changes r_ref in place"):
        with unchanged("--method mine", r_ref=r_ref):
            r_ref -= 1


def test_no_rounding_makes_a_tie():
    """Python's floats are float64, and so are whole numbers as far as it holds them."""
    r_ref = [[1e8, 1e8 + 2]]
    assert calibrated_reward([1e8 + 1], r_ref).item() == 0.5
    assert calibrated_reward([1e8 + 1], [[1e8, 1e8]]).item() == 1
    assert calibrated_reward([2**24 + 1], torch.tensor([[2.0**24]])).item() == 1
    assert calibrated_reward([70_000], torch.tensor([[2048.0]]).half()).item() == 1
    whole = torch.tensor([2**53 - 1]), torch.tensor([[2**53 - 2]])
    assert calibrated_reward(*whole).item() == 1
    with pytest.raises(ValueError, match=r"r has rewards beyond 2\^53, which float64 rounds"):
        calibrated_reward(torch.tensor([2**53 + 1]), torch.tensor([[2**53]]))


@pytest.mark.parametrize("betas", [0.5, torch.tensor(0.5), [[0.5]]])
def test_a_tradeoff_is_of_a_list_of_betas(betas):
    with pytest.raises(ValueError, match=r"betas \(.*\): must be \(B,\); give a list"):
        theory.tradeoff("exp10", "bon", 4, betas)


@pytest.mark.parametrize("values", [None, [[0.0]], np.zeros((1, 1)), torch.zeros(1), "a"])
def test_ppo_takes_tensors_of_one_shape(values):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"must have one shape, \(B, T\)"):
        ppo.gae(one, values, one)
