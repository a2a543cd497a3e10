"""A user's model.py as something to trace: find the model, build it on the meta device, make a batch."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from planner.profiler.errors import TraceError
from planner.profiler.run import Subject

DEFAULT_SEQ_LEN = 2048
IMAGE_SIZE = 224
_MODULE_NAME = "planner_user_model"
_SHOW = "def build_model() -> nn.Module: ..."


class SkipInit(TorchFunctionMode):
    """Meta tensors have no values, so initialising them is skipped: half the time of a large model."""

    _IN_PLACE = frozenset(
        {"uniform_", "normal_", "zero_", "fill_", "trunc_normal_", "copy_", "kaiming_uniform_"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = (
            name in self._IN_PLACE or getattr(func, "__module__", "") == "torch.nn.init" and name[-1:] == "_"
        )
        target = args[0] if args else (kwargs or {}).get("tensor")
        if in_place and isinstance(target, torch.Tensor) and target.is_meta:
            return target
        return func(*args, **(kwargs or {}))


def load_python(path: Path, function: str, seq_len: int | None, micro_batch_size: int) -> Subject:
    """The model that `path` (or `path:function`) describes, ready to run. Raises TraceError."""
    module = _import_file(path)
    with torch.device("meta"), SkipInit():
        model = _find_builder(module, path, function)()
    if not isinstance(model, nn.Module):
        raise TraceError(f"{path.name}: the builder returned {type(model).__name__}, not an nn.Module")
    dtype = getattr(module, "DTYPE", torch.bfloat16)
    if not isinstance(dtype, torch.dtype):
        raise TraceError(f"{path.name}: DTYPE is {dtype!r}; write a torch dtype such as torch.bfloat16")
    notes: list[str] = []
    length = seq_len or _int_of(module, "SEQ_LEN", path)
    if not length:
        length = DEFAULT_SEQ_LEN
        notes.append(f"sequence length not given: traced at {length} tokens")
    model.to(device="meta", dtype=dtype).train()
    batch, unit = _make_batch(module, model, path, micro_batch_size, length, dtype)
    args, kwargs = _call_form(model, batch)
    user_loss = getattr(module, "loss", None)
    return Subject(
        model=model,
        name=type(model).__name__,
        args=args,
        kwargs=kwargs,
        loss=(lambda output: user_loss(output, batch)) if callable(user_loss) else None,
        micro_batch_size=micro_batch_size,
        seq_len=length if unit == "tokens" else 1,
        unit=unit,
        vocab_size=vocabulary(model),
        dtype=dtype,
        global_batch_size=_int_of(module, "GLOBAL_BATCH_SIZE", path),
        source=f"{path.name}:{function}" if function else path.name,
        source_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        tp_plan={},
        notes=tuple(notes) if unit == "tokens" else (),
    )


# ---- finding the model


def _import_file(path: Path) -> ModuleType:
    """Import `path`; module-level models are made on meta where that works."""
    sys.path.insert(0, str(path.parent))
    torch.utils.checkpoint.checkpoint = _call  # recomputation is for the plan to choose, not for the model
    sys.dont_write_bytecode = True  # leave no __pycache__ beside the user's file
    for device in ("meta", "cpu"):
        spec = importlib.util.spec_from_file_location(_MODULE_NAME, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_MODULE_NAME] = module
        try:
            with torch.device(device):
                spec.loader.exec_module(module)
        except (SyntaxError, ImportError):
            raise
        except Exception:
            if device == "cpu":
                raise
        else:
            break
    return module


def _call(function: Callable[..., Any], *args: Any, use_reentrant: Any = None, **kwargs: Any) -> Any:
    """Stands in for torch.utils.checkpoint.checkpoint."""
    del use_reentrant
    options = ("context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state")
    return function(*args, **{name: value for name, value in kwargs.items() if name not in options})


def _find_builder(module: ModuleType, path: Path, function: str) -> Callable[[], Any]:
    if function:
        found = getattr(module, function, None)
        if isinstance(found, nn.Module):
            return lambda: found
        if not callable(found):
            raise TraceError(
                f"{path.name} has no function {function!r}; it has: {_functions(module) or 'none'}"
            )
        return _checked(found, path)
    if callable(getattr(module, "build_model", None)):
        return _checked(module.build_model, path)
    instances = {id(v): (n, v) for n, v in vars(module).items() if isinstance(v, nn.Module)}
    if len(instances) == 1:
        model = next(iter(instances.values()))[1]
        return lambda: model
    classes = [v for v in vars(module).values() if _is_own_module_class(v, module)]
    free = [c for c in classes if not _required(c)]
    names = [n for n, _ in instances.values()] or [c.__name__ for c in free]
    if len(names) > 1:
        raise TraceError(
            f"{path.name} has more than one candidate model ({', '.join(sorted(names))}): "
            f"define `{_SHOW}` or pass {path.name}:NAME"
        )
    if free:
        return free[0]
    raise TraceError(_no_model(module, path, classes))


def _no_model(module: ModuleType, path: Path, classes: list[type]) -> str:
    if classes:
        need = ", ".join(c.__name__ for c in classes)
        return f"{path.name} has no model: {need} cannot be made without arguments; define `{_SHOW}`" + _or(
            module, path
        )
    return f"{path.name} has no model: define `{_SHOW}`" + _or(module, path)


def _or(module: ModuleType, path: Path) -> str:
    functions = _functions(module)
    return f" or pass {path.name}:FUNCTION (it has {functions})" if functions else ""


def _functions(module: ModuleType) -> str:
    own = (n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__)
    return ", ".join(n for n in own if not n.startswith("_"))


def _is_own_module_class(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of parameters that a call must give."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    params = inspect.signature(function).parameters.values()
    return [p.name for p in params if p.default is inspect.Parameter.empty and p.kind not in kinds]


def _checked(function: Callable[..., Any], path: Path) -> Callable[[], Any]:
    missing = _required(function)
    if missing:
        name = getattr(function, "__name__", "builder")
        raise TraceError(f"{path.name}: {name}() must work without arguments, but needs {', '.join(missing)}")
    return function


def _int_of(module: ModuleType, name: str, path: Path) -> int:
    value = getattr(module, name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TraceError(f"{path.name}: {name} is {value!r}; write a positive integer")
    return value


# ---- the batch


def vocabulary(model: nn.Module) -> int:
    """Rows of the token embedding: the one whose size the model also puts out, else the first; 0 if none."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = {m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    return next((size for size in sizes if size in heads), sizes[0] if sizes else 0)


def _make_batch(
    module: ModuleType, model: nn.Module, path: Path, micro_batch_size: int, seq_len: int, dtype: torch.dtype
) -> tuple[Any, str]:
    """(batch on meta, unit). Real-valued tensors take the model's dtype."""
    example = getattr(module, "example_batch", None)
    if not callable(example):
        return infer_batch(model, path.name, micro_batch_size, seq_len, dtype)
    with torch.device("meta"):
        batch = example(micro_batch_size, seq_len)

    def to_meta(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("meta", dtype) if value.is_floating_point() else value.to("meta")

    batch = tree_map(to_meta, batch)
    tensors = (
        list(batch.values())
        if isinstance(batch, dict)
        else list(batch)
        if isinstance(batch, tuple)
        else [batch]
    )
    if not any(isinstance(t, torch.Tensor) for t in tensors):
        raise TraceError(f"{path.name}: example_batch returned no tensors; return a dict or tuple of tensors")
    images = all(t.dim() == 4 for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
    tokens = any(not t.is_floating_point() and t.dim() >= 2 for t in tensors if isinstance(t, torch.Tensor))
    return batch, "images" if images and not tokens else "tokens"


def infer_batch(
    model: nn.Module, where: str, micro_batch_size: int, seq_len: int, dtype: torch.dtype
) -> tuple[Any, str]:
    """A batch for the first layer that says what it takes. Raises TraceError when none does."""
    ask = "define example_batch(micro_batch_size, seq_len)"
    needed = _required(model.forward)
    if len(needed) > 1:
        raise TraceError(f"{where}: forward() needs {len(needed)} inputs ({', '.join(needed)}): {ask}")
    kinds = (nn.Embedding, nn.Conv2d, nn.Conv1d, nn.Linear, nn.RNNBase)
    found = [m for m in model.modules() if isinstance(m, kinds)]
    token = next((m for m in found if isinstance(m, nn.Embedding)), None)
    convolves = bool(found) and isinstance(found[0], nn.Conv2d)
    first = found[0] if convolves else token or (found[0] if found else None)
    make = {"device": "meta", "dtype": dtype}
    if isinstance(first, nn.Embedding):
        return (torch.empty((micro_batch_size, seq_len), dtype=torch.int64, device="meta"),), "tokens"
    if isinstance(first, nn.Conv2d):
        return (torch.empty((micro_batch_size, first.in_channels, IMAGE_SIZE, IMAGE_SIZE), **make),), "images"
    if isinstance(first, nn.Conv1d):
        return (torch.empty((micro_batch_size, first.in_channels, seq_len), **make),), "tokens"
    if isinstance(first, nn.Linear):
        return (torch.empty((micro_batch_size, seq_len, first.in_features), **make),), "tokens"
    if isinstance(first, nn.RNNBase):
        shape = (micro_batch_size, seq_len) if first.batch_first else (seq_len, micro_batch_size)
        return (torch.empty((*shape, first.input_size), **make),), "tokens"
    raise TraceError(f"{where}: cannot tell what the model takes as input: {ask}")


def _call_form(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; keys that forward() does not take (labels) are for the loss only."""
    if isinstance(batch, tuple):
        return batch, {}
    if not isinstance(batch, dict):
        return (batch,), {}
    params = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in params.values()):
        return (), batch
    return (), {key: value for key, value in batch.items() if key in params}
