"""The page to look at."""

import html
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from minictrl import evaluation, report, results, runs
from minictrl.config import Config
from minictrl.files import read_rows, write_json
from minictrl.report import cumulative
from minictrl.runs import load_config


def test_a_page_has_every_run_and_fetches_nothing(short_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [tmp_path / "a&b", tmp_path / "c"]
    for run in runs:
        shutil.copytree(short_run, run)
    page = tmp_path / "page.html"
    evaluate.main([*map(str, runs), "--prompts", "6", "--samples", "8", "--report", str(page)])
    asked, printed = load_config(short_run).kl, capsys.readouterr().out
    assert len(re.findall(rf"KL \S+ ± \S+ nats \(--kl {asked:g}\)\n", printed)) == 2
    text = page.read_text()
    assert text.count(" nats (--kl ") == text.count("6 test prompts, 8 responses each") == 2
    assert text.count("reward model: reviews, judge: reviews") == 2
    assert "a&amp;b" in text and "<h2>c</h2>" in text and "a&b" not in text
    assert text.count("<article>") == 6
    assert len(re.findall(r'src="data:image/png;base64,', text)) == text.count("<img") == 3 + 3 + 4
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', text)


def test_runs_of_one_name_and_odd_ends_of_lines_are_kept_apart(short_run, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [tmp_path / seed / "run" for seed in ("seed0", "seed1")]
    for i, run in enumerate(runs):
        shutil.copytree(short_run, run)
        rows = read_rows(run / "samples.jsonl")[i:]
        rows[3 - i]["response"] = "one\u2028two"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (run / "samples.jsonl").write_text("".join(lines))
        write_json(run / "eval.json", {"rows": results.read(short_run)})  # no check sums
    report.write_page(runs, tmp_path / "page.html", split="test", other_models={})
    text = (tmp_path / "page.html").read_text()
    assert all(f"<h2>{run}</h2>" in text for run in runs)
    prompts = [row["prompt"] for row in read_rows(runs[1] / "samples.jsonl")]
    shown = re.findall(r"<article><b>(.*?)</b>", text)
    assert shown == [html.escape(prompt) for prompt in prompts[: len(shown)]]  # of both runs


@pytest.mark.parametrize("M", [8, 10, 32])
def test_an_untrained_policys_C_hat_is_flat_whatever_the_number_of_samples(M):
    edges = np.linspace(0, 1, 9)
    for others in (M - 1, M):
        levels = np.arange(others + 1) / others  # each equally often
        assert np.diff(cumulative(levels, others, edges)) == pytest.approx(1 / 8)
    assert cumulative(np.ones(3), M, np.array([0, M / (M + 1), 1])) == pytest.approx([0, 0, 1])


def test_a_page_with_no_place_to_go_is_refused_first(short_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(short_run), "--report", str(tmp_path / "none" / "page.html")])
    assert "there is no such directory" in capsys.readouterr().err


def test_the_policys_card_has_its_table_and_the_command_that_makes_it(short_run):
    """The command, parsed again, gives the settings of the run."""
    text = (short_run / "policy" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers") and "| bon | 4 |" in text
    command = next(line for line in text.splitlines() if "python train.py" in line)
    settings, *_ = train.read_arguments(shlex.split(command)[2:])
    again, config = Config(**settings).resolved(), runs.load_config(short_run)
    elsewhere = {name: getattr(config, name) for name in ("out", "cache")}
    assert replace(again, **elsewhere) == config


def test_the_standard_procedure_has_one_draw_on_the_card(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    config = replace(runs.load_config(run), procedure="standard")
    report.write_card(run, config, results.read(run))
    text = (run / "policy" / "README.md").read_text()
    assert "procedure\nstandard with N = 1." in text


def test_a_run_has_its_name_from_within_too(short_run, tmp_path, monkeypatch):
    run = shutil.copytree(short_run, tmp_path / "mine")
    monkeypatch.chdir(run)
    report.write_card(Path(), runs.load_config(run), results.read(run))
    assert "# mine\n" in (run / "policy" / "README.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--beta 0.1 --method grpo",
        "--procedure won --n 8 --transform won_fp",
        "--task helpful --lr 2e-6 --policy x/y",
        "--task a.jsonl --policy p --reward r.py:f",
        "--baseline value --lam 0.9",
        "--baseline loo --lam 1",
    ],
)
def test_a_command_is_what_was_typed(flags):
    settings, *_ = train.read_arguments(flags.split())
    config = Config(**settings).resolved()
    settings, *_ = train.read_arguments(shlex.split(config.command())[2:])
    assert Config(**settings).resolved() == config


def test_a_run_whose_own_procedure_needs_more_samples_says_so():
    config = Config(n=64).resolved()
    with pytest.warns(UserWarning, match="too few for bon with N = 64.* give --samples 64"):
        found = evaluation.cases_of(config, (2, 4), 32)
    assert found[0] == ("standard", 1) and ("bon", 64) not in found
    assert evaluation.cases_of(config, (2, 4), 64)[0] == ("bon", 64)


def test_two_policies_have_two_references():
    row = dict.fromkeys(results.SAMPLE, 0.5) | {"prompt": "p", "response": "y", "best": "b"}
    first, other = (row | {"reference": x, "best_reference": x} for x in ("one", "two"))
    page = report.side_by_side({"A": [first], "B": [other], "C": [first]})
    assert (
        page.count("pi_ref, C_hat") == page.count("pi_ref of B, C_hat") == 1
        and "pi_ref of C" not in page
    )


def test_the_cards_command_names_a_judge_that_is_no_default():
    brief = "docs/examples/brief.py:check"
    for judge in ("reviews", None):
        config = Config(reward=brief, judge=judge).resolved()
        words = shlex.split(config.command())
        again = dict(zip(words[2::2], words[3::2]))
        assert again.get("--judge") == judge and again["--reward"] == brief
    assert Config().resolved().command() == "python train.py --transform identity"


def test_a_page_names_the_judge_that_the_run_was_evaluated_with(short_run, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(short_run, tmp_path / "run")
    (tmp_path / "judge.py").write_text("def f(prompts, texts):\n    return [len(x) for x in texts]")
    flags = ["--prompts", "4", "--samples", "8", "--judge", f"{tmp_path}/judge.py:f"]
    evaluate.main([str(tmp_path / "run"), *flags, "--report", str(tmp_path / "page.html")])
    assert f"judge: {tmp_path}/judge.py:f</p>" in (tmp_path / "page.html").read_text()
