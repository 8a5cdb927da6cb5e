"""On a GPU nothing is mixed with what is left on the CPU: whole runs on a fake one."""

import pytest
import torch
from fake_cuda import FakeCuda, install

import evaluate
import train

SMALL = ("--device cuda --prompts 12 --K 8 --steps 7 --batch 6 --G 4 --minibatch 12 --max-new-tokens 8").split()


def test_the_fake_refuses_what_a_gpu_refuses():
    with FakeCuda():
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        assert x.device.type == "cuda" and (x + 1).is_cuda and not x.cpu().is_cuda and (x * y.to(x)).is_cuda
        for mixed in (lambda: x + y, lambda: y[x.long()], lambda: torch.cat([x, y]), lambda: x.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert x[y.long()].is_cuda  # the one mixture that is allowed


@pytest.mark.parametrize("flags", ["--transform exp10", "--transform exp-10 --baseline value",
                                   "--method bond --kl .5", "--method qrpo"])
def test_a_run_on_a_gpu_mixes_no_devices(flags, tmp_path, monkeypatch):
    install(monkeypatch)
    with FakeCuda():
        train.main([*SMALL, *flags.split(), "--out", str(tmp_path / "run"), "--cache", str(tmp_path)])
        evaluate.main([str(tmp_path / "run"), "--prompts", "6", "--samples", "4"])
    assert (tmp_path / "run" / "eval.json").is_file()
