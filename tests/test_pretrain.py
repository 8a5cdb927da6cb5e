import json
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from minictrl.data import ASSETS, load_prompts
from minictrl.pretrain import __main__ as pretrain
from minictrl.pretrain import ratings
from minictrl.pretrain.policy import RATINGS, perplexity, train_policy


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
    loaded = ratings.load_ratings("reviews", tmp_path)
    assert loaded == ratings.load_ratings("reviews", tmp_path / "raw")
    assert [row["index"] for row in loaded] == [i for i in range(21) if i != 7]


def test_halves_split_the_raters():
    assert ratings.halves([1, 2, 3, 4, 5]) == (1.5, 4.0)


def test_assets_fit_in_12_megabytes():
    sizes = Counter(
        {path.suffix: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    )
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 12e6 and sizes


def test_a_tiny_policy_learns_its_texts_and_loads_again(tmp_path):
    import torch

    texts = [
        (f"{a} film about {b} and {c}", score)
        for a, score in (("good", 2.0), ("bad", -2.0))
        for b in "love war".split()
        for c in "rain snow sun".split()
    ] * 10
    model, tokenizer = train_policy(
        {"reviews": texts, "tweets": texts[:4]},
        ["good film", "bad film"],
        lambda prompts, texts: torch.tensor([float(len(text)) for text in texts]),
        tmp_path,
        vocab_size=300,
        n_embd=16,
        n_layer=1,
        n_head=2,
        epochs=400,
        continuations=6,
    )
    held = [text for text, _ in texts[:12]]
    assert (
        perplexity(model, tokenizer, held)[0] < 100 < len(tokenizer) - len(RATINGS)
    )  # the uniform guess is 300
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert perplexity(loaded, AutoTokenizer.from_pretrained(tmp_path), held)[0] == pytest.approx(
        perplexity(model, tokenizer, held)[0], rel=1e-2
    )  # half precision
    assert tokenizer("good film")["input_ids"][0] == tokenizer.bos_token_id
