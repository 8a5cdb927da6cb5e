"""Best-of-N: the draw with the highest reward of N (Lemma 5)."""

from minictrl.procedures.base import ByRank


class Procedure(ByRank):
    def rank_weights(self, n: int) -> list[float]:
        return [0] * (n - 1) + [1]
