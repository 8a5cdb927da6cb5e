"""Any of the N draws but the best and the worst quarter (rounded down): N = 4 is the median."""

from minictrl.procedures.base import ByRank


class Procedure(ByRank):
    def rank_weights(self, n: int) -> list[float]:
        cut = [0] * (n // 4)
        return [*cut, *[1] * (n - 2 * len(cut)), *cut]
