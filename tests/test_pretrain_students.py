"""Students of tiny random teachers."""

import pytest
import torch
from safetensors.torch import save_file
from test_models import SIZE, save
from test_pretrain_teachers import REVIEWS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minictrl.models import load_policy, load_scorer
from minictrl.pretrain import students, teachers, text
from minictrl.pretrain.ratings import halves
from minictrl.pretrain.vocabulary import prune

TEXTS = [row["text"] for row in REVIEWS]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "</s>", "<s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=alphabet,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_pruning_keeps_the_text_and_the_logits(tmp_path):
    old = train_tokenizer(2 * TEXTS + ["other words that merge", "other words"] * 9, 330)
    config = LlamaConfig(**SIZE | {"vocab_size": len(old)}, tie_word_embeddings=True)
    start = save(tmp_path / "start", LlamaForCausalLM(config))
    before = load_policy(start)[0]
    after, new = prune(load_policy(start)[0], old, TEXTS, 310, tmp_path / "tokenizer")
    assert len(new) < len(old) and after.config.vocab_size == len(new)
    kept = torch.tensor(old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(len(new)))))
    ids = [torch.tensor([tokenizer(TEXTS[0])["input_ids"]]) for tokenizer in (old, new)]
    assert new.decode(ids[1][0], skip_special_tokens=True).strip() == TEXTS[0]
    logits = [model(x).logits for model, x in zip((before, after), ids, strict=True)]
    torch.testing.assert_close(logits[0][..., kept], logits[1])


def test_a_student_learns_what_its_teacher_expects(tmp_path):
    """Its cross-entropy to the teacher's tokens falls towards their entropy; it then is scored."""
    start = save(tmp_path / "start", LlamaForCausalLM(LlamaConfig(**SIZE)), unk_token="<unk>")
    text.write_text(
        REVIEWS,
        start,
        tmp_path / "text",
        shards=2,
        prompts=40,
        num_samples=4,
        max_new_tokens=4,
        top=8,
    )
    model, tokenizer = load_policy(start)
    written = students.written_lessons(tmp_path / "text", tokenizer)
    reviews, again = (
        students.review_lessons(reader, tokenizer, TEXTS[:40], tmp_path / "read", top=8)
        for reader in (model, None)
    )
    assert torch.equal(reviews.ids, again.ids)
    (line, part), ids = (reviews + written).rows[-1], (reviews + written).ids
    with torch.no_grad():
        best = model(torch.tensor([line])).logits[0, -1 - len(part) : -1].topk(8).indices
    assert torch.equal(ids[part.start : part.stop].long(), best)
    students.train_student_policy(
        reviews,
        written,
        model,
        tokenizer,
        tmp_path / "policy",
        n_embd=16,
        n_layer=1,
        n_head=2,
        epochs=8,
        lr=1e-2,
    )
    student, _ = load_policy(str(tmp_path / "policy"))
    entropy, cross = [], []
    for line, part in written.rows[:100]:
        p = written.logprobs[part.start : part.stop].float().softmax(-1)
        with torch.no_grad():
            logq = student(torch.tensor([line])).logits[0, -1 - len(part) : -1].log_softmax(-1)
        entropy.append(-(p * p.log()).sum())
        cross.append(-(p * logq.gather(1, written.ids[part.start : part.stop].long())).sum())
    assert sum(cross) < sum(entropy) + 0.7 * 5.6 * sum(len(part) for _, part in written.rows[:100])
    teachers.train_scorer(
        REVIEWS, tmp_path / "reward", start=str(tmp_path / "policy"), half=0, epochs=4, lr=1e-2
    )
    good, dull = load_scorer(str(tmp_path / "reward"), "reward", device="cpu")(
        ["film 7 of the"] * 2, [f" {word} kind is {word}" for word in ("good", "dull")]
    )
    assert good > dull


def test_labels_are_the_teachers_scores_averaged_with_the_ratings(tmp_path):
    """They are asked for once: what the file beside the teacher says is taken the second time."""
    save_file({"scores": torch.tensor([1.0, 3.0, 7.0])}, tmp_path / "scores.safetensors")
    scores = students.teacher_scores(tmp_path, "judge", ["a", "b", "c"])
    rated = [{"ratings": [0, 2]}, {"ratings": [0, 1]}]
    labels = students.labels_of(scores, rated, 1)
    human = teachers.SHARPNESS * torch.tensor([halves(row["ratings"])[1] for row in rated])
    torch.testing.assert_close(labels[:2].mean(), scores[:2].mean())
    torch.testing.assert_close(labels[1] - labels[0], (2 + human[1] - human[0]) / 2)
    assert labels[2] == 7
    with pytest.raises(ValueError, match="judge"):  # other texts: the teacher would be asked
        students.teacher_scores(tmp_path, "judge", ["a", "b"])
