"""The model's side of training: one forward for log-probabilities and values, and one update over a
batch of rows.

Rows are a dict of tensors with a common first dimension: prompt, prompt_mask (B, L) left-padded,
tokens, mask (B, T) right-padded (or (B, 2, T): a pair of responses a row), and whatever a loss
reads beside them, (B, T) or (B,).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minictrl.lm.device import halving
from minictrl.sampling import sequence_logprobs

Rows = dict[str, Tensor]
# (logprobs, values, rows) -> loss, stats
Loss = Callable[[Tensor, Tensor | None, Rows], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Learner:
    """What training changes; a checkpoint holds all of it."""

    policy: nn.Module
    value_head: nn.Module | None
    optimizer: torch.optim.Optimizer

    def state(self) -> dict:
        value_head = None if self.value_head is None else self.value_head.state_dict()
        return {
            "policy": self.policy.state_dict(),
            "value_head": value_head,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict):
        self.policy.load_state_dict(state["policy"])
        if self.value_head is not None:
            self.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(state["optimizer"])


def freeze(policy: nn.Module, layers: int | None) -> None:
    """Leaves the top `layers` transformer blocks (None: all) to be trained, and what follows them,
    a last norm; no embedding.

    What a word means and how a text is read stay as they are. Their gradients are mostly noise,
    which the optimizer turns into KL that wins nothing: the same steps with all parameters end
    further from the theory (docs/notes.md), and cost more time.
    """
    count = getattr(policy.config, "num_hidden_layers", None)
    blocks = [
        list(module)
        for module in policy.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not blocks:
        raise ValueError(
            f"the policy, a {type(policy).__name__}, has no list of its blocks (num_hidden_layers: {count}), "
            "which --layers needs: use another"
        )
    policy.requires_grad_(True)
    embeddings = [module for module in policy.modules() if isinstance(module, nn.Embedding)]
    for module in (*blocks[0][: -(layers or count)], *embeddings, policy.get_output_embeddings()):
        module.requires_grad_(False)


def make_learner(policy: nn.Module, *, value_head: bool) -> Learner:
    """Policy, value head and their optimizer. The value head starts at 0, whatever the state: R
    comes without its mean.

    Gradients are clipped to a norm of 1 over all P parameters, 1 / sqrt(P) for each if they are
    alike. Adam's eps, about a quarter of that, keeps smaller ones, which are noise, from being
    blown up to a full step.
    """
    head = None
    if value_head:
        head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    parameters = [
        p for p in (*policy.parameters(), *(head.parameters() if head else ())) if p.requires_grad
    ]
    eps = 0.23 / sum(p.numel() for p in parameters) ** 0.5
    return Learner(
        policy,
        head,
        torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True),
    )


def forward(
    model: nn.Module, value_head: nn.Module | None, rows: Rows
) -> tuple[Tensor, Tensor | None]:
    """(logprobs, values) of the responses, float32, in the shape of the tokens, from one forward; a
    value is that of the state before the token. values is None without a value head."""
    tokens, mask = rows["tokens"], rows["mask"]
    each = tokens.shape[1] if tokens.dim() == 3 else 1  # responses a row
    inputs = (
        rows["prompt"].repeat_interleave(each, 0),
        rows["prompt_mask"].repeat_interleave(each, 0),
        tokens.flatten(0, -2),
        mask.flatten(0, -2),
    )
    if value_head is None:
        return sequence_logprobs(model, *inputs).view_as(mask), None
    logprobs, hidden = sequence_logprobs(model, *inputs, return_hidden=True)
    return logprobs.view_as(mask), value_head(hidden.float())[..., 0].view_as(mask)


def cut(rows: Rows, index: Tensor) -> Rows:
    """The rows of an index, cut to the longest prompt and response among them."""
    part = {name: x[index] for name, x in rows.items()}
    T, L = int(part["mask"].sum(-1).max()), int(part["prompt_mask"].sum(1).max())
    return {
        name: x if x.dim() == 1 else x[:, -L:] if name.startswith("prompt") else x[..., :T]
        for name, x in part.items()
    }


def by_length(rows: Rows, index: Tensor, size: int) -> Iterator[Tensor]:
    """The index in pieces of at most `size` rows, alike in length, so that little is computed on
    padding.
    """
    lengths = rows["mask"][index].sum(-1)
    return iter(index[lengths.view(len(index), -1).amax(1).argsort(stable=True)].split(size))


@torch.no_grad()
def forward_all(
    model: nn.Module, value_head: nn.Module | None, rows: Rows, size: int
) -> tuple[Tensor, Tensor | None]:
    """`forward` over all rows, `size` at a time, without gradients: (B, T) each."""

    def whole(size: int) -> tuple[Tensor, Tensor | None]:
        logprobs, values = (
            torch.zeros_like(rows["mask"]),
            None if value_head is None else torch.zeros_like(rows["mask"]),
        )
        for piece in by_length(rows, torch.arange(len(logprobs), device=logprobs.device), size):
            part = forward(model, value_head, cut(rows, piece))
            for all_rows, x in zip((logprobs, values), part):
                if all_rows is not None:
                    all_rows[piece, : x.shape[1]] = x
        return logprobs, values

    return halving(size, whole)[0]


def update(
    learner: Learner,
    rows: Rows,
    loss: Loss,
    *,
    lr: float,
    minibatch: int,
    micro_batch: int,
    epochs: int,
    seed: int,
) -> dict[str, float]:
    """`epochs` passes over the rows in random minibatches, an optimizer step each. Returns means
    over all rows.

    A minibatch is computed in micro-batches of similar length, whose gradients add up to that of
    its mean loss (of the value head's, a mean over tokens, but for their lengths).
    """
    rows = {name: x.to(learner.policy.device) for name, x in rows.items()}
    totals, generator = defaultdict(float), torch.Generator().manual_seed(seed)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for _ in range(epochs):
        for index in torch.randperm(len(rows["mask"]), generator=generator).split(minibatch):
            index = index.to(rows["mask"].device)
            stats, micro_batch = halving(
                micro_batch, lambda size: _gradients(learner, rows, loss, index, size)
            )
            stats["grad_norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
            learner.optimizer.step()
            for name, stat in stats.items():
                totals[name] += float(stat) * len(index) / (epochs * len(rows["mask"]))
    return dict(totals) | {"lr": lr}


def _gradients(
    learner: Learner, rows: Rows, loss: Loss, index: Tensor, micro_batch: int
) -> dict[str, Tensor]:
    """Gradients of the mean loss over the rows of an index, and the means of its statistics."""
    learner.optimizer.zero_grad()
    totals = defaultdict(float)
    for piece in by_length(rows, index, micro_batch):
        part = cut(rows, piece)
        value, stats = loss(*forward(learner.policy, learner.value_head, part), part)
        (value * (len(piece) / len(index))).backward()
        for name, stat in stats.items():
            totals[name] += stat.detach() * (len(piece) / len(index))
    return totals
