"""The log-probabilities of given responses: one forward for everything that trains."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minictrl.lm.kvcache import forward, head_logits, is_plain


def sequence_logprobs(
    model,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    return_hidden: bool = False,
):
    """log pi(token) of given responses, by one forward over prompt and response, with gradient if
    enabled.

    prompt_ids, prompt_mask: (B, L) left-padded, from `left_pad`. tokens, mask: (B, T),
    right-padded, as in `Samples`. Returns (B, T) float32, nats, 0 where mask is 0; with
    return_hidden also the last hidden states (B, T, D), those at t the state *before* token t,
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
    picked = -F.cross_entropy(logits, tokens[kept], reduction="none")
    logprobs = picked.new_zeros(tokens.shape).masked_scatter(kept, picked).float()
    return (logprobs, hidden) if return_hidden else logprobs


def response_logits(
    model, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits (mask.sum(), V) float32 that each token that counts was drawn from, row by row,
    and the (B, T, D) last hidden states. Arguments as those of `sequence_logprobs`, which checks
    them."""
    before, kept = slice(-tokens.shape[1] - 1, -1), mask.bool()  # states before a token
    attention_mask = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1)
    extra = {"output_hidden_states": True} if is_plain(model) else {}
    out = forward(
        model,
        torch.cat([prompt_ids, tokens], 1),
        last=tokens.shape[1] + 1,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        **extra,
    )
    if is_plain(model):
        hidden, logits = out.hidden_states[-1][:, before], out.logits[:, before][kept].float()
    else:  # the head only where a token counts
        hidden = out.last_hidden_state[:, before]
        logits = head_logits(model, hidden[kept])
    return logits, hidden
