"""The log-probabilities of given responses: one forward for everything that trains."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minictrl.lm.kvcache import forward, head_logits, is_plain


def sequence_logprobs(
    model, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """log pi(token) of given responses, by one forward over prompt and response, with gradient if
    enabled; and the last hidden states.

    prompt_ids, prompt_mask: (B, L) left-padded, from `left_pad`. tokens, mask: (B, T),
    right-padded, as in `Samples`. Returns (B, T) float32, nats, 0 where mask is 0; and (B, T, D),
    at t the state *before* token t, which a value head reads. Dropout follows the model's own mode.
    """
    logits, hidden = response_logits(model, prompt_ids, prompt_mask, tokens, mask)
    kept = mask.bool()
    picked = -F.cross_entropy(logits, tokens[kept], reduction="none")
    return picked.new_zeros(tokens.shape).masked_scatter(kept, picked).float(), hidden


def response_logits(
    model, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits (mask.sum(), V) float32 that each token that counts was drawn from, row by row,
    and the (B, T, D) last hidden states. Arguments as those of `sequence_logprobs`."""
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
