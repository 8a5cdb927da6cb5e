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

import functools
import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Iterable
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
COMPACT = 0.95  # drop the rows that have ended when at most this share is left
COLUMNS = 8  # response columns are attended to in blocks of this, two at least: see `PrefixCache.step`
BLOCK = 64  # tokens of the vocabulary in a block of the two-level draw


@dataclass(frozen=True)
class Samples:
    """M responses for each of B prompts, at most T tokens each. EOS counts; nothing after it does."""

    tokens: Tensor  # (B, M, T) int64, padding after the end
    mask: Tensor  # (B, M, T) float32, 1 on response tokens, EOS included
    logprobs: Tensor  # (B, M, T) float32, log pi(token) in nats at the sampling temperature, 0 where mask is 0
    texts: list[list[str]]  # B lists of M, decoded without special tokens


def sample(model, tokenizer, prompts: list[str], *, num_samples: int, max_new_tokens: int, temperature: float = 1.0,
           seed: int, first_sample: int = 0, batch_size: int | None = None) -> Samples:
    """Draw y ~ pi(. | x), `num_samples` a prompt, from the full softmax (no top-k, no top-p), with log-probabilities.

    The same (seed, prompt, sample index, position) gives the same token, so `first_sample=100` continues a draw of 100;
    a prompt given twice gets two independent draws. Draws that must be independent (pi and pi_ref) need different seeds.
    A response ends with EOS or is cut at `max_new_tokens`. `batch_size`: rows decoded
    together, by default what fits in 1/2 GB (a third of a GPU); it changes speed and memory, not the samples.
    Raises ValueError on no prompts, a prompt that is not text or too long for the model, a number out of range, and
    logits that are not finite.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("max_new_tokens", max_new_tokens, 1),
                               ("first_sample", first_sample, 0), ("batch_size", batch_size, 1)):
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
    out = Samples(torch.full((B * M, T), pad, device=device), torch.zeros(B * M, T, device=device),
                  torch.zeros(B * M, T, device=device), [])
    order = np.array(sorted(range(B), key=lambda i: -len(ids[i])))  # similar lengths go together
    prompt_of, sample_of = np.repeat(order, M), np.tile(np.arange(M), B)  # the queue
    cache = (RepeatedCache if _plain(model) else PrefixCache)(model)
    size = batch_size or _batch_size(model, T)
    size = size // M * M or size  # whole prompts, if one fits
    # On a CPU the logits are made for so many rows at a time that they stay in its cache (1 MB), if they ever fit.
    V = model.config.vocab_size
    head_rows = size if device.type != "cpu" else 2**18 // V if V <= 4096 else 256
    with torch.inference_mode(), _decoding(model):
        for i in range(0, B * M, size):
            x, m = prompt_of[i:i + size], sample_of[i:i + size]
            unique, group = np.unique(x, return_inverse=True)
            prompt_ids, prompt_mask = left_pad([ids[j] for j in unique], pad, device)
            u, row, group = (torch.from_numpy(v).to(device)
                             for v in (_uniforms(seed, keys[x], m + first_sample, T), x * M + m, group))
            _decode_wave(cache, prompt_ids, prompt_mask, group, u, row, out, eos=eos, pad=pad, temperature=temperature,
                         head_rows=head_rows)
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
    logits, hidden = response_logits(model, prompt_ids, prompt_mask, tokens, mask)
    kept = mask.bool()
    picked = -F.cross_entropy(logits if temperature == 1 else logits / temperature, tokens[kept], reduction="none")
    logprobs = picked.new_zeros(tokens.shape).masked_scatter(kept, picked).float()
    return (logprobs, hidden) if return_hidden else logprobs


def response_logits(model, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (mask.sum(), V) float32 that each token that counts was drawn from, row by row, and the (N, T, D) last
    hidden states. Arguments as those of `sequence_logprobs`, which checks them."""
    first, kept = prompt_ids.shape[1] - 1, mask.bool()
    attention_mask = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1)
    extra = {"output_hidden_states": True} if _plain(model) else {}
    out = _forward(model, torch.cat([prompt_ids, tokens], 1), attention_mask=attention_mask,
                   position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0), **extra)
    if _plain(model):
        hidden, logits = out.hidden_states[-1][:, first:-1], out.logits[:, first:-1][kept].float()
    else:  # the head only where a token counts
        hidden = out.last_hidden_state[:, first:-1]
        logits = _head(model, hidden[kept])
    return logits, hidden


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


# ---- one wave: the rows of a few prompts, decoded in step ----

def _decode_wave(cache, prompt_ids: Tensor, prompt_mask: Tensor, group: Tensor, u: Tensor, row: Tensor, out: Samples, *,
                 eos: Tensor, pad: int, temperature: float, head_rows: int) -> None:
    """Sample R rows into out[row]. prompt_ids, prompt_mask: (G, P); group: (R,) prompt of a row; u: (R, T, 2)."""
    T, on_cpu = u.shape[1], row.device.type == "cpu"
    look = 1 if on_cpu else 16  # steps between looks at who is alive: a GPU has to be waited for
    position, alive = prompt_mask.sum(1)[group], torch.ones_like(row, dtype=torch.bool)
    state = cache.prefill(prompt_ids, prompt_mask, group, T)
    for t in range(T):
        logits = (cache.head(x) for x in state.split(head_rows))
        token, logprob = _draw((x if temperature == 1 else x / temperature for x in logits), u[:, t])
        out.tokens[row, t] = torch.where(alive, token, pad)
        out.logprobs[row, t] = torch.where(alive, logprob, 0.0)
        out.mask[row, t] = alive.float()
        alive = alive & ~torch.isin(token, eos)
        if t == T - 1:
            break
        if t % look == look - 1:
            living = int(alive.sum())
            if living == 0:
                break
            if living <= COMPACT * len(alive):  # living rows from the end take the places of ended ones
                index = torch.arange(living, device=row.device)
                index[~alive[:living]] = alive[living:].nonzero()[:, 0] + living
                cache.compact(index)
                u, row, position, alive, token = (x[index] for x in (u, row, position, alive, token))
        state = cache.step(token[:, None], (position + t)[:, None], t)


def _draw(logits: Iterable[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """(token, log pi(token)), each (R,), by the inverse CDF in two levels: a block of the vocabulary, then a token in it.

    logits: (r, V) each, R rows together. u: (R, 2) float64 in [0, 1), a number for each level: with one for both, an
    error of rounding in a block's boundary would move every token's. Sums are vectorised, a long cumulative sum is not.
    """
    picked, first = [], 0
    for piece in logits:
        probs, short = piece.softmax(-1), -piece.shape[-1] % BLOCK
        blocks = (F.pad(probs, (0, short)) if short else probs).unflatten(-1, (-1, BLOCK))  # (r, V / BLOCK, BLOCK)
        block = _inverse_cdf(blocks.sum(-1), u[first:first + len(piece), 0])
        picked.append((block, blocks[torch.arange(len(piece), device=block.device), block]))
        first += len(piece)
    block, inside = map(torch.cat, zip(*picked))  # (R,), (R, BLOCK)
    i = _inverse_cdf(inside, u[:, 1])
    return (block * BLOCK + i).clamp(max=piece.shape[-1] - 1), inside.gather(-1, i[:, None])[:, 0].log().float()


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index i with probability weights[i] / sum(weights); never one of weight 0. weights: (R, n), u: (R,)."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    i = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return i.clamp(max=weights.shape[-1] - 1)  # only NaN gets that far: `sample` reports it


# ---- random numbers ----

def _uniforms(seed: int, keys: np.ndarray, samples: np.ndarray, T: int) -> np.ndarray:
    """(R, T, 2) float64 in [0, 1), each a hash of (seed, prompt's key, sample's index, t, which): a generator without
    a state, so that no draw depends on what else is in the batch. keys: (R,) uint64, samples: (R,)."""
    x = _mix(_mix(np.uint64(seed % 2**64) ^ keys) + samples.astype(np.uint64))
    x = _mix(x[:, None] + np.arange(2 * T, dtype=np.uint64))
    return ((x >> np.uint64(11)) * 2.0**-53).reshape(len(keys), T, 2)


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

def _plain(model) -> bool:
    """Whether the model takes the plain path: another family, or attention over a window."""
    return model.config.model_type not in SHARED_PREFIX or bool(getattr(model.config, "sliding_window", None))


def _head(model, hidden: Tensor) -> Tensor:
    logits = model.get_output_embeddings()(hidden)
    return logits if logits.dtype == torch.float64 else logits.float()


def _forward(model, ids: Tensor, cache=None, **kwargs):
    """transformers' output for ids (N, L): of the model without its head, or of the whole in the plain path."""
    model = model if _plain(model) else model.base_model
    names = _arguments(type(model))
    if cache is not None:
        kwargs |= {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}  # renamed in 5.24
    if "position_ids" not in names:  # ALiBi: positions come from the mask
        del kwargs["position_ids"]
    return model(input_ids=ids, **kwargs)


@functools.cache
def _arguments(model_class) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


class PrefixCache(Cache):
    """Keys and values of G prompts, and in buffers made once those of the response tokens of R rows, each on a prompt."""

    def __init__(self, model):
        self.model, self.layers, self.buffers = model, [], []  # transformers looks at `layers` for masks: ours are ready

    def prefill(self, ids: Tensor, mask: Tensor, group: Tensor, T: int) -> Tensor:
        """Last hidden states (R, D) after each row's prompt; ids, mask: (G, P); group: (R,)."""
        P, on = ids.shape[1], mask.bool()
        causal = torch.ones(P, P, dtype=torch.bool, device=ids.device).tril()
        see = causal & on[:, None, None] | torch.eye(P, dtype=torch.bool, device=ids.device)  # (G, 1, P, P)
        self.prompt, self.own, self.t = [], [], None  # a layer each: pairs (G, H, P, D), (R, H, T, D)
        state = self._forward(ids, see, (mask.cumsum(1) - 1).clamp(min=0))
        self.group, self.T = group, T
        self.bias = torch.where(on, 0.0, -torch.inf)[:, None, None]  # (G, 1, 1, P)
        self._place_rows()
        return state[group]

    def step(self, token: Tensor, position: Tensor, t: int) -> Tensor:
        """Last hidden states (R, D) after one more token, the t-th, of each row; token, position: (R, 1)."""
        self.t = t
        # Whole blocks of columns are read, those to come behind a bias: narrow products and softmaxes are slow.
        self.width = _columns(t + 1)
        self.own_bias = torch.where(torch.arange(self.width, device=token.device) > t, -torch.inf, 0.0)
        return self._forward(token, self.bias, position)

    def head(self, state: Tensor) -> Tensor:
        return _head(self.model, state)

    def _forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        return _forward(self.model, ids, self, attention_mask=mask, position_ids=position_ids).last_hidden_state[:, -1]

    def compact(self, index: Tensor) -> None:
        """Keep the rows `index` (R',), row i going where i is; those that move, move in place."""
        moved = (index >= len(index)).nonzero()[:, 0]
        self.own = [tuple(x.index_copy_(0, moved, x[index[moved]])[:len(index)] for x in layer) for layer in self.own]
        living, self.group = self.group[index].unique(return_inverse=True)
        self.prompt = [tuple(x[living] for x in layer) for layer in self.prompt]
        self.bias = self.bias[living]
        self._place_rows()

    def _place_rows(self) -> None:
        """Index from rows to (G, k), the rows of each prompt side by side with gaps, and back; for every one of H heads."""
        G, H, R = len(self.bias), self.prompt[0][0].shape[1], len(self.group)
        count = self.group.bincount(minlength=G)
        order, k = self.group.argsort(stable=True), int(count.max())
        rank = torch.arange(R, device=order.device) - (count.cumsum(0) - count)[self.group[order]]
        row = order.new_zeros(G, 1, k)  # a gap computes row 0 once more, and is never read
        row[self.group[order], 0, rank] = order
        head = torch.arange(H, device=order.device)
        self.side_by_side = (row * H + head[:, None]).flatten()  # (G H k) into (R H)
        place = torch.empty_like(order).index_copy_(0, order, self.group[order] * H * k + rank)
        self.back = (place[:, None] + head * k).flatten()  # (R H) into (G H k)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.t is None else self.bias.shape[-1] + self.t

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs):
        """What a layer attends to: in the prompt its own tensors, then the cache and the layer's index."""
        if self.t is None:
            self.prompt.append((key, value))
            return key, value
        if len(self.own) == layer_idx:  # the first step of a wave
            shape = len(key), key.shape[1], _columns(self.T), key.shape[3]
            if len(self.buffers) == layer_idx or self.buffers[layer_idx][0].numel() < math.prod(shape):
                self.buffers[layer_idx:layer_idx + 1] = [[x.new_zeros(math.prod(shape)) for x in (key, value)]]
            self.own.append([x[:math.prod(shape)].view(shape) for x in self.buffers[layer_idx]])
        for buffer, new in zip(self.own[layer_idx], (key, value)):
            buffer[:, :, self.t] = new[:, :, 0]
        return self, layer_idx

    def attend(self, layer_idx: int, query: Tensor, scaling: float) -> Tensor:
        """One softmax over the prompt's columns and the row's own: query (R, heads, 1, D) -> (R, 1, heads, D)."""
        own_key, own_value = (x[:, :, :self.width] for x in self.own[layer_idx])  # (R, H, t, D)
        prompt_key, prompt_value = self.prompt[layer_idx]  # (G, H, P, D)
        R, H, _, D = own_key.shape
        q = query.reshape(R, H, -1, D) * scaling  # (R, H, heads / H, D)
        scores = torch.cat([self._by_prompt(q, prompt_key.transpose(-1, -2), self.bias),
                            q @ own_key.transpose(-1, -2) + self.own_bias], -1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
        to_prompt, to_own = weights.split([prompt_key.shape[2], self.width], -1)
        return (self._by_prompt(to_prompt, prompt_value) + to_own @ own_value).reshape(R, 1, -1, D)

    def _by_prompt(self, x: Tensor, y: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """x (R, H, n, D) times its prompt's y (G, H, D, m), as one product for all rows of a prompt: (R, H, n, m)."""
        (R, H, n, D), (G, *_, m) = x.shape, y.shape
        z = x.reshape(R * H, n * D).index_select(0, self.side_by_side).view(G, H, -1, D) @ y + bias  # (G, H, k n, m)
        return z.view(-1, n * m).index_select(0, self.back).view(R, H, n, m)


def _columns(T: int) -> int:
    return max(2, -(-T // COLUMNS)) * COLUMNS


def _attention(module, query: Tensor, key, value, mask: Tensor, scaling: float | None = None, **kwargs):
    """Attention of a `PrefixCache` in transformers' interface: query (R, heads, L, D) -> (R, L, heads, D)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, PrefixCache):
        return key.attend(value, query, scaling), None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                         enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


AttentionInterface.register("minictrl_prefix", _attention)


class RepeatedCache:
    """The plain path, for any other family: transformers' own cache and attention, the prompt repeated for every row.
    Its state is the logits, which the family may cap or scale."""

    def __init__(self, model):
        self.model = model

    def prefill(self, ids: Tensor, mask: Tensor, group: Tensor, T: int) -> Tensor:
        self.cache, self.mask = DynamicCache(), mask
        state = self._forward(ids, (mask.cumsum(1) - 1).clamp(min=0))[group]
        self.compact(group)
        return state

    def step(self, token: Tensor, position: Tensor, t: int) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(token, position)

    def head(self, state: Tensor) -> Tensor:
        return state if state.dtype == torch.float64 else state.float()

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        return _forward(self.model, ids, self.cache, attention_mask=self.mask, position_ids=position_ids).logits[:, -1]

    def compact(self, index: Tensor) -> None:
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)


# ---- small helpers ----

@contextmanager
def _decoding(model):
    """Dropout off and, but on the plain path, `_attention` in transformers' forward; both as they were on leaving."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if not _plain(model):
        model.config._attn_implementation = "minictrl_prefix"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        model.train(training)


def _batch_size(model, T: int) -> int:
    """Rows whose keys and values of T tokens take 1/2 GB on a CPU, a third of what is free on a GPU; 2,048 at most."""
    c, weight = model.config, model.get_input_embeddings().weight
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    row = 2 * c.num_hidden_layers * heads * width * _columns(T) * weight.element_size()
    memory = torch.cuda.mem_get_info(weight.device)[0] // 3 if weight.is_cuda else 2**29
    return min(2048, max(32, memory // row))


def _eos_ids(model, tokenizer) -> Tensor:
    """Every token that ends a response: the tokenizer's EOS and those of the generation config (chat models have two)."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(ids if isinstance(ids, (list, tuple)) else [ids]) | {tokenizer.eos_token_id}
    ids = sorted(i for i in ids if i is not None)
    if not ids:
        raise ValueError("the tokenizer has no eos_token: set tokenizer.eos_token, or no response can end")
    return torch.tensor(ids)


def check_lengths(model, prompts, ids, max_new_tokens: int) -> None:
    """Raise ValueError on a prompt that does not leave room for the response in the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context and len(ids[longest]) + max_new_tokens > context:
        raise ValueError(f"prompt {longest} ({prompts[longest][:40]!r}…) has {len(ids[longest])} tokens; with "
                         f"max_new_tokens={max_new_tokens} that is more than the model's context of {context}: "
                         "shorten the prompt or the response")
