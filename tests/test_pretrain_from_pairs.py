"""SFT and Bradley-Terry training on preference pairs, with a tiny random model."""

import json
import random
import re
import warnings

import pytest
import torch
from fake_cuda import FakeCuda, install
from safetensors.torch import load_file
from test_models import GPT2, SIZE, save, tokenizer
from tokenizers import normalizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import BertForSequenceClassification as Bert
from transformers import RobertaForSequenceClassification as Roberta

from minictrl.data import load_prompts
from minictrl.lm.prompts import response_texts
from minictrl.models import load_policy, load_scorer
from minictrl.pretrain.fitting import fit, load_start, mean, save_fitted, warmup_of
from minictrl.pretrain.from_pairs import chosen_share, pair_rows, sft_rows, train_pairs_task, wilson
from minictrl.pretrain.pairs import load_pairs
from minictrl.scorers.text import encoded, written
from minictrl.update import schedule

WORDS = {"chosen": ("kind", "good", "nice"), "rejected": ("rude", "poor", "dull")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """120 pairs whose chosen answers use other words than the rejected ones: two words each, of
    3.
    """
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    rows = [
        {"prompt": f"{i}:"}
        | {
            side: "".join(" " + rng.choice(words) for _ in range(2))
            for side, words in WORDS.items()
        }
        for i in range(120)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = save(folder / "start", GPT2LMHeadModel(GPT2))
    result = train_pairs_task(
        str(folder / "pairs.jsonl"),
        folder / "out",
        policy=start,
        epochs=6,
        batch=12,
        micro_batch=12,
        lr=2e-2,
        device="cpu",
    )
    return folder, result


def test_sft_learns_the_chosen_answers(trained):
    folder, result = trained
    assert (
        result["sft_nll"] < 1.5 < 5.5
    )  # log 259 = 5.56 at the start; two of 3 words are 2.2 nats in 11 tokens
    assert load_policy(str(folder / "out/policy"))[0].config.n_embd == 16


def test_reward_model_and_judge_order_held_out_pairs(trained):
    folder, result = trained
    assert result["reward"] > 0.9 and result["judge"] > 0.9  # 12 pairs: by chance 4e-3 and 4e-3
    score = load_scorer(str(folder / "out/reward"), "reward", device="cpu")
    good, bad = score(["7:", "7:"], [" nice kind", " dull rude"])
    assert good > bad


@pytest.mark.parametrize("prompt", ["The movie was", [{"role": "user", "content": "What?"}]])
def test_an_answer_has_the_tokens_that_follow_its_prompt(prompt):
    """Llama 2's tokenizer puts a space before a text of its own: two before " nice"."""
    core = tokenizer().backend_tokenizer
    core.normalizer = normalizers.Prepend(" ")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    answer = " nice" if isinstance(prompt, str) else "nice"
    ((x, y),) = sft_rows(fast, [(prompt, answer, "")])
    assert [*x, *y] == fast(written(fast, prompt, answer, causal=True))["input_ids"]
    assert response_texts(fast, [x], [y]) == [" nice"]


def test_a_token_of_text_that_pads_cuts_texts_as_before_when_it_is_read_again(tmp_path):
    options = dict(pad_token=None, merges=[("!", "!")])
    model, fast = load_start(save(tmp_path / "a", GPT2LMHeadModel(GPT2), **options))
    assert fast.pad_token == "!"
    torch.nn.init.normal_(model.score.weight)
    texts = ["Great!!", " Wow!!!", " so so"]
    rows = encoded(fast, [written(fast, "x", y, causal=True) for y in texts])
    with torch.no_grad():
        scores = model(**fast.pad(rows, return_tensors="pt")).logits[:, 0]
    save_fitted(model, fast, tmp_path / "b")
    score = load_scorer(str(tmp_path / "b"), "reward", device="cpu")
    torch.testing.assert_close(score(["x"] * 3, texts), scores)


def test_on_a_gpu_no_devices_are_mixed(trained, tmp_path, monkeypatch):
    install(monkeypatch)
    with FakeCuda():
        train_pairs_task(
            str(trained[0] / "pairs.jsonl"),
            tmp_path,
            policy=str(trained[0] / "start"),
            epochs=1,
            batch=12,
            limit=60,
            device="cuda",
        )
    assert (tmp_path / "reward" / "config.json").is_file()


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path):
    model = GPT2LMHeadModel(GPT2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [([1, 2], [3])] * 4
    nan = lambda part: model.get_input_embeddings().weight.sum() * float("nan")  # noqa: E731
    with pytest.raises(ValueError, match="the gradient of step 1 of 2 is not finite"):
        fit(model, rows, nan, tmp_path / "a", epochs=1, batch=2, micro_batch=2, lr=1e-3, seed=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_held_out_loss_that_does_not_fit_is_taken_in_smaller_batches():
    sizes = []

    def loss(part):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(float(len(part)))

    assert mean(loss, [([1], [2])] * 7, 8) == 1.0
    assert sizes == [7, 4, 2, 2, 2, 1]


def test_a_short_training_reaches_its_learning_rate():
    assert max(schedule(step, 4, warmup_of(4)) for step in range(4)) == 1
    long = [schedule(step, 200, warmup_of(200)) for step in (0, 19)]
    assert long == [1 / 20, 1 - 19 / 200]


def test_the_share_of_chosen_answers_counts_ties_half():
    pairs = [("x", str(a), str(b)) for a, b in ((2, 1), (1, 1), (1, 2), (3, 1))]
    read = lambda _, texts: torch.tensor([float(text) for text in texts])  # noqa: E731
    assert chosen_share(read, pairs) == 0.625


def test_pairs_of_one_answer_are_left_out_and_counted(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "ab"[i % 3 > 0]} for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="10 of 30 pairs have the same answer twice"):
        pairs = load_pairs(str(file), "train")
    assert {(chosen, rejected) for _, chosen, rejected in pairs} == {("a", "b")}


def test_held_out_pairs_are_of_held_out_prompts(tmp_path):
    """Whatever pairs are left out: train.py's prompts for evaluation are never trained on."""
    rows = [{"prompt": f"p{i:02}", "chosen": " a", "rejected": " b"} for i in range(40)]
    rows[3]["rejected"] = " a"
    rows[12]["rejected"] = None
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, test = (load_pairs(str(path), split, skip_bad=True) for split in ("train", "test"))
    assert [x for x, _, _ in test] == load_prompts(str(path), "test")
    assert len(train) + len(test) == 38 and not {x for x, *_ in train} & {x for x, *_ in test}


def test_a_tasks_test_pairs_are_of_no_training_prompt(monkeypatch):
    splits = {"train": "abc", "test": "cd"}

    def read_hub(source, split):
        pair = {"chosen": " x", "rejected": " y"}
        return [("", {"prompt": prompt} | pair) for prompt in splits[split]]

    monkeypatch.setattr("minictrl.pretrain.pairs.read_hub", read_hub)
    assert load_pairs("tldr", "test") == [("d", " x", " y")]


def test_four_pairs_of_four_prove_little():
    """Wilson's intervals in Newcombe (1998), table 1."""
    assert wilson(4, 4) == pytest.approx((0.510, 1.0), abs=1e-3)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def test_an_encoder_is_the_base_of_a_reward_model(trained, tmp_path, capsys):
    folder, _ = trained
    config = BertConfig(**SIZE, num_labels=1)
    start = save(tmp_path / "encoder", BertModel(config))
    task, out = str(folder / "pairs.jsonl"), tmp_path / "out"
    options = dict(base=start, epochs=20, batch=12, micro_batch=12, lr=1e-2, device="cpu")
    result = train_pairs_task(task, out, **options)
    assert result["reward_low"] > 0.5 and not (out / "policy").exists()
    said = capsys.readouterr().out
    assert "nats a held-out pair" in said and "log 2 = 0.693" in said
    before = (out / "reward" / "model.safetensors").read_bytes()
    assert train_pairs_task(task, out, **options) == result  # there already: nothing is trained
    assert (out / "reward" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds something already, of .* \(lr\); give a new"):
        train_pairs_task(task, out, **options | {"lr": 1e-4})
    pairs = folder / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text(
        text.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")
    )
    try:
        with pytest.raises(ValueError, match="of other settings, pairs or weights .pairs.; give a"):
            train_pairs_task(task, out, **options)
    finally:
        pairs.write_text(text)
    for other in (dict(seed=1), dict(template="{{ messages }}")):  # another under that name
        save(tmp_path / "encoder", BertModel(config), **other)
        with pytest.raises(ValueError, match="pairs or weights .base_weights.; give a new"):
            train_pairs_task(task, out, **options)
    assert (out / "reward" / "model.safetensors").read_bytes() == before
    for few, fault in ((dict(limit=1), "each needs one"), (dict(limit=0), "each needs one")):
        with pytest.raises(ValueError, match=fault):
            train_pairs_task(task, tmp_path / "few", **options | few)
    assert not (tmp_path / "few").exists()


def test_one_step_that_changed_nothing_claims_nothing(trained, tmp_path, capsys):
    task, start = str(trained[0] / "pairs.jsonl"), str(trained[0] / "start")
    train_pairs_task(task, tmp_path / "out", policy=start, limit=4, lr=1e-9, device="cpu")
    said = capsys.readouterr().out
    assert "reward: it is not shown to have learned anything" in said
    for role in ("policy", "reward", "judge"):
        assert f"{role}: it has learned nothing of what is held out" in said


def test_a_seed_makes_the_same_models_whatever_the_process_has_drawn_before(trained, tmp_path):
    """Head and dropout are drawn too."""
    task = str(trained[0] / "pairs.jsonl")
    base = save(tmp_path / "base", Bert(Bert.config_class(**SIZE)))
    found = []
    for draws in (1, 2):
        torch.rand(draws)
        train_pairs_task(task, tmp_path / str(draws), base=base, limit=8, device="cpu")
        found.append(load_file(tmp_path / str(draws) / "reward" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", [Bert, Roberta])
def test_a_base_with_a_head_gets_a_new_one(family, labels, tmp_path):
    model = family(family.config_class(**SIZE, num_labels=labels))
    start, _ = load_start(save(tmp_path, model))
    *body, (name, head) = ((n, p) for n, p in start.named_parameters() if p.dim() > 1)
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in body)
    assert len(head) == 1 and (head != weights[name][:1]).all()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match="has another size than its config.json says"):
        load_start(str(tmp_path))


def test_what_is_wrong_with_base_or_tokens_is_said_before_anything_is_trained(trained, tmp_path):
    pairs, start = str(trained[0] / "pairs.jsonl"), str(trained[0] / "start")
    few = GPT2Config(**GPT2.to_dict() | {"vocab_size": 100})
    small = save(tmp_path / "small", GPT2LMHeadModel(few), pad_token="!")
    for models, fault in (
        (dict(policy=start, base=f"{start}/no"), "base of the reward model .*/no: there is no"),
        (dict(policy=start, base=small), "small: its tokenizer writes '</s>' as token 257"),
        (dict(policy=small), "small: its tokenizer writes '</s>' as token 257.*model knows 100"),
    ):
        with pytest.raises(ValueError, match=fault):
            train_pairs_task(pairs, tmp_path / "out", **models, device="cpu")
        assert not (tmp_path / "out").exists()


def test_long_pairs_are_left_out_and_not_counted_as_trained_on(trained, tmp_path, capsys):
    """Prompt and answer together have to fit: 150 + 150 tokens don't."""
    start, long = str(trained[0] / "start"), "o" * 150
    rows = [{"prompt": f"{i}:", "chosen": " a", "rejected": " b"} for i in range(40)]
    rows[1]["prompt"] = rows[1]["chosen"] = long
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_pairs_task(str(file), tmp_path / "out", policy=start, max_tokens=200, device="cpu")
    said = capsys.readouterr().out
    assert "1 of 36 pairs are longer than 200 tokens and left out" in said
    assert sum(map(int, re.findall(r"trained on (\d+)", said))) == 35
    rows = [row | {"prompt": f"{i} {long}", "chosen": long} for i, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="the model's context of 256 tokens: all 36 pairs"):
        train_pairs_task(str(file), tmp_path / "no", policy=start, device="cpu")
    assert not (tmp_path / "no").exists()


def test_pairs_beyond_the_classifiers_context_are_left_out_and_not_cut(tmp_path, capsys):
    start = save(tmp_path / "encoder", BertModel(BertConfig(**SIZE, num_labels=1)))  # 256 tokens
    pairs = [(f"{i}:", " good", " bad") for i in range(4)] + [("5:", " good", "b" * 300)]
    (rows,) = pair_rows(*load_start(start), [pairs], 1024)
    assert len(rows) == 4
    assert "1 of 5 pairs are longer than 256 tokens" in capsys.readouterr().out


def test_pairs_that_are_all_too_long_are_refused(trained):
    folder, _ = trained
    with pytest.raises(ValueError, match="--max-tokens 2: all 108 pairs are longer"):
        train_pairs_task(
            str(folder / "pairs.jsonl"),
            folder / "no",
            policy=str(folder / "start"),
            max_tokens=2,
            device="cpu",
        )
    assert not (folder / "no").exists()
