"""A run's policy against pi_ref: samples, scores, KL, and the table of win rates beside the
theory's.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from minictrl import runs, theory
from minictrl.calibration import calibrated_reward
from minictrl.config import RAW, Config, write_json
from minictrl.lm.device import halving
from minictrl.models import load_policy, load_scorer
from minictrl.sampling import response_logits
from minictrl.update import Rows, by_length, cut
from minictrl.winrate import win_rate

REFERENCE_SEED, POLICY_SEED = 1, 2  # the calibration's is 0: pi_ref's samples here are fresh ones
KL_SAMPLES = 16  # responses a prompt for the KL, whose error is that over prompts
FIELDS = (
    "procedure",
    "n",
    "scorer",
    "win_rate",
    "stderr",
    "kl",
    "kl_stderr",
    "theory",
    "optimal",
    "prompts",
    "samples",
)


def evaluate(
    run: Path,
    config: Config,
    *,
    split: str,
    prompts: int,
    M: int,
    sizes: tuple[int, ...],
    device: str,
) -> tuple[list[dict], list[dict]]:
    """Rows of eval.json and of samples.jsonl, from M responses a prompt of pi and of pi_ref.

    sizes: the N of the table; those above M are left out. Selection by the reward model, scoring by
    it and by the judge.
    """
    if split == "train":
        prompts = min(prompts, config.prompts)  # those it was trained on
    config = replace(config, prompts=prompts, device=device)
    task = runs.load_task(config, split)
    judge = load_scorer(config.judge, "judge", device=device)
    policy, _ = load_policy(str(run / "policy"))
    policy.to(task.ids.device)
    r_ref, texts_ref = pi_ref(task, config, M)
    samples, r = runs.rollout(
        task, policy, range(len(task.prompts)), num_samples=M, seed=POLICY_SEED
    )
    scores = {
        "reward": (r, r_ref),
        "judge": (
            runs.score(judge, task.prompts, samples.texts),
            runs.score(judge, task.prompts, texts_ref),
        ),
    }
    few = min(M, KL_SAMPLES)
    first = torch.arange(len(r) * M).view(-1, M)[:, :few].flatten()
    rows = {name: x[first] for name, x in runs.rows_of(task, torch.arange(len(r)), samples).items()}
    kl, kl_stderr = mean_kl(policy, task.policy, rows, few, config.micro_batch)
    curve = curve_of(config, run)

    table = []
    for procedure, n in procedures(config, sizes, M):
        best = theory.optimal_win_rate(kl, procedure, n)
        expected = None if curve is None else theory.at_kl(curve, kl, procedure, n)
        for scorer, (each, each_ref) in scores.items():
            wins, stderr = win_rate(r, each, r_ref, each_ref, procedure, n)
            table.append(
                dict(
                    zip(
                        FIELDS,
                        (
                            procedure,
                            n,
                            scorer,
                            wins,
                            stderr,
                            kl,
                            kl_stderr,
                            expected,
                            best,
                            len(r),
                            M,
                        ),
                    )
                )
            )
    C_hat = calibrated_reward(r, r_ref)
    shown = [
        {
            "prompt": prompt,
            "reference": texts_ref[i][0],
            "response": samples.texts[i][0],
            "reward_reference": float(r_ref[i, 0]),
            "reward": float(r[i, 0]),
            "C_hat": float(C_hat[i, 0]),
            "judge_reference": float(scores["judge"][1][i, 0]),
            "judge": float(scores["judge"][0][i, 0]),
        }
        for i, prompt in enumerate(task.prompts)
    ]
    return table, shown


def pi_ref(task: runs.Task, config: Config, M: int) -> tuple[Tensor, list[list[str]]]:
    """M fresh samples of pi_ref for each of the P prompts: their rewards and their texts, (P, M)
    each.
    """
    drawn = runs.reference_samples(task, config, M, seed=REFERENCE_SEED, name="pi_ref")
    # texts aren't cached
    tokens, lengths = drawn.tokens.flatten(0, 1).tolist(), drawn.mask.sum(-1).flatten().tolist()
    texts = task.tokenizer.batch_decode(
        [row[:n] for row, n in zip(tokens, lengths)], skip_special_tokens=True
    )
    return drawn.r_ref, [texts[i : i + M] for i in range(0, len(texts), M)]


def curve_of(config: Config, run: Path):
    """The transform whose theory a run is held against: None where raw rewards have none; a Phi
    that is solved for a procedure stays that procedure's in every row."""
    if config.transform in RAW:
        return None
    if config.transform in theory.FIXED_POINTS:
        beta = runs.load_config(run)[1]["beta"]
        return theory.fixed_point(config.transform, config.procedure, config.n, beta)
    return config.transform


def aligned_for(config: Config) -> tuple[str, int]:
    """(procedure, N) that a run is made for."""
    return config.procedure, 1 if config.procedure == "standard" else config.n


def procedures(config: Config, sizes: tuple[int, ...], M: int) -> list[tuple[str, int]]:
    """(procedure, N) of the table: what the run is aligned for comes first."""
    rest = [
        ("standard", 1),
        *(("bon", n) for n in sizes if n > 1),
        *(("won", n) for n in sizes if n > 1),
    ]
    rest += [(procedure, config.n) for procedure in ("bon", "won")]  # the pictures have them
    return [
        (procedure, n) for procedure, n in dict.fromkeys([aligned_for(config), *rest]) if n <= M
    ]


@torch.no_grad()
def mean_kl(policy, ref_policy, rows: Rows, M: int, size: int) -> tuple[float, float]:
    """KL(pi || pi_ref) in nats per response and its standard error over prompts, from samples of
    pi.

    At each token the full distributions are compared, sum_a pi(a) (log pi(a) - log pi_ref(a)): the
    same mean as the sampled tokens' log-ratios, a lower variance.
    """

    def of_all(size: int) -> Tensor:
        kl = torch.zeros_like(rows["mask"][:, 0])
        for piece in by_length(rows, torch.arange(len(kl), device=kl.device), size):
            part = cut(rows, piece)
            inputs = part["prompt"], part["prompt_mask"], part["tokens"], part["mask"]
            p, q = (
                log_softmax(response_logits(model, *inputs)[0], -1)
                for model in (policy, ref_policy)
            )
            each = kl_div(q, p, reduction="none", log_target=True).sum(-1)
            kl[piece] = (
                torch.zeros_like(part["mask"]).masked_scatter(part["mask"].bool(), each).sum(1)
            )
        return kl.cpu()

    by_prompt = halving(size, of_all)[0].view(-1, M).mean(1)
    stderr = float(by_prompt.std()) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else math.nan
    return float(by_prompt.mean()), stderr


def markdown(table: list[dict]) -> str:
    """The table, to paste: win rates in per cent with standard errors, theory at the measured KL,
    best possible there.
    """
    lines = [
        "| procedure | N | by reward | by judge | theory | optimal |",
        "|---|---|---|---|---|---|",
    ]
    for by_reward, by_judge in zip(table[::2], table[1::2]):
        measured = [
            f"{100 * row['win_rate']:.1f} ± {100 * row['stderr']:.1f}"
            for row in (by_reward, by_judge)
        ]
        expected = [
            "–" if by_reward[name] is None else f"{100 * by_reward[name]:.1f}"
            for name in ("theory", "optimal")
        ]
        lines.append(
            "| "
            + " | ".join([by_reward["procedure"], str(by_reward["n"]), *measured, *expected])
            + " |"
        )
    return "\n".join(lines)


def suffix(split: str) -> str:
    """What the names of a split's files end with."""
    return "" if split == "test" else f"-{split}"


def write(run: Path, split: str, table: list[dict], shown: list[dict]):
    """eval.json and samples.jsonl of a run (eval-train.json and samples-train.jsonl for its
    training prompts).
    """
    write_json(run / f"eval{suffix(split)}.json", {"rows": table})
    temporary = run / f"samples{suffix(split)}.jsonl.tmp"
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown))
    os.replace(temporary, run / f"samples{suffix(split)}.jsonl")
