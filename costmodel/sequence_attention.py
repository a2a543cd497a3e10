"""Attention of one sequence, priced by its length: shared by all state layouts with the same tensor parallelism.

What a pack of sequences sends, it sends together: one all-to-all of all its tokens, and in every turn of a ring one hop
with the keys and values of all of them (runtime/attention.py, as in Transformer Engine's packed context parallelism).
So a call's start is paid once a pack, and a sequence adds what its bytes take at the rate of long messages.

Legend: G lengths of the grid, C layer classes, U group shapes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.costmodel.estimate import ModelFacts
from planner.costmodel.facts import LayerFacts
from planner.costmodel.keys import Array, Keys, Machine
from planner.costmodel.layer_comm import context_calls_s
from planner.costmodel.layer_times import scaled_to_measured

_SHORTEST = 16  # tokens; shorter sequences cost per token what this one does
_STEPS_PER_OCTAVE = 1


def attention_at(facts: ModelFacts, seq_len: int) -> tuple[LayerFacts, ...]:
    """Attention alone of every layer class, for one sequence of `seq_len` tokens."""

    def only(layer: LayerFacts) -> LayerFacts:
        ops = tuple(
            replace(
                op,
                attention=replace(a, batch=1, q_len=seq_len, kv_len=seq_len),
                flops=int(op.flops / a.batch * (seq_len / a.q_len) * (seq_len / a.kv_len)),
                backward_flops=int(op.backward_flops / a.batch * (seq_len / a.q_len) * (seq_len / a.kv_len)),
            )
            for op in layer.attentions
            if (a := op.attention) is not None
        )
        return replace(
            layer, matmuls=(), attentions=ops, traffic=(), selective_traffic=(), kernels=(),
            selective_kernels=(), gathered_bytes=(), row_bytes=(),
            vocab_row_bytes=0.0, vocab_gathered_bytes=0.0, permute_bytes=(), dropped_bytes=0.0, launches=0,
            last_gemm=None, last_sum_bytes=0.0,
        )  # fmt: skip

    return tuple(map(only, facts.classes))


def length_grid(longest: int) -> Array:
    """Lengths at which attention is priced: one an octave up to `longest`."""
    last = max(longest, 2 * _SHORTEST)
    count = 1 + int(np.ceil(_STEPS_PER_OCTAVE * np.log2(last / _SHORTEST)))
    return np.unique(np.rint(np.geomspace(_SHORTEST, last, count)))


class AttentionPrices:
    """Seconds of attention forward and backward, and of a forward pass's all-to-alls and ring hops, hidden or not.

    By length, class and shape. `redone`: by class, whether selective recomputation redoes attention.
    """

    def __init__(self, facts: ModelFacts, machine: Machine, longest: int) -> None:
        self.grid, self._machine = length_grid(longest), machine
        self.redone = np.array([float(layer.selective_attention) for layer in facts.classes])
        self._at = [attention_at(facts, int(n)) for n in (1, *self.grid)]
        self._kept: dict[tuple[float, ...], Array] = {}

    def of(self, keys: Keys) -> Array:
        """(4, 1 + G, C, U) at keys of one sequence: what a call costs whatever it holds, then what each length adds."""
        columns = (keys.tp, keys.sp, keys.vocab_parallel, keys.ulysses, keys.ring)
        shapes = [tuple(shape) for shape in np.stack(columns, axis=1).tolist()]
        if any(shape not in self._kept for shape in shapes):
            priced = np.concatenate([self._attention(keys), self._calls(keys)])
            self._kept.update((shape, priced[..., u]) for u, shape in enumerate(shapes))
        return np.stack([self._kept[shape] for shape in shapes], axis=-1)

    def _attention(self, keys: Keys) -> Array:
        """(2, 1 + G, C, U): forward and backward; a call costs what a single token does."""
        rows = [[scaled_to_measured(layer, keys, self._machine) for layer in layers] for layers in self._at]
        seconds = np.array([[[getattr(p, way) for p in row] for row in rows] for way in ("attention_f", "attention_b")])
        seconds[:, 1:] -= seconds[:, :1]
        return seconds

    def _calls(self, keys: Keys) -> Array:
        """(2, 1 + G, C, U): all-to-alls and hops, straight through their seconds at the two longest lengths."""
        near, far = (
            np.array([context_calls_s(layer, keys, self._machine) for layer in layers]).swapaxes(0, 1)
            for layers in self._at[-2:]
        )
        last = self.grid[-1]
        slope = np.minimum((far - near) / (last - self.grid[-2]), far / last)
        return np.concatenate([(far - slope * last)[:, None], slope[:, None] * self.grid[:, None, None]], axis=1)
