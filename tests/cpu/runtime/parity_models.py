"""Small models for parity runs, built without arguments: two examples, a hand-written one, three of Hugging Face."""

import functools
import importlib.util
from pathlib import Path

import torch

from planner.kernels.norm import add_rms_norm
from planner.kernels.pointwise import rope, swiglu

DTYPE = torch.float64
SEQ_LEN = 16
ROOT = Path(__file__).parents[3]


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama():
    module = _load(ROOT / "examples/llama3.py")
    module.VOCAB_SIZE = 96
    return module.Llama(layers=4, hidden=32, heads=4, ffn=48, kv_heads=2)


class Calling(torch.nn.Module):
    """A layer of `llama` that calls the kernels: the residual's addition with the norm behind it, RoPE and SwiGLU."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, cos, sin):
        attention, mlp = self.block.attention, self.block.feed_forward
        y = self.block.attention_norm(x)
        q, k, v = (w(y).unflatten(-1, (-1, attention.head_dim)) for w in (attention.wq, attention.wk, attention.wv))
        half = attention.head_dim // 2
        q, k = (rope(t, cos[:, :half], sin[:, :half]) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = attention.wo(out.transpose(1, 2).flatten(2))
        y, x = add_rms_norm(out, x, self.block.ffn_norm.weight, torch.finfo(x.dtype).eps)
        return x + mlp.w2(swiglu(mlp.w1(y), mlp.w3(y)))


def calling():
    model = llama()
    model.layers = torch.nn.ModuleList(Calling(block) for block in model.layers)
    return model


def gpt():
    return _load(ROOT / "examples/gpt3_175b.py").Gpt(layers=4, hidden=32, heads=4, max_len=24, vocab=96)


class Stack(torch.nn.Module):
    """Experts as gpt-oss has them: stacked weights with the inputs first, gate and up interleaved, biases."""

    def __init__(self, experts, hidden, ffn):
        super().__init__()
        self.num_experts = experts
        self.gate_up = torch.nn.Parameter(torch.randn(experts, hidden, 2 * ffn) / hidden**0.5)
        self.gate_up_bias = torch.nn.Parameter(torch.randn(experts, 2 * ffn))
        self.down = torch.nn.Parameter(torch.randn(experts, ffn, hidden) / ffn**0.5)
        self.down_bias = torch.nn.Parameter(torch.randn(experts, hidden))

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            row, slot = (chosen == number).nonzero(as_tuple=True)
            both = hidden[row] @ self.gate_up[number] + self.gate_up_bias[number]
            middle = torch.nn.functional.silu(both[:, ::2]) * both[:, 1::2]
            done = middle @ self.down[number] + self.down_bias[number]
            out = out.index_add(0, row, done * weights[row, slot, None])
        return out


class Routed(torch.nn.Module):
    def __init__(self, experts, hidden, ffn):
        super().__init__()
        self.top_k = 2
        self.router = torch.nn.Linear(hidden, experts)
        self.experts = Stack(experts, hidden, ffn)

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        return self.experts(rows, chosen, weights).view_as(x)


def biased():
    """Three experts, which do not divide over two ranks of ZeRO."""
    model = llama()
    for layer in model.layers:
        layer.feed_forward = Routed(experts=3, hidden=32, ffn=24)
    return model


def odd():
    module = _load(ROOT / "tests/cpu/models/handwritten.py")
    return module.Odd()


def hf_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def hf_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=24, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def hf_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        use_cache=False, attn_implementation="sdpa", sliding_window=None, router_jitter_noise=0.0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    for layer in model.model.layers:
        layer.mlp.gate.forward = functools.partial(_route, layer.mlp.gate)
    return model


def _route(gate, hidden):
    """The router of Mixtral in the dtype of its input: float32 would let rounding show that is not there."""
    logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
    top, chosen = logits.softmax(dim=-1).topk(gate.top_k, dim=-1)
    return logits, top / top.sum(dim=-1, keepdim=True), chosen


def deepseek():
    module = _load(ROOT / "examples/deepseek_v3.py")
    for name, value in {
        "VOCAB_SIZE": 96, "HIDDEN": 32, "HEADS": 4, "Q_RANK": 16, "KV_RANK": 8, "NOPE_DIM": 8, "ROPE_DIM": 4,
        "V_DIM": 8, "DENSE_FFN": 48, "EXPERT_FFN": 24, "EXPERTS": 4, "TOP_K": 2, "DENSE_LAYERS": 1,
    }.items():  # fmt: skip
        setattr(module, name, value)
    return module.DeepSeekV3(layers=4)
