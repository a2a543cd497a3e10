"""From a recorded forward pass to a ModelGraph: classes of layers, their tensors, parameters and cuts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from planner.costmodel.graph import Activation, LayerClass, LayerRun, ModelGraph, Op, TensorLayout, TpCut
from planner.profiler import cuts as tp
from planner.profiler.params import Ownership, group_params
from planner.profiler.record import RawOp, Segment
from planner.profiler.run import Subject, Trace


def assemble(subject: Subject, trace: Trace) -> ModelGraph:
    """The ModelGraph of a trace."""
    builder = _Builder(subject, trace)
    owners = builder.owners
    prologue = builder.build("prologue", [trace.recorder.segments[0]], (), owners.prologue)
    classes, layer_class = builder.classes()
    last = trace.recorder.segments[-1]
    epilogue = builder.build("epilogue", [last], (), owners.epilogue)
    live = builder.live
    graph = ModelGraph(
        name=subject.name,
        prologue=replace(prologue, output_bytes=live.at(0), input_bytes=live.batch_bytes(subject)),
        classes=tuple(classes),
        runs=tuple(_runs(layer_class, [call.path for call in trace.calls])),
        epilogue=replace(epilogue, input_bytes=live.at(len(trace.calls)), output_bytes=0),
        traced_micro_batch_size=subject.micro_batch_size,
        traced_seq_len=subject.seq_len,
        dtype=str(subject.dtype).removeprefix("torch."),
        dtype_bytes=subject.dtype.itemsize,
        vocab_size=subject.vocab_size,
        tied_params=owners.tied_params,
        source=subject.source,
        source_sha256=subject.source_sha256,
        default_global_batch_size=subject.global_batch_size,
        unit=subject.unit,
        notes=tuple(dict.fromkeys((*subject.notes, *trace.recorder.notes, *owners.notes))),
    )
    expected = sum(p.numel() for p in subject.model.parameters())
    assert graph.num_params == expected, (
        f"{graph.num_params:,} parameters in the graph, {expected:,} in the model"
    )
    return graph


def _runs(layer_class: list[int], paths: list[str]) -> Iterable[LayerRun]:
    start = 0
    for i in range(1, len(paths) + 1):
        if i == len(paths) or layer_class[i] != layer_class[start]:
            yield LayerRun(layer_class=layer_class[start], count=i - start, paths=tuple(paths[start:i]))
            start = i


@dataclass(slots=True)
class _Live:
    """Which storages cross the cut in front of each layer.

    Counted are tensors that depend on parameters or real-valued inputs. Token ids, rotary tables and masks
    are not: every stage reads its tokens from the data loader and makes its tables itself.
    """

    trace: Trace
    made: dict[int, int] = field(
        default_factory=dict
    )  # storage -> number of the call that made it, -1 prologue
    used: dict[int, int] = field(default_factory=dict)  # storage -> number of the last call that reads it

    def __post_init__(self) -> None:
        position: dict[int, int] = {}
        for number, call in enumerate(self.trace.calls):
            position[call.gap_index] = number if number else -1
            position.update({call.segment.index: number} if call.segment else {})
        last = len(self.trace.calls)
        for index, storage in enumerate(self.trace.recorder.storages):
            if storage.learned and not storage.is_state and not storage.weights:
                self.made[index] = position.get(storage.produced[0], last) if storage.produced else -1
        for number, call in enumerate(self.trace.calls):
            for index in (*call.reads, *self._closure(call.traced)):
                self._use(index, number)
            if call.gap is not None:
                self._use_ops(call.gap, number)
        self._use_ops(self.trace.recorder.segments[-1], last)

    def _closure(self, traced: int) -> Iterable[int]:
        """Storages from before the traced call that its ops read without being handed them."""
        call = self.trace.calls[traced]
        assert call.segment is not None
        reads = {i for op in call.segment.ops for i in op.inputs}
        return (i for i in reads if i not in call.reads and self.made.get(i, traced) < traced)

    def _use_ops(self, segment: Segment, number: int) -> None:
        for op in segment.ops:
            for index in op.inputs:
                self._use(index, number)

    def _use(self, index: int, number: int) -> None:
        if self.made.get(index, number) < number:
            self.used[index] = max(self.used.get(index, -1), number)

    def at(self, number: int) -> int:
        """Bytes that cross the cut in front of call `number`."""
        storages = self.trace.recorder.storages
        return sum(storages[i].num_bytes for i, last in self.used.items() if self.made[i] < number <= last)

    def written(self, number: int) -> tuple[int, ...]:
        """Storages that call `number` makes and that something later reads."""
        return tuple(i for i, made in self.made.items() if made == number and self.used.get(i, -1) > number)

    def batch_bytes(self, subject: Subject) -> int:
        """Bytes of the batch itself."""
        recorder = self.trace.recorder
        values = (*subject.args, *subject.kwargs.values())
        return sum(
            recorder.storages[recorder.find(v)].num_bytes for v in values if hasattr(v, "untyped_storage")
        )


class _Builder:
    def __init__(self, subject: Subject, trace: Trace) -> None:
        self.subject, self.trace = subject, trace
        self.live = _Live(trace)
        self.owners = Ownership(subject.model, trace)

    def classes(self) -> tuple[list[LayerClass], list[int]]:
        """The classes and the class of every layer; equal calls part if their edges or parameters differ."""
        found: dict[tuple[object, ...], int] = {}
        classes: list[LayerClass] = []
        layer_class: list[int] = []
        storages = self.trace.recorder.storages
        for number, call in enumerate(self.trace.calls):
            edges = (self.live.at(number), sum(storages[i].num_bytes for i in self.live.written(number)))
            owned = self.owners.layers[number]
            key = (call.traced, edges, tuple(sorted(owned)))
            if key not in found:
                found[key] = len(classes)
                first = self.trace.calls[call.traced]
                segments = [s for s in (first.gap, first.segment) if s is not None]
                writes = tuple(dict.fromkeys((*first.writes, *self.live.written(call.traced))))
                full = {
                    (f"{first.path}.{name}".lstrip(".") if local else name): name for name, local in owned
                }
                layer = self.build(_class_name(call.module, classes), segments, writes, full)
                classes.append(replace(layer, input_bytes=edges[0], output_bytes=edges[1]))
            layer_class.append(found[key])
        return classes, layer_class

    def build(
        self, name: str, segments: list[Segment], writes: tuple[int, ...], owned: dict[str, str]
    ) -> LayerClass:
        """One LayerClass; `owned` maps names of parameters in the model to names inside the layer."""
        ops = [op for segment in segments for op in segment.ops]
        saved = {index for segment in segments for index in segment.saved}
        num_experts, top_k = max((op.experts for op in ops), default=(0, 0))
        context = tp.Context(
            storages=self.trace.recorder.storages,
            body=bool(writes) or name not in ("prologue", "epilogue"),
            vocab_size=self.subject.vocab_size,
            num_experts=num_experts,
            writes=writes,
            plan=self.subject.tp_plan,
        )
        cuts = tp.derive(ops, context)
        local = self._locals(ops, saved)
        return LayerClass(
            name=name,
            ops=tuple(_op(op, cut, local) for op, cut in zip(ops, cuts.ops, strict=True)),
            activations=self._activations(ops, local, saved, cuts),
            params=group_params(ops, cuts.ops, owned, self.owners.params, self.trace.recorder),
            input_bytes=0,
            output_bytes=0,
            tp_divides=cuts.divides,
            kv_heads=cuts.kv_heads,
            tp_reason=cuts.tp_reason,
            num_experts=num_experts,
            experts_per_token=top_k,
            cp_reason=cuts.cp_reason,
        )

    def _locals(self, ops: list[RawOp], saved: set[int]) -> dict[int, int]:
        order = dict.fromkeys(i for op in ops for i in (*op.inputs, *op.outputs))
        order.update(dict.fromkeys(sorted(saved)))
        return {storage: local for local, storage in enumerate(order)}

    def _activations(
        self, ops: list[RawOp], local: dict[int, int], saved: set[int], cuts: tp.Cuts
    ) -> tuple[Activation, ...]:
        producer: dict[int, int] = {}
        seen: set[int] = set()
        for number, op in enumerate(ops):
            seen.update(op.inputs)
            for index in op.outputs:
                if index not in seen:
                    producer.setdefault(index, number)
                seen.add(index)
        storages = self.trace.recorder.storages
        return tuple(
            Activation(
                num_bytes=storages[index].num_bytes,
                producer=producer.get(index, -1),
                saved=index in saved,
                layout=cuts.layouts.get(index, TensorLayout.REPLICATED),
                scales_with_batch=storages[index].scales,
            )
            for index in local
        )


def _op(raw: RawOp, cut: TpCut, local: dict[int, int]) -> Op:
    return Op(
        name=raw.name,
        kind=raw.kind,
        cut=cut,
        inputs=tuple(local[i] for i in raw.inputs),
        outputs=tuple(local[i] for i in raw.outputs),
        flops=raw.flops,
        backward_flops=raw.backward_flops,
        flops_counted=raw.flops_counted,
        bytes_moved=raw.bytes_moved,
        weight_bytes=raw.weight_bytes,
        gemm=raw.gemm,
        attention=raw.attention,
        routed=bool(raw.experts[0]),
    )


def _class_name(module: nn.Module, classes: list[LayerClass]) -> str:
    base = type(module).__name__
    same = sum(layer.name == base or layer.name.startswith(f"{base}#") for layer in classes)
    return f"{base}#{same + 1}" if same else base
