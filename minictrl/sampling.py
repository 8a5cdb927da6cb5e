"""Sampling with a KV cache, and the log-probabilities of given responses: one forward for everything that trains.

K samples of a prompt share its keys and values: the prompt is computed once and never copied, and attention is one
softmax over two matrix products, with the prompt (shared) and with the row's own tokens (`_attention`). Prompts of
similar length go together in waves of about `batch_size` rows; rows that have ended are compacted away. The forward is
transformers' own, with this cache and attention put in, so a new size or checkpoint of a family in SHARED_PREFIX needs
nothing here. Any other causal LM takes the plain path (transformers' cache, repeated for every sample): slower, same
samples.

Every draw is a function of (seed, prompt, sample, t) alone, whatever the batch size and order: see `_uniforms`. Rounding
differs between batch shapes, so a draw within rounding of a boundary may differ: about one token in 30,000 in float32.
"""

import hashlib
import inspect
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache

# Families whose attention is softmax(q k / sqrt(d)) v through transformers' attention interface and whose logits are the
# output embedding of the last hidden state, with nothing in between (no soft cap, sink, bias or scale).
SHARED_PREFIX = {"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "phi3"}
MIN_SHARED = 8  # fewer rows than this on a prompt: each carries its own copy, which compacts better
BLOCK = 64  # tokens of the vocabulary in a block of the two-level draw


@dataclass(frozen=True)
class Samples:
    """M responses for each of B prompts, at most T tokens each. EOS counts; nothing after it does."""

    tokens: Tensor  # (B, M, T) int64, padding after the end
    mask: Tensor  # (B, M, T) float32, 1 on response tokens, EOS included
    logprobs: Tensor  # (B, M, T) float32, log pi(token) in nats at the sampling temperature, 0 where mask is 0
    texts: list[list[str]]  # B lists of M, decoded without special tokens


def sample(model, tokenizer, prompts: list[str], *, num_samples: int, max_new_tokens: int, temperature: float = 1.0,
           seed: int, first_sample: int = 0, batch_size: int = 1024) -> Samples:
    """Draw y ~ pi(. | x), `num_samples` a prompt, from the full softmax (no top-k, no top-p), with log-probabilities.

    The same (seed, prompt, sample index, position) gives the same token, so `first_sample=100` continues a draw of 100;
    a prompt given twice gets two independent draws. Draws that must be independent (pi and pi_ref) need different seeds.
    A response ends with EOS or is cut at `max_new_tokens`. `batch_size`: rows decoded together, for speed and memory.
    Raises ValueError on no prompts, a prompt that is not text or too long for the model, a number out of range, and
    logits that are not finite.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("max_new_tokens", max_new_tokens, 1),
                               ("first_sample", first_sample, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    ids = encode_prompts(tokenizer, prompts)
    _check_lengths(model, prompts, ids, max_new_tokens)
    B, M, T = len(prompts), num_samples, max_new_tokens
    device = model.get_input_embeddings().weight.device
    eos = _eos_ids(model, tokenizer).to(device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(eos[0])
    keys = _prompt_keys(prompts)
    # Made outside inference_mode: what is returned may enter a forward that needs gradients.
    out = Samples(torch.full((B * M, T), pad, device=device), torch.zeros(B * M, T, device=device),
                  torch.zeros(B * M, T, device=device), [])
    order = sorted(range(B), key=lambda i: len(ids[i]), reverse=True)  # similar lengths share a wave
    width = min(M, batch_size)
    with torch.inference_mode(), _eval_mode(model):
        for i in range(0, B, max(1, batch_size // M)):
            wave = order[i:i + max(1, batch_size // M)]
            prompt_ids, prompt_mask = left_pad([ids[j] for j in wave], pad, device)
            for first in range(0, M, width):
                samples = np.arange(first, min(first + width, M))
                u = _uniforms(seed, keys[wave], samples + first_sample, T).to(device)  # (b, k, T, 2)
                rows = torch.tensor(wave, device=device)[:, None] * M + torch.tensor(samples, device=device)  # (b, k)
                _decode_wave(model, prompt_ids, prompt_mask, u, rows, out, eos=eos, pad=pad,
                             temperature=temperature)
    if not torch.isfinite(out.logprobs).all():
        raise ValueError("the policy's logits are not finite: check its weights and dtype (float16 overflows)")
    lengths = out.mask.sum(-1).long().tolist()
    texts = tokenizer.batch_decode([row[:n] for row, n in zip(out.tokens.tolist(), lengths)], skip_special_tokens=True)
    return Samples(out.tokens.view(B, M, T), out.mask.view(B, M, T), out.logprobs.view(B, M, T),
                   [texts[i * M:(i + 1) * M] for i in range(B)])


def sequence_logprobs(model, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor, *,
                      temperature: float = 1.0, return_hidden: bool = False):
    """log pi(token) of given responses, by one forward over prompt and response, with gradient if enabled.

    prompt_ids, prompt_mask: (N, P) left-padded, from `left_pad`. tokens, mask: (N, T), right-padded, as in `Samples`.
    Returns (N, T) float32, nats, 0 where mask is 0; with return_hidden also the (N, T, D) last hidden states, position t
    being the state *before* token t, which a value head reads. Dropout follows the model's own mode.
    """
    if not (len(prompt_ids) == len(tokens) and prompt_ids.shape == prompt_mask.shape and tokens.shape == mask.shape):
        raise ValueError(f"shapes do not match: prompt_ids {tuple(prompt_ids.shape)}, prompt_mask "
                         f"{tuple(prompt_mask.shape)}, tokens {tuple(tokens.shape)}, mask {tuple(mask.shape)}")
    P, N = prompt_ids.shape[1], tokens.shape[1]
    attention_mask = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1)
    hidden = _hidden(model, torch.cat([prompt_ids, tokens], 1), attention_mask=attention_mask,
                     position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0))[:, P - 1:P + N - 1]
    kept = mask.bool()
    logits = _logits(model, hidden[kept], temperature)  # (tokens that count, V): the padding costs no softmax
    picked = -F.cross_entropy(logits, tokens[kept], reduction="none")
    logprobs = torch.zeros(tokens.shape, device=picked.device).masked_scatter(kept, picked)
    return (logprobs, hidden) if return_hidden else logprobs


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, with the special tokens the tokenizer adds by itself (BOS), but never BOS twice: a prompt
    that a chat template has written already begins with it. Raises ValueError on no prompts, not text, or no token."""
    if not prompts:
        raise ValueError("no prompts: give a list of at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {i} is {type(prompt).__name__}: must be text (render chat messages first)")
    bos = tokenizer.bos_token
    ids = [tokenizer(p, add_special_tokens=not (bos and p.startswith(bos)))["input_ids"] for p in prompts]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(f"prompt {i} ({prompts[i]!r}) has no tokens: a prompt needs at least one")
    return ids


def left_pad(ids: list[list[int]], pad: int, device=None) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (N, P) int64, padded on the left to the longest."""
    P = max(map(len, ids))
    rows = torch.tensor([[pad] * (P - len(r)) + list(r) for r in ids], device=device)
    return rows, torch.tensor([[0] * (P - len(r)) + [1] * len(r) for r in ids], device=device)


# ---- one wave: the same number of rows on each of a few prompts, decoded in step ----

def _decode_wave(model, prompt_ids: Tensor, prompt_mask: Tensor, u: Tensor, rows: Tensor, out: Samples, *, eos: Tensor,
                 pad: int, temperature: float) -> None:
    """Sample b prompts x k rows into out[rows]. prompt_ids, prompt_mask: (b, P); u: (b, k, T, 2); rows: (b, k)."""
    k, T = u.shape[1:3]
    length = prompt_mask.sum(1)[:, None].expand(-1, k)  # (b, k)
    state = (PrefixCache if model.config.model_type in SHARED_PREFIX else RepeatedCache)(model, prompt_mask, T)
    logits = _logits(model, state.prefill(prompt_ids), temperature).repeat_interleave(k, 0)  # (b k, V)
    if k < MIN_SHARED or isinstance(state, RepeatedCache):  # every row its own group
        u, rows, length = u.flatten(0, 1)[:, None], rows.reshape(-1, 1), length.reshape(-1, 1)
        state.repeat(k)
    alive = torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
    check = 1 if rows.device.type == "cpu" else 16  # steps between looks at what is alive: each waits for the device
    for t in range(T):
        token, logprob = _draw(logits, u[:, :, t].reshape(-1, 2))
        token, logprob = token.view(rows.shape), logprob.view(rows.shape)
        out.tokens[rows, t] = torch.where(alive, token, pad)
        out.logprobs[rows, t] = torch.where(alive, logprob, 0.0)
        out.mask[rows, t] = alive.float()
        alive = alive & ~torch.isin(token, eos)
        if t == T - 1:
            break
        if t % check == check - 1:
            groups = alive.any(1).nonzero()[:, 0]
            if not len(groups):
                break
            widest = int(alive.sum(1).max())
            if len(groups) * widest <= 0.8 * alive.numel():  # compact: the `widest` rows of each group, living ones first
                keep = alive[groups].int().argsort(dim=1, descending=True, stable=True)[:, :widest]  # (b', k')
                state.keep(groups, keep)
                pick = lambda x: x[groups[:, None], keep]
                u, rows, length, alive, token = map(pick, (u, rows, length, alive, token))
        hidden = state.step(token.reshape(-1, 1), (length + t).reshape(-1, 1))
        logits = _logits(model, hidden, temperature)


def _draw(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(token, log pi(token)), each (R,), by the inverse CDF in two levels: a block of the vocabulary, then a token in it.

    logits: (R, V). u: (R, 2) float64 in [0, 1), one number for each level: with only one, an error of rounding in the
    block's boundary would move every token's. Sums of blocks are vectorised where one long cumulative sum is not.
    """
    probs = logits.softmax(-1)
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # (R, V / BLOCK, BLOCK)
    block = _inverse_cdf(blocks.sum(-1), u[:, 0])
    inside = blocks[torch.arange(len(block), device=block.device), block]  # (R, BLOCK)
    token = (block * BLOCK + _inverse_cdf(inside, u[:, 1])).clamp(max=probs.shape[-1] - 1)
    return token, probs.gather(-1, token[:, None])[:, 0].log().float()


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum(weights); never one of weight 0. weights: (R, n), u: (R,)."""
    cdf = weights.double().cumsum(-1)
    i = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return i.clamp(max=weights.shape[-1] - 1)  # only NaN gets that far: `sample` reports it


# ---- random numbers ----

def _uniforms(seed: int, keys: np.ndarray, samples: np.ndarray, T: int) -> Tensor:
    """(B, M, T, 2) float64 in [0, 1), each a hash of (seed, prompt's key, sample's index, t, which): a generator without
    a state, so that no draw depends on what else is in the batch. keys: (B,) uint64, samples: (M,)."""
    x = _mix(_mix(np.uint64(seed % 2**64) ^ np.asarray(keys, dtype=np.uint64))[:, None] + samples.astype(np.uint64))
    x = _mix(x[..., None] + np.arange(2 * T, dtype=np.uint64))
    return torch.from_numpy((x >> np.uint64(11)) * 2.0**-53).view(*x.shape[:2], T, 2)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _prompt_keys(prompts: list[str]) -> np.ndarray:
    """(B,) uint64: a hash of the prompt's text and of how often it came before, so that equal prompts draw apart."""
    seen = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(f"{seen[prompt]} {prompt}".encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little"))
        seen[prompt] += 1
    return np.array(keys, dtype=np.uint64)


# ---- the forward ----

def _hidden(model, ids: Tensor, cache=None, **kwargs) -> Tensor:
    """Last hidden states (N, L, D) of the model without its head."""
    base = model.base_model
    names = inspect.signature(base.forward).parameters
    if cache is not None:
        kwargs |= {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}  # renamed in 5.24
    if "position_ids" not in names:  # ALiBi: positions come from the mask
        kwargs.pop("position_ids", None)
    return base(input_ids=ids, **kwargs).last_hidden_state


def _logits(model, hidden: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, in float32 (float64 stays)."""
    logits = model.get_output_embeddings()(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1 else logits / temperature


class PrefixCache(Cache):
    """Keys and values of G prompts, each shared by k rows, and of the rows' own response tokens in a static buffer."""

    def __init__(self, model, prompt_mask: Tensor, T: int):
        self.model, self.mask, self.T = model, prompt_mask.bool(), T
        self.groups, self.k, self.t = len(prompt_mask), 0, 0
        self.layers = []  # what transformers looks at to make a mask; ours come ready
        self.prompt, self.own = [], []  # a layer each: (key, value) of (G, H, P, D); of (G, H, k, T, D)

    def prefill(self, ids: Tensor) -> Tensor:
        """Last hidden state (G, D) of each prompt."""
        P = ids.shape[1]
        causal = torch.ones(P, P, dtype=torch.bool, device=ids.device).tril()
        mask = causal & self.mask[:, None, None] | torch.eye(P, dtype=torch.bool, device=ids.device)  # (G, 1, P, P)
        position_ids = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        return self._forward(ids, mask, position_ids)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """Last hidden state (G k, D) after one more token of each row; token, position: (G k, 1)."""
        self.k = len(token) // self.groups
        bias = torch.where(self.mask, 0.0, -torch.inf)[:, None, None]  # (G, 1, 1, P), added to the prompt's scores
        hidden = self._forward(token, bias, position)
        self.t += 1
        return hidden

    def _forward(self, ids, mask, position_ids):
        with _attention_of(self.model):
            return _hidden(self.model, ids, self, attention_mask=mask, position_ids=position_ids)[:, -1]

    def repeat(self, k: int) -> None:
        """Give each of k rows a prompt its own copy: G k groups of one row."""
        self.groups, self.mask = self.groups * k, self.mask.repeat_interleave(k, 0)
        self.prompt = [tuple(x.repeat_interleave(k, 0) for x in layer) for layer in self.prompt]

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Keep the groups (G',), and of each the rows (G', k')."""
        if len(groups) < self.groups:
            self.mask = self.mask[groups]
            self.prompt = [tuple(x[groups] for x in layer) for layer in self.prompt]
        self.own = [tuple(x[groups[:, None], :, rows].transpose(1, 2).contiguous() for x in layer) for layer in self.own]
        self.groups = len(groups)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.k == 0 else self.mask.shape[1] + self.t

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs):
        """What a layer attends to: in the prompt its own tensors, then ((prompt's keys, own keys), the same of values)."""
        if self.k == 0:
            self.prompt.append((key, value))
            return key, value
        G, k, (_, H, _, D) = self.groups, self.k, key.shape
        if len(self.own) == layer_idx:
            self.own.append(tuple(x.new_empty(G, H, k, self.T, D) for x in (key, value)))
        for buffer, new in zip(self.own[layer_idx], (key, value)):
            buffer[:, :, :, self.t] = new.reshape(G, k, H, D).transpose(1, 2)
        own_key, own_value = (x[:, :, :, :self.t + 1] for x in self.own[layer_idx])
        prompt_key, prompt_value = self.prompt[layer_idx]
        return (prompt_key, own_key), (prompt_value, own_value)


def _attention(module, query: Tensor, key, value, mask: Tensor, scaling: float | None = None, **kwargs):
    """Attention of a `PrefixCache` in transformers' interface: query (R, heads, L, D) -> (R, L, heads, D)."""
    if isinstance(key, Tensor):  # the prompt itself
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                             enable_gqa=query.shape[1] != key.shape[1])
        return out.transpose(1, 2), None
    (prompt_key, own_key), (prompt_value, own_value) = key, value
    G, H, k, t, D = own_key.shape
    P, scale = prompt_key.shape[2], D ** -0.5 if scaling is None else scaling
    q = (query.reshape(G, k, H, -1, D) * scale).transpose(1, 2).contiguous()  # (G, H, k, heads / H, D)
    prompt_scores = q.flatten(2, 3) @ prompt_key.transpose(-1, -2) + mask  # one product for all rows of the prompt
    scores = torch.cat([prompt_scores.unflatten(2, (k, -1)), q @ own_key.transpose(-1, -2)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(own_value.dtype)
    out = (weights[..., :P].flatten(2, 3) @ prompt_value).view_as(q) + weights[..., P:] @ own_value
    return out.transpose(1, 2).reshape(G * k, 1, -1, D), None


AttentionInterface.register("minictrl_prefix", _attention)


class RepeatedCache:
    """The plain path, for any other family: transformers' own cache and attention, the prompt repeated for every row."""

    def __init__(self, model, prompt_mask: Tensor, T: int):
        self.model, self.cache, self.mask = model, DynamicCache(), prompt_mask

    def prefill(self, ids: Tensor) -> Tensor:
        return self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(token, position)

    def _forward(self, ids, position_ids):
        return _hidden(self.model, ids, self.cache, attention_mask=self.mask, position_ids=position_ids)[:, -1]

    def repeat(self, k: int) -> None:
        self.mask = self.mask.repeat_interleave(k, 0)
        self.cache.batch_repeat_interleave(k)

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        self.mask = self.mask[groups]
        self.cache.batch_select_indices(groups)


# ---- small helpers ----

@contextmanager
def _eval_mode(model):
    """Dropout off; the training flag as it was on leaving."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _attention_of(model):
    """transformers' forward with `_attention` in it."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "minictrl_prefix"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _eos_ids(model, tokenizer) -> Tensor:
    """Every token that ends a response: the tokenizer's EOS and those of the generation config (chat models have two)."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(ids if isinstance(ids, (list, tuple)) else [ids]) | {tokenizer.eos_token_id}
    ids = sorted(i for i in ids if i is not None)
    if not ids:
        raise ValueError("the tokenizer has no eos_token: set tokenizer.eos_token, or no response can end")
    return torch.tensor(ids)


def _check_lengths(model, prompts, ids, max_new_tokens: int) -> None:
    """Raise ValueError on a prompt that does not leave room for the response in the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context and len(ids[longest]) + max_new_tokens > context:
        raise ValueError(f"prompt {longest} ({prompts[longest][:40]!r}…) has {len(ids[longest])} tokens; with "
                         f"max_new_tokens={max_new_tokens} that is more than the model's context of {context}: "
                         "shorten the prompt or the response")
