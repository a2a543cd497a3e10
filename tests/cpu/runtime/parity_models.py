"""Small models for parity runs, built without arguments: two examples, a hand-written one, three of Hugging Face."""

import importlib.util
from pathlib import Path

import torch

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


def gpt():
    return _load(ROOT / "examples/gpt3_175b.py").Gpt(layers=4, hidden=32, heads=4, max_len=24, vocab=96)


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
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        use_cache=False, attn_implementation="sdpa", sliding_window=None, router_jitter_noise=0.0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def deepseek():
    module = _load(ROOT / "examples/deepseek_v3.py")
    for name, value in {
        "VOCAB_SIZE": 96, "HIDDEN": 32, "HEADS": 4, "Q_RANK": 16, "KV_RANK": 8, "NOPE_DIM": 8, "ROPE_DIM": 4,
        "V_DIM": 8, "DENSE_FFN": 48, "EXPERT_FFN": 24, "EXPERTS": 4, "TOP_K": 2, "DENSE_LAYERS": 1,
    }.items():  # fmt: skip
        setattr(module, name, value)
    return module.DeepSeekV3(layers=4)
