"""Worst-of-N: the draw with the lowest reward of N, a model of jailbreaking (Lemma 5)."""

from minictrl.procedures.base import ByRank


class Procedure(ByRank):
    def rank_weights(self, n: int) -> list[float]:
        return [1] + [0] * (n - 1)
