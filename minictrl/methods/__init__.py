"""Methods, one file each: what its responses or rows are worth, its loss, its transform, its beta.

A new method is one file with a class `Method`, of a parent in `base.py`, and its name in METHODS.

| method | what it is here | where it ends (one prompt, any policy representable) |
|---|---|---|
| ppo | CTRL: `ppo.policy_loss` on R = Phi(C_hat) / beta | pi_ref e^R / Z (Theorem 1) |
| grpo | the raw reward, standardised in its group | pi_ref e^R / Z of that reward |
| grpo_fixed | GRPO's loss as published, on the reference samples | its first outer iteration |
| ipo | a regression on random pairs of reference samples | the identity transform, beta = tau |
| bonbon | SFT and IPO on the best and worst of n | near Best-of-n of pi_ref |
| bond | the log transform, plus SFT on the best of n | Best-of-n of pi_ref |
| qrpo | regression on the reference samples | pi_ref e^R / Z, the same as CTRL |
| a2po | the same regression, on responses of the policy | pi_ref e^R / Z, the same as CTRL |
| tpo | shares among n reference samples, by cross-entropy | pi_ref e^R / Z, the same as CTRL |
| pkpo | the win rate after the procedure, without a transform | the optimum of InfAlign itself |
| maxpo | pkpo with centred advantages, for N < G | the optimum of InfAlign itself |
| tea | pkpo for N > G, extrapolated | that optimum, as far as the tail is a power law |
| maxrl | the log of each prompt's standard win rate | the identity transform, as G grows |
| rs_grpo | the log of E[e^{t C_hat}] | the transform exp<t>, as G grows |

vBoN (Amini et al. 2024) is ppo with `--transform log`.
"""

from importlib import import_module

METHODS = ("ppo", "grpo", "grpo_fixed", "ipo", "bonbon", "bond", "qrpo", "a2po", "tpo")
METHODS += ("pkpo", "maxpo", "tea", "maxrl", "rs_grpo")


def get_method(name: str) -> type:
    """The class of a method. Raises ValueError on an unknown name."""
    if name not in METHODS:
        raise ValueError(f"--method {name}: use one of {', '.join(METHODS)}")
    return import_module(f"minictrl.methods.{name}").Method
