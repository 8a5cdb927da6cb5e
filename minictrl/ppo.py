"""PPO for a response of T tokens: rewards per token, advantages and losses, as pure functions on
tensors.

The objective of one response y is R(x, y) - sum_t (log pi - log pi_ref), KL in nats per response.
The *whole* objective is divided by beta: R is Phi(C_hat) / beta (`Transform.in_nats`) everywhere
in this file. The optimum pi_ref e^R / Z (Eq. 5, Theorem 1) is the same and one learning rate fits
every transform, though their beta spans seven decades.

Where implementations of PPO differ, this one is chosen so that nothing moves that optimum (but
for a lambda below 1, see `train.py`):
1. No whitening or scaling of rewards: each of them is another beta.
2. The KL is k1 = log pi - log pi_ref of the sampled token, *in the reward*: its gradient is that of
   KL(pi || pi_ref). (k3 as a loss term looks alike, but its gradient is that of the forward KL,
   KL(pi_ref || pi).)
3. Losses of the policy are summed over tokens and averaged over responses: a mean over the tokens
   of each response would weigh a response by 1 / length, and that does move the optimum.
4. EOS counts, nothing after it does. A response cut by the length limit ends there (pi_ref is cut
   likewise), so its last value is not bootstrapped.

B responses, T response tokens, P prompts, G samples a prompt. mask (B, T) is 1 on response tokens,
which come first. What stands behind the mask, even a NaN, is never read.
"""

import torch
from torch import Tensor

from minictrl.checks import at_least_float32, number, positive, same_shape

RIDGE = 0.02  # of prefix_values, per response, on standardised features


def _checked(mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """The mask as booleans, and the tensors as float32 at least, 0 behind it: 0 times NaN
    would be NaN, in a gradient too. ValueError unless all have one shape, and the mask is 0 and 1,
    right-padded, without an empty response.
    """
    same_shape(", (B, T)", 2, mask=mask, **tensors)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be 0 and 1 alone: 1 on response tokens; weigh losses instead")
    mask = mask.bool()
    if not mask.numel():
        raise ValueError(f"mask is {tuple(mask.shape)}: there must be a response and a token")
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "mask must be 1 on every response's first tokens, 0 after (right-padded, none empty): "
            "keep the EOS in the mask, and pad on the right"
        )
    return [mask, *(at_least_float32(x).masked_fill(~mask, 0) for x in tensors.values())]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (any shape) where mask, of the same shape, is 1: a scalar. ValueError on shapes."""
    same_shape(x=x, mask=mask)
    mask = mask.bool()
    return at_least_float32(x).masked_fill(~mask, 0).sum() / mask.sum()


def token_rewards(R: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Reward of each token: -(log pi - log pi_ref), plus R at the response's last token, in nats
    (objective / beta).

    R: (B,) Phi(C_hat) / beta. logprobs, ref_logprobs: (B, T) of the sampled tokens under pi, as
    sampled, and pi_ref. Returns (B, T), 0 behind the mask. Its sum over tokens is the response's
    return R - sum_t k1.
    """
    mask, logprobs, ref_logprobs = _checked(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if R.shape != mask.shape[:1]:
        raise ValueError(
            f"R is {tuple(R.shape)}: must be ({len(mask)},), one Phi(C_hat) / beta for each "
            "response"
        )
    rewards = ref_logprobs - logprobs
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, R[:, None].to(rewards))


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16): A_t = sum_l (gamma lam)^l
    delta_{t+l}.

    delta_t = r_t + gamma V_{t+1} - V_t, and V = 0 after the last token. All (B, T). Returns
    (advantages, returns), returns = advantages + values being the value head's target, both 0
    behind the mask. lam = 1 gives the reward to go minus V: unbiased whatever V is.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number(name, value) <= 1:
            raise ValueError(f"{name} is {value}: must be between 0 and 1")
    _, token_rewards, values = _checked(mask, token_rewards=token_rewards, values=values)
    advantages, next_value, next_advantage = [], 0, 0
    # behind the mask all terms are 0, so each response starts from 0
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages.append(next_advantage)
    advantages = torch.stack(advantages[::-1], 1)
    return advantages, advantages + values


def prefix_values(to_go: Tensor, C_hat_prefix: Tensor, mask: Tensor) -> Tensor:
    """Values V_t = E[reward to go | y_<t] without a value head: a cubic in C_hat of the response so
    far, one for each t.

    to_go, C_hat_prefix: (B, T) sum of the token rewards from t on, and calibrated reward of the
    prompt with y_<t. The cubic is the ridge regression of to_go on the other responses of the
    batch (leave-one-out, by the leverage h of each), so no value has seen its own sample. Where a
    response is the only one left, it keeps its value of one token earlier. Returns (B, T), 0
    behind the mask.
    """
    mask, to_go, C_hat_prefix = _checked(mask, to_go=to_go, C_hat_prefix=C_hat_prefix)
    cubic = [C_hat_prefix, C_hat_prefix**2, C_hat_prefix**3]
    features = torch.stack(cubic, -1).double()  # (B, T, 3)
    values = torch.zeros_like(to_go)
    for t in range(mask.shape[1]):
        alive = mask[:, t]
        count = int(alive.sum())
        if count == 0:
            break
        if count == 1:
            values[alive, t] = values[alive, t - 1] if t else 0.0
            continue
        x, y = features[alive, t], to_go[alive, t].double()
        # all 0 where nothing tells the prefixes apart
        x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-6)
        ridge = RIDGE * count * torch.eye(3, dtype=x.dtype, device=x.device)
        inverse = torch.linalg.inv(x.T @ x + ridge)
        fitted = y.mean() + x @ (inverse @ (x.T @ (y - y.mean())))
        h = 1 / count + ((x @ inverse) * x).sum(1)  # (count,) share of its own y in each
        values[alive, t] = ((fitted - h * y) / (1 - h)).to(values)
    return values


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ratio - 1 - log ratio, ratio = pi_ref / pi of a token sampled from pi: its mean is KL(pi ||
    pi_ref), it is >= 0.

    For reports, and for GRPO's original loss. As a loss its gradient is that of KL(pi_ref || pi).
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    logratio = at_least_float32(ref_logprobs) - at_least_float32(logprobs)
    return logratio.exp() - 1 - logratio


def loo_advantages(returns: Tensor) -> Tensor:
    """Leave-one-out advantages (RLOO, Kool et al. 2019): a return minus the mean of its
    row's others.

    returns: (P, G), the G responses of each prompt, or (1, P G), those of all prompts together.
    Returns that shape, the same for all tokens of a response. The baseline doesn't contain the
    sample itself, so the gradient is unbiased and its scale right for any row of two or more.
    """
    if returns.dim() != 2 or returns.shape[1] < 2:
        raise ValueError(
            f"returns is {tuple(returns.shape)}: must be (P, G), with rows of two returns or more"
        )
    returns, G = at_least_float32(returns), returns.shape[1]
    return (returns - returns.mean(1, keepdim=True)) * (G / (G - 1))


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (PPO, Schulman et al. 2017, Eq. 7), to be minimised. All (B, T);
    differentiable in logprobs.

    Summed over tokens, averaged over the B responses: the policy gradient of the objective per
    response, whatever the lengths, and micro-batches of one size can be averaged. Advantages (B, 1)
    hold for every token of a response. Stats, means over tokens: approx_kl (KL(pi_old || pi) in
    nats a token, by k3), clipfrac (share of ratios outside 1 +- clip).
    """
    clip = positive("clip", clip)
    mask, logprobs, old_logprobs = _checked(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    if advantages.shape not in (mask.shape, (len(mask), 1)):
        raise ValueError(
            f"advantages is {tuple(advantages.shape)}, mask is {tuple(mask.shape)}: must be "
            "(B, T), or (B, 1) for all tokens of a response"
        )
    ratio = (logprobs - old_logprobs).exp()
    advantages = at_least_float32(advantages).expand_as(ratio).masked_fill(~mask, 0)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        stats = {
            "approx_kl": masked_mean(k3(old_logprobs, logprobs), mask),
            "clipfrac": masked_mean(((ratio - 1).abs() > clip).float(), mask),
        }
    return -surrogate.sum() / len(mask), stats


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error over tokens, on returns of objective / beta as they are. All (B,
    T). No clipping.
    """
    mask, values, returns = _checked(mask, values=values, returns=returns)
    return masked_mean((values - returns).square(), mask) / 2


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over tokens: 1 if the values are perfect, 0 if no
    better than a constant, negative if worse.

    0 where the returns differ by no more than rounding.
    """
    mask, values, returns = _checked(mask, values=values, returns=returns)
    returns, error = returns[mask], (returns - values)[mask]
    variance, rounding = returns.var(correction=0), 1e-6 * returns.abs().amax()
    return torch.where(variance <= rounding**2, 0.0, 1 - error.var(correction=0) / variance)
