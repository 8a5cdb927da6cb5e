"""Bad input: one line that names the value, the rule and the fix, exit status 2, nothing
overwritten.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import train
from minictrl.config import Config

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
        (["--procedure", "median"], "rewind"),
        (["--method", "ipo", "--transform", "exp10"], "implies"),
        (["--policy", "nowhere/at-all"], "nowhere/at-all"),
        (["--reward", "nowhere"], "nowhere"),
        (["--device", "tpu"], "cuda"),
        (["--max-new-tokens", "500"], "context"),
        (["--kl", "5"], "out of reach of 100 samples.*less than 4.62"),
        (["--method", "bonbon", "--kl", "4"], "Best-of-147"),
        (["--method", "bond", "--kl", "2", "--K", "15"], "Best-of-19"),
        (["--method", "pkpo", "--n", "16"], "--n 16: pkpo"),
        (["--method", "grpo", "--G", "1"], "--G 1"),
        (["--transform", "none", "--baseline", "loo", "--G", "1"], "--G 1"),
        (["--method", "ipo", "--K", "1"], "--K 1"),
        (["--transform", "standardised", "--K", "1"], "--K 1"),
        (["--method", "qrpo", "--transform", "none"], "calibrated"),
    ],
)
def test_a_bad_flag_is_named_before_anything_is_drawn(flags, expected, tmp_path):
    with pytest.raises(ValueError, match=expected) as error:
        train.main([*flags, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")])
    assert "\n" not in str(error.value)
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
    assert Config.load(tmp_path / "config.json") == (config, stored)
