"""Models and tokenizers that are read otherwise than most: the right value, or one line."""

import copy
import json
import string

import pytest
import torch
from test_models import GPT2, LONG, SIZE, TEMPLATE, save, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CanineConfig,
    CanineForSequenceClassification,
    CodeGenConfig,
    CodeGenForCausalLM,
    FNetConfig,
    FNetForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    IBertConfig,
    IBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import train
from minictrl.exchange import continuations
from minictrl.lm.prompts import encode_prompts, response_texts
from minictrl.models import load_policy, load_scorer, save_policy
from minictrl.sampling import sample, sample_plainly
from minictrl.scorers.generative import QUESTION
from minictrl.scorers.text import render
from minictrl.update import freeze, make_learner


def metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's: a space is ▁, and the first one of a text is dropped when it is decoded."""
    words = ["<unk>", "<s>", "</s>", "▁The", "▁movie", "▁was", "▁bad", "ly", "▁"]
    core = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def sentencepiece(template: str | None) -> PreTrainedTokenizerFast:
    """Llama 2's: a space is ▁, and one is put before every text; Yes and No are a token each."""
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o"), ("▁", "Yes"), ("▁", "No")]
    words = ["<unk>", "<s>", "</s>", "▁", *string.printable.replace(" ", ""), *map("".join, merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    fast.chat_template = template
    return fast


ASSISTANT = TEMPLATE.replace("<s>", "|")  # the answer stands at the beginning of a line
INST = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
INST += "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"


@pytest.mark.parametrize("template, space", [(ASSISTANT, ""), (INST, "▁"), (None, "▁")])
def test_a_judges_answers_are_the_tokens_that_stand_there(template, space, tmp_path):
    path = save(tmp_path, LlamaForCausalLM(LlamaConfig(**LONG)))
    fast = sentencepiece(template)
    fast.save_pretrained(path)
    asked = render(fast, [{"role": "user", "content": QUESTION.format(prompt="a", text="b")}])
    ids = [fast(asked)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits[0, -1]
    yes, no = (fast.convert_tokens_to_ids(space + answer) for answer in ("Yes", "No"))
    score = load_scorer(path, "judge", device="cpu")(["a"], ["b"])
    assert score.item() == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-5)


def test_a_response_keeps_the_space_it_begins_with():
    fast = metaspace()
    ids = {word: i for word, i in fast.get_vocab().items()}
    the, was, bad, ly = (ids[word] for word in ("▁The", "▁was", "▁bad", "ly"))
    assert fast.decode([was, bad]) == "was bad"  # what went wrong
    texts = response_texts(fast, [[the]] * 3, [[was, bad], [ly], [was, fast.eos_token_id]])
    assert texts == [" was bad", "ly", " was"]


@pytest.mark.parametrize(
    "prompt, answer", [("a 日", "本"), ("a 👍", "👍"), ("a 👍", "\na"), ("é", " a")]
)
def test_a_response_in_bytes_goes_on_after_a_prompt_that_ends_in_bytes(prompt, answer):
    """Llama 2's tokenizer writes a character that it lacks as bytes, and decodes runs of them."""
    vocab = ["<unk>", "</s>", "▁", "a", *(f"<0x{i:02X}>" for i in range(256))]
    options = dict(merges=[], unk_token="<unk>", byte_fallback=True)
    core = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(vocab)}, **options))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(marks)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    ids = fast(prompt)["input_ids"]
    row = fast(prompt + answer)["input_ids"][len(ids) :]
    assert response_texts(fast, [ids], [row]) == [answer]


def test_characters_shared_by_prompt_and_response_are_decoded_alone():
    fast = tokenizer(eos_token="</s>")
    first, *rest = fast("é")["input_ids"]
    assert response_texts(fast, [[first]], [[*rest, *fast("a")["input_ids"]]]) == ["\ufffda"]


def test_samples_that_are_no_text_are_reported(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZE))  # 300 ids, of which the tokenizer has 259
    model, fast = load_policy(save(tmp_path, model))
    with pytest.warns(UserWarning, match="ids that the tokenizer, with 259 tokens, lacks"):
        sample(model, fast, ["a film"], num_samples=50, max_new_tokens=8, seed=0)


def test_a_classifier_whose_config_says_causal_lm_is_refused(tmp_path):
    config = LlamaConfig(**SIZE, num_labels=1, tie_word_embeddings=True)
    path = save(tmp_path, LlamaForSequenceClassification(config))
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(stored | {"architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ValueError, match="has weights for score.weight, which a CausalLM"):
        load_scorer(path, "judge", device="cpu")


def test_weights_that_are_not_read_are_reported(tmp_path):
    path = save(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZE)))
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"num_hidden_layers": 1}))
    with pytest.warns(UserWarning, match="weights are not read, model.layers.1"):
        load_policy(path)


@pytest.mark.parametrize("special", [{}, {"pad_token": "</s>"}])
def test_a_causal_classifier_without_a_pad_token_is_read_at_eos(tmp_path, special):
    path = save(tmp_path, GPT2ForSequenceClassification(GPT2))
    tokenizer(eos_token="</s>", **special).save_pretrained(path)
    score = load_scorer(path, "reward", device="cpu")
    model = GPT2ForSequenceClassification.from_pretrained(path).eval()
    fast = tokenizer(eos_token="</s>")
    with torch.no_grad():  # one text, so nothing is padded
        exact = [
            model(torch.tensor([fast(f"The film{text}</s>")["input_ids"]])).logits.item()
            for text in (" is good", " is")
        ]
    assert score(["The film"] * 2, [" is good", " is"]).tolist() == pytest.approx(exact, abs=1e-5)


def test_a_classifiers_own_pad_token_is_taken_where_its_tokenizer_names_none(tmp_path):
    """Else EOS would be padding, and the token before it the one that is read."""
    config = copy.deepcopy(GPT2)
    config.pad_token_id = tokenizer().convert_tokens_to_ids("<pad>")
    path = save(tmp_path, GPT2ForSequenceClassification(config))
    tokenizer(eos_token="</s>").save_pretrained(path)
    model = GPT2ForSequenceClassification.from_pretrained(path).eval()
    ids = tokenizer(eos_token="</s>")(["The film good</s>"])["input_ids"]
    with torch.no_grad():
        exact = model(torch.tensor(ids)).logits.item()
    assert load_scorer(path, "reward", device="cpu")(["The film"], [" good"]).tolist() == [
        pytest.approx(exact, abs=1e-5)
    ]


def test_an_eos_that_the_tokenizer_puts_behind_a_text_ends_no_prompt():
    fast = tokenizer(eos_token="</s>")
    before = encode_prompts(fast, ["The film is"])
    fast._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", fast.eos_token_id)]
    )
    assert fast("The film is")["input_ids"] == [*before[0], fast.eos_token_id]
    assert encode_prompts(fast, ["The film is"]) == before


def test_a_bos_that_is_written_out_is_not_put_before_it_again_and_an_eos_that_is_stays():
    fast = bos_and_eos(tokenizer(bos_token="<s>", eos_token="</s>"))
    plain, written, ended = encode_prompts(fast, ["The", "<s>The", "<s>The</s>"])
    assert plain == written == [fast.bos_token_id, *plain[1:]] and plain[1] != fast.bos_token_id
    assert ended == [*plain, fast.eos_token_id]


def bos_and_eos(fast: PreTrainedTokenizerFast):
    """The tokenizer puts both around every text by itself."""
    fast._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", fast.bos_token_id), ("</s>", fast.eos_token_id)],
    )
    return fast


def test_a_chat_template_writes_bos_and_no_other_is_put_before_it():
    """As transformers, vLLM and TRL read chats; Zephyr's template has none."""
    fast = bos_and_eos(tokenizer(TEMPLATE.replace("<s>", "|"), bos_token="<s>", eos_token="</s>"))
    chat = [{"role": "user", "content": "Hi"}]
    expected = fast.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    text = render(fast, chat)
    assert encode_prompts(fast, [text]) == [expected]
    assert continuations(fast, text, [" a"]) == [fast(" a", add_special_tokens=False)["input_ids"]]
    assert encode_prompts(fast, [str(text)]) == [[fast.bos_token_id, *expected]]


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_text_has_one_eos_although_the_tokenizer_puts_its_own_behind(pad, tmp_path):
    config = LlamaConfig(**SIZE, num_labels=1, pad_token_id=258 if pad else None)
    path = save(tmp_path, LlamaForSequenceClassification(config))
    fast = tokenizer(bos_token="<s>", eos_token="</s>", **{"pad_token": pad} if pad else {})
    bos_and_eos(fast).save_pretrained(path)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    whole = fast("The film is good")["input_ids"]
    assert whole[-2:] == [fast("d", add_special_tokens=False)["input_ids"][0], fast.eos_token_id]
    with torch.no_grad():
        expected = model(torch.tensor([whole])).logits.item()
    score = load_scorer(path, "reward", device="cpu")
    assert score(["The film"], [" is good"]).item() == pytest.approx(expected, abs=1e-5)
    ids = torch.tensor([fast(" is good", add_special_tokens=False)["input_ids"] + [0]])
    prefixes = score.of_prefixes(["The film"], ids, torch.ones_like(ids).float())
    assert prefixes[0, -1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("given, pad", [(258, "</s>"), (-1, None)])
def test_a_causal_classifier_is_read_where_its_own_config_says(given, pad, tmp_path):
    """At EOS: the config's padding is another token, or none."""
    config = LlamaConfig(**SIZE, num_labels=1)
    path = save(tmp_path, LlamaForSequenceClassification(config))
    written = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": given}
    (tmp_path / "config.json").write_text(json.dumps(written))
    fast = tokenizer(eos_token="</s>", **{"pad_token": pad} if pad else {})
    fast.save_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = model(torch.tensor([fast("The film good</s>")["input_ids"]])).logits.item()
    score = load_scorer(path, "reward", device="cpu")
    texts = [" good", " good, and longer"]
    assert score(["The film"] * 2, texts)[0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change, label",
    [
        ({"id2label": {"1": "bad", "2": "good"}}, "bad"),
        ({"id2label": {"0": 0, "1": 1}}, "1"),
        ({"return_dict": False}, "LABEL_1"),
    ],
)
def test_what_a_config_names_oddly_is_read(change, label, tmp_path):
    path = save(tmp_path, BertForSequenceClassification(BertConfig(**SIZE, num_labels=2)))
    expected = load_scorer(f"{path}#LABEL_1", "reward", device="cpu")(["a"], ["b"])
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    score = load_scorer(f"{path}#{label}", "reward", device="cpu")
    assert torch.equal(score(["a"], ["b"]), expected)


def test_a_policy_whose_config_asks_for_tuples_is_sampled(tmp_path):
    path = save(tmp_path, GPT2LMHeadModel(GPT2Config(**GPT2.to_dict() | {"return_dict": False})))
    policy, fast = load_policy(path)
    assert sample(policy, fast, ["a"], num_samples=1, max_new_tokens=2, seed=0).mask.any()


def test_padding_is_masked_whatever_the_tokenizer_names_as_inputs(tmp_path):
    path = save(tmp_path, BertForSequenceClassification(BertConfig(**SIZE, num_labels=1)))
    names = dict(eos_token="</s>", pad_token="<pad>", model_input_names=["input_ids"])
    tokenizer(**names).save_pretrained(path)
    score = load_scorer(path, "reward", device="cpu")
    together = score(["a", "a"], ["b", "b" * 200])
    assert together[0].item() == pytest.approx(score(["a"], ["b"]).item(), abs=1e-6)


def test_an_encoder_reads_chats_as_pairs_and_texts_as_one(tmp_path):
    config = BertConfig(**SIZE, num_labels=1)
    path = save(tmp_path, BertForSequenceClassification(config))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = tokenizer(eos_token="</s>", pad_token="<pad>", model_input_names=names)
    fast.save_pretrained(path)
    score = load_scorer(path, "reward", device="cpu")
    model = BertForSequenceClassification.from_pretrained(path).eval()
    q, a = "Good?", "Yes, good"
    with torch.no_grad():
        pair = model(**fast(q, a, return_tensors="pt")).logits.item()
        text = model(**fast(q + a, return_tensors="pt")).logits.item()
    chat = [{"role": "user", "content": q}]
    assert score([chat], [a]).item() == pytest.approx(pair, abs=1e-5)
    assert score([q], [a]).item() == pytest.approx(text, abs=1e-5)
    assert score([chat, q], [a, a]).tolist() == pytest.approx([pair, text], abs=1e-5)
    assert abs(pair - text) > 1e-3


def test_an_encoder_reads_an_empty_answer_as_a_pair_whatever_is_beside_it(tmp_path):
    path = save(tmp_path, BertForSequenceClassification(BertConfig(**SIZE, num_labels=1)))
    fast = tokenizer(eos_token="</s>", pad_token="<pad>")
    fast._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", fast.eos_token_id)]
    )
    fast.save_pretrained(path)
    score, chat = load_scorer(path, "reward", device="cpu"), [{"role": "user", "content": "Good?"}]
    alone = score([chat], [""]).item()
    assert score([chat, "Good?"], ["", " Yes"])[0].item() == pytest.approx(alone, abs=1e-5)


def test_a_chat_reward_on_texts_is_reported(tmp_path):
    path = save(tmp_path, GPT2ForSequenceClassification(GPT2), template=TEMPLATE)
    with pytest.warns(UserWarning, match="reads chats, and these prompts are texts"):
        load_scorer(path, "reward", device="cpu")(["The film"], [" is good"])


def test_roberta_reads_no_more_than_its_positions(tmp_path):
    config = RobertaConfig(
        **SIZE | {"max_position_embeddings": 34}, num_labels=1, pad_token_id=258, type_vocab_size=1
    )
    config.pad_token_id = 1
    path = save(tmp_path, RobertaForSequenceClassification(config))
    with pytest.warns(UserWarning, match="more than 32 tokens lose their beginning"):
        assert load_scorer(path, "judge", device="cpu")(["a" * 100], ["b" * 10]).isfinite().all()


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    path = save(tmp_path / "reward", GPT2ForSequenceClassification(GPT2))
    fast = tokenizer(eos_token="</s>", pad_token="<pad>")
    fast.add_tokens([f"<extra{i}>" for i in range(60)])
    fast.save_pretrained(path)
    with pytest.raises(
        ValueError, match="writes '<extra50>' as token 309, and the model knows 300"
    ):
        load_scorer(path, "reward", device="cpu")(["a"], ["<extra50>"])


def test_an_adapter_without_peft_or_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is an adapter, not a model: .*merge_and_unload"):
        load_policy(str(tmp_path))


def adapted(path, base: str, loader, task_type: str, target: str = "q_proj", labels: int = 1):
    """A LoRA with random weights on a saved base, whose model is returned."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=task_type, target_modules=[target], init_lora_weights=False)
    options = {"num_labels": labels} if task_type == "SEQ_CLS" else {}
    model = peft.get_peft_model(loader.from_pretrained(base, **options), config)
    model.save_pretrained(path)
    return model.eval()


def test_an_adapter_is_merged_into_its_base(tmp_path):
    base = save(tmp_path / "base", LlamaForCausalLM(LlamaConfig(**SIZE)))
    x = torch.arange(20)[None] + 40
    whole = adapted(tmp_path / "policy", base, AutoModelForCausalLM, "CAUSAL_LM")
    merged, fast = load_policy(str(tmp_path / "policy"))
    torch.testing.assert_close(merged(x).logits, whole(x).logits)
    assert not torch.allclose(merged(x).logits, load_policy(base)[0](x).logits, atol=1e-3)
    whole = adapted(tmp_path / "reward", base, AutoModelForSequenceClassification, "SEQ_CLS")
    score = load_scorer(str(tmp_path / "reward"), "reward", device="cpu")
    ids = torch.tensor([fast("ab cd", add_special_tokens=False)["input_ids"] + [fast.eos_token_id]])
    torch.testing.assert_close(score(["ab"], [" cd"]), whole(ids).logits[0].float())


def test_an_adapter_of_a_classifier_has_its_labels(tmp_path):
    base = save(tmp_path / "base", LlamaForCausalLM(LlamaConfig(**SIZE)))
    loader, path = AutoModelForSequenceClassification, tmp_path / "a"
    whole = adapted(path, base, loader, "SEQ_CLS", labels=2)
    fast = tokenizer(eos_token="</s>")
    with torch.no_grad():
        logits = whole(torch.tensor([fast("ab cd</s>")["input_ids"]])).logits[0]
    score = load_scorer(f"{path}#LABEL_1", "reward", device="cpu")
    assert score(["ab"], [" cd"]).item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    with pytest.raises(ValueError, match="has 2 labels .LABEL_0, LABEL_1., not one score"):
        load_scorer(str(path), "reward", device="cpu")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj"])
def test_an_adapter_on_one_of_two_tied_weights_leaves_the_other(target, tmp_path):
    config = LlamaConfig(**SIZE, tie_word_embeddings=True)
    base, x = save(tmp_path / "base", LlamaForCausalLM(config)), torch.arange(20)[None] + 40
    whole = adapted(tmp_path / "a", base, AutoModelForCausalLM, "CAUSAL_LM", target)
    merged, fast = load_policy(str(tmp_path / "a"))
    torch.testing.assert_close(merged(x).logits, whole(x).logits)
    assert merged.config.tie_word_embeddings == (target == "q_proj")
    save_policy(merged, fast, tmp_path / "saved")
    again, _ = load_policy(str(tmp_path / "saved"))
    assert torch.equal(again(x).logits, merged(x).logits)


@pytest.mark.parametrize("kind", ["lfm2", "mamba", "qwen3_next"])
def test_a_policy_with_a_state_of_its_own_is_refused(kind, tmp_path):
    import transformers

    if kind == "lfm2":
        options = dict(SIZE, block_ff_dim=32, layer_types=["conv", "full_attention"])
        model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**options))
    elif kind == "mamba":
        options = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**options))
    else:
        options = dict(
            SIZE, layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=2,
            moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=1,
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8,
        )  # fmt: skip
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**options))
    with pytest.raises(ValueError, match="layers with a state of their own"):
        load_policy(save(tmp_path, model))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_an_encoder_is_no_policy(family, tmp_path):
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZE)
    path = save(tmp_path, getattr(transformers, f"{family}ForMaskedLM")(config))
    with pytest.raises(ValueError, match="is an encoder, .*give a causal model, or use .*--base"):
        load_policy(path)


def test_a_policy_that_reads_long_texts_otherwise_is_refused(tmp_path):
    """Phi-3's longrope: another set of frequencies once a text is longer than 36 tokens."""
    scaling = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    config = Phi3Config(
        **LONG, original_max_position_embeddings=36, rope_scaling=scaling, pad_token_id=258
    )
    path = save(tmp_path / "phi3", Phi3ForCausalLM(config))
    flags = ["--policy", path, "--steps", "1", "--prompts", "4", "--K", "4", "--layers", "1"]
    folders = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match="nats a token from those of a forward over the whole"):
        train.main([*flags, *folders, "--baseline", "loo"])


def test_a_norm_of_the_embeddings_is_not_trained():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    freeze(model, 1)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in names} == {"h", "ln_f"}
    assert not any(".h.0." in name for name in names)


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="--layers 9: the policy has 2 blocks; use at most 2"):
        freeze(GPT2LMHeadModel(GPT2), 9)


def test_a_policy_whose_padding_moves_its_positions_is_refused(tmp_path):
    config = BartConfig(
        vocab_size=300, d_model=32, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    save(tmp_path, BartForCausalLM(config))
    with pytest.raises(ValueError, match="BartForCausalLM counts its positions from the padding"):
        load_policy(str(tmp_path))


def test_a_policy_whose_own_forward_fails_is_refused_in_one_line(tmp_path):
    config = BartConfig(
        vocab_size=300, d_model=32, decoder_layers=2, decoder_attention_heads=2,
        decoder_ffn_dim=32, max_position_embeddings=64, encoder_layers=1,
    )  # fmt: skip
    save(tmp_path, BartForCausalLM(config))
    with pytest.raises(ValueError, match="BartForCausalLM can't read two tokens .list index"):
        load_policy(str(tmp_path))


def test_a_policy_without_a_cache_is_refused(tmp_path):
    config = OpenAIGPTConfig(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    save(tmp_path, OpenAIGPTLMHeadModel(config))
    with pytest.raises(ValueError, match="keeps no keys and values"):
        load_policy(str(tmp_path))


def test_an_encoder_that_reads_its_padding_is_refused(tmp_path):
    config = FNetConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_labels=1,
        max_position_embeddings=64, tpu_short_seq_length=64,
    )  # fmt: skip
    save(tmp_path, FNetForSequenceClassification(config))
    with pytest.raises(ValueError, match="reads the padding"):
        load_scorer(str(tmp_path), "reward", device="cpu")


def test_a_label_of_several_that_may_hold_together_has_its_own_log_odds(tmp_path):
    labels = {0: "toxic", 1: "threat", 2: "insult"}
    config = BertConfig(**SIZE, id2label=labels, problem_type="multi_label_classification")
    model = BertForSequenceClassification(config).eval()
    save(tmp_path, model)
    score = load_scorer(f"{tmp_path}#threat", "reward", device="cpu")
    with torch.no_grad():
        expected = model(**tokenizer()("It was bad", return_tensors="pt")).logits[0, 1]
    assert score(["It was"], [" bad"]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_of_text_and_images_is_refused_by_name(tmp_path):
    text = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, intermediate_size=32)  # fmt: skip
    sight = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = Gemma3Config(text_config=text, vision_config=sight)
    save(tmp_path / "gemma3", Gemma3ForConditionalGeneration(config))
    image = dict(sight, image_size=8, patch_size=4)
    git = GitConfig(vision_config=image, **SIZE)
    save(tmp_path / "git", GitForCausalLM(git))
    for name in ("gemma3", "git"):
        with pytest.raises(ValueError, match="reads more than text; give its text model"):
            load_policy(str(tmp_path / name))


def test_a_projection_below_the_blocks_is_not_trained_and_a_value_head_fits_behind_one():
    config = OPTConfig(
        vocab_size=300, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    policy = OPTForCausalLM(config)
    freeze(policy, 1)
    assert not policy.model.decoder.project_in.weight.requires_grad
    assert make_learner(policy, value_head=True).value_head.in_features == 16


def test_a_policy_whose_layers_differ_in_width_is_sampled(tmp_path):
    """Gemma 4: its config has no one head_dim."""
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    config = gemma4.Gemma4TextConfig(
        **SIZE, head_dim=8, global_head_dim=16, layer_types=["sliding_attention", "full_attention"],
        sliding_window=6, hidden_size_per_layer_input=4, vocab_size_per_layer_input=300,
    )  # fmt: skip
    model, fast = load_policy(save(tmp_path, gemma4.Gemma4ForCausalLM(config)))
    options = dict(num_samples=2, max_new_tokens=12, seed=0)
    both = [draw(model, fast, ["The film"], **options) for draw in (sample, sample_plainly)]
    assert torch.equal(both[0].tokens, both[1].tokens)
    torch.testing.assert_close(both[0].logprobs, both[1].logprobs, atol=1e-4, rtol=0)


def test_a_judge_whose_config_knows_no_padding_is_read(tmp_path):
    config = CodeGenConfig(
        vocab_size=300, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=1024
    )
    path = save(tmp_path, CodeGenForCausalLM(config))
    assert not hasattr(AutoModelForCausalLM.from_pretrained(path).config, "pad_token_id")
    score = load_scorer(path, "judge", device="cpu")
    together = score(["a", "a"], ["b", "b" * 50])
    assert together[0].item() == pytest.approx(score(["a"], ["b"]).item(), abs=1e-5)


def test_an_encoder_whose_embeddings_are_its_own_class_is_read(tmp_path):
    path = save(tmp_path, IBertForSequenceClassification(IBertConfig(**SIZE, num_labels=1)))
    model = IBertForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        exact = model(**tokenizer()("It was bad", return_tensors="pt")).logits.item()
    score = load_scorer(path, "reward", device="cpu")
    assert score(["It was"], [" bad"]).item() == pytest.approx(exact, abs=1e-5)


def test_a_reward_of_characters_is_refused_by_name(tmp_path):
    config = CanineConfig(**SIZE, num_labels=1, num_hash_buckets=50)
    path = save(tmp_path, CanineForSequenceClassification(config))
    with pytest.raises(ValueError, match="CanineForSequenceClassification has no row for each"):
        load_scorer(path, "reward", device="cpu")
