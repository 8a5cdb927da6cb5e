"""Where Best-of-N stops helping: the reward model selects, and the judge says when to stop."""

from pathlib import Path

import torch
from torch import Tensor

from minictrl.figures import panels
from minictrl.procedures import get_procedure
from minictrl.studies.sweep import VARIANTS, Scores, redrawn, sweep
from minictrl.studies.tables import SCORERS, Rows, grouped, where
from minictrl.studies.trained import draw_over_n
from minictrl.winrate import beaten, mean_stderr

RESAMPLES = 1000  # of the prompts


def hedge(out: Path, quick: bool):
    """At which N does Best-of-N peak, by reward and by judge, against one response of pi_ref?

    For pi_ref and for one policy of each of four methods, up to half of the samples. peak_share: in
    how many of 1,000 resamples of the prompts the curve is highest at this N.

    Paper: not InfAlign's question but HedgeTune's (arXiv 2506.19248): while the reward goes on
    rising with N, the judge's opinion rises, then falls.
    """
    methods = {name: VARIANTS[name] for name in ("none", "identity", "exp10", "grpo")}
    runs = sweep(out, quick, methods, budgets=(2.0,) if quick else (1.0,), seeds=1)
    table = []
    for (method, run), group in grouped(runs, "method", "run").items():
        pi, pi_ref = redrawn(Path(run), group[0])
        most = group[0]["samples"] // 2
        if not table:  # every run's pi_ref has the same samples
            table += best_of_curve("pi_ref", *split_samples(pi_ref), most)
        table += best_of_curve(method, pi, pi_ref, most)
    figure, axes = panels(1, len(SCORERS))
    for axis, scorer in zip(axes, SCORERS):
        draw_over_n(axis, where(table, scorer=scorer), "n", by="method")
        axis.set_title(f"Best-of-N over one of pi_ref, by {scorer}")
    return table, figure


def split_samples(scores: Scores) -> tuple[Scores, Scores]:
    """Each prompt's samples in two: those that Best-of-N draws from, and those that it meets."""
    pairs = {name: x.tensor_split(2, dim=1) for name, x in scores.items()}
    return tuple({name: pair[half] for name, pair in pairs.items()} for half in (0, 1))


def best_of_curve(method: str, pi: Scores, pi_ref: Scores, most: int) -> Rows:
    """The win rate of Best-of-N of pi over one response of pi_ref, N = 1, 2, 4 .. most, by scorer.

    stderr is over prompts, which all N share: `peak_share` says which N is the best.
    """
    sizes = [2**i for i in range(most.bit_length())]
    kept = [get_procedure("bon").weights(pi["reward"].double(), n) for n in sizes]
    rows = []
    for scorer in SCORERS:
        one = torch.full_like(pi_ref[scorer].double(), 1 / pi_ref[scorer].shape[1])
        beats = beaten(pi[scorer].double(), pi_ref[scorer].double(), one)  # (P, M)
        wins = torch.stack([(weight * beats).sum(1) for weight in kept], 1)  # (P, sizes)
        for n, each, share in zip(sizes, wins.T, peak_shares(wins)):
            win_rate, stderr = mean_stderr(each)
            row = {"method": method, "scorer": scorer, "n": n}
            rows.append(row | {"win_rate": win_rate, "stderr": stderr, "peak_share": share})
    return rows


def peak_shares(wins: Tensor) -> list[float]:
    """How often each column of wins (P, sizes) has the highest mean, over resamples of the P."""
    P = len(wins)
    drawn = torch.randint(P, (RESAMPLES, P), generator=torch.Generator().manual_seed(0))
    peaks = wins[drawn].mean(1).argmax(1)
    return (peaks.bincount(minlength=wins.shape[1]) / RESAMPLES).tolist()


STUDIES = (hedge,)
