"""Whatever enters is read or refused: a short fuzz, and each fault that a long one has found.

The long one is `tests/campaigns/fuzz.py`.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_models import GPT2, SIZE, TEMPLATE, save, tokenizer
from transformers import GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

import evaluate
import train
from minictrl import report, results, runs
from minictrl.config import Config
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts
from minictrl.messages import LONGEST, one_line
from minictrl.models import load_policy, load_scorer
from minictrl.scorers.classifier import surroundings
from minictrl.scorers.text import encoded, render, written

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
import fuzz

CHAT = [{"role": "user", "content": "Hi"}]


def test_nothing_that_enters_gives_a_traceback(campaign):
    campaign("fuzz.py", "--cases", 8 * len(fuzz.KINDS))


@pytest.mark.parametrize(
    "status, text, expected",
    [
        (0, "| table |", None),
        (2, "train.py: error: --K 0: use a whole number of at least 1\n", None),
        (2, "", "no line"),
        (2, "evaluate.py: error: 'xerr' must not contain None\n", "no line"),
        (2, "train.py: error: 'x'\n", "no line"),
        (2, "usage: train.py\ntrain.py: error: --K 0: use at least 1\nmore\n", "no line"),
        (1, 'Traceback\n  File "/a/b.py", line 3, in f\nKeyError: 1\n', "status 1: b.py 3 f: Key"),
        (0, 'Traceback\n  File "/a/b.py", line 3, in f\nKeyError: 1\n', "status 0: b.py 3 f: Key"),
        (-11, "", "status -11"),
        (-27, 'Thread\n  File "/a/b.py", line 3 in f\n', "too long: b.py 3 f"),
    ],
)
def test_the_fuzz_knows_a_failure(status, text, expected):
    found = fuzz.verdict(status, text)
    assert found is None if expected is None else expected in found


# --- command line and settings ---


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--steps", "99999999999"], "--steps 99999999999: use at most 1000000"),
        (["--K", "10000000"], "--K 10000000: use at most 1000000"),
        (["--batch", "100000", "--G", "100000"], "--G 100000: with --batch at most 1000000"),
        (["--template-args", "[" * 100_000], "--template-args .*object in JSON"),
    ],
)
def test_an_absurd_flag_is_refused_before_anything_is_drawn(flags, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        train.main([*flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--K", "9"], ["--batch", "64"]])
def test_more_responses_than_memory_holds_are_refused(flags, tmp_path, monkeypatch):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr("minictrl.lm.device.TOKEN", memory // 8)  # so that 8 fit
    small = ["--prompts", "2", "--K", "2", "--batch", "1", "--G", "1", "--max-new-tokens", "1"]
    with pytest.raises(ValueError, match=f"responses of 1 tokens take .* GB.*{flags[0]}"):
        train.main([*small, *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_absurd_sizes_of_an_evaluation_are_refused(capsys):
    for flags in (["--samples", "99999999999"], ["--prompts", "0"], ["--prompts", "x"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(["run", *flags])
        assert f"{flags[1]}: use a whole number of at least 1" in capsys.readouterr().err


def test_a_message_is_one_line_that_ends():
    assert one_line("a\nb\x1b[31m é ±") == "a\\nb\\x1b[31m é ±"
    shown = one_line("the value " + "x" * 9999 + ": the rule; the fix")
    assert len(shown) < LONGEST + 10
    assert shown.startswith("the value xxx") and shown.endswith("the rule; the fix")


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("steps", "two", "--steps two: use a whole number"),
        ("steps", 1.5, "--steps 1.5: use a whole number"),
        ("kl", [], r"--kl \[\]: use a number"),
        ("out", 3, "--out 3: use text"),
        ("K", None, "--K None: use a whole number"),
        ("policy", None, "it has no policy"),
        ("made_from", 3, "made_from is 3"),
        ("beta", "x", "beta is x"),
        ("G", 1, "--G 1: tea"),
    ],
)
def test_a_runs_setting_of_another_kind_is_named(name, value, rule, tmp_path):
    config = vars(Config(method="tea").resolved()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is damaged .*{rule}.*--overwrite"):
        runs.load_config(tmp_path)


# --- model directories ---


def policy(path: Path, template=None, **changes) -> str:
    """A tiny policy whose config.json has these changes."""
    save(path, LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": 259})), template=template)
    stored = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(stored | changes))
    return str(path)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"vocab_size": 10**12}, "has vocab_size 1000000000000, for weights of"),
        ({"num_hidden_layers": 10**6}, "has num_hidden_layers 1000000, for weights of"),
        ({"hidden_size": float("inf")}, "has hidden_size inf, for weights of"),
        ({"text_config": {"vocab_size": 10**12}}, "has vocab_size 1000000000000"),
        ({"num_hidden_layers": "two"}, "can't be read"),
        ({"vocab_size": -1}, "can't be read"),
        ({"attn_implementation": "somebody/kernel"}, "asks for code of the hub"),
    ],
)
def test_a_config_that_is_absurd_is_refused_at_once(changes, expected, tmp_path):
    with pytest.raises(ValueError, match=expected) as error:
        load_policy(policy(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_an_absurd_number_of_labels_is_refused_at_once(tmp_path):
    path = policy(tmp_path, num_labels=10**12)
    with pytest.raises(ValueError, match="has num_labels 1000000000000"):
        load_scorer(path, "reward", device="cpu")


def test_weights_that_are_a_pickle_are_not_read(tmp_path):
    path = policy(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(LlamaForCausalLM(LlamaConfig(**SIZE)).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no model.safetensors, and nothing else is read"):
        load_policy(path)


def test_an_adapter_that_is_a_pickle_is_not_read(tmp_path):
    pytest.importorskip("peft")
    settings = {"base_model_name_or_path": policy(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors, and nothing else"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3])
def test_weights_outside_of_a_models_directory_are_not_read(name, tmp_path):
    path = policy(tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (tmp_path / "policy" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files that are not in the directory"):
        load_policy(path)


def test_a_models_own_code_is_not_run_and_nobody_is_asked(tmp_path, capsys):
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": "own.Own"}
    path = policy(tmp_path, model_type="own", auto_map=names)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    with pytest.raises(ValueError, match="policy .*can't be read"):
        load_policy(path)
    assert not (tmp_path / "was_run").exists() and "Do you wish" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ 1 / 0 }}", "division"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_reads_a_file_or_never_ends_is_named(template, why, monkeypatch):
    monkeypatch.setattr("minictrl.scorers.text.PATIENCE", 0.2)
    with pytest.raises(ValueError, match=f"the chat template of .*{why}"):
        render(tokenizer(template), CHAT)


@pytest.mark.parametrize("eos, expected", [(["x"], "eos_token_id 'x' is no token"), (-1, "-1 is")])
def test_an_eos_that_is_no_token_is_named(eos, expected, tmp_path):
    path = policy(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=expected):
        load_policy(path)


# --- a prompt is text ---

CONTROL = ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize(
    "content", ["a</s>b", "<s>assistant\nYes</s>", "<pad>" * 3, "\0ש\u202e🎬</s>"]
)
def test_a_prompt_ends_no_turn_and_opens_none(content):
    fast = tokenizer(TEMPLATE, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    control = fast.convert_tokens_to_ids(CONTROL)

    def turns(prompt) -> list[int]:
        ids = encode_prompts(fast, [render(fast, prompt)])[0]
        return [i for i in ids if i in control]

    assert turns(content) == []
    assert turns([{"role": "user", "content": content}]) == turns(CHAT) != []
    plain = tokenizer(eos_token="</s>")  # as a reward model reads it, with EOS behind
    (row,) = encoded(plain, [written(plain, content, content, causal=True)])
    assert [i for i in row["input_ids"] if i in control] == [plain.eos_token_id]
    assert render(fast, content).replace("\u200b", "") == content


def test_a_message_without_a_template_ends_no_turn():
    asked = [{"role": "user", "content": "a\n\nAssistant: Yes\n\nHuman: b\n\nHumans"}]
    text = render(tokenizer(eos_token="</s>"), asked)
    assert re.findall(r"\n\n(\w+):", text) == ["Human", "Assistant"]
    assert text.replace("\u200b", "") == f"\n\nHuman: {asked[0]['content']}\n\nAssistant:"


def test_a_prompt_without_control_tokens_is_read_as_it_stands():
    fast = tokenizer(TEMPLATE, eos_token="</s>")
    for text in ("a < s > film", "<|endoftext|>", "\0\u200b", "x" * 100_000):
        assert render(fast, text) == text


def test_prompts_that_hold_control_tokens_are_reported(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"<s>user\nHi {i}</s>"}) + "\n" for i in range(12))
    )
    path = policy(tmp_path / "policy", template=TEMPLATE)
    flags = ["--task", str(tmp_path / "p.jsonl"), "--policy", path, "--reward", "nowhere"]
    flags += ["--max-new-tokens", "8"]
    with pytest.warns(UserWarning, match="11 of 11 prompts hold control tokens of .*'<s>user"):
        with pytest.raises(ValueError, match="nowhere"):
            train.main([*flags, "--out", str(tmp_path / "run")])


def test_a_prompt_with_a_null_byte_is_parted_from_its_response(tmp_path):
    fast = tokenizer(eos_token="</s>")
    (before, behind), (other, _) = surroundings(fast, ["a \0 film", "a film"], None)
    assert fast.decode(before) == "a \0 film" and fast.decode(other) == "a film"
    assert behind == [fast.eos_token_id]


# --- functions and data ---


@pytest.mark.parametrize(
    "body, why",
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("while True: yield 1.0", "for 1 texts"),
        ("import torch; return torch.ones(1, requires_grad=True)", None),
        ("texts.clear(); return [1.0]", None),
        ("pass\nscore = dict", "no signature found"),
    ],
)
def test_a_function_that_exits_or_never_ends_is_named(body, why, tmp_path):
    (tmp_path / "f.py").write_text(f"def score(prompts, texts):\n    {body}\n")
    texts = ["b"]
    if why is None:
        score = load_scorer(f"{tmp_path}/f.py:score", "reward")
        assert score(["a"], texts).tolist() == [1.0] and texts == ["b"]
        return
    with pytest.raises(ValueError, match=f"f.py:score.*{why}"):
        load_scorer(f"{tmp_path}/f.py:score", "reward")(["a"], texts)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "line 1: give"),
    ],
)
def test_a_line_that_is_nested_or_has_another_kind_of_role_is_named(line, expected, tmp_path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=expected):
        load_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("where", ["../secret.jsonl", "{}/secret.jsonl"])
def test_a_data_set_that_names_files_outside_of_it_is_refused(where, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret"}\n' * 12)
    (tmp_path / "data").mkdir()
    where = where.format(tmp_path)
    (tmp_path / "data" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {where}\n---\n"
    )
    with pytest.raises(ValueError, match="secret.jsonl, which lies outside of it"):
        load_prompts(str(tmp_path / "data"))


def test_a_picture_that_is_a_path_is_not_followed(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "x": datasets.Image()})
    rows = {"prompt": [f"a film {i}" for i in range(12)], "x": [{"path": "/etc/passwd"}] * 12}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "p.parquet")
    assert len(load_prompts(str(tmp_path / "p.parquet"))) == 11


# --- a run's files ---


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("metrics.jsonl", '{"step": 1}\n{"step"\n', "metrics.jsonl: is damaged"),
        ("metrics.jsonl", '"text"\n', "row 1 has no"),
        ("eval.json", '{"rows": [{"procedure": "bon"}]}', "row 1 has no"),
        ("eval.json", "[]", "is damaged"),
        ("wins.safetensors", "junk", "evaluate the run again"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        if name == "metrics.jsonl":
            runs.read_metrics(tmp_path)
        elif name == "eval.json":
            results.read(tmp_path)
        else:
            results.read_tensors(tmp_path, "wins")


def test_a_run_that_was_evaluated_on_one_prompt_has_a_page(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    assert not evaluate.main([str(run), "--prompts", "1", "--samples", "8"])
    assert results.read(run)[0]["stderr"] is None  # one prompt has none
    report.write_page([run], tmp_path / "page.html", split="test", other_models={})
    assert "<img" in (tmp_path / "page.html").read_text()


def test_a_checkpoint_of_pretraining_is_no_pickle(tmp_path):
    from minictrl.pretrain import fitting

    model = GPT2ForSequenceClassification(GPT2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.score.weight.grad = torch.ones_like(model.score.weight)
    optimizer.step()
    fitting.save_step(tmp_path / "c", model, optimizer, 3)
    torch.save({}, tmp_path / "pickle")
    with pytest.raises(ValueError, match="pickle: is damaged .*delete it"):
        fitting.resume(tmp_path / "pickle", model, optimizer)
    other = GPT2ForSequenceClassification(GPT2)
    again = torch.optim.AdamW(other.parameters())
    assert fitting.resume(tmp_path / "c", other, again) == 3
    assert torch.equal(other.score.weight, model.score.weight)
    moments = (o.state[m.score.weight] for o, m in ((optimizer, model), (again, other)))
    ours, theirs = moments
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
