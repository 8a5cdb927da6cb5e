"""The model's side of training: log-probabilities and values of a batch, and one update on it."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minictrl.batch import Batch
from minictrl.checks import NotFinite
from minictrl.lm.device import halving
from minictrl.lm.logprobs import sequence_logprobs


class BadStep(NotFinite):
    """A loss or a gradient that isn't finite, before it has touched a weight.

    prompts: which of the task's prompts it may come from.
    """

    def __init__(self, what: str, prompts: list[int]):
        super().__init__(f"{what} is not finite on the prompt")
        self.prompts = prompts


# (logprobs, values, batch) -> loss, its statistics
Loss = Callable[[Tensor, Tensor | None, Batch], tuple[Tensor, dict[str, Tensor]]]

HEAD_LR = 1e-3  # of a value head, at least


@dataclass
class Learner:
    """What training changes; a checkpoint holds all of it, and nothing that is frozen."""

    policy: nn.Module
    value_head: nn.Module | None
    optimizer: torch.optim.Optimizer
    updates: int = 0  # optimizer steps that this process has taken

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, in the optimizer's order."""
        both = nn.ModuleDict({"policy": self.policy, "value_head": self.value_head})
        return {name: p for name, p in both.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """Parameters by name, and the optimizer's moments of each."""
        state = {}
        for name, p in self.parameters().items():
            moments = self.optimizer.state.get(p, {})
            state |= {name: p.detach()} | {f"{name}/{key}": x for key, x in moments.items()}
        return {name: x.contiguous() for name, x in state.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]):
        """Raises KeyError if something is missing."""
        for name, p in self.parameters().items():
            p.copy_(state[name])
            moments = [key for key in state if key.startswith(f"{name}/")]
            if moments:
                self.optimizer.state[p] = {
                    key.removeprefix(f"{name}/"): state[key].to(p.device) for key in moments
                }


def freeze(policy: nn.Module, layers: int | None) -> None:
    """Leaves the top `layers` transformer blocks (None: all) and the final norm to be trained.

    Embeddings, the output's too, never are: what a word means stays as it is, and their gradients
    are mostly noise, which the optimizer turns into KL that wins nothing. To train all of the
    blocks ends no nearer to the theory (docs/notes.md), and costs more time.
    """
    count = getattr(policy.config, "num_hidden_layers", None)
    lists = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    blocks = [list(module) for module in lists if len(module) == count]
    if not blocks:
        raise ValueError(
            f"the policy, a {type(policy).__name__}, has no list of its blocks (num_hidden_layers: "
            f"{count}), which --layers needs: use another"
        )
    if layers and layers > count:
        raise ValueError(f"--layers {layers}: the policy has {count} blocks; use at most {count}")
    policy.requires_grad_(True)
    named = [(name.rpartition(".")[2], module) for name, module in policy.named_modules()]
    embeddings = [  # BLOOM's have a norm of their own, OPT-350m's a projection
        module
        for name, module in named
        if isinstance(module, nn.Embedding) or "embed" in name or name == "project_in"
    ]
    lower = blocks[0][: -(layers or count)]
    for module in (*lower, *embeddings, policy.get_output_embeddings()):
        module.requires_grad_(False)


def make_learner(policy: nn.Module, *, value_head: bool, lr: float = HEAD_LR) -> Learner:
    """Policy, value head and their optimizer.

    lr: the policy's. `update` sets the rates; here lr only fixes how much faster the head learns:
    its rate before the schedule is at least HEAD_LR, because at 1e-6 it would learn nothing in a
    run. The head starts at 0, because R comes without its mean.

    Adam's eps: gradients are clipped to a norm of 1, so of n components a typical one is
    1 / sqrt(n). One much below 0.23 of that is noise, and makes a small step instead of a full one.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups, head = [{"params": trained, "scale": 1.0}], None
    if value_head:
        width = policy.get_output_embeddings().weight.shape[1]  # OPT-350m's is not its hidden_size
        head = nn.Linear(width, 1, device=policy.device)
        for p in head.parameters():
            nn.init.zeros_(p)
        groups.append({"params": list(head.parameters()), "scale": max(1.0, HEAD_LR / lr)})
    eps = 0.23 / sum(p.numel() for group in groups for p in group["params"]) ** 0.5
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True)
    return Learner(policy, head, optimizer)


def forward(
    model: nn.Module, value_head: nn.Module | None, batch: Batch
) -> tuple[Tensor, Tensor | None]:
    """(logprobs, values) of the responses, float32, in the shape of the tokens.

    A value is that of the state before the token; values is None without a value head.
    """
    tokens, mask = batch.tokens, batch.mask
    responses = tokens.shape[1] if tokens.dim() == 3 else 1  # per row
    inputs = (
        batch.prompt.repeat_interleave(responses, 0),
        batch.prompt_mask.repeat_interleave(responses, 0),
        tokens.flatten(0, -2),
        mask.flatten(0, -2),
    )
    logprobs, hidden = sequence_logprobs(model, *inputs)
    values = None if value_head is None else value_head(hidden.float()).view_as(mask)
    return logprobs.view_as(mask), values


@torch.no_grad()
def in_pieces(batch: Batch, size: int, read: Callable[[Batch], Tensor]) -> Tensor:
    """(B, T): read(rows) of all rows, `size` at a time, no gradients; 0 behind a shorter piece."""

    def all_rows(size: int) -> Tensor:
        found = torch.zeros_like(batch.mask)
        for piece in batch.pieces(torch.arange(len(batch), device=found.device), size):
            x = read(batch[piece].cut())
            found[piece, : x.shape[1]] = x
        return found

    return halving(size, all_rows)[0]


def all_logprobs(model: nn.Module, batch: Batch, size: int) -> Tensor:
    """(B, T) log pi(token) of all rows, `in_pieces`."""
    return in_pieces(batch, size, lambda rows: forward(model, None, rows)[0])


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate: linearly down from 1 to 0, so that the noise of the gradient
    fades, times a rise over `warmup` steps. Of 45 steps with 5 of them the largest is 0.91.
    """
    return min(1, (step + 1) / warmup) * (1 - step / steps)


def update(
    learner: Learner,
    batch: Batch,
    loss: Loss,
    *,
    lr: float,
    minibatch: int,
    micro_batch: int,
    epochs: int,
    seed: int,
) -> dict[str, float]:
    """`epochs` passes over the batch in random minibatches, an optimizer step each.

    A minibatch is computed in micro-batches of similar length; their gradients, weighted by their
    rows, add up to the minibatch's. (The value head's loss, a mean over tokens, comes out a little
    different: half of the rows don't have half of the tokens.) Returns the means of the loss's
    statistics over all rows. Raises BadStep, before an optimizer step, where loss or gradient is
    not finite.
    """
    batch = batch.to(learner.policy.device)
    generator = torch.Generator().manual_seed(seed)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    parameters = list(learner.parameters().values())
    totals = defaultdict(float)
    for _ in range(epochs):
        for index in torch.randperm(len(batch), generator=generator).split(minibatch):
            index = index.to(learner.policy.device)
            stats, micro_batch = halving(
                micro_batch, lambda size, index=index: _gradients(learner, batch, loss, index, size)
            )
            stats["grad_norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (stats["grad_norm"] + stats.pop("loss")).isfinite():
                raise bad_step(learner, batch, loss, index, micro_batch)
            learner.optimizer.step()
            learner.updates += 1
            for name, stat in stats.items():
                totals[name] += float(stat) * len(index) / (epochs * len(batch))
    return dict(totals) | {"lr": lr}


def _gradients(
    learner: Learner, batch: Batch, loss: Loss, index: Tensor, micro_batch: int
) -> dict[str, Tensor]:
    """Leaves the gradients of the mean loss over the rows of an index in the model; returns the row
    means of the loss and of its statistics.
    """
    learner.optimizer.zero_grad()
    totals = defaultdict(float)
    for piece in batch.pieces(index, micro_batch):
        share = len(piece) / len(index)
        part = batch[piece].cut()
        found = loss(*forward(learner.policy, learner.value_head, part), part)
        value, stats = check_loss(found)
        (value * share).backward()
        for name, stat in (stats | {"loss": value}).items():
            totals[name] += torch.as_tensor(stat).detach() * share
    return totals


def check_loss(found: tuple) -> tuple[Tensor, dict]:
    """What a method's `loss` gave. Raises ValueError unless it is (loss, statistics)."""
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
    value = found[0] if pair else None
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(found)
        raise ValueError(
            f"the method's loss is {given}; return (loss, statistics), a tensor () that depends on "
            "the policy's logprobs, and a dict of numbers"
        )
    return found


def bad_step(
    learner: Learner, batch: Batch, loss: Loss, index: Tensor, micro_batch: int
) -> BadStep:
    """What is not finite, and on which prompt: the first row of an index that shows it alone."""
    for row in index.split(1):
        what = _not_finite(learner, _gradients(learner, batch, loss, row, 1)["loss"])
        if what:
            return BadStep(what, batch.prompt_index[row].tolist())
    whole = _not_finite(learner, _gradients(learner, batch, loss, index, micro_batch)["loss"])
    return BadStep(whole or "loss or gradient", batch.prompt_index[index].unique().tolist())


def _not_finite(learner: Learner, loss: Tensor) -> str | None:
    if not loss.isfinite():
        return "the loss"
    for name, p in learner.parameters().items():
        if p.grad is not None and not p.grad.isfinite().all():
            return f"the gradient of {name}"
    return None
