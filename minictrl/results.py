"""RESULTS.md from what the studies left: `python -m minictrl.results DIR [--page FILE]`.

A study has its picture, the paper's finding, ours in words that are computed from its CSV, and a table. One that has
not been run is left out.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Callable
from pathlib import Path

from minictrl.config import run_script
from minictrl.studies_theory import TITLES
from minictrl.sweep import AWARE, SCORERS, at_kl, common_kl

Finding = tuple[str, list[str], list[list[str]]]  # a sentence, and a table: its head and its lines


def read(path: Path) -> list[dict]:
    """Rows of a study's CSV, numbers as numbers, an empty cell as None."""

    def value(cell: str):
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell

    with open(path, newline="") as file:
        return [{name: value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def percent(win: float, stderr: float) -> str:
    return "–" if math.isnan(win) else f"{100 * win:.1f} ± {100 * stderr:.1f}"


def at_equal_kl(rows: list[dict]) -> Finding:
    """Every method at the largest KL that three quarters of them reach; inference-aware methods against the others."""
    rows = [row | {"seed": 0, "n": int(row["n"])} for row in rows]  # means over seeds: one curve
    kl, methods = common_kl(rows, of=0.75), list(dict.fromkeys(row["method"] for row in rows))
    cases, said, lines = (
        list(dict.fromkeys((row["procedure"], row["n"]) for row in rows)),
        [],
        {m: [m] for m in methods},
    )
    others = [m for m in methods if m not in AWARE["bon"] + AWARE["won"]]
    for procedure, n in cases:
        for scorer in SCORERS:
            found = {m: at_kl(rows, kl, m, procedure, n, scorer) for m in methods}
            for method in methods:
                lines[method].append(percent(*found[method]))
            found = {m: x for m, x in found.items() if not math.isnan(x[0])}
            aware = AWARE.get(procedure, ("identity", "log"))
            groups = [m for m in found if m in aware], [m for m in found if m in others and m not in aware]
            if all(groups):
                ours, other = (max(group, key=lambda m: found[m][0]) for group in groups)
                gain = 100 * (found[ours][0] - found[other][0])
                error = 100 * math.hypot(found[ours][1], found[other][1])
                said.append(
                    f"{TITLES[procedure].format(n=n)} by {scorer}: {ours} against {other}, the best of the others, "
                    f"{gain:+.1f} ± {error:.1f} points"
                )
    head = ["method"] + [f"{TITLES[p].format(n=n)}, {scorer}" for p, n in cases for scorer in SCORERS]
    return f"At {kl:g} nats: " + "; ".join(said) + ".", head, list(lines.values())


def everything(names: list[str], sentence: Callable[[list[dict]], str]) -> Callable[[list[dict]], Finding]:
    """A table of these columns of all rows, under a sentence."""

    def finding(rows: list[dict]) -> Finding:
        cells = [[f"{row[k]:.3g}" if isinstance(row[k], float) else str(row[k] or "–") for k in names] for row in rows]
        return sentence(rows), names, cells

    return finding


def miscalibration(rows: list[dict]) -> Finding:
    worst = {row["text"]: row["largest_distance"] for row in rows}
    sentence = (
        f"Were the reward calibrated, all prompts would lie on one line. The rank among all prompts' samples is up to "
        f"{max(worst.values()):.2f} from the rank for the prompt, at least {min(worst.values()):.2f}."
    )
    return sentence, ["prompt", "largest distance"], [[text, f"{x:.2f}"] for text, x in worst.items()]


def hacking(rows: list[dict]) -> Finding:
    pairs = {
        (r["pairs"], r["model"], r["reward"], r["test"]): (r["accuracy"], r["stderr"])
        for r in rows
        if r["pairs"] != "policy"
    }
    said = [
        f"poisoned model, poisoned test, pairs of {kind}: raw {percent(*pairs[kind, 'poisoned', 'raw', 'poisoned'])}, "
        f"calibrated {percent(*pairs[kind, 'poisoned', 'calibrated', 'poisoned'])}"
        for kind in ("two prompts", "one prompt")
    ]
    policies = [r for r in rows if r["pairs"] == "policy"]
    for reward in ("raw", "calibrated"):
        mine = [r for r in policies if (r["model"], r["reward"]) == ("poisoned", reward)]
        last = {r["scorer"]: r for r in mine if r["budget"] == max(x["budget"] for x in mine)}
        said.append(
            f"policy on the poisoned {reward} reward at {last['reward']['kl']:.2f} nats: "
            f"{100 * last['reward']['win_rate']:.1f} "
            f"by reward, {100 * last['judge']['win_rate']:.1f} by judge, the phrase in "
            f"{100 * last['judge']['phrase_share']:.0f} %"
        )
    lines = [[*key, percent(*x)] for key, x in pairs.items()]
    return "; ".join(said).capitalize() + ".", ["pairs", "model", "reward", "test", "accuracy [%]"], lines


def best_t(rows: list[dict]) -> str:
    said = []
    for procedure, n in dict.fromkeys((row["procedure"], int(row["n"])) for row in rows):
        mine = [row for row in rows if (row["procedure"], row["n"], row["scorer"]) == (procedure, n, "reward")]
        measured, by_theory = (
            max(mine, key=lambda row: row[name] or 0)["transform"] for name in ("win_rate", "theory")
        )
        said.append(f"{TITLES[procedure].format(n=n)}: {measured} (theory: {by_theory})")
    return "Best, by reward: " + "; ".join(said) + "."


def shares(rows: list[dict]) -> str:
    part = rows[0]
    return (
        "Calibration is "
        + ", ".join(
            f"{100 * part[f'share_of_{name}']:.0f} % of the {name.replace('_', ' ')}"
            for name in ("reward_calls", "tokens", "forward_passes", "seconds")
        )
        + "."
    )


def highest(name: str, of: str, text: str) -> Callable[[list[dict]], str]:
    """A sentence on the row with the largest value."""

    def sentence(rows: list[dict]) -> str:
        row = max(
            (row for row in rows if row[name] is not None and not math.isnan(row[name])), key=lambda row: row[name]
        )
        return text.format(row[of], row[name])

    return sentence


# study -> title, the paper's finding, ours
PAGES: dict[str, tuple[str, str, Callable[[list[dict]], Finding]]] = {
    "fig3": (
        "Reward models are miscalibrated",
        "Most prompts deviate from y = x, and each by another amount.",
        miscalibration,
    ),
    "fig4": (
        "Standard, Best-of-4, Worst-of-4",
        "Identity is above IPO, BoNBoN and BoND on helpfulness and harmlessness, on par on "
        "summarisation; exp10 gains up to 3 % (helpfulness) and 8 % (summarisation) on Best-of-4, exp-10 up to 5 % on "
        "Worst-of-4 over the best other method.",
        at_equal_kl,
    ),
    "fig5": (
        "Best-of-2 and 32, Worst-of-2",
        "exp5 is better for N = 2, exp10 for N = 4, as the analysis says, and both are above all others for all N.",
        at_equal_kl,
    ),
    "fig8": ("Best-of-32, Worst-of-32", "The gains on Best-of-N are larger than at N = 4.", at_equal_kl),
    "which_t": (
        "Which t for which N",
        "exp5 for Best-of-2, exp10 for Best-of-4, as theory says without training.",
        everything(["procedure", "n", "transform", "scorer", "kl", "win_rate", "stderr", "theory"], best_t),
    ),
    "fig6": (
        "CTRL, GRPO, Best-of-n: standard",
        "CTRL is similar to GRPO and closes the gap to Best-of-n.",
        at_equal_kl,
    ),
    "fig10": (
        "CTRL, GRPO, BoND, Best-of-n: Best-of-4",
        "CTRL is above GRPO on Best-of-4 and comparable on the standard win rate. "
        "(There the base's rollouts are fixed; here GRPO is the usual, online one.)",
        at_equal_kl,
    ),
    "fig7": (
        "Reward hacking",
        "On the poisoned test the calibrated reward keeps a higher accuracy than the raw one. (On pairs of one "
        "prompt calibration keeps the order, Lemma 2: but for ties nothing can change.)",
        hacking,
    ),
    "fig9": (
        "Expected raw reward",
        "CTRL is above the other methods in expected raw judge reward too.",
        everything(
            ["method", "budget", "seed", "kl", "judge", "reward"],
            highest("judge", "method", "Highest gain by the judge: {}, {:.2f}."),
        ),
    ),
    "fig12": (
        "Rewind-and-repeat",
        "exp transforms are above the baselines; aligned policies need fewer draws.",
        everything(
            ["method", "budget", "scorer", "kl", "win_rate", "stderr", "draws"],
            highest("win_rate", "method", "Highest win rate at any KL: {}, {:.3f}."),
        ),
    ),
    "overhead": (
        "What calibration costs",
        "About 29 % of the training time at K = 100 and 80 epochs.",
        everything(["stage", "reward_calls", "tokens", "forward_passes", "seconds"], shares),
    ),
    "ablation": (
        "What of the calibration matters",
        "“Calibration based on the median rewards per prompt” is named for Worst-of-N (Sec. 5.5); K = 100 throughout.",
        everything(
            ["variant", "procedure", "n", "scorer", "kl", "win_rate", "stderr", "below_optimum"],
            highest("win_rate", "variant", "Highest: {}, {:.3f}."),
        ),
    ),
    "summary": (
        "All methods at equal KL, and their cost",
        "Not in the paper.",
        everything(
            [
                "method",
                "kl",
                "bon4_reward",
                "bon4_reward_stderr",
                "bon4_judge",
                "bon4_judge_stderr",
                "won4_reward",
                "won4_reward_stderr",
                "won4_judge",
                "won4_judge_stderr",
                "bon4_below_optimum",
                "won4_below_optimum",
                "bon4_gain_per_million_calls",
                "bon4_gain_per_minute",
                "train_calls",
                "train_seconds",
            ],
            highest("bon4_gain_per_minute", "method", "Most Best-of-4 win rate for a minute of training: {}, {:.2f}."),
        ),
    ),
    "tuned": (
        "Trained for N, used at another",
        "Both exp transforms are above the baselines at every N.",
        everything(
            ["tuned", "used_at", "scorer", "kl", "win_rate", "stderr", "theory"],
            highest("win_rate", "tuned", "Highest: {}, {:.3f}."),
        ),
    ),
    "held_out": (
        "Training prompts against held-out ones",
        "Not in the paper.",
        everything(
            ["split", "method", "scorer", "kl", "win_rate", "stderr", "below_optimum"],
            highest("below_optimum", "method", "Furthest from the optimum at its KL: {}, {:.1f} points."),
        ),
    ),
}


def page(folder: Path, at: Path) -> str:
    """The page's Markdown, pictures linked from where it will be. Raises ValueError if no study has been run."""
    done = [name for name in PAGES if (folder / f"{name}.csv").is_file()]
    if not done:
        raise ValueError(f"{folder}: holds no study; run python -m minictrl.reproduce NAME --out {folder} first")
    parts = [
        "# Results\n\nMade by `python -m minictrl.results`. Win rates over pi_ref on held-out prompts in per cent, ± "
        "one "
        "standard error over seeds. At equal KL: interpolated linearly in sqrt(KL) between a method's runs.\n"
    ]
    for name in done:
        title, paper, finding = PAGES[name]
        ours, head, lines = finding(read(folder / f"{name}.csv"))
        table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]
        picture = os.path.relpath(folder / f"{name}.png", at.parent)
        parts.append(
            f"## {title} (`{name}`)\n\n*Paper:* {paper}\n\n*Here:* {ours}\n\n![{name}]({picture})\n\n"
            "<details><summary>Table</summary>\n\n" + "\n".join(table) + "\n\n</details>\n"
        )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("results", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of minictrl.reproduce")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default DIR/RESULTS.md")
    args = parser.parse_args(argv)
    at = args.page or args.folder / "RESULTS.md"
    text = page(args.folder, at)
    at.with_name(at.name + ".tmp").write_text(text)
    os.replace(at.with_name(at.name + ".tmp"), at)
    print(f"{at}: {text.count('## ')} studies")


if __name__ == "__main__":
    run_script(main)
