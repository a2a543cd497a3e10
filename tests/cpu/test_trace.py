"""Traced graphs against torch itself: parameters, FLOPs, saved tensors, folding."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from planner.costmodel.graph import Gemm, LayerClass, ModelGraph, OpKind, TensorLayout, TpCut
from planner.profiler.assemble import assemble
from planner.profiler.hf import load_config
from planner.profiler.intercept import FlashAttention
from planner.profiler.load import load_python
from planner.profiler.record import Recorder
from planner.profiler.run import Subject, run_forward
from planner.profiler.trace import trace_model

ROOT = Path(__file__).parents[2]
HF = ROOT / "tests" / "corpus" / "hf"
MODELS = Path(__file__).parent / "models"
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5_DEPTH = {"num_layers": 3, "num_decoder_layers": 3, "dropout_rate": 0.0, "vocab_size": 128}
SMALL = {
    "llama3_8b": WIDTHS | {"num_key_value_heads": 2, "vocab_size": 128},
    "t5_large": T5_DEPTH | {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4},
    "bert_large": WIDTHS | NO_DROPOUT | {"vocab_size": 128},
    "vit_large": WIDTHS | {"image_size": 32, "patch_size": 8},
    "mixtral_8x7b": WIDTHS | {"num_key_value_heads": 2, "vocab_size": 128},
}
DENSE = ["gpt", "llama", "convnet", "handwritten", "llama3_8b", "t5_large", "bert_large", "vit_large"]


def subject_of(name: str, tmp_path: Path, seq_len: int = 32, micro_batch_size: int = 2) -> Subject:
    """A small model by name, as the child process would load it."""
    if name in SMALL:
        config = json.loads((HF / f"{name}.json").read_text()) | SMALL[name]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        return load_config(path, seq_len, micro_batch_size)
    if name == "handwritten":
        return load_python(MODELS / "handwritten.py", "", seq_len, micro_batch_size)
    return load_python(MODELS / "tiny.py", name, seq_len, micro_batch_size)


def graph_of(name: str, tmp_path: Path) -> tuple[Subject, ModelGraph]:
    subject = subject_of(name, tmp_path)
    return subject, assemble(subject, run_forward(subject))


def layers_of(graph: ModelGraph) -> list[LayerClass]:
    return [graph.prologue, *(graph.classes[i] for i in graph.layer_classes), graph.epilogue]


def loss_of(subject: Subject, output: object) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    assert isinstance(logits, torch.Tensor)
    if not subject.vocab_size or logits.shape[-1] != subject.vocab_size:
        return logits.sum()
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device).flatten()
    return torch.nn.functional.cross_entropy(logits.reshape(-1, subject.vocab_size).float(), labels)


@pytest.mark.parametrize("name", [*DENSE, "mixtral_8x7b"])
def test_parameters_are_counted_once(name: str, tmp_path: Path) -> None:
    subject, graph = graph_of(name, tmp_path)
    assert graph.num_params == sum(p.numel() for p in subject.model.parameters())
    names = [
        n for layer in (graph.prologue, *graph.classes, graph.epilogue) for g in layer.params for n in g.names
    ]
    assert names


@pytest.mark.parametrize("name", DENSE)
def test_flops_equal_torch_flop_counter(name: str, tmp_path: Path) -> None:
    subject, graph = graph_of(name, tmp_path)
    layers = layers_of(graph)
    forward = sum(op.flops_counted for layer in layers for op in layer.ops)
    backward = sum(
        op.backward_flops * op.flops_counted // op.flops for layer in layers for op in layer.ops if op.flops
    )
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        output = subject.model(*subject.args, **subject.kwargs)
        assert forward == counter.get_total_flops() > 0
        loss_of(subject, output).backward()
        assert forward + backward == counter.get_total_flops()


def test_flops_of_a_full_gpt3_layer_equal_torch_flop_counter(tmp_path: Path) -> None:
    subject = subject_of("gpt_layer", tmp_path, seq_len=2048, micro_batch_size=1)
    (layer,) = assemble(subject, run_forward(subject)).classes
    block = next(m for m in subject.model.modules() if type(m).__name__ == "Block")
    x = torch.empty(1, 2048, 12_288, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = block(x)
        assert counter.get_total_flops() == sum(op.flops_counted for op in layer.ops)
        out.sum().backward()
    # Narayanan et al. 2021, section 3.2: 24 s h^2 + 4 s^2 h, three times that with backward.
    by_hand = 24 * 2048 * 12_288**2 + 4 * 2048**2 * 12_288
    assert counter.get_total_flops() == 3 * by_hand
    assert sum(op.flops_counted for op in layer.ops) == by_hand


def saved_by_autograd(subject: Subject) -> int:
    """Bytes that autograd keeps in a real training step on the CPU, parameters and buffers excluded."""
    model = subject.model.to_empty(device="cpu").train()
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.zeros_(tensor.data)
    state = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            kept[storage.data_ptr()] = storage
        return tensor

    args = tuple(torch.zeros_like(t, device="cpu") for t in subject.args)
    kwargs = {k: torch.zeros_like(v, device="cpu") for k, v in subject.kwargs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(subject, model(*args, **kwargs))
    return sum(storage.nbytes() for storage in kept.values())


def test_saved_bytes_of_llama_differ_by_the_unfused_rmsnorm(tmp_path: Path) -> None:
    subject, graph = graph_of("llama", tmp_path)
    traced = sum(a.num_bytes for layer in layers_of(graph) for a in layer.activations if a.saved)
    # On the CPU torch composes RMSNorm of several ops and keeps the normalised input of each of the 7.
    assert traced + 7 * (2 * 32 * 64 * 4) == saved_by_autograd(subject)


def in_float32(subject: Subject) -> Subject:
    """The CPU keeps LayerNorm statistics in bfloat16, a GPU in float32: compare where both agree."""

    def widen(value: torch.Tensor) -> torch.Tensor:
        return value.float() if value.is_floating_point() else value

    subject.model.float()
    kwargs = {name: widen(value) for name, value in subject.kwargs.items()}
    return replace(subject, args=tuple(widen(a) for a in subject.args), kwargs=kwargs, dtype=torch.float32)


class FusedAttention(TorchFunctionMode):
    """T5's learned bias sends the CPU to unfused attention; this keeps what a fused kernel keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return FlashAttention.apply(*args[:3], (kwargs or {}).get("attn_mask"))[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt", "convnet", "handwritten", "bert_large", "vit_large", "t5_large"])
def test_saved_bytes_equal_a_real_run(name: str, tmp_path: Path) -> None:
    subject = in_float32(subject_of(name, tmp_path))
    graph = assemble(subject, run_forward(subject))
    traced = sum(a.num_bytes for layer in layers_of(graph) for a in layer.activations if a.saved)
    with FusedAttention() if name == "t5_large" else contextlib.nullcontext():
        assert traced == saved_by_autograd(subject)


def test_many_equal_layers_fold_into_one_class() -> None:
    graph = trace_model(str(ROOT / "examples" / "gpt3_175b.py"))
    assert len(graph.classes) == 1
    assert graph.num_layers == 96
    assert graph.runs[0].paths[95] == "blocks.95"
    assert graph.num_params == 96 * (12 * 12_288**2 + 13 * 12_288) + (51_200 + 2048 + 2) * 12_288
    assert graph.tied_params == 51_200 * 12_288
    assert graph.default_global_batch_size == 1536


def test_gpt_block_is_cut_as_megatron_cuts_it(tmp_path: Path) -> None:
    _, graph = graph_of("gpt", tmp_path)
    (layer,) = graph.classes
    cuts = {op.name.split(".", 2)[2]: op.cut for op in layer.ops if op.gemm or op.attention}
    assert cuts == {
        "attention.qkv.addmm": TpCut.COLUMN,
        "attention.attention": TpCut.HEAD,
        "attention.out.addmm": TpCut.ROW,
        "up.addmm": TpCut.COLUMN,
        "down.addmm": TpCut.ROW,
    }
    assert layer.tp_divides == (4, 256)
    # Korthikanti et al. 2022, section 4.1, without dropout and with flash attention: in units of s b h,
    # inputs of norms (2) and column linears (2), q, k, v and attention output (4), inside the MLP (8).
    unit = 2 * 32 * 64 * 4
    by_layout = {
        layout: sum(a.num_bytes for a in layer.activations if a.saved and a.layout is layout)
        for layout in TensorLayout
    }
    assert by_layout[TensorLayout.GATHERED] == 2 * unit
    assert by_layout[TensorLayout.INNER] == 12 * unit + 2 * 4 * 32 * 4
    assert by_layout[TensorLayout.OUTER] == 2 * unit + 4 * 2 * 32 * 4


def test_encoder_output_crosses_every_decoder_cut(tmp_path: Path) -> None:
    _, graph = graph_of("t5_large", tmp_path)
    hidden, bias = 2 * 32 * 64 * 2, 4 * 32 * 32 * 2
    paths = {path: graph.classes[run.layer_class] for run in graph.runs for path in run.paths}
    assert paths["encoder.block.1"].input_bytes == hidden + bias
    assert paths["decoder.block.0"].input_bytes == hidden
    assert paths["decoder.block.1"].input_bytes == paths["decoder.block.2"].input_bytes == 2 * hidden + bias


def test_convolutions_are_not_cut(tmp_path: Path) -> None:
    _, graph = graph_of("convnet", tmp_path)
    assert all(
        "convolution" in layer.tp_reason and "convolution" in layer.cp_reason for layer in graph.classes
    )
    assert graph.unit == "images"


def test_handwritten_model_folds_by_attribute(tmp_path: Path) -> None:
    _, graph = graph_of("handwritten", tmp_path)
    assert [path for run in graph.runs for path in run.paths] == ["first", "then", "again", "more"]
    first, _, again, _ = graph.layer_classes
    assert first == again
    # The input of the last block is used twice, so two tensors cross the cut in front of the head.
    assert graph.epilogue.input_bytes == 2 * graph.classes[first].input_bytes
    cuts = [op.cut for op in graph.classes[first].ops if op.gemm]
    assert cuts == [TpCut.COLUMN, TpCut.HEAD, TpCut.HEAD, TpCut.ROW]


def test_shapes_scale_with_the_batch(tmp_path: Path) -> None:
    one, two = (
        assemble(s, run_forward(s))
        for s in (subject_of("llama", tmp_path, micro_batch_size=n) for n in (1, 2))
    )
    for a, b in zip(layers_of(one), layers_of(two), strict=True):
        for x, y in zip(a.activations, b.activations, strict=True):
            assert y.num_bytes == x.num_bytes * (2 if x.scales_with_batch else 1)


def test_the_parent_needs_no_torch() -> None:
    code = "import sys, planner.profiler.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_experts_are_routed_and_balanced(tmp_path: Path) -> None:
    _, graph = graph_of("mixtral_8x7b", tmp_path)
    (layer,) = graph.classes
    assert (layer.num_experts, layer.experts_per_token) == (8, 2)
    gemms = [op.gemm for op in layer.ops if op.routed and op.kind is OpKind.GEMM]
    assert [(g.batch, g.m, g.n, g.k) for g in gemms if g] == [(8, 16, 192, 64), (8, 16, 64, 96)]
    permutes = [op for op in layer.ops if op.kind is OpKind.PERMUTE]
    rows = 2 * 32 * 2 * 64 * 2  # tokens x experts per token x hidden x bytes
    assert layer.activations[permutes[0].outputs[0]].num_bytes == rows
    assert layer.activations[permutes[1].inputs[0]].num_bytes == rows
    assert sum(group.num_params for group in layer.params if group.routed) == 8 * 3 * 64 * 96


def test_torch_encoder_layer_and_lstm(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "from torch import nn\n"
        "def encoder():\n"
        "    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)\n"
        "    encoder = nn.TransformerEncoder(layer, 3)\n"
        "    return nn.Sequential(nn.Embedding(100, 64), encoder, nn.Linear(64, 100))\n"
        "def lstm():\n"
        "    return nn.LSTM(64, 32, 2, batch_first=True)\n"
    )
    subject = load_python(path, "encoder", 16, 2)
    graph = assemble(subject, run_forward(subject))
    assert [(run.layer_class, run.count) for run in graph.runs] == [(0, 3)]
    assert graph.classes[0].tp_divides == (4, 128)
    subject = load_python(path, "lstm", 16, 2)
    (layer,) = (graph := assemble(subject, run_forward(subject))).classes
    scan = next(op for op in layer.ops if op.kind is OpKind.SCAN)
    assert scan.flops == 2 * 2 * 16 * 4 * 32 * (64 + 32 + 32 + 32)
    assert "recurrent" in layer.tp_reason and "recurrent" in layer.cp_reason
    assert graph.num_layers == 1


def test_handwritten_mixture_of_experts(tmp_path: Path) -> None:
    subject = subject_of("moe", tmp_path)
    graph = assemble(subject, run_forward(subject))
    assert graph.num_params == sum(p.numel() for p in subject.model.parameters())
    assert [run.count for run in graph.runs] == [3, 1]
    moe = graph.classes[1]
    assert (moe.num_experts, moe.experts_per_token) == (256, 8)
    routed = sum(op.flops for op in moe.ops if op.routed)
    assert routed == 2 * (2 * 32) * 8 * 3 * 7168 * 2048
    assert sum(g.num_params for g in moe.params if g.routed) == 256 * 3 * 7168 * 2048
    shared = [op.gemm for op in moe.ops if ".shared." in op.name and op.gemm]
    assert [(g.m, g.n, g.k) for g in shared] == [(64, 2048, 7168), (64, 2048, 7168), (64, 7168, 2048)]


def test_ops_that_torch_misprices_have_their_flops() -> None:
    """grouped_mm, 0 to torch, is a GEMM of equal groups; linear attention is a scan with its formula's FLOPs."""
    graph = trace_model(str(MODELS / "with_kernels.py"))
    (layer,) = graph.classes
    tokens, hidden, heads, experts, width = 128, 64, 4, 4, 96
    up, down = (op for op in layer.ops if op.name.endswith("_grouped_mm"))
    assert (up.kind, up.flops_counted, up.flops) == (OpKind.GEMM, 0, 2 * tokens * hidden * width)
    assert up.backward_flops == down.backward_flops == 2 * up.flops
    assert (up.gemm, down.gemm) == (
        Gemm(batch=experts, m=tokens // experts, n=width, k=hidden),
        Gemm(batch=experts, m=tokens // experts, n=hidden, k=width),
    )
    gla = next(op for op in layer.ops if op.name.endswith("gla"))
    dim = hidden // heads
    assert gla.kind is OpKind.SCAN
    assert gla.flops == tokens * heads * (65 * 2 * dim + 4 * dim * dim)  # half a chunk of 64, state in and out
    assert gla.backward_flops == 2 * gla.flops


def test_torchs_chunked_loss_is_a_product_and_not_its_bytes() -> None:
    """Torch counts 0 FLOPs. It makes the gradients with the logits; a step has the three products in any case."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    rows, width, vocab = 64, 32, 1000
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    with torch.device("meta"):
        head, x = nn.Linear(width, vocab, bias=False), torch.randn(rows, width, requires_grad=True)
        target = torch.zeros(rows, dtype=torch.int64)
        with Recorder(head) as recorder:
            F.linear_cross_entropy(x, head.weight, target, options=options)
    (op,) = (op for op in recorder.segment.ops if "cross_entropy" in op.name)
    logits = 2 * rows * width * vocab
    assert (op.flops_counted, op.flops, op.backward_flops) == (0, logits, 2 * logits)
    assert (op.kind, op.gemm) == (OpKind.BMM, Gemm(batch=1, m=rows, n=vocab, k=width))
