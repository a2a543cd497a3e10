"""Cases as something to run: GEMMs, attention, memory-bound kernels, optimizer steps, copies, launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from planner.profiler.cases import Case
from planner.profiler.timing import Job, Work

_WIDTH = 1024  # last dim of norms, softmax and embeddings
_VOCAB = 8192


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype that samples call `name`."""
    return getattr(torch, name or "float32")


def make_op(case: Case, device: torch.device) -> Job:
    """The job of a kernel; raises what torch raises when the device cannot run it."""
    return _MAKERS[case.kind](case, device)


def _random(device: torch.device, dtype: torch.dtype, *shape: float) -> torch.Tensor:
    return torch.randn([int(size) for size in shape], device=device).to(dtype)


def _gemm(case: Case, device: torch.device) -> Job:
    d, dtype = case.dims, dtype_of(case.dtype)
    a, b = _random(device, dtype, d["batch"], d["m"], d["k"]), _random(device, dtype, d["batch"], d["n"], d["k"])
    out = torch.empty((int(d["batch"]), int(d["m"]), int(d["n"])), device=device, dtype=dtype)
    if d["batch"] == 1:
        return Job(work=lambda: torch.mm(a[0], b[0].t(), out=out[0]))
    return Job(work=lambda: torch.bmm(a, b.transpose(1, 2), out=out))


def _attention(case: Case, device: torch.device) -> Job:
    d, dtype = case.dims, dtype_of(case.dtype)
    mask, _, way = case.name.partition("/")
    causal, grad = mask == "causal" and d["q_len"] > 1, way == "backward"

    def heads(count: str, length: str, width: str) -> torch.Tensor:
        return _random(device, dtype, d["batch"], d[count], d[length], d[width]).requires_grad_(grad)

    q, k = heads("q_heads", "q_len", "head_dim_qk"), heads("kv_heads", "kv_len", "head_dim_qk")
    v = heads("kv_heads", "kv_len", "head_dim_v")
    grouped = d["q_heads"] != d["kv_heads"]

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    if not grad:
        return Job(work=forward)
    up = torch.ones_like(forward())

    def prepare() -> Work:
        out = forward()
        return lambda: torch.autograd.grad(out, (q, k, v), up)

    return Job(prepare=prepare)


def _memory(case: Case, device: torch.device) -> Job:
    """A kernel that moves `num_bytes` in all, as the cost model counts them: inputs read, outputs written."""
    num_bytes, dtype = case.dims["num_bytes"], dtype_of(case.dtype)
    width = torch.empty((), dtype=dtype).element_size()
    passes = {"embedding": 2, "loss": 1}.get(case.name, 2)
    elements = max(int(num_bytes / width / passes), 1)
    columns = min({"loss": _VOCAB}.get(case.name, _WIDTH), elements)
    rows = max(elements // columns, 1)
    x = _random(device, dtype, rows, columns)
    if case.name == "embedding":
        table = _random(device, dtype, _VOCAB, columns)
        tokens = torch.randint(0, _VOCAB, (rows,), device=device)
        return Job(work=lambda: F.embedding(tokens, table))
    if case.name == "loss":
        labels = torch.randint(0, columns, (rows,), device=device)
        return Job(work=lambda: F.cross_entropy(x.float(), labels))
    if case.name == "norm":
        return Job(work=lambda: F.layer_norm(x, (columns,)))
    if case.name == "softmax":
        return Job(work=lambda: torch.softmax(x, dim=-1))
    return Job(work=lambda: x + 1)


def _optimizer(case: Case, device: torch.device) -> Job:
    """AdamW over a few tensors, the norm of the gradients and their scaling, as the runtime steps."""
    from planner.runtime.optimizer import squares

    count = max(int(case.dims["num_params"]) // 8, 1)
    params = [torch.nn.Parameter(_random(device, torch.float32, count)) for _ in range(8)]
    for param in params:
        param.grad = torch.ones_like(param)
    inner = torch.optim.AdamW(params, fused=True)

    def step() -> None:
        grads = [param.grad for param in params if param.grad is not None]
        squares(grads).sum().sqrt()
        for grad in grads:
            grad.mul_(1.0)  # as they are scaled where the norm is too large
        inner.step()

    return Job(work=step)


def _copy(case: Case, device: torch.device) -> Job:
    pinned = device.type == "cuda"
    host = torch.zeros(int(case.dims["num_bytes"]), dtype=torch.uint8, pin_memory=pinned)
    there = torch.zeros(int(case.dims["num_bytes"]), dtype=torch.uint8, device=device)
    if case.name == "h2d":
        return Job(work=lambda: there.copy_(host, non_blocking=True))
    return Job(work=lambda: host.copy_(there, non_blocking=True))


def _launch(case: Case, device: torch.device) -> Job:
    del case
    x = torch.zeros(1, device=device)
    return Job(work=lambda: x.add_(1))


def _kernel(case: Case, device: torch.device) -> Job:
    from planner.profiler.kernel_ops import make_kernel  # the kernels take a second to import

    return make_kernel(case, device)


_MAKERS: dict[str, Callable[[Case, torch.device], Job]] = {
    "gemm": _gemm, "attention": _attention, "memory": _memory, "optimizer": _optimizer, "copy": _copy,
    "launch": _launch, "kernel": _kernel,
}  # fmt: skip
