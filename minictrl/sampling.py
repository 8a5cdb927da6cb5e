"""Sampling with a KV cache, and the log-probabilities of given responses: one forward for
everything that trains.

The forward is transformers' own, with a cache and an attention of ours put in where the family
allows (`kvcache.py`). K samples of a prompt share its keys and values: computed once, never copied.
Rows of the same step are decoded together, in waves of prompts of similar length. A row that has
ended gives its place to the last living one: with 4 % EOS a token 2 to 4 % of the rows computed are
wasted, so refilling places from the queue, which needs a step of its own for every row, has little
to win. On a GPU a step is recorded as a CUDA graph and replayed until the rows change.

Every draw is a function of (seed, prompt, sample, t) alone (`_uniforms`), whatever the batch size
and order. Rounding differs between batch shapes, and a draw within rounding of a boundary may fall
on the other side: in float32 this happened to none of 60,000 tokens of the embedded policy.
Log-probabilities are those of a full forward to 1e-5 nats.

Where the time of the embedded policy goes on one core, per token: matrix products 19 us, attention
9, softmax and draw 5, GELU 4, the rest 5. A hand-written forward would save no more than part of
that rest.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minictrl.lm.device import halving
from minictrl.lm.hub import first_line
from minictrl.lm.kvcache import (
    PrefixCache,
    RepeatedCache,
    decoding,
    fitting_rows,
    forward,
    head_logits,
    is_plain,
)

COMPACT = 0.95  # drop the rows that have ended when at most this share is left
LOOK = 32  # steps on a GPU between looks at who is alive, after which a step is recorded anew
BLOCK = 64  # tokens of the vocabulary in a block of the two-level draw


@dataclass(frozen=True)
class Samples:
    """M responses for each of B prompts, at most T tokens each. EOS counts; nothing after it
    does.
    """

    tokens: Tensor  # (B, M, T) int64, padding after the end
    mask: Tensor  # (B, M, T) float32, 1 on response tokens, EOS included
    # (B, M, T) float32, log pi(token) in nats at the sampling temperature, 0 where mask is 0
    logprobs: Tensor
    texts: list[list[str]]  # B lists of M, decoded without special tokens


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
    """Draw y ~ pi(. | x), `num_samples` a prompt, from the full softmax (no top-k, no top-p), with
    log-probabilities.

    The same (seed, prompt, sample index, position) gives the same token, so `first_sample=100`
    continues a draw of 100; a prompt given twice gets two independent draws. What must be
    independent (pi and pi_ref) needs different seeds. A response ends with EOS or is cut at
    `max_new_tokens`. `batch_size`: rows decoded together, by default what fits in 1/2 GB (a third
    of a GPU), halved when a GPU runs out of memory; it changes speed and memory, not the samples.
    Raises ValueError on no prompts, a prompt that is not text or too long for the model, a number
    out of range, and logits that are not finite.
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("first_sample", first_sample, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    ids = encode_prompts(tokenizer, prompts)
    check_lengths(model, prompts, ids, max_new_tokens)
    B, M, T = len(prompts), num_samples, max_new_tokens
    device = model.get_input_embeddings().weight.device
    eos = _eos_ids(model, tokenizer).to(device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(eos[0])
    keys = _prompt_keys(prompts)
    # Made outside inference_mode: what is returned may enter a forward that needs gradients.
    out = Samples(
        torch.full((B * M, T), pad, device=device),
        torch.zeros(B * M, T, device=device),
        torch.zeros(B * M, T, device=device),
        [],
    )
    order = np.array(sorted(range(B), key=lambda i: -len(ids[i])))  # similar lengths go together
    prompt_of, sample_of = np.repeat(order, M), np.tile(np.arange(M), B)  # the queue
    # On a CPU the logits are made for so many rows at a time that they stay in its cache (1 MB), if
    # they ever fit.
    V = model.config.vocab_size
    head_rows = B * M if device.type != "cpu" else 2**18 // V if V <= 4096 else 256

    def in_waves(size: int) -> None:
        cache = (RepeatedCache if is_plain(model) else PrefixCache)(model)
        size = size // M * M or size  # whole prompts, if one fits
        for i in range(0, B * M, size):
            x, m = prompt_of[i : i + size], sample_of[i : i + size]
            unique, group = np.unique(x, return_inverse=True)
            prompt_ids, prompt_mask = left_pad([ids[j] for j in unique], pad, device)
            u, row, group = (
                torch.from_numpy(v).to(device)
                for v in (_uniforms(seed, keys[x], m + first_sample, T), x * M + m, group)
            )
            _decode(
                _Wave(
                    cache,
                    prompt_ids,
                    prompt_mask,
                    group,
                    u,
                    row,
                    out,
                    eos=eos,
                    pad=pad,
                    temperature=temperature,
                    head_rows=head_rows,
                )
            )

    with torch.inference_mode(), decoding(model):
        halving(min(B * M, batch_size or fitting_rows(model, T)), in_waves)
    if not torch.isfinite(out.logprobs).all():
        raise ValueError(
            "the policy's logits are not finite: check its weights and dtype (float16 overflows)"
        )
    lengths = out.mask.sum(-1).long().tolist()
    texts = tokenizer.batch_decode(
        [row[:n] for row, n in zip(out.tokens.tolist(), lengths)], skip_special_tokens=True
    )
    return Samples(
        out.tokens.view(B, M, T),
        out.mask.view(B, M, T),
        out.logprobs.view(B, M, T),
        [texts[i * M : (i + 1) * M] for i in range(B)],
    )


def sequence_logprobs(
    model,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    return_hidden: bool = False,
):
    """log pi(token) of given responses, by one forward over prompt and response, with gradient if
    enabled.

    prompt_ids, prompt_mask: (N, P) left-padded, from `left_pad`. tokens, mask: (N, T),
    right-padded, as in `Samples`. Returns (N, T) float32, nats, 0 where mask is 0; with
    return_hidden also the last hidden states (N, T, D), those at t the state *before* token t,
    which a value head reads. Dropout follows the model's own mode.
    """
    if not (
        len(prompt_ids) == len(tokens)
        and prompt_ids.shape == prompt_mask.shape
        and tokens.shape == mask.shape
    ):
        raise ValueError(
            f"shapes do not match: prompt_ids {tuple(prompt_ids.shape)}, prompt_mask "
            f"{tuple(prompt_mask.shape)}, tokens {tuple(tokens.shape)}, mask {tuple(mask.shape)}"
        )
    logits, hidden = response_logits(model, prompt_ids, prompt_mask, tokens, mask)
    kept = mask.bool()
    picked = -F.cross_entropy(
        logits if temperature == 1 else logits / temperature, tokens[kept], reduction="none"
    )
    logprobs = picked.new_zeros(tokens.shape).masked_scatter(kept, picked).float()
    return (logprobs, hidden) if return_hidden else logprobs


def response_logits(
    model, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits (mask.sum(), V) float32 that each token that counts was drawn from, row by row,
    and the (N, T, D) last hidden states. Arguments as those of `sequence_logprobs`, which checks
    them."""
    first, kept = prompt_ids.shape[1] - 1, mask.bool()
    attention_mask = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1)
    extra = {"output_hidden_states": True} if is_plain(model) else {}
    out = forward(
        model,
        torch.cat([prompt_ids, tokens], 1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        **extra,
    )
    if is_plain(model):
        hidden, logits = out.hidden_states[-1][:, first:-1], out.logits[:, first:-1][kept].float()
    else:  # the head only where a token counts
        hidden = out.last_hidden_state[:, first:-1]
        logits = head_logits(model, hidden[kept])
    return logits, hidden


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, with the special tokens the tokenizer adds by itself (BOS), but
    never BOS twice: a prompt that a chat template has written already begins with it. Raises
    ValueError on no prompts, text or token."""
    if not prompts:
        raise ValueError("no prompts: give a list of at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {i} is {type(prompt).__name__}: must be text (render chat messages first)"
            )
    bos = tokenizer.bos_token
    ids = [
        tokenizer(p, add_special_tokens=not (bos and p.startswith(bos)))["input_ids"]
        for p in prompts
    ]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(
                f"prompt {i} ({prompts[i]!r}) has no tokens: a prompt needs at least one"
            )
    return ids


def left_pad(ids: list[list[int]], pad: int, device=None) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (N, P) int64, padded on the left to the longest."""
    P = max(map(len, ids))
    rows = torch.tensor([[pad] * (P - len(r)) + list(r) for r in ids], device=device)
    return rows, torch.tensor([[0] * (P - len(r)) + [1] * len(r) for r in ids], device=device)


# ---- one wave: the rows of a few prompts, decoded in step ----


class _Wave:
    """R rows, decoded into out[row]. prompt_ids, prompt_mask: (G, P); group: (R,) prompt of a row;
    u: (R, T, 2).

    A step reads no number back from the tensors, and leaves what it changes in their place: so it
    can be recorded.
    """

    def __init__(
        self,
        cache,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        group: Tensor,
        u: Tensor,
        row: Tensor,
        out: Samples,
        *,
        eos: Tensor,
        pad: int,
        temperature: float,
        head_rows: int,
    ):
        self.cache, self.u, self.row, self.out, self.eos, self.pad = cache, u, row, out, eos, pad
        self.temperature, self.head_rows, self.t = temperature, head_rows, row.new_zeros(1)
        self.position, self.alive = (
            prompt_mask.sum(1)[group],
            torch.ones_like(row, dtype=torch.bool),
        )
        self.token = torch.empty_like(row)  # the last one, (R,)
        self._extend(cache.prefill(prompt_ids, prompt_mask, group, u.shape[1]))

    def step(self) -> None:
        """Read the last token, the t-th, and draw the next."""
        state = self.cache.step(self.token[:, None], self.position[:, None], self.t)
        self.position += 1
        self.t += 1
        self._extend(state)

    def _extend(self, state: Tensor) -> None:
        """Draw the next token of each row, and write it down."""
        logits = (self.cache.head(x) for x in state.split(self.head_rows))
        u = self.u.index_select(1, self.t)[:, 0]
        token, logprob = _draw(
            (x if self.temperature == 1 else x / self.temperature for x in logits), u
        )
        self.out.tokens[self.row, self.t] = token.masked_fill(~self.alive, self.pad)
        self.out.logprobs[self.row, self.t] = logprob.masked_fill(~self.alive, 0.0)
        self.out.mask[self.row, self.t] = self.alive.float()
        self.alive &= ~torch.isin(token, self.eos)
        self.token.copy_(token)

    def compact(self) -> int:
        """How many rows are alive; living ones from the end take the places of those that have
        ended.
        """
        alive, living = self.alive, int(self.alive.sum())
        if 0 < living <= COMPACT * len(alive):
            index = torch.arange(living, device=alive.device)
            index[~alive[:living]] = alive[living:].nonzero()[:, 0] + living
            self.cache.compact(index)
            for name in ("u", "row", "position", "alive", "token"):
                setattr(self, name, getattr(self, name)[index])
        return living


def _decode(wave: _Wave) -> None:
    """Up to T tokens of each row. A GPU has to be waited for to know who is alive, so there it is
    asked rarely.
    """
    T, on_gpu = wave.u.shape[1], wave.row.is_cuda
    look = LOOK if on_gpu else 1
    for t in range(0, T - 1, look):
        if not wave.compact():
            return
        count = min(look, T - 1 - t)
        wave.cache.widen(t + count)
        _repeat(wave.step, count, recorded=on_gpu and isinstance(wave.cache, PrefixCache))


def _repeat(step: Callable[[], None], count: int, *, recorded: bool) -> None:
    """step() `count` times. Recorded: as a CUDA graph, for its hundreds of kernels take longer to
    launch than to run.
    """
    if recorded and count > 2:
        step()  # whatever is made at the first call
        count, graph, stream = count - 1, torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # the context doesn't do so if it fails
            warnings.warn(
                f"a decode step can't be recorded ({first_line(error)}); it is launched anew each time",
                stacklevel=2,
            )
        else:
            for _ in range(count):
                graph.replay()
            return stream.synchronize()  # before the graph goes
    for _ in range(count):
        step()


def _draw(logits: Iterable[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """(token, log pi(token)), each (R,), by the inverse CDF in two levels: a block of the
    vocabulary, a token in it.

    logits: (r, V) each, R rows together. u: (R, 2) float64 in [0, 1), a number for each level: with
    one for both, an error of rounding in a block's boundary would move every token's. Sums are
    vectorised, a long cumulative sum is not.
    """
    picked, first = [], 0
    for piece in logits:
        probs, short = piece.softmax(-1), -piece.shape[-1] % BLOCK
        # (r, V / BLOCK, BLOCK)
        blocks = (F.pad(probs, (0, short)) if short else probs).unflatten(-1, (-1, BLOCK))
        block = _inverse_cdf(blocks.sum(-1), u[first : first + len(piece), 0])
        picked.append((block, blocks[torch.arange(len(piece), device=block.device), block]))
        first += len(piece)
    block, inside = map(torch.cat, zip(*picked))  # (R,), (R, BLOCK)
    i = _inverse_cdf(inside, u[:, 1])
    return (block * BLOCK + i).clamp(max=piece.shape[-1] - 1), inside.gather(-1, i[:, None])[
        :, 0
    ].log().float()


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum(weights); never one of weight 0. weights: (R, n),
    u: (R,).
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    i = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return i.clamp(max=weights.shape[-1] - 1)  # only NaN gets that far: `sample` reports it


# ---- random numbers ----


def _uniforms(seed: int, keys: np.ndarray, samples: np.ndarray, T: int) -> np.ndarray:
    """(R, T, 2) float64 in [0, 1), each a hash of (seed, prompt's key, sample's index, t, which): a
    generator without a state, so that no draw depends on what else is in the batch. keys: (R,)
    uint64, samples: (R,)."""
    x = _mix(_mix(np.uint64(seed % 2**64) ^ keys) + samples.astype(np.uint64))
    x = _mix(x[:, None] + np.arange(2 * T, dtype=np.uint64))
    return ((x >> np.uint64(11)) * 2.0**-53).reshape(len(keys), T, 2)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the
    result.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _prompt_keys(prompts: list[str]) -> np.ndarray:
    """(B,) uint64: a hash of the prompt's text and of how often it came before, so that equal
    prompts draw apart.
    """
    seen = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(f"{seen[prompt]} {prompt}".encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
        seen[prompt] += 1
    return np.array(keys, dtype=np.uint64)


# ---- checks ----


def _eos_ids(model, tokenizer) -> Tensor:
    """Every token that ends a response: the tokenizer's EOS and the generation config's (chat
    models have two).
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(ids if isinstance(ids, (list, tuple)) else [ids]) | {tokenizer.eos_token_id}
    ids = sorted(i for i in ids if i is not None)
    if not ids:
        raise ValueError(
            "the tokenizer has no eos_token: set tokenizer.eos_token, or no response can end"
        )
    return torch.tensor(ids)


def check_lengths(model, prompts, ids, max_new_tokens: int) -> None:
    """Raise ValueError on a prompt that does not leave room for the response in the model's
    context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context and len(ids[longest]) + max_new_tokens > context:
        raise ValueError(
            f"prompt {longest} ({prompts[longest][:40]!r}…) has {len(ids[longest])} tokens; with "
            f"max_new_tokens={max_new_tokens} that is more than the model's context of {context}: "
            "shorten the prompt or the response"
        )
