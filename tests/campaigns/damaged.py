"""Files with a byte that has changed, or cut: read as the scripts read them."""

import random
import shutil
import warnings
from pathlib import Path

from tiny import (
    AGAIN,
    OTHER,
    REFUSED,
    SAME,
    TRACEBACK,
    World,
    differing,
    evaluated,
    evaluation_of,
    refused,
    results,
    run,
)

from minictrl import files, models, rollout, runs, update
from minictrl.budget import Budget
from minictrl.config import CALIBRATION, TEST_REF
from minictrl.results import read
from minictrl.task import load_task
from minictrl.training import Training


def readers(world: World) -> dict:
    """A kind of file -> (its files in a folder, what reads them as the scripts do, to compare)."""
    tasks = {CALIBRATION: load_task(world.config, "train")}
    tasks[TEST_REF] = load_task(world.config, "test")

    def restored(folder: Path):
        learner = update.make_learner(fresh_policy(world), value_head=False)
        budget = Budget(1.0, lambda kl: kl)
        training = Training(folder / "run", learner, budget, 4)
        training._restore()
        rows = (folder / "run" / "metrics.jsonl").read_bytes()
        return files.check_sum(learner.state()), training.step, budget.target, rows

    def samples(folder: Path):
        found = [
            rollout.reference_samples(
                task, 8, seed=world.config.seed_for(draw), cache=str(folder / "cache"), name=""
            )
            for draw, task in tasks.items()
        ]
        return [files.check_sum(vars(each)) for each in found]

    def policy(folder: Path):
        runs.load_finished(folder / "run")
        return [x.read_bytes() for x in sorted((folder / "run" / "policy").iterdir())
                if x.name not in ("README.md", models.SUMS)]  # fmt: skip

    def table(folder: Path):
        parts = evaluated(folder)
        del parts["eval.json"]
        return read(folder / "run"), parts

    def settings(folder: Path):
        config, stored = runs.load_record(folder / "run")
        return vars(config) | stored | {"cache": None}

    parts = ["eval.json", "wins.safetensors", "by_prompt.safetensors", "samples.jsonl"]
    return {
        "cache": ("cache/*.safetensors", samples),
        "checkpoint": ("run/checkpoint/*", restored),
        "metrics.jsonl": ("run/metrics.jsonl", restored),
        "policy": ("run/policy/[!R]*", policy),
        "config.json": ("run/config.json", settings),
        **{part: (f"run/{part}", table) for part in parts},
    }


def by_scripts(world: World, count: int, seed: int):
    """The same damage, met by the scripts themselves: a run is resumed, or evaluated again."""
    kinds = ("cache/*.safetensors", "run/checkpoint/*", "run/metrics.jsonl", "run/policy/[!R]*",
             "run/config.json", "run/wins.safetensors")  # fmt: skip
    for i in range(count):
        rng, pattern = random.Random(f"{seed} scripts {i}"), kinds[i % len(kinds)]
        script = "train" if "checkpoint" in pattern or "metrics" in pattern else "evaluate"
        folder = world.fresh(copy=True)
        path = rng.choice(sorted(folder.glob(pattern)))
        what = damage(path, rng)
        bad = path.read_bytes()
        if script == "train":
            shutil.rmtree(folder / "run" / "policy")
            (status, said), found, clean = world.train(folder), results, world.trained
        else:
            status, said = run(script, evaluation_of(folder), world.log)
            found, clean = evaluated, world.evaluated
        if status:
            kept = path.read_bytes() == bad  # nothing is written over what is damaged
            outcome = refused(status, said, path.name) if kept else OTHER
        else:
            again = AGAIN if f"{path} is damaged" in said else SAME
            outcome = OTHER if differing(found(folder), clean) else again
        yield {"fault": f"damaged, {script}.py", "case": f"{path.name} {what}", "outcome": outcome}


def fresh_policy(world: World):
    model, _ = models.load_policy(world.config.policy)
    update.freeze(model, 1)
    return model


def damage(path: Path, rng) -> str:
    """Flips a byte at random, or cuts the file."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.2:
        path.write_bytes(data[:at])
        return f"cut at {at}"
    data[at] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return f"byte {at}"


def flips(world: World, count: int, seed: int):
    """One damaged byte, or a cut, in each kind of file in turn."""
    kinds, folder = readers(world), world.fresh(copy=True)
    expected = {kind: read(folder) for kind, (_, read) in kinds.items()}
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        kind = list(kinds)[i % len(kinds)]
        pattern, read = kinds[kind]
        path = rng.choice(sorted(folder.glob(pattern)))
        whole = path.read_bytes()
        what = damage(path, rng)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                found = read(folder)
                named = any(path.name in str(each.message) for each in warned)
                outcome = OTHER if found != expected[kind] else AGAIN if named else SAME
            except ValueError as error:
                outcome = REFUSED if path.name in str(error) else OTHER
            except Exception as error:
                outcome, what = TRACEBACK, f"{what}: {error!r}"
        path.write_bytes(whole)
        yield {"fault": f"damaged {kind}", "case": f"{path.name} {what}", "outcome": outcome}
