"""transformers' forward for sampling: a KV cache in which the samples of a prompt share its keys
and values.

`PrefixCache` goes into the forward of any model of a family in SHARED_PREFIX, by transformers'
interfaces for caches and attention. `RepeatedCache`, for any other causal LM, is transformers'
cache with the prompt repeated for every row. Both have prefill, widen, step, head and compact; rows
of the same step are decoded together.
"""

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache

from minictrl.checks import at_least_float32
from minictrl.lm.device import free_memory
from minictrl.lm.draw import BLOCK, whole_blocks

# Families whose attention is softmax(q k / sqrt(d)) v through transformers' attention interface,
# and whose logits are the output embedding of the last hidden state, with nothing in between (no
# soft cap, sink, bias or scale).
SHARED_PREFIX = {"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "olmo2"}
SHARED_PREFIX |= {"smollm3", "phi3"}
COLUMNS = 8  # response columns are attended to in blocks of this, two at least


def is_plain(model) -> bool:
    """Whether it takes transformers' cache and head: another family, or attention over a window."""
    return model.config.model_type not in SHARED_PREFIX or bool(
        getattr(model.config, "sliding_window", None)
    )


def head_logits(model, hidden: Tensor) -> Tensor:
    return at_least_float32(model.get_output_embeddings()(hidden))


def padded_head(model) -> Callable[[Tensor], Tensor]:
    """`head_logits`, its vocabulary filled up to whole blocks of the draw: on a CPU a product of
    6,208 columns is faster than one of 6,145.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.out_features % BLOCK == 0:
        return functools.partial(head_logits, model)
    V = head.out_features
    bias = whole_blocks(head.weight.new_zeros(V) if head.bias is None else head.bias)
    weight = F.pad(head.weight, (0, 0, 0, len(bias) - V))
    return lambda hidden: at_least_float32(F.linear(hidden, weight, bias))


def forward(model, ids: Tensor, cache=None, *, last: int = 0, **kwargs):
    """transformers' output for ids (B, L): of the model without its head, or of the whole in the
    plain path. last: positions whose logits are read there, from the end (0: all).
    """
    plain = is_plain(model)
    model = model if plain else model.base_model
    names = arguments(type(model))
    if plain and "logits_to_keep" in names:
        kwargs["logits_to_keep"] = last
    if cache is not None:
        # renamed in 5.24
        kwargs |= {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}
    if "position_ids" not in names:  # ALiBi: positions come from the mask
        del kwargs["position_ids"]
    return model(input_ids=ids, **kwargs)


@functools.cache
def arguments(model_class) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


class PrefixCache(Cache):
    """Keys and values of P prompts and, in buffers made once, of the response tokens of R rows,
    each on a prompt.
    """

    def __init__(self, model):
        self.model, self.buffers = model, {}  # by layer
        self.head = padded_head(model)
        self.layers = []  # where transformers looks to make a mask; ours are ready made

    def prefill(self, ids: Tensor, mask: Tensor, group: Tensor, T: int) -> Tensor:
        """Last hidden states (R, D) after each row's prompt; ids, mask: (P, L); group: (R,)."""
        L, on = ids.shape[1], mask.bool()
        causal = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
        # (P, 1, L, L)
        see = causal & on[:, None, None] | torch.eye(L, dtype=torch.bool, device=ids.device)
        # a layer each: pairs (P, H, L, D), (R, H, T, D)
        self.prompt, self.own, self.t = [], [], None
        state = self._forward(ids, see, (mask.cumsum(1) - 1).clamp(min=0))
        self.group, self.T = group, T
        self.bias = torch.where(on, 0.0, -torch.inf)[:, None, None]  # (P, 1, 1, L)
        self._place_rows()
        return state[group]

    def widen(self, T: int) -> None:
        """Read the columns of the first T tokens: whole blocks, for narrow products and softmaxes
        are slow.
        """
        self.width = columns(T)

    def step(self, token: Tensor, position: Tensor, t: Tensor) -> Tensor:
        """Last hidden states (R, D) after one more token of each row, the t-th (1,); token,
        position: (R, 1).
        """
        self.t = t
        columns_to_come = torch.arange(self.width, device=token.device) > t
        self.own_bias = torch.zeros(self.width, device=token.device).masked_fill(
            columns_to_come, -torch.inf
        )
        return self._forward(token, self.bias, position)

    def _forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        return forward(
            self.model, ids, self, attention_mask=mask, position_ids=position_ids
        ).last_hidden_state[:, -1]

    def compact(self, index: Tensor) -> None:
        """Keep the rows `index` (R',), row i going where i is; those that move, move in place."""
        moved = (index >= len(index)).nonzero()[:, 0]
        self.own = [
            tuple(x.index_copy_(0, moved, x[index[moved]])[: len(index)] for x in layer)
            for layer in self.own
        ]
        living, self.group = self.group[index].unique(return_inverse=True)
        self.prompt = [tuple(x[living] for x in layer) for layer in self.prompt]
        self.bias = self.bias[living]
        self._place_rows()

    def _place_rows(self) -> None:
        """Index from rows to (P, k), the rows of a prompt side by side with gaps, and back; for
        each of H heads.
        """
        P, H, R = len(self.bias), self.prompt[0][0].shape[1], len(self.group)
        count = self.group.bincount(minlength=P)
        order, k = self.group.argsort(stable=True), int(count.max())
        rank = torch.arange(R, device=order.device) - (count.cumsum(0) - count)[self.group[order]]
        row = order.new_zeros(P, 1, k)  # a gap computes row 0 once more, and is never read
        row[self.group[order], 0, rank] = order
        head = torch.arange(H, device=order.device)
        self.side_by_side = (row * H + head[:, None]).flatten()  # (P H k) into (R H)
        place = torch.empty_like(order).index_copy_(0, order, self.group[order] * H * k + rank)
        self.back = (place[:, None] + head * k).flatten()  # (R H) into (P H k)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.t is None else self.bias.shape[-1] + self.width

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs):
        """What a layer attends to: in the prompt its own tensors, then the cache and the layer's
        index.
        """
        if self.t is None:
            self.prompt.append((key, value))
            return key, value
        if len(self.own) == layer_idx:  # the first step of a wave
            shape = len(key), key.shape[1], columns(self.T), key.shape[3]
            size = math.prod(shape)
            if layer_idx not in self.buffers or self.buffers[layer_idx][0].numel() < size:
                self.buffers[layer_idx] = [x.new_zeros(size) for x in (key, value)]
            self.own.append([x[:size].view(shape) for x in self.buffers[layer_idx]])
        for buffer, new in zip(self.own[layer_idx], (key, value)):
            if buffer.is_cuda:  # nothing is read back, so that a step can be recorded
                buffer.index_copy_(2, self.t, new)
            else:  # four times as fast
                buffer[:, :, int(self.t)] = new[:, :, 0]
        return self, layer_idx

    def attend(self, layer_idx: int, query: Tensor, scaling: float) -> Tensor:
        """One softmax over the prompt's columns and the row's own: query (R, heads, 1, D) -> (R, 1,
        heads, D).
        """
        own_key, own_value = (x[:, :, : self.width] for x in self.own[layer_idx])  # (R, H, t, D)
        prompt_key, prompt_value = self.prompt[layer_idx]  # (P, H, L, D)
        R, H, _, D = own_key.shape
        q = query.reshape(R, H, -1, D) * scaling  # (R, H, heads / H, D)
        scores = torch.cat(
            [
                self._by_prompt(q, prompt_key.transpose(-1, -2), self.bias),
                q @ own_key.transpose(-1, -2) + self.own_bias,
            ],
            -1,
        )
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
            q.dtype
        )
        to_prompt, to_own = weights.split([prompt_key.shape[2], self.width], -1)
        return (self._by_prompt(to_prompt, prompt_value) + to_own @ own_value).reshape(R, 1, -1, D)

    def _by_prompt(self, x: Tensor, y: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """x (R, H, n, D) times its prompt's y (P, H, D, m), as one product for all rows of a
        prompt: (R, H, n, m).
        """
        (R, H, n, D), (P, *_, m) = x.shape, y.shape
        # (P, H, k n, m)
        z = x.reshape(R * H, n * D).index_select(0, self.side_by_side).view(P, H, -1, D) @ y + bias
        return z.view(-1, n * m).index_select(0, self.back).view(R, H, n, m)


def columns(T: int) -> int:
    return max(2, -(-T // COLUMNS)) * COLUMNS


def _attention(
    module, query: Tensor, key, value, mask: Tensor, scaling: float | None = None, **kwargs
):
    """Attention of a `PrefixCache` in transformers' interface: query (R, heads, L, D) -> (R, L,
    heads, D).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, PrefixCache):
        return key.attend(value, query, scaling), None
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


AttentionInterface.register("minictrl_prefix", _attention)


class RepeatedCache:
    """The plain path, for any other family: transformers' own cache and attention, the prompt
    repeated for every row. Its state is the logits, which the family may cap or scale."""

    def __init__(self, model):
        self.model = model

    def prefill(self, ids: Tensor, mask: Tensor, group: Tensor, T: int) -> Tensor:
        self.cache, self.mask = DynamicCache(), mask
        state = self._forward(ids, (mask.cumsum(1) - 1).clamp(min=0))[group]
        self.compact(group)
        return state

    def widen(self, T: int) -> None:
        """Nothing: its cache grows by itself."""

    def step(self, token: Tensor, position: Tensor, t: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(token, position)

    def head(self, state: Tensor) -> Tensor:
        return at_least_float32(state)

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        return forward(
            self.model, ids, self.cache, last=1, attention_mask=self.mask, position_ids=position_ids
        ).logits[:, -1]

    def compact(self, index: Tensor) -> None:
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)


@contextmanager
def decoding(model):
    """Dropout off and, but on the plain path, `_attention` in transformers' forward; both as they
    were on leaving.
    """
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if not is_plain(model):
        model.config._attn_implementation = "minictrl_prefix"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        model.train(training)


def fitting_rows(model, L: int, T: int) -> int:
    """Rows whose keys and values take 1/2 GB on a CPU, a third of what is free on a GPU; 2,048 at
    most. L, T: tokens of the prompt, which the plain path repeats, and of the response.
    """
    c, weight = model.config, model.get_input_embeddings().weight

    def width(c) -> int:  # of a layer's keys
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        return heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)

    layers = getattr(c, "per_layer_config", [c] * c.num_hidden_layers)  # Gemma 4's differ
    tokens = L + T if is_plain(model) else columns(T)
    row = 2 * sum(map(width, layers)) * tokens * weight.element_size()
    memory = free_memory(weight.device) // 3 if weight.is_cuda else 2**29
    return min(2048, max(32, memory // row))
