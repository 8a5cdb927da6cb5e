"""A run's settings, in one frozen dataclass: defaults, command-line help, validation, to and from
JSON.

A setting whose default is None is computed: from the task (`TASKS`), or as its help says.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path

from minictrl.messages import DEVICES, MOST
from minictrl.methods import METHODS, get_method
from minictrl.procedures import PROCEDURES, parse_procedure

KINDS = {  # of settings, by their annotation
    "str": (str, "text"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
}
# settings that are computed where they are not given, so that every run has them
FILLED = ("transform", "n", "baseline", "steps", "out", "policy", "reward", "lr", "lam")
FILLED += ("max_new_tokens",)
TRACKERS = ("wandb", "trackio", "tensorboard")
WITHOUT_EFFECT = ("out", "device", "cache", "track")  # settings that do not change results

# What a run draws: the calibration's samples of pi_ref, those of the evaluation, of pi_ref and of
# pi. Training's steps are 1, 2, ... `Config.seed_for` has the seed of each.
CALIBRATION, TEST_REF, TEST = 0, -1, -2

# A data set on the hub (`data.py`): name, folder in it, its splits.
HUB = {"folder": None, "train": "train", "test": "test"}
HH = HUB | {"name": "Anthropic/hh-rlhf"}

# Files that `--task` takes, as `datasets` calls their kind; None where we read it.
FORMATS = {".jsonl": None, ".json": None, ".csv": None, ".parquet": "parquet"}

# Lengths and steps of chats, and of prompts of which nothing is known.
LONG = dict(max_prompt_tokens=512, max_new_tokens=256, steps=200)

CHAT = LONG | dict(
    reward="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    judge="Skywork/Skywork-Reward-V2-Llama-3.2-1B",
    prompts=1000,
    lr=1e-6,
)  # what the tasks on HH's chats share

# A task is one entry: models (hub names, directories, or its own name where this package has
# them), lengths in tokens, what differs from the embedded task's training, the baseline that its
# own models allow (else loo), prompts (`data`) and preference pairs (`pairs`, where not `data`
# too). The three tasks on the hub have not run with their own weights: their
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
        lr=7e-4,
        baseline="prefix",
    ),
    "helpful": CHAT
    | {"policy": "Qwen/Qwen2.5-0.5B-Instruct", "data": HH | {"folder": "helpful-base"}},
    "harmless": CHAT
    | {"policy": "HuggingFaceTB/SmolLM2-360M-Instruct", "data": HH | {"folder": "harmless-base"}},
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

# What follows from a policy of one's own, and with it a file of prompts: nothing of the reviews'.
# The learning rate is a guess; None: all blocks, all prompts.
OWN_POLICY = dict(layers=None, lr=1e-5)
OWN_PROMPTS = LONG | dict(reward=None, judge=None, prompts=None, max_prompt_tokens=None)


DATA_RULE = (
    f'use one of {", ".join(TASKS)}; or a file ({", ".join(FORMATS)}) with a "prompt" '
    "in each row, a directory of `datasets`, or ORG/NAME on the hub"
)


def is_data(name: str) -> bool:
    """Whether this can be a user's data: not a file of another format."""
    return is_file(name) or Path(name).is_dir() or ("/" in name and not Path(name).exists())


def is_file(name: str) -> bool:
    """Whether this is the name of a file of prompts."""
    return Path(name).suffix in FORMATS


def has_splits(task: str) -> bool:
    """Whether --data-split can name what is read of it: a user's data set with splits."""
    one = is_file(task) or Path(task, "state.json").is_file()  # saved by `datasets` without splits
    return task not in TASKS and not one


def is_object(text: str | None) -> bool:
    """Whether this is an object in JSON, or None."""
    try:
        return text is None or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def is_run(stored) -> bool:
    """Whether this is a run's config.json: a model's directory has one too."""
    return isinstance(stored, dict) and {"task", "method"} <= set(stored)


def setting(default, text: str, **rules):
    """A field with its help and rules: `choices`; `known`, a function that raises ValueError;
    `least`, the smallest value; `positive`.
    """
    return field(default=default, metadata={"help": text, **rules})


@dataclass(frozen=True)
class Config:
    task: str = setting(
        "reviews",
        f"{', '.join(TASKS)}; or prompts of your own: a file ({', '.join(FORMATS)}), "
        "a directory of `datasets`, or a data set on the hub (ORG/NAME)",
    )
    column: str | None = setting(
        None,
        "where prompts of your own are (default: prompt, messages or conversations, the first that "
        "a row has)",
    )
    template_args: str | None = setting(
        None,
        "what the policy's chat template takes beside the messages, in JSON: "
        '{"enable_thinking": false}',
    )
    data_split: str = setting("train", "the split of a data set of your own that is read")
    transform: str | None = setting(
        None,
        "Phi: identity, log, exp<t>, bon_fp, won_fp, optimal; of the raw reward: none (the usual "
        "RLHF), median, standardised (default identity, or what the method implies)",
    )
    kl: float | None = setting(
        None,
        "budget in nats per response: beta is the theory's, then what keeps the measured KL to it "
        "(default 1.0)",
        positive=True,
    )
    beta: float | None = setting(None, "KL strength, fixed, instead of --kl", positive=True)
    procedure: str = setting(
        "bon",
        f"inference-time procedure the run is aligned for ({', '.join(PROCEDURES)}, soft<t>)",
        known=parse_procedure,
    )
    n: int | None = setting(
        None,
        "samples the procedure draws (default 4; rewind: the most draws, 32; poisson: on average)",
        least=1,
    )
    method: str = setting("ppo", "algorithm", choices=METHODS)
    K: int = setting(100, "reference samples per prompt for the calibration, Eq. 12", least=1)
    reference: str | None = setting(
        None,
        "a file of reference samples to calibrate with, in place of drawing them (exchange.py)",
    )
    baseline: str | None = setting(
        None,
        "what the reward to go is compared with: a value from the reward of the response so far, a "
        "value head, the mean of other samples (default: the task's with its own policy and reward "
        "model, else loo)",
        choices=("prefix", "value", "loo"),  # those of baselines.py
    )
    steps: int | None = setting(None, "policy updates (default: the task's)", least=1)
    track: str | None = setting(
        None, "a tracker to log to beside metrics.jsonl, if it is installed", choices=TRACKERS
    )
    seed: int = setting(0, "seed of every random draw")
    out: str | None = setting(
        None, "run directory (default runs/TASK-TRANSFORM, with -METHOD behind it if not ppo)"
    )
    cache: str = setting("runs/cache", "where reference samples are kept for the next run")
    device: str = setting("auto", "auto, cpu, cuda or cuda:INDEX")
    policy: str | None = setting(
        None, "hub name, directory or .gguf file of pi_ref, or a task's (default: the task's)"
    )
    reward: str | None = setting(
        None,
        "reward model: a task's, a hub name, a directory, a .gguf file or FILE.py:NAME (default: "
        "the task's)",
    )
    judge: str | None = setting(
        None,
        "judge model, likewise (default: the task's; none with a function as the reward, or with "
        "prompts and a policy of your own)",
    )
    prompts: int | None = setting(
        None, "training prompts (default: the task's, or all of a file's)", least=1
    )
    layers: int | None = setting(
        None,
        "transformer blocks to train, the top ones; embeddings never are (default: the task's for "
        "its own policy, else all)",
        least=1,
    )
    batch: int = setting(32, "prompts per step", least=1)
    G: int = setting(8, "samples per prompt in a step", least=1)
    minibatch: int = setting(128, "rows (responses; pairs, groups) per optimizer step", least=1)
    micro_batch: int = setting(
        64, "rows per forward and backward pass; halved when memory runs out", least=1
    )
    ppo_epochs: int = setting(1, "passes over a rollout", least=1)
    lr: float | None = setting(
        None,
        f"learning rate of the policy (default: the task's for its own, else {OWN_POLICY['lr']:g})",
        positive=True,
    )
    clip: float = setting(0.2, "PPO's clipping range of the ratio", positive=True)
    lam: float | None = setting(
        None, "GAE's lambda (default 0.9, with --baseline value 1, see train.py)"
    )
    max_new_tokens: int | None = setting(None, "longest response (default: the task's)", least=1)
    max_prompt_tokens: int | None = setting(
        None,
        "longest prompt in tokens; longer ones are left out (default: the task's; all of your own)",
        least=1,
    )

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            kind, rule = KINDS[f.type.split(" ")[0]]
            fits = isinstance(value, kind) and not isinstance(value, bool)
            self._need(fits or (value is None and "None" in f.type), f.name, f"use {rule}")
            self._need(value != "", f.name, "it is empty: give a value, or leave it out")
            if value is None or value == f.default:
                continue
            if "choices" in f.metadata:
                known = f.metadata["choices"]
                self._need(value in known, f.name, f"use one of {', '.join(known)}")
            if "known" in f.metadata:
                f.metadata["known"](value)
            if "least" in f.metadata:
                least = f.metadata["least"]
                self._need(value >= least, f.name, f"use a whole number of at least {least}")
                self._need(value <= MOST, f.name, f"use at most {MOST}")
            if "positive" in f.metadata:
                self._need(0 < value < float("inf"), f.name, "use a positive number")
        self._need(self.batch * self.G <= MOST, "G", f"with --batch at most {MOST} samples a step")
        self._need(abs(self.seed) < 2**40, "seed", "use a number of at most 40 bits")
        self._need(self.task in TASKS or is_data(self.task), "task", DATA_RULE)
        self._need(
            self.own_prompts or self.column is None,
            "column",
            f"task {self.task} knows where its prompts are; leave it out",
        )
        self._need(
            self.data_split == "train" or has_splits(self.task),
            "data_split",
            f"--task {self.task} has no splits to choose from; leave it out",
        )
        self._need(is_object(self.template_args), "template_args", "give an object in JSON")
        both = self.kl is not None and self.beta is not None
        self._need(not both, "beta", f"give --kl or --beta, not both (--kl is {self.kl})")
        self._need(self.lam is None or 0 <= self.lam <= 1, "lam", "use a number from 0 to 1")
        known_device = DEVICES.fullmatch(self.device)
        self._need(known_device, "device", "use auto, cpu, cuda or cuda:INDEX")

    @property
    def own_prompts(self) -> bool:
        """Whether the prompts are the user's, and no task's."""
        return self.task not in TASKS

    def _need(self, ok: bool, name: str, rule: str):
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {rule}")

    def resolved(self) -> Config:
        """The same run with every computed default filled in, checked by its method.

        beta is not: it is the theory's (`budget.py`). Raises ValueError.
        """
        task = self._defaults()
        if not (self.reward or task["reward"]):
            raise ValueError(
                "--reward is missing: these prompts and this policy have no reward model; give a "
                "hub name, a directory or FILE.py:NAME (reviews: that of film reviews)"
            )
        settings = {field.name for field in fields(self)}  # an entry also has `data` and `pairs`
        filled = {k: x for k, x in task.items() if k in settings and getattr(self, k) is None}
        method = get_method(self.method)
        self._need(
            method.transform is None or self.transform in (None, method.transform),
            "transform",
            f"method {self.method} implies {method.transform}; leave --transform out, or use "
            "--method ppo",
        )
        transform = self.transform or method.transform or method.default_transform
        own = all(getattr(self, role) in (None, task[role]) for role in ("policy", "reward"))
        name = f"{Path(self.task).stem}-{transform}"
        if self.method != "ppo":
            name += f"-{self.method}"
        baseline = self.baseline or (own and task.get("baseline")) or "loo"
        config = replace(
            self,
            **filled | {"baseline": baseline},
            transform=transform,
            n=self.n or (32 if self.procedure == "rewind" else 4),
            lam=(1.0 if baseline == "value" else 0.9) if self.lam is None else self.lam,
            kl=1.0 if self.kl is None and self.beta is None else self.kl,
            out=self.out or f"runs/{name}",
        )
        method.check(config)
        return config

    def _defaults(self) -> dict:
        """The task's entry, without what belongs to a policy or to prompts that aren't its own."""
        if self.own_prompts:
            task = TASKS["reviews"] | {"prompts": None, "max_prompt_tokens": None}
        else:
            task = TASKS[self.task]
        if ".py:" in (self.reward or ""):
            task = task | {"judge": None}  # a model's opinion of reviews is none of its answers
        if self.policy in (None, task["policy"]):
            return task
        return task | OWN_POLICY | (OWN_PROMPTS if self.own_prompts else {})

    def command(self) -> str:
        """The command that makes a run with these settings, anywhere: what isn't a default."""
        named = ("task", "policy", "reward", "judge", "method", "transform", "procedure")
        given = {name: getattr(self, name) for name in named}
        usual = Config(**given).resolved()  # lam's default is that of the run's own baseline
        usual = replace(usual, lam=Config(**given, baseline=self.baseline).resolved().lam)
        own = self._defaults()
        flags = []
        for f in fields(self):
            value = getattr(self, f.name)
            default = own.get(f.name, f.default) if f.name in named else getattr(usual, f.name)
            if value not in (None, default) and f.name not in WITHOUT_EFFECT:
                flags.append(f"--{f.name.replace('_', '-')} {shlex.quote(str(value))}")
        return " ".join(["python train.py", *flags])

    def seed_for(self, draw: int) -> int:
        """The seed of a draw of responses. No two draws share one, and no two values of --seed.

        So the spread between runs of different --seed covers all that is random in a run. Runs of
        one --seed share their samples of pi_ref, which are cached, and so their luck.
        """
        return self.seed * 1_000_003 + draw

    @classmethod
    def of(cls, stored: dict) -> tuple[Config, dict]:
        """(settings, the whole dict) of a run's config.json.

        With a KL budget the stored beta is a result, so the settings' beta is None. Raises
        ValueError on what is no run's, has a field missing, or settings that no run may have.
        """
        if not is_run(stored):
            raise ValueError("it is no train.py run's")
        settings = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        if settings.get("kl") is not None:
            settings["beta"] = None
        config = cls(**settings)
        missing = [name for name in FILLED if getattr(config, name) is None]
        if missing or config.kl is config.beta is None:
            raise ValueError(f"it has no {', '.join(missing) or 'kl'}")
        get_method(config.method).check(config)
        if not isinstance(stored.get("made_from", {}), dict):
            raise ValueError(f"made_from is {str(stored['made_from'])[:60]}")
        if not isinstance(stored.setdefault("beta", None), (Real, type(None))):
            raise ValueError(f"beta is {str(stored['beta'])[:60]}")
        return config, stored

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
