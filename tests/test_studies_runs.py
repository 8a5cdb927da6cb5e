"""Studies that train: the sweep resumes and compares at equal KL, their statistics, one study on
the command line.
"""

import csv
import itertools
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import train as train_script
from minictrl import reproduce, runs, theory, transforms
from minictrl.checks import OutOfReach
from minictrl.config import Config
from minictrl.studies import errors, leaderboard, sweep, tables, trained

pytest.importorskip("matplotlib")


def eval_rows(
    kl,
    win,
    procedures=(
        ("standard", 1),
        ("bon", 2),
        ("bon", 4),
        ("bon", 32),
        ("won", 2),
        ("won", 4),
        ("won", 32),
    ),
):
    return [
        dict(
            procedure=p,
            n=n,
            scorer=s,
            win_rate=win,
            stderr=0.01,
            kl=kl,
            kl_stderr=0.02,
            theory=win,
            optimal=0.9,
            prompts=24,
            samples=32,
        )
        for p, n in procedures
        for s in tables.SCORERS
    ]


@pytest.fixture
def scripts(monkeypatch):
    """train and evaluate that only leave their files; the list has the arguments of every training,
    its `lead` is added to win rates.
    """

    class Calls(list):
        lead = 0.0

    calls = Calls()

    def train(argv):
        calls.append(argv)
        settings, *_ = train_script.read_arguments(argv)
        config = Config(**settings).resolved()
        out = sweep.Path(config.out)
        (out / "policy").mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(vars(config)))
        (out / "policy" / "config.json").write_text("{}")

    def evaluate(argv):
        kl = json.loads((sweep.Path(argv[0]) / "config.json").read_text())["kl"]
        rows = eval_rows(kl, 0.5 + 0.1 * kl**0.5 + calls.lead)
        sweep.Path(argv[0], "eval.json").write_text(json.dumps({"rows": rows}))
        prompts = np.linspace(-0.03, 0.03, 24)
        wins = {f"{x['procedure']}-{x['n']}-{x['scorer']}": x["win_rate"] + prompts for x in rows}
        save_file(wins, sweep.Path(argv[0], "wins.safetensors"))
        save_file({"kl": np.full(24, kl)}, sweep.Path(argv[0], "by_prompt.safetensors"))

    modules = {"train": SimpleNamespace(main=train), "evaluate": SimpleNamespace(main=evaluate)}
    monkeypatch.setattr(sweep, "script", modules.__getitem__)
    return calls


def test_a_sweep_trains_what_is_missing_and_only_that(tmp_path, scripts):
    methods = {name: sweep.VARIANTS[name] for name in ("identity", "grpo")}
    rows = sweep.sweep(tmp_path, True, methods, seeds=2)
    assert len(scripts) == 2 * 2 * 2 and len(rows) == 8 * 14
    (tmp_path / "runs-quick" / "grpo-kl2-seed1" / "eval.json").unlink()  # trained, not evaluated
    (tmp_path / "runs-quick" / "grpo-kl2-seed0" / "eval.json").unlink()
    (tmp_path / "runs-quick" / "grpo-kl2-seed0" / "policy" / "config.json").unlink()  # interrupted
    (tmp_path / "runs-quick" / "grpo-kl2-seed0" / "policy").rmdir()
    assert tables.plain(sweep.sweep(tmp_path, True, methods, seeds=2)) == tables.plain(rows)
    assert len(scripts) == 9 and "--resume" in scripts[-1]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, scripts):
    settings = {"transform": "identity", "kl": 1.0, "seed": 0, "cache": "c"}
    sweep.run(tmp_path / "run", settings, 8, 8, "test")
    table = lambda **other: sweep.table(tmp_path / "run", settings | other, "test", 24, 32)  # noqa: E731
    assert len(table()) == 14
    assert len(table(cache=str(tmp_path))) == 14  # the same run, wherever its cache lies
    with pytest.raises(ValueError, match="holds a run with kl 1.0, not 2.0; give another DIR"):
        table(kl=2.0)


def test_a_run_of_code_that_has_changed_is_told(tmp_path, scripts, monkeypatch):
    settings = {"transform": "identity", "kl": 1.0}
    config = Config(**settings).resolved()
    sweep.run(tmp_path / "run", settings, 8, 8, "test")
    table = lambda: sweep.table(tmp_path / "run", settings, "test", 24, 32)  # noqa: E731
    change(tmp_path / "run" / "config.json", code=runs.code_of(config))
    table()  # a warning is an error here
    monkeypatch.setitem(transforms.CLOSED_FORMS, "identity", lambda u: 2 * u)
    with pytest.warns(UserWarning, match="run: the code of its method, .* has changed"):
        table()
    codes = {runs.code_of(replace(config, **other)) for other in ({"method": "grpo"}, {"n": 5}, {})}
    assert len(codes) == 2  # n is no code


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_runs_that_can_not_be_compared_are_told_before_anything_is_trained(tmp_path, scripts):
    """Of other defaults, of another evaluation, of another model of the same name."""
    methods = {name: sweep.VARIANTS[name] for name in ("identity", "exp10")}
    sweep.sweep(tmp_path, True, methods, budgets=(0.5,))
    trained, first = len(scripts), tmp_path / "runs-quick" / "identity-kl0.5-seed0"
    config, table = first / "config.json", first / "eval.json"
    sound = config.read_text(), table.read_text()
    change(config, lr=1e-5)
    with pytest.raises(ValueError, match="identity-kl0.5-seed0: holds a run with lr 1e-05, not"):
        sweep.sweep(tmp_path, True, methods)
    config.write_text(sound[0])
    rows = json.loads(sound[1])["rows"]
    change(table, rows=[row | {"samples": 8} for row in rows])
    with pytest.raises(ValueError, match="24 prompts with 8 samples, not 24 with 32; evaluate it"):
        sweep.sweep(tmp_path, True, methods)
    table.write_text(sound[1])
    assert len(scripts) == trained
    change(config, made_from={"reward": "a"})
    change(tmp_path / "runs-quick" / "exp10-kl0.5-seed0" / "config.json", made_from={"reward": "b"})
    with pytest.raises(ValueError, match="its reward reviews has the digest b, that of .* has a"):
        sweep.sweep(tmp_path, True, methods, budgets=(0.5,))


def test_a_budget_out_of_reach_is_left_out_and_another_error_is_not(tmp_path, scripts, monkeypatch):
    """Whatever the folder is called."""
    methods = {name: sweep.VARIANTS[name] for name in ("identity", "exp10")}
    script, error = sweep.script, ValueError("holds something out of reach")

    def train(argv):
        if "--transform=exp10" in argv:
            raise error
        return script("train").main(argv)

    modules = {"train": SimpleNamespace(main=train), "evaluate": script("evaluate")}
    monkeypatch.setattr(sweep, "script", modules.__getitem__)
    with pytest.raises(ValueError, match="holds something"):
        sweep.sweep(tmp_path / "out of reach", True, methods, budgets=(0.5,))
    error = OutOfReach("kl 0.5")
    rows = sweep.sweep(tmp_path / "out of reach", True, methods, budgets=(0.5,))
    assert {row["method"] for row in rows} == {"identity"}


def runs_of(method, kls, share, seed_effects, prompts):
    """Rows of runs, one a KL and seed, whose share of the optimum's gain is share(kl); prompts (P,)
    are effects that sum to 0.
    """
    rows = []
    for (seed, effect), (budget, kl) in itertools.product(seed_effects.items(), kls.items()):
        optimal = theory.optimal_win_rate(kl, "bon", 4)
        win = 0.5 + (optimal - 0.5) * (share(kl) + effect)
        row = {"method": method, "budget": budget, "seed": seed, "kl": kl, "optimal": optimal}
        case = {"procedure": "bon", "n": 4, "scorer": "judge", "win_rate": win}
        rows.append(row | case | {"wins": win + prompts, "kls": np.full(len(prompts), kl)})
    return rows


def test_at_equal_kl_runs_are_carried_along_their_share_of_the_optimum():
    prompts = np.linspace(-0.1, 0.1, 50)
    case = {"method": "m", "procedure": "bon", "n": 4, "scorer": "judge"}
    share = lambda kl: 0.8 + 0.1 * math.log(kl)  # noqa: E731
    kls = {0.5: 0.6, 1.0: 0.9, 2.0: 1.9}
    rows = runs_of("m", kls, share, {0: 0.0, 1: 0.0}, prompts)
    found = tables.wins_at(rows, 1.0, **case)
    gain = theory.optimal_win_rate(1.0, "bon", 4) - 0.5
    scale = gain / (theory.optimal_win_rate(0.9, "bon", 4) - 0.5)  # of the nearest budget's runs
    assert set(found) == {0, 1}
    assert np.allclose(found[1], 0.5 + gain * share(1.0) + scale * prompts, atol=1e-12)
    assert not tables.wins_at(rows, 2.5, **case) and not tables.wins_at(rows, 0.4, **case)
    apart = runs_of("m", {1.0: 1.23, 2.0: 3.9}, share, {0: 0.0}, prompts)
    assert not tables.wins_at(apart, 2.0, **case)  # on both sides, 1.6 and 2 times away
    # a prompt whose KL is above its run's mean by 1 % has its win rate at 1 % more
    rows[1]["kls"] = 0.9 + 0.009 * np.sign(prompts)
    moved = tables.wins_at(rows, 1.0, **case)[0] - found[0]
    up = theory.optimal_win_rate(1.1, "bon", 4) - theory.optimal_win_rate(1 / 1.1, "bon", 4)
    steep = share(0.9) * up / (2 * math.log(1.1)) + 0.1 * gain
    assert np.allclose(moved, -0.01 * steep * np.sign(prompts), atol=1e-12)


def test_a_point_is_the_mean_over_seeds_with_its_error():
    wins, kls = np.random.default_rng(0).random((2, 3, 40))
    case = {"method": "m", "budget": 1.0, "procedure": "bon", "n": 4, "scorer": "judge"}
    rows = [
        case | {"wins": wins[i], "kls": kls[i], "theory": (0.6, 0.6, 0.9)[i], "optimal": i / 10}
        for i in range(3)
    ]
    [found] = tables.points(rows)
    win_rate, kl = errors.crossed(wins), errors.crossed(kls)
    assert (found["win_rate"], found["stderr"]) == (win_rate.mean, win_rate.stderr)
    assert (found["kl"], found["kl_stderr"]) == (kl.mean, kl.stderr)
    assert (found["theory"], found["optimal"], found["seeds"]) == pytest.approx((0.7, 0.1, 3))


def test_the_common_slope_is_a_regression_within_the_methods_whose_runs_are_apart():
    prompts, case = np.zeros(50), {"procedure": "bon", "n": 4, "scorer": "judge"}
    rows = runs_of(
        "far", {0.5: 0.7, 1.0: 1.4}, lambda kl: 0.8 + 0.1 * math.log(kl), {0: 0}, prompts
    )
    rows += runs_of("near", {0.5: 0.9, 1.0: 1.2}, lambda kl: 0.3 * math.log(kl), {0: 0}, prompts)
    rows += runs_of("at one", {0.5: 0.95, 1.0: 1.05}, lambda kl: 9 * math.log(kl), {0: 0}, prompts)
    far, near = math.log(2) ** 2, math.log(4 / 3) ** 2  # how much each of the two says
    expected = (0.1 * far + 0.3 * near) / (far + near)
    assert tables.common_slope(rows, 1.0, **case) == pytest.approx(expected)


def test_a_method_at_one_kl_has_its_mean_and_error_by_each_scorer():
    luck, prompts = {0: -0.02, 1: 0.01}, np.linspace(-0.1, 0.1, 50)
    rows = runs_of("m", {1.0: 0.9}, lambda kl: 0.8, luck, prompts)
    reward, judge = tables.measured_at_kl(rows, 1.0, "m", "bon", 4)
    wins = tables.wins_at(rows, 1.0, "m", procedure="bon", n=4, scorer="judge")
    expected = errors.crossed(list(wins.values()))
    assert (judge["win_rate"], judge["stderr"]) == (expected.mean, expected.stderr)
    assert (reward["scorer"], judge["kl"]) == ("reward", 1.0) and math.isnan(reward["win_rate"])


@pytest.mark.parametrize("procedure, n", [("bon", 2), ("won", 8)])
def test_the_optimum_is_not_below_itself(procedure, n):
    best = theory.optimal_win_rate(1.0, procedure, n)
    assert tables.below_optimum(best - 0.01, 1.0, procedure, n) == pytest.approx(1)


def test_a_method_with_one_run_is_carried_as_far_as_one_with_many():
    """The same share of the optimum's gain at 0.9 nats, and the same at 1."""
    share, prompts = lambda kl: 0.8 + 0.1 * math.log(kl / 0.9), np.zeros(50)
    rows = runs_of("many", {0.5: 0.5, 1.0: 0.9, 2.0: 1.8}, share, {0: 0.0}, prompts)
    rows += runs_of("one", {1.0: 0.9}, share, {0: 0.0}, prompts)
    case = {"procedure": "bon", "n": 4, "scorer": "judge"}
    many, one = (tables.wins_at(rows, 1.0, method, **case)[0] for method in ("many", "one"))
    gain = theory.optimal_win_rate(1.0, "bon", 4) - 0.5
    assert np.allclose(many, 0.5 + gain * share(1.0), atol=1e-12) and np.allclose(one, many)


def test_two_methods_are_compared_by_seed_and_prompt():
    share, prompts = lambda kl: 0.8, np.linspace(-0.1, 0.1, 50)
    luck = {0: -0.02, 1: 0.01, 2: 0.03}
    rows = runs_of("better", {1.0: 1.0}, lambda kl: 0.85, luck, prompts)
    rows += runs_of("worse", {1.0: 1.0}, share, {0: -0.02, 2: 0.03}, prompts)
    case = {"procedure": "bon", "n": 4, "scorer": "judge"}
    ours, theirs = (tables.wins_at(rows, 1.0, method=name, **case) for name in ("better", "worse"))
    found = tables.ahead(ours, theirs)
    gain = theory.optimal_win_rate(1.0, "bon", 4) - 0.5
    assert found.mean == pytest.approx(0.05 * gain) and found.stderr < 1e-12  # the same luck
    assert math.isnan(tables.ahead(ours, {}).mean)
    assert tables.common_kl(rows) == 1.0


@pytest.mark.parametrize("procedure, n", [("standard", 1), ("bon", 2), ("won", 2)])
def test_weights_of_best_of_n_are_those_of_all_groups(procedure, n):
    """6 samples, ties among them, every ordered way to fill the groups; ties share the
    selection.
    """
    select, keep = (
        torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 4.0]]),
        {"standard": max, "bon": max, "won": min}[procedure],
    )
    expected = torch.zeros(6, dtype=torch.float64)
    for order in itertools.permutations(range(6), 2 * n):
        best = [max(order[i : i + 2], key=lambda j: select[0, j]) for i in range(0, 2 * n, 2)]
        value = select[0, keep(best, key=lambda j: select[0, j])]
        expected += (select[0] == value) / (select[0] == value).sum()
    found = trained.best_of_weights(select, 2, procedure, n)[0]
    assert torch.allclose(found, expected / expected.sum(), atol=1e-12)


def test_mean_draws_is_the_theorys_on_uniform_rewards():
    """pi = pi_ref: (1 - q^32) / (1 - q) draws at q = .85; 4 standard errors over 4,000 prompts of
    64 samples.
    """
    u = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0))
    each = (
        torch.stack([(u[i : i + 400] < 0.85).sum(1).double() for i in range(0, 4000, 400)]).std()
        / 4000**0.5
    )
    found = trained.mean_draws(u, torch.full((4000,), 0.85), 32)
    # d draws / d fails < 1.2
    assert found == pytest.approx((1 - 0.85**32) / 0.15, abs=4 * each.item() * 1.2)


def test_figures_of_the_sweep_and_the_page_come_from_the_same_runs(tmp_path, scripts, monkeypatch):
    kept = {name: sweep.VARIANTS[name] for name in ("none", "identity", "exp10")}
    monkeypatch.setattr(trained, "VARIANTS", kept)
    monkeypatch.setattr(theory, "optimal_win_rate", lambda kl, procedure, n: 0.9)
    # --seeds and the like change it
    monkeypatch.setitem(sweep.SCALES, True, dict(sweep.SCALES[True]))
    reproduce.main(["fig4", "which_t", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    assert len(scripts) == 3 * 4
    rows = list(csv.DictReader(open(tmp_path / "fig4.csv")))
    assert len(rows) == 3 * 2 * 2 * 3 * 2 and {row["seed"] for row in rows} == {"0", "1"}
    reproduce.main(
        ["fig4", "--quick", "--out", str(tmp_path), "--seeds", "3", "--budgets", "0.5", "--done"]
    )
    rows = list(csv.DictReader(open(tmp_path / "fig4.csv")))
    assert len(scripts) == 3 * 4 and {(row["seed"], row["budget"]) for row in rows} == {
        ("0", "0.5"),
        ("1", "0.5"),
    }
    with pytest.raises(
        ValueError, match="no finished run of none, identity, exp10: train one, without --done"
    ):
        sweep.sweep(tmp_path / "empty", True, kept)


def test_the_leaderboard_is_sorted_and_a_new_method_enters_alone(tmp_path, scripts, monkeypatch):
    kept = {name: sweep.VARIANTS[name] for name in ("none", "identity", "exp10", "qrpo exp10")}
    monkeypatch.setattr(leaderboard, "VARIANTS", kept)
    monkeypatch.setattr(theory, "optimal_win_rate", lambda kl, procedure, n: 0.9)
    monkeypatch.setattr(leaderboard, "cost", lambda run: {"calls": 25_600, "seconds": 90})
    monkeypatch.setitem(sweep.SCALES, True, dict(sweep.SCALES[True]))
    flags = ["--quick", "--seeds", "2", "--budgets", "1"]
    leaderboard.main([str(tmp_path), "none", "identity", "exp10", *flags])
    assert len(scripts) == 3 * 2
    monkeypatch.setattr(trained, "VARIANTS", kept)
    reproduce.main(["fig4", "--out", str(tmp_path), *flags, "--done"])
    scripts.lead = 0.01  # of what is trained from here on
    leaderboard.main([str(tmp_path), "qrpo exp10", *flags])
    assert len(scripts) == 4 * 2
    page = (tmp_path / "leaderboard.md").read_text()
    first, worst, standard, claims, *studies = page.split("\n## ")[1:]
    assert first.startswith("Best-of-4") and worst.startswith("Worst-of-4")
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")][3:]
    assert "KL 1 |" in first and "KL 0.5" not in first  # which no method has
    assert "nothing says what more KL is worth" in page
    assert rows[0][0] == "| qrpo exp10" and rows[0][2] == "–" and rows[1][0] != "| qrpo exp10"
    assert rows[0][1] == "61.0 ± 0.4 / 61.0 ± 0.4"
    assert rows[1][2] == "1.0 ± 0.0 / 1.0 ± 0.0"  # paired
    assert rows[0][4:7] == ["2", "26 thousand", "1.5"]
    assert "`python train.py --transform exp10 --method qrpo --steps 6" in rows[0][7]
    assert "exp10 over none 0.0 (0.0 to 0.0)" in claims and "not run" in claims
    assert studies[0].startswith("fig4") and "fig4.png" in studies[0] and "fig5" not in page
    with pytest.raises(SystemExit):
        leaderboard.main([str(tmp_path), "qrpo exp11", *flags])
    # a page has all runs that are there, and their KLs
    leaderboard.main([str(tmp_path), "exp10", "--quick", "--seeds", "1", "--budgets", "4"])
    of_four = (tmp_path / "leaderboard.md").read_text()
    assert "KL 1 | KL 4 |" in of_four and "\n| none | 60.0" in of_four
    shutil.rmtree(tmp_path / "runs-quick" / "exp10-kl4-seed0")
    leaderboard.main([str(tmp_path), *flags, "--done"])
    # the same page from the new method's runs and those that were kept
    kept_runs = tmp_path / "leaderboard.safetensors"
    beside = ["--beside", str(kept_runs)]
    leaderboard.main([str(tmp_path / "mine"), "qrpo exp10", *flags, *beside])
    assert (tmp_path / "mine" / "leaderboard.md").read_text() == page[: page.index("\n## fig4")]
    monkeypatch.delitem(kept, "none")  # a method that only the other file has
    leaderboard.main([str(tmp_path / "mine"), "qrpo exp10", *flags, *beside])
    theirs = (tmp_path / "mine" / "leaderboard.md").read_text()
    assert "| none |" in theirs and "not known here" in theirs
    trainings = len(scripts)
    with pytest.raises(ValueError, match="on 24 prompts with 32 samples, yours are on 400 with 32"):
        leaderboard.main([str(tmp_path / "full"), "qrpo exp10", *beside])
    kept_runs.write_bytes(kept_runs.read_bytes()[:-1])
    with pytest.raises(ValueError, match="leaderboard.safetensors: is damaged .* the one in docs/"):
        leaderboard.main([str(tmp_path / "other"), "qrpo exp10", *flags, *beside])
    assert len(scripts) == trainings  # said before anything is trained


@pytest.mark.parametrize(
    "lead, verdict", [(-0.005, "yes"), (-0.03, "no"), (-0.01, "open"), (0.005, "yes")]
)
def test_a_method_is_level_where_it_is_at_most_a_point_behind_and_open_where_that_is_unknown(
    lead, verdict
):
    noise = 0.03 * np.random.default_rng(0).standard_normal((2, 400))
    wins = {"identity": 0.7 + lead + noise, "none": np.full((2, 400), 0.7)}
    case = {"procedure": "standard", "n": 1, "scorer": "reward", "budget": 1.0}
    measured = {"kl": 1.0, "kls": np.ones(400), "win_rate": 0.7, "optimal": 0.9}
    rows = [
        case
        | measured
        | {"method": name, "run": f"{name}-{seed}", "seed": seed, "wins": each[seed]}
        for name, each in wins.items()
        for seed in (0, 1)
    ]
    asked = ("identity",), "standard", 1, True, "reward"
    claim = leaderboard.Board(rows).claim(*asked)
    assert claim.startswith(f"**{verdict}**: identity over none")
    claim = leaderboard.Board([row for row in rows if row["seed"] == 0]).claim(*asked)
    assert claim.startswith("**one seed**: identity over none")


def test_fig3_on_the_command_line(tmp_path):
    reproduce.main(["fig3", "--quick", "--out", str(tmp_path)])
    rows = list(csv.DictReader(open(tmp_path / "fig3.csv")))
    assert len(rows) == 1000 and (tmp_path / "fig3.png").stat().st_size > 10_000
    mine = sorted(
        (float(row["reward"]), float(row["rank"])) for row in rows if row["prompt"] == "3"
    )
    assert mine == sorted(mine, key=lambda pair: pair[1])  # a rank is increasing in the reward
    assert 0.05 < float(rows[0]["largest_distance"]) < 1
