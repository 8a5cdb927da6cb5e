"""What the numbers that a caller gives have to be. Each check gives them back as what they are used
as, or raises a ValueError that names the value, the rule and the fix.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from functools import reduce
from operator import index

import numpy as np
import torch
from torch import Tensor

from minictrl.messages import MOST


class OutOfReach(ValueError):
    """No policy of this transform, or of these samples, is that far from pi_ref."""


class NotFinite(ValueError):
    """Of a policy that is broken, or that training has broken."""


def whole(name: str, n: int, least: int = 1, most: int = MOST) -> int:
    """n as an int, from `least` to `most`."""
    try:
        value = None if isinstance(n, bool) else index(n)
    except TypeError:
        value = None
    if value is None or not least <= value <= most:
        raise ValueError(f"{name} {n!r}: must be a whole number; give one from {least} to {most}")
    return value


def number(name: str, x: float) -> float:
    """x as a float, which may be infinite but not NaN."""
    try:
        value = math.nan if isinstance(x, (str, bytes, bool)) else float(x)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"{name} {x!r}: must be a number; try 1")
    return value


def positive(name: str, x: float) -> float:
    """x as a float, positive and finite."""
    if not 0 < number(name, x) < math.inf:
        raise ValueError(f"{name} {float(x):g}: must be positive and finite; try 1")
    return float(x)


def real(name: str, x: Tensor) -> Tensor:
    """x, real numbers in a tensor, an array or a list, as a tensor; Python's floats as float64."""
    try:
        tensor = x if isinstance(x, Tensor) else _tensor_of(x)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.is_complex():
        given = str(x)[:60].replace("\n", " ")
        raise ValueError(f"{name} {given}: must be real numbers, in a tensor, an array or a list")
    return tensor


def _tensor_of(x) -> Tensor:
    if not hasattr(x, "dtype") and isinstance(x, Iterable) and not isinstance(x, (str, dict)):
        x = list(x)
        if x and all(isinstance(each, Tensor) for each in x):
            return torch.stack(x)
    array = np.array(x, order="C")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def alike(**values: Tensor) -> list[Tensor]:
    """`real` of each, Python's floats in the precision of the tensors and arrays beside them: 0.1
    ties with a float32's 0.1.
    """
    tensors = [real(name, x) for name, x in values.items()]
    typed = [hasattr(x, "dtype") for x in values.values()]
    kinds = [x.dtype for x, is_typed in zip(tensors, typed) if is_typed and x.is_floating_point()]
    if not kinds:
        return tensors
    kind = reduce(torch.promote_types, kinds)
    whole = [not x.is_floating_point() for x in tensors]  # and exact, as they are
    return [x if any(kept) else x.to(kind) for x, *kept in zip(tensors, typed, whole)]


def finite(what: str, **tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype: float32 at least, and float64 where one holds whole numbers, which
    it must hold exactly. what: their plural, for the message.
    """
    dtype = torch.float32
    for name, x in tensors.items():
        if not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise ValueError(f"{name} has {bad} {what} that are not finite; drop or rescore them")
        if not x.is_floating_point() and (x.double().to(x.dtype) != x).any():
            raise ValueError(f"{name} has {what} beyond 2^53, which float64 rounds; scale them")
        exact = x.dtype if x.is_floating_point() else torch.float64
        dtype = torch.promote_types(dtype, exact)
    return [x.to(dtype) for x in tensors.values()]


def samples_rewards(r_ref: Tensor) -> Tensor:
    """(P, M) finite rewards of samples, in float64."""
    r_ref = real("r_ref", r_ref)
    if r_ref.dim() != 2 or not r_ref.numel():
        raise ValueError(f"r_ref is {tuple(r_ref.shape)}: must be (prompts, samples), of some")
    return finite("rewards", r_ref=r_ref)[0].double()


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or as float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def unchanged(whose: str, **tensors: Tensor):
    """For code that a user wrote: ValueError if it has changed one of the tensors it was given."""
    before = {name: x.clone() for name, x in tensors.items()}
    yield
    for name, x in tensors.items():
        if not torch.equal(x, before[name]):
            raise ValueError(f"{whose} changes {name} in place, which others read; work on a copy")


def same_shape(rule: str = "", dim: int | None = None, **tensors: Tensor) -> None:
    """ValueError, with the rule, unless all are tensors of one shape, of `dim` dimensions."""
    shapes = {
        name: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        for name, x in tensors.items()
    }
    dims = {len(each) for each in shapes.values() if isinstance(each, tuple)}
    if len(set(shapes.values())) > 1 or not dims or dim not in (None, *dims):
        raise ValueError(f"{shapes} must have one shape{rule}")
