"""A run's settings, in one frozen dataclass: defaults, command-line help, validation, to and from
JSON.

A setting whose default is None is computed: from the task (`TASKS`), or as its help says.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

PROCEDURES = ("standard", "bon", "won", "rewind")
# Method -> the transform that its optimum has, where it isn't the run's to choose (BoNBoN's is
# Best-of-n, as log's is).
METHODS = {
    "ppo": None,
    "grpo": "none",
    "grpo_fixed": "none",
    "ipo": "identity",
    "bonbon": "log",
    "bond": "log",
    "qrpo": None,
    "pkpo": "optimal",
}
# transforms of the raw reward, which no theory covers (`transforms.RAW`)
RAW = ("none", "median", "standardised")

# A data set on the hub (`data.py`): name, folder in it, its splits, and whether rows without a
# prompt or a side are left out.
HUB = {"folder": None, "train": "train", "test": "test", "skip_bad": True}
HH = HUB | {"name": "Anthropic/hh-rlhf"}

# A task is one entry: models (hub names, directories, or this package's own), lengths in tokens,
# what differs from the embedded task's training, prompts (`data`) and preference pairs (`pairs`,
# where not `data` too). GPU memory and time of the three tasks on the hub: not measured; their
# learning rates are guesses, and all of their policies' blocks are trained.
TASKS = {
    "reviews": dict(
        policy="reviews",
        reward="reviews",
        judge="reviews",
        max_prompt_tokens=64,
        max_new_tokens=24,
        prompts=256,
        steps=45,
        layers=2,
        lr=1e-3,
    ),
    "helpful": dict(
        policy="Qwen/Qwen2.5-0.5B-Instruct",
        reward="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        judge="Skywork/Skywork-Reward-V2-Llama-3.2-1B",
        max_prompt_tokens=512,
        max_new_tokens=256,
        prompts=1000,
        steps=200,
        lr=1e-6,
        data=HH | {"folder": "helpful-base"},
    ),
    "harmless": dict(
        policy="HuggingFaceTB/SmolLM2-360M-Instruct",
        reward="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        judge="Skywork/Skywork-Reward-V2-Llama-3.2-1B",
        max_prompt_tokens=512,
        max_new_tokens=256,
        prompts=1000,
        steps=200,
        lr=1e-6,
        data=HH | {"folder": "harmless-base"},
    ),
    "tldr": dict(
        policy="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
        reward="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
        judge="cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr",
        max_prompt_tokens=560,
        max_new_tokens=53,
        prompts=1000,
        steps=200,
        lr=1e-6,
        data=HUB | {"name": "trl-lib/tldr"},
        pairs=HUB | {"name": "trl-lib/tldr-preference", "test": "validation"},
    ),
}


def is_run(stored) -> bool:
    """Whether this is a run's config.json: a model's directory has one too."""
    return isinstance(stored, dict) and {"task", "method"} <= set(stored)


def setting(default, text: str, **options):
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class Config:
    task: str = setting("reviews", f"{', '.join(TASKS)}, or a .jsonl file of prompts")
    transform: str | None = setting(
        None,
        "Phi: identity, log, exp<t>, bon_fp, won_fp, optimal; of the raw reward: none (the "
        "usual RLHF), median, standardised (default identity, or what the method implies)",
    )
    kl: float | None = setting(
        None,
        "budget in nats per response: beta is the theory's, then what keeps the measured KL to it "
        "(default 1.0)",
    )
    beta: float | None = setting(None, "KL strength, fixed, instead of --kl")
    procedure: str = setting(
        "bon", "inference-time procedure the run is aligned for", choices=PROCEDURES
    )
    n: int | None = setting(
        None, "samples the procedure draws (default 4; rewind: the most draws, 32)"
    )
    method: str = setting("ppo", "algorithm", choices=tuple(METHODS))
    K: int = setting(100, "reference samples a prompt for the calibration, Eq. 12")
    baseline: str | None = setting(
        None,
        "what the reward to go is compared with: a value from the reward of the response so "
        "far, a value head, the mean of other samples (default prefix with this package's "
        "reward model, else loo)",
        choices=("prefix", "value", "loo"),
    )
    steps: int | None = setting(None, "policy updates (default: the task's)")
    seed: int = setting(0, "seed of every random draw")
    out: str | None = setting(None, "run directory (default runs/TASK-TRANSFORM)")
    cache: str = setting("runs/cache", "where reference samples are kept for the next run")
    device: str = setting("auto", "auto, cpu or cuda")
    policy: str | None = setting(
        None, "hub name, directory or .gguf file of pi_ref (default: the task's)"
    )
    reward: str | None = setting(
        None, "reward model: a task's, a hub name or a directory (default: the task's)"
    )
    judge: str | None = setting(None, "judge model, likewise")
    prompts: int | None = setting(None, "training prompts (default: the task's)")
    layers: int | None = setting(
        None,
        "transformer blocks to train, the top ones; embeddings never are (default: the task's, "
        "or all)",
    )
    batch: int = setting(64, "prompts a step")
    G: int = setting(8, "samples of a prompt in a step")
    minibatch: int = setting(256, "responses an optimizer step")
    micro_batch: int = setting(
        64, "responses a forward and backward pass; halved when a GPU runs out of memory"
    )
    ppo_epochs: int = setting(1, "passes over a rollout")
    lr: float | None = setting(None, "learning rate of the policy (default: the task's)")
    clip: float = setting(0.2, "PPO's clipping range of the ratio")
    lam: float = setting(0.9, "GAE's lambda")
    max_new_tokens: int | None = setting(None, "longest response (default: the task's)")
    max_prompt_tokens: int | None = setting(
        None, "longest prompt of a task; longer ones are left out (default: the task's)"
    )

    def __post_init__(self):
        def need(ok: bool, name: str, rule: str):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {rule}")

        need(
            self.task in TASKS or self.task.endswith(".jsonl"),
            "task",
            f'use one of {", ".join(TASKS)}, or a .jsonl file with a "prompt" a line',
        )
        need(
            self.kl is None or self.beta is None,
            "beta",
            f"give --kl or --beta, not both (--kl is {self.kl})",
        )
        need(
            self.kl is None or 0 < self.kl < float("inf"),
            "kl",
            "the budget is a positive number of nats",
        )
        need(
            self.beta is None or 0 < self.beta < float("inf"),
            "beta",
            "the KL strength is a positive number",
        )
        for name in ("procedure", "method", "baseline"):
            known, default = (
                self.__dataclass_fields__[name].metadata["choices"],
                self.__dataclass_fields__[name].default,
            )
            need(getattr(self, name) in (*known, default), name, f"use one of {', '.join(known)}")
        for name in (
            "n",
            "K",
            "steps",
            "prompts",
            "layers",
            "batch",
            "G",
            "minibatch",
            "micro_batch",
            "ppo_epochs",
            "max_new_tokens",
            "max_prompt_tokens",
        ):
            need(
                getattr(self, name) is None or getattr(self, name) >= 1,
                name,
                "use a whole number of at least 1",
            )
        for name in ("lr", "clip"):
            need(
                getattr(self, name) is None or getattr(self, name) > 0,
                name,
                "use a positive number",
            )
        implied = METHODS[self.method]
        need(
            implied is None or self.transform in (None, implied),
            "transform",
            f"method {self.method} implies {implied}; leave --transform out, or use --method ppo",
        )
        need(
            self.transform not in RAW or self.method != "qrpo",
            "transform",
            "qrpo needs a calibrated reward",
        )
        need(
            self.procedure != "rewind" or self.method != "pkpo",
            "procedure",
            "pkpo has standard, bon and won",
        )
        need(
            self.method != "pkpo" or self.procedure == "standard" or (self.n or 4) <= self.G,
            "n",
            f"pkpo looks for the best of n among the --G {self.G} samples of a prompt; use a larger G or a smaller n",
        )
        need(
            self.G > 1
            or self.method != "grpo"
            and (self.transform not in RAW or self.baseline != "loo"),
            "G",
            "raw rewards are compared with the prompt's other samples; use at least 2",
        )
        need(
            self.K > 1
            or self.method not in ("qrpo", "ipo", "bonbon", "grpo_fixed")
            and self.transform != "standardised",
            "K",
            "the samples of a prompt are compared with each other; use at least 2",
        )
        need(0 <= self.lam <= 1, "lam", "use a number from 0 to 1")
        need(
            self.device in ("auto", "cpu") or self.device.startswith("cuda"),
            "device",
            "use auto, cpu or cuda",
        )

    def resolved(self) -> Config:
        """The same run with every computed default filled in, but for beta, which is the theory's
        (`train.py`).
        """
        task = TASKS.get(self.task, TASKS["reviews"])
        filled = {name: task[name] for name in task if getattr(self, name, 0) is None}
        transform = self.transform or METHODS[self.method] or "identity"
        # a reward of every prefix costs a tenth of a step
        cheap = (self.reward or task["reward"]) == "reviews"
        name = f"{Path(self.task).stem}-{transform}" + (
            f"-{self.method}" if self.method != "ppo" else ""
        )
        return replace(
            self,
            **filled,
            transform=transform,
            n=self.n or (32 if self.procedure == "rewind" else 4),
            baseline=self.baseline or ("prefix" if cheap else "loo"),
            kl=1.0 if self.kl is None and self.beta is None else self.kl,
            out=self.out or f"runs/{name}",
        )

    @classmethod
    def load(cls, path: Path) -> tuple[Config, dict]:
        """A run's settings, and all that its config.json holds: there `beta` is also given where it
        followed from `kl`.
        """
        stored = json.loads(path.read_text())
        if not is_run(stored):
            raise ValueError("it is no train.py run's")
        settings = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        if settings.get("kl") is not None:
            settings["beta"] = None
        return cls(**settings), stored

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser):
        """A flag for every setting; the parsed namespace holds only those that were given."""
        for f in fields(cls):
            kind = {"int": int, "float": float}.get(f.type.split(" ")[0], str)
            default = "" if f.default is None else f" (default {f.default})"
            choices = f" ({', '.join(f.metadata['choices'])})" if "choices" in f.metadata else ""
            parser.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=kind,
                default=argparse.SUPPRESS,
                metavar=f.type.split(" ")[0].upper(),
                help=f.metadata["help"] + choices + default,
            )


class Parser(argparse.ArgumentParser):
    """Flags in full only, and a bad one is one line, without the usage."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def run_script(main):
    """Run a script's main: bad input is one line on stderr and exit status 2, never a traceback."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"{Path(sys.argv[0]).name}: stopped; the same command (train.py: with --resume) goes on",
            file=sys.stderr,
        )
        sys.exit(130)


def write_json(path: Path, value):
    """JSON in one step: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def write_csv(path: Path, rows: list[dict]):
    """A table of rows with the same keys, in one step likewise; floats to 8 digits."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(
            {key: f"{x:.8g}" if isinstance(x, float) else x for key, x in row.items()}
            for row in rows
        )
    temporary.replace(path)
