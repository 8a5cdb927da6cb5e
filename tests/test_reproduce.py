"""python -m minictrl.reproduce: the files it leaves, what the studies find, bad input."""

import csv
from functools import cache

import pytest
import torch

from minictrl import figures, reproduce, theory
from minictrl.procedures import cells
from minictrl.procedures.masses import mass_win_rate
from minictrl.studies import curves, tables

pytest.importorskip("matplotlib")


def test_every_study_leaves_a_table_and_a_picture(tmp_path, monkeypatch):
    figure, _ = figures.panels(1, 1)
    monkeypatch.setitem(
        reproduce.STUDIES, "small", lambda out, quick: ([{"x": 1 / 3, "quick": quick}], figure)
    )
    reproduce.main(["small", "transforms", "--quick", "--out", str(tmp_path / "new")])
    assert (tmp_path / "new" / "small.csv").read_text().split() == ["x,quick", "0.33333333,True"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "small.csv", "small.png", "transforms.csv", "transforms.png"
    ]  # fmt: skip
    assert all(
        path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "new").glob("*.png")
    )
    rows = list(csv.DictReader(open(tmp_path / "new" / "transforms.csv")))
    assert {row["transform"] for row in rows} >= {
        "identity",
        "log",
        "exp10",
        "exp-10",
        "bon_fp",
        "won_fp",
    }


@cache
def study(name):
    return reproduce.STUDIES[name](None, True)  # quick


@pytest.mark.parametrize("name", ["fig11", "rewind", "finite_k", "mix"])
def test_every_study_of_the_theory_runs_and_its_win_rates_are_some(name):
    """The others are run by the tests beside this one."""
    rows, figure = study(name)
    wins = [
        value
        for row in rows
        for key, value in row.items()
        if key.startswith("win_rate") and value is not None
    ]
    assert figure.axes and wins and all(0 < win <= 1 for win in wins)
    figure.draw_without_rendering()
    ticks = [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
    assert any(ticks) and not any("$" in tick for tick in ticks)  # which would be drawn as it is


def test_list_prints_one_study_a_line(capsys):
    reproduce.main(["--list"])
    names = capsys.readouterr().out.split("\n")[:-1]
    assert names == list(reproduce.STUDIES) and {"fig2", "fig11", "mix"} <= set(names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fig99", "--out", "x"], "unknown study 'fig99'; known: fig2"),
        (["--out", "x"], "no study is named"),
        (["fig2"], "--out DIR is missing"),
        (["fig2", "--out", "x", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        reproduce.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_fixed_points_are_on_the_frontier_of_fig2_and_nothing_is_above(tmp_path):
    rows, _ = curves.fig2(tmp_path, quick=True)
    fixed = [
        row["points_below_optimum"] for row in rows if row["transform"] in ("bon_fp", "won_fp")
    ]
    assert len(fixed) == 24 and max(map(abs, fixed)) < 1e-9
    assert min(row["points_below_optimum"] for row in rows) > -1e-4  # the solver's grid, in points


def test_the_best_policy_for_an_unknown_n_is_the_best_for_the_mix():
    win = lambda mass, ref: mass_win_rate(mass, ref, curves.any_n, 8).item()  # noqa: E731
    policy = theory.policy_at_kl
    best = win(*policy("optimal", 1.0, curves.any_n, 8))
    assert all(win(*policy("optimal", 1.0, "bon", N)) < best - 1e-4 for N in (1, 2, 4, 8))


def test_best_of_ns_kl_is_that_of_its_density():
    u = cells.midpoints(100_000)
    for n in (2, 8, 32):
        assert curves.best_of_kl(n) == pytest.approx(theory.kl(n * u ** (n - 1)), abs=1e-4)


def test_the_policies_beside_the_transforms_are_at_1_nat():
    rows, _ = study("transforms")
    for name, n in {(row["transform"], row["n"]) for row in rows}:
        mine = tables.where(rows, transform=name, n=n)[:200]  # some are in both rows
        assert len(mine) == 200
        density, pi_ref = (torch.tensor(tables.column(mine, x)) for x in ("density", "pi_ref"))
        assert pi_ref.sum() == pytest.approx(1, abs=1e-6)
        assert (pi_ref * density.xlogy(density)).sum() == pytest.approx(1, abs=0.003)
        assert (mine[0]["Phi_0_to_1"], mine[-1]["Phi_0_to_1"]) == (0, 1)


def test_the_cost_of_rewinding_is_that_of_the_policy():
    """Of at most 32 draws; log's policy at the KL of Best-of-n is Best-of-n, of which 0.85^n
    fails.
    """
    rows, _ = study("rewind")
    for n in curves.BEST_OF:
        [row] = tables.where(rows, transform=f"best-of-{n}")
        mean = sum((0.85**n) ** k for k in range(32))
        assert row["mean_draws"] == pytest.approx(mean, rel=1e-3)
        assert row["win_rate"] == pytest.approx(theory.at_kl("log", row["kl_nats"], "rewind", 32))


def test_rewinds_draws_and_the_mix_of_ns_by_hand():
    assert curves.draws(0.85) == pytest.approx(sum(0.85**k for k in range(32)))
    mass, edges = torch.tensor([0.4, 0.6]), torch.tensor([0.0, 0.5, 1])
    expected = torch.tensor([[0.4**n, 1 - 0.4**n] for n in (1, 2, 3)])
    torch.testing.assert_close(curves.any_n(mass, edges, 3), expected)


def test_more_calibration_samples_lose_less():
    rows, _ = study("finite_k")
    for name in {row["transform"] for row in rows}:
        mine = tables.where(rows, transform=name)
        assert tables.column(mine, "K") == [10, 30, 100]
        lost = tables.column(mine, "points_lost")
        assert lost[0] > lost[1] > lost[2] > 0


def test_a_policy_loses_nothing_where_it_is_used_as_it_was_tuned():
    rows, _ = study("mix")
    for row in rows:
        tuned = row["transform"] == f"optimal for {row['used_at']}"
        assert row["points_lost"] == pytest.approx(0, abs=1e-3) if tuned else row["points_lost"] > 0
