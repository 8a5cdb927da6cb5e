"""A run's policy against pi_ref: samples, scores, KL, and the table of win rates.

Beside each measured win rate stands the theory's at the measured KL.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from minictrl import runs, theory
from minictrl.batch import Batch
from minictrl.calibration import calibrated_reward, leave_one_out_calibration
from minictrl.config import TEST, TEST_REF, Config, is_file
from minictrl.files import (
    all_in_one_step,
    check_writable,
    save_tensors,
    sha256_of,
    write_rows,
    write_sealed,
)
from minictrl.lm.logprobs import response_logits
from minictrl.methods import get_method
from minictrl.models import SUMS, load_policy
from minictrl.procedures import get_procedure
from minictrl.reference import Reference
from minictrl.results import ENDS, check_replaced, eval_path, file_suffix, parts_of
from minictrl.rollout import batch_of, reference_samples, sample_and_score, score
from minictrl.sampling import Samples, texts_of
from minictrl.task import Task, load_task, scorer_of, try_scorers
from minictrl.transforms import RAW, Transform
from minictrl.update import in_pieces
from minictrl.winrate import kept_scores, mean_stderr, win_rates

KL_SAMPLES = 16  # responses per prompt for the KL


@dataclass(frozen=True)
class Scored:
    """M responses to each of P prompts, with their scores by reward model and judge."""

    texts: list[list[str]]  # P lists of M
    scores: dict[str, Tensor]  # (P, M) of reward, and of judge if there is one


def evaluate(
    run: Path,
    config: Config,
    *,
    split: str,
    prompts: int,
    M: int,
    sizes: tuple[int, ...],
    device: str | None,
    other_models: dict[str, str],
) -> list[dict]:
    """The table of a run, from M responses per prompt of pi and of pi_ref.

    Writes wins.safetensors, by_prompt.safetensors (kl (P,), C_hat and C_hat_reference (P, M)),
    samples.jsonl and eval.json into the run, all or none (`results.file_suffix` says what is added
    to their names with another split or model).
    sizes: the N of the table; those above M are left out. other_models: role (reward, judge) ->
    another model than the run's. The reward model selects, reward model and judge score; a run
    without a judge has no such rows. Returns the rows of eval.json.
    """
    config, task, judge = load_models(run, config, split, prompts, device, other_models)
    cases = cases_of(config, sizes, M)
    suffix = file_suffix(split, other_models)
    scorers = {"reward": task.reward, "judge": judge}
    digests = {role: scorers[role].digest for role in other_models}
    check_replaced(eval_path(run, suffix), other_models, len(task.prompts), M, digests)
    drawn_from = policy_sums(run)
    policy, _ = load_policy(str(run / "policy"))
    policy.to(task.ids.device)
    pi, pi_ref, samples = draw_both(task, policy, judge, config, M)
    kls = kl_by_prompt(policy, task, samples, config.micro_batch).double()

    # a raw reward has no theory, and a policy is no optimum of a reward model that is not its own
    has_theory = config.transform not in RAW and "reward" not in other_models
    Phi = Phi_of(config) if has_theory else None
    table, wins = table_of(config, pi, pi_ref, kls, Phi, cases)
    C_hat = C_hats(pi, pi_ref)
    if policy_sums(run) != drawn_from:
        raise ValueError(f"{run}: was trained anew while it was evaluated; evaluate it again")
    models = {role: getattr(config, role) for role in pi.scores}
    with all_in_one_step(run) as folder:
        parts = parts_of(folder, suffix)
        save_tensors(parts["wins"], wins, {})
        save_tensors(parts["by_prompt"], {"kl": kls} | C_hat, {})
        write_rows(parts["samples"], sample_rows(task.prompts, pi, pi_ref, C_hat))
        sums = {part: sha256_of(path) for part, path in parts.items()}
        stored = {"rows": table, "models": models, "digests": digests, "parts": sums}
        write_sealed(eval_path(folder, suffix), stored)
    return table


def load_models(
    run: Path,
    config: Config,
    split: str,
    prompts: int,
    device: str | None,
    other_models: dict[str, str],
) -> tuple[Config, Task, Callable | None]:
    """(settings, task, judge) of an evaluation. device: another than the run's. Raises ValueError
    on a model that is not the run's any more, or can't be used, and as `check` does.
    """
    check(run, config, other_models)
    if split == "train":
        prompts = min(prompts, config.prompts or prompts)  # those it was trained on
    config = replace(config, prompts=prompts, device=device or config.device, **other_models)
    task = load_task(config, split)
    judge = scorer_of(config, "judge")
    runs.check_made_from(run, config, runs.digests_of(config, task, judge), but=other_models)
    try_scorers([task.reward, judge], task.prompts)
    return config, task, judge


def policy_sums(run: Path) -> bytes:
    """The check sums of a run's policy; nothing where somebody has deleted them."""
    sums = run / "policy" / SUMS
    return sums.read_bytes() if sums.is_file() else b""


def check(run: Path, config: Config, other_models: dict[str, str]):
    """Raises ValueError on what can be wrong with a finished run beside its models: its metrics, a
    file that it is evaluated with, a directory that can't be written.
    """
    runs.finished_metrics(run)
    for name in runs.PATHS:
        if name == "reference" or name in other_models:  # which it does not read
            continue
        file = runs.file_of(getattr(config, name))
        if (file.suffix == ".py" or is_file(str(file))) and not file.exists():
            raise ValueError(
                f"{run}: its --{name} {file} is no file in {Path.cwd()}; evaluate it from the "
                "directory where it was trained, or put the file back"
            )
    check_writable(run)


def draw_both(
    task: Task, policy: nn.Module, judge: Callable | None, config: Config, M: int
) -> tuple[Scored, Scored, Samples]:
    """(pi, pi_ref, pi's samples): M responses of each to each prompt, with their scores."""
    drawn, texts_ref = draw_reference(task, config, M)
    index, seed = range(len(task.prompts)), config.seed_for(TEST)
    samples, reward = sample_and_score(
        task, policy, index, num_samples=M, seed=seed, reference=drawn
    )
    pi = Scored(samples.texts, {"reward": reward})
    pi_ref = Scored(texts_ref, {"reward": drawn.r_ref})
    if judge:  # all in one call, so that equal responses tie
        both = [[*x, *y] for x, y in zip(pi.texts, pi_ref.texts, strict=True)]
        scores = score(judge, task.prompts, both).split(M, 1)
        pi.scores["judge"], pi_ref.scores["judge"] = scores
    return pi, pi_ref, samples


def table_of(
    config: Config,
    pi: Scored,
    pi_ref: Scored,
    kls: Tensor,
    Phi: Transform | None,
    cases: list[tuple[str, int]],
) -> tuple[list[dict], dict[str, Tensor]]:
    """(table, wins): the rows of eval.json, and for each, under PROCEDURE-N-SCORER, its win rate on
    every prompt (P,).

    kls: (P,) nats. cases: (procedure, N) of each row. Where rewards tie, theory is that of the few
    values that they take, their levels, and the optimum is not known. Where all are 0 or 1, `pass`
    and `pass_ref` are how often pi and pi_ref are right after the procedure: pass@N for Best-of-N.
    """
    table, wins = [], {}
    kl, kl_stderr = mean_stderr(kls)
    select, select_ref = pi.scores["reward"], pi_ref.scores["reward"]
    P, M = select.shape
    if config.procedure == "rewind" and theory.tied(select_ref, "rewind", config.n):
        warnings.warn(
            f"rewards tie, and rewind's threshold is a quantile: {M} samples do not say which "
            "level it is, and its win rates may be points off",
            stacklevel=2,
        )
    verified = all(r in (0.0, 1.0) for r in torch.cat([select, select_ref], 1).unique().tolist())
    for procedure, n in cases:
        at = (kl, procedure, n)
        levels = theory.tied_levels(select_ref, procedure, n)
        tied = levels is not None
        of_reward = {"levels": levels} if tied else {"K": config.K}
        shared = {
            "kl": kl,
            "kl_stderr": kl_stderr,
            "theory": theory.at_kl(Phi, *at, **of_reward) if Phi else None,
            "optimal": None if tied else theory.optimal_win_rate(*at),
            "prompts": P,
            "samples": M,
        }
        if verified:
            kept = kept_scores(select, select_ref, procedure, n)
            shared |= {"pass": kept[0].mean().item(), "pass_ref": kept[1].mean().item()}
        for scorer, decides in pi.scores.items():
            each = win_rates(select, decides, select_ref, pi_ref.scores[scorer], procedure, n)
            win, stderr = mean_stderr(each)
            row = {"procedure": procedure, "n": n, "scorer": scorer}
            table.append(row | {"win_rate": win, "stderr": stderr} | shared)
            wins[f"{procedure}-{n}-{scorer}"] = each
    return table, wins


def draw_reference(task: Task, config: Config, M: int) -> tuple[Reference, list[list[str]]]:
    """M fresh samples of pi_ref for each of the P prompts, and their texts (P, M)."""
    seed = config.seed_for(TEST_REF)
    drawn = reference_samples(task, M, seed=seed, cache=config.cache, name="pi_ref")
    # texts aren't cached
    return drawn, texts_of(task.tokenizer, task.ids.tolist(), drawn.tokens, drawn.mask)


def sample_rows(prompts: list, pi: Scored, pi_ref: Scored, C_hat: dict[str, Tensor]) -> list[dict]:
    """Rows of samples.jsonl: the first response of each policy to each prompt, and the best of its
    first four. C_hat: `C_hats` of both.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        row = {"prompt": prompt, "reference": pi_ref.texts[i][0], "response": pi.texts[i][0]}
        for end, policy in zip(ENDS, (pi, pi_ref)):
            best = int(policy.scores["reward"][i, :4].argmax())
            row |= {f"{name}{end}": float(each[i, 0]) for name, each in policy.scores.items()}
            row[f"C_hat{end}"] = float(C_hat[f"C_hat{end}"][i, 0])
            row[f"best{end}"] = policy.texts[i][best]
            row[f"best_C_hat{end}"] = float(C_hat[f"C_hat{end}"][i, best])
        rows.append(row)
    return rows


def C_hats(pi: Scored, pi_ref: Scored) -> dict[str, Tensor]:
    """(P, M) calibrated rewards of both: pi_ref's samples against the others of their prompt."""
    r_ref = pi_ref.scores["reward"]
    own = leave_one_out_calibration(r_ref) if r_ref.shape[1] > 1 else torch.full(r_ref.shape, 0.5)
    return {"C_hat": calibrated_reward(pi.scores["reward"], r_ref), "C_hat_reference": own}


def Phi_of(config: Config) -> Transform:
    """The transform whose theory a run is held against: the Phi of its budget or beta.

    One that is solved for a procedure, such as bon_fp, is that in the rows of the others too.
    """
    return get_method(config.method)(config).Phi


def aligned_for(config: Config) -> tuple[str, int]:
    """(procedure, N) that a run is made for."""
    return config.procedure, 1 if config.procedure == "standard" else config.n


def cases_of(config: Config, sizes: tuple[int, ...], M: int) -> list[tuple[str, int]]:
    """(procedure, N) of the table: what the run is aligned for comes first."""
    own, N = aligned_for(config)
    least = get_procedure(own).samples(N)
    if least > M:
        warnings.warn(
            f"{M} samples per prompt are too few for {own} with N = {N}, which the run was made "
            f"for: its row is left out; give --samples {least} or more",
            stacklevel=2,
        )
    chosen = [(own, N), ("standard", 1)]
    for procedure in ("bon", "won"):
        chosen += [(procedure, n) for n in sizes if n > 1]
    chosen += [("bon", config.n), ("won", config.n)]  # the pictures have them
    return [(name, n) for name, n in dict.fromkeys(chosen) if get_procedure(name).samples(n) <= M]


def kl_by_prompt(policy, task: Task, samples: Samples, size: int) -> Tensor:
    """(P,) KL(pi || pi_ref) of each prompt, in nats per response.

    From the first KL_SAMPLES samples of pi per prompt. At each token the full distributions are
    compared, sum_a pi(a) (log pi(a) - log pi_ref(a)): the same mean as the sampled tokens'
    log-ratios, a lower variance. size: responses per forward.
    """
    P, M, _ = samples.tokens.shape
    few = min(M, KL_SAMPLES)
    first = torch.arange(P * M).view(P, M)[:, :few].flatten()
    batch = batch_of(task, torch.arange(P), samples)[first]
    kl = in_pieces(batch, size, lambda rows: kl_of(policy, task.policy, rows)[:, None])
    return kl[:, 0].contiguous().cpu().view(P, few).mean(1)


def kl_of(policy, ref_policy, batch: Batch) -> Tensor:
    """(B,) nats: the KL of each token's full distribution, summed over a response."""
    inputs = batch.prompt, batch.prompt_mask, batch.tokens, batch.mask
    p, q = (log_softmax(response_logits(model, *inputs)[0], -1) for model in (policy, ref_policy))
    each = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return torch.zeros_like(batch.mask).masked_scatter(batch.mask.bool(), each).sum(1)
