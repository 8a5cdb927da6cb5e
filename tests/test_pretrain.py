import json

import pytest

from minictrl.data import ASSETS, load_prompts
from minictrl.pretrain import __main__ as pretrain
from minictrl.pretrain import ratings


def test_no_prompt_is_in_two_splits_and_none_is_a_whole_review():
    train, test = load_prompts("reviews"), load_prompts("reviews", "test")
    assert len(train) > 900 and len(test) > 900 and not set(train) & set(test)
    assert all(4 <= len(prompt.split()) <= 6 for prompt in train + test)


def test_prompts_come_from_their_split_and_rows_left_out_stay_out():
    reviews = [{"index": i, "text": f"w{i} a b c d e f g h i"} for i in range(40) if i % 20 != 7]
    prompts = pretrain.make_prompts(reviews)
    assert [p.split()[0] for p in prompts["train"]] == ["w3", "w13", "w23", "w33"]
    assert [p.split()[0] for p in prompts["test"]] == ["w1", "w11", "w21", "w31"]


def test_both_layouts_of_the_ratings_are_read_alike(tmp_path):
    import gzip

    rows = [
        {"id": str(i + 1), "text": f'"Film" number {i} & more', "ratings": [1, 2, -1, i % 4]}
        for i in range(21)
    ]
    with gzip.open(tmp_path / "reviews.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "movieReviewSnippets_GroundTruth.txt").write_text(
        "".join(
            f"{row['id']}\t0.5\t" + row["text"].replace('"', "''").replace("&", "&amp;") + "\n"
            for row in rows
        )
    )
    (tmp_path / "raw" / "movieReviewSnippets_anonDataRatings.txt").write_text(
        "".join(f"{row['id']}\t0.5\t1\t{row['ratings']}\n" for row in rows)
    )
    loaded = ratings.load_ratings(tmp_path)
    assert loaded == ratings.load_ratings(tmp_path / "raw")
    assert [row["index"] for row in loaded] == [i for i in range(21) if i != 7]


def test_halves_split_the_raters():
    assert ratings.halves([1, 2, 3, 4, 5]) == (1.5, 4.0)


def test_assets_fit_in_28_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 28e6


def test_rebuilding_makes_teachers_then_students_then_prompts(tmp_path, monkeypatch):
    reviews = [{"index": i, "text": f"w{i} a b c d e f g h i"} for i in range(40) if i % 20 != 7]
    done = []
    monkeypatch.setattr(pretrain, "load_ratings", lambda path: reviews)
    monkeypatch.setattr(
        pretrain.teachers, "train_teachers", lambda _, at, **options: done.append((at, options))
    )

    def train_students(_, teachers, at, **options):
        at.mkdir(exist_ok=True)
        done.append((teachers, at, options))

    monkeypatch.setattr(pretrain.students, "train_students", train_students)
    t, s = tmp_path / "t", tmp_path / "s"
    both, step = ["--teachers", str(t), "--students", str(s)], {"only": "policy", "seed": 0}
    all_of = {"only": None, "seed": 0}
    pretrain.main(both)
    assert done == [(t, all_of | {"shards": 24}), (t, s, all_of)]
    assert json.loads((s / "prompts.json").read_text()) == pretrain.make_prompts(reviews)
    pretrain.main([*both, "--only", "policy"])
    pretrain.main([*both[:2], "--only", "policy", "--shards", "3"])
    assert done[2:] == [(t, s, step), (t, step | {"shards": 3})]
    with pytest.raises(ValueError, match="--only text: .*use policy, reward, judge"):
        pretrain.main([*both, "--only", "text"])


def test_flags_of_pairs_go_with_a_task_and_reach_it(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(pretrain, "train_pairs_task", lambda *a, **options: done.append(options))
    monkeypatch.setattr(pretrain, "rebuild", lambda *a, **options: done.append("rebuilt"))
    flags = ["--column", "question", "--skip-bad", "--max-tokens", "9", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="--out is of models from pairs: .*--task"):
        pretrain.main(flags)
    with pytest.raises(ValueError, match="--students .* leave it out with --task helpful"):
        pretrain.main(["--task", "helpful", "--students", str(tmp_path), *flags])
    with pytest.raises(ValueError, match="--skip-bad is of models from pairs"):
        pretrain.main(["--skip-bad"])
    assert not done
    pretrain.main(["--task", "helpful", *flags])
    assert done[0] | {"column": "question", "skip_bad": True, "max_tokens": 9} == done[0]
