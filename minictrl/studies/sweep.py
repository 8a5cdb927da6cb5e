"""Many runs of train.py and evaluate.py, each made once, kept under DIR/runs and read by every
study.

A run that has its eval.json is done; one that was interrupted goes on from its checkpoint. Curves
are compared at equal KL: `at_kl` regresses the gain over 1/2, as a share of the largest gain that
theory allows at a run's KL, on the KL.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from torch import Tensor
from tqdm import tqdm

import minictrl
from minictrl import evaluation, runs, theory
from minictrl.config import Config
from minictrl.models import load_policy, load_scorer

# Settings of train.py beside --kl and --seed. CTRL's are those with a transform of the calibrated
# reward.
CTRL = {
    name: {"transform": name}
    for name in ("identity", "log", "exp5", "exp10", "exp-5", "exp-10", "bon_fp")
}
CTRL["won_fp"] = {"transform": "won_fp", "procedure": "won"}
OTHERS = {
    "none": {"transform": "none"},
    **{name: {"method": name} for name in ("ipo", "bonbon", "bond", "grpo", "grpo_fixed")},
}
NEWER = {
    "qrpo exp10": {"method": "qrpo", "transform": "exp10"},
    "pkpo bon": {"method": "pkpo"},
    "qrpo exp-10": {"method": "qrpo", "transform": "exp-10"},
    "pkpo won": {"method": "pkpo", "procedure": "won"},
}
METHODS = CTRL | OTHERS | NEWER
AWARE = {  # procedure -> the methods that are made for it
    "standard": ("identity", "log"),
    "bon": ("exp5", "exp10", "bon_fp", "qrpo exp10", "pkpo bon"),
    "won": ("exp-5", "exp-10", "won_fp", "qrpo exp-10", "pkpo won"),
}
SCORERS = ("reward", "judge")

# quick -> how large: flags of every training, prompts and samples of every evaluation, seeds and KL
# budgets of a sweep, and whether runs that aren't finished are left out instead of trained.
# reproduce.py sets the last three.
SCALES = {
    False: dict(
        folder="runs",
        train={},
        prompts=200,
        samples=64,
        seeds=5,
        budgets=(0.25, 0.5, 1.0, 2.0, 4.0),
        done=False,
    ),
    True: dict(
        folder="runs-quick",
        train=dict(steps=6, prompts=32, batch=16, G=8, lr=2e-3),
        prompts=24,
        samples=32,
        seeds=1,
        budgets=(0.5, 2.0),
        done=False,
    ),
}


# --- runs ---


def script(name: str):
    """train or evaluate, the scripts beside the package, as a module."""
    path = Path(minictrl.__file__).parent.parent / f"{name}.py"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a study that trains needs a clone of the repository, pip install -e ."
        )
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location(name, path)
    )
    spec.loader.exec_module(module)
    return module


def table_of(folder: Path, split: str) -> Path:
    return folder / f"eval{evaluation.suffix(split)}.json"


def run(
    folder: Path, settings: dict, *, prompts: int, samples: int, split: str = "test"
) -> list[dict]:
    """Rows of the eval.json of the run that `folder` holds, after training and evaluating what of
    it is missing.

    settings: of train.py, by the names of Config. What the scripts print goes to FOLDER.log. Raises
    ValueError where the folder holds a run with other settings, or as the scripts do;
    KeyboardInterrupt if one was stopped.
    """
    resume = (folder / "config.json").is_file()
    if resume:
        stored, _ = runs.load_config(folder)
        for name, value in settings.items():
            if getattr(stored, name) != value:
                raise ValueError(
                    f"{folder}: holds a run with {name} {getattr(stored, name)}, not {value}; "
                    "give another --out, or delete it"
                )
    if not table_of(folder, split).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
            if not (folder / "policy" / "config.json").is_file():
                given = settings | {"out": folder}
                flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
                if script("train").main(flags + ["--resume"] * resume):
                    raise KeyboardInterrupt
            script("evaluate").main(
                [str(folder), f"--prompts={prompts}", f"--samples={samples}", f"--split={split}"]
            )
    return json.loads(table_of(folder, split).read_text())["rows"]


def sweep(
    out: Path,
    quick: bool,
    methods: dict[str, dict],
    *,
    budgets: tuple[float, ...] | None = None,
    seeds: int | None = None,
    split: str = "test",
) -> list[dict]:
    """Rows of eval.json of every method, KL budget and seed, with method, budget, seed and run (its
    folder) in front.

    Trains what is missing, with one bar that shows the time left. A budget that is out of a
    method's reach is left out, with a line that says so. Ctrl-C stops after the step at hand; the
    same command goes on from there.
    """
    scale, rows, jobs = SCALES[quick], [], {}
    # a seed's curves, then more
    for seed, budget in product(range(seeds or scale["seeds"]), budgets or scale["budgets"]):
        for name, settings in methods.items():
            folder = out / scale["folder"] / f"{name.replace(' ', '-')}-kl{budget:g}-seed{seed}"
            common = scale["train"] | {"kl": budget, "seed": seed, "cache": str(out / "cache")}
            labels = {"method": name, "budget": budget, "seed": seed, "run": str(folder)}
            if table_of(folder, split).is_file() or not scale["done"]:
                jobs[folder] = labels, common | settings
    missing = {folder for folder in jobs if not table_of(folder, split).is_file()}
    with tqdm(
        total=len(missing),
        desc="runs",
        unit="run",
        disable=None if missing else True,
        file=sys.stderr,
    ) as bar:
        for folder, (labels, settings) in jobs.items():
            bar.set_postfix_str(folder.name)
            try:
                found = run(
                    folder,
                    settings,
                    prompts=scale["prompts"],
                    samples=scale["samples"],
                    split=split,
                )
                rows += [labels | row for row in found]
            except KeyboardInterrupt:
                raise SystemExit(
                    f"stopped in {folder}; the same command goes on with what is missing"
                ) from None
            except ValueError as error:
                if "reach" not in str(error):  # of theory or of K samples
                    raise
                bar.write(f"{folder} left out: {error}", file=sys.stderr)
            bar.update(folder in missing)
    if not rows:
        raise ValueError(
            f"{out / scale['folder']} has no finished run of {', '.join(methods)}: leave --done out to train them"
        )
    return rows


# --- samples ---


def shown(run: str) -> list[dict]:
    """Rows of a run's samples.jsonl: one response a prompt of pi and of pi_ref, with their
    scores.
    """
    return [json.loads(line) for line in (Path(run) / "samples.jsonl").read_text().splitlines()]


def pi_ref(config: Config, M: int) -> tuple[runs.Task, Tensor, list[list[str]]]:
    """The held-out prompts of a run, and M fresh samples of pi_ref for each: their rewards and
    their texts (P, M).
    """
    task = runs.load_task(config, "test")
    return task, *evaluation.pi_ref(task, config, M)


def scores(folder: Path) -> dict[str, Tensor]:
    """reward, judge, reward_ref, judge_ref (P, M) of the samples behind a run's eval.json, drawn
    from their seeds.
    """
    first = json.loads(table_of(folder, "test").read_text())["rows"][0]
    config, M = replace(runs.load_finished(folder), prompts=first["prompts"]), first["samples"]
    task, r_ref, texts_ref = pi_ref(config, M)
    judge, policy = (
        load_scorer(config.judge, "judge"),
        load_policy(str(folder / "policy"))[0].to(task.ids.device),
    )
    samples, r = runs.rollout(
        task, policy, range(len(task.prompts)), num_samples=M, seed=evaluation.POLICY_SEED
    )
    return {
        "reward": r,
        "judge": runs.score(judge, task.prompts, samples.texts),
        "reward_ref": r_ref,
        "judge_ref": runs.score(judge, task.prompts, texts_ref),
    }


# --- statistics over seeds ---


def grouped(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """The rows for each combination of values in these columns."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def mean_stderr(values: list[float], alone: float = math.nan) -> tuple[float, float]:
    """Mean and its standard error; that of a single value is `alone`."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else alone


def points(rows: list[dict]) -> list[dict]:
    """One row for each method, budget, procedure, n and scorer: means over seeds.

    stderr, kl_stderr: over seeds (of one seed: over prompts). stderr_prompts: over prompts, shared
    by all runs.
    """
    names, found = ("method", "budget", "procedure", "n", "scorer"), []
    for key, group in grouped(rows, *names).items():
        column = {name: [row[name] for row in group] for name in group[0]}
        kl, kl_stderr = mean_stderr(column["kl"], column["kl_stderr"][0])
        win, stderr = mean_stderr(column["win_rate"], column["stderr"][0])
        expected = None if None in column["theory"] else fmean(column["theory"])
        found.append(
            dict(zip(names, key))
            | dict(
                kl=kl,
                kl_stderr=kl_stderr,
                win_rate=win,
                stderr=stderr,
                stderr_prompts=fmean(column["stderr"]),
                theory=expected,
                optimal=fmean(column["optimal"]),
                seeds=len(group),
            )
        )
    return found


def near(rows: list[dict], kl: float) -> list[dict]:
    """The rows of runs between half and twice a KL."""
    return [row for row in rows if kl / 2 <= row["kl"] <= 2 * kl]


def comparable(
    rows: list[dict], kl: float, method: str, procedure: str, n: int, scorer: str
) -> list[dict]:
    """The rows near a KL of one method and case; none where the KL is more than a tenth beyond all
    of them.
    """
    key = method, procedure, n, scorer
    mine = [
        row
        for row in near(rows, kl)
        if (row["method"], row["procedure"], row["n"], row["scorer"]) == key
    ]
    x = [math.log(row["kl"] / kl) for row in mine]
    return mine if mine and min(x) - 0.1 <= 0 <= max(x) + 0.1 else []


def at_kl(
    rows: list[dict], kl: float, method: str, procedure: str, n: int, scorer: str
) -> tuple[float, float]:
    """(win rate, standard error) of a method at this KL in nats, from its runs, of all seeds,
    between half and twice the KL.

    The gain over 1/2, as a share of the optimum's at the same KL, changes slowly: it is regressed
    on log KL, or averaged where the runs' KLs are within a fifth of each other. The error is that
    of the regression, so the scatter of the seeds; of one run or two, that over prompts. nan more
    than a tenth beyond the runs.
    """
    mine = comparable(rows, kl, method, procedure, n, scorer)
    if not mine:
        return math.nan, math.nan
    x = np.log([row["kl"] / kl for row in mine])  # 0 at the KL asked for
    share = np.array([(row["win_rate"] - 0.5) / (row["optimal"] - 0.5) for row in mine])
    dx, gain = x - x.mean(), theory.optimal_win_rate(kl, procedure, n) - 0.5
    spread = dx @ dx if np.ptp(x) > 0.2 else math.inf
    slope = dx @ share / spread
    win_rate = 0.5 + gain * (share.mean() - slope * x.mean()).item()
    if len(mine) <= 2:
        return win_rate, fmean(row["stderr"] for row in mine)
    left = share - share.mean() - slope * dx
    return win_rate, gain * (
        left @ left / (len(mine) - 2) * (1 / len(mine) + x.mean() ** 2 / spread)
    ).item() ** 0.5


def common_kl(rows: list[dict], methods: Iterable[str] | None = None) -> float:
    """Of .1 to 2 nats, the KL at which most of the methods (default: all) have runs to compare; of
    several the nearest.
    """
    case = rows[0]["procedure"], rows[0]["n"], rows[0]["scorer"]
    names = methods or {row["method"] for row in rows}

    def compared(kl: float) -> tuple[int, float]:
        distance = fmean(abs(math.log(row["kl"] / kl)) for row in rows)
        return sum(bool(comparable(rows, kl, name, *case)) for name in names), -distance

    return max((k / 20 for k in range(2, 41)), key=compared)
