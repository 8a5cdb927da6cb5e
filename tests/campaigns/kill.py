"""Kill runs at random moments, resume them, and compare with runs that were never stopped.

    python tests/campaigns/kill.py --kills 200 --seed 0 --out kills.jsonl

Every kill is a SIGKILL: in a stage at a random moment of its known duration, or at a point (before
a file that is written takes its place, after a row of metrics.jsonl). A run is killed up to three
times. A campaign that is stopped goes on: what --out holds isn't made again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tiny import (
    Child,
    begin_or_resume,
    copied,
    differing,
    evaluated,
    evaluation_of,
    make_world,
    results,
    run,
)

from minictrl import evaluation, files, models, rollout, runs, training, update
from minictrl.methods import METHODS

CASES = {name: ["--method", name] for name in METHODS} | {
    "maxpo": ["--method", "maxpo", "--n", "2"],  # below G
    "ppo, value": ["--baseline", "value", "--transform", "log"],
    "ppo, prefix": ["--baseline", "prefix", "--transform", "exp10"],
    "ppo, none": ["--transform", "none", "--minibatch", "3"],
    "ppo, won_fp": ["--transform", "won_fp", "--procedure", "won", "--ppo-epochs", "2"],
    "grpo, value": ["--method", "grpo", "--baseline", "value"],
    "pkpo, beta": ["--method", "pkpo", "--beta", "0.3", "--procedure", "won"],
}
# where a run can be killed: (owner, name of a function, when)
HOOKS = {
    "start": (runs, "create", "within"),
    "calibration": (rollout, "cached", "within"),
    "sampling": (rollout, "sample", "within"),
    "scoring": (rollout, "score", "within"),
    "update": (update, "update", "within"),
    "checkpoint": (training.Training, "_save", "within"),
    "policy": (models, "save_policy", "within"),
    "rename": (os, "replace", "before"),
    "row": (training.Training, "log", "after"),
    "evaluation": (evaluation, "evaluate", "within"),
}
STAGES = [("train", hook) for hook in HOOKS if hook != "evaluation"]
STAGES += [("evaluate", "evaluation"), ("evaluate", "rename")]


def wrap(hook: str, before=lambda: None, after=lambda: None):
    """In a child: calls `before` and `after` around the function of a hook."""
    owner, name, _ = HOOKS[hook]
    function = getattr(owner, name)

    def wrapped(*args, **options):
        before()
        try:
            return function(*args, **options)
        finally:
            after()

    setattr(owner, name, wrapped)


def recorder(path: Path):
    """In a child: how long each call of each hook's function takes, kept in a file."""
    spent, began = {}, {}

    def leave(hook: str):
        spent.setdefault(hook, []).append(time.monotonic() - began[hook])
        path.write_text(json.dumps(spent))

    for hook in HOOKS:
        wrap(hook, lambda h=hook: began.update({h: time.monotonic()}), lambda h=hook: leave(h))


def killer(hook: str, call: int, pipe: int):
    """In a child: kills it at a call, or tells the parent, which does so within the call."""
    _, _, when = HOOKS[hook]
    left = [call]

    def passed():
        left[0] -= 1
        if left[0] == -1 and when == "within":
            os.write(pipe, b".")
        elif left[0] == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    wrap(hook, **{"after" if when == "after" else "before": passed})


def killed(script: str, argv: list, log: Path, hook: str, call: int, delay: float) -> bool:
    """Starts a script and kills it `delay` seconds into a call; False if it ended before."""
    reader, writer = os.pipe()
    child = Child(script, argv, log, lambda: killer(hook, call, writer))
    os.close(writer)
    if os.read(reader, 1):  # nothing where it has ended, or has killed itself
        time.sleep(delay)
        child.kill()
    os.close(reader)
    return child.result()[0] == -signal.SIGKILL


def command(world: list, case: str, script: str, folder: Path) -> list:
    if script == "evaluate":
        return evaluation_of(folder)
    return begin_or_resume([*world, *CASES[case]], folder)


def whole(world: list, case: str, folder: Path) -> dict:
    """A run that is never stopped: its results, and how long each call takes."""
    folder.mkdir()
    found = {"times": {}}
    for script in ("train", "evaluate"):
        argv, times = command(world, case, script, folder), folder / "times"
        status, said = run(script, argv, folder / "log", lambda path=times: recorder(path))
        assert status == 0, f"{case}: {said}"
        found["times"][script] = json.loads(times.read_text())
        if script == "train":
            shutil.copytree(folder, folder.with_name(f"{case} trained"))
    return found | {"train": results(folder), "evaluate": evaluated(folder)}


def trial(world: list, case: str, script: str, hook: str, reference: dict, rng) -> dict:
    """A run that is killed, and resumed until it is done. Its directory is the world's."""
    home, kills = Path(world[-1]).parent, 0
    folder, log = home / "trial", home / "log"
    shutil.rmtree(folder, ignore_errors=True)
    if script == "evaluate":
        copied(home / f"{case} trained", folder)
    else:
        folder.mkdir()
    times = reference["times"][script][hook]
    for _ in range(rng.randrange(1, 4)):
        call = rng.randrange(len(times))
        argv = command(world, case, script, folder)
        kills += killed(script, argv, log, hook, call, rng.random() * times[call])
    status, said = run(script, command(world, case, script, folder), log)
    found = {} if status else evaluated(folder) if script == "evaluate" else results(folder)
    wrong = differing(found, reference[script])
    stage = hook if script == "train" or hook == "evaluation" else f"{hook} in evaluation"
    return {"case": case, "stage": stage, "kills": kills, "status": status, "wrong": wrong,
            "said": said[-500:] if wrong else ""}  # fmt: skip


def campaign(kills: int, seed: int, out: Path, home: Path, cases: list[str]) -> list[dict]:
    """Trials until so many kills are made; those that `out` holds count."""
    world, references = make_world(home), {}
    rows = files.read_rows(out) if out.is_file() else []
    while sum(row["kills"] for row in rows) < kills:
        i = len(rows)
        case = cases[i % len(cases)]
        script, hook = STAGES[(i + i // len(cases)) % len(STAGES)]  # in time each with each
        if case not in references:
            references[case] = whole(world, case, home / case)
        if hook not in references[case]["times"][script]:  # offline methods sample in no step
            hook = "update"
        rng = random.Random(f"{seed} {i}")
        rows.append(trial(world, case, script, hook, references[case], rng))
        with open(out, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def table(rows: list[dict]) -> str:
    """Kills, by method and stage, and how many of the runs differ."""
    stages = dict.fromkeys(row["stage"] for row in rows)

    def cell(case: str, stage: str) -> str:
        mine = [row for row in rows if case in (row["case"], "all") and row["stage"] == stage]
        kills, bad = sum(row["kills"] for row in mine), sum(bool(row["wrong"]) for row in mine)
        return f"{kills}" + f" ({bad} differ)" * (bad > 0)

    names = [*dict.fromkeys(row["case"] for row in rows), "all"]
    lines = [[name, *(cell(name, stage) for stage in stages)] for name in names]
    return files.markdown(["kills", *stages], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default="kills.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        rows = campaign(args.kills, args.seed, args.out, Path(home), args.cases)
    print(table(rows))
    bad = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} runs, {len(bad)} differ", *bad, sep="\n")
