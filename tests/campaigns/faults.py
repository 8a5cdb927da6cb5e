"""Break what a run stands on, and see that no result is silently another.

    python tests/campaigns/faults.py --flips 1000 --limits 40 --seed 0 --out faults.jsonl

Outcomes: the same result; the same after a warning that names the file; refused in one line; and
what may not be: another result, or a traceback. A campaign that is stopped goes on with the fault
that it was at.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import damaged
from broken import MEMORY, memory, not_finite, raises
from tiny import (
    AGAIN,
    OTHER,
    REFUSED,
    SAME,
    TRACEBACK,
    Child,
    World,
    differing,
    evaluated,
    evaluation_of,
    refused,
    results,
    run,
)

from minictrl import files, reference


def disk(world: World, count: int, seed: int):
    """No file may be longer than a limit; then there is room again."""
    for i in range(count):
        rng = random.Random(f"{seed} disk {i}")
        script = rng.choice(("train", "train", "evaluate"))
        limit = int(400 * 200 ** rng.random())  # from 0.4 to 80 kB, above the largest file

        def full(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        folder = world.fresh(copy=script == "evaluate")
        if script == "train":
            status, said = world.train(folder, full)
            well = partial(world.ends_well, folder)
        else:
            status, said = run(script, evaluation_of(folder), world.log, full)

            def well(folder=folder):
                again = run("evaluate", evaluation_of(folder), world.log)[0]
                return again == 0 and not differing(evaluated(folder), world.evaluated)

        outcome = SAME if status == 0 else refused(status, said, str(folder))
        detail = "" if outcome in (SAME, REFUSED) else said[-300:]
        yield {"fault": f"full disk, {script}", "case": f"{limit} bytes{detail}",
               "outcome": outcome if well() else OTHER}  # fmt: skip


def places(world: World):
    """Directories that can't be written, as a user without rights, and paths that are files."""

    def nobody():
        if os.geteuid() == 0:  # whom no rights stop
            os.setgid(65534)
            os.setuid(65534)

    os.chmod(world.home, 0o755)
    for name, read_only in {"no rights to --out": "run", "no rights beside --out": "."}.items():
        folder = world.fresh(copy=True)
        paths = [folder / read_only, *folder.glob(f"{read_only}/**/*")]
        for path in paths:
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        before = results(folder)
        outcome = refused(*world.train(folder, nobody), str(folder))
        for path in paths:
            os.chmod(path, 0o755)
        yield {"fault": "place", "case": name,
               "outcome": outcome if not differing(results(folder), before) else OTHER}  # fmt: skip
    for name in ("run", "cache"):
        folder = world.fresh(copy=False)
        (folder / name).write_text("mine")
        argv = [*world.flags, "--out", folder / "run", "--cache", folder / "cache", "--overwrite"]
        outcome = refused(*run("train", argv, world.log), str(folder / name))
        kept = (folder / name).read_text() == "mine"
        yield {"fault": "place", "case": f"--{name.replace('run', 'out')} is a file",
               "outcome": outcome if kept else OTHER}  # fmt: skip


def clock(world: World):
    """The clock goes back by a day at the third look; checkpoints are written all the same."""
    real, looks = time.time, Counter()

    def back():
        def now():
            looks["time"] += 1
            return real() - 86400 * (looks["time"] > 2)

        time.time = now

    folder = world.fresh(copy=False)
    status, said = world.train(folder, back)
    same = status == 0 and not differing(results(folder), world.trained)
    yield {"fault": "clock", "case": "a day back", "outcome": SAME if same else OTHER}


def strangers(world: World):
    """What an evaluation that was killed has left beside the policy is no damage to it."""
    folder = world.fresh(copy=True)
    (folder / "run" / "policy" / "README.md.1.tmp").touch()
    status, _ = run("evaluate", evaluation_of(folder), world.log)
    same = status == 0 and not differing(evaluated(folder), world.evaluated)
    yield {"fault": "strangers", "case": "in policy/", "outcome": SAME if same else OTHER}


def together(world: World, count: int):
    """Runs on one new cache at once: each chunk is drawn once, all end as one that was alone."""
    home = world.fresh(copy=False)
    drawn = home / "drawn"

    def counting():
        save = reference.Reference.save
        reference.CHUNK = 2  # prompts: two chunks for a run

        def saved(self, path, digest):
            if path.parent.name == "cache":  # not "own"
                with open(drawn, "a") as file:
                    file.write(f"{path.name}\n")
            return save(self, path, digest)

        reference.Reference.save = saved

    def start(i: int, cache: str) -> Child:
        (home / f"{i}").mkdir()
        argv = [*world.flags, "--out", home / f"{i}" / "run", "--cache", home / cache]
        return Child("train", argv, home / f"{i}" / "log", counting)

    ended = [start(count, "own").result()[0]]
    ended += [child.result()[0] for child in [start(i, "cache") for i in range(count)]]
    alone, *others = [{} if any(ended) else results(home / f"{i}") for i in range(count, -1, -1)]
    wrong = any(ended) or any(differing(each, alone) for each in others)
    times = len(drawn.read_text().splitlines())
    yield {"fault": "runs at once", "case": f"{count} runs drew {times} chunks of 2",
           "outcome": SAME if not wrong and times == 2 else OTHER}  # fmt: skip


def campaign(home: Path, out: Path, *, flips, limits, numbers, errors, runs, seed):
    """Every fault; those that `out` holds are done."""
    world = World(home)
    done = Counter(row["part"] for row in files.read_rows(out)) if out.is_file() else {}
    parts = {
        "flips": damaged.flips(world, flips, seed),
        "scripts": damaged.by_scripts(world, flips // 20, seed),
        "memory": memory(world, errors),
        "numbers": not_finite(world, numbers, seed),
        "disk": disk(world, limits, seed),
        "places": places(world),
        "clock": clock(world),
        "strangers": strangers(world),
        "raises": raises(world),
        "together": together(world, runs),
    }
    for part, rows in parts.items():
        if part in done:
            continue
        rows = [row | {"part": part} for row in rows]
        with open(out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict]) -> str:
    outcomes = (SAME, AGAIN, REFUSED, OTHER, TRACEBACK)
    counts = Counter((row["fault"], row["outcome"]) for row in rows)
    names = dict.fromkeys(row["fault"] for row in rows)
    return files.markdown(
        ["fault", *outcomes], [[name, *(str(counts[name, o]) for o in outcomes)] for name in names]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--limits", type=int, default=40)
    parser.add_argument("--numbers", type=int, default=20)
    parser.add_argument("--errors", type=int, default=len(MEMORY), help="of memory that runs out")
    parser.add_argument("--runs", type=int, default=8, help="at once on one cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults.jsonl"))
    args = vars(parser.parse_args())
    out = args.pop("out")
    with tempfile.TemporaryDirectory() as home:
        campaign(Path(home), out, **args)
    rows = files.read_rows(out)
    print(table(rows))
    print(*(row for row in rows if row["outcome"] in (OTHER, TRACEBACK)), sep="\n")
