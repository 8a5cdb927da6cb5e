"""Decoding in waves: the rows of a few prompts, a token of each at a step."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from minictrl.lm.draw import draw
from minictrl.lm.kvcache import PrefixCache
from minictrl.messages import first_line

COMPACT = 0.95  # drop the rows that have ended when at most this share is left
LOOK = 32  # steps on a GPU between looks at who is alive, after which a step is recorded anew


def head_rows(model) -> int:
    """Rows whose logits are made at a time: all on a GPU; on a CPU as many as fit in 1 MB for a
    vocabulary of up to 4,096, else 256.
    """
    if model.device.type != "cpu":
        return 2**31
    V = model.config.vocab_size
    return 2**18 // V if V <= 4096 else 256


class Wave:
    """R rows, decoded into the rows `row` of `out`: tokens, mask and logprobs, (all rows, T) each.

    prompt_ids, prompt_mask: (P, L). group: (R,) prompt of a row. u: (R, T, 2).
    A step reads no number back from the tensors, and leaves what it changes in their place: so it
    can be recorded.
    """

    def __init__(
        self,
        cache,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        group: Tensor,
        u: Tensor,
        row: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        *,
        eos: Tensor,
        pad: int,
        temperature: float,
    ):
        self.cache, self.eos, self.pad = cache, eos, pad
        self.temperature, self.head_rows = temperature, head_rows(cache.model)
        self.tokens, self.mask, self.logprobs = out
        self.u, self.row = u, row
        self.t = row.new_zeros(1)
        self.position = prompt_mask.sum(1)[group]
        self.alive = torch.ones_like(row, dtype=torch.bool)
        self.token = torch.empty_like(row)  # the last one, (R,)
        self._extend(cache.prefill(prompt_ids, prompt_mask, group, u.shape[1]))

    def step(self) -> None:
        """Read the last token, the t-th, and draw the next."""
        state = self.cache.step(self.token[:, None], self.position[:, None], self.t)
        self.position += 1
        self.t += 1
        self._extend(state)

    def _extend(self, state: Tensor) -> None:
        """Draw the next token of each row, and write it down."""
        logits = (self.cache.head(x) for x in state.split(self.head_rows))
        u = self.u.index_select(1, self.t)[:, 0]
        token, logprob = draw(
            (x if self.temperature == 1 else x / self.temperature for x in logits), u
        )
        self.tokens[self.row, self.t] = token.masked_fill(~self.alive, self.pad)
        self.logprobs[self.row, self.t] = logprob.masked_fill(~self.alive, 0.0)
        self.mask[self.row, self.t] = self.alive.float()
        self.alive &= ~torch.isin(token, self.eos)
        self.token.copy_(token)

    def compact(self) -> int:
        """How many rows are alive; living ones from the end take the places of those that have
        ended.
        """
        alive, living = self.alive, int(self.alive.sum())
        if 0 < living <= COMPACT * len(alive):
            index = torch.arange(living, device=alive.device)
            index[~alive[:living]] = alive[living:].nonzero()[:, 0] + living
            self.cache.compact(index)
            for name in ("u", "row", "position", "alive", "token"):
                setattr(self, name, getattr(self, name)[index])
        return living


def decode(wave: Wave) -> None:
    """Up to T tokens of each row. A GPU has to be waited for to know who is alive, so there it is
    asked rarely.
    """
    T, on_gpu = wave.u.shape[1], wave.row.is_cuda
    look = LOOK if on_gpu else 1
    with torch.cuda.device_of(wave.row):  # a graph is recorded on the current GPU
        for t in range(0, T - 1, look):
            if not wave.compact():
                return
            count = min(look, T - 1 - t)
            wave.cache.widen(t + count)
            _repeat(wave.step, count, recorded=on_gpu and isinstance(wave.cache, PrefixCache))


def _repeat(step: Callable[[], None], count: int, *, recorded: bool) -> None:
    """step() `count` times. Recorded: as a CUDA graph, for its hundreds of kernels take longer to
    launch than to run.
    """
    if recorded and count > 2:
        step()  # whatever is made at the first call
        count, graph, stream = count - 1, torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # the context doesn't do so if it fails
            warnings.warn(
                f"a decode step can't be recorded ({first_line(error)}); it is launched anew each "
                "time",
                stacklevel=2,
            )
        else:
            for _ in range(count):
                graph.replay()
            return stream.synchronize()  # before the graph goes
    for _ in range(count):
        step()
