"""Baselines for a token's reward to go, the sum of the rewards from it on: one function per name of
--baseline.

A baseline returns the batch with advantages (B, T) added, and with values and returns where it has
them. The KL is in the reward, k1 per token, so R - sum of k1 is a response's return.
r_ref: (P, K) of the batch's prompts.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minictrl import ppo
from minictrl.batch import Batch
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.messages import first_line
from minictrl.rollout import score
from minictrl.sampling import texts_of
from minictrl.task import Task
from minictrl.transforms import RAW
from minictrl.update import Learner, forward, in_pieces


def value(batch: Batch, task: Task, r_ref: Tensor, learner: Learner, config: Config) -> Batch:
    """GAE with a value head. The head starts at 0, so R is centred first: the mean R of the other
    responses is taken off.
    """
    policy, head = learner.policy, learner.value_head
    values = in_pieces(batch, config.micro_batch, lambda rows: forward(policy, head, rows)[1])
    centred = replace(batch, R=ppo.loo_advantages(batch.R[None])[0])
    return _gae(batch, token_rewards(centred), values, config.lam)


def prefix(batch: Batch, task: Task, r_ref: Tensor, learner: Learner, config: Config) -> Batch:
    """GAE on a cubic in the calibrated reward of the response so far (`ppo.prefix_values`).

    For a reward model that can read all prefixes at once, or a function (`prefix_rewards`).
    """
    rewards = token_rewards(batch)
    C_hat = calibrated_reward(prefix_rewards(task, batch, len(r_ref)), r_ref)  # (P, G T)
    C_hat = C_hat.view_as(batch.mask).to(batch.mask)
    values = ppo.prefix_values(reward_to_go(rewards), C_hat, batch.mask)
    return _gae(batch, rewards, values, config.lam)


def loo(batch: Batch, task: Task, r_ref: Tensor, learner: Learner, config: Config) -> Batch:
    """The reward to go minus the mean return of the other samples.

    The others are those of all prompts: calibration gives their returns one distribution, so the
    mean of many is the better baseline, above all for exp-10, where one bad response in a group of
    8 would lift the other 7. Raw rewards differ from prompt to prompt: there the others are the
    prompt's own.
    """
    rewards = token_rewards(batch)
    group = config.G if config.transform in RAW else len(batch)
    returns = rewards.sum(1).view(-1, group)
    mean_of_others = returns - ppo.loo_advantages(returns)
    # of the reward to go, because a token isn't blamed for the KL of those before it
    advantages = reward_to_go(rewards) - mean_of_others.view(-1, 1)
    return replace(batch, advantages=advantages * batch.mask)


BASELINES = {"value": value, "prefix": prefix, "loo": loo}


def token_rewards(batch: Batch) -> Tensor:
    """(B, T) rewards in nats: R at the last token, minus k1 at each."""
    return ppo.token_rewards(batch.R, batch.old_logprobs, batch.ref_logprobs, batch.mask)


def reward_to_go(rewards: Tensor) -> Tensor:
    """(B, T) sum of the rewards from each token on."""
    return rewards.flip(1).cumsum(1).flip(1)


def _gae(batch: Batch, rewards: Tensor, values: Tensor, lam: float) -> Batch:
    advantages, returns = ppo.gae(rewards, values, batch.mask, lam=lam)
    return replace(batch, values=values, returns=returns, advantages=advantages)


def prefix_rewards(task: Task, batch: Batch, P: int) -> Tensor:
    """(P, G T): at [p, g T + t] the reward of the first t tokens of response g to prompt p; after
    the response's end, that of no token.

    batch: P G rows, the G of a prompt together. A causal classifier reads all prefixes of a
    response at once; a function of the user's gets the text of each.
    """
    prompts = [task.prompts[i] for i in batch.prompt_index.tolist()]  # (B,)
    if task.reward.prefixes:
        return task.reward.of_prefixes(prompts, batch.tokens, batch.mask).view(P, -1)
    T, G = batch.tokens.shape[1], len(batch) // P
    t = torch.arange(T, device=batch.mask.device)
    lengths = batch.mask.sum(1)[:, None, None]
    seen = (t < t[:, None]) & (t[:, None] < lengths)  # (B, T, T): of prefix t, its first t tokens
    tokens = batch.tokens[:, None].expand(-1, T, -1)
    texts = texts_of(task.tokenizer, batch.prompt.tolist(), tokens, seen)  # B lists of T
    of_prompt = [sum(texts[i : i + G], []) for i in range(0, len(batch), G)]
    return score(task.reward, prompts[::G], of_prompt)


def check_prefix_rewards(task: Task):
    """Raises ValueError if `prefix_rewards` can't ask the reward model. It reads responses of the
    greatest length to the longest and the shortest prompt, to see: whether it heeds a mask and
    positions that are given, its config doesn't say.
    """
    reward = task.reward
    if reward.tokenizer is None:
        return
    why = None
    if not reward.prefixes:
        why = "is no causal classifier, which reads every prefix of a response in one pass"
    elif reward.tokenizer.get_vocab() != task.tokenizer.get_vocab():
        why = "cuts text into other tokens than the policy"
    else:
        lengths = task.mask.sum(1)
        prompts = [task.prompts[i] for i in (lengths.argmax(), lengths.argmin())]
        tokens = task.ids[task.mask > 0].cpu()  # the prompts', one behind the other
        tokens = tokens[tokens != reward.tokenizer.pad_token_id]
        tokens = tokens[torch.arange(task.max_new_tokens) % len(tokens)].expand(2, -1)
        try:
            reward.of_prefixes(prompts, tokens, torch.ones(tokens.shape), trial=True)
        except Exception as error:  # the model's own, too
            if "--baseline loo" in str(error):
                raise
            why = f"can't read every prefix in one pass ({first_line(error)})"
    if why:
        raise ValueError(
            f"--baseline prefix: the reward model {reward.tokenizer.name_or_path} {why}; use "
            "--baseline loo"
        )
