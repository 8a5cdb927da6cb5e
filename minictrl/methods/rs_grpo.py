"""RS-GRPO (Jiang et al. 2025, arXiv 2509.24261): an exponential utility, log E[e^{t C_hat}] / t.

t > 0 seeks risk, as Best-of-N rewards it; t < 0 avoids it. It is the t of the transform exp<t>,
and on a calibrated reward the two have one optimum, for another beta: this is the paper's
exponential tilting (Eq. 11) with an advantage that its group's mean keeps below G / |t|.

Departures: the reward is C_hat, because e^{t r} needs a bounded one; and there is a KL.
"""

from minictrl.config import Config
from minictrl.methods.maxrl import Method as MaxRL
from minictrl.transforms import tilt_of


class Method(MaxRL):
    transform = None
    default_transform = "exp5"

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if tilt_of(config.transform) is None:
            raise ValueError(
                f"--transform {config.transform}: rs_grpo has exp<t>, t being the risk it seeks; "
                f"use {cls.default_transform}, exp-5 or the like"
            )

    @property
    def t(self) -> float:
        return tilt_of(self.config.transform)
