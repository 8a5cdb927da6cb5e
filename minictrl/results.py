"""The files that an evaluation leaves in a run: their names and columns, reading them, and what is
said of them.
"""

import math
import re
import warnings
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from minictrl.config import Config
from minictrl.files import (
    NUMBER,
    NUMBER_OR_NONE,
    TEXT,
    check_columns,
    markdown,
    read_rows,
    read_sealed,
    reading,
    sha256_of,
)
from minictrl.messages import command

ROW = {name: TEXT for name in ("procedure", "scorer")}  # the columns of eval.json
ROW |= {name: NUMBER for name in ("n", "win_rate", "kl", "prompts", "samples")}
ROW |= {name: NUMBER_OR_NONE for name in ("stderr", "kl_stderr", "theory", "optimal")}
ENDS = ("", "_reference")  # of the columns of samples.jsonl: of pi and of pi_ref
SAMPLE = {"prompt": (str, list)} | {name: TEXT for name in ("reference", "response")}
SAMPLE |= {f"best{end}": TEXT for end in ENDS}
SAMPLE |= {f"{name}{end}": NUMBER for name in ("reward", "C_hat", "best_C_hat") for end in ENDS}


def file_suffix(split: str, other_models: dict[str, str] | None = None) -> str:
    """What the names of an evaluation's files end with: eval-train.json, eval-judge-NAME.json."""
    parts = [] if split == "test" else [split]
    for role, model in (other_models or {}).items():
        parts.append(f"{role}-{re.sub(r'[^A-Za-z0-9.]+', '-', Path(model).name)}")
    return "".join(f"-{part}" for part in parts)


def check_replaced(
    path: Path, other_models: dict[str, str], prompts: int, samples: int, digests: dict[str, str]
):
    """Raises ValueError if the eval.json that this evaluation replaces is by another model of the
    same name; warns if it has more prompts or samples. digests: of the other models.
    """
    try:
        stored = read_sealed(path)
        check_columns(stored["rows"], ROW)
        kept, models = stored["rows"][0], dict(stored.get("models", {}))
        theirs = dict(stored.get("digests", {}))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none, or damaged
        return
    for role, model in other_models.items():
        if models.get(role, model) != model or theirs.get(role, digests[role]) != digests[role]:
            raise ValueError(
                f"--{role} {model}: {path} has the win rates by another, {models.get(role)}; "
                "rename or delete it"
            )
    if kept["prompts"] > prompts or kept["samples"] > samples:
        warnings.warn(
            f"{path}: its table of {kept['prompts']} prompts with {kept['samples']} responses each "
            f"is replaced by one of {prompts} with {samples}; rename it to keep it",
            stacklevel=3,
        )


def eval_path(run: Path, suffix: str) -> Path:
    """The file of an evaluation's table."""
    return run / f"eval{suffix}.json"


def parts_of(run: Path, suffix: str) -> dict[str, Path]:
    """The files of an evaluation beside eval.json."""
    return {
        "wins": run / f"wins{suffix}.safetensors",
        "by_prompt": run / f"by_prompt{suffix}.safetensors",
        "samples": run / f"samples{suffix}.jsonl",
    }


def read(run: Path, suffix: str = "") -> list[dict]:
    """The rows of a run's eval.json. Raises ValueError if that or a file of `parts_of` is not as it
    was written.
    """
    path, parts = eval_path(run, suffix), parts_of(run, suffix)
    again = f"delete {path} and give the command that made it again"
    with reading(path, again):
        stored = read_sealed(path)
        check_columns(stored["rows"], ROW)
        sums = dict(stored.get("parts", {}))
    for part, sha256 in sums.items():
        with reading(parts[part], again):
            if sha256_of(parts[part]) != sha256:
                raise ValueError("it has changed since it was written")
    return stored["rows"]


def read_tensors(run: Path, name: str, suffix: str = "") -> dict[str, Tensor]:
    """The tensors of a run's wins or by_prompt. Raises ValueError if they are damaged."""
    path = parts_of(run, suffix)[name]
    with reading(path, f"evaluate the run again: {command('evaluate.py', run)}"):
        return load_file(path)


def read_samples(run: Path, suffix: str = "") -> list[dict]:
    """The rows of a run's samples.jsonl. Raises ValueError if it is damaged."""
    path = parts_of(run, suffix)["samples"]
    with reading(path, f"evaluate the run again: {command('evaluate.py', run)}"):
        rows = read_rows(path)
        check_columns(rows, SAMPLE)
    return rows


# --- in words ---


def printed(table: list[dict]) -> str:
    """The table, to paste: win rates in per cent with standard errors, and the theory's."""
    scorers = list(dict.fromkeys(row["scorer"] for row in table))
    passes = [name for name in ("pass", "pass_ref") if name in table[0]]
    head = ["procedure", "N", *(f"by {name}" for name in scorers), "theory", "optimal", *passes]

    def percent(value: float | None, stderr: float | None = None) -> str:
        if value is None:
            return "–"
        return f"{100 * value:.1f}" + plus_minus(stderr and 100 * stderr, 1)

    lines = []
    for i in range(0, len(table), len(scorers)):
        rows = table[i : i + len(scorers)]
        first = rows[0]
        measured = [percent(row["win_rate"], row["stderr"]) for row in rows]
        expected = [percent(first[name]) for name in ("theory", "optimal", *passes)]
        lines.append([first["procedure"], str(first["n"]), *measured, *expected])
    return markdown(head, lines)


def headline(config: Config, split: str, row: dict) -> str:
    """What a table is of. row: one of its rows."""
    asked = f" (--kl {config.kl:g})" if config.kl else ""
    drawn = f"{row['prompts']} {split} prompts, {row['samples']} responses each"
    return f"{drawn}, KL {row['kl']:.3f}{plus_minus(row['kl_stderr'], 3)} nats{asked}"


def plus_minus(stderr: float | None, digits: int) -> str:
    """ " ± 0.012", or nothing where it is not known: one prompt has no error."""
    known = stderr is not None and math.isfinite(stderr)
    return f" ± {stderr:.{digits}f}" if known else ""


def models_line(config: Config, other_models: dict[str, str]) -> str:
    """The models behind the table's columns."""
    models = {role: other_models.get(role) or getattr(config, role) for role in ("reward", "judge")}
    none = "none; give evaluate.py a --judge"
    return f"reward model: {models['reward']}, judge: {models['judge'] or none}"
