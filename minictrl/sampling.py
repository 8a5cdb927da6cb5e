"""Sampling y ~ pi(.|x) with log-probabilities: a plain sampler to read, and the fast one.

Every draw is a function of (seed, prompt, sample, t) alone (`lm/draw.py`), so both give the same
tokens, whatever the batch size and order. Rounding differs between batch shapes, and a draw within
rounding of a boundary may fall on the other side: in float32 this happened to none of 60,000 tokens
of the embedded policy. Log-probabilities are those of a full forward to 1e-5 nats.

The fast one uses transformers' own forward, with a cache and an attention of ours put in where the
family allows (`lm/kvcache.py`): K samples of a prompt share its keys and values, computed once and
never copied. Rows of the same step are decoded together, in waves of prompts of similar length
(`lm/decode.py`). A row that has ended gives its place to the last living one. On a GPU a step is
recorded as a CUDA graph and replayed until the rows change.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minictrl.checks import NotFinite, positive, whole
from minictrl.lm.decode import Wave, decode
from minictrl.lm.device import halving
from minictrl.lm.draw import draw, prompt_keys, uniforms
from minictrl.lm.kvcache import PrefixCache, RepeatedCache, decoding, fitting_rows, is_plain
from minictrl.lm.prompts import check_lengths, encode_prompts, eos_ids, left_pad, response_texts

SEEDS = -(2**63), 2**63 - 1  # larger ones repeat
SAMPLER = 3  # its version: another one has other samples, or other texts of them, for a seed


@dataclass(frozen=True)
class Samples:
    """M responses for each of B prompts, at most T tokens each. EOS counts; nothing after it."""

    tokens: Tensor  # (B, M, T) int64, padding after the end
    mask: Tensor  # (B, M, T) float32, 1 on response tokens, EOS included
    logprobs: Tensor  # (B, M, T) float32, nats at the sampling temperature, 0 where mask is 0
    texts: list[list[str]]  # B lists of M, decoded without special tokens


@torch.no_grad()
def sample_plainly(
    model,
    tokenizer,
    prompts: list[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
) -> Samples:
    """`sample`, without a cache: a whole forward for each token. To read, and to test `sample`."""
    seed, temperature = whole("seed", seed, *SEEDS), positive("temperature", temperature)
    M, T = whole("num_samples", num_samples), whole("max_new_tokens", max_new_tokens)
    B, device = len(prompts), model.device
    pad, eos = tokenizer.pad_token_id, eos_ids(model, tokenizer).to(device)
    prompt_ids = encode_prompts(tokenizer, prompts)
    ids, attention = left_pad(prompt_ids, pad, device)
    ids, attention = ids.repeat_interleave(M, 0), attention.repeat_interleave(M, 0)  # (B M, L)
    u = torch.from_numpy(
        uniforms(seed, prompt_keys(prompts).repeat(M), np.tile(np.arange(M), B), T)
    ).to(device)
    tokens, logprobs, mask = [], [], []  # T of (B M,)
    alive = torch.ones(B * M, dtype=torch.bool, device=device)
    for t in range(T):
        position_ids = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=attention, position_ids=position_ids).logits[:, -1]
        token, logprob = draw([logits.float() / temperature], u[:, t])
        tokens.append(token.masked_fill(~alive, pad))
        logprobs.append(logprob.masked_fill(~alive, 0.0))
        mask.append(alive.float())
        alive = alive & ~torch.isin(token, eos)
        ids = torch.cat([ids, token[:, None]], 1)
        attention = torch.cat([attention, torch.ones_like(token)[:, None]], 1)
    tensors = (torch.stack(x, 1) for x in (tokens, mask, logprobs))
    return _samples(tokenizer, prompt_ids, *tensors, M)


def sample(
    model,
    tokenizer,
    prompts: list[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
    first_sample: int = 0,
    batch_size: int | None = None,
) -> Samples:
    """y ~ pi(.|x), `num_samples` per prompt, from the full softmax (no top-k, no top-p).

    The same (seed, prompt, sample index, position) gives the same token, so `first_sample=100`
    continues a draw of 100; a prompt given twice gets two independent draws. What must be
    independent (pi and pi_ref) needs different seeds. A response ends with EOS or is cut at
    `max_new_tokens`. `batch_size`: rows decoded together, by default what fits in 1/2 GB (a third
    of a GPU), halved when a GPU runs out of memory; it changes no sample. Raises ValueError on no
    prompts, one that is not text or too long, a number out of range, logits that are not finite.
    """
    seed, temperature = whole("seed", seed, *SEEDS), positive("temperature", temperature)
    M, T = whole("num_samples", num_samples), whole("max_new_tokens", max_new_tokens)
    first_sample = whole("first_sample", first_sample, 0)
    if batch_size is not None:
        whole("batch_size", batch_size)
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    ids = encode_prompts(tokenizer, prompts)
    check_lengths(model, prompts, ids, max_new_tokens)
    B = len(prompts)
    device = model.get_input_embeddings().weight.device
    eos = eos_ids(model, tokenizer).to(device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(eos[0])
    keys = prompt_keys(prompts)
    # made outside inference_mode: what is returned may enter a forward that needs gradients
    tokens = torch.full((B * M, T), pad, device=device)
    mask, logprobs = torch.zeros(2, B * M, T, device=device).unbind()

    def draw_all(size: int) -> None:
        cache = (RepeatedCache if is_plain(model) else PrefixCache)(model)
        for x, m in _waves(ids, M, size):  # (R,) each
            unique, group = np.unique(x, return_inverse=True)
            u = uniforms(seed, keys[x], m + first_sample, T)
            u, row, group = (torch.from_numpy(v).to(device) for v in (u, x * M + m, group))
            prompt_ids, prompt_mask = left_pad([ids[j] for j in unique], pad, device)
            wave = Wave(
                cache, prompt_ids, prompt_mask, group, u, row, (tokens, mask, logprobs),
                eos=eos, pad=pad, temperature=temperature,
            )  # fmt: skip
            decode(wave)

    with torch.inference_mode(), decoding(model):
        fitting = batch_size or fitting_rows(model, max(map(len, ids)), T)
        halving(min(B * M, fitting), draw_all)
    _check_finite(logprobs, prompts)
    return _samples(tokenizer, ids, tokens, mask, logprobs, M)


def _waves(ids: list[list[int]], M: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(prompt, sample) of each row of each wave, (R,) both: at most `size` rows, prompts of similar
    length together, and whole prompts if one fits.
    """
    longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    prompt, sample = np.repeat(longest_first, M), np.tile(np.arange(M), len(ids))
    size = size // M * M or size
    for first in range(0, len(prompt), size):
        yield prompt[first : first + size], sample[first : first + size]


def _check_finite(logprobs: Tensor, prompts: list[str]) -> None:
    """Raises NotFinite with the prompt of the first row (B M, T) that is not finite."""
    bad = (~logprobs.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        prompt = prompts[bad[0] * len(prompts) // len(logprobs)]
        raise NotFinite(
            f"the policy's logits are not finite on the prompt {prompt[:60]!r}: check its weights "
            "and dtype (float16 overflows)"
        )


def _samples(
    tokenizer, prompt_ids: list[list[int]], tokens: Tensor, mask: Tensor, logprobs: Tensor, M: int
) -> Samples:
    """Tensors (B M, T) as `Samples`, with their texts."""
    B, T = len(prompt_ids), tokens.shape[1]
    tokens, mask, logprobs = (x.view(B, M, T) for x in (tokens, mask, logprobs))
    unknown = int(((tokens >= len(tokenizer)) & mask.bool()).sum())
    if unknown:
        warnings.warn(
            f"{unknown} of {int(mask.sum())} sampled tokens have ids that the tokenizer, with "
            f"{len(tokenizer)} tokens, lacks: they are no text; give the policy its own tokenizer",
            stacklevel=3,
        )
    return Samples(tokens, mask, logprobs, texts_of(tokenizer, prompt_ids, tokens, mask))


def texts_of(
    tokenizer, prompt_ids: list[list[int]], tokens: Tensor, mask: Tensor
) -> list[list[str]]:
    """B lists of M texts. prompt_ids: of B prompts. tokens, mask: (B, M, T)."""
    M = tokens.shape[1]
    lengths = mask.sum(-1).long().flatten().tolist()
    rows = tokens.flatten(0, 1).tolist()
    kept = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    texts = response_texts(tokenizer, [ids for ids in prompt_ids for _ in range(M)], kept)
    return [texts[i : i + M] for i in range(0, len(texts), M)]
