"""A GPU: which one, what fits its memory (and a CPU's), who visits it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from minictrl.messages import DEVICES

Result = TypeVar("Result")
TOKEN = 16  # bytes of a sampled token: itself, its log-probability, its place in a mask


def resolve_device(name: str) -> torch.device:
    """auto (CUDA if there is one), cpu, or cuda[:INDEX]. Raises ValueError if there is no such
    device. auto is the GPU of its own for each process of a launcher, which sets LOCAL_RANK.

    On a GPU it makes float32 products exact, whatever the environment asks for, because draws and
    training are compared to 1e-3 nats; and it leaves cuDNN's attention out, whose gradients have
    been NaN in bfloat16 (pytorch issue 196678).
    """
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK")
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name += f":{rank}" if rank and name == "cuda" else ""
    known = DEVICES.fullmatch(name)
    if not known or (name != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name}: no such device is to be seen here; use cpu or auto")
    if name != "cpu":
        count = torch.cuda.device_count()
        if int(known[1] or 0) >= count:
            raise ValueError(
                f"--device {name}: there are {count} GPUs; use cuda:0 to cuda:{count - 1}"
            )
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that are free: what nobody holds, and what torch holds for later."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: a GPU's, be it in cuBLAS' words, or a CPU's."""
    said = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in said)


def check_room(responses: int, tokens: int, flags: str) -> None:
    """Raises ValueError if so many responses are more than the machine's memory holds.

    flags: those that say how many.
    """
    need = responses * tokens * TOKEN
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise ValueError(
            f"{responses} responses of {tokens} tokens take {need / 1e9:.0f} GB, and this machine "
            f"has {have / 1e9:.0f}: use fewer or shorter ones ({flags}, --max-new-tokens)"
        )


def halving(
    size: int,
    work: Callable[[int], Result],
    too_small: str = "out of memory with one response at a time: use a smaller model, or shorter "
    "prompts and responses",
) -> tuple[Result, int]:
    """Calls work(size); out of memory, again with half the size. Returns (its result, the size that
    fitted). Raises ValueError, with `too_small`, where 1 doesn't fit.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise ValueError(too_small) from None
        size //= 2


@contextmanager
def resident(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on its device while it is used; then back on the CPU if it leaves a GPU less than
    half its memory.
    """
    try:
        model.to(device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory for {model.name_or_path}: use a smaller scorer, or --device cpu"
        ) from None
    yield
    if device.type == "cuda" and free_memory(device) < torch.cuda.mem_get_info(device)[1] / 2:
        model.to("cpu")
        torch.cuda.empty_cache()
