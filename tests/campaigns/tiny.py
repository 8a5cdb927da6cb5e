"""What the campaigns share: models that are small enough for thousands of runs, and the scripts in
a forked child, which pays for no import.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # train.py and evaluate.py
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads don't survive a fork

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.decoders import ByteLevel as Decoder  # noqa: E402
from tokenizers.models import BPE  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from tqdm import tqdm  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from minictrl import files, runs, training  # noqa: E402
from minictrl.cli import run_script  # noqa: E402
from minictrl.methods import METHODS  # noqa: E402
from minictrl.results import parts_of  # noqa: E402

torch.set_num_threads(1)
LATE = ("baselines", "exchange", "figures", "report", "rollout", "track", "update")
for name in (*LATE, *(f"methods.{name}" for name in METHODS)):
    import_module(f"minictrl.{name}")  # now, not in every child
SCRIPTS = {"train": train.main, "evaluate": evaluate.main}
SAME, AGAIN, REFUSED = "the same", "the same, with a warning", "refused in one line"
OTHER, TRACEBACK = "ANOTHER RESULT", "TRACEBACK"
CLOCK = ("seconds", "tok_per_s")  # columns of metrics.jsonl
SIZES = "--prompts 4 --batch 2 --G 4 --K 8 --steps 4 --max-new-tokens 5 --lr 1e-2 --layers 1"


def make_world(folder: Path) -> list[str]:
    """The flags of tiny runs: a policy, a reward model, a judge and prompts, made in `folder`."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    of_bytes = Tokenizer(BPE(letters, []))
    of_bytes.pre_tokenizer, of_bytes.decoder = ByteLevel(add_prefix_space=False), Decoder()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="</s>")
    tokenizer.pad_token = "</s>"
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, num_labels=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    kinds = {"policy": transformers.GPT2LMHeadModel}
    kinds |= dict.fromkeys(("reward", "judge"), transformers.GPT2ForSequenceClassification)
    flags = [*SIZES.split(), "--device", "cpu"]
    for seed, (role, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        flags += [f"--{role}", str(folder / role)]
    rows = [{"prompt": f"This film, number {i}, is"} for i in range(40)]
    files.write_rows(folder / "prompts.jsonl", rows)
    return [*flags, "--task", str(folder / "prompts.jsonl")]


class Child:
    """A script in a forked child. `result` waits for it."""

    def __init__(self, script: str, argv: list, log: Path, prepare=lambda: None):
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(script, [str(x) for x in argv], prepare)

    def _run(self, script: str, argv: list[str], prepare):
        status = 70  # a traceback
        try:
            with (
                open(self.log, "w", buffering=1) as out,
                redirect_stdout(out),
                redirect_stderr(out),
            ):
                faulthandler.dump_traceback_later(600, exit=True, file=out)
                tqdm.set_lock(threading.RLock())  # its own is shared: with one that was killed, too
                sys.modules["matplotlib"] = None  # pictures would take most of the time
                sys.argv[0] = f"{script}.py"
                training.PAUSE = 0  # seconds between checkpoints
                try:
                    prepare()
                    run_script(lambda: SCRIPTS[script](argv))
                except SystemExit as end:
                    status = end.code or 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
        finally:
            os._exit(status)

    def result(self) -> tuple[int, str]:
        """(exit status, what was printed); a signal's number is negative."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.log.read_text(errors="replace")

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def run(script: str, argv: list, log: Path, prepare=lambda: None) -> tuple[int, str]:
    return Child(script, argv, log, prepare).result()


def begin_or_resume(flags: list, folder: Path) -> list:
    """The command that goes on with the run in `folder`, as a user would type it."""
    out = folder / "run"
    argv = [*flags, "--out", out, "--cache", folder / "cache"]
    if (out / "config.json").is_file():
        return [*argv, "--resume"]
    return [*argv, "--overwrite"] if out.exists() else argv


def evaluation_of(folder: Path) -> list:
    return [folder / "run", "--prompts", "4", "--samples", "8"]


def copied(folder: Path, to: Path) -> Path:
    """A run and its cache at another place: its evaluation finds the cache there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    path = to / "run" / "config.json"
    files.write_sealed(path, files.read_sealed(path) | {"cache": str(to / "cache")})
    return to


def results(folder: Path) -> dict:
    """All that a run has come to, without its wall-clock times and its place."""
    out, found = folder / "run", {}
    for path in [*(out / "policy").glob("*"), out / "reference.safetensors"]:
        found[path.name] = path.read_bytes()
    found.pop("README.md", None)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found["metrics.jsonl"] = [{k: x for k, x in row.items() if k not in CLOCK} for row in rows]
    tensors, _ = files.load_tensors(out / training.CHECKPOINT)
    found["checkpoint"] = files.check_sum(tensors)
    return found


def evaluated(folder: Path) -> dict:
    """All that an evaluation has come to."""
    paths = ["eval.json", *(path.name for path in parts_of(folder, "").values())]
    return {name: (folder / "run" / name).read_bytes() for name in paths}


def differing(a: dict, b: dict) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def refused(status: int, said: str, name: str = "") -> str:
    """REFUSED, if the last line of what a script said is its error, and names what it must."""
    last = (said.strip().splitlines() or [""])[-1]
    good = status == 2 and "error: " in last and name in last and "Traceback" not in said
    return REFUSED if good else TRACEBACK


class World:
    """A clean run with its evaluation, to copy, to break and to compare with."""

    def __init__(self, home: Path):
        self.home, self.flags = home, make_world(home)
        self.log, self.clean, self.bad = home / "log", home / "clean", home / "bad"
        self.clean.mkdir()
        assert self.train(self.clean)[0] == 0, self.log.read_text()
        assert run("evaluate", evaluation_of(self.clean), self.log)[0] == 0, self.log.read_text()
        self.trained, self.evaluated = results(self.clean), evaluated(self.clean)
        self.config = runs.load_config(self.clean / "run")

    def train(self, folder: Path, prepare=lambda: None, more=()) -> tuple[int, str]:
        return run("train", begin_or_resume([*self.flags, *more], folder), self.log, prepare)

    def fresh(self, *, copy: bool) -> Path:
        shutil.rmtree(self.bad, ignore_errors=True)
        if copy:
            return copied(self.clean, self.bad)
        self.bad.mkdir()
        return self.bad

    def ends_well(self, folder: Path) -> bool:
        """Whether a run goes on to the clean run's results."""
        status, said = self.train(folder)
        return status == 0 and not differing(results(folder), self.trained)
