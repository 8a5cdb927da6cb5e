"""What only a card can show; skipped without one."""

import copy
import gc
import json

import pytest
import torch
from test_end_to_end import rows_of
from test_models import GPT2, save
from test_sampling import draw, make_model
from test_update import loss, model, rows  # noqa: F401
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

import evaluate
import train
from minictrl import sampling, update
from minictrl.batch import Batch
from minictrl.data import load_prompts
from minictrl.lm import decode, device
from minictrl.lm.kvcache import SHARED_PREFIX
from minictrl.lm.logprobs import sequence_logprobs
from minictrl.lm.prompts import encode_prompts, left_pad
from minictrl.models import load_classifier, load_policy, load_scorer
from minictrl.sampling import sample
from minictrl.scorers.generative import load_generative
from minictrl.winrate import win_rate

DEVICE = torch.device("cuda")
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
    model, tokenizer, texts, samples = drawn(DEVICE, dtype, num_samples=8)
    ids, mask = left_pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id, DEVICE)
    rows = [x.repeat_interleave(8, 0) for x in (ids, mask)]
    with torch.no_grad():
        full, _ = sequence_logprobs(
            model, *rows, samples.tokens.flatten(0, 1), samples.mask.flatten(0, 1)
        )
    error = (full - samples.logprobs.flatten(0, 1)).abs()
    assert error.max() < most
    assert error.sum() / samples.mask.sum() < most / 10


@pytest.mark.parametrize("procedure", ["standard", "bon", "rewind", "soft", "poisson"])
def test_win_rates_of_scores_on_the_card_are_the_cpus(procedure):
    scores = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = win_rate(*scores, procedure, 2)
    assert win_rate(*scores.to(DEVICE), procedure, 2) == expected


def test_its_tokens_are_the_cpus():
    """A draw within rounding of a boundary may fall on the other side.

    The rest of its row then differs too, so rows are counted and not tokens.
    """
    card, cpu = (drawn(device)[3] for device in (DEVICE, "cpu"))
    differs = (card.tokens.cpu() != cpu.tokens).any(-1)
    assert cpu.mask.sum() > 40_000
    assert differs.sum() <= 5  # of 3,200 rows


def test_a_batch_of_another_size_draws_the_same():
    many, few = (drawn(DEVICE, batch_size=size)[3].tokens for size in (None, 256))
    assert (many != few).any(-1).sum() <= 5


def launch_all(monkeypatch):
    """From here on no step is recorded."""
    repeat = decode._repeat
    monkeypatch.setattr(
        decode, "_repeat", lambda step, count, recorded: repeat(step, count, recorded=False)
    )


def test_recorded_steps_draw_what_launched_ones_do(monkeypatch):
    recorded = drawn(DEVICE)[3].tokens
    launch_all(monkeypatch)
    assert (drawn(DEVICE)[3].tokens != recorded).any(-1).sum() == 0


@pytest.mark.filterwarnings("error:a decode step can't be recorded")
@pytest.mark.parametrize("family", sorted(SHARED_PREFIX))
def test_a_familys_recorded_steps_draw_what_launched_ones_and_the_cpu_do(family, monkeypatch):
    """float64: no draw is within its rounding of a boundary. Two recordings, and rows that end."""
    model, repeat, asked = make_model(family, torch.float64), decode._repeat, []
    options = {"num_samples": 30, "max_new_tokens": 40}
    on_cpu = draw(model, **options)
    model.to(DEVICE)

    def spy(step, count, recorded):
        asked.append(recorded)
        repeat(step, count, recorded=recorded)

    monkeypatch.setattr(decode, "_repeat", spy)
    recorded = draw(model, **options)
    assert asked and all(asked)
    launch_all(monkeypatch)
    for other in (draw(model, **options), on_cpu):
        assert torch.equal(recorded.tokens.cpu(), other.tokens.cpu())
        assert (recorded.logprobs.cpu() - other.logprobs.cpu()).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-window"])
def test_neither_batch_size_nor_compaction_changes_a_token(family, monkeypatch):
    model = make_model(family, torch.float64).to(DEVICE)
    options = {"num_samples": 30, "max_new_tokens": 40}
    together = draw(model, **options)
    for batch_size in (7, 40):
        assert torch.equal(draw(model, batch_size=batch_size, **options).tokens, together.tokens)
    monkeypatch.setattr(decode, "COMPACT", 0.0)  # never
    assert torch.equal(draw(model, **options).tokens, together.tokens)


def test_gradients_are_the_cpus():
    model, tokenizer, texts, samples = drawn("cpu", prompts=4, num_samples=4)
    ids, mask = left_pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id)
    inputs = [ids.repeat_interleave(4, 0), mask.repeat_interleave(4, 0)]
    inputs += [samples.tokens.flatten(0, 1), samples.mask.flatten(0, 1)]
    gradients = []
    for place in ("cpu", DEVICE):
        each = copy.deepcopy(model).to(place)
        sequence_logprobs(each, *(x.to(place) for x in inputs))[0].sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten().cpu() for p in each.parameters() if p.grad is not None])
        )
    assert torch.dist(*gradients) < 1e-3 * gradients[0].norm()


def stepped(model, rows, device, **options):
    """Parameters after a plain step against the gradient, so that they show it; its statistics."""
    model = copy.deepcopy(model).to(device)
    learner = update.Learner(model, None, torch.optim.SGD(model.parameters(), lr=1.0))
    stats = update.update(learner, rows, loss, lr=1.0, epochs=1, seed=0, **options)
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]), stats


@pytest.mark.parametrize("micro_batch", [24, 7])
def test_an_updates_step_is_the_cpus(micro_batch, model, rows):
    options = {"minibatch": 24, "micro_batch": micro_batch}
    card, stats = stepped(model, rows, DEVICE, **options)
    cpu, expected = stepped(model, rows, "cpu", **options)
    assert (card - cpu).abs().max() < 1e-5
    assert stats["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.fixture
def sizes(monkeypatch):
    """The sizes that sampler and update have ended with, each after its halvings."""
    ended = []

    def spy(size, work):
        result, size = device.halving(size, work)
        ended.append(size)
        return result, size

    for module in (sampling, update):
        monkeypatch.setattr(module, "halving", spy)
    return ended


def in_half_the_memory(work):
    """(work(), work() again with half as much memory beside what is held already)."""
    work()  # what a library keeps from its first call is none of what work needs
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    whole = work()
    needed = torch.cuda.max_memory_reserved() - held
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + needed / 2) / total)
    try:
        return whole, work()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.filterwarnings("ignore:a decode step can't be recorded")  # for want of memory
def test_out_of_memory_halves_the_samplers_rows_and_not_the_samples(sizes):
    model, tokenizer, texts, _ = drawn(DEVICE, num_samples=1)
    options = {"num_samples": 100, "max_new_tokens": 24, "seed": 0, "batch_size": 3200}
    whole, halved = in_half_the_memory(lambda: sample(model, tokenizer, texts, **options))
    assert sizes[-2] == 3200 > sizes[-1]
    assert (halved.tokens != whole.tokens).any(-1).sum() <= 5


def test_out_of_memory_halves_the_updates_rows_and_not_the_gradient(sizes):
    model, tokenizer, texts, samples = drawn(DEVICE, prompts=8)
    padded = left_pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id, DEVICE)
    ids, mask = (x.repeat_interleave(100, 0) for x in padded)
    batch = Batch(
        prompt_index=torch.arange(800, device=DEVICE),
        prompt=ids,
        prompt_mask=mask,
        tokens=samples.tokens.flatten(0, 1),
        mask=samples.mask.flatten(0, 1),
        old_logprobs=samples.logprobs.flatten(0, 1),
        advantages=torch.linspace(-1, 1, 800, device=DEVICE)[:, None],
    )
    (whole, _), (halved, _) = in_half_the_memory(
        lambda: stepped(model, batch, DEVICE, minibatch=800, micro_batch=800)
    )
    assert sizes[-2] == 800 > sizes[-1]
    assert (halved - whole).abs().max() < 1e-4


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("role", ["reward", "judge"])
def test_a_scorer_visits_the_card_and_leaves_it_if_it_is_full(role, stays, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda _: 2**60 if stays else 0)
    kind, load = (
        (GPT2ForSequenceClassification, load_classifier)
        if role == "reward"
        else (GPT2LMHeadModel, load_generative)
    )
    scorer, _, evaluate, *_ = load(save(tmp_path / role, kind(GPT2)), role, "", DEVICE)
    visited = []
    scorer.base_model.register_forward_pre_hook(  # what both kinds call
        lambda module, _: visited.append(module.device.type)
    )
    assert scorer.device.type == "cpu"
    for _ in range(2):  # it comes back
        scores = evaluate(["The film is"] * 2, [" good", " bad"])
        assert not scores.is_cuda and scores.isfinite().all()
        assert set(visited) == {DEVICE.type}
        assert all((p.device.type == DEVICE.type) == stays for p in scorer.parameters())


def test_scores_are_the_cpus():
    texts = ["a great film", "a dull, tired mess"]
    for role in ("reward", "judge"):
        on_card, on_cpu = (load_scorer("reviews", role, device=name) for name in ("cuda", "cpu"))
        score = on_card(["The film is"] * 2, texts)
        exact = 1e-4 if role == "judge" else 2e-2  # a causal classifier is in bfloat16 there
        assert torch.allclose(score.cpu(), on_cpu(["The film is"] * 2, texts), atol=exact)


def test_an_interrupted_run_resumes_bit_close_and_is_evaluated(tmp_path, stopped_after):
    """Bit-close and not identical: sums on a card may be made in another order."""
    flags = [
        "--prompts",
        "16",
        "--K",
        "8",
        "--steps",
        "6",
        "--batch",
        "8",
        "--G",
        "4",
        "--device",
        DEVICE.type,
        "--cache",
        str(tmp_path / "cache"),
    ]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert not train.main([*flags, "--out", str(whole)])

    with stopped_after(1, halves):
        assert train.main([*flags, "--out", str(halves)]) == 130
    assert [row["step"] for row in rows_of(halves / "metrics.jsonl")] == [1]
    assert not train.main(["--resume", "--out", str(halves)])

    start, a, b = (
        torch.cat([p.detach().flatten() for p in load_policy(name)[0].parameters()])
        for name in ("reviews", str(whole / "policy"), str(halves / "policy"))
    )
    assert torch.dist(a, b) < 1e-2 * torch.dist(a, start)
    metrics = [rows_of(run / "metrics.jsonl") for run in (whole, halves)]
    for x, y in zip(*metrics, strict=True):
        assert x["step"] == y["step"] and abs(x["kl_ref"] - y["kl_ref"]) < 1e-2
    assert abs(metrics[0][0]["kl_ref"]) < 1e-4  # the first rollout is pi_ref's

    assert not evaluate.main([str(halves), "--prompts", "8", "--samples", "8"])
    table = json.loads((halves / "eval.json").read_text())["rows"]
    assert table and all(0 <= row["win_rate"] <= 1 for row in table)
