"""A GPU for tests on machines without one: its tensors are CPU tensors with a mark, and mixing the
two raises as CUDA would.
"""

from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# look at shapes or types only
ANYWHERE = ("view_as", "expand_as", "reshape_as", "_has_compatible_shallow_copy_type")


def on_gpu(x) -> bool:
    return getattr(x, "on_gpu", False)


def put(x, gpu: bool):
    for each in tree_leaves(x):
        if isinstance(each, torch.Tensor):
            each.on_gpu = gpu
    return x


class FakeCuda(TorchFunctionMode):
    """While it is entered, torch.device("cuda") is there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            if func.__self__ is torch.Tensor.device:
                return GPU if on_gpu(args[0]) else func(*args)  # the CPU, or meta
            return (
                on_gpu(args[0])
                if func.__self__ is torch.Tensor.is_cuda
                else put(func(*args), on_gpu(args[0]))
            )
        if name == "__set__":
            func(*args)
            return put(args[0], on_gpu(args[1])) if func.__self__ is torch.Tensor.data else None
        if name in ("to", "cpu", "cuda"):
            return self.move(name, *args, **kwargs)
        device = kwargs.get("device")
        if device is not None and name != "load" and torch.device(device).type != "meta":
            kwargs["device"] = CPU
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ("__getitem__", "__setitem__"):
            index, source = tree_leaves(args[1]), args[2] if len(args) > 2 else None
            index = [x for x in index if isinstance(x, torch.Tensor)]
            moved = (
                isinstance(source, torch.Tensor)
                and source.dim()
                and index
                and on_gpu(source) != on_gpu(args[0])
            )
            if moved or not on_gpu(args[0]) and any(x.dim() and on_gpu(x) for x in index):
                raise RuntimeError(f"{name}: indices on another device than the tensor")
            gpu = on_gpu(args[0])
        elif name in (*ANYWHERE, "copy_"):
            gpu = on_gpu(args[0])
        else:  # a number may be on the CPU
            places = {on_gpu(x) for x in tensors if x.dim()}
            if len(places) > 1:
                raise RuntimeError(
                    f"{name}: tensors on two devices: "
                    f"{[(tuple(x.shape), on_gpu(x)) for x in tensors]}"
                )
            gpu = places.pop() if places else any(map(on_gpu, tensors))
            if name == "numpy" and gpu:
                raise TypeError("numpy: a tensor on a GPU")
        return put(
            func(*args, **kwargs), gpu if device is None else torch.device(device).type == "cuda"
        )

    def move(self, name, x, *args, **kwargs):
        given = [*args, *kwargs.values()]
        places = [
            on_gpu(y) if isinstance(y, torch.Tensor) else torch.device(y).type == "cuda"
            for y in given
            if isinstance(y, (torch.Tensor, torch.device, str))
        ]
        gpu = name == "cuda" or name == "to" and (places[0] if places else on_gpu(x))
        dtype = next(
            (
                y if isinstance(y, torch.dtype) else y.dtype
                for y in given
                if isinstance(y, (torch.dtype, torch.Tensor))
            ),
            x.dtype,
        )
        if gpu == on_gpu(x) and dtype == x.dtype:
            return x
        return put(x.to(dtype) if dtype != x.dtype else x.clone(), gpu)


class FakeGraph:
    """A CUDA graph as its operators see it: while it is recorded nothing is computed; each replay
    computes all of it again, from the memory that it was recorded with."""

    def __init__(self):
        self.calls = []

    def replay(self):
        now = {}  # id of a recorded result -> what it is in this replay
        for func, args, kwargs, out in self.calls:
            args, kwargs = tree_map(lambda x, now=now: now.get(id(x), x), (args, kwargs))
            with torch._C.DisableTorchFunction():  # FakeCuda looks at what is called from Python
                now |= {
                    id(x): y for x, y in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)))
                }


class FakeRecording(TorchDispatchMode):
    """`with torch.cuda.graph(graph)`. Raises, as CUDA does, where the host would have to wait for
    the GPU, or feed it.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")

    def __init__(self, graph: FakeGraph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        with self:  # what an operator is made of, where it is made of others
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if name in self.WAITS or any(
            x.dtype == torch.bool
            for x in tree_leaves(args[1:2])
            if isinstance(x, torch.Tensor)
            if name in ("index", "index_put_")
        ):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for x, formal in zip(args, func._schema.arguments):
            if formal.alias_info is not None and formal.alias_info.is_write:
                self.before.setdefault(
                    x.untyped_storage().data_ptr(),
                    (x.untyped_storage(), x.untyped_storage().clone()),
                )
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, was in self.before.values():
            storage.copy_(was)


def install(monkeypatch):
    """What torch.cuda is asked for, and parameters that keep their place, as C++ would have it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "fake")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2**31)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 2**30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeRecording)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None)
    )
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)
    new, copy = torch.nn.Parameter.__new__, torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        torch.nn.Parameter,
        "__new__",
        lambda cls, data=None, *a, **k: put(new(cls, data, *a, **k), on_gpu(data)),
    )
    monkeypatch.setattr(
        torch.nn.Parameter, "__deepcopy__", lambda self, memo: put(copy(self, memo), on_gpu(self))
    )
