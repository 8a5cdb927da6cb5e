"""The speed rows compare the same work and keep their form."""

import json
from types import SimpleNamespace

import torch

from minictrl import bench
from minictrl.models import load_policy
from minictrl.sampling import sample


def test_a_ratio_is_the_median_of_neighbours(monkeypatch):
    rates = iter([10, 2, 30, 10, 8, 1])  # ours, theirs, ours, …: ratios 5, 3 and 8
    monkeypatch.setattr(bench, "rate", lambda work: next(rates))
    assert bench.paired(None, None, 3) == {"ours": 10, "theirs": 2, "ratio": 5}


def test_tokens_of_generate_count_up_to_eos():
    _, tokenizer = load_policy("reviews")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    responses = torch.tensor([[9, 9, 9], [9, eos, pad], [eos, pad, pad], [9, 9, eos]])  # 3 + 2 + 1 + 3
    def answer(input_ids, **_):
        return torch.cat([input_ids.repeat(4, 1), responses], 1)

    stub = SimpleNamespace(device="cpu", generate=answer)
    assert bench.generate(stub, tokenizer, ["this film is"], 1, "dynamic") == 9


def test_generate_draws_from_the_same_distribution(monkeypatch):
    """Mean length of 150 responses on both sides, within 4 standard errors of their difference; seeded."""
    monkeypatch.setattr(bench, "K", 150)
    model, tokenizer = load_policy("reviews")
    torch.manual_seed(0)
    theirs = bench.generate(model, tokenizer, ["this film is a"], 1, "dynamic") / 150
    lengths = sample(model, tokenizer, ["this film is a"], num_samples=150, max_new_tokens=bench.T, seed=0).mask.sum(-1)
    assert abs(lengths.mean() - theirs) < 4 * lengths.std() * (2 / 150) ** 0.5


def test_rows_are_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "K", 2)
    monkeypatch.setattr(bench, "T", 3)
    bench.main(["--quick", "--device", "cpu", "--rows", "sample_vs_generate", "--json", str(tmp_path / "rows.json")])
    row, = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(row) == {"name", "ours", "theirs", "ratio", "unit", "setting"}
    assert row["name"] == "sample_vs_generate" and row["ours"] > 0 and row["theirs"] > 0
    assert capsys.readouterr().out.startswith("| name | ours | theirs | ratio | unit | setting |")
