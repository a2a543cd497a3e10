"""DCP's reader for checkpoints that nobody vouches for: unpickles no code, reads no file but the checkpoint's own.

DCP keeps `.metadata` as a pickle, and torch's reader hands it to `pickle.load`, which runs what the file says.
Here only the classes that such a file consists of are let through. Tensors themselves are read by torch.load
with weights_only=True, as torch's reader does.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from planner.runtime.errors import CheckpointError

_ALLOWED: dict[str, tuple[str, ...]] = {
    dcp_metadata.__name__: (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    ),
    filesystem.__name__: ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_torch = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_torch or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f".metadata names {module}.{name}, which no checkpoint needs: it was refused, not run")


class Reader(FileSystemReader):
    """FileSystemReader with a metadata file that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; CheckpointError when it holds anything else, or names files outside the checkpoint."""
        with (self.path / ".metadata").open("rb") as file:  # type: ignore[operator]
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise CheckpointError(".metadata holds no metadata of a checkpoint")
        for info in found.storage_data.values():
            if "/" in info.relative_path or "\\" in info.relative_path:
                raise CheckpointError(f".metadata names {info.relative_path!r}, which is not a file of the checkpoint")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def check_whole(metadata: Metadata, shapes: dict[str, tuple[int, ...]]) -> None:
    """CheckpointError unless what is there of `shapes` has this shape and all its elements; DCP finds what is not."""
    for name, shape in shapes.items():
        entry = metadata.state_dict_metadata.get(name)
        if entry is None:
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{name} is no tensor in it")
        if tuple(entry.size) != shape:
            raise CheckpointError(f"{name} is {tuple(entry.size)} in it and {shape} in the model")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(shape):
            raise CheckpointError(f"{name} is not whole in it")
