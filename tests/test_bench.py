"""The speed rows compare the same work and keep their form."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from minictrl.bench import __main__ as bench
from minictrl.bench import scaling
from minictrl.models import load_policy
from minictrl.sampling import sample


def test_a_ratio_is_the_median_of_neighbours():
    rates = iter([10, 2, 30, 10, 8, 1])  # ours, theirs, ours, …: ratios 5, 3 and 8
    assert bench.paired(rates.__next__, rates.__next__, 3) == {"ours": 10, "theirs": 2, "ratio": 5}


def test_tokens_of_generate_count_up_to_eos():
    _, tokenizer = load_policy("reviews")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    # 3 + 2 + 1 + 3
    responses = torch.tensor([[9, 9, 9], [9, eos, pad], [eos, pad, pad], [9, 9, eos]])

    def answer(input_ids, **_):
        return torch.cat([input_ids.repeat(4, 1), responses], 1)

    stub = SimpleNamespace(device="cpu", generate=answer)
    assert (
        bench.generate(
            stub, tokenizer, ["this film is"], 1, "dynamic", num_samples=4, max_new_tokens=3
        )
        == 9
    )


def test_generate_draws_from_the_same_distribution():
    """Mean length of 150 responses on both sides, within 4 standard errors of their difference;
    seeded.
    """
    model, tokenizer = load_policy("reviews")
    torch.manual_seed(0)
    drawn = {"num_samples": 150, "max_new_tokens": bench.T}
    theirs = bench.generate(model, tokenizer, ["this film is a"], 1, "dynamic", **drawn) / 150
    lengths = sample(model, tokenizer, ["this film is a"], seed=0, **drawn).mask.sum(-1)
    assert abs(lengths.mean() - theirs) < 4 * lengths.std() * (2 / 150) ** 0.5


def test_rows_are_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "K", 2)
    monkeypatch.setattr(bench, "T", 3)
    bench.main(
        [
            "--quick",
            "--device",
            "cpu",
            "--rows",
            "sample_vs_generate",
            "--json",
            str(tmp_path / "rows.json"),
        ]
    )
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(row) == {"name", "ours", "theirs", "ratio", "unit", "setting"}
    assert row["name"] == "sample_vs_generate" and row["ours"] > 0 and row["theirs"] > 0
    assert capsys.readouterr().out.startswith("| name | ours | theirs | ratio | unit | setting |")


def test_a_row_whose_library_is_missing_is_left_out_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    bench.main(
        ["--device", "cpu", "--rows", "ppo_step_vs_trl", "rloo_step_vs_trl", "decode_roofline"]
    )
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2  # the table's head
    assert (
        captured.err.count("pip install") == 2
        and captured.err.count("\n") == captured.err.count("left out") == 3
    )


@pytest.mark.parametrize("method", ("ppo", "rloo"))
def test_a_step_is_timed_against_trl(method, monkeypatch):
    """TRL draws 4 prompts x 2 responses of 1 to 4 tokens."""
    pytest.importorskip("trl")
    monkeypatch.setattr(bench, "T", 4)
    monkeypatch.setattr(bench, "BATCH", bench.BATCH | {"batch": 4, "G": 2, "minibatch": 4})
    monkeypatch.setattr(bench, "rate", lambda work: work())
    row = bench.step_vs_trl(method, "reviews", torch.device("cpu"), quick=True)
    assert 8 <= row["theirs"] <= 32 and row["ours"] > 0


def test_the_share_of_calibration_is_of_calibration_and_steps(monkeypatch):
    """1 s for half the prompts; (4 - 2) / 2 s a step, the first left out; 80 epochs are 80 x 256 /
    512 steps.
    """
    monkeypatch.setattr(bench, "seconds", lambda work: 1.0)
    monkeypatch.setattr(bench, "rollout", lambda *args, **settings: None)
    monkeypatch.setattr(bench, "train_rate", lambda folder, **settings: None)
    monkeypatch.setattr(
        bench, "read_metrics", lambda run: [{"seconds": s} for s in (2.0, 2.7, 4.0)]
    )
    row = bench.calibration_share("reviews", torch.device("cpu"), quick=False)
    # 2 / 47
    assert (
        row["ours"] == pytest.approx(100 * 2 / 42)
        and "4.3 % of the default run's 45" in row["setting"]
    )


def test_bytes_of_a_decode_step():
    """GPT-2, 3 layers, 4 heads of 5: 2 x 3 x 20 numbers a token; Llama with 2 key-value heads of 8:
    2 x 3 x 16.
    """
    assert scaling.cache_bytes(GPT2Config(n_layer=3, n_head=4, n_embd=20)) == 2 * 120
    llama = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32
    )
    assert scaling.cache_bytes(llama, size=4) == 4 * 96
    # 1,000 of weights, two prompts of 5 tokens, once each, and 20 rows with 3 tokens of their own;
    # 10 a token
    assert (
        scaling.decode_bytes(1000, 10, rows=20, prompts=2, prompt_tokens=5, t=3) == 1000 + 100 + 600
    )


def test_the_roofline_of_a_tiny_model_is_measured(monkeypatch):
    monkeypatch.setattr(scaling, "K", 4)
    shares, mfu = scaling.roofline("cpu", 1e12, 1e12, depth=1, prompts=(1, 2), lengths=(4, 24))
    assert (
        list(shares) == [4, 8] and all(0 < share < 1 for share in shares.values()) and 0 < mfu < 1
    )


def test_cost_on_paper_is_that_of_a_hand_computed_case(monkeypatch):
    """A GPU of 1 B/s and 1 FLOP/s, K = 2, 10 prompts of 3 tokens, responses of 4, 5 epochs; 1
    parameter, 1 B a token. Memory 37 - 2 holds 5 rows of 7. A step moves 2 + 2.5 x 3 + 5 x 2 = 19.5
    B, and computes 2 x 5 FLOP: 19.5 s."""
    for name, value in dict(
        PROMPTS=10,
        K=2,
        T=4,
        PROMPT_TOKENS=3,
        EPOCHS=5,
        BANDWIDTH=1.0,
        FLOPS=1.0,
        MEMORY=37.0,
        DECODE=1.0,
        MFU=1.0,
    ).items():
        monkeypatch.setattr(scaling, name, value)
    cost, decode = scaling.paper_cost(1, 1, 1), 4 * 19.5 / 5
    seconds = {
        "sampling": 10 * (2 * decode + 3 * 2),
        "scoring": 10 * 2 * 7 * 2,
        "rollouts": 10 * 5 * (decode + 3 * 2),
        "updates": 10 * 5 * 7 * (6 + 6),
    }
    assert {name: 3600 * cost[name] for name in seconds} == pytest.approx(seconds)
    assert cost["share"] == pytest.approx((372 + 280) / (372 + 280 + 1080 + 4200))


def test_growth_is_written_and_its_slope_is_an_exponent(monkeypatch, tmp_path):
    assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    monkeypatch.setattr(scaling, "START", {"K": 2, "prompts": 1, "length": 2, "depth": 1})
    monkeypatch.setattr(scaling, "GROWTH", {"K": ((2, 4), {})})
    bench.main(["--growth", str(tmp_path), "--device", "cpu"])
    rows = list(csv.DictReader(open(tmp_path / "growth.csv")))
    assert [row["K"] for row in rows] == ["2", "4"] and all(
        float(row["memory_mb"]) > 50 for row in rows
    )
    assert (tmp_path / "growth.png").stat().st_size > 1000
