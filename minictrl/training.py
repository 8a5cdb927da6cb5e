"""The steps of a run: progress bar, metrics.jsonl, checkpoints, Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from minictrl.batch import Batch
from minictrl.budget import Budget
from minictrl.checks import NotFinite
from minictrl.files import (
    delete_leftovers,
    load_tensors,
    reading,
    save_tensors,
    without_nan,
    write_rows,
    writing,
)
from minictrl.messages import command
from minictrl.runs import METRICS, has_policy
from minictrl.track import Tracker
from minictrl.update import BadStep, Learner

CHECKPOINT = Path("checkpoint", "state.safetensors")
PAUSE = 20  # seconds between checkpoints, at least; 20 times what one takes, if that is more


class Training:
    """A run from its first step, or its last checkpoint, to its end.

        with Training(out, learner, budget, steps) as training:
            for step in training.steps():
                ...
                training.log(batch, stats)

    It goes on after the last checkpoint, if there is one, which `with` restores. Random states need
    no place in that, because every draw is a function of the seed and the step.
    """

    def __init__(
        self,
        out: Path,
        learner: Learner,
        budget: Budget,
        steps: int,
        tracker: Tracker | None = None,
    ):
        self.out, self.learner, self.budget, self.tracker = out, learner, budget, tracker
        self.end = steps
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.rows = []  # of metrics.jsonl
        self.updates = learner.updates  # when the last step ended
        self.stopped = False  # by Ctrl-C
        self.open = ExitStack()  # what has to be closed again

    def __enter__(self) -> Training:
        self._restore()
        self.interrupt = self.open.enter_context(Interrupt())
        if self.tracker:
            self.open.callback(self.tracker.close)
        return self

    def __exit__(self, *error):
        self.open.close()

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left.

        A checkpoint is written now and then, at the end, and at Ctrl-C.
        """
        self.metrics = self.open.enter_context(open(self.out / "metrics.jsonl", "a", buffering=1))
        bar = tqdm(total=self.end, desc="train", initial=self.step, disable=None)
        self.bar = self.open.enter_context(bar)
        saved, pause = time.monotonic(), PAUSE
        while self.step < self.end and not self.stopped:
            self.began = time.monotonic()
            yield self.step
            self.step, self.updates = self.step + 1, self.learner.updates
            self.bar.update()
            self.stopped = self.interrupt.asked
            if self.stopped or time.monotonic() - saved > pause or self.step == self.end:
                began = time.monotonic()
                self._save()
                saved = time.monotonic()
                pause = max(PAUSE, 20 * (saved - began))
        if self.stopped:
            print(
                f"stopped after step {self.step}; go on with: "
                f"{command('train.py', '--resume', '--out', self.out)}"
            )

    def log(self, batch: Batch, stats: dict[str, float]) -> None:
        """A row of metrics.jsonl, once per step."""
        tokens, seconds = int(batch.mask.sum()), time.monotonic() - self.began
        self.tokens += tokens
        self.seconds += seconds
        row = dict.fromkeys(METRICS) | stats
        row |= {"step": self.step + 1, "tokens": self.tokens, "seconds": round(self.seconds, 2)}
        row |= {"kl_asked": self.budget.target, "beta": self.budget.beta}
        row = without_nan(row | {"tok_per_s": round(tokens / seconds)})
        with writing(self.out / "metrics.jsonl"):
            self.metrics.write(json.dumps(row) + "\n")
        self.rows.append(row)
        if self.tracker:
            self.tracker.log(row, row["step"])
        watched = [name for name in ("C_hat", "kl_ref") if row[name] is not None]
        shown = [f"{name} {row[name]:.3f}" for name in watched]
        self.bar.set_postfix_str(" ".join([*shown, f"tok/s {row['tok_per_s']}"]))

    def failed(self, error: ValueError, lr: float, texts: list[str]) -> str:
        """Where and why training stopped, and how to go on. texts: of the prompts.

        The finished steps are saved, if this one has changed no weight yet. But what may have
        ruined the policy takes no good checkpoint's place.
        """
        kept, broken = (self.out / CHECKPOINT).is_file(), isinstance(error, NotFinite)
        # of numbers that are not finite only a BadStep leaves the policy as it was before the step
        save = not broken or (isinstance(error, BadStep) and not kept)
        if save and self.learner.updates == self.updates:
            self._save()
        go_on = command("train.py", "--resume", "--out", self.out)
        if not broken:
            return f"step {self.step + 1}: {error}; once that is mended, go on with: {go_on}"
        if isinstance(error, BadStep):
            error = f"{error} {' or '.join(repr(texts[i][:60]) for i in error.prompts[:3])}"
        kls = [row["kl_ref"] for row in self.rows if row["kl_ref"] is not None]
        before = f"after a KL of {kls[-1]:.3g} nats" if kls else "from the start"
        again = f"start again with a lower --lr than {lr:g} and --overwrite"
        if (self.out / CHECKPOINT).is_file():
            lower = f"go on with: {go_on} --lr {lr / 10:g}"
            again = lower if kept else f"{lower}, or {again}"
        return f"{error}: training diverged at step {self.step + 1}, {before}; {again}"

    def _save(self) -> None:
        """One file, replaced in one step: the old one or the new one is there whole.

        It holds the rows of metrics.jsonl too, whose last one says where the run stands.
        """
        (self.out / CHECKPOINT).parent.mkdir(exist_ok=True)
        rows = {"rows": json.dumps(self.rows)}
        save_tensors(self.out / CHECKPOINT, self.learner.state(), rows)

    def _restore(self) -> None:
        """The last checkpoint, if there is one; metrics.jsonl is what it was then."""
        path = self.out / CHECKPOINT
        if path.is_file():
            fix = "start again with --overwrite"
            if has_policy(self.out):
                fix = f"delete {path.parent}; the run is finished, and its policy is saved"
            with reading(path, fix):
                tensors, metadata = load_tensors(path)
                self.learner.restore(tensors)
                self.rows = json.loads(metadata["rows"])
        if self.rows:
            last = self.rows[-1]
            self.step, self.tokens, self.seconds = last["step"], last["tokens"], last["seconds"]
            self.budget.target = last["kl_asked"]
        delete_leftovers(path)
        write_rows(self.out / "metrics.jsonl", self.rows)


class Interrupt:
    """Ctrl-C and SIGTERM as a flag, so that a step ends before the checkpoint is written.

    The second one stops at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.asked = False
        self.previous = {each: signal.signal(each, self._ask) for each in self.SIGNALS}
        return self

    def _ask(self, *_):
        self.asked = True
        self.__exit__()

    def __exit__(self, *_):
        for each, previous in self.previous.items():
            signal.signal(each, previous)
