"""Studies that train: the sweep resumes and compares at equal KL, their statistics, one study on
the command line.
"""

import csv
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from minictrl import reproduce, theory
from minictrl.studies import results, reward, sweep, tables, trained

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
    """train and evaluate that only leave their files; `calls` has the arguments of both."""
    calls = []

    def train(argv):
        flags = dict(flag.removeprefix("--").split("=") for flag in argv if "=" in flag)
        calls.append(argv)
        out = sweep.Path(flags["out"])
        (out / "policy").mkdir(parents=True)
        kept = {
            "transform": flags.get("transform"),
            "method": flags.get("method", "ppo"),
            "kl": float(flags["kl"]),
        }
        (out / "config.json").write_text(
            json.dumps(
                kept
                | {"seed": int(flags["seed"]), "cache": flags["cache"]}
                | {
                    "lr": 2e-3,
                    "steps": 6,
                    "task": "reviews",
                    "prompts": 32,
                    "batch": 16,
                    "G": 8,
                    "procedure": flags.get("procedure", "bon"),
                }
            )
        )
        (out / "policy" / "config.json").write_text("{}")

    def evaluate(argv):
        kl = json.loads((sweep.Path(argv[0]) / "config.json").read_text())["kl"]
        sweep.Path(argv[0], "eval.json").write_text(
            json.dumps({"rows": eval_rows(kl, 0.5 + 0.1 * kl**0.5)})
        )

    modules = {"train": SimpleNamespace(main=train), "evaluate": SimpleNamespace(main=evaluate)}
    monkeypatch.setattr(sweep, "script", modules.__getitem__)
    return calls


def test_a_sweep_trains_what_is_missing_and_only_that(tmp_path, scripts):
    methods = {name: sweep.METHODS[name] for name in ("identity", "grpo")}
    rows = sweep.sweep(tmp_path, True, methods, seeds=2)
    assert len(scripts) == 2 * 2 * 2 and len(rows) == 8 * 14
    (tmp_path / "runs-quick" / "grpo-kl2-seed1" / "eval.json").unlink()  # trained, not evaluated
    (tmp_path / "runs-quick" / "grpo-kl2-seed0" / "eval.json").unlink()
    (tmp_path / "runs-quick" / "grpo-kl2-seed0" / "policy" / "config.json").unlink()  # interrupted
    (tmp_path / "runs-quick" / "grpo-kl2-seed0" / "policy").rmdir()
    assert sweep.sweep(tmp_path, True, methods, seeds=2) == rows
    assert len(scripts) == 9 and "--resume" in scripts[-1]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, scripts):
    settings = {"transform": "identity", "kl": 1.0, "seed": 0, "cache": "c"}
    sweep.run(tmp_path / "run", settings, 8, 8, "test")
    assert len(sweep.table(tmp_path / "run", settings, "test")) == 14
    with pytest.raises(ValueError, match="holds a run with kl 1.0, not 2.0; give another --out"):
        sweep.table(tmp_path / "run", settings | {"kl": 2.0}, "test")


def test_at_equal_kl_the_share_of_the_optimum_is_regressed_with_the_error_of_least_squares():
    kls, noise = (0.6, 0.9, 1.0, 1.3, 1.9), (0.01, -0.02, 0.0, 0.02, -0.01)
    case = {"method": "m", "procedure": "bon", "n": 4, "scorer": "judge"}
    share = lambda kl: 0.8 + 0.1 * math.log(kl)  # noqa: E731
    runs_of = lambda noise: [  # noqa: E731
        dict(row, method="m", seed=seed)
        for seed, (kl, e) in enumerate(zip(kls, noise))
        for row in eval_rows(kl, 0.5 + 0.4 * (share(kl) + e))
    ]
    gain = theory.optimal_win_rate(1.2, "bon", 4) - 0.5
    win, stderr = tables.win_rate_at(runs_of([0.0] * 5), 1.2, **case)
    assert win == pytest.approx(0.5 + gain * share(1.2)) and stderr < 1e-9
    win, stderr = tables.win_rate_at(runs_of(noise), 1.2, **case)
    X = torch.tensor([[1, math.log(kl / 1.2)] for kl in kls], dtype=torch.float64)
    y = torch.tensor([share(kl) + e for kl, e in zip(kls, noise)], dtype=torch.float64)
    fit = torch.linalg.lstsq(X, y).solution
    variance = (y - X @ fit).square().sum() / 3 * torch.linalg.inv(X.T @ X)[0, 0]
    assert win == pytest.approx(0.5 + gain * fit[0].item()) and stderr == pytest.approx(
        gain * variance.item() ** 0.5
    )
    # over prompts
    assert tables.win_rate_at(runs_of(noise)[: 2 * 14], 0.8, **case)[1] == pytest.approx(0.01)
    assert math.isnan(tables.win_rate_at(runs_of(noise), 2.2, **case)[0])  # beyond 1.9
    assert math.isnan(tables.win_rate_at(runs_of(noise), 0.3, **case)[0])
    assert tables.common_kl(runs_of(noise)) == 1.0  # the nearest to the five
    others = [row | {"method": "other"} for row in runs_of(noise)[: 2 * 14]]  # to 0.9 nats
    assert tables.common_kl(runs_of(noise) + others) == 0.9


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


def test_accuracy_counts_the_phrase_on_one_side_only():
    labels, plain = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    assert reward.accuracy(plain, plain, labels)[0] == 1
    # gaps 1, 1, 2
    assert reward.accuracy(plain, plain + 1, labels)[0] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_figures_of_the_sweep_and_the_page_come_from_the_same_runs(tmp_path, scripts, monkeypatch):
    kept = {name: sweep.METHODS[name] for name in ("none", "identity", "exp10")}
    monkeypatch.setattr(trained, "METHODS", kept)
    monkeypatch.setattr(theory, "optimal_win_rate", lambda kl, procedure, n: 0.9)
    # --seeds and the like change it
    monkeypatch.setitem(sweep.SCALES, True, dict(sweep.SCALES[True]))
    reproduce.main(["fig4", "which_t", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    assert len(scripts) == 3 * 4
    rows = list(csv.DictReader(open(tmp_path / "fig4.csv")))
    assert len(rows) == 3 * 2 * 2 * 3 * 2 and {row["seed"] for row in rows} == {"0", "1"}
    results.main([str(tmp_path)])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "fig4.png" in page and "| none |" in page and "fig5" not in page
    reproduce.main(
        ["fig4", "--quick", "--out", str(tmp_path), "--seeds", "3", "--budgets", "0.5", "--done"]
    )
    rows = list(csv.DictReader(open(tmp_path / "fig4.csv")))
    assert len(scripts) == 3 * 4 and {(row["seed"], row["budget"]) for row in rows} == {
        ("0", "0.5"),
        ("1", "0.5"),
    }
    with pytest.raises(
        ValueError, match="no finished run of none, identity, exp10: leave --done out"
    ):
        sweep.sweep(tmp_path / "empty", True, kept)


def test_the_page_has_every_csv_of_the_docs_and_a_table_where_the_rows_are_runs(tmp_path):
    docs = sweep.Path(__file__).parent.parent / "docs"
    done = [path for path in docs.glob("*.csv") if path.stem in reproduce.STUDIES]
    for path in done:
        shutil.copy(path, tmp_path)
    results.main([str(tmp_path)])
    sections = (tmp_path / "RESULTS.md").read_text().split("\n## ")[1:]
    assert len(sections) == len(done) and all(".csv](" in text for text in sections)
    with_table = {text.split(":")[0] for text in sections if "| --- |" in text}
    assert with_table == {"fig4", "fig5", "fig6", "fig8", "fig10"}


def test_fig3_on_the_command_line(tmp_path):
    reproduce.main(["fig3", "--quick", "--out", str(tmp_path)])
    rows = list(csv.DictReader(open(tmp_path / "fig3.csv")))
    assert len(rows) == 1000 and (tmp_path / "fig3.png").stat().st_size > 10_000
    mine = sorted(
        (float(row["reward"]), float(row["rank"])) for row in rows if row["prompt"] == "3"
    )
    assert mine == sorted(mine, key=lambda pair: pair[1])  # a rank is increasing in the reward
    assert 0.05 < float(rows[0]["largest_distance"]) < 1
