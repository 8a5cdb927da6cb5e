"""On a GPU nothing is mixed with what is left on the CPU, and a recorded step can be replayed: runs
on a fake one.
"""

import warnings

import pytest
import torch
from fake_cuda import FakeCuda, FakeGraph, install
from test_models import SIZE, save
from test_sampling import draw, make_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import evaluate
import train
from minictrl.lm import decode
from minictrl.lm.device import resident
from minictrl.lm.kvcache import SHARED_PREFIX
from minictrl.models import load_policy

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
