"""python -m minictrl.reproduce: the files it leaves, what the studies find, bad input."""

import csv

import pytest

from minictrl import figures, reproduce, theory
from minictrl.procedures.masses import mass_win_rate
from minictrl.studies import curves

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


@pytest.mark.parametrize("name", ["fig11", "rewind", "finite_k", "mix"])
def test_every_study_of_the_theory_runs_and_its_win_rates_are_some(name, tmp_path):
    """The others are run by the tests beside this one."""
    rows, figure = reproduce.STUDIES[name](tmp_path, True)
    wins = [
        value
        for row in rows
        for key, value in row.items()
        if key.startswith("win_rate") and value is not None
    ]
    assert figure.axes and wins and all(0 < win <= 1 for win in wins)


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
