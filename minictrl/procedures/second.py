"""The second best of N draws; the best may be an outlier of the reward model."""

from minictrl.procedures.base import ByRank


class Procedure(ByRank):
    def rank_weights(self, n: int) -> list[float]:
        return [0] * (n - 2) + [1, 0] if n > 1 else [1]
