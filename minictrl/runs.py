"""A run: what it works on, and its directory, whose files are written under a temporary name and
renamed.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import minictrl
from minictrl.config import Config, is_run, write_json
from minictrl.data import load_prompts
from minictrl.lm.device import resolve_device
from minictrl.models import load_policy, load_scorer, render
from minictrl.reference import Reference, cached, digest
from minictrl.sampling import Samples, check_lengths, encode_prompts, left_pad, sample
from minictrl.update import Learner, Rows


def check(out: Path, settings: dict, config: Config, *, resume: bool, overwrite: bool) -> Config:
    """The settings to run with: those given, or with `resume` those of the run that `out` holds.

    Raises ValueError where `out` must not be touched: it holds another run and neither was asked
    for, or no run to resume, or other settings were given than the run to resume has.
    """
    if resume:
        stored, _ = load_config(out)
        for name, value in settings.items():
            if name != "out" and value != getattr(stored, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: {out} was started with {getattr(stored, name)}; "
                    "leave it out to resume, or give another --out"
                )
        return stored
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not holds_run(out):
            raise ValueError(f"--out {out}: holds something that is no run; give another --out")
        if not overwrite:
            raise ValueError(
                f"--out {out}: holds a run already; add --resume or --overwrite, or give another --out"
            )
    return config


def holds_run(out: Path) -> bool:
    """Whether a directory is a run's, be it damaged."""
    try:
        stored = json.loads((out / "config.json").read_text())
    except (OSError, UnicodeDecodeError):
        return False
    except ValueError:
        return True
    return is_run(stored)


def load_config(run: Path) -> tuple[Config, dict]:
    """Settings of a run, and what else its config.json holds. Raises ValueError if there is none,
    or half of one.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{run}: is no run directory (it has no config.json); give the --out of a train.py run"
        )
    try:
        return Config.load(path)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is damaged ({error}); train the run again with --overwrite"
        ) from None


def load_finished(run: Path) -> Config:
    """Settings of a run whose training has ended. Raises ValueError on one that has not."""
    config, _ = load_config(run)
    if not (Path(run) / "policy" / "config.json").is_file():
        raise ValueError(
            f"{run}: has no policy yet; finish it first: python train.py --resume --out {run}"
        )
    return config


def create(out: Path, config: Config):
    """An empty run directory with its config.json; what was there is deleted (`check` has
    asked).
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_json(out / "config.json", asdict(config))


def describe(out: Path, config: Config, beta: float):
    """config.json: every setting, with the beta that a KL budget came to, and what else a number
    may depend on.
    """
    commit = (
        subprocess.run(
            ["git", "-C", str(Path(minictrl.__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        if shutil.which("git")
        else ""
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write_json(
        out / "config.json",
        asdict(config)
        | {
            "beta": beta,
            "commit": commit or None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gpu": gpu,
            "threads": torch.get_num_threads(),
        },
    )


# --- checkpoint and metrics ---


def save_checkpoint(out: Path, learner: Learner, **counters):
    """One file, replaced in one step: stopped at any moment, the old one or the new one is there
    whole.

    Random states need no place in it: every draw is a function of the seed and the step.
    """
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    torch.save(learner.state() | counters, folder / "state.pt.tmp")
    os.replace(folder / "state.pt.tmp", folder / "state.pt")


def restore(
    out: Path, learner: Learner, asked: float | None
) -> tuple[int, int, float, float | None]:
    """Put the last checkpoint, if there is one, into the learner, and cut metrics.jsonl there.
    Returns its (step, tokens, seconds, KL asked for), or a new run's."""
    path, counters = (
        out / "checkpoint" / "state.pt",
        {"step": 0, "tokens": 0, "seconds": 0.0, "asked": asked},
    )
    if path.is_file():
        try:
            state = torch.load(path, map_location=learner.policy.device, weights_only=True)
            learner.restore(state)
            counters = {name: state[name] for name in counters}
        except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is damaged ({str(error).splitlines()[0]}): start again with --overwrite"
            ) from None
    rows = [json.dumps(row) + "\n" for row in read_metrics(out) if row["step"] <= counters["step"]]
    (out / "metrics.jsonl.tmp").write_text("".join(rows))
    os.replace(out / "metrics.jsonl.tmp", out / "metrics.jsonl")
    return tuple(counters.values())


def read_metrics(run: Path) -> list[dict]:
    """Rows of metrics.jsonl; a last line that was cut off by an interruption is left out."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Interrupt:
    """Ctrl-C as a flag, so that a step ends before the checkpoint is written; the second Ctrl-C
    stops at once.
    """

    def __enter__(self):
        self.asked = False
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)


# --- what a run works on ---

METRICS = (
    "step",
    "tokens",
    "seconds",
    "reward",
    "C_hat",
    "Phi",
    "kl_ref",
    "kl_ref_stderr",
    "kl_asked",
    "beta",
    "approx_kl",
    "clipfrac",
    "entropy",
    "value_loss",
    "explained_variance",
    "grad_norm",
    "lr",
    "tok_per_s",
)


@dataclass(frozen=True)
class Task:
    """A run's models and prompts. P prompts of at most L tokens."""

    policy: nn.Module
    tokenizer: object
    reward: Callable
    prompts: list  # as given: text or chat messages, what scorers read
    texts: list[str]  # as the policy reads them
    ids: Tensor  # (P, L) left-padded
    mask: Tensor  # (P, L)
    max_new_tokens: int


def load_task(config: Config, split: str) -> Task:
    """Models and prompts of a run, checked: every prompt fits the context together with its
    response.

    A task's prompts that are longer than max_prompt_tokens are left out; those of a file are the
    user's, so they raise.
    """
    model, tokenizer = load_policy(config.policy)
    prompts, texts, encoded = [], [], []
    for prompt in load_prompts(config.task, split):
        text = render(tokenizer, prompt)
        ids = encode_prompts(tokenizer, [text])[0]
        if len(ids) <= config.max_prompt_tokens or config.task.endswith(".jsonl"):
            prompts, texts, encoded = [*prompts, prompt], [*texts, text], [*encoded, ids]
        if len(prompts) == config.prompts:
            break
    if not prompts:
        raise ValueError(
            f"--max-prompt-tokens {config.max_prompt_tokens}: every prompt of {config.task} is longer; use more"
        )
    check_lengths(model, texts, encoded, config.max_new_tokens)
    model.to(resolve_device(config.device))
    ids, mask = left_pad(encoded, tokenizer.pad_token_id, model.device)
    reward = load_scorer(config.reward, "reward", device=config.device)
    return Task(model, tokenizer, reward, prompts, texts, ids, mask, config.max_new_tokens)


def rollout(
    task: Task,
    model: nn.Module,
    index: list[int] | Tensor,
    *,
    num_samples: int,
    seed: int,
    first_sample: int = 0,
) -> tuple[Samples, Tensor]:
    """Responses of a model to some of the prompts, and their rewards (len(index), num_samples)."""
    index = torch.as_tensor(index).tolist()
    samples = sample(
        model,
        task.tokenizer,
        [task.texts[i] for i in index],
        num_samples=num_samples,
        max_new_tokens=task.max_new_tokens,
        seed=seed,
        first_sample=first_sample,
    )
    return samples, score(task.reward, [task.prompts[i] for i in index], samples.texts)


def prefix_rewards(task: Task, index: Tensor, samples: Samples) -> Tensor:
    """(B, M T) rewards of the responses so far, before each token of M samples a prompt; behind
    their end, of none.
    """
    tokens = samples.tokens.flatten(0, 1).tolist()
    lengths = samples.mask.flatten(0, 1).sum(1).long().tolist()
    prefixes = [
        row[: t if t < length else 0]
        for row, length in zip(tokens, lengths)
        for t in range(len(row))
    ]
    texts = task.tokenizer.batch_decode(prefixes, skip_special_tokens=True)
    width = len(texts) // len(index)
    return score(
        task.reward,
        [task.prompts[i] for i in index.tolist()],
        [texts[i : i + width] for i in range(0, len(texts), width)],
    )


def score(scorer: Callable, prompts: list, texts: list[list[str]]) -> Tensor:
    """(B, M) scores of M texts for each prompt; equal texts of a prompt are scored once."""
    unique = list(dict.fromkeys((i, text) for i, row in enumerate(texts) for text in row))
    scores = dict(
        zip(unique, scorer([prompts[i] for i, _ in unique], [text for _, text in unique]).tolist())
    )
    return torch.tensor([[scores[i, text] for text in row] for i, row in enumerate(texts)])


def reference_samples(task: Task, config: Config, K: int, *, seed: int, name: str) -> Reference:
    """K samples of pi_ref for each prompt with their rewards, from the cache as far as they are
    there.
    """

    def draw(index: list[int], first: int, count: int) -> Reference:
        samples, r = rollout(
            task, task.policy, index, num_samples=count, seed=seed, first_sample=first
        )
        return Reference(
            r, samples.tokens.int().cpu(), samples.logprobs.cpu(), samples.mask.bool().cpu()
        )

    key, bar = reference_key(task, seed), lambda chunks: tqdm(chunks, name, disable=None)
    return cached(draw, task.texts, K, Path(config.cache), key, bar)


def reference_key(task: Task, seed: int, *prompts: list[str]) -> str:
    """Digest of what reference samples depend on, beside the prompts or with them."""
    return digest(task.policy, task.reward.digest, task.max_new_tokens, seed, *prompts)


def rows_of(task: Task, index: Tensor, samples: Samples) -> Rows:
    """Samples (B, M, T) as rows (B M, …) with their prompts."""
    of = index.repeat_interleave(samples.tokens.shape[1])
    return prompt_rows(task, of) | {
        "tokens": samples.tokens.flatten(0, 1),
        "mask": samples.mask.flatten(0, 1),
        "old_logprobs": samples.logprobs.flatten(0, 1),
    }


def prompt_rows(task: Task, of: Tensor) -> Rows:
    return {"prompt": task.ids[of], "prompt_mask": task.mask[of]}


def batch(P: int, size: int, step: int, seed: int) -> Tensor:
    """The items of a step, out of P: random passes over all of them, the same whenever the step is
    run.
    """
    first = step * size
    epochs = range(first // P, (first + size - 1) // P + 1)
    order = torch.cat(
        [
            torch.randperm(P, generator=torch.Generator().manual_seed(seed * 1_000_003 + e))
            for e in epochs
        ]
    )
    return order[first - epochs[0] * P :][:size]
