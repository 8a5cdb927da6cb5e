import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # train.py and evaluate.py


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def campaign():
    """campaign(script, *flags) runs a script of tests/campaigns, which has to end with status 0.

    A campaign forks. It is a process of its own, because a fork of a process with threads (those of
    progress bars and of pyarrow, after other tests) can hang.
    """

    def run(script: str, *flags):
        command = [sys.executable, Path(__file__).parent / "campaigns" / script, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr

    return run


@pytest.fixture
def stopped_after(monkeypatch):
    """`with stopped_after(n, out):` the run of `out` is interrupted after its n-th step, as by
    Ctrl-C.
    """
    from minictrl import runs, training

    @contextmanager
    def patched(n, out):
        class Interrupted(training.Interrupt):
            asked = property(
                lambda self: len(runs.read_metrics(out)) >= n, lambda self, value: None
            )

        with monkeypatch.context() as patch:
            patch.setattr(training, "Interrupt", Interrupted)
            yield

    return patched


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """The command line, end to end and short: a run directory after train.py and evaluate.py."""
    import evaluate
    import train

    folder = tmp_path_factory.mktemp("short")
    out = folder / "run"
    assert not train.main(
        [
            "--transform",
            "exp10",
            "--prompts",
            "48",
            "--K",
            "32",
            "--steps",
            "12",
            "--batch",
            "24",
            "--G",
            "8",
            "--max-new-tokens",
            "16",
            "--out",
            str(out),
            "--cache",
            str(folder / "cache"),
        ]
    )
    assert not evaluate.main([str(out), "--prompts", "32", "--samples", "32"])
    return out
