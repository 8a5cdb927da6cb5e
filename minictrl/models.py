"""Policies, reward models and judges: a name -> a model, loading and saving. Text, not ids, crosses
between them.

A name is a task's, a hub's, a directory or DIR/FILE.gguf; `hub.py` says where local copies are
found.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minictrl.config import TASKS
from minictrl.data import ASSETS, Prompt
from minictrl.files import digest, sha256_of, sync, writing
from minictrl.lm.device import resolve_device
from minictrl.lm.hub import from_hub
from minictrl.lm.identity import identity
from minictrl.lm.kvcache import arguments
from minictrl.lm.logprobs import response_logits
from minictrl.lm.prompts import check_ids, check_text, known_ends, known_ids, left_pad
from minictrl.messages import command, first_line
from minictrl.scorers.classifier import load_classifier
from minictrl.scorers.function import load_function
from minictrl.scorers.generative import QUESTION, as_tokens, load_generative
from minictrl.scorers.text import chat, is_causal, set_precision

SUMS = "SHA256SUMS"  # of a saved policy's files
SEES = 0.01  # of the largest logit: what a causal model's never move by when the next token changes
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers


def model_of(name: str, role: str) -> str:
    """What a task's name stands for: its model of that role; any other name for itself.

    The models of a task whose entry names the task itself are this package's own.
    """
    name = str(name)
    if not name:
        raise ValueError(f"{role} '': give a hub name, a directory or a task")
    if name not in TASKS:
        return name
    named = TASKS[name][role]
    return str(ASSETS / role) if named == name else named


# --- policies ---


def load_policy(
    name_or_path: str, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a task, a hub name, a directory or DIR/FILE.gguf; in eval mode, on the
    CPU.

    The tokenizer pads on the left. One without a pad token pads with EOS, which is safe: every mask
    here is explicit. One without EOS takes that of the model's config. Raises ValueError if there
    is no such model, weights are missing, or nothing says what ends a response.
    """
    name = model_of(name_or_path, "policy")
    model = from_hub(AutoModelForCausalLM, "policy", name, dtype=dtype).eval()
    check_family(model, name)
    tokenizer = from_hub(AutoTokenizer, "tokenizer of policy", name, padding_side="left")
    ends = known_ends(model, tokenizer)
    eos = tokenizer.convert_ids_to_tokens(ends[0]) if ends else None
    if eos is None:
        raise ValueError(
            f"policy {name}: neither tokenizer nor config has an EOS token, so no response could "
            "end; set eos_token in its tokenizer_config.json"
        )
    check_ids(model, tokenizer, [ends[:1]])
    tokenizer.eos_token = eos
    known = known_ids(model)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@torch.no_grad()
def check_family(model: nn.Module, name: str) -> None:
    """Raises ValueError on a policy whose layers keep more than keys and values, whose tokens see
    those that follow, or whose padding moves its positions.

    A config doesn't say the last two. Two texts with one beginning do, and one text with and
    without padding.
    """
    kind = f"policy {name}: a {type(model).__name__}"
    config = model.config
    if config.get_text_config() is not config or getattr(config, "vision_config", None):
        raise ValueError(f"{kind} reads more than text; give its text model, or another")
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if kinds or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{kind} has layers with a state of their own "
            f"({', '.join(sorted(kinds)) or 'recurrent'}), which the samples of a prompt can't "
            "share; use a model with attention alone"
        )
    last = known_ids(model) - 1
    ids = torch.tensor([[0, 0], [0, last]])
    try:
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits.float()
    except Exception as error:  # the model's own
        raise ValueError(
            f"{kind} can't read two tokens ({first_line(error)}); give another model"
        ) from None
    if differ(*logits[:, 0]):
        raise ValueError(
            f"{kind} with this config is an encoder, which sees the tokens that follow; give a "
            "causal model, or use it as --base of pretraining"
        )
    if not {"past_key_values", "cache"} & arguments(type(model)):
        raise ValueError(f"{kind} keeps no keys and values, which sampling needs; give another")
    prompts = left_pad([[0, last], [0, last, 0, last]], pad=0)
    padded, _ = response_logits(model, *prompts, ids[:, :1], torch.ones_like(ids[:, :1]))
    if differ(logits[1, 1], padded[0]):
        raise ValueError(
            f"{kind} counts its positions from the padding, or not from 0, so that a prompt's "
            "samples would depend on the prompts beside it; give another model"
        )


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether logits (V,) of one text are further apart than rounding explains."""
    return bool((a - b).abs().max() > SEES * a.abs().max())


def save_policy(model: nn.Module, tokenizer, path: Path):
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, in one step, with the
    check sums of its files (`sha256sum -c SHA256SUMS`)."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(path):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files = sorted(temporary.iterdir())
        lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
        (temporary / SUMS).write_text("".join(lines))
        for file in (*files, temporary / SUMS):
            sync(file)
    if (path / "README.md").is_file():  # the model card of an evaluation
        shutil.copy(path / "README.md", temporary)
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def check_saved(path: Path):
    """Raises ValueError if a file of a policy isn't what `save_policy` wrote. A directory without
    check sums is somebody else's, and not checked."""
    if not (path / SUMS).is_file():
        return
    for line in (path / SUMS).read_bytes().decode(errors="replace").splitlines():
        sha256, _, name = line.partition("  ")
        file = path / Path(name).name
        if not file.is_file() or sha256_of(file) != sha256:
            raise ValueError(
                f"{file}: has changed since {path / SUMS} was written; save it again: "
                f"{command('train.py', '--resume', '--out', path.parent)}; or delete {SUMS} if you "
                "did that"
            )


# --- reward models and judges ---


@dataclass(frozen=True)
class Scorer:
    """A reward model or a judge: called with B prompts and texts, it gives scores (B,), float32 on
    the CPU; higher is better. Raises ValueError on a score that isn't finite, and on what is no
    list of prompts with a text for each.
    """

    name: str
    role: str  # reward or judge
    evaluate: Callable[[list, list], Tensor]
    digest: str  # of all that a score depends on but the device
    tokenizer: object | None = None  # None for a function
    prefixes: Callable[[list, Tensor, Tensor], Tensor] | None = None
    add_row: Callable[[Prompt, dict], None] | None = None  # a function's: a new prompt's fields

    def __call__(self, prompts: list[Prompt], texts: list[str]) -> Tensor:
        check_pairs(self.role, prompts, texts)
        return check_finite(self.evaluate(prompts, texts), self.name, self.role, prompts, texts)

    def of_prefixes(
        self, prompts: list[Prompt], tokens: Tensor, mask: Tensor, *, trial: bool = False
    ) -> Tensor:
        """The rewards (B, T) of all prefixes of responses in the tokenizer's tokens
        (`classifier.prefix_scores`), where `prefixes` isn't None. trial: the whole responses are
        also read alone, and ValueError is raised if that gives other rewards.
        """
        scores = self.prefixes(prompts, tokens, mask, trial=trial)
        return check_finite(scores, self.name, self.role, prompts)


def load_scorer(
    name_or_path: str,
    role: str,
    *,
    device: str | torch.device = "auto",
    columns: dict[str, dict] | None = None,
) -> Scorer:
    """score(prompts, texts) -> Tensor (B,) of a reward model or a judge.

    role: "reward" or "judge". name_or_path: a task's; FILE.py:NAME, a function
    (prompts, texts, **columns) -> B numbers, where columns are the other fields of the prompts'
    rows (data.key(prompt) -> fields); or a hub name, a directory or a .gguf file, of a sequence
    classifier with one label (NAME#LABEL: the log-odds of one label of several), or of a causal LM,
    whose score is the log-odds of Yes against No as the next token (`generative.QUESTION`). Prompts
    may be chat messages; the scorer's own chat template is used if it has one. Raises ValueError on
    an unknown role or model.
    """
    if role not in ("reward", "judge"):
        raise ValueError(f"unknown role {role!r}: use reward or judge")
    name, prefixes, add_row = model_of(name_or_path, role), None, None
    if name.endswith(".py"):
        raise ValueError(f"{role} {name}: which function of it? give {name}:NAME")
    if ".py:" in name:
        depends_on, evaluate, add_row = load_function(name, role, columns or {})
        tokenizer = None
    else:
        device = resolve_device(device) if isinstance(device, str) else device
        name, label = parted(name)
        config = from_hub(AutoConfig, f"{role} model", name)
        if (config.architectures or [""])[0].endswith(("ForCausalLM", "LMHeadModel")):
            model, tokenizer, evaluate = load_generative(name, role, label, device)
            read = as_tokens(tokenizer, ["a"])
        else:
            model, tokenizer, evaluate, prefixes = load_classifier(name, role, label, device)
            read = ()
        depends_on = [model, *identity(model, tokenizer), label, QUESTION, *read]
        if tokenizer.chat_template:  # which may compute a date
            depends_on.append(chat(tokenizer, [{"role": "user", "content": "a"}]))
    before = digest(*depends_on)  # as it was saved
    if tokenizer is not None:
        set_precision(model, device)
        check_padding(model, f"{role} model {name}", evaluate)
    return Scorer(name_or_path, role, evaluate, before, tokenizer, prefixes, add_row)


def check_padding(model: nn.Module, name: str, evaluate: Callable) -> None:
    """Raises ValueError on an encoder that reads the padding of its batch: a text's score would
    depend on the texts beside it. A causal model reads no padding, which stands on the right.
    """
    if is_causal(model):
        return
    prompts, texts = [[{"role": "user", "content": "a"}]] * 2, ["a", "a b c d e f"]
    together, (alone,) = evaluate(prompts, texts)[0], evaluate(prompts[:1], texts[:1])
    if (together - alone).abs() > 1e-3 * max(1, alone.abs()):
        raise ValueError(
            f"{name}: gave {together:.4g} for a text beside a longer one and {alone:.4g} for it "
            f"alone, because a {type(model).__name__} reads the padding; give another"
        )


def parted(name: str) -> tuple[str, str]:
    """(NAME, LABEL) of NAME#LABEL, or (NAME, ""); a path that is there may have a # in it."""
    head = name
    while "#" in head and not Path(head).exists():
        head = head.rpartition("#")[0]
    return head, name.removeprefix(head)[1:]


def check_pairs(role: str, prompts: list[Prompt], texts: list[str]) -> None:
    """Raises ValueError unless there are as many prompts as texts, all of them text or messages."""
    for each in (prompts, texts):
        if isinstance(each, str) or not hasattr(each, "__len__"):
            kind = type(each).__name__
            raise ValueError(f"{role}: prompts and texts must be two lists, and one is a {kind}")
    if len(prompts) != len(texts):
        raise ValueError(f"{role}: {len(prompts)} prompts, {len(texts)} texts; give one for each")
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        try:
            parts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
        except (TypeError, KeyError):
            parts = [None]
        if not all(isinstance(part, str) for part in (text, *parts)):
            raise ValueError(
                f"{role}: pair {i} is {str((prompt, text))[:80]}: give a text, or chat messages "
                "with a content, and the response's text"
            )
        for part in (text, *parts):
            check_text(f"{role}: pair {i}", part)


def check_finite(
    scores: Tensor, name: str, role: str, prompts: list[Prompt], texts: list[str] | None = None
) -> Tensor:
    """Raises ValueError on scores (B,) or (B, T) that are not, naming the first one's prompt."""
    bad = ~scores.isfinite()
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        text = f" and the text {texts[first][:60]!r}" if texts else ""
        raise ValueError(
            f"{role} model {name} gave {int(bad.sum())} of {scores.numel()} scores that are not "
            f"finite, the first on the prompt {str(prompts[first])[:60]!r}{text}: give a model "
            "or a function whose scores are finite as float32"
        )
    return scores.float().cpu()
