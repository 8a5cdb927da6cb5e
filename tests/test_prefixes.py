"""--baseline prefix: the reward of every prefix of a response, in one pass."""

from types import SimpleNamespace

import pytest
import torch
from test_models import GPT2, SIZE, TEMPLATE, save, tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen3NextConfig,
    Qwen3NextForSequenceClassification,
)

import train
from minictrl.baselines import check_prefix_rewards
from minictrl.lm.prompts import left_pad
from minictrl.models import load_scorer
from minictrl.scorers import classifier
from minictrl.scorers.text import BATCH_TOKENS

PROMPTS = ["The film", "A story of two men", "It", [{"role": "user", "content": "The film?"}]]
TEXTS = [" is good, and long", "", " a", " was never so"]
LLAMA = LlamaConfig(**SIZE, num_labels=1)


def ragged(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of responses that end with EOS: a token a byte, so any prefix is cut alike."""
    tok = tokenizer(eos_token="</s>")
    rows = [torch.tensor([*tok(text)["input_ids"], tok.eos_token_id]) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=258)
    return tokens, torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], True)


@pytest.mark.parametrize("special", [{}, {"template": TEMPLATE}, {"pad_token": "</s>"}],
                         ids=["EOS", "template", "EOS pads"])  # fmt: skip
@pytest.mark.parametrize("model", [GPT2ForSequenceClassification(GPT2),
                                   LlamaForSequenceClassification(LLAMA)],
                         ids=["gpt2", "llama"])  # fmt: skip
def test_all_prefixes_in_one_pass_score_as_one_by_one(model, special, tmp_path, monkeypatch):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 200)  # more than one batch
    score = load_scorer(save(tmp_path / "a", model, **special), "reward", device="cpu")
    tokens, mask = ragged(TEXTS)
    got = score.of_prefixes(PROMPTS, tokens, mask)
    for i, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        prefixes = [text[:t] if t <= len(text) else "" for t in range(tokens.shape[1])]
        one_by_one = score([prompt] * len(prefixes), prefixes)
        assert one_by_one.unique().numel() >= len(text)
        torch.testing.assert_close(got[i], one_by_one, atol=1e-4, rtol=0)


def test_an_id_beyond_the_reward_models_tokens_reads_as_nothing(tmp_path):
    """A policy's embeddings may have more rows than its tokenizer has tokens."""
    score = load_scorer(save(tmp_path / "a", GPT2ForSequenceClassification(GPT2)), "reward",
                        device="cpu")  # fmt: skip
    tokens, mask = ragged([" is"])
    beyond, padded = tokens.clone(), tokens.clone()
    beyond[0, 1], padded[0, 1] = 10_000, score.tokenizer.pad_token_id
    both = [score.of_prefixes(["It"], each, mask) for each in (beyond, padded)]
    assert torch.equal(*both) and not torch.equal(both[0], score.of_prefixes(["It"], tokens, mask))


def test_a_prompt_too_long_for_the_context_loses_its_beginning(tmp_path):
    score = load_scorer(save(tmp_path / "a", GPT2ForSequenceClassification(GPT2)), "reward",
                        device="cpu")  # fmt: skip
    tokens, mask = ragged([" is good"])
    long, short = (
        score.of_prefixes(["x" * n], tokens, mask) for n in (400, 256 - len(" is good") - 1)
    )
    assert torch.equal(long, short)
    tokens, mask = ragged(["x" * 300])
    with pytest.raises(ValueError, match="context of 256 tokens is shorter than a response of 301"):
        score.of_prefixes(["x"], tokens, mask)


def test_a_window_shorter_than_the_text_is_refused_at_the_start(tmp_path):
    config = MistralConfig(**SIZE, num_labels=1, sliding_window=16)
    reward = save(tmp_path / "reward", MistralForSequenceClassification(config))
    tokens, mask = ragged([" is good"])
    score = load_scorer(reward, "reward", device="cpu")
    [short] = score.of_prefixes(["The"], tokens, mask)
    torch.testing.assert_close(short[-1:], score(["The"], [" is good"]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="see 16 tokens back, .* has up to 18; use --baseline loo"):
        score.of_prefixes(["The film "], tokens, mask)
    policy = save(tmp_path / "policy", GPT2LMHeadModel(GPT2))
    flags = ["--policy", policy, "--reward", reward, "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="see 16 tokens back"):
        train.main([*flags, "--prompts", "4", "--baseline", "prefix"])
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_ends_a_prefix_sees_the_prompt_its_prefix_and_itself():
    head_mask = torch.tensor([[0, 1], [1, 1]])
    sees, positions, at = classifier.prefix_layout(head_mask, 3, 1)
    # columns: two of the prompt, y_1, y_2, three EOS
    assert at.tolist() == [4, 5, 6]
    assert sees[1, at].int().tolist() == [
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 1, 0, 0, 1],
    ]
    assert not sees[0, 1:, 0].any()
    assert positions.tolist() == [[0, 0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 2, 3, 4]]


BERT = BertConfig(**{**SIZE, "num_labels": 1})


@pytest.mark.parametrize("model, why", [
    (GPT2ForSequenceClassification(GPT2), "cuts text into other tokens than the policy"),
    (BertForSequenceClassification(BERT), "is no causal classifier"),
    (GPT2LMHeadModel(GPT2), "is no causal classifier"),
], ids=["another tokenizer", "bert", "generative"])  # fmt: skip
def test_a_reward_that_cant_read_prefixes_is_refused_at_the_start(model, why, tmp_path):
    reward = save(tmp_path / "reward", model)
    flags = ["--reward", reward, "--out", str(tmp_path / "run"), "--prompts", "4"]
    with pytest.raises(ValueError, match=f"--baseline prefix: .*{why}.*; use --baseline loo"):
        train.main([*flags, "--baseline", "prefix"])
    assert not (tmp_path / "run" / "config.json").exists()


LOCAL = GPTNeoConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=256,
    attention_types=[[["global", "local"], 1]], window_size=16, num_labels=1,
)  # fmt: skip
ALIBI = FalconConfig(**SIZE, alibi=True, multi_query=False, num_labels=1)
RECURRENT = Qwen3NextConfig(
    **SIZE, layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=2,
    moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=1,
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, num_labels=1,
)  # fmt: skip


@pytest.mark.parametrize("model", [GPTNeoForSequenceClassification(LOCAL),
                                   FalconForSequenceClassification(ALIBI),
                                   Qwen3NextForSequenceClassification(RECURRENT)],
                         ids=["local", "alibi", "recurrent"])  # fmt: skip
def test_a_reward_that_doesnt_heed_a_mask_is_refused_at_the_start(model, tmp_path):
    policy = save(tmp_path / "policy", GPT2LMHeadModel(GPT2))
    flags = ["--policy", policy, "--reward", save(tmp_path / "reward", model), "--prompts", "4"]
    why = "--baseline prefix: the reward model .* can't read every prefix .*; use --baseline loo"
    with pytest.raises(ValueError, match=why):
        train.main([*flags, "--out", str(tmp_path / "run"), "--baseline", "prefix"])
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("special", [{}, {"template": TEMPLATE}, {"pad_token": "</s>"}],
                         ids=["EOS", "template", "EOS pads"])  # fmt: skip
def test_a_reward_that_can_read_prefixes_passes_the_trial(special, tmp_path):
    path = save(tmp_path, LlamaForSequenceClassification(LLAMA), **special)
    reward = load_scorer(path, "reward", device="cpu")
    ids, mask = left_pad([reward.tokenizer(str(text))["input_ids"] for text in PROMPTS], 258)
    task = SimpleNamespace(reward=reward, tokenizer=reward.tokenizer, max_new_tokens=20,
                           prompts=PROMPTS, ids=ids, mask=mask)  # fmt: skip
    check_prefix_rewards(task)
