"""PPO on the calibrated and transformed reward, with a KL penalty: InfAlign-CTRL (Algorithm 1)."""

from minictrl.methods.base import Online


class Method(Online):
    """What `Online` is: R = Phi(C_hat) / beta."""
