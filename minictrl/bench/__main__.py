"""Speed as ratios against what a user would pick, on the same work, weights and distribution.

    python -m minictrl.bench                                      # every row python -m
    minictrl.bench --quick --json bench.json            # less work, noisier python -m
    minictrl.bench --policy DIR/FILE.gguf               # with another policy python -m
    minictrl.bench --growth DIR                         # time and memory against K, prompts,
    length, size python -m minictrl.bench --rows presets                       # a GPU at each
    preset's shapes, random weights python -m minictrl.bench --paper                              #
    GPU hours at 7 B and 70 B, by arithmetic alone

Both sides run in turn in this process, after a warm-up; a ratio is the median of the ratios of
neighbours, so that a machine that slows down does so for both. `ratio` is ours over theirs, where
more is better (but for calibration_share).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from minictrl.bench.presets import preset_rows
from minictrl.bench.scaling import (
    EPOCHS,
    decode_roofline,
    generate,
    growth,
    paper_table,
    rate,
    response_tokens,
    seconds,
)
from minictrl.cli import run_script
from minictrl.config import Config
from minictrl.data import load_prompts
from minictrl.files import write_json
from minictrl.lm.device import resolve_device
from minictrl.lm.prompts import encode_prompts
from minictrl.models import load_policy, render
from minictrl.runs import read_metrics, rollout
from minictrl.sampling import sample
from minictrl.studies.sweep import script
from minictrl.task import load_task
from minictrl.update import freeze

K, T = 100, 24  # samples a prompt, as in calibration; the longest response
# responses of a step, of an optimizer step: train.py's
BATCH = {f.name: f.default for f in fields(Config)}
# calibration's share of the paper's run, of EPOCHS passes over the prompts, in % (App. F)
SHARE = 29


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minictrl.bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="less work and fewer repeats")
    parser.add_argument(
        "--policy",
        default="reviews",
        help="task, hub name, directory or .gguf file (default reviews)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"which of {', '.join(ROWS)} (default all)",
    )
    parser.add_argument(
        "--growth", type=Path, metavar="DIR", help="write growth.csv and .png there, and no rows"
    )
    parser.add_argument(
        "--paper", action="store_true", help="print what a run costs at 7 B and 70 B, and no rows"
    )
    args = parser.parse_args(argv)
    device, rows = resolve_device(args.device), []
    if args.paper:
        return print(paper_table())
    if args.growth:
        return growth(args.growth, device.type, args.quick)

    def keep() -> None:  # what is measured, whatever happens to the rows after it
        if args.json:
            write_json(args.json, {"rows": rows})

    for name in args.rows:
        row = ROWS[name](args.policy, device, args.quick)
        if isinstance(row, str):
            print(f"{name} is left out: {row}", file=sys.stderr)
            row = []
        for each in [row] if isinstance(row, dict) else row:
            rows.append({"name": name} | each)
            keep()
    keep()
    print("| name | ours | theirs | ratio | unit | setting |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| {name} | {ours:.4g} | {theirs:.4g} | {ratio:.2f} | {unit} | {setting} |".format(
                **row
            )
        )


def paired(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int
) -> dict[str, float]:
    """Medians of two rates and of the ratios of neighbours."""
    rates = [(ours(), theirs()) for _ in range(repeats)]
    return {
        "ours": statistics.median(a for a, _ in rates),
        "theirs": statistics.median(b for _, b in rates),
        "ratio": statistics.median(a / b for a, b in rates),
    }


# --- sampling ---


def sample_vs_generate(policy: str, device: torch.device, quick: bool) -> dict:
    """Response tokens a second (EOS counts, nothing after it), K samples a prompt, against
    transformers' generate at the best of its settings: how many prompts a call, dynamic or static
    cache."""
    on_cpu = device.type == "cpu"
    model, tokenizer = load_policy(policy, dtype=torch.float32 if on_cpu else torch.bfloat16)
    model.to(device)
    count, repeats = (
        (2, 3) if on_cpu and model.num_parameters() > 5e7 else (8, 3) if quick else (32, 5)
    )
    texts = load_prompts("reviews")[:count]
    if tokenizer.chat_template:
        texts = [
            render(tokenizer, [{"role": "user", "content": f"Continue this review: {text}"}])
            for text in texts
        ]
    settings = [
        (size, cache)
        for cache in ("dynamic", "static")[: 1 if quick else 2]
        for size in (1, 4, 16)
        if size <= count
    ]
    theirs = partial(generate, model, tokenizer, num_samples=K, max_new_tokens=T)
    speed = {}
    for size, cache in settings:
        work = partial(theirs, texts[: max(size, 4)], size, cache)
        speed[size, cache] = max(rate(work) for _ in range(2))  # the first is a warm-up, too
    best = max(speed, key=speed.get)

    def ours() -> float:
        return float(
            sample(model, tokenizer, texts, num_samples=K, max_new_tokens=T, seed=0).mask.sum()
        )

    ours()
    result = paired(partial(rate, ours), partial(rate, partial(theirs, texts, *best)), repeats)
    length = statistics.mean(map(len, encode_prompts(tokenizer, texts)))
    tried = ", ".join(f"{size} {cache}" for size, cache in settings)
    return result | {
        "unit": "tokens/s",
        "setting": (
            f"{Path(policy).name}, {model.num_parameters() / 1e6:.3g} M parameters, {machine(device)}, {count} prompts of "
            f"{length:.0f} tokens, K = {K}, at most {T} new tokens; generate with {best[0]} prompts a call, {best[1]} "
            f"cache (best of {tried})"
        ),
    }


def machine(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


# --- a step of training ---


def step_vs_trl(method: str, policy: str, device: torch.device, quick: bool) -> dict | str:
    """Response tokens a second of whole steps, rollout, scoring and update, of train.py and of
    TRL's trainer.
    """
    if not all(map(find_spec, ("trl", "datasets", "accelerate"))):
        return "pip install -e '.[bench]' (trl==1.12.0, the last that has PPO)"
    trainer, baseline, values = TRL[method]
    steps, repeats = (1, 1) if quick else (2, 3)
    # A learning rate so small that both sides go on sampling from the policy they start with.
    settings = dict(
        policy=policy, prompts=BATCH["batch"], max_new_tokens=T, device=device.type, lr=1e-6
    )
    with tempfile.TemporaryDirectory() as folder:
        task = load_task(Config(**settings).resolved(), "train")
        config = copy.deepcopy(task.policy.config)
        config.num_labels, config.pad_token_id = 1, task.tokenizer.pad_token_id
        scorer = AutoModelForSequenceClassification.from_config(config).eval()
        for part in (scorer, task.tokenizer):
            part.save_pretrained(f"{folder}/reward")
        count, generate = [0], task.policy.generate

        def counting(*args, **kwargs):
            out = generate(*args, **kwargs)
            tokens = getattr(out, "sequences", out)[:, kwargs["input_ids"].shape[1] :]
            count[0] += response_tokens(tokens, task.tokenizer.eos_token_id)
            return out

        task.policy.generate = counting
        freeze(task.policy, None)
        theirs = trainer(
            task,
            scorer,
            steps,
            dict(
                output_dir=folder,
                learning_rate=1e-6,
                temperature=1.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=device.type == "cpu",
                report_to="none",
                save_strategy="no",
                logging_steps=10**9,
                disable_tqdm=True,
            ),
        )

        def train() -> int:
            before = count[0]
            with contextlib.redirect_stdout(io.StringIO()):
                theirs.train()
            return count[0] - before

        settings["layers"] = task.policy.config.num_hidden_layers  # all, on both sides
        settings |= dict(reward=f"{folder}/reward", baseline=baseline, K=2, steps=steps)
        sides = partial(train_rate, folder, **settings), partial(rate, train)
        for side in sides:
            side()  # a warm-up
        result = paired(*sides, repeats)
    return result | {
        "unit": "tokens/s",
        "setting": (
            f"{Path(policy).name}, {task.policy.num_parameters() / 1e6:.3g} M parameters, {machine(device)}; a whole step: "
            f"{BATCH['batch']} prompts x {BATCH['G']} responses of at most {T} tokens, scored by a classifier of the "
            f"policy's size, {BATCH['ppo_epochs']} epoch, minibatches of {BATCH['minibatch']}, float32, no dropout, "
            f"no embedding trained; {values}; trl 1.12.0"
        ),
    }


def train_rate(folder: str, **settings) -> float:
    """Response tokens a second of train.py's steps: all of a step, nothing of the calibration."""
    settings |= {"out": f"{folder}/run", "cache": f"{folder}/cache"}
    flags = [
        x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", str(value))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        script("train").main(["--overwrite", *flags])
    last = read_metrics(Path(folder, "run"))[-1]
    return last["tokens"] / last["seconds"]


def trl_ppo(task, scorer, steps: int, common: dict):
    """TRL's PPO has one response a prompt, so a prompt comes G times. With micro-batches it would
    step the optimizer once a batch: one micro-batch a minibatch is the setting with a step a
    minibatch."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    size = BATCH["batch"] * BATCH["G"]
    args = PPOConfig(
        **common,
        per_device_train_batch_size=size,
        num_mini_batches=size // BATCH["minibatch"],
        num_ppo_epochs=BATCH["ppo_epochs"],
        total_episodes=size * steps,
        response_length=T,
        kl_coef=0.1,
        stop_token="eos",
        local_rollout_forward_batch_size=128,
        num_sample_generations=0,
    )
    data = Dataset.from_list(
        [{"input_ids": ids} for ids in encode_prompts(task.tokenizer, task.texts)] * BATCH["G"]
    )
    ref_policy, value_model = copy.deepcopy(task.policy), copy.deepcopy(scorer)
    return PPOTrainer(
        args, task.tokenizer, task.policy, ref_policy, scorer, data, value_model, eval_dataset=data
    )


def trl_rloo(task, scorer, steps: int, common: dict):
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    size, minibatch, epochs = BATCH["batch"] * BATCH["G"], BATCH["minibatch"], BATCH["ppo_epochs"]
    args = RLOOConfig(
        **common,
        per_device_train_batch_size=minibatch,
        num_generations=BATCH["G"],
        num_iterations=epochs,
        steps_per_generation=size // minibatch,
        max_steps=steps * epochs * size // minibatch,
        beta=0.1,
        max_completion_length=T,
    )
    return RLOOTrainer(
        task.policy,
        scorer,
        args,
        Dataset.from_list([{"prompt": text} for text in task.texts]),
        processing_class=task.tokenizer,
        reward_processing_classes=task.tokenizer,
    )


TRL = {
    "ppo": (
        trl_ppo,
        "value",
        "a value head on the policy's trunk against a separate value model of its size (TRL's "
        "PPO shares no trunk)",
    ),
    "rloo": (trl_rloo, "loo", "no value model"),
}


# --- calibration ---


def calibration_share(policy: str, device: torch.device, quick: bool) -> dict:
    """Calibration's share of a run's time, nothing cached, by the paper's count: a response a
    prompt in each epoch.
    """
    config = Config(policy=policy, device=device.type).resolved()
    task = load_task(config, "train")
    P, size = len(task.prompts), config.batch * config.G
    some = range(0, P, 8 if quick else 2)
    draw = partial(rollout, task, task.policy, some, seed=0)
    draw(num_samples=2)  # a warm-up
    calibration = seconds(partial(draw, num_samples=K)) * P / len(some)
    with tempfile.TemporaryDirectory() as folder:
        train_rate(folder, policy=policy, device=device.type, K=2, steps=2 if quick else 6)
        spent = [row["seconds"] for row in read_metrics(Path(folder, "run"))]
    step = (spent[-1] - spent[0]) / (len(spent) - 1)  # without the first, a warm-up
    steps = EPOCHS * P / size, config.steps, EPOCHS * P / config.batch
    paper, default, passes = (100 * calibration / (calibration + count * step) for count in steps)
    return {
        "ours": paper,
        "theirs": SHARE,
        "ratio": paper / SHARE,
        "unit": "% of a run, less is better",
        "setting": (
            f"{Path(policy).name}, {machine(device)}, {P} prompts, K = {K}: {calibration:.1f} s; {step:.2f} s a step of "
            f"{size} responses; {EPOCHS} epochs are {steps[0]:.0f} steps at one response a prompt and epoch, as the paper "
            f"counts; {default:.1f} % of the default run's {config.steps} steps; {passes:.1f} % of {EPOCHS} passes with "
            f"G = {config.G}"
        ),
    }


ROWS = {
    "sample_vs_generate": sample_vs_generate,
    "ppo_step_vs_trl": partial(step_vs_trl, "ppo"),
    "rloo_step_vs_trl": partial(step_vs_trl, "rloo"),
    "calibration_share": calibration_share,
    "decode_roofline": decode_roofline,
    "presets": lambda policy, device, quick: preset_rows(device, quick),
}

if __name__ == "__main__":
    run_script(main)
