"""What the reward to go of a token is compared with: one function per name of --baseline.

A baseline returns the batch with the advantages (B, T) of its R and, where there are values, those
and their returns. The KL is in the reward, k1 per token, so R - sum of k1 is a response's return.
r_ref: (P, K) of the batch's prompts.
"""

from dataclasses import replace

from torch import Tensor

from minictrl import ppo
from minictrl.batch import Batch
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.rollout import prefix_rewards
from minictrl.task import Task
from minictrl.transforms import RAW
from minictrl.update import Learner, forward_all


def value(batch: Batch, task: Task, r_ref: Tensor, learner: Learner, config: Config) -> Batch:
    """GAE with a value head. The head starts at 0, so R is centred first: the mean R of the other
    responses is taken off.
    """
    _, values = forward_all(learner.policy, learner.value_head, batch, config.micro_batch)
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

    The others are those of all prompts: calibration gives their returns one law, so the mean of
    many is the better baseline, above all for exp-10, where one bad response in a group of 8 would
    lift the other 7. Raw rewards differ from prompt to prompt: there the others are the prompt's
    own.
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
