"""The methods that CTRL is compared with: each one loss or one kind of advantages, a pure function
on tensors.

| method | what it is here | where it ends (one prompt, any policy representable) |
|---|---|---|
| IPO | `ipo_loss` on random pairs of reference samples | pi_ref e^{C / tau}: the identity transform, beta = tau |
| BoNBoN | `bonbon_loss` on the best and worst of n | near Best-of-n of pi_ref |
| BoND | `--transform log` with beta = 1 / (N - 1), and `jeffreys_loss` | Best-of-N of pi_ref |
| vBoN | `--transform log` as it is: its reward is the log of the estimated CDF (Amini et al. 2024) | the same |
| GRPO | `grpo_advantages` into `ppo.policy_loss` | pi_ref e^{R} with the KL in the return, undivided |
| QRPO | `qrpo_loss` on the calibration's own samples | pi_ref e^{Phi / beta}, the same as CTRL |
| PKPO | `max_at_n_advantages`, `min_at_n_advantages` | the optimum of InfAlign itself, `theory.optimal_transform` |

Departures from the papers:
1. GRPO's KL goes into the return (k1, `ppo.token_rewards`), not into the loss as k3, whose optimum
   is another policy; and its losses are not averaged over the tokens of a response.
   `methods.grpo_fixed` is the original.
2. QRPO takes the partition function of each prompt's own K samples, ties included; its loss is
   divided by beta^2.
3. J-BOND's backward KL uses the calibrated reward of K samples; its own reward looks at two samples
   of the anchor.

P prompts, K reference samples, G policy samples a prompt, B responses; N (in signatures `n`)
samples at inference. logprobs are sums over the response's tokens, (B,); R is Phi(C_hat) / beta; r
any monotone reward.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _check_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{shapes} must have one shape: one sum of log-probabilities, or one value, a response"
        )


def _check_samples(name: str, x: Tensor, n: int, least: int = 1) -> None:
    if x.dim() != 2 or not least <= n <= x.shape[1]:
        raise ValueError(
            f"{name} is {tuple(x.shape)} and n is {n}: must be (prompts, samples) and {least} <= n <= "
            "samples; take more samples or a smaller n"
        )


# --- preference pairs: IPO, BoNBoN ---


def best_and_worst(
    r_ref: Tensor, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Preference pairs from cached reference samples: the best and the worst of each group of n. n
    = 2: random pairs.

    r_ref: (P, K). Returns two index tensors (P, K // n) into a prompt's K samples. The groups are n
    neighbours (samples are i.i.d.), or with a generator (on the CPU) a new random partition, one an
    epoch. Of equal rewards the first is called best, the last worst: among two, a coin flip, which
    is what IPO asks for.
    """
    _check_samples("r_ref", r_ref, n, least=2)
    P, K = r_ref.shape
    order = (
        torch.arange(K).expand(P, K)
        if generator is None
        else torch.rand(P, K, generator=generator).argsort(1)
    )
    order = order[:, : K // n * n].to(r_ref.device)
    groups, order = r_ref.gather(1, order).view(P, K // n, n), order.reshape(P, K // n, n)
    best, worst = groups.argmax(2, keepdim=True), n - 1 - groups.flip(2).argmin(2, keepdim=True)
    return order.gather(2, best)[..., 0], order.gather(2, worst)[..., 0]


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    tau: float,
) -> Tensor:
    """(h - 1 / (2 tau))^2, h = log pi/pi_ref of the chosen minus that of the rejected (IPO, Azar et
    al. 2023, Eq. 17).

    All (B,). Mean over pairs. On pairs drawn from pi_ref the optimum is pi_ref e^{C / tau} / Z: tau
    is beta.
    """
    _check_shapes(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    if not tau > 0:
        raise ValueError(f"tau is {tau}: must be > 0, it is the KL's strength")
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    return (h - 1 / (2 * tau)).square().mean()


def bonbon_beta(n: int) -> float:
    """beta*_n = 1 / (2 (n-1) sum_{k<n} 1/k) (BoNBoN, Gui et al. 2024): the tau whose target is
    Best-of-n's mean h.

    log pi/pi_ref of Best-of-n is log n + (n-1) log C, and E[log C(best) - log C(worst)] = sum_{k<n}
    1/k.
    """
    if n < 2:
        raise ValueError(f"n is {n}: must be >= 2, the best and the worst of n are two responses")
    return 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))


def bonbon_loss(
    best_logprobs: Tensor,
    worst_logprobs: Tensor,
    ref_best_logprobs: Tensor,
    ref_worst_logprobs: Tensor,
    n: int,
    alpha: float = 0.005,
) -> Tensor:
    """alpha SFT(best of n) + (1 - alpha) IPO(best, worst of n), tau = beta*_n (BoNBoN, Gui et al.
    2024). All (B,).
    """
    ipo = ipo_loss(
        best_logprobs, worst_logprobs, ref_best_logprobs, ref_worst_logprobs, tau=bonbon_beta(n)
    )
    return alpha * -best_logprobs.mean() + (1 - alpha) * ipo


# --- BoND ---


def jeffreys_loss(backward_loss: Tensor, best_logprobs: Tensor, weight: float = 0.5) -> Tensor:
    """weight KL(pi || Best-of-n) + (1 - weight) KL(Best-of-n || pi) (J-BOND's Jeffreys divergence,
    Sessa et al. 2024).

    backward_loss: scalar, `ppo.policy_loss` with R = (n-1) log C_hat, whose gradient is that of
    KL(pi || Best-of-n). best_logprobs: (B,) log pi of the best of n reference samples; the forward
    KL is their SFT loss, up to a constant.
    """
    return weight * backward_loss + (1 - weight) * -best_logprobs.mean()


# --- GRPO ---


def grpo_advantages(returns: Tensor, divide: bool = True) -> Tensor:
    """(return - the group's mean) / the group's standard deviation (GRPO, Shao et al. 2024, Sec.
    4.1.2). (P, G).

    divide = True is the original: it forgets the scale of the reward, so beta means something else
    in each prompt, and it blows up the noise of a group that has nearly converged. Without it, and
    with the KL in the returns, this is (1 - 1/G) times `ppo.loo_advantages`. A group of equal
    returns gets 0.
    """
    _check_samples("returns", returns, 2, least=2)
    centred = returns - returns.mean(1, keepdim=True)
    return centred / (returns.std(1, keepdim=True) + 1e-6) if divide else centred


# --- QRPO ---


def log_partition(Phi: Callable[[Tensor], Tensor], beta: float, K: int) -> float:
    """log Z_K, Z_K = mean of e^{Phi(j/K) / beta} over j = 0..K: C_hat is uniform on {0, 1/K, ...,
    1} under pi_ref.

    K is the number of references that C_hat was measured with, independent of y, without ties; K -
    1 for `leave_one_out_calibration` of K draws, where it is the exact mean over those draws.
    (QRPO, Matrenok et al. 2025, takes K to infinity. With ties, take the prompt's own mean:
    R.logsumexp(1) - log K over its K draws.) For a Phi that depends on K (the floor of the log),
    give the one that R was made with.
    """
    if K < 1 or not beta > 0:
        raise ValueError(f"K is {K}, beta is {beta}: must be K >= 1 references and beta > 0")
    u = torch.arange(K + 1, dtype=torch.float64) / K
    return (Phi(u) / beta).logsumexp(0).item() - math.log(K + 1)


def qrpo_loss(logprobs: Tensor, ref_logprobs: Tensor, R: Tensor, log_Z: float | Tensor) -> Tensor:
    """(R - log Z - log pi/pi_ref)^2, mean over y ~ pi_ref (QRPO, Matrenok et al. 2025): the tilt by
    regression.

    All (B,). R = Phi(C_hat) / beta, log_Z that of the response's prompt: the loss of the paper
    divided by beta^2, so that one learning rate fits every transform. Offline: nothing is drawn
    from pi.
    """
    _check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, R=R)
    return (R - log_Z - (logprobs - ref_logprobs)).square().mean()


def leave_one_out_calibration(r_ref: Tensor) -> Tensor:
    """C_hat of each calibration draw against the prompt's other K - 1 draws, a tie counting one
    half (Eq. 12).

    r_ref: (P, K) rewards of y ~ pi_ref(.|x). Returns (P, K) in [0, 1]. So the calibration's samples
    are a training set.
    """
    _check_samples("r_ref", r_ref, 2, least=2)
    if not r_ref.isfinite().all():
        raise ValueError(
            "r_ref has a reward that is not finite, and NaN loses every comparison: mend the reward model"
        )
    ordered = r_ref.sort(1).values
    less = torch.searchsorted(ordered, r_ref.contiguous())
    less_or_equal = torch.searchsorted(ordered, r_ref.contiguous(), right=True)
    # - 1: no draw meets itself
    wins = (less + less_or_equal - 1).to(torch.promote_types(r_ref.dtype, torch.float32))
    return wins / (2 * (r_ref.shape[1] - 1))


# --- PKPO ---


def max_at_n_advantages(g: Tensor, n: int, baseline: bool = True) -> Tensor:
    """Advantages of E[max of g over n draws of pi], unbiased from G >= n draws (PKPO, Walder &
    Karkhanis 2025).

    g: (P, G), for Best-of-n C_hat^n: its max@n *is* the win rate, so no transform is needed, and
    E[A | C = u] = n E[max(g(u), g of n-1 others)] = Phi_BoN(u) + const (Corollary 2, online).
    Returns (P, G), G s_i of the paper: the scale of `ppo.loo_advantages`, for a mean over
    responses. The KL is no part of the maximum: A / beta + loo_advantages(-sum of k1). baseline (n
    >= 2) subtracts from an n-subset's maximum that of its other n - 1. Never centre these by the
    group's mean: that multiplies them by 1 - n/G, against an unscaled KL.
    """
    _check_samples("g", g, n, least=2 if baseline else 1)
    G = g.shape[1]
    values, order = g.double().sort(1)
    subsets = math.comb(G, n)

    def share(count: Callable[[int], int]) -> Tensor:  # of the n-subsets, for the ranks i = 1..G
        return torch.tensor(
            [count(i) / subsets for i in range(1, G + 1)], dtype=values.dtype, device=g.device
        )

    if baseline:  # y_i is the best of a subset, y_j the second: n - 2 more from the j - 1 below
        second = share(lambda j: math.comb(j - 1, n - 2))
        s = values * (second.cumsum(0) - second) - ((second * values).cumsum(1) - second * values)
    else:  # y_i is the best of its subset, or one of those below the best y_j
        best = share(lambda i: math.comb(i - 1, n - 1))
        with_i = values * share(lambda j: math.comb(j - 2, n - 2) if min(j, n) > 1 else 0)
        s = best * values + with_i.sum(1, keepdim=True) - with_i.cumsum(1)
    return torch.empty_like(s).scatter_(1, order, G * s).to(g)


def min_at_n_advantages(g: Tensor, n: int, baseline: bool = True) -> Tensor:
    """The same for E[min of g over n draws], for Worst-of-n: g = 1 - (1 - C_hat)^n."""
    return -max_at_n_advantages(-g, n, baseline)
