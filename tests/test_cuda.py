"""What only a card can show; skipped without one."""

import copy
import json

import pytest
import torch

import evaluate
import train
from minictrl.data import load_prompts
from minictrl.models import load_policy, load_scorer
from minictrl.sampling import encode_prompts, left_pad, sample, sequence_logprobs

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def drawn(device, dtype=torch.float32, prompts=32, **options):
    """(model, tokenizer, prompts, samples) of the embedded policy, 100 responses per prompt."""
    model, tokenizer = load_policy("reviews")
    model.to(device, dtype)
    texts = load_prompts("reviews")[:prompts]
    options = {"num_samples": 100, "max_new_tokens": 24, "seed": 0} | options
    return model, tokenizer, texts, sample(model, tokenizer, texts, **options)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_the_samplers_logprobs_are_those_of_a_full_forward(dtype, most):
    """bfloat16 keeps 8 bits: a logit near 16 is rounded to 1/16, twice in a difference of two."""
    model, tokenizer, texts, samples = drawn(CUDA, dtype, num_samples=8)
    ids, mask = left_pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id, CUDA)
    rows = [x.repeat_interleave(8, 0) for x in (ids, mask)]
    with torch.no_grad():
        full = sequence_logprobs(model, *rows, samples.tokens.flatten(0, 1), samples.mask.flatten(0, 1))
    error = (full - samples.logprobs.flatten(0, 1)).abs()
    assert error.max() < most
    assert error.sum() / samples.mask.sum() < most / 10


def test_its_tokens_are_the_cpus():
    """A draw within rounding of a boundary may fall on the other side; the rest of its row then differs too."""
    card, cpu = (drawn(device)[3] for device in (CUDA, "cpu"))
    differs = (card.tokens.cpu() != cpu.tokens).any(-1)
    assert cpu.mask.sum() > 40_000
    assert differs.sum() <= 5  # of 3,200 rows


def test_a_batch_of_another_size_draws_the_same():
    many, few = (drawn(CUDA, batch_size=size)[3].tokens for size in (None, 256))
    assert (many != few).any(-1).sum() <= 5


def test_recorded_steps_draw_what_launched_ones_do(monkeypatch):
    from minictrl import sampling

    recorded = drawn(CUDA)[3].tokens
    once = sampling._repeat
    monkeypatch.setattr(sampling, "_repeat", lambda step, count, recorded: once(step, count, recorded=False))
    assert (drawn(CUDA)[3].tokens != recorded).any(-1).sum() == 0


def test_gradients_are_the_cpus():
    model, tokenizer, texts, samples = drawn("cpu", prompts=4, num_samples=4)
    ids, mask = left_pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id)
    inputs = [ids.repeat_interleave(4, 0), mask.repeat_interleave(4, 0)]
    inputs += [samples.tokens.flatten(0, 1), samples.mask.flatten(0, 1)]
    gradients = []
    for device in ("cpu", CUDA):
        each = copy.deepcopy(model).to(device)
        sequence_logprobs(each, *(x.to(device) for x in inputs)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in each.parameters() if p.grad is not None]))
    assert torch.dist(*gradients) < 1e-3 * gradients[0].norm()


def test_out_of_memory_halves_the_samplers_rows():
    model, tokenizer, texts, whole = drawn(CUDA)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 150e6) / total)
    try:
        options = {"num_samples": 100, "max_new_tokens": 24, "seed": 0, "batch_size": 3200}
        assert (sample(model, tokenizer, texts, **options).tokens != whole.tokens).any(-1).sum() <= 5
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_scores_are_the_cpus():
    texts = ["a great film", "a dull, tired mess"]
    for role in ("reward", "judge"):
        on_card, on_cpu = (load_scorer("reviews", role, device=name) for name in ("cuda", "cpu"))
        score = on_card(["The film is"] * 2, texts)
        assert torch.allclose(score.cpu(), on_cpu(["The film is"] * 2, texts), atol=1e-4)


def test_a_run_trains_resumes_and_is_evaluated(tmp_path):
    out = tmp_path / "run"
    options = f"--device cuda --prompts 16 --K 8 --steps 3 --batch 8 --G 4 --cache {tmp_path / 'cache'}"
    assert train.main([*options.split(), "--out", str(out)]) is None
    assert train.main(["--resume", "--out", str(out)]) is None
    evaluate.main([str(out), "--prompts", "8", "--samples", "8"])
    rows = json.loads((out / "eval.json").read_text())["rows"]
    assert all(0 <= row["win_rate"] <= 1 for row in rows)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl_ref"]) < 1e-4
