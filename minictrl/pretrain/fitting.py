"""How every model here is trained: where a reward model starts, one loop for any loss, and the
rows that it takes.
"""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from minictrl.exchange import continuations
from minictrl.files import load_tensors, reading, save_tensors
from minictrl.lm.device import halving
from minictrl.lm.hub import from_hub
from minictrl.lm.logprobs import sequence_logprobs
from minictrl.lm.prompts import encode_prompts, left_pad
from minictrl.models import save_policy
from minictrl.scorers.text import scorer_tokenizer
from minictrl.update import Learner, schedule

SAVE_SECONDS = 300  # between checkpoints
WARMUP = 20  # steps
RNG = "rng"  # dropout's generator in a checkpoint, beside what a `Learner` has


def load_start(start: str, frozen: int = 0) -> tuple[nn.Module, object]:
    """(classifier with one label, tokenizer) of a directory, with a new head: an old one is
    replaced, and every call gives the same head.

    The score head of a causal model begins at zero and is read at EOS, which then can't be what
    pads: the head is read at the last token that isn't padding. frozen: so many of its lowest
    layers, and the embeddings, are not trained.
    """
    torch.manual_seed(0)
    model = from_hub(
        AutoModelForSequenceClassification,
        "base of the reward model",
        start,
        new_head=True,
        num_labels=1,
        dtype=torch.float32,
    )
    if "ForSequenceClassification" in str(model.config.architectures):
        for head in (m for m in model.modules() if getattr(m, "out_features", 0) == 1):
            head.reset_parameters()
    tokenizer = scorer_tokenizer(model, start, "reward")
    if hasattr(model, "score"):
        nn.init.zeros_(model.score.weight)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            eos = tokenizer.eos_token_id
            others = (tokenizer.unk_token_id, 0, 1)
            tokenizer.pad_token_id = next(i for i in others if i not in (None, eos))
            model.config.pad_token_id = tokenizer.pad_token_id
    if frozen:
        for module in (model.get_input_embeddings(), *model.base_model.layers[:frozen]):
            module.requires_grad_(False)
    return model, tokenizer


def answer_rows(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, answer) pairs of texts; an answer ends with EOS."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    answers = [continuations(tokenizer, prompt, [answer])[0] for prompt, answer in pairs]
    return [(x, [*y, tokenizer.eos_token_id]) for x, y in zip(prompts, answers)]


def answer_logprobs(model: nn.Module, tokenizer, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(y | x) in nats of the rows of `answer_rows`, (B,)."""
    mask, tokens = (
        nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
        for part in ([torch.ones(len(y)) for _, y in rows], [torch.tensor(y) for _, y in rows])
    )
    prompts = left_pad([x for x, _ in rows], tokenizer.pad_token_id, model.device)
    return sequence_logprobs(model, *prompts, tokens, mask)[0].sum(1)


def warmup_of(steps: int) -> int:
    """In how many steps the learning rate rises: WARMUP, and in short trainings a tenth."""
    return min(WARMUP, steps // 10 + 1)


def fit(
    model: nn.Module,
    rows: list,
    loss: Callable[[list], Tensor],
    out: Path,
    *,
    epochs: int,
    batch: int,
    micro_batch: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
):
    """AdamW on loss(rows), a sum over them, in random batches, whose micro-batches hold rows of
    similar length; bfloat16 autocast on a GPU.

    out: where `save_fitted` will put the model. Beside it a checkpoint is written every few
    minutes, from which an interrupted call goes on. Out of GPU memory, a batch is tried again in
    smaller micro-batches. Raises ValueError if one row alone doesn't fit.
    """
    if model.device.type == "cuda":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    rng = random.Random(seed)
    batches = [chunk for _ in range(epochs) for chunk in shuffled(rows, batch, rng)]
    model.train()
    torch.manual_seed(seed)  # of dropout
    checkpoint = checkpoint_of(out)
    warmup = warmup_of(len(batches))
    first, saved = resume(checkpoint, model, optimizer), time.monotonic()
    for step, chunk in enumerate(bar := tqdm(batches, out.name, disable=None)):
        if step < first:
            continue
        if time.monotonic() - saved > SAVE_SECONDS:
            save_step(checkpoint, model, optimizer, step)
            saved = time.monotonic()
        optimizer.param_groups[0]["lr"] = lr * schedule(step, len(batches), warmup)
        value, micro_batch = halving(micro_batch, partial(gradients, model, loss, chunk))
        if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            raise ValueError(
                f"{out.name}: the gradient of step {step + 1} of {len(batches)} is not finite, "
                f"and has changed no weight; use a lower --lr than {lr:g} and a new --out, or "
                "--device cpu"
            )
        optimizer.step()
        bar.set_postfix_str(f"loss {value:.3f}")
    model.eval()


def gradients(model: nn.Module, loss: Callable, batch: list, micro_batch: int) -> float:
    """Leaves the gradients of a batch's mean loss in the model, from micro-batches; returns it."""
    model.zero_grad()
    total = 0.0
    for i in range(0, len(batch), micro_batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            value = loss(batch[i : i + micro_batch]) / len(batch)
        value.backward()
        total += float(value.detach())
    return total


def checkpoint_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


def save_fitted(model: nn.Module, tokenizer, out: Path):
    """The model as a directory; the checkpoint of its `fit` has had its day.

    Where a token of text pads, the config alone names it: read again as a special token it would
    cut texts otherwise.
    """
    if tokenizer.pad_token_id not in tokenizer.added_tokens_decoder:
        tokenizer.pad_token = None
    save_policy(model, tokenizer, out)
    checkpoint_of(out).unlink(missing_ok=True)


def resume(checkpoint: Path, model: nn.Module, optimizer) -> int:
    """Weights, optimizer and dropout's generator as `save_step` left them; the step to go on with,
    0 without a file.
    """
    if not checkpoint.is_file():
        return 0
    with reading(checkpoint, "delete it, and the same command starts this model again"):
        state, metadata = load_tensors(checkpoint)
        torch.set_rng_state(state.pop(RNG))
        Learner(model, None, optimizer).restore(state)
    return int(metadata["step"])


def save_step(checkpoint: Path, model: nn.Module, optimizer, step: int):
    state = Learner(model, None, optimizer).state() | {RNG: torch.get_rng_state()}
    save_tensors(checkpoint, state, {"step": str(step)})


def shuffled(rows: list, batch: int, rng: random.Random) -> list[list]:
    """One pass in batches; inside a batch the long rows come first, so that a micro-batch pads
    little.
    """
    order = rng.sample(rows, len(rows))
    return [
        sorted(order[i : i + batch], key=size, reverse=True) for i in range(0, len(order), batch)
    ]


def size(row: tuple) -> int:
    """Tokens of the longer one of a row's two sides, or of its prompt and answer together."""
    if isinstance(row[0], dict):
        return max(len(side["input_ids"]) for side in row)
    return sum(map(len, row))


@torch.no_grad()
def mean(loss: Callable[[list], Tensor], rows: list, micro_batch: int) -> float:
    rows = sorted(rows, key=size)

    def total(micro_batch: int) -> float:
        parts = (rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch))
        return sum(float(loss(part)) for part in parts)

    return halving(micro_batch, total)[0] / len(rows)
