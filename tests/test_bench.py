"""The speed rows compare the same work and keep their form."""

import json
from types import SimpleNamespace

import pytest
import torch

from minictrl.bench import __main__ as bench
from minictrl.bench import random_weights, sampling, step, timing
from minictrl.bench.random_weights import random_model
from minictrl.models import load_policy
from minictrl.sampling import sample

CPU = torch.device("cpu")


def test_a_ratio_is_the_median_of_neighbours():
    rates = iter([10, 2, 30, 10, 8, 1])  # ours, theirs, ours, …: ratios 5, 3 and 8
    compared = timing.compare(rates.__next__, rates.__next__, 3)
    assert compared == {"ours": 10, "theirs": 2, "ratio": 5}


def test_tokens_of_generate_count_up_to_eos():
    _, tokenizer = load_policy("reviews")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    # 3 + 2 + 1 + 3
    responses = torch.tensor([[9, 9, 9], [9, eos, pad], [eos, pad, pad], [9, 9, eos]])

    def answer(input_ids, **_):
        return torch.cat([input_ids.repeat(4, 1), responses], 1)

    stub = SimpleNamespace(device="cpu", generate=answer)
    assert sampling.generate(stub, tokenizer, ["this film is"], 3, 1, "dynamic") == 9


def test_generate_draws_from_the_same_distribution(monkeypatch):
    """Mean length of 150 responses on both sides, within 4 standard errors of their difference.

    The seeds are fixed.
    """
    monkeypatch.setattr(sampling, "K", 150)
    model, tokenizer = load_policy("reviews")
    torch.manual_seed(0)
    texts, T = ["this film is a"], sampling.T
    theirs = sampling.generate(model, tokenizer, texts, T, 1, "dynamic") / 150
    ours = sample(model, tokenizer, texts, num_samples=150, max_new_tokens=T, seed=0)
    lengths = ours.mask.sum(-1)
    assert abs(lengths.mean() - theirs) < 4 * lengths.std() * (2 / 150) ** 0.5


def test_ctranslate2_draws_from_the_same_distribution(monkeypatch):
    """Mean length of 150 responses on both sides, EOS counted on both, within 4 standard errors of
    their difference.
    """
    ctranslate2 = pytest.importorskip("ctranslate2")
    monkeypatch.setattr(sampling, "K", 150)
    model, tokenizer = load_policy("reviews")
    generator, texts, T = sampling.converted(model, tokenizer), ["this film is a"], sampling.T
    ctranslate2.set_random_seed(0)
    theirs = sampling.ctranslate2_generate(generator, model, tokenizer, texts, T, 1)
    eos = tokenizer.eos_token_id
    assert len(theirs) == 150 and all(eos not in tokens[:-1] for tokens in theirs)
    assert all(len(tokens) == T or tokens[-1] == eos for tokens in theirs)
    ours = sample(model, tokenizer, texts, num_samples=150, max_new_tokens=T, seed=0)
    lengths = ours.mask.sum(-1)
    assert abs(lengths.mean() - sum(map(len, theirs)) / 150) < 4 * lengths.std() * (2 / 150) ** 0.5


def test_rows_are_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sampling, "K", 2)
    monkeypatch.setattr(sampling, "T", 3)
    file = tmp_path / "rows.json"
    arguments = ["--quick", "--device", "cpu", "--rows", "sample_vs_generate", "--json", str(file)]
    bench.main(arguments)
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row) == {"name", "ours", "theirs", "ratio", "unit", "setting"}
    assert row["name"] == "sample_vs_generate" and row["ours"] > 0 and row["theirs"] > 0
    assert capsys.readouterr().out.startswith("| name | ours | theirs | ratio | unit | setting |")


def test_a_row_is_written_as_soon_as_it_is_there(monkeypatch, tmp_path):
    file, row = tmp_path / "rows.json", dict(ours=1.0, theirs=1.0, ratio=1.0, unit="", setting="")

    def rows(*_):
        yield row
        assert json.loads(file.read_text()) == {"rows": [{"name": "presets"} | row]}
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.ROWS, "presets", rows)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--device", "cpu", "--rows", "presets", "--json", str(file)])
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_a_row_that_cannot_be_measured_is_left_out_with_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    names = ["ppo_step_vs_trl", "sample_vs_ctranslate2", "decode_roofline", "presets"]
    bench.main(["--device", "cpu", "--rows", *names])
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2  # the table's head
    assert captured.err.count("\n") == captured.err.count("left out") == 4
    assert captured.err.count("pip install") == 2


def test_a_step_is_timed_against_trl(monkeypatch):
    """Both sides take 4 prompts x 2 responses; TRL's trainer draws and trains on all of them."""
    pytest.importorskip("trl.experimental.ppo")  # later versions of TRL have none
    for name, value in {"T": 4, "PROMPTS": 4, "G": 2, "MINIBATCH": 4}.items():
        monkeypatch.setattr(step, name, value)
    drawn = []
    make = step.ppo_trainer

    def watched(*args):
        trainer = make(*args)
        generate = trainer.policy_model.generate

        def watch(*args, **settings):
            drawn.append(len(settings["input_ids"]))
            return generate(*args, **settings)

        trainer.policy_model.generate = watch
        return trainer

    monkeypatch.setattr(step, "ppo_trainer", watched)
    (row,) = step.ppo_step_vs_trl("reviews", CPU, quick=True)
    assert row["ours"] > 0 and row["theirs"] > 0
    assert sum(drawn) == 2 * 4 * 2  # a warm-up and a step


def test_train_py_takes_the_flags_of_a_step(tmp_path):
    """3 steps of 4 prompts x 2 responses, at most 4 tokens each."""
    same = {"batch": 4, "G": 2, "minibatch": 4, "max-new-tokens": 4, "prompts": 4, "layers": 1}
    metrics = step.train(str(tmp_path), "reviews", CPU, 3, same | {"baseline": "value"})
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert 8 * 3 <= metrics[-1]["tokens"] <= 32 * 3 and metrics[-1]["seconds"] > 0


def test_the_share_of_calibration_is_of_calibration_and_steps(monkeypatch):
    """128 prompts in 128 s: 1 s per prompt. (4 - 2) / 2 s per step of 512 responses, the first
    left out: 80 responses take 80 / 512 s.
    """
    monkeypatch.setattr(step, "seconds", lambda work: 128.0)
    monkeypatch.setattr(step, "sample_and_score", lambda *_, **__: None)
    metrics = [{"seconds": s} for s in (2.0, 2.7, 4.0)]
    monkeypatch.setattr(step, "train", lambda *_: metrics)
    (row,) = step.calibration_share("reviews", CPU, quick=False)
    assert row["ours"] == pytest.approx(100 / (1 + 80 / 512))


def test_bytes_per_second_of_a_decode_step(monkeypatch):
    """A GPT-2 with 2 layers of width 8 and 10 numbers per layer and token; K = 3, 2 prompts.

    20 s for 64 tokens and 148 s for 128 are 2 s per step. It reads the weights, 5 + 4 tokens of
    the prompts once, and 6 rows of 96 tokens, 4 bytes per number.
    """
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=8)
    model = SimpleNamespace(config=config, dtype=torch.float32, num_parameters=lambda: 1000)
    monkeypatch.setattr(random_weights, "K", 3)
    monkeypatch.setattr(random_weights, "encode_prompts", lambda *_: [[1] * 5, [1] * 4])
    spent = {64: 20.0, 128: 148.0}
    monkeypatch.setattr(
        random_weights, "seconds", lambda work: spent[work.keywords["max_new_tokens"]]
    )
    rate = random_weights.decode_rate(model, None, ["a", "b"])
    assert rate == pytest.approx(4 * (1000 + (9 + 6 * 96) * 2 * 2 * 8) / 2)


def test_growth_is_the_exponent_of_the_time(monkeypatch):
    monkeypatch.setattr(random_weights, "VARIED", {"K": (10, 30, 100), "layers": (1, 2)})
    monkeypatch.setattr(
        random_weights, "sampling_time", lambda device, K, layers, **_: K**2 * layers
    )
    by_K, by_layers = random_weights.growth("reviews", CPU, quick=False)
    assert by_K["ours"] == pytest.approx(2) and by_layers["ours"] == pytest.approx(1)


def test_sampling_from_a_random_model_is_timed():
    assert random_weights.sampling_time(CPU, K=2, prompts=1, length=2, layers=1) > 0


def test_every_preset_is_sampled_from_at_its_shape(monkeypatch):
    """Models of one block and width 24, from the families of the presets."""
    monkeypatch.setattr(sampling, "K", 2)
    _, tokenizer = load_policy("reviews")
    vocabulary = len(tokenizer)
    for family, *_, T in random_weights.SHAPES.values():
        others = {"intermediate_size": 8, "num_key_value_heads": 3}
        model = random_model(family, 24, 1, 3, vocabulary, **others)
        row = sampling.against_generate("tiny", model, tokenizer, ["a film"], T, ["dynamic"], 1)
        assert row["ours"] > 0 and row["theirs"] > 0
