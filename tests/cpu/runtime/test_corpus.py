"""The reader of Megatron-LM's indexed pair NAME.bin and NAME.idx, on files written here byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from planner.runtime.corpus import DocumentBatches, open_corpus
from planner.runtime.errors import TrainingError

DOCUMENTS = ([5, 6, 7], [8], [9, 10, 11, 12])
# Megatron-LM's numbering of token types (core/datasets/indexed_dataset.py, DType): code, struct letter, bytes.
TYPES = {"uint8": (1, "B", 1), "int32": (4, "i", 4), "int64": (5, "q", 8), "uint16": (8, "H", 2)}


def write_pair(
    folder: Path, kind: str = "uint16", *, magic: bytes = b"MMIDIDX\x00\x00", version: int = 1, code: int | None = None
) -> Path:
    """Header (magic, version, type, sequences, documents + 1), int32 lengths, int64 byte offsets, int64 documents."""
    number, letter, size = TYPES[kind]
    lengths = [len(document) for document in DOCUMENTS]
    offsets = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index = magic + struct.pack("<Q", version) + struct.pack("<B", number if code is None else code)
    index += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1)
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *offsets)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    (folder / "data.idx").write_bytes(index)
    tokens = [token for document in DOCUMENTS for token in document]
    (folder / "data.bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    return folder / "data.bin"


@pytest.mark.parametrize("kind", TYPES)
def test_documents_are_read_back(tmp_path: Path, kind: str) -> None:
    corpus = open_corpus(write_pair(tmp_path, kind), None)
    assert corpus.lengths.tolist() == [3, 1, 4]
    assert [corpus.document(i, 100).tolist() for i in range(3)] == list(DOCUMENTS)
    assert corpus.document(2, 2).tolist() == [9, 10]


def test_an_epoch_has_every_document_once(tmp_path: Path) -> None:
    batches = DocumentBatches(open_corpus(write_pair(tmp_path), None), longest=3, tokens_per_step=3, seed=7)
    drawn = batches.documents(0, 3)
    assert sorted(drawn.tolist()) == [0, 1, 2]
    assert batches.lengths_of(np.array([0, 1, 2])).tolist() == [3, 1, 3]
    assert [batches.read(i).tolist() for i in range(3)] == [[5, 6, 7], [8], [9, 10, 11]]


@pytest.mark.parametrize("changed", [{"magic": b"MMIDIDX\x00\x01"}, {"version": 2}, {"code": 7}])
def test_another_format_is_one_line(tmp_path: Path, changed: dict[str, object]) -> None:
    path = write_pair(tmp_path, **changed)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="data.idx: not an index of integers in Megatron-LM's format, version 1"):
        open_corpus(path, None)


@pytest.mark.parametrize("kept", [10, 45])
def test_an_index_that_is_cut_off_is_one_line(tmp_path: Path, kept: int) -> None:
    path = write_pair(tmp_path)
    index = path.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:kept])
    with pytest.raises(TrainingError, match="data.bin: cannot read the corpus"):
        open_corpus(path, None)


@pytest.mark.parametrize(("lengths", "said"), [
    ([3, 0, 5], "document 1 has 0 tokens, each needs at least 1"), ([9, -1], "document 1 has -1 tokens"),
    (np.zeros(0, int), "the documents have 0 tokens"), ([2, 2], "the documents have 4 tokens"),
    ([2.0, 6.0], "expected 1-D integers"),
])  # fmt: skip
def test_lengths_that_are_none_are_one_line(tmp_path: Path, lengths: object, said: str) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(8))
    np.save(tmp_path / "lengths.npy", np.array(lengths))
    with pytest.raises(TrainingError, match=said):
        open_corpus(tmp_path / "tokens.npy", tmp_path / "lengths.npy")


def test_tokens_that_are_missing_are_one_line(tmp_path: Path) -> None:
    path = write_pair(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(TrainingError, match="its index goes beyond its 7 tokens"):
        open_corpus(path, None)
