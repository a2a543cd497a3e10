"""Packing around all-to-alls, MoE permutation and block quantisation, against definitions written out."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_compiles, check_op, max_error

from planner.kernels import dispatch, exchange, quantize


def test_pack_and_unpack_move_heads_to_ranks_and_back() -> None:
    batch, length, heads, dim, ranks = 2, 6, 4, 3, 2
    whole = torch.randn(batch, ranks * length, heads, dim)
    local = whole.chunk(ranks, dim=1)
    sent = [exchange.pack_heads(x, ranks) for x in local]
    received = [torch.stack([s[r] for s in sent]) for r in range(ranks)]  # an all-to-all
    for rank, block in enumerate(received):
        mine = exchange.unpack_sequence(block)
        assert torch.equal(mine, whole[:, :, rank * 2 : rank * 2 + 2])
        assert torch.equal(exchange.pack_sequence(mine, ranks), block)
    assert torch.equal(exchange.unpack_heads(sent[0]), local[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_pack_ops_pass_every_check(batch: int) -> None:
    x = torch.randn(batch, 6, 4, 3, requires_grad=True)
    packed = torch.randn(2, batch, 3, 2, 3, requires_grad=True)
    for op, args in (
        (exchange.pack_heads, (x, 2)),
        (exchange.pack_sequence, (x, 2)),
        (exchange.unpack_heads, (packed,)),
        (exchange.unpack_sequence, (packed,)),
    ):
        check_op(op, args)
        assert torch.autograd.gradcheck(
            op, tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args), fast_mode=True
        )
    check_compiles(lambda x: exchange.unpack_sequence(exchange.pack_heads(x, 2)), x.detach())
    check_compiles(lambda x: exchange.unpack_heads(exchange.pack_sequence(x, 2)), x.detach())


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_moves_rows_exactly(dtype: torch.dtype) -> None:
    ops = (exchange.pack_heads, exchange.unpack_heads, exchange.pack_sequence, exchange.unpack_sequence)
    names = [op._opoverload._overloadpacket.__name__ for op in ops]
    for shape in ((2, 6, 4, 5), (1, 4, 8, 300), (0, 4, 4, 3)):
        x = torch.randn(shape).to(dtype)
        for pack, unpack, ways in ((*ops[:2], names[:2]), (*ops[2:], names[2:])):
            packed = pack(x, 2)
            with dispatch.using(dict.fromkeys(ways, "ours")):
                assert torch.equal(pack(x, 2), packed)
                assert torch.equal(unpack(packed), x)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("tokens", [9, 0])
def test_triton_permutes_and_sums_experts(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    width, top_k, experts = 70, 3, 5
    x, weights = torch.randn(tokens, width).to(dtype), torch.rand(tokens, top_k).to(dtype)
    chosen = torch.randint(0, experts - 1, (tokens, top_k))  # the last one has no tokens

    def run(x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        copies, order, counts = exchange.moe_permute(leaves[0], chosen, experts)
        out = exchange.moe_unpermute(copies * 2, order, leaves[1])
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        return [out.detach(), counts, *torch.autograd.grad(out, leaves, grad)]

    exact = run(x.double(), weights.double())
    with dispatch.using(dict.fromkeys(("moe_permute", "moe_unpermute", "moe_unpermute_backward"), "ours")):
        found = run(x, weights)
    for got, want in zip(found, exact, strict=True):
        assert max_error(got, want) < tolerance if tokens else got.shape == want.shape


def routed(tokens: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(tokens, experts, dtype=torch.float64)
    weights, chosen = scores.softmax(-1).topk(top_k, dim=-1)
    return x, chosen, weights.detach().requires_grad_()


def test_permuted_experts_equal_a_loop_over_experts() -> None:
    tokens, top_k, experts = 11, 2, 6
    x, chosen, weights = routed(tokens, top_k, experts)
    chosen[chosen == 3] = 4  # an expert without tokens
    w = torch.randn(experts, 5, 5, dtype=torch.float64)
    copies, order, counts = exchange.moe_permute(x, chosen, experts)
    assert counts.tolist() == [(chosen == e).sum().item() for e in range(experts)]
    y = torch.cat([part @ w[e] for e, part in enumerate(copies.split(counts.tolist()))])
    out = exchange.moe_unpermute(y, order, weights)
    want = torch.stack([
        sum(weights[t, i] * (x[t] @ w[chosen[t, i]]) for i in range(top_k)) for t in range(tokens)
    ])  # fmt: skip
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(o, (x, weights), grad) for o in (out, want))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_moe_ops_pass_every_check() -> None:
    x, chosen, weights = routed(4, 2, 3)
    check_op(exchange.moe_permute_op, (x, chosen, 3))
    y, order, _ = exchange.moe_permute(x.detach(), chosen, 3)
    check_op(exchange.moe_unpermute, (y.requires_grad_(), order, weights))
    check_op(exchange.moe_unpermute_backward, (x.detach(), y.detach(), order, weights.detach()))

    def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        copies, order, _ = exchange.moe_permute(x, chosen, 3)
        return exchange.moe_unpermute(copies, order, weights)

    check_compiles(layer, x.detach(), weights.detach())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(1000) * torch.logspace(-3, 3, 1000)
    packed, scale = quantize.quantize_blocks(x, bits, 64)
    assert packed.numel() == 1024 * bits // 8
    back = quantize.dequantize_sum(packed[None], scale[None], 1000, bits, 64, torch.float32)
    step = scale.repeat_interleave(64)[:1000]
    assert ((back - x).abs() <= 0.5000001 * step).all()
    assert torch.equal(step.view(-1)[0], x[:64].abs().max() / (127 if bits == 8 else 7))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_triton_is_bit_exact(bits: int, dtype: torch.dtype) -> None:
    parts = torch.randn(3, 9000).to(dtype)
    parts[:, 128:256] = 0  # a block without a scale
    found = [quantize.quantize_blocks(x, bits, 128) for x in parts]
    with dispatch.using({"quantize_blocks": "ours", "dequantize_sum": "ours"}):
        for x, (packed, scale) in zip(parts, found, strict=True):
            got, got_scale = quantize.quantize_blocks(x, bits, 128)
            assert torch.equal(got, packed)
            assert torch.equal(got_scale, scale)
        packed, scale = (torch.stack(t) for t in zip(*found, strict=True))
        total = quantize.dequantize_sum(packed, scale, 9000, bits, 128, dtype)
        assert quantize.quantize_blocks(parts[0, :0], bits, 128)[0].shape == (0,)
    want = quantize.dequantize_sum(packed, scale, 9000, bits, 128, dtype)
    assert max_error(total, want) < (1e-6 if dtype == torch.float32 else 8e-3)  # FMA order of the sum
    assert max_error(want, parts.double().sum(0)) < (0.02 if bits == 8 else 0.3)


def test_quantise_ops_pass_every_check_and_send_4_5_bits_a_value() -> None:
    x = torch.randn(1024)
    check_op(quantize.quantize_blocks, (x, 4, 64))
    packed, scale = quantize.quantize_blocks(x, 4, 64)
    check_op(quantize.dequantize_sum, (packed[None], scale[None], 1000, 4, 64, torch.bfloat16))
    assert 8 * (packed.numel() + 4 * scale.numel()) == 4.5 * x.numel()

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        packed, scale = quantize.quantize_blocks(x, 4, 64)
        return quantize.dequantize_sum(packed[None], scale[None], 1024, 4, 64, torch.float32)

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), there_and_back(x))
    with pytest.raises(ValueError, match="bits=3, block=64"):
        quantize.quantize_blocks(x, 3, 64)
