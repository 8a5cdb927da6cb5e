"""The one place where the name of a method becomes a function.

Online methods draw G responses a prompt from the current policy, and differ in their advantages.
Offline methods train on the reference samples of the calibration, and differ in their rows and
loss. A new one is one function here, its name in ONLINE or OFFLINE (and in config.py's METHODS). R
is Phi(C_hat) / beta: the objective in units of the KL.

P prompts, G samples a prompt, K reference samples, T tokens. Rows are flat: B = P G.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minictrl import ppo, theory, transforms
from minictrl.config import RAW, Config
from minictrl.methods import baselines
from minictrl.reference import Reference
from minictrl.update import Loss, Rows

# --- online: rows of a rollout, settings, beta, the reference samples of its prompts -> advantages
# (B, T) ---


def ppo_advantages(rows: Rows, config: Config, beta: float, reference: Reference) -> Tensor:
    """PPO, k1 in the reward: GAE on the values of a value head or of the prefix; or the reward to
    go minus the mean return of the other samples.

    The others are those of all prompts: calibration gives their returns one law, so the mean of
    many is the better baseline, above all for exp-10, where one bad response in a group of 8 would
    lift the other 7. Raw rewards differ from prompt to prompt: there the others are the prompt's
    own.
    """
    # what a head that starts at 0 can learn at once
    R = rows["R"] - rows["R"].mean() if "values" in rows else rows["R"]
    rewards = ppo.token_rewards(R, rows["old_logprobs"], rows["ref_logprobs"], rows["mask"])
    to_go = rewards.flip(1).cumsum(1).flip(1)
    if "C_hat_prefix" in rows:
        rows["values"] = ppo.prefix_values(to_go, rows["C_hat_prefix"], rows["mask"])
    if "values" in rows:
        advantages, rows["returns"] = ppo.gae(rewards, rows["values"], rows["mask"], lam=config.lam)
        return advantages
    returns = rewards.sum(1).view(-1, config.G if config.transform in RAW else len(rewards))
    # a token isn't blamed for the KL of those before it
    baseline = (returns - ppo.loo_advantages(returns)).view(-1, 1)
    return (to_go - baseline) * rows["mask"]


def grpo_advantages(rows: Rows, config: Config, beta: float, reference: Reference) -> Tensor:
    """GRPO: the reward, raw, standardised within its group of G; the KL as in PPO."""
    rows["R"] = baselines.grpo_advantages(rows["r"].view(-1, config.G)).flatten() / beta
    return ppo_advantages(rows, config, beta, reference)


def pkpo_advantages(rows: Rows, config: Config, beta: float, reference: Reference) -> Tensor:
    """PKPO: the win rate after the procedure itself, as E[max of g over N draws] (or min); the KL
    as in PPO.
    """
    g, n = rows["C_hat"].view(-1, config.G), 1 if config.procedure == "standard" else config.n
    if config.procedure == "won":
        wins = baselines.min_at_n_advantages(1 - (1 - g) ** n, n, baseline=n > 1)
    else:
        wins = baselines.max_at_n_advantages(g**n, n, baseline=n > 1)
    rows["R"] = wins.flatten() / beta
    return ppo_advantages(rows, config, beta, reference)


def bond_advantages(rows: Rows, config: Config, beta: float, reference: Reference) -> Tensor:
    """BoND: Phi = log, and beside each response the best of n reference samples, for the forward
    half of the divergence.
    """
    advantages = ppo_advantages(rows, config, beta, reference)
    # (P, up to G) groups of n
    best = baselines.best_and_worst(reference.r_ref, best_of(beta))[0][:, : config.G]
    best = best.repeat(1, -(-config.G // best.shape[1]))[:, : config.G]  # (P, G)
    of = torch.arange(len(best))[:, None]
    for name, x in (("tokens", reference.tokens), ("mask", reference.mask)):
        # (B, 2, T)
        rows[name] = torch.stack([rows[name], x[of, best].flatten(0, 1).to(rows[name])], 1)
    return advantages


ONLINE = {
    "ppo": ppo_advantages,
    "bond": bond_advantages,
    "grpo": grpo_advantages,
    "pkpo": pkpo_advantages,
}


def online_loss(
    logprobs: Tensor, values: Tensor | None, rows: Rows, *, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, plus the value head's error where there is one."""
    mask, best_logprobs = rows["mask"], None
    if mask.dim() == 3:  # BoND: a response of pi's, and one of pi_ref's best
        mask, logprobs, best_logprobs = mask[:, 0], logprobs[:, 0], logprobs[:, 1].sum(1)
        values = None if values is None else values[:, 0]
    loss, stats = ppo.policy_loss(logprobs, rows["old_logprobs"], rows["advantages"], mask, clip)
    if best_logprobs is not None:
        loss = baselines.jeffreys_loss(loss, best_logprobs)
    if values is not None:
        stats["value_loss"] = ppo.value_loss(values, rows["returns"], mask)
        loss = loss + stats["value_loss"]
    return loss, stats


def rollout_metrics(rows: Rows, r: Tensor, C_hat: Tensor, Phi: Tensor) -> dict[str, float]:
    """Means over a rollout: rewards, KL(pi || pi_ref) in nats per response (k1), entropy in nats
    per token.

    Responses to one prompt are not independent: the KL's standard error is that over prompts.
    """
    kl = (rows["old_logprobs"] - rows["ref_logprobs"]).sum(1)  # (B G,)
    independent = kl.view(r.shape).mean(1) if len(r) > 1 else kl
    kl_stderr = independent.std() / len(independent) ** 0.5
    metrics = {
        "reward": r.mean(),
        "C_hat": C_hat.mean(),
        "Phi": Phi.mean(),
        "kl_ref": kl.mean(),
        "kl_ref_stderr": kl_stderr,
        "entropy": -rows["old_logprobs"].sum() / rows["mask"].sum(),
    }
    return {name: float(value) for name, value in metrics.items()}


# --- offline: (the reference samples, …) -> (rows, loss), the rows of one epoch ---


def qrpo(reference: Reference, *, Phi, beta: float, **_) -> tuple[Rows, Loss]:
    """QRPO: regression of log pi/pi_ref on Phi(C_hat)/beta - log Z, each reference sample against
    the other K - 1.

    Z is the mean of e^R over the prompt's own K samples, so that ties are in it; without ties it is
    `log_partition`.
    """
    C_hat = baselines.leave_one_out_calibration(reference.r_ref)
    R = transforms.in_nats(Phi(C_hat.double()), Phi, beta)  # (P, K)
    log_Z = (R.logsumexp(1, keepdim=True) - math.log(R.shape[1])).expand_as(R)
    rows = responses(reference) | {"R": R.float().flatten(), "log_Z": log_Z.float().flatten()}

    def loss(logprobs, values, rows):
        sums = logprobs.sum(-1), rows["ref_logprobs"].sum(-1)
        return baselines.qrpo_loss(*sums, rows["R"], rows["log_Z"]), {}

    return rows, loss


def ipo(reference: Reference, *, beta: float, seed: int, **_) -> tuple[Rows, Loss]:
    """IPO on random pairs of reference samples, the reward saying which is preferred; tau is
    beta.
    """

    def loss(logprobs, values, rows):
        return baselines.ipo_loss(
            *logprobs.sum(-1).T, *rows["ref_logprobs"].sum(-1).T, tau=beta
        ), {}

    return pairs(reference, 2, seed), loss


def bonbon(reference: Reference, *, beta: float, seed: int, **_) -> tuple[Rows, Loss]:
    """BoNBoN: SFT on the best of n reference samples, IPO on best and worst; n is the one whose KL
    is the budget's.
    """
    n = best_of(beta)

    def loss(logprobs, values, rows):
        return baselines.bonbon_loss(*logprobs.sum(-1).T, *rows["ref_logprobs"].sum(-1).T, n=n), {}

    return pairs(reference, n, seed), loss


def grpo_fixed(reference: Reference, *, beta: float, clip: float, **_) -> tuple[Rows, Loss]:
    """GRPO's first outer iteration, its rollouts pi_ref's K samples (the paper's controlled
    setting, App. E.1), with the loss as published: the clipped surrogate on standardised rewards,
    plus k3, each response's mean over its tokens."""
    rows = responses(reference) | {
        "advantages": baselines.grpo_advantages(reference.r_ref).flatten() / beta
    }

    def loss(logprobs, values, rows):
        mask, ref_logprobs = rows["mask"], rows["ref_logprobs"]
        lengths = mask.sum(1)  # (B,)
        advantages = (rows["advantages"] / lengths)[:, None]
        surrogate, stats = ppo.policy_loss(logprobs, ref_logprobs, advantages, mask, clip)
        k3 = ppo.k3(logprobs, ref_logprobs).masked_fill(mask == 0, 0).sum(1) / lengths
        return surrogate + k3.mean(), stats

    return rows, loss


OFFLINE = {"qrpo": qrpo, "ipo": ipo, "bonbon": bonbon, "grpo_fixed": grpo_fixed}


# --- helpers ---


def best_of(beta: float) -> int:
    """The n whose Best-of-n is nearest to the log transform at beta = 1/(n - 1)."""
    return max(2, round(1 / beta) + 1)


def beta_for(config: Config, kl: float, r_ref: Tensor | None = None) -> float | None:
    """beta at which the optimum of the run's objective is `kl` nats from pi_ref, by the theory of
    what its method converges to.

    Raw rewards have no theory: theirs is that of r_ref (P, K), None without. GRPO's standardised
    reward is taken for a normal one, of deviation 1: KL = 1 / (2 beta^2). Raises ValueError on a KL
    out of reach of the theory or of K samples.
    """
    if config.method in ("grpo", "grpo_fixed"):
        return 1 / math.sqrt(2 * kl)
    if config.transform in RAW:
        return (
            None
            if r_ref is None
            else empirical_beta(transforms.RAW[config.transform](r_ref, r_ref), kl)
        )
    if kl >= math.log(config.K + 1):
        raise ValueError(
            f"--kl {kl:g} is out of reach of {config.K} samples, whose C_hat takes {config.K + 1} values: ask for "
            f"less than {math.log(config.K + 1):.2f}, or take more samples (--K)"
        )
    beta = theory.beta_for_kl(config.transform, kl, procedure=config.procedure, n=config.n)
    if config.method in ("bond", "bonbon") and best_of(beta) > config.K:
        raise ValueError(
            f"--kl {kl:g} is out of reach of {config.K} samples: it is Best-of-{best_of(beta)}'s; use a smaller "
            "KL, or more samples (--K)"
        )
    return beta


def keep_to_budget(
    asked: float, kl_ref: float, kl: float, beta_at: Callable[[float], float]
) -> tuple[float, float]:
    """(asked, beta) of an update, for the KL `kl_ref` of its rollout and a budget `kl` in nats.

    beta is the multiplier of the constraint KL = budget. The theory's holds for the best policy
    there is. One that doesn't get there has another: with the theory's, exp10 ends at half of its
    budget. So beta is the theory's for another KL, which makes the steps alike for all transforms:
    asked * kl / kl_ref, where `asked` starts at the budget and moves slowly against log(kl_ref /
    kl) (a proportional-integral controller, in logarithms). What is out of reach starts anew at the
    budget.
    """
    off = min(1.5, max(-0.5, math.log(max(kl_ref, 1e-9) / kl)))
    asked = min(4 * kl, max(kl / 20, asked * math.exp(-0.1 * off)))
    try:
        return asked, beta_at(asked * math.exp(-off))
    except ValueError:  # out of reach, of the theory or of K samples
        return kl, beta_at(kl)


def empirical_beta(r_ref: Tensor, kl: float) -> float:
    """beta for raw rewards, which have no theory: pi_ref e^{r / beta} / Z is `kl` nats from pi_ref,
    on average over the prompts of r_ref (P, K), as far as K samples can tell."""
    r = r_ref.double() - r_ref.double().mean(1, keepdim=True)

    def kl_at(log_beta: float) -> float:
        R = r / math.exp(log_beta)
        weights = R.softmax(1)
        return float(((weights * R).sum(1) - R.logsumexp(1) + math.log(r.shape[1])).mean())

    spread = math.log(float(r.std()) + 1e-12)
    low, high = spread - 12, spread + 12
    if kl_at(low) < kl:
        raise ValueError(
            f"--kl {kl}: raw rewards reach {kl_at(low):.2f} nats with {r.shape[1]} samples; use a smaller KL or "
            "more samples (--K)"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) > kl else (low, middle)
    return math.exp((low + high) / 2)


def responses(reference: Reference) -> Rows:
    """All P K reference samples, a row each; `of` is a row's prompt."""
    P, K = reference.r_ref.shape
    return {
        "of": torch.arange(P).repeat_interleave(K),
        "tokens": reference.tokens.flatten(0, 1).long(),
        "mask": reference.mask.flatten(0, 1).float(),
        "ref_logprobs": reference.logprobs.flatten(0, 1),
    }


def pairs(reference: Reference, n: int, seed: int) -> Rows:
    """Best and worst of each n reference samples, a row each: tokens, mask, ref_logprobs (B, 2,
    T).
    """
    best, worst = baselines.best_and_worst(reference.r_ref, n, torch.Generator().manual_seed(seed))
    of = torch.arange(len(best)).repeat_interleave(best.shape[1])
    index = torch.stack([best.flatten(), worst.flatten()], 1)  # (B, 2)
    return {
        "of": of,
        "tokens": reference.tokens[of[:, None], index].long(),
        "mask": reference.mask[of[:, None], index].float(),
        "ref_logprobs": reference.logprobs[of[:, None], index],
    }
