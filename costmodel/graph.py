"""ModelGraph: a torch model as a chain of layers, equal layers folded into classes.

All sizes are of the WHOLE layer (no parallelism) at the traced shape, one micro-batch of
`traced_micro_batch_size` sequences of `traced_seq_len` tokens. Activations, FLOPs and bytes of an op grow
linearly in micro_batch_size; `batch_scaling` says which tensors do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SCHEMA = "planner.graph/1"  # of a graph's JSON form


class OpKind(StrEnum):
    """What an op is to the cost model."""

    GEMM = "gemm"  # matmul with a parameter (or batched over experts); dims in `Op.gemm`
    BMM = "bmm"  # matmul of two activations outside attention
    ATTENTION = "attention"  # scaled dot-product attention, one op whatever the kernel
    CONV = "conv"  # convolution; `Op.gemm` holds its implicit-GEMM dims
    NORM = "norm"
    ELEMENTWISE = "elementwise"  # activation functions, residual adds, dropout, rotary, casts, copies
    EMBEDDING = "embedding"
    LOSS = "loss"  # log-softmax and cross-entropy
    ROUTER = "router"  # top-k, softmax over experts, sort
    PERMUTE = "permute"  # MoE dispatch and combine (token permutation); where EP's all-to-all sits
    SCAN = "scan"  # linear attention, SSM and recurrent ops
    REDUCTION = "reduction"
    VIEW = "view"  # no bytes moved
    OTHER = "other"


class TpCut(StrEnum):
    """How tensor parallelism cuts an op."""

    COLUMN = "column"  # weight split on the output dim: output is sharded
    ROW = "row"  # weight split on the input dim: output is a partial sum, followed by all-reduce/reduce-scatter
    HEAD = "head"  # attention or scan: split over heads
    VOCAB = "vocab"  # embedding or head or loss split over the vocabulary
    INNER = "inner"  # works on sharded activations (between column and row): 1/tp of everything
    OUTER = "outer"  # works on the residual stream: replicated under TP, 1/tp under sequence parallelism
    REPLICATED = "replicated"  # not cut by TP whatever happens (router, uncuttable block)


class TensorLayout(StrEnum):
    """How an activation lies over the TP group."""

    INNER = "inner"  # 1/tp per rank
    OUTER = "outer"  # full per rank, or 1/tp with sequence parallelism
    GATHERED = "gathered"  # input of a column-parallel GEMM: full per rank when used; with SP it is re-gathered
    #                        in backward from the OUTER tensor, so it costs 1/tp when saved
    REPLICATED = "replicated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """C[batch, m, n] = A[batch, m, k] B[k, n]; m counts tokens of the micro-batch, n and k are unsharded."""

    batch: int
    m: int
    n: int
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Scaled dot-product attention of one micro-batch, unsharded."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim_qk: int
    head_dim_v: int
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """One tensor (storage) inside a layer. `producer` is an index into `LayerClass.ops`, -1 for a layer input."""

    num_bytes: int
    producer: int
    saved: bool  # autograd keeps it for backward
    layout: TensorLayout
    scales_with_batch: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One forward operation of a layer, at the traced shape, unsharded.

    `flops` counts 2 per multiply-add with a causal mask halved; `flops_counted` follows torch's
    FlopCounterMode (causal not halved, 0 where it counts nothing). `bytes_moved` is what an unfused kernel
    reads and writes: inputs, weights and outputs once each.
    """

    name: str
    kind: OpKind
    cut: TpCut
    inputs: tuple[int, ...]  # indices into LayerClass.activations
    outputs: tuple[int, ...]
    flops: int
    backward_flops: int
    flops_counted: int
    bytes_moved: int
    weight_bytes: int = 0
    gemm: Gemm | None = None
    attention: Attention | None = None
    routed: bool = False  # works on tokens routed to experts: split by EP instead of (or beside) TP


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """Parameters of a layer that are treated alike. `cut` COLUMN/ROW/VOCAB/HEAD are sharded by tp."""

    num_params: int
    cut: TpCut
    routed: bool  # expert parameters: sharded by ep (and etp) instead of replicated over it
    names: tuple[str, ...] = ()
    trainable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerClass:
    """A kind of layer; equal layers of the model share one.

    `tp_divides`: tp must divide each of these (query heads, FFN width, ...). `kv_heads`: smallest number of KV
    heads of its attention ops (0 if none): beyond it KV heads are replicated. `tp_reason`: why TP is off for
    this class, empty when it can be cut. `input_bytes`: what must be kept to recompute the layer from its
    input, and what crosses a pipeline cut in front of it (all live tensors, at the traced shape).
    """

    name: str
    ops: tuple[Op, ...]
    activations: tuple[Activation, ...]
    params: tuple[ParamGroup, ...]
    input_bytes: int
    output_bytes: int
    tp_divides: tuple[int, ...]
    kv_heads: int
    tp_reason: str = ""
    num_experts: int = 0
    experts_per_token: int = 0
    cp_reason: str = ""  # why context parallelism is off for this class (recurrent ops, conv), empty if fine

    @property
    def num_params(self) -> int:
        """Parameters of one layer of this class."""
        return sum(group.num_params for group in self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRun:
    """`count` consecutive layers of class `layer_class` (an index into ModelGraph.classes).

    `path` is the module path of the first and `paths` of every layer, the names that the runtime uses.
    """

    layer_class: int
    count: int
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph:
    """A model as a chain: `prologue` (embedding side), runs of layers, `epilogue` (final norm, head, loss).

    A pipeline can be cut in front of any layer of `runs`; prologue and epilogue stay on the first and last
    stage. `tied_params` counts parameters that prologue and epilogue share (embedding tied to head): they are
    counted once in `num_params`, in the prologue, and held on both ends when pp > 1.
    """

    name: str
    prologue: LayerClass
    classes: tuple[LayerClass, ...]
    runs: tuple[LayerRun, ...]
    epilogue: LayerClass
    traced_micro_batch_size: int
    traced_seq_len: int
    dtype: str  # activations and weights as they are computed: "bfloat16"
    dtype_bytes: int
    vocab_size: int
    tied_params: int
    source: str  # what was traced: "model.py:build_model"
    source_sha256: str
    default_global_batch_size: int = 0  # 0 = the model does not say
    unit: str = "tokens"  # what seq_len counts: tokens, or "images" when there is no sequence dim
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers that a pipeline can be cut between."""
        return sum(run.count for run in self.runs)

    @property
    def num_params(self) -> int:
        """Parameters of the model, tied ones once: equals sum(p.numel() for p in model.parameters())."""
        body = sum(self.classes[run.layer_class].num_params * run.count for run in self.runs)
        return self.prologue.num_params + body + self.epilogue.num_params

    @property
    def layer_classes(self) -> tuple[int, ...]:
        """Class index of every layer, in order."""
        return tuple(run.layer_class for run in self.runs for _ in range(run.count))


def check_graph(graph: ModelGraph) -> None:
    """ValueError that names the first index of `graph` that points nowhere."""
    for i, run in enumerate(graph.runs):
        if not 0 <= run.layer_class < len(graph.classes) or run.count != len(run.paths) or run.count < 1:
            raise ValueError(f"runs[{i}] names no class or its count is not its number of paths")
    for layer in (graph.prologue, *graph.classes, graph.epilogue):
        for i, op in enumerate(layer.ops):
            if any(not 0 <= a < len(layer.activations) for a in (*op.inputs, *op.outputs)):
                raise ValueError(f"layer {layer.name!r} ops[{i}] names an activation that is not there")
        for i, activation in enumerate(layer.activations):
            if not -1 <= activation.producer < len(layer.ops):
                raise ValueError(f"layer {layer.name!r} activations[{i}] names an op that is not there")
