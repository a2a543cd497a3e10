"""The plan space as arrays: which meshes and options exist for a model on a number of GPUs.

A *cell* fixes (tp, sp, vocabulary parallel, chunked loss, ulysses, ring, ep, micro-batch, pp, schedule, vpp); a
*layout* of a cell fixes how model states lie (dp_replicate x dp_shard, ZeRO stage, optimizer offload). The rest of a
plan (stage partition, recomputation and activation offload of every layer) is the inner problem (partition.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.graph import LayerClass, ModelGraph
from planner.costmodel.kernels import CHUNK_ROWS, chunked_head
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.strategy import STRATEGIES, LayerStrategy

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
SCHEDULES = (ScheduleKind.ONE_F_ONE_B, ScheduleKind.INTERLEAVED, ScheduleKind.ZB_H1, ScheduleKind.ZB_V)
LAYOUT_FIELDS = ("dp_replicate", "dp_shard", "zero", "offload_optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user or the runtime restricts.

    `fixed` maps an option to its value; `forbidden` names options to leave out, `combinations` sets of options not
    to use together, by the names of `uses` and `strategy_uses`; `only` says which cells to keep of those left.
    """

    fixed: dict[str, int | str] = field(default_factory=dict)
    forbidden: frozenset[str] = frozenset()
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    combinations: tuple[frozenset[str], ...] = ()
    only: Callable[[Cells], BoolArray] | None = None

    def allows(self, option: str, value: int | str) -> bool:
        """Whether `option` may take `value`."""
        return option not in self.fixed or self.fixed[option] == value


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Cells as parallel int arrays of shape (N,); `schedule` indexes SCHEDULES, booleans are 0/1."""

    tp: IntArray
    sp: IntArray
    vocab_parallel: IntArray
    ulysses: IntArray
    ring: IntArray
    ep: IntArray
    micro_batch_size: IntArray
    pp: IntArray
    schedule: IntArray
    vpp: IntArray
    dp: IntArray
    num_microbatches: IntArray
    chunked_loss: IntArray

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def piped(self) -> IntArray:
        """1 where the model is cut into pipeline stages."""
        return np.minimum(self.pp - 1, 1)

    def take(self, index: IntArray) -> Cells:
        """The cells at `index`."""
        return Cells(**{name: getattr(self, name)[index] for name in self.__slots__})


def strategy_uses(strategy: LayerStrategy) -> frozenset[str]:
    """Options that a layer's strategy uses."""
    names = set() if strategy.recompute == "none" else {strategy.recompute, "recompute"}
    if strategy.offload_activations:
        names |= {"offload_activations", "offload"}
    return frozenset(names)


def uses(cells: Cells, at: IntArray, layout: IntArray) -> dict[str, NDArray[np.bool_]]:
    """Which candidates (cell `at`, state layout) use each option, arrays (K,)."""
    replicate, _, zero, offload = layout.T
    kinds = {SCHEDULES[i].value: cells.schedule[at] == i for i in range(len(SCHEDULES))}
    return kinds | {
        "tp": cells.tp[at] > 1, "sp": cells.sp[at] > 0, "vocab_parallel": cells.vocab_parallel[at] > 0,
        "chunked_loss": cells.chunked_loss[at] > 0,
        "ulysses": cells.ulysses[at] > 1, "ring": cells.ring[at] > 1, "ep": cells.ep[at] > 1, "pp": cells.pp[at] > 1,
        "dp": (cells.dp[at] > 1) & (zero == 0), "dp_replicate": (replicate > 1) & (zero > 0), "zero1": zero == 1,
        "zero2": zero == 2, "zero3": zero == 3, "offload_optimizer": offload > 0,
    }  # fmt: skip


def allowed_strategies(used: dict[str, NDArray[np.bool_]], limits: Limits) -> NDArray[np.bool_]:
    """Which strategies the limits leave to each candidate, (S, K); none for a candidate that is excluded itself."""
    size = len(next(iter(used.values())))
    allowed = np.ones((len(STRATEGIES), size), bool)
    for s, strategy in enumerate(STRATEGIES):
        own = strategy_uses(strategy)
        fits = limits.allows("recompute", strategy.recompute)
        fits = fits and limits.allows("offload_activations", int(strategy.offload_activations))
        allowed[s] &= fits and not own & limits.forbidden
        for names in limits.combinations:
            together = np.ones(size, bool)
            for name in names - own:
                together &= used.get(name, np.zeros(size, bool))
            allowed[s] &= ~together
    return allowed


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def all_layers(graph: ModelGraph) -> tuple[LayerClass, ...]:
    """Every distinct layer class, ends included."""
    return (graph.prologue, *graph.classes, graph.epilogue)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What of the model limits the degrees."""

    tp_divides: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]  # (query heads, KV heads) of each attention
    lengths: tuple[int, ...]  # sequence lengths that attention sees
    cp_ok: bool
    experts: tuple[int, ...]


def _shape(graph: ModelGraph) -> _Shape:
    layers = all_layers(graph)
    attentions = [op.attention for layer in graph.classes for op in layer.ops if op.attention is not None]
    return _Shape(
        tp_divides=tuple(sorted({d for c in graph.classes if not c.tp_reason for d in c.tp_divides})),
        heads=tuple(sorted({(a.q_heads, a.kv_heads) for a in attentions})),
        lengths=tuple(sorted({n for a in attentions for n in (a.q_len, a.kv_len)})),
        cp_ok=bool(attentions) and not any(c.cp_reason for c in layers),
        experts=tuple(sorted({c.num_experts for c in graph.classes if c.num_experts > 1})),
    )


def _tp_degrees(graph: ModelGraph, shape: _Shape, num_gpus: int, limits: Limits) -> list[int]:
    cuttable = any(not c.tp_reason and c.tp_divides for c in graph.classes)
    degrees = [d for d in divisors(num_gpus) if all(x % d == 0 for x in shape.tp_divides)] if cuttable else [1]
    kv_ok = [d for d in degrees if all(kv % d == 0 or d % kv == 0 for _, kv in shape.heads)]
    return _filter("tp", kv_ok, limits)


def _filter(option: str, values: list[int], limits: Limits) -> list[int]:
    if option in limits.forbidden:
        values = [v for v in values if v == min(values)]  # degree 1, or off
    return [v for v in values if limits.allows(option, v)]


def _cp_degrees(shape: _Shape, num_gpus: int, tp: int, limits: Limits) -> list[tuple[int, int]]:
    """(ulysses, ring) pairs for one tp."""
    pairs = [(1, 1)]
    if shape.cp_ok:
        for cp in divisors(num_gpus // tp)[1:]:
            if any(n % (2 * cp) for n in shape.lengths):
                continue
            for u in divisors(cp):
                heads_ok = all(q % (tp * u) == 0 for q, _ in shape.heads)
                kv_ok = all(kv % (tp * u) == 0 or (tp * u) % kv == 0 for _, kv in shape.heads)
                if heads_ok and (kv_ok or u == 1):
                    pairs.append((u, cp // u))
    forbid_cp = "cp" in limits.forbidden
    return [
        (u, r)
        for u, r in pairs
        if limits.allows("ulysses", u)
        and limits.allows("ring", r)
        and limits.allows("cp", u * r)
        and not (forbid_cp and u * r > 1)
        and not ("ulysses" in limits.forbidden and u > 1)
        and not ("ring" in limits.forbidden and r > 1)
    ]


def _ep_degrees(shape: _Shape, data_ranks: int, limits: Limits) -> list[int]:
    if not shape.experts:
        return _filter("ep", [1], limits)
    degrees = [d for d in divisors(data_ranks) if all(e % d == 0 for e in shape.experts)]
    return _filter("ep", degrees, limits)


def _tp_options(graph: ModelGraph, shape: _Shape, tp: int, cp: int, limits: Limits) -> list[tuple[int, int]]:
    """(sequence parallel, vocabulary parallel) for one tp x cp."""
    sp_ok = tp > 1 and bool(shape.lengths) and all(n % (tp * cp) == 0 for n in shape.lengths)
    vp_ok = tp > 1 and graph.vocab_size > 0 and graph.vocab_size % tp == 0
    sps = _filter("sp", [0, 1] if sp_ok else [0], limits)
    vps = _filter("vocab_parallel", [0, 1] if vp_ok else [0], limits)
    return [(sp, vp) for sp in sps for vp in vps]


def _schedules(graph: ModelGraph, pp: int, limits: Limits) -> list[tuple[int, int]]:
    """(schedule index, vpp) for one pp, before looking at the number of micro-batches."""
    layers = graph.num_layers
    if pp == 1:
        options = [(0, 1)]
    else:
        options = [(0, 1), (2, 1)]
        options += [(1, v) for v in divisors(layers)[1:] if layers >= v * pp]
        if layers >= 2 * pp and layers % 2 == 0:
            options.append((3, 2))
    return [
        (s, v)
        for s, v in options
        if limits.allows("schedule", SCHEDULES[s].value)
        and SCHEDULES[s].value not in limits.forbidden
        and limits.allows("vpp", v)
        and not ("vpp" in limits.forbidden and v > 1)
    ]


def enumerate_cells(
    graph: ModelGraph, num_gpus: int, global_batch_size: int, limits: Limits, chunked_loss: bool = False
) -> Cells:
    """Every cell of the declared space. ValueError never: an empty result is for the caller to explain.

    `chunked_loss`: the engine has it.
    """
    shape = _shape(graph)
    rows: list[tuple[int, ...]] = []
    columns: list[tuple[IntArray, IntArray]] = []
    pps = _filter("pp", [p for p in divisors(num_gpus) if p <= graph.num_layers], limits)
    options = {p: np.array(_schedules(graph, p, limits), dtype=np.int64).reshape(-1, 2) for p in pps}
    for tp in _tp_degrees(graph, shape, num_gpus, limits):
        for u, r in _cp_degrees(shape, num_gpus, tp, limits):
            tp_options = _tp_options(graph, shape, tp, u * r, limits)
            for pp in pps:
                if num_gpus % (tp * u * r * pp):
                    continue
                dp = num_gpus // (tp * u * r * pp)
                if global_batch_size % dp or not limits.allows("dp", dp) or ("dp" in limits.forbidden and dp > 1):
                    continue
                per_rank = global_batch_size // dp
                mbs = np.array(_filter("micro_batch_size", divisors(per_rank), limits), dtype=np.int64)
                for ep in _ep_degrees(shape, dp * u * r, limits):
                    for sp, vp in tp_options:
                        inner = _inner(mbs, options[pp], per_rank, pp)
                        if len(inner[0]):
                            rows.append((tp, sp, vp, u, r, ep, pp, dp, len(inner[0])))
                            columns.append(inner)
    cells = _with_chunked_loss(_assemble(rows, columns, global_batch_size), graph, limits, chunked_loss)
    return cells if limits.only is None else cells.take(np.flatnonzero(limits.only(cells)))


def _inner(mbs: IntArray, options: IntArray, per_rank: int, pp: int) -> tuple[IntArray, IntArray]:
    """(micro-batch sizes, option rows) of every allowed pair: interleaved needs m % pp == 0, zb_v m >= 2 pp."""
    if not len(mbs) or not len(options):
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    m = (per_rank // mbs)[:, None]
    kind = options[None, :, 0]
    ok = ((kind != 1) | (m % pp == 0)) & ((kind != 3) | (m >= 2 * pp))
    i, j = np.nonzero(ok)
    return mbs[i], options[j]


def _assemble(
    rows: list[tuple[int, ...]], columns: list[tuple[IntArray, IntArray]], global_batch_size: int
) -> Cells:
    table = np.array(rows, dtype=np.int64).reshape(-1, 9)
    wide = np.repeat(table[:, :8], table[:, 8], axis=0)
    mbs = np.concatenate([c[0] for c in columns]) if columns else np.zeros(0, np.int64)
    options = np.concatenate([c[1] for c in columns]) if columns else np.zeros((0, 2), np.int64)
    tp, sp, vp, u, r, ep, pp, dp = wide.T
    return Cells(
        tp=tp, sp=sp, vocab_parallel=vp, ulysses=u, ring=r, ep=ep, micro_batch_size=mbs, pp=pp,
        schedule=options[:, 0], vpp=options[:, 1], dp=dp, num_microbatches=global_batch_size // (dp * mbs),
        chunked_loss=np.zeros_like(mbs),
    )  # fmt: skip


def _with_chunked_loss(cells: Cells, graph: ModelGraph, limits: Limits, offered: bool) -> Cells:
    """The cells with the plain loss, then with the chunked one where a rank has more logits than two chunks' rows."""
    head = chunked_head(graph.epilogue) if offered else None
    rows = 0 if head is None or head.gemm is None else head.gemm.m / graph.traced_micro_batch_size
    many = rows * cells.micro_batch_size / (cells.ulysses * cells.ring) > 2 * CHUNK_ROWS
    allowed = _filter("chunked_loss", [0, 1], limits)
    plain = np.arange(len(cells)) if 0 in allowed else np.zeros(0, np.int64)
    chunked = np.flatnonzero(many) if 1 in allowed else np.zeros(0, np.int64)
    both = cells.take(np.concatenate([plain, chunked]))
    return replace(both, chunked_loss=np.repeat(np.array([0, 1]), [len(plain), len(chunked)]))


def layouts(dp: int, cp: int, ep: int, limits: Limits) -> IntArray:
    """State layouts (dp_replicate, dp_shard, zero, offload_optimizer) of a cell, shape (n, 4).

    ZeRO needs more than one rank to shard over; the expert group and the shard group must nest.
    """
    offloads = _filter("offload_optimizer", [0] if "offload" in limits.forbidden else [0, 1], limits)
    rows: list[tuple[int, int, int, int]] = []
    for shard in divisors(dp):
        width = shard * cp
        if width % ep and ep % width:
            continue
        zeros = [0] if shard == 1 else []
        zeros += [1, 2, 3] if width > 1 else []
        for zero in zeros:
            ok = zero in limits.zero_stages and limits.allows("zero", zero)
            ok = ok and not ("zero" in limits.forbidden and zero > 0)
            ok = ok and limits.allows("dp_shard", shard) and limits.allows("dp_replicate", dp // shard)
            if ok:
                rows += [(dp // shard, shard, zero, off) for off in offloads]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
