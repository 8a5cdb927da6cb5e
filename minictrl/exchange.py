"""Reference samples from elsewhere (`train.py --reference FILE`), and a run's own for others.

    python -m minictrl.exchange RUN --out FILE        # .jsonl, or .parquet with `datasets`

A row holds a prompt as `data.py` reads it, "completions", its K texts, and "rewards", their K
numbers by the run's reward model, or none.
"""

import importlib.util
import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minictrl import runs
from minictrl.cli import Parser, check_file, run_script
from minictrl.config import CALIBRATION, Config, is_file
from minictrl.data import convert, key, read_own, row_of
from minictrl.files import in_one_step, write_rows
from minictrl.lm.prompts import encode_prompts, eos_ids, known_ids
from minictrl.reference import Reference
from minictrl.rollout import samples_of_run, score, with_prompts
from minictrl.sampling import Samples, sample, texts_of
from minictrl.scorers.text import as_text
from minictrl.task import Task, load_task
from minictrl.update import all_logprobs
from minictrl.winrate import mean_stderr

FAR = 0.5  # nats a token that given samples may be more or less likely than the policy's own
FAR_END = 1.5  # nats that their end tokens may be less likely, beyond two standard errors
FEW = 64  # texts that the checks look at
FEW_ENDS = 10  # fewer ends say nothing of their probability
FAR_SHARE = 0.5  # of the texts that may end, beyond the policy's own
LARGEST = torch.finfo(torch.float32).max


def read_reference(file: str, config: Config, task: Task) -> Reference:
    """The first K completions of each of the task's prompts, as reference samples.

    Log-probabilities are the policy's, rewards the file's. Where it has none, or texts are longer
    than --max-new-tokens and are cut there, rewards are the reward model's. Raises ValueError on a
    prompt that the file lacks or has fewer than K completions for, on rewards that are not the
    reward model's, and on completions that are not the policy's.
    """
    if not (Path(file).is_file() and is_file(file)):
        raise ValueError(f"--reference {file}: is no file of rows; give one in .jsonl or .parquet")
    rows = {}
    for name, row in convert(read_own(file), partial(completions_of, column=config.column)):
        if name in rows:
            raise ValueError(
                f"--reference {file}: has two rows of the prompt {name[:60]}; join their "
                "completions"
            )
        rows[name] = row
    missing = [prompt for prompt in task.prompts if key(prompt) not in rows]
    if missing:
        raise ValueError(
            f"--reference {file}: lacks {len(missing)} of {len(task.prompts)} prompts, the first "
            f"{str(missing[0])[:60]!r}; draw them, or give --task the prompts that it has"
        )
    found = [rows[key(prompt)] for prompt in task.prompts]
    least = min(len(texts) for texts, _ in found)
    if least < config.K:
        raise ValueError(
            f"--K {config.K}: a prompt of {file} has {least} completions; use --K {least}"
        )
    texts = [texts[: config.K] for texts, _ in found]
    given = [rewards and rewards[: config.K] for _, rewards in found]
    without = sum(not rewards for rewards in given)
    if 0 < without < len(given):
        warnings.warn(
            f"--reference {file}: {without} of {len(given)} rows have no rewards: all are scored "
            "again",
            stacklevel=2,
        )
    tokens, mask, cut = encode_responses(task, texts)
    if not without:
        r_ref = torch.tensor(given, dtype=torch.float64).float()
        check_rewards(file, task, texts, r_ref)
    if cut:
        texts = texts_of(task.tokenizer, task.ids.tolist(), tokens, mask)
    if cut or without:
        r_ref = score(task.reward, task.prompts, texts)
    reference = likeliest(task, r_ref, tokens, mask, config.micro_batch)
    check_policy(file, task, reference)
    return reference


def completions_of(row, column: str | None) -> tuple[str, tuple[list[str], list[float] | None]]:
    """(the prompt's key, (completions, rewards)) of a row."""
    prompt, rest = row_of(row, column)
    texts, rewards = rest.get("completions"), rest.get("rewards")
    if not isinstance(texts, list) or not texts or not all(isinstance(y, str) for y in texts):
        raise ValueError(f'give "completions", a list of texts; it holds {str(texts)[:60]}')
    if rewards is not None and not (
        isinstance(rewards, list)
        and len(rewards) == len(texts)
        and all(isinstance(r, (int, float)) and -LARGEST < r < LARGEST for r in rewards)
    ):
        raise ValueError(
            f'give "rewards", {len(texts)} finite numbers (float32), or leave them out'
        )
    return key(prompt), (texts, rewards)


def encode_responses(task: Task, texts: list[list[str]]) -> tuple[Tensor, Tensor, int]:
    """(tokens (P, K, T) of the policy's tokenizer with EOS, mask, how many texts are cut): cut and
    padded to the longest response of a run.
    """
    P, K, T = len(texts), len(texts[0]), task.max_new_tokens
    ids = [
        row
        for x, ys in zip(task.texts, texts, strict=True)
        for row in continuations(task.tokenizer, x, ys)
    ]
    cut = sum(len(row) > T for row in ids)
    if cut:
        warnings.warn(
            f"{cut} of {P * K} reference samples are longer than --max-new-tokens {T}: they are "
            "cut there, and all are scored again",
            stacklevel=2,
        )
    rows = [torch.tensor([*row, task.tokenizer.eos_token_id][:T]) for row in ids]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(T) < lengths[:, None]
    tokens = torch.full(mask.shape, task.tokenizer.pad_token_id).masked_scatter(
        mask, torch.cat(rows)
    )
    return tokens.view(P, K, T), mask.view(P, K, T), cut


def likeliest(task: Task, r_ref: Tensor, tokens: Tensor, mask: Tensor, size: int) -> Reference:
    """`with_logprobs` of the end token, of several that a policy may have, that is likeliest behind
    each text, which doesn't say which one ended it.
    """
    ended = (tokens == task.tokenizer.eos_token_id) & mask
    known = known_ids(task.policy)
    ends = [end for end in eos_ids(task.policy, task.tokenizer).tolist() if end < known]
    tried = [with_logprobs(task, r_ref, tokens.masked_fill(ended, end), mask, size) for end in ends]
    logprobs = torch.stack([reference.logprobs for reference in tried])  # (ends, P, K, T)
    best = logprobs.sum(-1).argmax(0)[..., None]  # (P, K, 1)
    tokens = torch.where(ended, torch.tensor(ends)[best], tokens).int()
    return Reference(r_ref, tokens, logprobs.take_along_dim(best[None], 0)[0], mask)


def with_logprobs(task: Task, r_ref: Tensor, tokens: Tensor, mask: Tensor, size: int) -> Reference:
    """Samples (P, K, T) with rewards (P, K) and the policy's log-probabilities."""
    reference = Reference(r_ref, tokens.int(), torch.zeros(tokens.shape), mask)
    batch = with_prompts(task, reference.rows().to(task.ids.device))
    logprobs = all_logprobs(task.policy, batch, size)
    return replace(reference, logprobs=logprobs.cpu().view_as(tokens))


def continuations(tokenizer, prompt: str, texts: list[str]) -> list[list[int]]:
    """The tokens of texts as they go on after their prompt."""
    texts = [as_text(tokenizer, text) for text in texts]
    before, *whole = encode_prompts(tokenizer, [prompt, *(prompt + y for y in texts)])
    alone = [tokenizer(y, add_special_tokens=False)["input_ids"] for y in texts]
    n = len(before)
    return [row[n:] if row[:n] == before else own for row, own in zip(whole, alone, strict=True)]


def check_rewards(file: str, task: Task, texts: list[list[str]], r_ref: Tensor):
    """Raises ValueError unless the reward model gives FEW texts, of all prompts and columns in
    turn, the rewards that the file has.
    """
    P, K = r_ref.shape
    few = [(i % P, (i % P + i // P) % K) for i in range(min(FEW, P * K))]
    ours = task.reward([task.prompts[i] for i, _ in few], [texts[i][k] for i, k in few])
    off = (ours - torch.stack([r_ref[i, k] for i, k in few])).abs().max().item()
    if off > 0.03 * ours.std(correction=0).item() + 1e-4 * ours.abs().max().item():
        raise ValueError(
            f"--reference {file}: its rewards are up to {off:.3g} from those of the run's reward "
            "model, which scores the responses; leave them out, or give that model (--reward)"
        )


def check_policy(file: str, task: Task, reference: Reference):
    """Compares the log-probability of given tokens with that of the policy's own samples."""
    few = task.texts[:FEW]
    own = sample(
        task.policy,
        task.tokenizer,
        few,
        num_samples=math.ceil(FEW / len(few)),
        max_new_tokens=task.max_new_tokens,
        seed=0,
    )
    ends = eos_ids(task.policy, task.tokenizer).cpu()
    given = reference[: len(few)]
    (inside, at_end), (own_inside, own_at_end) = (logprobs_of(x, ends) for x in (given, own))
    if not all(map(len, (inside, at_end, own_inside, own_at_end))):  # no ends, or nothing else
        inside, own_inside = torch.cat([inside, at_end]), torch.cat([own_inside, own_at_end])
    mean, own_mean = inside.mean().item(), own_inside.mean().item()
    if abs(mean - own_mean) > FAR:
        raise ValueError(
            f"--reference {file}: the policy gives its tokens {mean:.2f} nats, its own samples "
            f"{own_mean:.2f}: they were drawn from another model or at another temperature; give "
            "the policy that drew them (--policy)"
        )
    ended = len(at_end) / given.r_ref.numel()
    own_ended = len(own_at_end) / own.mask[..., 0].numel()
    cut = None
    if ended - own_ended > FAR_SHARE:
        cut = f"{ended:.0%} of its texts end, {own_ended:.0%} of the policy's own samples"
    elif min(len(at_end), len(own_at_end)) >= FEW_ENDS:
        (mean, error), (own_mean, own_error) = mean_stderr(at_end), mean_stderr(own_at_end)
        if own_mean - mean - 2 * math.hypot(error, own_error) > FAR_END:
            cut = f"the policy gives the ends of its texts {mean:.1f} nats, those of its own "
            cut += f"samples {own_mean:.1f}"
    if cut:
        raise ValueError(
            f"--reference {file}: {cut}: they were cut at fewer tokens than --max-new-tokens "
            f"{task.max_new_tokens}; give the limit that they were drawn with"
        )


def logprobs_of(samples: Reference | Samples, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities in nats of the tokens that end no text, and of those that do."""
    logprobs, mask = samples.logprobs.cpu(), samples.mask.cpu().bool()
    end = torch.isin(samples.tokens.cpu(), ends) & mask
    return logprobs[mask & ~end], logprobs[end]


def write_reference(run: Path, file: Path) -> str:
    """A run's reference samples as rows of prompt, completions and rewards; says how many."""
    config = runs.load_config(run)
    task = load_task(config, "train")
    runs.check_made_from(run, config, runs.digests_of(config, task, None), but=["judge"])
    reference = samples_of_run(run, task, config.K, seed=config.seed_for(CALIBRATION))
    if reference is None:
        raise ValueError(f"{run}: has no reference samples of its models; train it anew")
    texts = texts_of(task.tokenizer, task.ids.tolist(), reference.tokens, reference.mask)
    rows = [
        {config.column or "prompt": prompt, "completions": row, "rewards": r}
        for prompt, row, r in zip(task.prompts, texts, reference.r_ref.tolist(), strict=True)
    ]
    if file.suffix == ".jsonl":
        write_rows(file, rows)
    else:
        from datasets import Dataset

        if len({type(prompt) for prompt in task.prompts}) > 1:
            raise ValueError(
                f"--out {file}: prompts are texts and chats, which one column can't hold; give "
                f"{file.with_suffix('.jsonl')}"
            )
        with in_one_step(file) as path:
            Dataset.from_list(rows).to_parquet(path)
    return f"{len(rows)} prompts with {reference.r_ref.shape[1]} completions each"


def main(argv=None):
    parser = Parser("python -m minictrl.exchange", __doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run directory of train.py")
    parser.add_argument("--out", type=Path, required=True, help="FILE.jsonl or FILE.parquet")
    args = parser.parse_args(argv)
    check_file(parser, "--out", args.out)
    if args.out.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--out {args.out}: use FILE.jsonl or FILE.parquet")
    if args.out.suffix == ".parquet" and importlib.util.find_spec("datasets") is None:
        parser.error(f"--out {args.out}: needs `datasets`; pip install -e '.[hub]'")
    print(f"{args.out}: {write_reference(args.run, args.out)}")


if __name__ == "__main__":
    run_script(main)
