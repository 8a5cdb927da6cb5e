"""What the policy teacher writes, for its student: texts, and what it expected at every step.

The student has the teacher's tokens, but only those that reviews need, so it can learn the
distributions and not just the draws. The teacher writes with these tokens too: in this way it is a
quarter faster, and fewer of its words are made up.
"""

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minictrl import sampling
from minictrl.files import in_one_step
from minictrl.models import load_policy, save_policy
from minictrl.pretrain.ratings import cuts, of_split
from minictrl.pretrain.vocabulary import prune
from minictrl.sampling import Samples

TEMPERATURE = 0.8  # of all that the student learns from: it leaves the teacher fewer accidents


def prune_policy(reviews: list[dict], policy: Path, out: Path, size: int):
    """The policy with the `size` tokens that the training reviews use most."""
    texts = [row["text"] for row in of_split(reviews, "train")]
    with tempfile.TemporaryDirectory() as folder:
        save_policy(*prune(*load_policy(str(policy)), texts, size, Path(folder)), out)


@contextmanager
def recorded(rows: int, T: int, top: int) -> Iterator[tuple[Tensor, Tensor]]:
    """While `sample` draws: (ids, logprobs) of the likeliest tokens at every step.

    (rows, T, top) each, int32 and float16, zeros after the end, at the sampling temperature.
    `sample` has the logits at hand; another forward would cost as much as the draw.
    """
    ids = torch.zeros(rows, T, top, dtype=torch.int32)
    logprobs = torch.zeros(rows, T, top, dtype=torch.float16)

    class Recorder(sampling.Wave):
        def _extend(self, state: Tensor):
            logits = torch.cat([self.cache.head(x) for x in state.split(self.head_rows)])
            best = (logits / self.temperature).log_softmax(-1).topk(top)
            ids[self.row, self.t] = best.indices.int()
            logprobs[self.row, self.t] = best.values.half()
            super()._extend(state)

    plain, sampling.Wave = sampling.Wave, Recorder
    try:
        yield ids, logprobs
    finally:
        sampling.Wave = plain


def write_text(
    reviews: list[dict],
    policy: Path,
    out: Path,
    *,
    shards: int,
    prompts: int = 256,
    num_samples: int = 4,
    max_new_tokens: int = 24,
    top: int = 32,
    seed: int = 0,
):
    """Shards 0 to `shards` - 1 of continuations of training prompts; those that are there stay.

    NNNNN.jsonl.gz: a line {"prompt", "texts"} for each prompt.
    NNNNN.safetensors: tokens (prompts, num_samples, T), EOS from the end on; ids and logprobs of
    the likeliest tokens, (prompts, num_samples, T, top), as `recorded` has them.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(shards) if not (out / f"{i:05}.jsonl.gz").is_file()]
    if not todo:
        return
    texts = [prompt for shift in (0, 1, 2) for prompt, _ in cuts(reviews, "train", shift)]
    texts = list(dict.fromkeys(texts))
    model, tokenizer = load_policy(str(policy))
    for i in todo:
        turn, first = divmod(i * prompts, len(texts))  # each turn has another order, other draws
        generator = torch.Generator().manual_seed(seed + turn)
        order = torch.randperm(len(texts), generator=generator).tolist()
        part = [texts[j] for j in order[first : first + prompts]]
        with recorded(len(part) * num_samples, max_new_tokens, top) as taught:
            drawn = sampling.sample(
                model,
                tokenizer,
                part,
                num_samples=num_samples,
                max_new_tokens=max_new_tokens,
                temperature=TEMPERATURE,
                seed=seed + 1000 + turn,
            )
        save_shard(out / f"{i:05}", part, drawn, *taught)
        print(f"text: shard {i}, {int(drawn.mask.sum())} tokens", flush=True)


def save_shard(path: Path, prompts: list, drawn: Samples, ids: Tensor, logprobs: Tensor):
    """PATH.safetensors, then PATH.jsonl.gz, which says that the shard is whole."""
    P, M, T = drawn.tokens.shape
    taught = {"ids": ids.view(P, M, T, -1), "logprobs": logprobs.view(P, M, T, -1)}
    save_file({"tokens": drawn.tokens.int()} | taught, f"{path}.safetensors")
    rows = zip(prompts, drawn.texts, strict=True)
    lines = (json.dumps({"prompt": x, "texts": y}) + "\n" for x, y in rows)
    with in_one_step(Path(f"{path}.jsonl.gz")) as temporary:
        temporary.write_bytes(gzip.compress("".join(lines).encode()))
