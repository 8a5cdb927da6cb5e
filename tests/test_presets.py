"""The presets, end to end through the command line, on tiny random models and data in the hub's
layout.
"""

import gzip
import json

import pytest
import torch
from fake_cuda import FakeCuda, install
from test_models import GPT2, LONG, TEMPLATE, save
from transformers import (
    AutoModelForCausalLM,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import evaluate
import train
from minictrl.config import METHODS, TASKS

SHORT = [
    "--prompts",
    "12",
    "--K",
    "8",
    "--steps",
    "2",
    "--batch",
    "6",
    "--G",
    "5",
    "--max-new-tokens",
    "6",
    "--lr",
    "1e-3",
]


@pytest.fixture(scope="module")
def helpful(tmp_path_factory):
    """A hub: the policy has a chat template, the reward model none, the judge is a causal language
    model.
    """
    pytest.importorskip("datasets")
    hub, preset = tmp_path_factory.mktemp("hub"), TASKS["helpful"]
    save(hub / preset["policy"], Qwen2ForCausalLM(Qwen2Config(**LONG)), template=TEMPLATE)
    save(hub / preset["reward"], GPT2ForSequenceClassification(GPT2), seed=1)
    save(
        hub / preset["judge"],
        GPT2LMHeadModel(type(GPT2)(**GPT2.to_dict() | {"n_positions": 1024})),
        seed=2,
    )
    folder = hub / preset["data"]["name"] / preset["data"]["folder"]
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("test", 20)):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            for i in range(first, first + 20):
                ask = f"\n\nHuman: Question {i}?\n\nAssistant:"
                file.write(json.dumps({"chosen": f"{ask} Yes.", "rejected": f"{ask} No."}) + "\n")
    return hub


@pytest.fixture
def at(helpful, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("MINICTRL_HUB", str(helpful))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", helpful / "cache")
    return [
        "--task",
        "helpful",
        *SHORT,
        "--cache",
        str(helpful / "samples"),
        "--out",
        str(tmp_path / "run"),
    ]


def test_helpful_is_trained_and_evaluated_from_local_copies(at, tmp_path):
    assert not train.main([*at, "--transform", "exp10"])
    assert not evaluate.main([str(tmp_path / "run"), "--prompts", "6", "--samples", "8"])
    rows = json.loads((tmp_path / "run/eval.json").read_text())["rows"]
    assert {row["scorer"] for row in rows} == {"reward", "judge"} and all(
        0 <= row["win_rate"] <= 1 for row in rows
    )
    first = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == [{"role": "user", "content": "Question 20?"}]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (at_policy(), tmp_path / "run/policy")
    )
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))


def test_on_a_gpu_policy_reward_model_and_judge_mix_no_devices(at, tmp_path, monkeypatch):
    install(monkeypatch)
    with FakeCuda():
        train.main([*at, "--device", "cuda", "--transform", "exp10"])
        evaluate.main([str(tmp_path / "run"), "--prompts", "6", "--samples", "4"])


def at_policy():
    from minictrl.lm.hub import hub_name

    return hub_name(TASKS["helpful"]["policy"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ppo"])
def test_every_method_trains_a_chat_model(at, tmp_path, method):
    assert not train.main([*at, "--method", method])
    losses = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in losses] == [1, 2] and all(
        0 < row["grad_norm"] < float("inf") for row in losses
    )
