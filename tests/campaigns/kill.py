"""Kill runs at random moments, resume them, and compare with runs that were never stopped.

    python tests/campaigns/kill.py --kills 200 --seed 0 --out kills.jsonl

Every kill is a SIGKILL: in a stage at a random moment of its known duration, or at a point (before
a file that is written takes its place, after a row of metrics.jsonl). One run in three is killed
again as it resumes. A campaign that is stopped goes on: what --out holds isn't made again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tiny import (
    METHODS,
    Child,
    begin_or_resume,
    copied,
    differing,
    evaluated,
    evaluation,
    evaluation_of,
    files,
    make_world,
    models,
    results,
    rollout,
    run,
    runs,
    update,
)

CASES = {name: ["--method", name] for name in METHODS} | {
    "ppo, value": ["--baseline", "value", "--transform", "log"],
    "ppo, prefix": ["--baseline", "prefix", "--transform", "exp10"],
    "ppo, none": ["--transform", "none", "--minibatch", "3"],
    "ppo, won_fp": ["--transform", "won_fp", "--procedure", "won", "--ppo-epochs", "2"],
    "grpo, value": ["--method", "grpo", "--baseline", "value"],
    "pkpo, beta": ["--method", "pkpo", "--beta", "0.3", "--procedure", "won"],
}
# where each stage happens: (owner, name of a function)
STAGES = {
    "start": (runs, "create"),
    "calibration": (rollout, "cached"),
    "sampling": (rollout, "sample"),
    "scoring": (rollout, "score"),
    "update": (update, "update"),
    "checkpoint": (runs.Training, "_save"),
    "policy": (models, "save_policy"),
    "evaluation": (evaluation, "evaluate"),
}
POINTS = {  # at once: before a call, or after it
    "rename": (os, "replace", "before"),
    "row": (runs.Training, "log", "after"),
    "rename in evaluation": (os, "replace", "before"),
}


def wrap(owner, name: str, before=lambda: None, after=lambda: None):
    function = getattr(owner, name)

    def wrapped(*args, **options):
        before()
        try:
            return function(*args, **options)
        finally:
            after()

    setattr(owner, name, wrapped)


def recorder(path: Path):
    """In a child: how long each call of each stage takes, and how often each point is passed."""

    def prepare():
        spent, counts, began = {}, Counter(), {}
        for stage, (owner, name) in STAGES.items():

            def leave(stage=stage):
                spent.setdefault(stage, []).append(time.monotonic() - began[stage])
                path.write_text(json.dumps([spent, counts]))

            wrap(owner, name, lambda s=stage: began.update({s: time.monotonic()}), leave)
        for point in ("rename", "row"):
            wrap(*POINTS[point][:2], lambda p=point: counts.update([p]))

    return prepare


def killer(stage: str, call: int, pipe: int):
    """In a child: at a call of a stage tells the parent; at one of a point kills itself."""

    def prepare():
        left = [call]

        def passed():
            left[0] -= 1
            if left[0] == -1:
                if stage in STAGES:
                    os.write(pipe, b".")
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        owner, name, *when = STAGES.get(stage) or POINTS[stage]
        wrap(owner, name, **{when[0] if when else "before": passed})

    return prepare


def killed(script: str, argv: list, log: Path, stage: str, call: int, delay: float) -> bool:
    """Starts a script and kills it `delay` seconds into a call of a stage; False if it ended."""
    reader, writer = os.pipe()
    child = Child(script, argv, log, killer(stage, call, writer))
    os.close(writer)
    if os.read(reader, 1):  # nothing where it has ended, or has killed itself
        time.sleep(delay)
        child.kill()
    os.close(reader)
    return child.result()[0] == -signal.SIGKILL


def whole(world: list, case: str, folder: Path) -> dict:
    """A run that is never stopped: its results, and how long its stages take."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found, argv = {}, begin_or_resume([*world, *CASES[case]], folder)
    for script, ending in (("train", ""), ("evaluate", " in evaluation")):
        argv = argv if script == "train" else evaluation_of(folder)
        status, said = run(script, argv, folder / "log", recorder(folder / "times"))
        assert status == 0, f"{case}: {said}"
        spent, counts = json.loads((folder / "times").read_text())
        if ending:
            spent = {"evaluation": spent["evaluation"]}
        else:
            shutil.copytree(folder, folder.with_name(f"{folder.name} trained"))
        found |= spent | {point + ending: [0.0] * n for point, n in counts.items()}
    times = {stage: x for stage, x in found.items() if stage in STAGES or stage in POINTS}
    return {"times": times, "train": results(folder), "evaluate": evaluated(folder)}


def trial(world: list, case: str, stage: str, reference: dict, home: Path, rng) -> dict:
    """A run that is killed in a stage, and resumed until it is done."""
    folder, log, kills = home / "trial", home / "log", 0
    shutil.rmtree(folder, ignore_errors=True)
    script = "evaluate" if "evaluation" in stage else "train"
    if script == "evaluate":
        copied(home / f"{case} trained", folder)
    else:
        folder.mkdir()

    def argv():
        if script == "evaluate":
            return evaluation_of(folder)
        return begin_or_resume([*world, *CASES[case]], folder)

    for _ in range(1 + (rng.random() < 1 / 3)):
        call = rng.randrange(len(reference["times"][stage]))
        delay = rng.random() * reference["times"][stage][call]
        kills += killed(script, argv(), log, stage, call, delay)
    status, said = run(script, argv(), log)
    found = evaluated(folder) if script == "evaluate" else results(folder) if status == 0 else {}
    wrong = differing(found, reference[script])
    return {"case": case, "stage": stage, "kills": kills, "status": status, "wrong": wrong,
            "said": said[-500:] if status or wrong else ""}  # fmt: skip


def campaign(kills: int, seed: int, out: Path, home: Path, cases=tuple(CASES)) -> list[dict]:
    """Trials until so many kills are made; those that `out` holds count."""
    world, references = make_world(home), {}
    rows = files.read_rows(out) if out.is_file() else []
    stages = [*STAGES, *POINTS]
    while sum(row["kills"] for row in rows) < kills:
        i = len(rows)
        rng = random.Random(f"{seed} {i}")
        # every stage of every case before the first again
        case, stage = cases[i % len(cases)], stages[(i + i // len(cases)) % len(stages)]
        if case not in references:
            references[case] = whole(world, case, home / case)
        if stage not in references[case]["times"]:  # offline methods sample in no step
            stage = "update"
        rows.append(trial(world, case, stage, references[case], home, rng))
        with open(out, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict]) -> str:
    """Kills, by method and stage: `identical/all` where they differ."""
    stages = [*STAGES, *POINTS]

    def cell(case: str, stage: str) -> str:
        mine = [row for row in rows if case in (row["case"], "all") and row["stage"] == stage]
        kills, bad = sum(row["kills"] for row in mine), sum(bool(row["wrong"]) for row in mine)
        return f"{kills}" + f" ({bad} differ)" * (bad > 0)

    names = [*dict.fromkeys(row["case"] for row in rows), "all"]
    return files.markdown(
        ["kills", *stages], [[name, *(cell(name, s) for s in stages)] for name in names]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kills.jsonl"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        rows = campaign(args.kills, args.seed, args.out, Path(home))
    print(table(rows))
    bad = [row for row in rows if row["wrong"]]
    print(f"{sum(row['kills'] for row in rows)} kills, {len(rows) - len(bad)} of {len(rows)} runs "
          f"identical, {len(bad)} differing", *bad, sep="\n")  # fmt: skip
