"""Many runs of train.py and evaluate.py, each made once, kept under DIR/runs and read by every
study.

A run that has its eval.json is done; one that was interrupted goes on from its checkpoint.
"""

import argparse
import importlib.util
import re
import warnings
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

import minictrl
from minictrl import evaluation, results, runs
from minictrl.checks import OutOfReach
from minictrl.cli import Parser, positive, whole
from minictrl.config import WITHOUT_EFFECT, Config
from minictrl.messages import command
from minictrl.methods import METHODS
from minictrl.models import load_policy, load_scorer
from minictrl.rollout import score
from minictrl.studies.tables import Rows
from minictrl.task import Task, load_task, scorer_of

# What the studies call a method: settings of train.py beside --kl and --seed. The transforms by
# PPO, every file of methods/ as it is, and some of them with other settings. tea is left out: while
# N is at most G, it is pkpo.
CTRL = ("identity", "log", "exp5", "exp10", "exp-5", "exp-10", "bon_fp")
OTHERS = ("none", "ipo", "bonbon", "bond", "grpo", "grpo_fixed")  # made for no procedure
VARIANTS = {
    **{name: {"transform": name} for name in (*CTRL, "none")},
    "won_fp": {"transform": "won_fp", "procedure": "won"},
    **{name: {"method": name} for name in METHODS if name not in ("ppo", "tea")},
    "qrpo exp10": {"method": "qrpo", "transform": "exp10"},
    "qrpo exp-10": {"method": "qrpo", "transform": "exp-10"},
    "pkpo won": {"method": "pkpo", "procedure": "won"},
}
AWARE = {  # procedure -> the methods that are made for it
    "standard": ("identity", "log"),
    "bon": ("exp5", "exp10", "bon_fp", "qrpo exp10", "pkpo"),
    "won": ("exp-5", "exp-10", "won_fp", "qrpo exp-10", "pkpo won"),
}

# quick -> how large: flags of every training, prompts and samples of every evaluation, how many
# seeds each KL budget has, and whether runs that aren't finished are left out instead of trained.
# `resize` sets the last two.
SCALES = {
    False: {
        "folder": "runs",
        "train": {},
        "prompts": 400,  # prompts differ by more than 32 samples of one do
        "samples": 32,
        "seeds": {1.0: 5, 0.5: 3, 2.0: 3},
        "done": False,
    },
    True: {
        "folder": "runs-quick",
        "train": {"steps": 6, "prompts": 32, "batch": 16, "G": 8, "lr": 2e-3},
        "prompts": 24,
        "samples": 32,
        "seeds": {0.5: 1, 2.0: 1},
        "done": False,
    },
}


def add_scale(parser: Parser):
    """The flags of a sweep's size."""
    add = parser.add_argument
    add("--quick", action="store_true", help="coarser and faster")
    add(
        "--seeds",
        type=whole(),
        metavar="N",
        help="of each KL (default 5 at 1 nat, 3 elsewhere; --quick: 1)",
    )
    add(
        "--budgets",
        type=positive,
        nargs="+",
        metavar="KL",
        help="of the runs (default 1 0.5 2; --quick: 0.5 2)",
    )
    add("--done", action="store_true", help="read the finished runs in DIR and train no others")


def resize(args: argparse.Namespace):
    """Takes over the flags of `add_scale`."""
    scale = SCALES[args.quick]
    budgets = args.budgets or scale["seeds"]
    scale["seeds"] = {kl: args.seeds or seeds_of(kl, scale) for kl in budgets}
    scale["done"] = args.done


def seeds_of(kl: float, scale: dict) -> int:
    """How many seeds a budget has; one that isn't in the plan has as many as the plan's fewest."""
    return scale["seeds"].get(kl, min(scale["seeds"].values()))


def seeds_in(out: Path, quick: bool) -> dict[float, int]:
    """KL budget -> how many seeds, of the runs that were begun in `out`."""
    seeds = {}
    for folder in (out / SCALES[quick]["folder"]).iterdir():
        found = re.fullmatch(r".+-kl([\d.e-]+)-seed(\d+)", folder.name)
        if found and folder.is_dir():
            kl, seed = float(found[1]), int(found[2])
            seeds[kl] = max(seeds.get(kl, 0), seed + 1)
    return seeds


# --- runs ---


def sweep(
    out: Path,
    quick: bool,
    methods: dict[str, dict],
    *,
    budgets: tuple[float, ...] | None = None,
    seeds: int | None = None,
    split: str = "test",
) -> Rows:
    """Rows of eval.json of every method, KL budget and seed, with method, budget, seed and run (its
    folder) in front, win rates and KLs by prompt at the end. budgets, seeds: not the scale's.

    Trains what is missing, with one bar that shows the time left. A budget that is out of a
    method's reach is left out, with a line that says so. Ctrl-C stops after the step at hand; the
    same command goes on from there.
    """
    scale, labels, wanted, rows = SCALES[quick], {}, {}, []
    plan = {kl: seeds or seeds_of(kl, scale) for kl in budgets or scale["seeds"]}
    # all methods with one seed come before the next seed
    for seed, budget in product(range(max(plan.values())), plan):
        for name, settings in methods.items() if seed < plan[budget] else ():
            folder = out / scale["folder"] / f"{name.replace(' ', '-')}-kl{budget:g}-seed{seed}"
            common = scale["train"] | {"kl": budget, "seed": seed, "cache": str(out / "cache")}
            labels[folder] = {"method": name, "budget": budget, "seed": seed, "run": str(folder)}
            wanted[folder] = common | settings
    tables = tables_of(wanted, scale, split)  # a run of other settings is told before any training
    if not scale["done"]:
        missing = {folder: wanted[folder] for folder in wanted if folder not in tables}
        finish(missing, scale, split)
        tables |= tables_of(missing, scale, split)
    for folder, label in labels.items():
        rows += [label | row for row in tables.get(folder, ())]
    same_models(rows)
    if not rows:
        raise ValueError(
            f"{out / scale['folder']} has no finished run of {', '.join(methods)}: train one, "
            "without --done and at a KL that it reaches"
        )
    return rows


def finish(missing: dict[Path, dict], scale: dict, split: str):
    """Trains and evaluates the runs, folder -> settings."""
    for folder in tqdm(missing, "runs", unit="run", disable=None if missing else True):
        try:
            run(folder, missing[folder], scale["prompts"], scale["samples"], split)
        except OutOfReach as error:
            tqdm.write(f"{folder} left out: {error}")


def run(folder: Path, settings: dict, prompts: int, samples: int, split: str):
    """One run with these settings of train.py. What the scripts print goes to FOLDER.log.

    Raises ValueError as the scripts do; KeyboardInterrupt if the training was stopped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if not runs.has_policy(folder):
            begun = (folder / "config.json").is_file()
            if train(settings | {"out": folder}, "--resume" if begun else "--overwrite"):
                raise KeyboardInterrupt
        flags = [f"--prompts={prompts}", f"--samples={samples}", f"--split={split}"]
        script("evaluate").main([str(folder), *flags])


def train(settings: dict, *flags: str) -> int | None:
    """Runs train.py with settings and flags; returns its exit status."""
    given = (f"--{name.replace('_', '-')}={value}" for name, value in settings.items())
    return script("train").main([*given, *flags])


def script(name: str):
    """train or evaluate, the scripts beside the package, as a module."""
    path = Path(minictrl.__file__).parent.parent / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} is missing: a study that trains needs a clone of the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables_of(wanted: dict[Path, dict], scale: dict, split: str) -> dict[Path, Rows]:
    """The tables that are there, of the runs wanted, folder -> settings."""
    size, suffix = (scale["prompts"], scale["samples"]), results.file_suffix(split)
    there = [folder for folder in wanted if results.eval_path(folder, suffix).is_file()]
    return {folder: table(folder, wanted[folder], split, *size) for folder in there}


def table(folder: Path, settings: dict, split: str, prompts: int, samples: int) -> Rows:
    """Rows of a finished run's eval.json, each with what the run was made from.

    Raises ValueError if any setting of the run is not that of train.py with these, or if it was
    evaluated on another number of prompts or samples.
    """
    stored, extra = runs.load_record(folder)
    for name, value in vars(Config(**settings).resolved()).items():
        mine = getattr(stored, name)
        if name not in WITHOUT_EFFECT and place_of(name, mine) != place_of(name, value):
            raise ValueError(
                f"{folder}: holds a run with {name} {mine}, not {value}; give another DIR, or "
                "move that run away"
            )
    if extra.get("code") not in (None, runs.code_of(stored)):
        warnings.warn(
            f"{folder}: the code of its method, transform or procedure has changed since; move it "
            "away to train anew",
            stacklevel=2,
        )
    suffix = results.file_suffix(split)
    rows = results.read(folder, suffix)
    if split == "train":
        prompts = min(prompts, stored.prompts)  # those it was trained on
    made_from = {
        f"{role} {getattr(stored, role)}": digest
        for role, digest in extra.get("made_from", {}).items()
    }
    wins, by_prompt = (results.read_tensors(folder, name, suffix) for name in ("wins", "by_prompt"))
    for row in rows:
        name = f"{row['procedure']}-{row['n']}-{row['scorer']}"
        if name not in wins or "kl" not in by_prompt or wins[name].shape != by_prompt["kl"].shape:
            raise ValueError(
                f"{folder}: its win rates by prompt are not those of its eval.json; evaluate it "
                f"again: {command('evaluate.py', folder)}"
            )
        if (row["prompts"], row["samples"]) != (prompts, samples):
            raise ValueError(
                f"{folder}: was evaluated on {row['prompts']} prompts with {row['samples']} "
                f"samples, not {prompts} with {samples}; evaluate it again: "
                f"{command('evaluate.py', folder)} --prompts {prompts} --samples {samples} --split "
                f"{split}"
            )
        row |= {"wins": wins[name].numpy(), "kls": by_prompt["kl"].numpy()}
        row |= {"made_from": made_from, "commit": extra.get("commit")}
    return rows


def place_of(name: str, value):
    """A setting's value, of a path the same whatever directory it is seen from."""
    return Path(value).resolve() if name in runs.PATHS and value else value


def digests() -> dict[str, str | None]:
    """Those of the default task, as its runs keep them."""
    config = Config().resolved()
    task = load_task(config, "train")
    return runs.digests_of(config, task, scorer_of(config, "judge"))


def same_models(rows: Rows):
    """Raises ValueError where two runs name a model or task alike and it was not the same."""
    known = {}
    for row in rows:
        for name, digest in row["made_from"].items():
            first, run = known.setdefault(name, (digest, row["run"]))
            if first != digest:
                raise ValueError(
                    f"{row['run']}: its {name} has the digest {digest}, that of {run} has {first}; "
                    "such runs can't be compared: train one of them again"
                )


# --- samples ---


def reference(out: Path, prompts: int, M: int) -> tuple[Task, Tensor, list[list[str]]]:
    """Held-out prompts, and M fresh samples of pi_ref for each: their rewards and texts (P, M)."""
    config = Config(prompts=prompts, cache=str(out / "cache")).resolved()
    task = load_task(config, "test")
    drawn, texts = evaluation.draw_reference(task, config, M)
    return task, drawn.r_ref, texts


Scores = dict[str, Tensor]  # reward and judge -> (P, M)


def redrawn(run: Path, row: dict) -> tuple[Scores, Scores]:
    """Scores of the samples of pi and of pi_ref behind a run's eval.json, drawn again from their
    seeds. row: one of that file's.
    """
    stored, P, M = runs.load_finished(run), row["prompts"], row["samples"]
    config, task, judge = evaluation.load_models(run, stored, "test", P, None, {})
    policy, _ = load_policy(str(run / "policy"))
    policy.to(task.ids.device)
    pi, pi_ref, _ = evaluation.draw_both(task, policy, judge, config, M)
    return pi.scores, pi_ref.scores


def judged(task: Task, texts: list[list[str]]) -> Tensor:
    """(P, M) the judge's scores."""
    return score(load_scorer("reviews", "judge"), task.prompts, texts)
