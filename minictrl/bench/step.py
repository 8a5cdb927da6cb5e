"""A whole PPO step, with rollout, scoring and update: train.py against TRL's PPOTrainer; and what
share of a run calibration takes.

Both sides have the same policy, prompts and reward model, a classifier of the policy's size with
random weights. They make the same optimizer steps: one epoch over minibatches, in float32, without
dropout, all blocks trained and no embedding. TRL's value model is a model of its own, train.py's a
head on the policy's trunk. Unit: responses per second, because both sides draw from one policy, so
that their responses are alike in length.
"""

import contextlib
import copy
import io
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForSequenceClassification

from minictrl.bench.sampling import K, T
from minictrl.bench.timing import LeftOut, compare, describe, seconds
from minictrl.config import Config
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts
from minictrl.models import load_policy
from minictrl.rollout import sample_and_score
from minictrl.runs import read_metrics
from minictrl.studies import sweep
from minictrl.task import load_task
from minictrl.update import freeze

PROMPTS, G, MINIBATCH = 64, 8, 256  # G responses per prompt
LR = 1e-6  # so small that both sides go on sampling from the policy they start with


def ppo_step_vs_trl(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """Rates over two steps (one with --quick), after a warm-up; nothing of the calibration."""
    if not all(map(find_spec, ("trl", "datasets", "accelerate"))):
        raise LeftOut("pip install -e '.[bench]' (trl==1.12.0, the last that has PPO)")
    steps, repeats = (1, 1) if quick else (2, 3)
    model, tokenizer = load_policy(policy)
    model.to(device)
    freeze(model, None)  # trains all blocks, as --layers below asks train.py to
    same = {
        "baseline": "value",
        "prompts": PROMPTS,
        "batch": PROMPTS,
        "G": G,
        "minibatch": MINIBATCH,
        "ppo_epochs": 1,
        "max_new_tokens": T,
        "lr": LR,
        "layers": model.config.num_hidden_layers,
    }
    with TemporaryDirectory() as folder:
        config = copy.deepcopy(model.config)
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        scorer = AutoModelForSequenceClassification.from_config(config).eval()
        same["reward"] = f"{folder}/reward"
        scorer.save_pretrained(same["reward"])
        tokenizer.save_pretrained(same["reward"])
        trainer = ppo_trainer(model, tokenizer, scorer, steps, folder)

        def ours() -> float:
            return PROMPTS * G * steps / train(folder, policy, device, steps, same)[-1]["seconds"]

        def theirs() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                return PROMPTS * G * steps / seconds(trainer.train)

        compare(ours, theirs, 1)  # a warm-up
        result = compare(ours, theirs, repeats)
    setting = (
        f"{describe(policy, model)}; a whole step: {PROMPTS} prompts x {G} responses of at most "
        f"{T} tokens, scored by a classifier of the policy's size, one epoch, minibatches of "
        f"{MINIBATCH}, float32, no dropout, no embedding trained; a value head on the policy's "
        "trunk against TRL's separate value model; trl 1.12.0"
    )
    yield result | {"unit": "responses/s", "setting": setting}


def train(folder: str, policy: str, device: torch.device, steps: int, others: dict) -> list[dict]:
    """Runs train.py; returns the rows of its metrics.jsonl, whose seconds hold no calibration."""
    run = Path(folder, "run")
    common = {"policy": policy, "device": device.type, "K": 2, "steps": steps}
    places = {"out": run, "cache": f"{folder}/cache"}
    with contextlib.redirect_stdout(io.StringIO()):
        sweep.train(others | common | places, "--overwrite")
    return read_metrics(run)


def ppo_trainer(model, tokenizer, scorer, steps: int, folder: str):
    """TRL's PPO draws one response per prompt, so each prompt comes G times.

    With micro-batches it would step the optimizer once per batch: one micro-batch per minibatch
    is the setting with a step per minibatch.
    """
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * G,
        num_mini_batches=PROMPTS * G // MINIBATCH,
        num_ppo_epochs=1,
        total_episodes=PROMPTS * G * steps,
        response_length=T,
        stop_token="eos",
        temperature=1.0,
        learning_rate=LR,
        kl_coef=0.1,
        local_rollout_forward_batch_size=128,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=model.device.type == "cpu",
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_steps=10**9,
        disable_tqdm=True,
    )
    prompts = encode_prompts(tokenizer, load_prompts("reviews")[:PROMPTS])
    data = Dataset.from_list([{"input_ids": ids} for ids in prompts] * G)
    reference, value_model = copy.deepcopy(model), copy.deepcopy(scorer)
    return PPOTrainer(
        args, tokenizer, model, reference, scorer, data, value_model, eval_dataset=data
    )


# --- what calibration costs ---

EPOCHS = 80  # the paper's passes over the prompts (App. F), a response per prompt in each
PAPER = 29  # % of its time were calibration


def calibration_share(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """In %. Per prompt: K responses sampled and scored, against EPOCHS responses trained on.

    Nothing is cached. A response that is trained on costs its part of a step of train.py.
    """
    prompts = 32 if quick else 128
    config = Config(policy=policy, prompts=prompts, device=str(device), max_new_tokens=T)
    task = load_task(config.resolved(), "train")
    calibrate = partial(sample_and_score, task, task.policy, range(prompts), seed=0)
    calibrate(num_samples=2)  # a warm-up
    calibration = seconds(partial(calibrate, num_samples=K)) / prompts
    with TemporaryDirectory() as folder:
        shape = {"batch": PROMPTS, "G": G}
        metrics = train(folder, policy, device, 2 if quick else 6, shape)
    spent = [row["seconds"] for row in metrics]
    step = (spent[-1] - spent[0]) / (len(spent) - 1)  # without the first step, a warm-up
    training = EPOCHS * step / (PROMPTS * G)
    share = 100 * calibration / (calibration + training)
    setting = (
        f"{describe(policy, task.policy)}; per prompt {calibration:.3g} s to sample and score "
        f"K = {K} responses, {training:.3g} s to train on {EPOCHS}, at {step:.3g} s per "
        f"{PROMPTS * G}"
    )
    unit = "% of a run, less is better"
    yield dict(ours=share, theirs=PAPER, ratio=share / PAPER, unit=unit, setting=setting)
