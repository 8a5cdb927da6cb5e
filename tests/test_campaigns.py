"""A few cases of each campaign; `tests/campaigns/` has the long ones."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from minictrl import files, results, runs

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
from tiny import AGAIN, REFUSED, SAME


@pytest.fixture(scope="module")
def faults(campaign, tmp_path_factory):
    """part of the campaign -> its rows"""
    out, parts = tmp_path_factory.mktemp("faults") / "faults.jsonl", {}
    few = {"flips": 80, "limits": 2, "numbers": 5, "errors": 1, "runs": 2}
    campaign("faults.py", "--out", out, *(x for name in few for x in (f"--{name}", few[name])))
    for row in files.read_rows(out):
        parts.setdefault(row["part"], []).append(row)
    return parts


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(campaign, tmp_path):
    out = tmp_path / "kills.jsonl"
    campaign("kill.py", "--kills", 5, "--out", out, "--cases", "ppo, prefix", "qrpo")
    rows = files.read_rows(out)
    assert not [row for row in rows if row["wrong"]] and len({row["stage"] for row in rows}) > 2


def test_a_damaged_file_gives_no_other_result(faults):
    assert {row["outcome"] for row in faults["flips"]} <= {SAME, AGAIN, REFUSED}
    seen = {row["fault"].split()[1] for row in faults["flips"] if row["outcome"] != SAME}
    assert seen >= {"cache", "checkpoint", "policy", "config.json", "eval.json", "wins.safetensors"}


def test_the_scripts_refuse_or_repair_what_is_damaged(faults):
    cache, *others = faults["scripts"]
    assert cache["outcome"] in (SAME, AGAIN)  # it reads one chunk of two
    assert [row["outcome"] for row in others] == [REFUSED, SAME, REFUSED]


@pytest.mark.parametrize(
    "part, outcomes",
    {
        "disk": {SAME, REFUSED},  # full
        "places": {REFUSED},  # no right to write
        "clock": {SAME},  # goes back
        "strangers": {SAME},  # beside a saved policy
        "numbers": {REFUSED},  # not finite
        "raises": {REFUSED},  # a reward
        "memory": {SAME},  # runs out: smaller pieces
        "together": {SAME},  # runs at once on one cache draw each chunk once
    }.items(),
)
def test_a_fault_costs_no_result(part, outcomes, faults):
    assert {row["outcome"] for row in faults[part]} <= outcomes and faults[part]


def test_half_of_a_new_run_is_named_and_can_be_overwritten(tmp_path):
    (tmp_path / runs.MARKER).touch()
    with pytest.raises(ValueError, match="stopped before it began; .* with --overwrite"):
        runs.load_config(tmp_path)


def test_an_evaluation_is_whole_or_named(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    (run / "samples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=re.escape("samples.jsonl: is damaged")):
        results.read(run)
