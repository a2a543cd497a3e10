"""The example models at a size that runs on a CPU in a moment, in float32 so that nothing is cast."""

import importlib.util
from pathlib import Path

import torch

DTYPE = torch.float32
SEQ_LEN = 32
EXAMPLES = Path(__file__).parents[3] / "examples"


def _example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpt():
    return _example("gpt3_175b").Gpt(layers=3, hidden=64, heads=4, max_len=64, vocab=96)


def llama():
    return _example("llama3").Llama(layers=3, hidden=64, heads=4, ffn=96, kv_heads=2)


def convnet():
    return _example("convnet").ResNet(blocks=(2, 2, 1, 1), width=8, classes=10)


def gpt_layer():
    return _example("gpt3_175b").Gpt(layers=1, hidden=12288, heads=96)


def moe():
    return _example("deepseek_v3").DeepSeekV3(layers=4)
