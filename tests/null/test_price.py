"""A layer's price: activation memory, tensor parallelism, waiting for the host, 8-bit GEMMs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import toy
from shapes_for_tests import GPT, LLAMA, graph, keys, one, with_module_head

from planner.costmodel import comm, compute
from planner.costmodel.engine import EngineSpec, get_engine
from planner.costmodel.facts import layer_facts
from planner.costmodel.graph import OpKind
from planner.costmodel.kernels import CHUNK_KERNELS, CHUNK_ROWS, chunked_head, weight_sum_bytes
from planner.costmodel.keys import Machine
from planner.costmodel.layer_comm import context_calls_s
from planner.costmodel.presets import load_cluster
from planner.costmodel.price import IN_STEP_GEMM, LayerPrice, host_bound_s, price_layer
from planner.reports.shapes import Shape


def machine(engine: EngineSpec, dtype: str = "bfloat16", cluster: str = "a100-80gb") -> Machine:
    spec = load_cluster(cluster)
    return Machine(cluster=spec, domains=spec.domain_sizes(8), num_gpus=8, engine=engine, dtype=dtype, dtype_bytes=2)


def price(engine: EngineSpec, shape: Shape = GPT, dtype: str = "bfloat16", cluster: str = "a100-80gb",
          **changes: float) -> LayerPrice:  # fmt: skip
    return price_layer(layer_facts(graph(shape).classes[0], engine), keys(**changes), machine(engine, dtype, cluster))


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_activation_memory_is_korthikantis_equations(tp: int, batch: int) -> None:
    """Korthikanti et al. 2022, equations 2 and 4: sbh (10 + 24/t + 5as/(ht)), and sbh/t (34 + 5as/h) with SP."""
    s, h, a = GPT.seq_len, GPT.hidden, GPT.heads
    engine = get_engine("megatron-2022")
    plain = price(engine, tp=tp, micro_batch_size=batch)
    split = price(engine, tp=tp, micro_batch_size=batch, sp=1)
    stats = 4 * 4 * s * batch  # of the layer norms, left out of the paper's count
    assert plain.saved[0][0] == pytest.approx(s * batch * h * (10 + 24 / tp + 5 * a * s / (h * tp)) + stats)
    assert split.saved[0][0] == pytest.approx(s * batch * h / tp * (34 + 5 * a * s / h) + stats / tp)
    assert split.saved[1][0] == pytest.approx(s * batch * h / tp * 34 + stats / tp)  # equation 6
    assert plain.saved[2][0] == 2 * s * batch * h


def test_tensor_parallelism_is_two_all_reduces_each_way() -> None:
    """Shoeybi et al. 2019, section 3: with nothing hidden, four all-reduces of 2sbh bytes per layer."""
    engine = dataclasses.replace(get_engine("megatron-2021"), overlap_tp_column=0.0)
    m = machine(engine)
    call = comm.all_reduce_s(m.cluster, m.domains, 2.0 * GPT.seq_len * GPT.hidden, one(1), one(8))
    assert price(engine, tp=8).tp_f == pytest.approx(2 * call)
    assert price(engine, tp=8).tp_b == pytest.approx(2 * call)
    assert price(engine, tp=1).tp_f == 0


def test_sequence_parallelism_gathers_again_unless_the_engine_kept_the_input() -> None:
    again = dataclasses.replace(get_engine("megatron-2021"), sp_saves_gathered=False)
    kept = dataclasses.replace(again, sp_saves_gathered=True)
    m = machine(again)
    gather = comm.all_gather_s(m.cluster, m.domains, 2.0 * GPT.seq_len * GPT.hidden, one(1), one(8))
    longer = price(again, tp=8, sp=1).tp_b - price(kept, tp=8, sp=1).tp_b
    assert longer == pytest.approx(2 * gather)
    more = price(kept, tp=8, sp=1).saved[0] - price(again, tp=8, sp=1).saved[0]
    assert more == pytest.approx(2 * 2 * GPT.seq_len * GPT.hidden * 7 / 8)


@pytest.mark.parametrize("sp", [0, 1])
def test_recomputation_that_stops_early_leaves_out_the_last_product_and_its_sum(sp: int) -> None:
    """Of s x (ffn / t) by (ffn / t) x h, and of 2sbh bytes; a layer that ends in a norm is redone whole."""
    whole = dataclasses.replace(get_engine("planner"), recompute_stops_early=False)
    early = dataclasses.replace(whole, recompute_stops_early=True)
    m = machine(whole)
    size = (m.cluster, m.domains, 2.0 * GPT.seq_len * GPT.hidden, one(1), one(8))
    total = comm.reduce_scatter_s(*size) if sp else comm.all_reduce_s(*size)
    gemm = compute.gemm_s(m.cluster.device, "bfloat16", one(1), one(GPT.seq_len), one(GPT.hidden), one(GPT.ffn / 8))
    left_out = price(whole, tp=8, sp=sp).redo[2] - price(early, tp=8, sp=sp).redo[2]
    assert left_out == pytest.approx(total + IN_STEP_GEMM * gemm)
    layer = graph().classes[0]
    kept = tuple(dataclasses.replace(a, saved=True) for a in layer.activations)  # as when the layer ended in a norm
    assert layer_facts(dataclasses.replace(layer, activations=kept), early).last_gemm is None


def test_selective_recomputation_gathers_again_where_norms_are_redone() -> None:
    """Two all-gathers of 2sbh bytes under SP, none without."""
    again = get_engine("planner")
    kept = dataclasses.replace(again, selective_gathers_again=False)
    m = machine(again)
    gather = comm.all_gather_s(m.cluster, m.domains, 2.0 * GPT.seq_len * GPT.hidden, one(1), one(8))
    assert price(again, tp=8, sp=1).redo[1] - price(kept, tp=8, sp=1).redo[1] == pytest.approx(2 * gather)
    assert price(again, tp=8).redo[1] == price(kept, tp=8).redo[1]


def test_backward_of_column_parallel_gemms_hides_behind_weight_gradients() -> None:
    bare = dataclasses.replace(get_engine("megatron-2022"), overlap_tp_column=0.0)
    half = dataclasses.replace(bare, overlap_tp_column=0.5)
    a, b = (price(e, tp=8, micro_batch_size=4) for e in (bare, half))
    assert b.tp_f == a.tp_f
    assert b.tp_b == pytest.approx(a.tp_b - 0.5 * np.minimum(a.tp_b, a.gemm_b + a.gemm_w))


@pytest.mark.parametrize(("ulysses", "ring", "rate"), [(1, 8, 100e9), (1, 16, 10e9), (4, 2, 100e9), (8, 2, 10e9)])
def test_a_ring_is_as_slow_as_its_slowest_hop(ulysses: int, ring: int, rate: float) -> None:
    """2 x 2sh bytes of K and V over all ranks; 100 GB/s in a node of 8, 10 GB/s between nodes."""
    engine = get_engine("planner")
    m = Machine(cluster=toy.TWO_TIERS, domains=(8, 16), num_gpus=16, engine=engine, dtype="bfloat16", dtype_bytes=2)
    _, ring_s = context_calls_s(layer_facts(graph().classes[0], engine), keys(ulysses=ulysses, ring=ring), m)
    hop_bytes = 2 * 2.0 * GPT.seq_len * GPT.hidden / (ulysses * ring)
    assert ring_s == pytest.approx((ring - 1) * hop_bytes / rate)


def test_host_bound_time_by_hand() -> None:
    """Between the larger of both and their sum: (1 + 1)^(1/4) - 1; nothing is hidden from a blocking host."""
    assert host_bound_s(one(1), one(1), False) == pytest.approx(2 ** (1 / 4) - 1)
    assert host_bound_s(one(1), one(0), False) == 0
    assert host_bound_s(one(100), one(1), False) == pytest.approx(100 / 4e8, rel=1e-3)
    assert host_bound_s(one(1e-9), one(1), False) == pytest.approx(1)
    assert host_bound_s(one(100), one(1), True) == 1


@pytest.mark.parametrize(("num_gpus", "piped", "more_s"), [(8, 1, 0), (16, 0, 0), (16, 1, 4 * 8 * 1e-3)])
def test_a_pipeline_that_crosses_nodes_slows_the_host_by_collective_and_rank(
    num_gpus: int, piped: int, more_s: float
) -> None:
    """Two gathers and two scatters in forward, 1 ms more for each of the 8 ranks; blocking, so that all of it shows."""
    base = dataclasses.replace(get_engine("nanotron"), blocking_launches=True, host_collective_crossing_s=0.0)
    slow = dataclasses.replace(base, host_collective_crossing_s=1e-3)
    facts = layer_facts(graph(GPT).classes[0], base)
    where = keys(tp=8, sp=1, piped=piped)
    plain, slower = (
        price_layer(facts, where, dataclasses.replace(machine(e), num_gpus=num_gpus)) for e in (base, slow)
    )
    assert slower.launch_f - plain.launch_f == pytest.approx(more_s)
    assert slower.launch_b - plain.launch_b == pytest.approx(2 * more_s)


def test_eight_bit_gemms_are_used_in_the_body_only() -> None:
    engine = get_engine("megatron-core")
    large = dataclasses.replace(LLAMA, hidden=8192, ffn=28_672, heads=64, head_dim=128)
    wide, narrow = (price(engine, large, dtype=d, cluster="h100") for d in ("bfloat16", "float8"))
    assert narrow.gemm_f < wide.gemm_f
    head = layer_facts(graph(LLAMA).epilogue, engine)
    times = [price_layer(head, keys(), machine(engine, d, "h100")).gemm_f for d in ("bfloat16", "float8")]
    assert times[0] == times[1]


def test_an_old_attention_kernel_bounds_the_rate_per_multiprocessor() -> None:
    engine = dataclasses.replace(get_engine("llm-foundry"), attention_flops_per_sm=1e9)
    forward = 2 * GPT.seq_len**2 * GPT.hidden  # 4 s^2 h, halved by the causal mask
    got = price(engine)
    assert got.attention_f == pytest.approx(forward / (108 * 1e9))
    assert got.attention_b == pytest.approx(2 * forward / (108 * 1e9))


def test_accumulation_moves_its_bytes_once_per_micro_batch() -> None:
    engine = get_engine("nanotron")
    got = price(engine)
    device = machine(engine).cluster.device
    rate = device.hbm_bytes_per_s.value * device.memory.hbm_frac
    assert got.accumulate_w == pytest.approx(got.dense_params * 10 / rate)
    assert price(get_engine("megatron-core")).accumulate_w == 0


def test_the_chunked_loss_keeps_the_heads_gradient_instead_of_the_logits() -> None:
    """bf16: 2 bytes a weight kept where there were 2 a logit; the same products, all in forward, and sums of dw."""
    engine = get_engine("planner")
    epilogue, m = with_module_head(graph(LLAMA)).epilogue, machine(engine)
    facts = layer_facts(epilogue, engine)
    plain, chunked = (price_layer(facts, keys(micro_batch_size=8, chunked_loss=on), m) for on in (0, 1))
    rows, weights = 8 * LLAMA.seq_len, LLAMA.hidden * LLAMA.vocab
    assert plain.saved[0] - chunked.saved[0] == pytest.approx(2 * rows * LLAMA.vocab - 2 * weights)
    assert chunked.loss_bytes == 2 * weights
    logits = 2 * CHUNK_ROWS * LLAMA.vocab  # one chunk; the product in 16 bits is what is kept of its sum later
    assert chunked.loss_work_bytes == 4 * weights + logits + 2 * rows * LLAMA.hidden
    split = price_layer(facts, keys(micro_batch_size=8, chunked_loss=1, tp=2, vocab_parallel=1), m)
    assert split.loss_work_bytes == 4 * weights / 2 + 2 * logits / 2 + 2 * rows * LLAMA.hidden
    assert chunked.gemm_f == pytest.approx(plain.gemm_f + plain.gemm_b + plain.gemm_w)
    assert chunked.gemm_b == chunked.gemm_w == 0
    chunks = np.ceil(rows / CHUNK_ROWS)
    sums = compute.memory_bound_s(m.cluster.device, weight_sum_bytes(chunks, 2) * weights, CHUNK_KERNELS * chunks)
    assert chunked.memory_f - plain.memory_f == pytest.approx(float(sums))


def test_only_a_modules_product_that_the_loss_alone_reads_can_be_chunked() -> None:
    found = with_module_head(graph(LLAMA)).epilogue
    head = chunked_head(found)
    assert head is not None and head.gemm is not None and head.gemm.n == LLAMA.vocab
    assert chunked_head(graph(LLAMA).epilogue) is None  # a product of no module
    read_twice = dataclasses.replace(found.ops[-1], name="max", inputs=head.outputs)
    assert chunked_head(dataclasses.replace(found, ops=(*found.ops, read_twice))) is None
    capped = [
        dataclasses.replace(op, kind=OpKind.ELEMENTWISE, name="tanh") if op.name.endswith("to_float") else op
        for op in found.ops
    ]
    assert chunked_head(dataclasses.replace(found, ops=tuple(capped))) is None


@pytest.mark.parametrize(("name", "with_sp"), [("planner", 2), ("megatron-core", 1)])
def test_logits_are_whole_where_the_vocabulary_is_not_cut(name: str, with_sp: int) -> None:
    """Our runtime's head then works on its part of a sequence under sequence parallelism, Megatron's on all of it."""
    on = machine(get_engine(name))
    head = layer_facts(graph(LLAMA).epilogue, on.engine)

    def logits(**options: float) -> float:
        made = price_layer(head, keys(tp=2, **options), on)
        return float(made.loss_bytes[0])

    assert logits() == 2 * logits(vocab_parallel=1)
    assert logits(sp=1) == 2 * logits(vocab_parallel=1, sp=1) / with_sp
    whole, cut = (price_layer(head, keys(tp=2, vocab_parallel=v), on).saved[0][0] for v in (0, 1))
    assert whole - cut == pytest.approx(logits(vocab_parallel=1))
