"""What calibration costs: its share of the time of a run, in %."""

from collections.abc import Iterator
from tempfile import TemporaryDirectory

import torch

from minictrl.bench.sampling import K, T
from minictrl.bench.step import PROMPTS, G, train
from minictrl.bench.timing import describe, seconds
from minictrl.data import load_prompts
from minictrl.models import load_policy, load_scorer
from minictrl.rollout import score
from minictrl.sampling import sample

EPOCHS = 80  # the paper's passes over the prompts (App. F), a response per prompt in each
PAPER = 29  # % of its time were calibration


def calibration_share(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """Per prompt: K responses sampled and scored, against EPOCHS responses trained on.

    Nothing is cached. A response that is trained on costs its part of a step of train.py.
    """
    model, tokenizer = load_policy(policy)
    model.to(device)
    reward = load_scorer("reviews", "reward", device=device)
    prompts = load_prompts("reviews")[: 32 if quick else 128]

    def calibrate(M: int) -> None:
        samples = sample(model, tokenizer, prompts, num_samples=M, max_new_tokens=T, seed=0)
        score(reward, prompts, samples.texts)

    calibrate(2)  # a warm-up
    calibration = seconds(lambda: calibrate(K)) / len(prompts)
    with TemporaryDirectory() as folder:
        shape = {"batch": PROMPTS, "G": G}
        metrics = train(folder, policy, device, 2 if quick else 6, shape)
    spent = [row["seconds"] for row in metrics]
    step = (spent[-1] - spent[0]) / (len(spent) - 1)  # without the first step, a warm-up
    training = EPOCHS * step / (PROMPTS * G)
    share = 100 * calibration / (calibration + training)
    setting = (
        f"{describe(policy, model)}; per prompt {calibration:.3g} s to sample and score K = {K} "
        f"responses, {training:.3g} s to train on {EPOCHS}, at {step:.3g} s per {PROMPTS * G}"
    )
    unit = "% of a run, less is better"
    yield dict(ours=share, theirs=PAPER, ratio=share / PAPER, unit=unit, setting=setting)
