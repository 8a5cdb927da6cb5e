"""CTRL on many GPUs: the calibrated and transformed reward as a reward function of TRL's trainers.

    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer
    from minictrl.data import load_prompts
    from minictrl.trl import ctrl_reward

    prompts = Dataset.from_list([{"prompt": prompt} for prompt in load_prompts("helpful")[:1000]])
    reward = ctrl_reward("helpful", "exp10")
    args = RLOOConfig(beta=1.0, temperature=1.0, max_completion_length=256, num_generations=8)
    RLOOTrainer("Qwen/Qwen2.5-0.5B-Instruct", reward, train_dataset=prompts, args=args).train()

RLOO's objective is ours: E[R] - beta KL(pi || pi_ref), k1 summed over the response. R is divided by
CTRL's beta here, so **TRL's beta is 1.0**, and nothing may rescale rewards (reward_clip_range,
normalize_advantages). GRPO's KL has another gradient, and its advantages are divided by the group's
deviation: with it, beta has no meaning. TRL is not imported here.

Under `accelerate launch` every process calibrates its share of the prompts; the shares are files of
one cache. Without a directory that all machines see, copy the files of one cache into the other's.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minictrl import runs
from minictrl.config import CALIBRATION, TASKS, Config
from minictrl.data import Prompt, key, message
from minictrl.exchange import read_reference
from minictrl.lm.device import resident
from minictrl.lm.prompts import encode_prompts, response_texts
from minictrl.methods import get_method
from minictrl.models import Scorer
from minictrl.reference import CHUNK, Reference
from minictrl.rollout import reference_samples, sample_and_score, samples_of_run
from minictrl.sampling import texts_of
from minictrl.task import Task, load_task, text_of


def ctrl_reward(
    task_or_run: str | Path,
    transform: str | None = None,
    *,
    kl: float | None = None,
    beta: float | None = None,
    **settings,
) -> Callable[..., list[float]]:
    """reward(prompts, completions, **kwargs) -> list of Phi(C_hat) / beta, with its floor.

    C_hat is Eq. 12's, from K samples of pi_ref.

    task_or_run: what --task takes, or a run directory, whose settings and reference rewards are
    used. transform: default identity, or the run's. kl: beta is the theory's for it
    and, unlike in train.py, stays. settings: any other of train.py's, such as procedure, n, K,
    prompts, policy, reward, cache, device. A prompt that was not calibrated is, with K samples,
    when it first comes, and a reward function then gets its columns from kwargs. Prompts and
    completions may be texts or chat messages. Raises ValueError as train.py does, and if a prompt
    comes with other columns than it was calibrated with.
    """
    config = settings_of(task_or_run, {"transform": transform, "kl": kl, "beta": beta} | settings)
    method = get_method("ppo")(config)
    task = load_task(config, "train")
    calibration = Calibration(task, config, Path(task_or_run))
    r_ref = calibration.r_ref(task.prompts)
    method.check_beta(config.beta, r_ref)
    beta = config.beta or method.beta_for(config.kl, r_ref)

    def reward(
        prompts: list[Prompt], completions: list, completion_ids: list | None = None, **columns
    ) -> list[float]:
        if not prompts:
            return []
        add_rows(task.reward, prompts, columns)
        texts = [
            y if isinstance(y, str) or not y else message(y[-1])["content"] for y in completions
        ]
        texts = calibration.as_sampled(prompts, texts, completion_ids)
        scores = task.reward(prompts, texts).tolist()
        r_ref = calibration.r_ref(prompts)
        same = calibration.rewards_of_samples(prompts)
        r = [known.get(y, score) for known, y, score in zip(same, texts, scores)]
        r = torch.tensor(r)[:, None]  # (B, 1)
        return method.Phi.in_nats(method.Phi.of_rewards(r, r_ref), beta, r_ref)[:, 0].tolist()

    reward.__name__ = f"ctrl_{config.transform}"  # what TRL logs it under
    return reward


def add_rows(scorer: Scorer, prompts: list[Prompt], columns: dict) -> None:
    """The rows of prompts that a function's task doesn't have, from the columns that TRL passes,
    which have a value for each prompt.
    """
    if scorer.add_row is None:
        return
    B = len(prompts)
    columns = {k: x for k, x in columns.items() if isinstance(x, list) and len(x) == B}
    for i, prompt in enumerate(prompts):
        scorer.add_row(prompt, {name: x[i] for name, x in columns.items()})


class Calibration:
    """K samples of pi_ref for each prompt; those of a new prompt are drawn when it first comes."""

    def __init__(self, task: Task, config: Config, run: Path):
        self.task, self.config, self.device = task, config, task.policy.device
        drawn = calibrate(task, config, run)
        task.policy.cpu()  # the GPU is the trainer's now
        self.known = {key(prompt): drawn[i] for i, prompt in enumerate(task.prompts)}

    def r_ref(self, prompts: list[Prompt]) -> Tensor:
        """(B, K) the rewards of each prompt's samples."""
        new = {key(x): x for x in prompts if key(x) not in self.known}
        if new:
            self._draw(list(new.values()))
        return torch.stack([self.known[key(prompt)].r_ref for prompt in prompts])

    def rewards_of_samples(self, prompts: list[Prompt]) -> list[dict[str, float]]:
        """Of each prompt, text -> reward of its samples: a completion that is one ties with it."""
        found = {}
        for name, prompt in {key(prompt): prompt for prompt in prompts}.items():
            samples, tokenizer = self.known[name], self.task.tokenizer
            before = self._ids([prompt])
            (texts,) = texts_of(tokenizer, before, samples.tokens[None], samples.mask[None])
            found[name] = dict(zip(texts, samples.r_ref.tolist(), strict=True))
        return [found[key(prompt)] for prompt in prompts]

    def as_sampled(
        self, prompts: list[Prompt], texts: list[str], ids: list[list[int]] | None
    ) -> list[str]:
        """The texts of completions as `sample` has them, from their token ids. TRL decodes them
        alone, where a tokenizer that marks spaces (Llama 2) drops the one that a text begins with.
        """
        tokenizer = self.task.tokenizer
        if ids is None or tokenizer.batch_decode(ids, skip_special_tokens=True) != texts:
            return texts  # of another tokenizer
        return response_texts(tokenizer, self._ids(prompts), ids)

    def _ids(self, prompts: list[Prompt]) -> list[list[int]]:
        """The token ids of each prompt as the policy reads it."""
        tokenizer = self.task.tokenizer
        return encode_prompts(tokenizer, [text_of(self.config, tokenizer, x) for x in prompts])

    def _draw(self, prompts: list[Prompt]):
        texts = [text_of(self.config, self.task.tokenizer, prompt) for prompt in prompts]
        with resident(self.task.policy, self.device):
            samples, r_ref = sample_and_score(
                replace(self.task, prompts=prompts, texts=texts),
                self.task.policy,
                range(len(prompts)),
                num_samples=self.config.K,
                seed=self.config.seed_for(CALIBRATION),
            )
        drawn = Reference.of(samples, r_ref)
        self.known.update((key(prompt), drawn[i]) for i, prompt in enumerate(prompts))


def settings_of(task_or_run: str | Path, given: dict) -> Config:
    """The settings of a task or of a run, with those that are given instead; method and steps are
    the trainer's.
    """
    given = {name: value for name, value in given.items() if value is not None}
    unknown = set(given) - set(Config.__dataclass_fields__)
    if unknown:
        known = ", ".join(Config.__dataclass_fields__)
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; use one of {known}")
    folder = Path(task_or_run)
    empty = folder.is_dir() and not any(folder.iterdir())
    if task_or_run in TASKS or not (runs.holds_run(folder) or empty):
        return Config(task=str(task_or_run), **given).resolved()
    stored = runs.load_config(folder)
    if "kl" in given or "beta" in given:
        stored = replace(stored, kl=None, beta=None)
    return replace(stored, **{"method": "ppo"} | given)


def calibrate(task: Task, config: Config, run: Path) -> Reference:
    """K samples of pi_ref for each of the task's prompts.

    The run's, if it is a run, or from the cache, or drawn, where every process draws a share.
    """
    P, K = len(task.prompts), config.K
    drawn = {"seed": config.seed_for(CALIBRATION), "cache": config.cache}  # as train.py has it
    stored = samples_of_run(run, task, K, seed=drawn["seed"])
    if stored is not None:
        return stored
    if config.reference:
        return read_reference(config.reference, config, task)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        from accelerate import PartialState

        mine = share(P, rank, world)
        if mine:
            part = replace(
                task, prompts=[task.prompts[i] for i in mine], texts=[task.texts[i] for i in mine]
            )
            name = f"calibrate {rank + 1}/{world}"
            reference_samples(part, K, name=name, **drawn)
        PartialState().wait_for_everyone()
    return reference_samples(task, K, name="calibrate", **drawn)


def share(P: int, rank: int, world: int) -> list[int]:
    """The prompts of a process: every world-th chunk, whole, so that its files are those of a
    single process.
    """
    return [i for i in range(P) if i // CHUNK % world == rank]
