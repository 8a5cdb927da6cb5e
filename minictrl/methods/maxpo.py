"""MaxPO (Takashiro et al. 2026, arXiv 2606.06080): PKPO's objective, its advantages centred.

PKPO subtracts from an n-subset's maximum that of its other n - 1, so no advantage is negative.
MaxPO compares that with the same of each other response in the group without this one: a
Leave-Two-Out baseline. What is left is the mean maximum of the n-subsets that hold a response,
minus that of those that don't. It is as unbiased, and the advantages of a group sum to 0.
"""

from torch import Tensor

from minictrl.checks import at_least_float32
from minictrl.methods.pkpo import Method as Pkpo
from minictrl.methods.pkpo import max_at_n_advantages


class Method(Pkpo):
    least_G = 2

    @staticmethod
    def largest_n(G: int) -> float:
        """A subset without the response must be left."""
        return G - 1

    def advantages(self, g: Tensor, n: int) -> Tensor:
        return leave_two_out_advantages(g, n)


def leave_two_out_advantages(g: Tensor, n: int) -> Tensor:
    """n (mean maximum of g over the n-subsets with y_i - over those without), from G > n draws.

    g: (P, G), as in `pkpo.max_at_n_advantages`, and the scale is the same. The mean over all
    n-subsets is n/G of the first plus 1 - n/G of the second, so centring the first by the group's
    mean leaves 1 - n/G of the difference. (Written so, it takes no longer than sorting; the
    paper's sums are quadratic in G.) Raises ValueError on G <= n.
    """
    G = g.shape[-1]
    if G <= n:
        raise ValueError(f"g is {tuple(g.shape)} and n is {n}: must be (prompts, more than n)")
    g = at_least_float32(g)
    with_i = max_at_n_advantages(g.double(), n, baseline=False)
    return ((with_i - with_i.mean(1, keepdim=True)) / (1 - n / G)).to(g)
