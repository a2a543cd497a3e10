"""Checkpoints that any plan can read: DCP shards under the names of the unsplit model, committed by one rename.

A checkpoint is a folder `step-N` with DCP's files and `planner.json`. It is written as `step-N.tmp` by every
rank, and rank 0 renames it when all have finished: what has the final name is whole. Saving copies the shards
and writes them in a thread, over a process group of its own (Maurya et al. 2024, DataStates-LLM, arXiv
2406.10707: copy at once, flush behind the next steps). Loading a checkpoint runs no code of it (checkpoint_reader.py).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from planner.runtime.checkpoint_reader import Reader, check_whole
from planner.runtime.errors import CheckpointError
from planner.runtime.layout import Box, boxes
from planner.runtime.optimizer import Owned
from planner.runtime.parallel import Parallel

SCHEMA = "planner.checkpoint/1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Boxed(torch.Tensor):
    """Parts of one whole tensor, by DCP's checkpointable protocol. A Tensor, because DCP asks for one."""

    tensor: torch.Tensor
    parts: list[Box]

    @staticmethod
    def __new__(cls: type[Boxed], tensor: torch.Tensor, size: tuple[int, ...], parts: list[Box]) -> Boxed:
        """A shell of the whole shape around this rank's tensor."""
        self: Boxed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, dtype=tensor.dtype, device=tensor.device
        )
        self.tensor, self.parts = tensor, parts
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"{func}: a Boxed tensor is only for reading and writing checkpoints")

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(b.offsets), sizes=torch.Size(b.sizes)) for b in self.parts]

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        part = next(b for b in self.parts if index.offset is None or torch.Size(b.offsets) == index.offset)
        return self.tensor[part.of_local()]


def moments_of(p: Parallel, item: Owned) -> dict[str, Any]:
    """The optimizer's state of a parameter, made if no step has run yet."""
    assert p.optimizer is not None
    master = p.optimizer.masters[item.name]
    state: dict[str, Any] = p.optimizer.inner.state[master]
    if not state:
        state["step"] = torch.zeros((), device=master.device)
        for name in _MOMENTS:
            state[name] = torch.zeros_like(master)
    return state


def _entries(p: Parallel, copy: bool) -> dict[str, Boxed]:
    assert p.optimizer is not None
    found: dict[str, Boxed] = {}
    for item in p.owned:
        parts = boxes(p, item)
        state = moments_of(p, item)
        tensors = {"model": p.optimizer.masters[item.name].detach(), **{n: state[n] for n in _MOMENTS}}
        for kind, tensor in tensors.items():
            value = tensor.detach().to("cpu", copy=True) if copy else tensor
            if parts:
                found[f"{kind}.{item.name}"] = Boxed(value, p.full_shapes[item.name], parts)
    return found


@dataclass(slots=True)
class Checkpoints:
    """Saves into and loads from one folder. Making it is collective."""

    folder: Path
    keep: int = 3
    _group: Any = None
    _thread: threading.Thread | None = None
    _failure: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for half in self.folder.glob("step-*.tmp"):
                shutil.rmtree(half)
        dist.barrier(self._group)

    def save(self, p: Parallel, facts: dict[str, Any]) -> None:
        """Copy this rank's state and write it in the background. `facts`: step, samples and what else resumes need."""
        self.wait()
        entries = _entries(p, copy=True)
        facts = {"schema": SCHEMA, "parameters": {n: list(s) for n, s in p.full_shapes.items()}, **facts}
        self._thread = threading.Thread(target=self._write, args=(entries, facts), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is committed. CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure:
            raise CheckpointError(f"{self.folder}: the checkpoint was not written: {_cause(self._failure.pop())}")

    def _write(self, entries: dict[str, Boxed], facts: dict[str, Any]) -> None:
        try:
            final = self.folder / f"step-{facts['step']:08d}"
            half = final.with_suffix(".tmp")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(entries, storage_writer=dcp.FileSystemWriter(half), process_group=self._group)
            if dist.get_rank(self._group) == 0:
                _commit(half, final, facts)
                for old in committed(self.folder)[: -self.keep or None]:
                    shutil.rmtree(old)
            dist.barrier(self._group)
        except BaseException as error:
            self._failure.append(error)

    def load(self, p: Parallel, path: Path) -> dict[str, Any]:
        """Fill the model and the optimizer from `path`, whatever plan wrote it; returns its facts."""
        facts = inspect(path)
        _refuse_other_model(p, facts, path)
        entries = _entries(p, copy=False)
        kinds = ("model", *_MOMENTS)
        shapes = {f"{kind}.{name}": shape for name, shape in p.full_shapes.items() for kind in kinds}
        try:
            reader = Reader(path)
            check_whole(reader.read_metadata(), shapes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(entries, storage_reader=reader, process_group=self._group)
        except BaseException as error:
            raise CheckpointError(f"{path}: cannot be read: {_cause(error)}: take an older checkpoint") from None
        assert p.optimizer is not None
        for item in p.owned:
            moments_of(p, item)["step"].fill_(float(facts["optimizer_steps"]))
        p.optimizer.publish()
        return facts


def _cause(error: BaseException) -> str:
    inner = getattr(error, "failures", None)
    first = next(iter(inner.values()))[0] if inner else error
    said = str(first) if isinstance(first, CheckpointError) else f"{type(first).__name__}: {first}"
    return " ".join(said.split())[:300]


def _commit(half: Path, final: Path, facts: dict[str, Any]) -> None:
    with (half / "planner.json").open("w") as file:
        json.dump(facts, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for folder in (half, half.parent):
        _sync(folder)
    if final.exists():
        shutil.rmtree(final)
    os.replace(half, final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def committed(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    return sorted(f for f in folder.glob("step-*") if f.suffix != ".tmp" and (f / "planner.json").is_file())


def inspect(path: Path) -> dict[str, Any]:
    """Facts of a checkpoint. CheckpointError in one line when it is none or not whole."""
    try:
        facts: dict[str, Any] = json.loads((path / "planner.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint: {error}") from None
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: not a {SCHEMA} (schema {str(facts)[:60]!r})")
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"{path}: its .metadata is missing: take an older checkpoint")
    return facts


def _refuse_other_model(p: Parallel, facts: dict[str, Any], path: Path) -> None:
    theirs = {name: tuple(shape) for name, shape in facts["parameters"].items()}
    for name, shape in p.full_shapes.items():
        if theirs.get(name) != shape:
            raise CheckpointError(
                f"{path}: is of another model: {name} is {shape} here and {theirs.get(name, 'not there')} in it"
            )
    extra = next((name for name in theirs if name not in p.full_shapes), None)
    if extra is not None:
        raise CheckpointError(f"{path}: is of another model: it holds {extra}, which this model lacks")
