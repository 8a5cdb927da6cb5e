"""minictrl/transforms.py: a name becomes Phi."""

import math

import pytest
import torch

from minictrl import theory, transforms
from minictrl.procedures import cells
from minictrl.transforms import CLOSED_FORMS, FLOOR, get_transform

u = torch.linspace(0, 1, 201)  # the values of C_hat at K = 100

UNIFORM = cells.midpoints(10_000)[None]


@pytest.mark.parametrize(
    "name", ["identity", "log", "exp5", "exp-10", "exp0.5", "bon_fp", "won_fp", "optimal"]
)
def test_transforms_increase_and_keep_shape_and_dtype(name):
    for x in (u, u.double(), u[:200].view(4, 50)):
        Phi = get_transform(name, beta=0.1)(x)
        assert Phi.shape == x.shape and Phi.dtype == x.dtype and Phi.isfinite().all()
    assert (get_transform(name, beta=0.1)(u).diff() >= 0).all()


def test_closed_forms_are_the_papers():
    assert torch.equal(get_transform("identity")(u), u)
    assert torch.allclose(get_transform("log")(u[1:]), u[1:].log())
    assert torch.allclose(get_transform("exp5")(u), torch.exp(5 * u))
    assert torch.allclose(get_transform("exp-10")(u), -torch.exp(-10 * u))


def test_log_is_bounded_at_half_the_smallest_calibrated_reward():
    zero = torch.zeros(1, dtype=torch.float64)
    assert get_transform("log")(zero).exp().item() == pytest.approx(1 / 200)
    assert get_transform("log", K=30)(zero).exp().item() == pytest.approx(1 / 60)


def test_exponential_tilting_stays_finite_up_to_its_bounds():
    assert (
        get_transform("exp80")(u).isfinite().all() and get_transform("exp-80")(u).isfinite().all()
    )


def test_fixed_points_are_the_theorys_at_the_same_n_and_beta():
    grid, Phi = theory.optimal_transform("won", 3, 0.2)
    # won_fp is for Worst-of-N whatever the procedure
    for name, procedure in (("won_fp", "bon"), ("optimal", "won")):
        assert torch.allclose(
            get_transform(name, procedure=procedure, n=3, beta=0.2)(grid), Phi, atol=1e-9
        )
    assert not torch.allclose(
        get_transform("bon_fp", procedure="won", n=3, beta=0.2)(grid), Phi, atol=0.1
    )


def test_rewinds_optimum_jumps_down_at_its_threshold():
    """A draw just above it ends the search with what most of pi_ref's results beat; one just below
    is another try.
    """
    Phi = get_transform("optimal", procedure="rewind", n=32, beta=0.1)
    below, at, above = Phi(torch.tensor([0.8499, 0.85, 0.8501], dtype=torch.float64)).tolist()
    assert below - at > 1 and above - at == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("name", ["identity", "log", "exp10", "exp-10", "bon_fp", "won_fp"])
def test_the_floor_bounds_the_objective_and_leaves_its_optimum_where_it_is(name):
    beta, grid = theory.beta_for_kl(name, 1.0), cells.midpoints(100_000)
    Phi = get_transform(name, beta=beta)
    free, floored = Phi(grid) / beta, Phi.in_nats(Phi(grid), beta, UNIFORM)[0]
    log_Z = free.logsumexp(0) - math.log(len(grid))
    assert floored.min() >= log_Z - FLOOR - 1e-3
    assert (free.softmax(0) - floored.softmax(0)).abs().sum() / 2 < 1e-4  # total variation
    if name == "exp-10":
        assert free.min() < -500
    if name == "exp10":
        assert torch.equal(free, floored)  # spans less than the floor
    raw = torch.tensor([-1e3, 2.0])
    assert torch.equal(get_transform("none").in_nats(raw, beta, UNIFORM), raw / beta)


@pytest.mark.parametrize("name, procedure", [("exp-10", "won"), ("log", "bon")])
def test_the_floor_costs_nothing_far_from_pi_ref_either(name, procedure):
    """At 4 nats; 10 nats below R(1) it cost Worst-of-4 half a point."""
    beta = theory.beta_for_kl(name, 4.0, procedure=procedure)
    Phi = get_transform(name, procedure=procedure, beta=beta)
    free = theory.at_kl(name, 4.0, procedure, 4)

    def tilted(u):
        return Phi.in_nats(Phi(u), beta, UNIFORM).view_as(u)

    (_, (floored,)) = theory.tradeoff(tilted, procedure, 4, [1.0])
    assert abs(free - floored) < 5e-4


def test_none_is_the_raw_reward_and_no_function_of_the_calibrated_one():
    r = torch.tensor([[3.0, -1e4]])
    none = get_transform("none")
    assert torch.equal(none.of_rewards(r, torch.zeros(1, 5)), r)
    with pytest.raises(ValueError, match="has no theory"):
        none(torch.rand(3))


def test_equal_reference_rewards_are_not_blown_up():
    """The mean of 100 times 0.1 is not 0.1 in float32."""
    r_ref = torch.full((1, 100), 0.1)
    standardised = get_transform("standardised").of_rewards(torch.tensor([[0.1, 0.3]]), r_ref)
    torch.testing.assert_close(standardised, torch.tensor([[0.0, 0.2]]))


def test_whole_rewards_are_standardised_as_they_are():
    r, r_ref = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3, 5]])
    standardised = get_transform("standardised").of_rewards
    torch.testing.assert_close(standardised(r, r_ref), standardised(r.float(), r_ref.float()))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("exp", {}, f"unknown transform 'exp'; known: exp<t> .*{', '.join(CLOSED_FORMS)}, bon_fp"),
        ("exp0", {}, "'exp0'.*not 0"),
        ("exp100", {}, "'exp100'.*80"),
        ("expten", {}, "unknown transform 'expten'"),
        ("bon_fp", {}, "'bon_fp'.*pass beta"),
        ("optimal", {"beta": 0.1, "procedure": "beam"}, "unknown procedure 'beam'"),
        ("won_fp", {"beta": 0.1, "n": 0}, "n 0"),
        ("log", {"K": 0}, "K 0"),
    ],
)
def test_bad_names_and_values_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_transform(name, **options)


def test_a_transform_without_an_upper_end_is_refused(monkeypatch):
    monkeypatch.setitem(transforms.CLOSED_FORMS, "logit", lambda u: (u / (1 - u)).log())
    with pytest.raises(ValueError, match=r"'logit': Phi\(0\) is -inf.*bound it"):
        get_transform("logit")
    assert get_transform("log")(torch.zeros(1)).isfinite()  # the lower end is bounded by K


def test_phi_of_half_precision_does_not_overflow():
    for name in ("exp20", "bon_fp"):
        Phi = get_transform(name, beta=1.0)
        assert torch.equal(Phi(u.half()), Phi(u.half().float()))


def test_phi_is_of_calibrated_rewards_alone():
    for name in ("identity", "exp80", "log"):
        for u in (1.5, -0.1, math.nan):
            with pytest.raises(ValueError, match="outside .0, 1."):
                get_transform(name)(torch.tensor([0.5, u]))


@pytest.mark.parametrize(
    "arguments", [{"procedure": "bom"}, {"n": 0}, {"n": 10**9}, {"beta": -1}, {"beta": math.nan}]
)
def test_settings_are_checked_where_the_transform_needs_none(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        get_transform("identity", **arguments)


def test_a_transform_that_is_infinite_at_an_end_is_refused_before_it_trains(monkeypatch):
    for u, Phi in ((0, lambda u: u.log()), (1, lambda u: -(1 - u).log())):
        monkeypatch.setitem(transforms.CLOSED_FORMS, "mine", Phi)
        with pytest.raises(ValueError, match=rf"'mine': Phi\({u}\) is -?inf"):
            get_transform("mine")
    for Phi in (lambda u: u.tolist(), lambda u: u > 0.5, lambda u: (9 * u).long()):
        monkeypatch.setitem(transforms.CLOSED_FORMS, "mine", Phi)
        with pytest.raises(ValueError, match="no float tensor of u's shape"):
            get_transform("mine")
    with pytest.raises(ValueError, match="unknown transform"):
        get_transform("exp٣")


@pytest.mark.parametrize(
    "Phi, told",
    [
        (lambda u: u.softmax(-1), r"Phi\(1\) is 1 alone and .* beside other values"),
        (lambda u: u - u.mean(), "a function of each u by itself"),
        (lambda u: u.mul_(2), "changes u in place, which others read; work on a copy"),
        (lambda u: (u - 0.5).sin() / (u - 0.5), r"Phi\(0.5\) is nan, and C_hat may be 0.5"),
    ],
)
def test_a_transform_is_a_finite_function_of_each_u_by_itself(Phi, told, monkeypatch):
    monkeypatch.setitem(transforms.CLOSED_FORMS, "mine", Phi)
    with pytest.raises(ValueError, match=told):
        get_transform("mine", K=10)


def test_two_transforms_of_one_name_are_told(monkeypatch):
    monkeypatch.setitem(transforms.CLOSED_FORMS, "median", lambda u: u)
    with pytest.raises(ValueError, match="'median': is the name of two; give yours another"):
        get_transform("median")


def test_the_median_that_is_taken_off_is_the_prompts_own():
    r_ref = torch.tensor([[0.0, 1, 9], [10, 20, 60]])
    found = get_transform("median").of_rewards(torch.tensor([[2.0], [50]]), r_ref)
    assert found.tolist() == [[1], [30]]


def test_rewards_far_from_zero_are_standardised_too():
    r_ref = torch.tensor([[1000.0, 1002, 1004]])
    found = get_transform("standardised").of_rewards(r_ref, r_ref)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0, 1]]))
