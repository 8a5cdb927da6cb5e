"""Trackers get what metrics.jsonl gets, and some responses."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

import train

FLAGS = "--prompts 12 --K 8 --steps 2 --batch 6 --G 2 --max-new-tokens 4".split()


@pytest.fixture
def flags(tmp_path):
    return [*FLAGS, "--out", f"{tmp_path}/run", "--cache", f"{tmp_path}/cache"]


class Fake:
    """What wandb and trackio share."""

    __spec__ = ModuleSpec("fake", None)

    def __init__(self, fails=False):
        self.rows, self.settings, self.fails = [], None, fails
        self.Table = lambda columns, data: (columns, data)

    def init(self, project, name, config):
        self.settings = config
        return SimpleNamespace(log=self.log, finish=lambda: self.rows.append("end"))

    def log(self, row, step):
        if self.fails:
            raise OSError("no network")
        self.rows.append((step, row))


def test_a_tracker_gets_every_row_and_a_table_of_responses(flags, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert not train.main([*flags, "--track", "wandb"])
    (step, table), first, second, end = fake.rows
    columns, rows = table["responses"]
    assert step == 1 and columns == ["prompt", "response", "reward"] and len(rows) == 6
    stored = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for (step, row), line in zip((first, second), stored):
        assert step == line["step"] and row == {k: v for k, v in line.items() if v is not None}
    assert end == "end" and fake.settings["kl"] == 1.0


def test_a_tracker_that_fails_costs_nothing_else(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", Fake(fails=True))
    with pytest.warns(UserWarning, match="--track trackio fails .no network.: the run goes on"):
        assert not train.main([*flags, "--track", "trackio"])
    assert (tmp_path / "run/policy/config.json").is_file()


def test_a_tracker_that_is_not_there_is_one_line_before_anything_is_drawn(
    flags, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--track wandb: it is not installed; pip install wandb"):
        train.main([*flags, "--track", "wandb"])
    assert not (tmp_path / "cache").exists()


def test_tensorboard_gets_scalars_and_text(flags, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not train.main([*flags, "--track", "tensorboard"])
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("kl_ref")] == [1, 2]
    assert "responses/text_summary" in events.Tags()["tensors"]
