"""What a cached or finished result depends on is known, and a change of it is seen."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import GPT2, save
from transformers import GPT2ForSequenceClassification

import evaluate
import train
from minictrl import runs
from minictrl.config import Config
from minictrl.data import ASSETS
from minictrl.models import load_scorer
from minictrl.reference import Reference
from minictrl.rollout import reference_key
from minictrl.task import load_task


def key(policy, **settings) -> str:
    config = Config(policy=str(policy), prompts=2, **settings).resolved()
    return reference_key(load_task(config, "train"), 0)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def policy(tmp_path):
    return shutil.copytree(ASSETS / "policy", tmp_path / "policy")


def test_another_end_of_a_response_is_another_key(policy):
    before = key(policy)
    assert key(shutil.copytree(policy, policy.parent / "moved")) == before
    edit(policy / "generation_config.json", eos_token_id=[2, 5])
    assert key(policy) != before


def test_another_config_or_tokenizer_of_the_policy_is_another_key(policy):
    before = key(policy)
    edit(policy / "config.json", activation_function="relu")
    changed = key(policy)
    bpe = json.loads((policy / "tokenizer.json").read_text())["model"]
    edit(policy / "tokenizer.json", model=bpe | {"merges": bpe["merges"][:-1]})
    assert len({before, changed, key(policy)}) == 3


def test_a_setting_of_the_update_is_no_part_of_the_key(policy):
    assert key(policy, transform="exp10", lr=0.1, kl=2.0) == key(policy, transform="none")


def test_another_tokenizer_or_length_limit_of_a_reward_model_is_another_digest(tmp_path):
    save(tmp_path / "reward", GPT2ForSequenceClassification(GPT2))
    digests = {load_scorer(str(tmp_path / "reward"), "reward", device="cpu").digest}
    edit(tmp_path / "reward" / "tokenizer_config.json", model_max_length=17)
    digests.add(load_scorer(str(tmp_path / "reward"), "reward", device="cpu").digest)
    tokenizer = json.loads((tmp_path / "reward" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "reward" / "tokenizer.json").write_text(json.dumps(tokenizer))
    digests.add(load_scorer(str(tmp_path / "reward"), "reward", device="cpu").digest)
    assert len(digests) == 3


def test_a_flipped_bit_in_the_cache_is_seen(tmp_path):
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    reference = Reference(torch.rand(1, 2), mask.int(), mask.float(), mask)
    reference.save(tmp_path / "x.safetensors", "key")
    data = bytearray((tmp_path / "x.safetensors").read_bytes())
    data[-1] ^= 64
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.warns(UserWarning, match="x.safetensors is damaged.*check sum"):
        assert Reference.load(tmp_path / "x.safetensors", "key") is None


FLAGS = ["--prompts", "16", "--K", "8", "--steps", "2", "--batch", "8", "--G", "2"]


@pytest.mark.parametrize("name", ["policy", "reward", "judge", "task"])
def test_a_run_whose_models_or_prompts_have_changed_is_refused_in_one_line(name, tmp_path):
    paths = {x: shutil.copytree(ASSETS / x, tmp_path / x) for x in ("policy", "reward", "judge")}
    prompts = [{"prompt": f"This film number {i} is"} for i in range(20)]
    paths["task"] = tmp_path / "prompts.jsonl"
    paths["task"].write_text("\n".join(map(json.dumps, prompts)))
    given = [x for name, path in paths.items() for x in (f"--{name}", str(path))]
    out = tmp_path / "run"
    assert not train.main([*given, *FLAGS, "--max-new-tokens", "4", "--out", str(out),
                           "--cache", str(tmp_path / "cache")])  # fmt: skip
    if name == "task":
        paths["task"].write_text("\n".join(map(json.dumps, prompts[1:])))
    else:
        (weights,) = paths[name].glob("*.safetensors")
        tensors = {x: tensor.clone() for x, tensor in load_file(weights).items()}
        next(iter(tensors.values())).view(-1)[0] += 1
        with safe_open(weights, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, weights, metadata)
    for command in (lambda: evaluate.main([str(out)]),
                    lambda: train.main(["--resume", "--out", str(out)])):  # fmt: skip
        with pytest.raises(ValueError, match=f"its --{name} .* has changed since"):
            command()


def test_what_a_run_reads_is_never_deleted(short_run):
    before = sorted(short_run.rglob("*"))
    with pytest.raises(ValueError, match="--policy .* lies in .*, which --overwrite deletes"):
        train.main(["--policy", str(short_run / "policy"), "--out", str(short_run), "--overwrite"])
    assert sorted(short_run.rglob("*")) == before


def test_a_hash_in_its_name_does_not_hide_what_a_run_reads(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "C#run")
    with pytest.raises(ValueError, match="--policy .* lies in .*, which --overwrite deletes"):
        train.main(["--policy", str(run / "policy"), "--out", str(run), "--overwrite"])


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_directory_that_this_program_did_not_write_is_never_deleted(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="no run"):
        train.main(["--out", str(tmp_path), "--overwrite"])
    assert (tmp_path / "config.json").read_text() == content
    (tmp_path / runs.MARKER).touch()
    assert runs.holds_run(tmp_path)  # ours, be it damaged


def test_one_run_holds_one_directory(tmp_path):
    with runs.hold(tmp_path / "run"):
        with pytest.raises(ValueError, match="another run is at work there"):
            train.main(["--out", str(tmp_path / "run")])
    runs.hold(tmp_path / "run").close()


def test_a_run_names_its_commit_and_whether_files_have_changed_since(tmp_path):
    (tmp_path / "code").write_text("1")
    assert runs.commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "code"], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    commit = runs.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "code").write_text("2")
    assert runs.commit_of(tmp_path) == f"{commit}+changes"
