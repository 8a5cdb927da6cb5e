"""Responses and their rewards: those of a step, and the reference samples of the calibration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minictrl.batch import Batch
from minictrl.files import digest
from minictrl.lm.device import check_room
from minictrl.reference import Reference, cached, count_of
from minictrl.sampling import SAMPLER, Samples, sample
from minictrl.task import Task
from minictrl.track import SHOWN
from minictrl.update import all_logprobs
from minictrl.winrate import mean_stderr

LONGEST = 8  # samples whose log-probabilities `check_sampler` computes again
CLOSE = 1e-3  # nats a token


def indices_of_step(step: int, count: int, size: int, seed: int) -> Tensor:
    """(size,) which of `count` items a step works on: passes over all, each in a random order.

    A function of seed and step alone, so that a resumed run goes on as it would have.
    """
    first = step * size
    epochs = range(first // count, (first + size - 1) // count + 1)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + epoch) for epoch in epochs]
    order = torch.cat([torch.randperm(count, generator=generator) for generator in generators])
    return order[first - epochs[0] * count :][:size]


def batch_of(task: Task, index: Tensor, samples: Samples) -> Batch:
    """Samples (P, G, T) as B = P G rows with their prompts, those of an index (P,)."""
    batch = Batch(
        prompt_index=index.repeat_interleave(samples.tokens.shape[1]).to(samples.tokens.device),
        tokens=samples.tokens.flatten(0, 1),
        mask=samples.mask.flatten(0, 1),
        old_logprobs=samples.logprobs.flatten(0, 1),
    )
    return with_prompts(task, batch)


def with_prompts(task: Task, batch: Batch) -> Batch:
    """The batch with the tokens of its rows' prompts."""
    return replace(
        batch, prompt=task.ids[batch.prompt_index], prompt_mask=task.mask[batch.prompt_index]
    )


def sample_and_score(
    task: Task,
    model: nn.Module,
    index: list[int] | Tensor,
    *,
    num_samples: int,
    seed: int,
    first_sample: int = 0,
    reference: Reference | None = None,
) -> tuple[Samples, Tensor]:
    """Responses of a model to the prompts of an index, and their rewards (P, num_samples).

    reference: samples of the same prompts that the rewards will be compared with, so that equal
    responses tie (`Reference.with_known_rewards`).
    """
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
    r = score(task.reward, [task.prompts[i] for i in index], samples.texts)
    if reference:
        r = reference.with_known_rewards(r, samples.tokens, samples.mask)
    return samples, r


def score(scorer: Callable, prompts: list, texts: list[list[str]]) -> Tensor:
    """(P, M) scores of M texts for each prompt; equal texts of a prompt are scored once."""
    unique = list(dict.fromkeys((i, text) for i, row in enumerate(texts) for text in row))
    scores = scorer([prompts[i] for i, _ in unique], [text for _, text in unique]).tolist()
    known = dict(zip(unique, scores, strict=True))
    return torch.tensor([[known[i, text] for text in row] for i, row in enumerate(texts)])


def shown_responses(task: Task, index: Tensor, texts: list[list[str]], r: Tensor) -> list[tuple]:
    """(prompt, response, reward) of the first response to each of the first SHOWN prompts.

    texts, r: (P, G), to the prompts of an index (P,).
    """
    first = [row[0] for row in texts[:SHOWN]]
    of_each = zip(index.tolist(), first, r[:, 0].tolist())
    return [(task.texts[i], text, reward) for i, text, reward in of_each]


def rollout_stats(batch: Batch, r: Tensor, C_hat: Tensor) -> dict[str, float]:
    """Means over a rollout: rewards, KL(pi || pi_ref) in nats per response, entropy per token.

    r, C_hat: (P, G). Responses to one prompt are not independent, so the KL's standard
    error is that over prompts; of one prompt that over its responses, of one response NaN.
    """
    kl = batch.kl()  # (B,)
    prompts = batch.prompt_index.unique()  # a small task's may come twice in a step
    by_prompt = torch.stack([kl[batch.prompt_index == i].mean() for i in prompts])
    independent = by_prompt if len(prompts) > 1 else kl
    means = {
        "reward": r.mean(),
        "C_hat": C_hat.mean(),
        "kl_ref": kl.mean(),
        "kl_ref_stderr": mean_stderr(independent)[1],
        "entropy": -batch.old_logprobs.sum() / batch.mask.sum(),
    }
    return {name: float(value) for name, value in means.items()}


# --- reference samples ---


def reference_samples(task: Task, K: int, *, seed: int, cache: str, name: str) -> Reference:
    """K samples of pi_ref for each prompt with their rewards, from the cache as far as it has them.

    cache: its directory. name: of the progress bar. Raises ValueError on more than fit.
    """
    check_room(K * len(task.texts), task.max_new_tokens, "--K or --samples, --prompts")

    def draw(index: list[int], first: int, count: int) -> Reference:
        return Reference.of(
            *sample_and_score(
                task, task.policy, index, num_samples=count, seed=seed, first_sample=first
            )
        )

    return cached(draw, task.cache_keys, K, Path(cache), reference_key(task, seed), name)


def samples_of_run(run: Path, task: Task, K: int, *, seed: int) -> Reference | None:
    """The first K reference samples of each prompt that a run's directory has, or None."""
    key = reference_key(task, seed, task.cache_keys)
    stored = Reference.load(run / "reference.safetensors", key)
    return stored[:, :K] if count_of(stored) >= K else None


def check_sampler(task: Task, reference: Reference):
    """Raises ValueError unless one forward over prompt and response gives the sampler's
    log-probabilities of the longest samples, to CLOSE nats a token.

    Training takes ratios of the two. They differ in models that read long texts in another way
    (Phi-3 scales its positions there).
    """
    lengths = task.mask.sum(1).cpu()[:, None] + reference.mask.sum(-1)  # (P, K)
    longest = lengths.flatten().topk(min(LONGEST, lengths.numel())).indices
    rows = with_prompts(task, reference.rows(longest).to(task.ids.device))
    exact = all_logprobs(task.policy, rows, LONGEST)
    error = (rows.ref_logprobs - exact)[rows.mask.bool()].abs().mean().item()
    if not error <= CLOSE:
        raise ValueError(
            f"the policy's samples have log-probabilities that are {error:.2g} nats a token from "
            f"those of a forward over the whole text (at most {CLOSE:g}): a "
            f"{type(task.policy).__name__} that reads long texts otherwise needs shorter ones "
            "(--max-new-tokens, --max-prompt-tokens)"
        )


def reference_key(task: Task, seed: int, *prompts: list) -> str:
    """Digest of all that reference samples depend on but the prompts, which `cached` adds chunk by
    chunk; of those too, where they are given.
    """
    return digest(SAMPLER, task.digest, task.reward.digest, task.max_new_tokens, seed, *prompts)
