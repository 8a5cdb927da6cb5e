"""What calibration costs: its share of the time of a run, in %."""

from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory

import torch

from minictrl.bench.sampling import K, T
from minictrl.bench.step import PROMPTS, G, train
from minictrl.bench.timing import describe, seconds
from minictrl.config import Config
from minictrl.rollout import sample_and_score
from minictrl.task import load_task

EPOCHS = 80  # the paper's passes over the prompts (App. F), a response per prompt in each
PAPER = 29  # % of its time were calibration


def calibration_share(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """Per prompt: K responses sampled and scored, against EPOCHS responses trained on.

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
