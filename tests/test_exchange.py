"""Reference samples from a file, and a run's own written to one."""

import json
import math

import pytest
import torch

import train
from minictrl import exchange
from minictrl.config import Config
from minictrl.reference import Reference
from minictrl.rollout import score
from minictrl.sampling import Samples, texts_of
from minictrl.task import load_task

FLAGS = "--prompts 12 --K 8 --steps 2 --batch 6 --G 2 --max-new-tokens 12".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    assert not train.main([*FLAGS, "--out", f"{folder}/run", "--cache", f"{folder}/cache"])
    return folder / "run"


@pytest.fixture
def rows(run, tmp_path):
    exchange.main([str(run), "--out", str(tmp_path / "own.jsonl")])
    return [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_runs_own_samples_come_back_as_they_were(run, rows, tmp_path):
    """Texts find their tokens again but where another cut of a word gives the same text."""
    file = write(tmp_path / "f.jsonl", rows)
    config = Config(prompts=12, K=8, max_new_tokens=12, reference=file).resolved()
    found = exchange.read_reference(file, config, load_task(config, "train"))
    own = Reference.load(run / "reference.safetensors")
    torch.testing.assert_close(found.r_ref, own.r_ref)
    lengths = own.mask.sum(-1), found.mask.sum(-1)
    assert found.tokens.shape == own.tokens.shape  # bond stacks them with the sampler's
    same = (found.tokens == own.tokens).logical_or(~found.mask).all(-1)
    same &= lengths[0] == lengths[1]
    assert same.float().mean() > 0.9
    both = own.logprobs[same].sum(-1), found.logprobs[same].sum(-1)
    torch.testing.assert_close(*both, atol=1e-3, rtol=0)


def test_samples_that_all_end_early_have_the_samplers_length():
    config = Config(prompts=12, K=2, max_new_tokens=12).resolved()
    task, texts = load_task(config, "train"), [[" a", " b"]] * 12
    tokens, mask, cut = exchange.encode_responses(task, texts)
    found = exchange.with_logprobs(task, torch.zeros(12, 2), tokens, mask, 64)
    assert found.tokens.shape == found.logprobs.shape == found.mask.shape == (12, 2, 12)
    assert cut == 0


def test_of_two_end_tokens_the_likelier_one_is_taken():
    task = load_task(Config(prompts=12, K=2, max_new_tokens=12).resolved(), "train")
    own, word = task.tokenizer.eos_token_id, task.tokenizer(" the")["input_ids"][0]
    tokens, mask, _ = exchange.encode_responses(task, [[" a", " b"]] * 12)
    for end in (own, word):  # what the policy gives to either after " a"
        task.policy.generation_config.eos_token_id = [own, end]
        found = exchange.likeliest(task, torch.zeros(12, 2), tokens, mask, 64)
        each = exchange.with_logprobs(
            task, torch.zeros(12, 2), tokens.masked_fill((tokens == own) & mask, end), mask, 64
        )
        with_own = exchange.with_logprobs(task, torch.zeros(12, 2), tokens, mask, 64)
        best = torch.maximum(each.logprobs.sum(-1), with_own.logprobs.sum(-1))
        torch.testing.assert_close(found.logprobs.sum(-1), best)


def test_each_text_has_the_end_that_is_likelier_behind_it():
    task = load_task(Config(prompts=12, K=2, max_new_tokens=12).resolved(), "train")
    own, word = task.tokenizer.eos_token_id, task.tokenizer(" the")["input_ids"][0]
    tokens, mask, _ = exchange.encode_responses(task, [[" good.", " of"]] * 12)
    task.policy.generation_config.eos_token_id = [own, word]
    found = exchange.likeliest(task, torch.zeros(12, 2), tokens, mask, 64)
    last = found.tokens.gather(2, mask.sum(-1, keepdim=True) - 1)[..., 0]  # (12, 2)
    assert last.tolist() == [[own, word]] * 12
    again = exchange.with_logprobs(task, found.r_ref, found.tokens.long(), mask, 64)
    torch.testing.assert_close(again.logprobs, found.logprobs)


def test_an_end_token_that_the_policy_lacks_is_none():
    """GPT-2's default is 50256, whatever its vocabulary."""
    task = load_task(Config(prompts=12, K=2, max_new_tokens=12).resolved(), "train")
    tokens, mask, _ = exchange.encode_responses(task, [[" a", " b"]] * 12)
    expected = exchange.likeliest(task, torch.zeros(12, 2), tokens, mask, 64)
    own = task.tokenizer.eos_token_id
    task.policy.generation_config.eos_token_id = [own, 50256]
    found = exchange.likeliest(task, torch.zeros(12, 2), tokens, mask, 64)
    assert torch.equal(found.logprobs, expected.logprobs)


def test_samples_that_are_cut_have_the_rewards_of_what_is_left(rows, tmp_path):
    file = write(tmp_path / "f.jsonl", rows)
    config = Config(prompts=12, K=8, max_new_tokens=5, reference=file).resolved()
    task = load_task(config, "train")
    with pytest.warns(UserWarning, match="they are cut there, and all are scored"):
        found = exchange.read_reference(file, config, task)
    texts = texts_of(task.tokenizer, task.ids.tolist(), found.tokens, found.mask)
    assert found.tokens.shape == (12, 8, 5)
    torch.testing.assert_close(found.r_ref, score(task.reward, task.prompts, texts))


def test_a_parquet_file_that_is_none_is_called_damaged(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "f.parquet").write_text("PAR1, but no more")
    with pytest.raises(ValueError, match="f.parquet: can't be read .*it is damaged"):
        train.main([*FLAGS, "--reference", f"{tmp_path}/f.parquet", "--out", f"{tmp_path}/run"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_training_on_a_file_draws_nothing_and_scores_what_has_no_rewards(kind, rows, tmp_path):
    rows = [{name: row[name] for name in ("prompt", "completions")} for row in rows]
    file = str(tmp_path / f"f.{kind}")
    if kind == "jsonl":
        write(tmp_path / "f.jsonl", rows)
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(file)
    flags = ["--reference", file, "--out", f"{tmp_path}/run", "--cache", f"{tmp_path}/none"]
    assert not train.main([*FLAGS, *flags])
    assert not (tmp_path / "none").exists()
    assert Reference.load(tmp_path / "run" / "reference.safetensors").r_ref.shape == (12, 8)


def test_rewards_of_some_rows_alone_are_not_taken(rows, tmp_path):
    rows = [rows[0] | {"rewards": None}, *(row | {"rewards": [9] * 8} for row in rows[1:])]
    file = write(tmp_path / "f.jsonl", rows)
    config = Config(prompts=12, K=8, max_new_tokens=12, reference=file).resolved()
    with pytest.warns(UserWarning, match="1 of 12 rows have no rewards: all are scored again"):
        found = exchange.read_reference(file, config, load_task(config, "train"))
    assert not (found.r_ref == 9).any()


def test_a_folder_is_no_reference(tmp_path):
    with pytest.raises(ValueError, match="--reference .*: is no file of rows; give one in .jsonl"):
        train.main([*FLAGS, "--reference", str(tmp_path), "--out", f"{tmp_path}/run"])


def test_a_task_that_has_grown_is_named_and_texts_beside_chats_are_no_column(tmp_path):
    pytest.importorskip("datasets")
    chat = {"messages": [{"role": "user", "content": "this movie was"}]}
    task = write(tmp_path / "t.jsonl", [*({"prompt": f"{i} is"} for i in range(20)), *[chat] * 2])
    flags = "--K 2 --steps 1 --batch 2 --G 2 --max-new-tokens 3".split()
    train.main([*flags, "--task", task, "--out", f"{tmp_path}/run", "--cache", f"{tmp_path}/cache"])
    with pytest.raises(ValueError, match="texts and chats, .* give .*own.jsonl"):
        exchange.main([f"{tmp_path}/run", "--out", f"{tmp_path}/own.parquet"])
    write(tmp_path / "t.jsonl", [{"prompt": f"{i} was"} for i in range(22)])
    with pytest.raises(ValueError, match="--task .*t.jsonl has changed since the run was started"):
        exchange.main([f"{tmp_path}/run", "--out", f"{tmp_path}/own.jsonl"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[1:], "lacks 1 of 12 prompts"),
        (lambda rows: [rows[0] | {"completions": [" a"], "rewards": [0]}, *rows[1:]], "--K 1"),
        (lambda rows: [r | {"rewards": [9] * 8} for r in rows], "from those of the run's reward"),
        (
            lambda rows: [
                r | {"rewards": [r["rewards"][0], *(x + 1 for x in r["rewards"][1:])]} for r in rows
            ],
            "up to 1 from those of the run's reward",
        ),
        (lambda rows: [*rows, rows[0]], "has two rows of the prompt"),
        (lambda rows: [r | {"rewards": [10**400] * 8} for r in rows], 'give "rewards", 8'),
        (lambda rows: [r | {"rewards": [10**25] * 8} for r in rows], "from those of the run's"),
        (lambda rows: [r | {"rewards": [1e39] * 8} for r in rows], 'give "rewards", 8'),
        (lambda rows: [r | {"rewards": [1, None]} for r in rows], 'line 1: give "rewards", 8'),
        (lambda rows: [r | {"rewards": 3} for r in rows], 'line 1: give "rewards", 8'),
        (lambda rows: [r | {"rewards": [math.nan] * 8} for r in rows], 'give "rewards", 8'),
        (lambda rows: [r | {"completions": "x"} for r in rows], 'line 1: give "completions"'),
        (
            lambda rows: [{"prompt": r["prompt"], "completions": [" zq xv kk"] * 8} for r in rows],
            "they were drawn from another model",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(change, message, rows, tmp_path):
    file = write(tmp_path / "f.jsonl", change(rows))
    flags = ["--reference", file, "--out", f"{tmp_path}/run", "--cache", f"{tmp_path}/none"]
    with pytest.raises(ValueError, match=message):
        train.main([*FLAGS, *flags])
    assert not (tmp_path / "run").exists()


def test_texts_cut_at_fewer_tokens_are_refused(rows, tmp_path):
    """They would get an end that the policy did not give them."""
    file = write(tmp_path / "f.jsonl", rows)
    config = Config(prompts=12, K=8, max_new_tokens=24, reference=file).resolved()
    with pytest.raises(ValueError, match="were cut at fewer tokens than --max-new-tokens 24"):
        exchange.read_reference(file, config, load_task(config, "train"))


def test_a_runs_own_samples_are_taken_where_few_texts_end(tmp_path):
    flags = "--prompts 8 --K 8 --steps 1 --batch 4 --G 2 --max-new-tokens 6".split()
    flags += ["--cache", f"{tmp_path}/cache"]
    for seed in ("0", "1"):
        train.main([*flags, "--seed", seed, "--out", f"{tmp_path}/{seed}"])
        file = f"{tmp_path}/{seed}.jsonl"
        exchange.main([f"{tmp_path}/{seed}", "--out", file])
        given = dict(prompts=8, K=8, seed=int(seed), reference=file)
        config = Config(max_new_tokens=6, **given).resolved()
        exchange.read_reference(file, config, load_task(config, "train"))
        config = Config(max_new_tokens=12, **given).resolved()  # half of it was not drawn
        with pytest.raises(ValueError, match="were cut at fewer tokens than --max-new-tokens 12"):
            exchange.read_reference(file, config, load_task(config, "train"))


def test_a_policy_that_ends_no_text_gave_none_of_these_ends(rows, tmp_path, monkeypatch):
    file = write(tmp_path / "f.jsonl", rows)
    config = Config(prompts=12, K=8, max_new_tokens=12, reference=file).resolved()
    task = load_task(config, "train")
    reference = exchange.read_reference(file, config, task)
    own = Samples(torch.full((12, 6, 12), 5), *torch.ones(2, 12, 6, 12), texts=[])
    own.logprobs.fill_(-3.2)
    monkeypatch.setattr(exchange, "sample", lambda *args, **options: own)
    reference.logprobs[reference.tokens == task.tokenizer.eos_token_id] = -40.0
    with pytest.raises(ValueError, match="they were drawn from another model"):
        exchange.check_policy(file, task, reference)


def test_rewards_of_the_other_sign_are_refused_at_any_scale(rows, tmp_path):
    reward = tmp_path / "small.py"
    reward.write_text("def f(prompts, texts):\n    return [len(y) / 50000 for y in texts]\n")
    for row in rows:
        row["rewards"] = [-len(y) / 50000 for y in row["completions"]]
    file = write(tmp_path / "f.jsonl", rows)
    config = Config(prompts=12, K=8, max_new_tokens=12, reference=file, reward=f"{reward}:f")
    config = config.resolved()
    with pytest.raises(ValueError, match="from those of the run's reward model"):
        exchange.read_reference(file, config, load_task(config, "train"))
