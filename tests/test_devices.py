"""On a GPU nothing is mixed with what is left on the CPU, and a recorded step can be replayed: runs
on a fake one.
"""

import warnings
from contextlib import contextmanager

import pytest
import torch
from fake_cuda import GPU, FakeCuda, FakeGraph, install
from test_models import SIZE, save
from test_sampling import PROMPTS, TOKENIZER, draw, make_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import evaluate
import train
from minictrl import models as models_by_name
from minictrl.lm import decode
from minictrl.lm.device import resident
from minictrl.lm.kvcache import SHARED_PREFIX
from minictrl.models import load_policy, load_scorer
from minictrl.sampling import sample_plainly
from minictrl.scorers.text import set_precision

SMALL = (
    "--device cuda --prompts 12 --K 8 --steps 7 --batch 6 --G 4 --minibatch 12 --max-new-tokens 8"
).split()


def test_the_fake_refuses_what_a_gpu_refuses():
    with FakeCuda():
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        assert (
            x.device.type == "cuda"
            and (x + 1).is_cuda
            and not x.cpu().is_cuda
            and (x * y.to(x)).is_cuda
        )
        for mixed in (
            lambda: x + y,
            lambda: y[x.long()],
            lambda: torch.cat([x, y]),
            lambda: x.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert x[y.long()].is_cuda  # the one mixture that is allowed


@pytest.fixture
def uninitialised_is_nan():
    """torch fills memory that nobody has written with NaN, so that no test is right by chance."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_a_model_is_loaded_whole_beside_the_fake(tmp_path, monkeypatch, uninitialised_is_nan):
    """transformers makes what no file holds, rotary frequencies, of tensors without memory, which
    the fake once took for tensors on the CPU: they stayed as the memory was.
    """
    path = save(tmp_path, Qwen2ForCausalLM(Qwen2Config(**SIZE)))
    right = dict(load_policy(path)[0].named_buffers())
    install(monkeypatch)
    with FakeCuda():
        buffers = dict(load_policy(path)[0].named_buffers())
    assert right and right.keys() == buffers.keys()
    assert all(torch.equal(right[name], buffers[name]) for name in right)


@pytest.mark.parametrize(
    "flags",
    [
        "--transform exp10",
        "--transform exp-10 --baseline value",
        "--method bond --kl .5",
        "--method qrpo",
    ],
)
def test_a_run_on_a_gpu_mixes_no_devices(flags, tmp_path, monkeypatch):
    install(monkeypatch)
    with FakeCuda():
        train.main(
            [*SMALL, *flags.split(), "--out", str(tmp_path / "run"), "--cache", str(tmp_path)]
        )
        evaluate.main([str(tmp_path / "run"), "--prompts", "6", "--samples", "4"])
    assert (tmp_path / "run" / "eval.json").is_file()


@pytest.mark.parametrize("family", sorted(SHARED_PREFIX))
def test_recorded_steps_draw_the_same_tokens(family, monkeypatch):
    """On a GPU a decode step is recorded as a CUDA graph: any number of the host's in it would be
    that of the first step.
    """
    model, recorded = make_model(family, torch.float64), []
    install(monkeypatch)
    eager = draw(model, num_samples=30, max_new_tokens=40)
    monkeypatch.setattr(decode, "COMPACT", 0.99)
    monkeypatch.setattr(
        FakeGraph, "__init__", lambda self: recorded.append(self) or setattr(self, "calls", [])
    )
    with FakeCuda(), warnings.catch_warnings():
        warnings.simplefilter("error")
        replayed = draw(model.to("cuda"), num_samples=30, max_new_tokens=40)
    assert len(recorded) == 2 and all(graph.calls for graph in recorded)  # steps 1 to 32, 33 to 39
    assert torch.equal(replayed.tokens.cpu(), eager.tokens) and torch.equal(
        replayed.mask.cpu(), eager.mask
    )
    assert (replayed.logprobs.cpu() - eager.logprobs).abs().max() < 1e-5


def test_a_step_that_cannot_be_recorded_is_launched(monkeypatch):
    install(monkeypatch)
    steps, done = torch.zeros(1), []

    def step():
        done.append(float(steps))  # waits for the GPU
        steps.add_(1)

    with pytest.warns(UserWarning, match="can't be recorded"):
        decode._repeat(step, 5, recorded=True)
    assert steps == 5


def test_a_step_is_recorded_on_the_models_gpu(monkeypatch):
    """torch records on the current GPU, which need not be that of --device cuda:1."""
    model, current = make_model("gpt2", torch.float64), []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    recorded = []
    monkeypatch.setattr(
        FakeGraph,
        "__init__",
        lambda self: recorded.append(list(current)) or setattr(self, "calls", []),
    )
    with FakeCuda():
        draw(model.to("cuda"), num_samples=30, max_new_tokens=40)
    assert recorded and all(each == [GPU] for each in recorded)


def test_the_plain_sampler_runs_on_a_gpu(monkeypatch):
    model = make_model("gpt2", torch.float64)
    options = dict(num_samples=3, max_new_tokens=6, seed=0)
    there = sample_plainly(model, TOKENIZER, PROMPTS, **options)
    install(monkeypatch)
    with FakeCuda():
        here = sample_plainly(model.to("cuda"), TOKENIZER, PROMPTS, **options)
        assert here.tokens.is_cuda and torch.equal(here.tokens.cpu(), there.tokens)


CLASSIFIER = LlamaForSequenceClassification, LlamaConfig(**SIZE, num_labels=1)
CAPPED = Gemma2ForCausalLM, Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0)


@pytest.mark.parametrize("kind, config", [CLASSIFIER, CAPPED])
def test_bfloat16_on_a_gpu_makes_no_other_scorer_and_no_ties(kind, config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    path = save(tmp_path, kind(config))
    prompts, texts = ["The film is"] * 40, [f" {'so ' * i}good" for i in range(40)]
    there = load_scorer(path, "reward", device="cpu")
    install(monkeypatch)
    models = []
    monkeypatch.setattr(
        models_by_name, "set_precision", lambda *x: models.append(x[0]) or set_precision(*x)
    )
    with FakeCuda():
        here = load_scorer(path, "reward", device="cuda")
        scores = here(prompts, texts)
    assert here.digest == there.digest  # a run goes on, and is evaluated, on the other device
    assert torch.unique(scores).numel() == 40
    assert (scores - there(prompts, texts)).abs().max() < 0.02 * scores.abs().max() + 0.01
    kept = [b.dtype for name, b in models[0].named_buffers() if name.endswith("inv_freq")]
    assert kept and set(kept) == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in models[0].parameters()}


@pytest.mark.parametrize("free, stays", [(3, False), (4, True)])
def test_a_scorer_stays_on_the_gpu_if_half_of_it_is_free(free, stays, monkeypatch):
    """Of 16 GB, `free` are nobody's and 4 are held by torch, unused."""
    install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 6 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 2 * 2**30)
    with FakeCuda():
        scorer = torch.nn.Linear(2, 1)
        with resident(scorer, torch.device("cuda")):
            assert scorer.weight.is_cuda
        assert scorer.weight.is_cuda == stays
