"""Deferred initialisation: a model built without memory, whose parameters are made one by one where they are kept.

Building runs on fake tensors and writes every op down on a tape. The value of a parameter is what comes out when the
ops that its storage depends on run again, on the CPU. Random ops are seeded by the run's seed and their place on the
tape: all ranks and plans make the same values, though not those of a model that is built whole under the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from planner.runtime.errors import RuntimePlanError

_TRUNCATED = "_no_grad_trunc_normal_"
_truncated_normal = getattr(nn.init, _TRUNCATED)


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@dataclass(frozen=True, slots=True)
class _Op:
    """One op of the tape with fake tensors in its arguments and results. `reads`: storages of its arguments."""

    func: Any
    args: Any
    kwargs: Any
    out: Any
    reads: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.tape.add(func, args, kwargs, out)
        return out


@dataclass(slots=True)
class Tape:
    """What building a model did. `seed`: of the run."""

    seed: int
    ops: list[_Op] = field(default_factory=list)
    makers: dict[int, list[int]] = field(default_factory=dict)  # storage -> ops that make or change it

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Build the model inside. RuntimePlanError where its code asks for values, which fake tensors have none of."""
        try:
            with mock.patch.object(nn.init, _TRUNCATED, self._truncated), FakeTensorMode(allow_non_fake_inputs=True):
                with _Recorder(self):
                    yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise RuntimePlanError(
                f"--init deferred: building the model reads values of tensors ({error}): use --init whole"
            ) from None

    def _truncated(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One op in the place of torch's rejection sampling, whose loop looks at values."""
        if not isinstance(tensor, FakeTensor):
            return _truncated_normal(tensor, *args, **kwargs)
        self._append(_truncated_normal, (tensor, *args), kwargs, tensor, [tensor])
        return tensor

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One more op."""
        changed = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        changed += [
            args[i] for i, arg in enumerate(func._schema.arguments[: len(args)])
            if arg.alias_info is not None and arg.alias_info.is_write and isinstance(args[i], torch.Tensor)
        ]  # fmt: skip
        self._append(func, args, kwargs, out, changed)

    def _append(self, func: Any, args: Any, kwargs: Any, out: Any, changed: list[torch.Tensor]) -> None:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for storage in {_storage(x) for x in changed}:
            self.makers.setdefault(storage, []).append(len(self.ops))
        self.ops.append(_Op(func, args, kwargs, out, tuple({_storage(x) for x in inputs})))

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """The values of a fake tensor of the tape; any other tensor itself."""
        if not isinstance(x, FakeTensor):
            return x
        made: dict[int, torch.Tensor] = {}  # by storage
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for index in self._needed(_storage(x)):
                self._run(index, made)
        base = made[_storage(x)]
        return base.as_strided(x.size(), x.stride(), x.storage_offset())

    def _needed(self, storage: int) -> list[int]:
        found: set[int] = set()
        seen, left = {storage}, [storage]
        while left:
            for index in self.makers.get(left.pop(), ()):
                found.add(index)
                new = [s for s in self.ops[index].reads if s not in seen]
                seen.update(new)
                left += new
        return sorted(found)

    def _run(self, index: int, made: dict[int, torch.Tensor]) -> None:
        op = self.ops[index]

        def real(fake: torch.Tensor) -> torch.Tensor:
            if not isinstance(fake, FakeTensor):
                return fake.clone()  # a constant of the code
            base = made[_storage(fake)]
            whole = base if base.dtype == fake.dtype else base.view(fake.dtype)
            return whole.as_strided(fake.size(), fake.stride(), fake.storage_offset())

        args, kwargs = tree_map_only(torch.Tensor, real, (op.args, op.kwargs))
        if op.func is _truncated_normal or torch.Tag.nondeterministic_seeded in op.func.tags:
            torch.manual_seed(int(np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)[0] >> 1))
            kwargs.pop("generator", None)
        out = op.func(*args, **kwargs)
        for fake, value in zip(tree_leaves(op.out), tree_leaves(out), strict=True):
            if isinstance(fake, FakeTensor) and _storage(fake) not in made:
                made[_storage(fake)] = value


def build(make: Callable[[], nn.Module], dtype: torch.dtype, seed: int) -> tuple[nn.Module, Tape]:
    """The model of `make` in `dtype` with fake parameters and true buffers, and the tape that has their values."""
    tape = Tape(seed)
    with tape.recording():
        model = make()
        _convert(model, dtype)
    for owner in model.modules():
        for holder in (owner._buffers, vars(owner)):
            for name, x in list(holder.items()):
                if isinstance(x, FakeTensor):
                    holder[name] = tape.value(x)
    return model, tape


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Module.to, which wants to be the only one to hold a parameter."""
    made: dict[int, torch.Tensor] = {}
    for owner in model.modules():
        for holder in (owner._parameters, owner._buffers):
            for name, x in holder.items():
                if x is not None and x.is_floating_point() and x.dtype != dtype:
                    if id(x) not in made:
                        value = x.detach().to(dtype)
                        made[id(x)] = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
                    holder[name] = made[id(x)]  # type: ignore[assignment]
