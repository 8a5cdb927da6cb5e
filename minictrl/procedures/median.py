"""The draw with the median reward of N; for an even N either of the two in the middle."""

from minictrl.procedures.base import ByRank


class Procedure(ByRank):
    def rank_weights(self, n: int) -> list[float]:
        cut = [0] * ((n - 1) // 2)
        return [*cut, *[1] * (n - 2 * len(cut)), *cut]
