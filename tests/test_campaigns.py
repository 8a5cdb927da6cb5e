"""A few cases of each campaign; `tests/campaigns/` has the long ones."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

import broken
import damaged
import faults
import kill
from tiny import AGAIN, REFUSED, SAME, World, evaluated, run, runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def outcomes(rows) -> set:
    return {row["outcome"] for row in rows}


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    rows = kill.campaign(5, 0, tmp_path / "kills.jsonl", tmp_path, cases=("ppo, prefix", "qrpo"))
    assert not [row for row in rows if row["wrong"]] and len({row["stage"] for row in rows}) > 2


def test_a_damaged_file_gives_no_other_result(world):
    rows = list(damaged.flips(world, 54, 1))
    assert outcomes(rows) <= {SAME, AGAIN, REFUSED}
    seen = {row["fault"].split()[1] for row in rows if row["outcome"] != SAME}
    assert seen >= {"cache", "checkpoint", "policy", "config.json", "eval.json", "wins.safetensors"}


def test_the_scripts_refuse_or_repair_what_is_damaged(world):
    cache, *others = damaged.by_scripts(world, 4, 1)
    assert cache["outcome"] in (SAME, AGAIN)  # it reads one chunk of two
    assert [row["outcome"] for row in others] == [REFUSED, SAME, REFUSED]


def test_a_full_disk_or_one_without_rights_is_one_line_and_costs_no_result(world):
    assert outcomes(faults.disk(world, 2, 0)) <= {SAME, REFUSED}
    assert outcomes(faults.places(world)) == {REFUSED}


def test_a_clock_that_goes_back_stops_no_checkpoint(world):
    assert outcomes(faults.clock(world)) == {SAME}


def test_what_is_not_finite_is_named_and_touches_no_weight(world):
    assert outcomes(broken.not_finite(world, 2, 5)) == {REFUSED}


def test_a_reward_that_raises_names_the_text(world):
    assert outcomes(broken.raises(world)) == {REFUSED}


def test_memory_that_runs_out_takes_smaller_pieces(world):
    """cuBLAS' words; a CPU's in the update."""
    assert outcomes(broken.memory(world, broken.MEMORY[1:2])) == {SAME}


def test_runs_on_one_cache_draw_each_chunk_once(world):
    assert outcomes(faults.together(world, 2)) == {SAME}


def test_half_of_a_new_run_is_named_and_can_be_overwritten(tmp_path):
    (tmp_path / runs.MARKER).touch()
    with pytest.raises(ValueError, match="stopped before it began; .* with --overwrite"):
        runs.load_config(tmp_path)


def test_an_evaluation_is_whole_or_named(world):
    folder = world.fresh(copy=True)
    (folder / "run" / "samples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=re.escape("samples.jsonl: is damaged")):
        damaged.evaluation.read(folder / "run")


def test_what_lies_beside_a_saved_policy_is_no_damage(world):
    folder = world.fresh(copy=True)
    (folder / "run" / "policy" / "README.md.1.tmp").touch()  # of an evaluation that was killed
    assert run("evaluate", faults.evaluation_of(folder), world.log)[0] == 0
    assert evaluated(folder) == world.evaluated
