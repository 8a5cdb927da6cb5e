"""Bad input: one line that names the value, the rule and the fix, exit status 2, nothing
overwritten.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from minictrl import evaluation, results, runs
from minictrl.config import Config
from minictrl.files import check_writable, read_sealed, save_tensors, write_sealed
from minictrl.lm.device import resolve_device
from minictrl.models import load_policy, save_policy
from minictrl.studies import leaderboard
from minictrl.task import load_task

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--transform", "exp0"], "exp0"),
        (["--transform", "cube"], "identity"),
        (["--task", "poems"], "reviews"),
        (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--kl", "0"], "positive"),
        (["--kl", "-1"], "positive"),
        (["--kl", "nan"], "positive"),
        (["--kl", "50"], "50"),
        (["--kl", "1", "--beta", "1"], "not both"),
        (["--beta", "0"], "positive"),
        (["--K", "0"], "at least 1"),
        (["--method", "dpo"], "bonbon"),
        (["--procedure", "beam"], "rewind"),
        (["--procedure", "soft0"], "at least 0.01, or bon"),
        (["--method", "ipo", "--transform", "exp10"], "implies"),
        (["--policy", "nowhere/at-all"], "nowhere/at-all"),
        (["--reward", "nowhere"], "nowhere"),
        (["--device", "tpu"], "cuda"),
        (["--max-new-tokens", "500"], "context"),
        (["--kl", "5"], "out of reach of 100 samples.*less than 4.62"),
        (["--method", "bonbon", "--kl", "4"], "Best-of-147"),
        (["--method", "bond", "--kl", "2", "--K", "15"], "Best-of-19"),
        (["--method", "bonbon", "--beta", "0.001"], "--beta 0.001 is out of reach of 100"),
        (["--procedure", "median", "--n", "2000"], "use at most 1000"),
        (["--procedure", "bon", "--n", "10000"], "use at most 1000"),
        (["--procedure", "poisson", "--n", "257"], "use at most 256"),
        (["--procedure", "soft0.5", "--n", "2000"], "use at most 256"),
        (["--method", "pkpo", "--n", "16"], "--n 16: pkpo"),
        (["--method", "maxpo", "--n", "8"], "at most 7"),
        (["--method", "tea", "--G", "1"], "--G 1: tea"),
        (["--method", "tea", "--n", "200"], "100 reference samples"),
        (["--method", "maxrl", "--G", "1"], "--G 1: maxrl"),
        (["--method", "maxrl", "--transform", "log"], "implies identity"),
        (["--method", "rs_grpo", "--transform", "log"], "exp<t>"),
        (["--method", "a2po", "--transform", "none"], "a2po needs a calibrated"),
        (["--method", "tpo", "--G", "8", "--K", "6"], "--G 8: tpo"),
        (["--method", "grpo", "--G", "1"], "--G 1"),
        (["--transform", "none", "--baseline", "loo", "--G", "1"], "--G 1"),
        (["--method", "ipo", "--K", "1"], "--K 1"),
        (["--transform", "standardised", "--K", "1"], "--K 1"),
        (["--method", "qrpo", "--transform", "none"], "calibrated"),
        (["--transform", "none", "--kl", "5", "--K", "8"], "reach less than 2.08 nats"),
        (["--judge", ""], "--judge is empty"),
        (["--cache="], "--cache= is empty"),
        (["--column", "text"], "knows where its prompts are"),
        (["--data-split", "test"], "no splits"),
        (["--template-args", "{}"], "no chat template"),
    ],
)
def test_a_bad_flag_is_named_before_anything_is_drawn(flags, expected, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        train.main([*flags, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")])
    exited = isinstance(error.value, SystemExit)  # argparse has said why
    message = capsys.readouterr().err.strip() if exited else str(error.value)
    assert re.search(expected, message) and "\n" not in message
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "no prompt"),
        ('{"prompt": "a film"}\n{"prompt"', "line 2"),
        ('{"prompt": 3}', "line 1"),
        ('{"text": "a"}', "line 1"),
        ('{"prompt": "a film"}', "at least 10"),
        ("".join('{"prompt": "%s"}\n' % ("long " * 200 + str(i)) for i in range(12)), "context"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(text, expected, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=expected):
        train.main(["--task", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_touched_without_being_asked(short_run, tmp_path):
    before = (short_run / "config.json").read_bytes()
    with pytest.raises(ValueError, match="--resume or --overwrite"):
        train.main(["--transform", "exp10", "--out", str(short_run)])
    with pytest.raises(ValueError, match="was started with"):
        train.main(["--transform", "exp5", "--out", str(short_run), "--resume"])
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no run"):
        train.main(["--out", str(tmp_path), "--overwrite"])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # a model's
    with pytest.raises(ValueError, match="no run"):
        train.main(["--out", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").read_text() == "precious" and (
        short_run / "config.json"
    ).read_bytes() == before


def test_of_several_runs_all_are_checked_before_the_first_is_drawn(short_run, tmp_path):
    first, second = (shutil.copytree(short_run, tmp_path / name) for name in ("a", "b"))
    stored = read_sealed(second / "config.json")
    stored["made_from"]["reward"] = "of another reward model"
    (second / "config.json").write_text(json.dumps(stored))
    (first / "eval.json").unlink()
    with pytest.raises(ValueError, match="b: its --reward .* has changed"):
        evaluate.main([str(first), str(second), "--prompts", "4", "--samples", "4"])
    assert not (first / "eval.json").exists()


def test_an_evaluation_of_a_policy_that_is_gone_is_not_written(short_run, tmp_path, monkeypatch):
    run = shutil.copytree(short_run, tmp_path / "run")
    before, table_of = (run / "eval.json").read_bytes(), evaluation.table_of

    def trained_anew(*args):
        (run / "policy" / "SHA256SUMS").write_text("of another policy")
        return table_of(*args)

    monkeypatch.setattr(evaluation, "table_of", trained_anew)
    with pytest.raises(ValueError, match="trained anew while it was evaluated"):
        evaluate.main([str(run), "--prompts", "4", "--samples", "4"])
    assert (run / "eval.json").read_bytes() == before


def test_a_run_that_holds_another_is_not_overwritten(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    shutil.copytree(short_run, run / "seeds" / "1")
    config = replace(Config().resolved(), out=str(run))
    with pytest.raises(ValueError, match="holds another run, .*seeds/1, which --overwrite deletes"):
        runs.check_out(config, overwrite=True)


def test_a_run_without_a_judge_can_be_overwritten(short_run):
    config = replace(Config().resolved(), judge=None, out=str(short_run))
    runs.check_out(config, overwrite=True)


@pytest.mark.parametrize("content", [None, "", '{"task": ', "[]", '{"task": 1}'])
def test_evaluate_refuses_what_is_no_finished_run(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        evaluate.main([str(tmp_path)])


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train.py", ["--transform", "exp0"]),
        ("train.py", ["--colour", "red"]),
        ("evaluate.py", ["nowhere"]),
        ("evaluate.py", ["nowhere", "--report", "."]),
        ("evaluate.py", ["nowhere", "--judge", ""]),
    ],
)
def test_the_exit_status_is_2_with_one_line_and_no_traceback(script, flags):
    done = subprocess.run([sys.executable, ROOT / script, *flags], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"{script}: error: ")
        and done.stderr.count("\n") == 1
    )


def test_settings_survive_json(tmp_path):
    config = Config(transform="exp10", kl=0.5, steps=7).resolved()
    stored = vars(config) | {"beta": 3.5, "torch": "2"}  # beta followed from kl
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert Config.of(stored) == (config, stored)


# --- faults that used to come late, or not at all ---


def prompts_file(path: Path, prompts: list) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def test_a_held_out_prompt_that_is_too_long_is_found_at_the_start(tmp_path):
    prompts = [f"A film of {i}" for i in range(12)]
    prompts[9] = "long " * 200  # every tenth is for evaluation
    task = prompts_file(tmp_path / "p.jsonl", prompts)
    with pytest.raises(ValueError, match="context"):
        train.main(["--task", task, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_prompts_of_ones_own_that_are_longer_than_asked_for_are_left_out(tmp_path):
    prompts = [f"A film of {i}" for i in range(12)] + ["A film of two very long hours"]
    task = prompts_file(tmp_path / "p.jsonl", prompts)
    config = Config(task=task).resolved()
    assert config.max_prompt_tokens is None and len(load_task(config, "train").prompts) == 12
    with pytest.warns(UserWarning, match="1 longer prompts of .*p.jsonl are left out"):
        few = load_task(replace(config, max_prompt_tokens=6), "train").prompts
    assert len(few) == 11


def test_where_no_held_out_prompt_is_left_the_split_is_named(tmp_path):
    prompts = [f"{i}" + " long" * 40 * (i % 10 == 9) for i in range(30)]
    task = prompts_file(tmp_path / "p.jsonl", prompts)
    with pytest.raises(ValueError, match="every test prompt is longer than --max-prompt-tokens 20"):
        train.main(["--task", task, "--max-prompt-tokens", "20", "--out", str(tmp_path / "run")])


def test_what_a_run_lacks_is_found_before_any_run_is_evaluated(short_run, tmp_path, monkeypatch):
    """A relative name from another directory, metrics that are gone."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(short_run, other)
    before = (short_run / "eval.json").read_bytes()
    stored = read_sealed(other / "config.json")
    write_sealed(other / "config.json", stored | {"task": "data/prompts.jsonl"})
    with pytest.raises(ValueError, match="other: its --task data/prompts.jsonl is no file in"):
        evaluate.main([str(short_run), str(other), "--prompts", "8", "--samples", "4"])
    write_sealed(other / "config.json", stored)
    (other / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no step"):
        evaluate.main([str(short_run), str(other), "--prompts", "8", "--samples", "4"])
    assert (short_run / "eval.json").read_bytes() == before


def test_an_evaluation_asks_for_no_file_that_it_does_not_read(short_run, tmp_path):
    """The given reference samples are in the run; a judge that is replaced may be gone."""
    run = shutil.copytree(short_run, tmp_path / "run")
    stored = read_sealed(run / "config.json")
    gone = {"reference": f"{tmp_path}/gone.jsonl", "judge": f"{tmp_path}/gone.py:f"}
    write_sealed(run / "config.json", stored | gone)
    flags = ["--prompts", "4", "--samples", "4"]
    with pytest.raises(ValueError, match="its --judge .*gone.py is no file in"):
        evaluate.main([str(run), *flags])
    assert not evaluate.main([str(run), *flags, "--judge", "reviews"])


def test_a_directory_that_cant_be_written_is_named(tmp_path):
    check_writable(tmp_path)
    with pytest.raises(ValueError, match="gone: can't be written"):
        check_writable(tmp_path / "gone")


def test_a_directory_of_a_tasks_name_is_no_data(tmp_path, monkeypatch):
    (tmp_path / "reviews").mkdir()
    monkeypatch.chdir(tmp_path)
    config = Config(max_prompt_tokens=6).resolved()
    assert load_task(config, "train").ids.shape[1] <= 6


def test_a_transform_for_another_procedure_is_said_to_be_so():
    with pytest.warns(UserWarning, match="won_fp is the optimum for --procedure won"):
        Config(transform="won_fp").resolved()


def test_the_one_optimum_that_trains_badly_is_said_to():
    with pytest.warns(UserWarning, match="falls behind pi_ref .*; use exp10"):
        Config(transform="optimal", procedure="rewind").resolved()


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"method": "qrpo", "lam": 0.5}, "--lam 0.5 .* --method qrpo has no baseline"),
        ({"method": "a2po", "baseline": "loo"}, "--baseline loo .* --method a2po has no baseline"),
        ({"baseline": "loo", "lam": 0.5}, "--lam 0.5 .* --baseline loo has no GAE"),
        ({"method": "grpo", "baseline": "value", "lam": 0.5}, None),
    ],
)
def test_a_flag_that_the_run_does_not_read_is_said_to_be_so(flags, why, recwarn):
    train.warn_of_unread(flags, Config(**flags).resolved())
    said = [str(each.message) for each in recwarn]
    assert len(said) == (why is not None)
    assert all(re.fullmatch(why.replace(".*", "has no effect:"), each) for each in said)


def test_a_judge_that_fails_fails_at_the_start(tmp_path):
    (tmp_path / "judge.py").write_text("def broken(prompts, texts):\n    return [1 / 0]\n")
    flags = ["--judge", f"{tmp_path}/judge.py:broken", "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="judge.py:broken"):
        train.main([*flags, "--cache", str(tmp_path / "cache")])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_half_a_character_is_no_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a film"}\n{"prompt": "a \\ud800 film"}\n')
    with pytest.raises(ValueError, match="line 2 .*surrogates"):
        train.main(["--task", str(path), "--out", str(tmp_path / "run")])


def test_a_models_directory_is_no_run(short_run):
    with pytest.raises(ValueError, match="is a model, no run; give the run's directory, .*run$"):
        evaluate.main([str(short_run / "policy")])


def test_a_cache_that_is_a_file_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="--cache .* is a file; give a directory"):
        train.main(["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")])


def test_a_missing_policy_is_looked_for_somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no such file or directory in {tmp_path}"):
        train.main(["--policy", "./policy", "--out", str(tmp_path / "run")])


def test_a_policy_and_prompts_of_ones_own_take_nothing_of_the_reviews(tmp_path):
    from minictrl.config import OWN_POLICY, OWN_PROMPTS

    with pytest.raises(ValueError, match="--reward is missing: these prompts and this policy"):
        Config(task="own.jsonl", policy="my/model").resolved()
    config = Config(task="own.jsonl", policy="my/model", reward="my/reward").resolved()
    expected = OWN_POLICY | OWN_PROMPTS | {"reward": "my/reward", "judge": None}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.baseline == "loo"
    config = Config(policy="my/model").resolved()  # on the reviews' prompts
    assert (config.lr, config.layers, config.steps) == (OWN_POLICY["lr"], None, 45)
    config = Config(task="own.jsonl").resolved()  # the reviews' models on other prompts
    assert (config.lr, config.layers, config.prompts) == (7e-4, 2, None)


def test_lambda_is_1_with_a_value_head():
    assert Config(baseline="value").resolved().lam == 1
    assert Config().resolved().lam == 0.9
    assert Config(baseline="value", lam=0.5).resolved().lam == 0.5


def test_fewer_prompts_than_asked_for_are_reported(short_run):
    from minictrl.task import load_task

    config = runs.load_config(short_run)
    with pytest.warns(UserWarning, match="--prompts 5000: reviews has .* for train, all are taken"):
        load_task(replace(config, prompts=5000), "train")


def test_a_second_judge_leaves_the_first_ones_results(short_run, tmp_path, capsys):
    before = (short_run / "eval.json").read_bytes()
    run = shutil.copytree(short_run, tmp_path / "a$x^{$")  # a name that is no formula either
    (tmp_path / "judge.py").write_text(
        "def shorter(prompts, texts):\n    return [-float(len(text)) for text in texts]\n"
    )
    judge = f"{tmp_path}/judge.py:shorter"
    assert not evaluate.main([str(run), "--prompts", "8", "--samples", "8", "--judge", judge])
    assert f"judge: {judge}" in capsys.readouterr().out
    assert (run / "eval.json").read_bytes() == before
    rows = json.loads((run / "eval-judge-judge.py-shorter.json").read_text())["rows"]
    theirs = json.loads(before)["rows"]
    assert rows[1]["scorer"] == theirs[1]["scorer"] == "judge"
    assert rows[1]["win_rate"] != theirs[1]["win_rate"]
    assert (run / "tradeoff-judge-judge.py-shorter.png").is_file()
    (tmp_path / "other").mkdir()
    other = shutil.copy(tmp_path / "judge.py", tmp_path / "other") + ":shorter"
    with pytest.raises(
        ValueError, match="has the win rates by .*judge.py:shorter; rename or delete"
    ):
        evaluate.main([str(run), "--prompts", "8", "--samples", "8", "--judge", other])


def test_theory_is_that_of_the_runs_own_reward_model(short_run, tmp_path, capsys):
    run = shutil.copytree(short_run, tmp_path / "run")
    (tmp_path / "f.py").write_text("def length(prompts, texts):\n    return [*map(len, texts)]\n")
    flags = ["--prompts", "8", "--samples", "8", "--reward", f"{tmp_path}/f.py:length"]
    assert not evaluate.main([str(run), *flags])
    rows = json.loads((run / "eval-reward-f.py-length.json").read_text())["rows"]
    assert all(row["theory"] is None for row in rows) and rows[0]["optimal"] is not None


def test_a_run_without_a_judge_has_no_judges_rows(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    stored = read_sealed(run / "config.json")
    stored |= {"judge": None, "made_from": stored["made_from"] | {"judge": None}}
    (run / "config.json").write_text(json.dumps(stored))
    assert not evaluate.main([str(run), "--prompts", "8", "--samples", "8"])
    rows = json.loads((run / "eval.json").read_text())["rows"]
    assert {row["scorer"] for row in rows} == {"reward"}
    first = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert "judge" not in first and "reward" in first


def test_a_resumed_run_may_go_on_elsewhere_and_more_slowly(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    settings = {"out": str(run), "cache": str(tmp_path), "device": "cpu", "lr": 1e-5}
    with pytest.raises(ValueError, match="--lr 1e-05: .* has no step left"):
        runs.resumed(run, settings)
    shutil.rmtree(run / "policy")
    config = runs.resumed(run, settings)
    assert (config.cache, config.device, config.lr) == (str(tmp_path), "cpu", 1e-5)
    moved = run.rename(tmp_path / "moved")  # without --out in `settings`: that of other flags
    assert runs.resumed(moved, {}).out == str(moved)
    assert config.transform == "exp10"


@pytest.mark.parametrize(
    "given",
    [
        {"method": "pkpo", "n": 16},  # alone, n would be too large for the default G
        {"task": "p.jsonl", "policy": "p"},  # alone, without a reward
        {"column": "question"},
    ],
)
def test_what_is_given_to_resume_is_compared_with_the_runs_own_settings(
    given, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "train", lambda config, resume: config)
    kept = dict(task="p.jsonl", policy="p", reward="r.py:f", column="question")
    config = Config(method="pkpo", n=16, G=16, K=32, out=str(tmp_path / "run"), **kept).resolved()
    runs.create(tmp_path / "run", config, {})
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert train.main([*flags, "--resume", "--out", str(tmp_path / "run")]) == config
    with pytest.raises(ValueError, match="--K 3: .* was started with 32"):
        train.main([*flags, "--K", "3", "--resume", "--out", str(tmp_path / "run")])


def test_a_divergence_names_step_kl_and_learning_rate(tmp_path):
    flags = [
        "--lr",
        "1e20",
        "--steps",
        "3",
        "--prompts",
        "4",
        "--K",
        "4",
        "--batch",
        "4",
        "--G",
        "4",
    ]
    folders = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match="diverged at step .*KL of .*lower --lr than 1e.20"):
        train.main([*flags, *folders, "--minibatch", "16", "--max-new-tokens", "8"])


def test_a_reader_that_leaves_is_no_error(short_run):
    """As in `evaluate.py RUN | head`."""
    code = (
        "import sys; sys.argv[0] = 'x.py'; from minictrl.cli import run_script\n"
        "def main():\n"
        "    while True: print('line ' * 1000)\n"
        "run_script(main)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == 141


def test_a_disk_that_is_full_costs_no_finished_step(tmp_path):
    """The checkpoint fits, the policy doesn't: one line, and with room the run ends as it would
    have."""
    flags = "--prompts 12 --K 8 --steps 2 --batch 6 --G 2 --max-new-tokens 4".split()

    def run(out: str, *more: str, **options) -> subprocess.CompletedProcess:
        places = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / out)]
        command = [sys.executable, "train.py", *flags, *places, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)

    limit = 8_000_000  # bytes a file; the policy has 8.9 million
    full = run("full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert re.search(r"error: .*policy: can't be written .*--resume", full.stderr.splitlines()[-1])
    assert run("full", "--resume").returncode == run("whole").returncode == 0
    ended, expected = (
        load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("full", "whole")
    )
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


def test_a_run_is_not_deleted_for_one_that_cant_begin(short_run, tmp_path, monkeypatch):
    """A cache that can't be made, a tracker without an account, a reward that is always one."""
    run = shutil.copytree(short_run, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "f.py").write_text("def one(prompts, texts):\n    return [1.0] * len(texts)\n")
    tracker = SimpleNamespace(__spec__=None, init=lambda **options: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    small = ["--prompts", "4", "--K", "4", "--max-new-tokens", "4", "--out", str(run)]
    for flags, fault in (
        (["--cache", f"{tmp_path}/file/sub"], "--cache .*file/sub: .*file is a file"),
        (["--cache", f"{tmp_path}/c", "--track", "wandb"], "--track wandb: can't start"),
        (["--cache", f"{tmp_path}/c", "--reward", f"{tmp_path}/f.py:one"], "reach 0.00 nats"),
    ):
        with pytest.raises(ValueError, match=fault):
            train.main([*small, *flags, "--overwrite"])
        assert sorted(path.name for path in run.iterdir()) == before
        assert runs.load_finished(run).transform == "exp10"


def test_raw_rewards_beyond_float32_are_named_and_no_learning_rate(tmp_path):
    """A sentinel for "bad": over a beta below 1 it is infinite."""
    (tmp_path / "f.py").write_text(
        "def f(x, y): return [-3.4e38 if len(t) % 4 == 0 else float(len(t)) for t in y]\n"
    )
    small = ["--prompts", "8", "--K", "16", "--max-new-tokens", "6", "--steps", "1", "--batch", "4"]
    flags = ["--transform", "none", "--beta", "0.5", "--cache", f"{tmp_path}/c", "--layers", "1"]
    with pytest.raises(ValueError, match="R = Phi / beta is up to .* nats"):
        train.main([*small, *flags, "--reward", f"{tmp_path}/f.py:f", "--out", f"{tmp_path}/a"])
    flags[2:4] = ["--kl", "0.5"]
    with pytest.raises(ValueError, match="rewards of up to 3.4e[+]38 make R = Phi / beta"):
        train.main([*small, *flags, "--reward", f"{tmp_path}/f.py:f", "--out", f"{tmp_path}/b"])


def test_what_has_no_marker_is_not_deleted(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "x", "method": "y"}')
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no .minictrl, so it may not be ours"):
        train.main(["--out", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_run_does_not_delete_its_own_models_under_another_name(tmp_path, monkeypatch):
    """From a local copy of the hub, and as the base of an adapter."""
    out = tmp_path / "out"
    (out / "policy").mkdir(parents=True)
    (out / runs.MARKER).touch()
    monkeypatch.setenv("MINICTRL_HUB", str(out))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(out / "policy")}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for policy in ("policy", str(adapter)):
        config = replace(Config().resolved(), policy=policy, out=str(out))
        with pytest.raises(ValueError, match="--policy .*which --overwrite deletes"):
            runs.check_out(config, overwrite=True)


def test_an_out_may_be_a_link_to_what_is_not_there_and_not_the_root(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    runs.create(tmp_path / "link", Config().resolved(), {})
    assert (tmp_path / "run/config.json").is_file()
    with pytest.raises(ValueError, match="--out /: is the root of the disk"):
        train.main(["--out", "/"])


def test_two_runs_do_not_share_a_directory_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with runs.hold(tmp_path / "run"), pytest.raises(ValueError, match="another run is at work"):
        runs.hold(tmp_path / "link")


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "cuda:-1", "cudax", "cuda:00", "cuda:256"])
def test_a_device_that_is_none_is_refused_where_there_is_a_gpu(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="--device"):
        resolve_device(name)
    monkeypatch.setenv("LOCAL_RANK", name.removeprefix("cuda").removeprefix(":") or "y")
    with pytest.raises(ValueError, match="--device"):
        resolve_device("auto")


def test_an_out_that_lies_in_a_file_is_named(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ValueError, match="--out .*f/x: lies in a file; give another --out"):
        train.main(["--out", str(tmp_path / "f" / "x")])


def test_an_evaluation_that_replaces_a_larger_one_says_so(tmp_path):
    path = tmp_path / "eval.json"
    row = dict.fromkeys(results.ROW, 0.5) | {"procedure": "bon", "scorer": "reward"}
    row |= {"prompts": 200, "samples": 8}
    results.check_replaced(path, {}, 3, 4, {})  # there is none
    for damaged in ([], {"rows": [{}]}, {"rows": [row | {"prompts": "x"}]}, {"rows": []}):
        path.write_text(json.dumps(damaged))
        results.check_replaced(path, {"judge": "x"}, 3, 4, {"judge": "1"})
    write_sealed(path, {"rows": [row]})
    results.check_replaced(path, {}, 200, 8, {})
    for less in ((3, 32), (400, 4)):
        with pytest.warns(UserWarning, match="200 prompts with 8 responses each is replaced"):
            results.check_replaced(path, {}, *less, {})


@pytest.mark.parametrize("model, digest", [("b/j.py:f", "1"), ("j.py:f", "2")])
def test_a_table_by_another_judge_of_the_same_name_is_kept(model, digest, tmp_path):
    path = tmp_path / "eval-judge-j.py-f.json"
    row = dict.fromkeys(results.ROW, 0.5) | {"procedure": "bon", "scorer": "judge"}
    rows = [row | {"prompts": 3, "samples": 4}]
    write_sealed(path, {"rows": rows, "models": {"judge": "j.py:f"}, "digests": {"judge": "1"}})
    results.check_replaced(path, {"judge": "j.py:f"}, 3, 4, {"judge": "1"})
    with pytest.raises(ValueError, match="has the win rates by another, j.py:f; rename"):
        results.check_replaced(path, {"judge": model}, 3, 4, {"judge": digest})


def test_a_value_head_needs_no_other_sample_of_the_prompt():
    assert Config(transform="none", G=1, baseline="value").resolved().G == 1
    with pytest.raises(ValueError, match="--G 1: a response is compared"):
        Config(transform="none", G=1, baseline="loo").resolved()


@pytest.mark.parametrize("kl", ["nan", "inf", "0", "-1", "1,2"])
def test_a_budget_of_the_studies_is_a_positive_number(kl, tmp_path, capsys):
    with pytest.raises(SystemExit):
        leaderboard.main([str(tmp_path), "--budgets", "1", kl])
    assert f"{kl}: use positive numbers" in capsys.readouterr().err


def test_files_are_as_readable_as_others_and_a_link_is_not_followed(tmp_path):
    """safetensors writes for the owner alone; a policy that was moved away stays as it is."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "policy").symlink_to(tmp_path / "elsewhere")
    save_policy(*load_policy("reviews"), tmp_path / "policy")
    save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {})
    (tmp_path / "other").touch()
    mode = (tmp_path / "other").stat().st_mode
    for name in ("x.safetensors", "policy/model.safetensors", "policy/config.json"):
        assert (tmp_path / name).stat().st_mode == mode
    assert not (tmp_path / "policy").is_symlink() and not any((tmp_path / "elsewhere").iterdir())
