"""A run's directory: its settings and its metrics.

Files are written under a temporary name and renamed; metrics.jsonl gets a row per step.
"""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from inspect import getmodule, getsource
from pathlib import Path

import torch
import transformers

import minictrl
from minictrl.config import WITHOUT_EFFECT, Config, is_run
from minictrl.files import (
    NUMBER,
    NUMBER_OR_NONE,
    check_columns,
    digest,
    lock,
    read_sealed,
    reading,
    write_sealed,
)
from minictrl.lm.device import resolve_device
from minictrl.lm.hub import ADAPTER, local_copy, read_object
from minictrl.messages import command
from minictrl.methods import get_method
from minictrl.models import check_saved, parted
from minictrl.procedures import get_procedure
from minictrl.task import Task, rows_of
from minictrl.transforms import CLOSED_FORMS

MARKER = ".minictrl"  # the file that says that a directory is ours to delete
PATHS = ("task", "policy", "reward", "judge", "reference")  # or names
RESUMABLE = (*WITHOUT_EFFECT, "lr")  # settings that --resume may change

# The columns of metrics.jsonl; None where a method has no such number.
METRICS = (
    "step", "tokens", "seconds", "reward", "C_hat", "Phi", "kl_ref", "kl_ref_stderr", "kl_asked",
    "beta", "approx_kl", "clipfrac", "entropy", "value_loss", "explained_variance", "grad_norm",
    "lr", "tok_per_s",
)  # fmt: skip


def hold(out: Path):
    """An open file that keeps every other run away from `out` until it is closed, or the run ends.

    It lies beside `out`, because a new run deletes what is in there. Raises ValueError if another
    run is at work.
    """
    out = out.resolve()  # a link is what it points to
    if not out.name:
        raise ValueError(f"--out {out}: is the root of the disk; give a directory in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out {out}: lies in a file; give another --out") from None
    try:
        return lock(out, wait=False)
    except BlockingIOError:
        raise ValueError(
            f"--out {out}: another run is at work there; wait for it, or give another --out"
        ) from None


def resumed(out: Path, given: dict) -> Config:
    """The settings of the run that `out` holds, but for those of RESUMABLE that are given.

    Raises ValueError if there is no run to resume, or if it was started with other settings.
    """
    stored = load_config(out)
    for name, value in given.items():
        if name not in RESUMABLE and value != getattr(stored, name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: {out} was started with "
                f"{getattr(stored, name)}; leave it out to resume, or give another --out"
            )
    lr = given.get("lr", stored.lr)
    if lr != stored.lr and has_policy(out):
        raise ValueError(f"--lr {lr}: {out} has no step left that could take it; leave it out")
    changed = {name: given[name] for name in RESUMABLE if name in given}
    return replace(stored, **changed | {"out": str(out)})  # the run may have been moved


def check_out(config: Config, *, overwrite: bool):
    """Raises ValueError where a new run must not touch its --out: it holds something that is no run
    of ours, or a run that was not to be overwritten, or what the new run reads.
    """
    cache, out = Path(config.cache), Path(config.out)
    place = cache.absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--cache {cache}: {there} is a file; give a directory")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not holds_run(out):
        raise ValueError(f"--out {out}: holds something that is no run; give another --out")
    if overwrite and not (out / MARKER).is_file():
        raise ValueError(
            f"--out {out}: holds a config.json as a run has it, but no {MARKER}, so it may not be "
            "ours to delete; delete it yourself, or give another --out"
        )
    if not overwrite:
        raise ValueError(
            f"--out {out}: holds a run already; add --resume or --overwrite, or give another --out"
        )
    for marker in out.rglob(MARKER):
        if marker.parent != out:
            raise ValueError(
                f"--out {out}: holds another run, {marker.parent}, which --overwrite deletes; move "
                "it, or give another --out"
            )
    for name in (*PATHS, "cache"):
        for path in files_of(getattr(config, name)):
            if path.name and path.exists() and path.resolve().is_relative_to(out.resolve()):
                raise ValueError(
                    f"--{name} {path}: lies in {out}, which --overwrite deletes; give another --out"
                )


def file_of(name: str | None) -> Path:
    """The file or directory that a name may stand for, without :FUNCTION and #LABEL."""
    return Path(parted(re.sub(r"(?<=\.py):.*", "", name or ""))[0])


def files_of(name: str | None) -> list[Path]:
    """`file_of` a name, its local copy of the hub, and the base of an adapter that it may be."""
    if not name:
        return []
    path = file_of(name)
    places = [path, local_copy(str(path))]
    adapters = [place / ADAPTER for place in places if (place / ADAPTER).is_file()]
    bases = [str(read_object("adapter", x).get("base_model_name_or_path")) for x in adapters]
    return [*places, *map(Path, bases), *map(local_copy, bases)]


def holds_run(out: Path) -> bool:
    """Whether a directory is a run's, be it damaged: it has our marker, or a run's config.json."""
    if (out / MARKER).is_file():
        return True
    try:
        return is_run(json.loads((out / "config.json").read_text()))
    except (OSError, ValueError):
        return False


def load_config(run: Path) -> Config:
    """The settings of a run (`load_record`)."""
    return load_record(run)[0]


def load_record(run: Path) -> tuple[Config, dict]:
    """Settings of a run, and what else its config.json holds. Raises ValueError if there is none,
    or half of one.
    """
    path = run / "config.json"
    if not path.is_file() and (run / MARKER).is_file():
        raise ValueError(
            f"{run}: was stopped before it began; give its whole command again, with --overwrite"
        )
    if not path.is_file():
        raise ValueError(
            f"{run}: is no run directory (it has no config.json); give the --out of a train.py run"
        )
    with reading(path, "train the run again with --overwrite"):
        stored = read_sealed(path)
        if "model_type" not in stored:
            return Config.of(stored)
    raise ValueError(
        f"{run}: is a model, no run; give the run's directory, {run.absolute().parent}"
    )


def has_policy(run: Path) -> bool:
    """Whether a run's training has ended and its policy is saved."""
    return (run / "policy" / "config.json").is_file()


def load_finished(run: Path) -> Config:
    """Settings of a run whose training has ended. Raises ValueError on one that has not, or whose
    policy is damaged.
    """
    config = load_config(run)
    if not has_policy(run):
        raise ValueError(
            f"{run}: has no policy yet; finish it first: "
            f"{command('train.py', '--resume', '--out', run)}"
        )
    check_saved(run / "policy")
    return config


def create(out: Path, config: Config, made_from: dict[str, str]):
    """An empty run directory with its config.json. What was there is deleted (see `check_out`).

    Whenever this is stopped, the directory is still ours, and half of an old run is none.
    """
    out.resolve().mkdir(parents=True, exist_ok=True)  # a link may point to what is not there
    (out / MARKER).write_text("a run of train.py, which --overwrite may delete\n")
    (out / "config.json").unlink(missing_ok=True)
    for old in out.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name != MARKER:
            old.unlink()
    write_sealed(out / "config.json", asdict(config) | {"made_from": made_from})


def write_config(out: Path, config: Config, beta: float, made_from: dict[str, str]):
    """config.json: every setting, the beta that a KL budget came to, and what else matters."""
    device = resolve_device(config.device)
    versions = {
        "commit": commit_of(Path(minictrl.__file__).parent.parent),
        "code": code_of(config),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }
    settings = asdict(config) | {"beta": beta, "made_from": made_from}
    write_sealed(out / "config.json", settings | versions)


def code_of(config: Config) -> str:
    """A digest of the files of a run's method and procedure, and of its closed form's values."""
    classes = get_method(config.method), type(get_procedure(config.procedure))
    Phi = CLOSED_FORMS.get(config.transform)
    values = Phi(torch.linspace(0.05, 1, 20)).tolist() if Phi else []
    return digest([getsource(getmodule(each)) for each in classes], [f"{x:.4g}" for x in values])


def commit_of(folder: Path) -> str | None:
    """The git commit of a folder that is a repository itself, not of one around it; "+changes"
    behind it where files have changed since.
    """
    if not shutil.which("git") or not (folder / ".git").exists():
        return None
    name = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    command = ["git", "-C", str(folder), *name]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def digests_of(config: Config, task: Task, judge: Callable | None) -> dict[str, str | None]:
    """What a run's numbers depend on: a digest each of policy, reward model, judge and prompts."""
    prompts = [[prompt for prompt, _ in rows_of(config, split)] for split in ("train", "test")]
    return {
        "policy": task.digest,
        "reward": task.reward.digest,
        "judge": judge and judge.digest,
        "task": digest(*prompts),
    }


def check_made_from(run: Path, config: Config, made_from: dict, *, but: Iterable[str] = ()):
    """Raises ValueError if a model or the prompts of a run have changed since it was started.

    but: names of models that are others on purpose.
    """
    stored = load_record(run)[1].get("made_from", {})
    for name, now in made_from.items():
        if name not in but and stored.get(name, now) != now:
            raise ValueError(
                f"{run}: its --{name} {getattr(config, name)} has changed since the run was "
                "started; put it back, or train again with --overwrite"
            )


# --- metrics ---


def read_metrics(run: Path) -> list[dict]:
    """Rows of metrics.jsonl; a last line that was cut off by an interruption is left out. Raises
    ValueError on any other that is no row of it.
    """
    path, rows = run / "metrics.jsonl", []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    with reading(path, "train the run again with --overwrite"):
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise
        if rows:
            counted = dict.fromkeys(("step", "tokens", "seconds"), NUMBER)
            check_columns(rows, dict.fromkeys(METRICS, NUMBER_OR_NONE) | counted)
    return rows


def finished_metrics(run: Path) -> list[dict]:
    """The rows of a run that has ended. Raises ValueError if there are none."""
    rows = read_metrics(run)
    if not rows:
        raise ValueError(
            f"{run / 'metrics.jsonl'}: holds no step; train the run again with --overwrite"
        )
    return rows
