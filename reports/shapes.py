"""ModelGraph of a decoder from its published shape, without torch: what the tracer would find, in microseconds.

Ops, tensors and cuts are those of the traced examples (examples/gpt3_175b.py, examples/llama3.py) and, for MoE,
of a Hugging Face Mixtral with native norms; tests/cpu/test_shapes.py holds the two against each other.
`fused_projections` is the code of Megatron and nanotron: q, k, v and gate, up joined into one GEMM each.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

from planner.costmodel.graph import (
    Activation,
    Attention,
    Gemm,
    LayerClass,
    LayerRun,
    ModelGraph,
    Op,
    OpKind,
    ParamGroup,
    TensorLayout,
    TpCut,
)

BF16 = 2
FP32 = 4
INT64 = 8
_LAYOUT = {TpCut.COLUMN: TensorLayout.INNER, TpCut.HEAD: TensorLayout.INNER, TpCut.INNER: TensorLayout.INNER,
           TpCut.VOCAB: TensorLayout.INNER, TpCut.REPLICATED: TensorLayout.REPLICATED}  # others: OUTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder's dimensions. `ffn` is the width of the (possibly gated) MLP, of one expert if there are any."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    seq_len: int
    gated: bool
    tied: bool
    rotary: bool  # rotary embedding, RMSNorm and no biases (Llama); else learned positions, LayerNorm, biases (GPT)
    qk_norm: bool = False
    num_experts: int = 0
    top_k: int = 0
    fused_projections: bool = False
    dtype: str = "bfloat16"


@dataclass(slots=True)
class _Layer:
    """A LayerClass under construction; tensors are numbered in the order that ops name them."""

    tokens: int
    ops: list[Op] = field(default_factory=list)
    tensors: list[Activation] = field(default_factory=list)
    params: dict[tuple[TpCut, bool], int] = field(default_factory=dict)

    def tensor(self, num_bytes: int, layout: TensorLayout, saved: bool = False, producer: int = -1,
               scales: bool = True) -> int:
        self.tensors.append(Activation(num_bytes=num_bytes, producer=producer, saved=saved, layout=layout,
                                       scales_with_batch=scales))
        return len(self.tensors) - 1

    def op(self, name: str, kind: OpKind, cut: TpCut, inputs: tuple[int, ...], outputs: tuple[tuple[int, bool], ...],
           *, layout: TensorLayout | None = None, flops: int = 0, counted: int = 0, weight_bytes: int = 0,
           moved: int = 0, gemm: Gemm | None = None, attention: Attention | None = None,
           routed: bool = False) -> int:
        """Append an op; `outputs` are (bytes, saved). `moved` 0: inputs, weights and outputs once. First output."""
        place = layout or _LAYOUT.get(cut, TensorLayout.OUTER)
        made = tuple(self.tensor(size, place, saved, len(self.ops)) for size, saved in outputs)
        moved = moved or weight_bytes + sum(self.tensors[a].num_bytes for a in (*inputs, *made))
        self.ops.append(Op(name=name, kind=kind, cut=cut, inputs=inputs, outputs=made, flops=flops,
                           backward_flops=2 * flops, flops_counted=counted or flops, bytes_moved=moved,
                           weight_bytes=weight_bytes, gemm=gemm, attention=attention, routed=routed))
        return made[0]

    def param(self, cut: TpCut, count: int, routed: bool = False) -> None:
        if count:
            self.params[cut, routed] = self.params.get((cut, routed), 0) + count

    def linear(self, name: str, x: int, n: int, k: int, cut: TpCut, *, bias: bool = False, saved: bool = False,
               experts: int = 0, rows: int = 0) -> int:
        """X @ W[k, n]; with `experts`, W[experts, k, n] on `rows` routed rows in all."""
        batch, m = max(experts, 1), (rows or self.tokens) // max(experts, 1)
        routed = experts > 0
        self.param(cut, batch * n * k, routed)
        self.param(TpCut.OUTER if cut is TpCut.ROW else cut, n * bias)
        return self.op(name, OpKind.GEMM, cut, (x,), ((BF16 * batch * m * n, saved),),
                       flops=2 * batch * m * n * k, weight_bytes=BF16 * batch * (n * k + n * bias),
                       gemm=Gemm(batch=batch, m=m, n=n, k=k), routed=routed)

    def norm(self, name: str, x: int, width: int, rms: bool, layout: TensorLayout = TensorLayout.GATHERED) -> int:
        """LayerNorm or RMSNorm of the residual stream; its input, output and row statistics are kept."""
        size = BF16 * self.tokens * width
        self.tensors[x] = dataclasses.replace(self.tensors[x], saved=True)
        stats = ((FP32 * self.tokens, True),) * (1 if rms else 2)
        out = self.op(name, OpKind.NORM, TpCut.OUTER, (x,), ((size, True), *stats),
                      weight_bytes=BF16 * width * (1 if rms else 2))
        self.tensors[out] = dataclasses.replace(self.tensors[out], layout=layout)
        self.param(TpCut.OUTER, width * (1 if rms else 2))
        return out

    def elementwise(self, name: str, inputs: tuple[int, ...], num_bytes: int, cut: TpCut, *, saved: bool = False,
                    routed: bool = False) -> int:
        return self.op(name, OpKind.ELEMENTWISE, cut, inputs, ((num_bytes, saved),), routed=routed)

    def build(self, name: str, *, input_bytes: int, output_bytes: int, divides: tuple[int, ...] = (),
              kv_heads: int = 0, experts: tuple[int, int] = (0, 0)) -> LayerClass:
        return LayerClass(
            name=name, ops=tuple(self.ops), activations=tuple(self.tensors),
            params=tuple(ParamGroup(num_params=count, cut=cut, routed=routed)
                         for (cut, routed), count in self.params.items()),
            input_bytes=input_bytes, output_bytes=output_bytes, tp_divides=tuple(sorted(set(divides))),
            kv_heads=kv_heads, num_experts=experts[0], experts_per_token=experts[1],
        )  # fmt: skip


@functools.cache
def build_graph(shape: Shape) -> ModelGraph:
    """The graph of `shape`, traced at one sequence."""
    tokens, width = shape.seq_len, BF16 * shape.seq_len * shape.hidden
    block = _block(shape).build(
        "Block", input_bytes=width, output_bytes=width, divides=(shape.heads, shape.ffn), kv_heads=shape.kv_heads,
        experts=(shape.num_experts, shape.top_k))
    return ModelGraph(
        name="decoder",
        prologue=_prologue(shape).build("prologue", input_bytes=INT64 * tokens, output_bytes=width),
        classes=(block,),
        runs=(LayerRun(layer_class=0, count=shape.num_layers,
                       paths=tuple(f"layers.{i}" for i in range(shape.num_layers))),),
        epilogue=_epilogue(shape).build("epilogue", input_bytes=width, output_bytes=0),
        traced_micro_batch_size=1,
        traced_seq_len=tokens,
        dtype=shape.dtype,
        dtype_bytes=BF16,
        vocab_size=shape.vocab,
        tied_params=shape.vocab * shape.hidden if shape.tied else 0,
        source="published shape",
        source_sha256="",
    )  # fmt: skip


def _prologue(shape: Shape) -> _Layer:
    layer = _Layer(tokens=shape.seq_len)
    width = BF16 * shape.seq_len * shape.hidden
    ids = layer.tensor(INT64 * shape.seq_len, TensorLayout.REPLICATED, saved=True)
    words = layer.op("tokens", OpKind.EMBEDDING, TpCut.VOCAB, (ids,), ((width, False),),
                     layout=TensorLayout.OUTER, weight_bytes=width)
    layer.param(TpCut.VOCAB, shape.vocab * shape.hidden)
    if not shape.rotary:
        places = layer.tensor(INT64 * shape.seq_len, TensorLayout.REPLICATED, saved=True, scales=False)
        rows = layer.op("positions", OpKind.EMBEDDING, TpCut.OUTER, (places,), ((width, False),), weight_bytes=width)
        layer.elementwise("add", (words, rows), width, TpCut.OUTER)
        layer.param(TpCut.OUTER, shape.seq_len * shape.hidden)
    return layer


def _epilogue(shape: Shape) -> _Layer:
    layer = _Layer(tokens=shape.seq_len)
    scores = shape.seq_len * shape.vocab
    x = layer.tensor(BF16 * shape.seq_len * shape.hidden, TensorLayout.OUTER)
    normed = layer.norm("norm", x, shape.hidden, shape.rotary)
    logits = layer.linear("head", normed, shape.vocab, shape.hidden, TpCut.VOCAB)
    if shape.tied:
        del layer.params[TpCut.VOCAB, False]
    wide = layer.elementwise("to_float", (logits,), FP32 * scores, TpCut.VOCAB)
    probs = layer.op("log_softmax", OpKind.LOSS, TpCut.VOCAB, (wide,), ((FP32 * scores, True),))
    labels = layer.tensor(INT64 * shape.seq_len, TensorLayout.REPLICATED, saved=True)
    layer.op("nll_loss", OpKind.LOSS, TpCut.VOCAB, (probs, labels), ((FP32, False), (FP32, True)),
             layout=TensorLayout.OUTER)
    layer.tensors[-2:] = [dataclasses.replace(a, scales_with_batch=False) for a in layer.tensors[-2:]]
    return layer


def _block(shape: Shape) -> _Layer:
    layer = _Layer(tokens=shape.seq_len)
    width = BF16 * shape.seq_len * shape.hidden
    x = layer.tensor(width, TensorLayout.OUTER)
    normed = layer.norm("norm1", x, shape.hidden, shape.rotary)
    mixed = _attention(layer, shape, normed)
    middle = layer.elementwise("add1", (x, mixed), width, TpCut.OUTER)
    normed = layer.norm("norm2", middle, shape.hidden, shape.rotary)
    done = _experts(layer, shape, normed) if shape.num_experts else _mlp(layer, shape, normed, 0)
    layer.elementwise("add2", (middle, done), width, TpCut.OUTER)
    return layer


def _attention(layer: _Layer, shape: Shape, x: int) -> int:
    q_width, kv_width, bias = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, not shape.rotary
    reads: tuple[int, ...]
    if shape.rotary:
        if shape.fused_projections:
            joined = layer.linear("qkv", x, q_width + 2 * kv_width, shape.hidden, TpCut.COLUMN)
            q, k, v = joined, joined, layer.elementwise("copy_v", (joined,), BF16 * layer.tokens * kv_width,
                                                        TpCut.INNER, saved=True)
        else:
            q, k, v = (layer.linear(name, x, wide, shape.hidden, TpCut.COLUMN, saved=name == "v")
                       for name, wide in (("q", q_width), ("k", kv_width), ("v", kv_width)))
        cos, sin = (layer.tensor(BF16 * layer.tokens * shape.head_dim, TensorLayout.REPLICATED, scales=False)
                    for _ in range(2))
        turned = tuple(_rotate(layer, part, BF16 * layer.tokens * wide, cos, sin, shape.qk_norm)
                       for part, wide in ((q, q_width), (k, kv_width)))
        reads = (*turned, v)
    else:
        reads = (layer.linear("qkv", x, q_width + 2 * kv_width, shape.hidden, TpCut.COLUMN, bias=bias, saved=True),)
    full = 4 * shape.heads * layer.tokens**2 * shape.head_dim
    out = layer.op(
        "attention", OpKind.ATTENTION, TpCut.HEAD, reads,
        ((BF16 * layer.tokens * q_width, True), (FP32 * layer.tokens * shape.heads, True)),
        flops=full // 2, counted=full,
        attention=Attention(batch=1, q_heads=shape.heads, kv_heads=shape.kv_heads, q_len=layer.tokens,
                            kv_len=layer.tokens, head_dim_qk=shape.head_dim, head_dim_v=shape.head_dim, causal=True),
    )  # fmt: skip
    return layer.linear("out", out, shape.hidden, q_width, TpCut.ROW, bias=bias)


def _rotate(layer: _Layer, x: int, size: int, cos: int, sin: int, norm: bool) -> int:
    """Rotary embedding as torch composes it: x cos + rotate_half(x) sin; before it a norm per head (Qwen3)."""
    if norm:
        layer.tensors[x] = dataclasses.replace(layer.tensors[x], saved=True)
        x = layer.op("qk_norm", OpKind.NORM, TpCut.INNER, (x,), ((size, False),))
        layer.param(TpCut.REPLICATED, layer.tensors[cos].num_bytes // (BF16 * layer.tokens))
    straight = layer.elementwise("rotary_mul", (x, cos), size, TpCut.INNER)
    half = layer.elementwise("rotary_neg", (x,), size // 2, TpCut.INNER)
    _moves(layer, size)
    turned = layer.elementwise("rotary_cat", (half, x), size, TpCut.INNER)
    _moves(layer, 2 * size)
    crossed = layer.elementwise("rotary_mul", (turned, sin), size, TpCut.INNER)
    return layer.elementwise("rotary_add", (straight, crossed), size, TpCut.INNER, saved=True)


def _moves(layer: _Layer, num_bytes: int) -> None:
    """Correct the traffic of the last op, which reads only a part of its input."""
    layer.ops[-1] = dataclasses.replace(layer.ops[-1], bytes_moved=num_bytes)


def _mlp(layer: _Layer, shape: Shape, x: int, rows: int) -> int:
    """Plain or gated MLP; with experts on `rows` routed rows."""
    experts, bias = shape.num_experts, not shape.rotary
    size, routed = BF16 * (rows or layer.tokens) * shape.ffn, shape.num_experts > 0
    if not shape.gated:
        up = layer.linear("up", x, shape.ffn, shape.hidden, TpCut.COLUMN, bias=bias, saved=True, experts=experts,
                          rows=rows)
        hidden = layer.elementwise("gelu", (up,), size, TpCut.INNER, saved=True, routed=routed)
        return layer.linear("down", hidden, shape.hidden, shape.ffn, TpCut.ROW, bias=bias, experts=experts, rows=rows)
    joined = shape.fused_projections or routed
    gate = layer.linear("gate", x, (1 + joined) * shape.ffn, shape.hidden, TpCut.COLUMN, saved=True, experts=experts,
                        rows=rows)
    act = layer.elementwise("silu", (gate,), size, TpCut.INNER, saved=True, routed=routed)
    if joined:
        _moves(layer, 2 * size)
    up = gate if joined else layer.linear("up", x, shape.ffn, shape.hidden, TpCut.COLUMN, saved=True)
    hidden = layer.elementwise("mul", (act, up), size, TpCut.INNER, saved=True, routed=routed)
    if joined:
        _moves(layer, 3 * size)
    return layer.linear("down", hidden, shape.hidden, shape.ffn, TpCut.ROW, experts=experts, rows=rows)


def _experts(layer: _Layer, shape: Shape, x: int) -> int:
    """Router, dispatch, grouped MLP, combine, with balanced routing (examples traced by profiler/moe.py)."""
    tokens, experts, rows = layer.tokens, shape.num_experts, layer.tokens * shape.top_k
    layer.tensors[x] = dataclasses.replace(layer.tensors[x], layout=TensorLayout.OUTER)
    wide = FP32 * tokens * experts
    scores = layer.linear("router", x, experts, shape.hidden, TpCut.REPLICATED)
    scores = layer.elementwise("router_to_float", (scores,), wide, TpCut.REPLICATED)
    probs = layer.elementwise("router_softmax", (scores,), wide, TpCut.REPLICATED, saved=True)
    weights = layer.op("topk", OpKind.ROUTER, TpCut.REPLICATED, (probs,), ((FP32 * rows, True), (INT64 * rows, True)))
    chosen = weights + 1
    sent = layer.op("dispatch", OpKind.PERMUTE, TpCut.OUTER, (x, chosen), ((BF16 * rows * shape.hidden, True),),
                    layout=TensorLayout.GATHERED, routed=True)
    done = _mlp(layer, shape, sent, rows)
    # Megatron-Core weights the experts' hidden layer instead of their output, which then need not be kept.
    layer.tensors[done] = dataclasses.replace(layer.tensors[done], saved=not shape.fused_projections)
    return layer.op("combine", OpKind.PERMUTE, TpCut.OUTER, (done, weights, chosen),
                    ((BF16 * tokens * shape.hidden, False),), routed=True)
