"""A Hugging Face config.json as something to trace. No code from the config's repository is ever run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.profiler.errors import TraceError
from planner.profiler.load import SkipInit, vocabulary
from planner.profiler.run import Subject

DEFAULT_SEQ_LEN = 2048


def load_config(path: Path, seq_len: int | None, micro_batch_size: int) -> Subject:
    """The model that a config.json describes, on the meta device in bfloat16. Raises TraceError."""
    data = path.read_bytes()
    body = _parse(data, path)
    model, config = _build(body, path)
    for param in model.parameters():
        # Buffers keep their dtype, as from_pretrained leaves them: rotary frequencies stay float32.
        param.data = param.data.to(torch.bfloat16)
    model.train()
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    length = seq_len or min(int(limit or DEFAULT_SEQ_LEN), DEFAULT_SEQ_LEN)
    kwargs, unit = _inputs(model, config, path, micro_batch_size, length)
    if unit == "tokens" and limit and length > int(limit):
        raise TraceError(f"{path.name}: seq_len {length} is beyond the {limit} positions of the model")
    notes = () if seq_len or unit != "tokens" else (f"sequence length not given: traced at {length} tokens",)
    return Subject(
        model=model,
        name=type(model).__name__,
        args=(),
        kwargs=kwargs,
        loss=None,
        micro_batch_size=micro_batch_size,
        seq_len=length if unit == "tokens" else 1,
        unit=unit,
        vocab_size=int(getattr(text, "vocab_size", 0) or vocabulary(model)) if unit == "tokens" else 0,
        dtype=torch.bfloat16,
        global_batch_size=0,
        source=path.name,
        source_sha256=hashlib.sha256(data).hexdigest(),
        tp_plan=dict(getattr(model, "_tp_plan", None) or getattr(config, "base_model_tp_plan", None) or {}),
        notes=notes,
    )


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(body, dict) or not isinstance(body.get("model_type"), str):
        raise TraceError(
            f"{path.name}: no model_type in it: give a Hugging Face config.json or a saved graph"
        )
    return body


def model_class(path: Path) -> tuple[Any, Any]:
    """(transformers class, config without a cache) of the config.json at `path`. Raises TraceError."""
    return _class_of(_parse(path.read_bytes(), path), path)


def _class_of(body: dict[str, Any], path: Path) -> tuple[Any, Any]:
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise TraceError(f"{path.name}: Hugging Face configs need `pip install transformers`") from None
    kind = body["model_type"]
    if kind not in CONFIG_MAPPING:
        raise TraceError(
            f"{path.name}: model_type {kind!r} is unknown to transformers {transformers.__version__}; code "
            "from the config's repository is never run: write the model as model.py"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(body)
    except Exception as error:
        raise TraceError(f"{path.name}: not a valid {kind} config: {error}") from None
    for part in (config, config.get_text_config()):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    name = _class_name(body, kind)
    if not name:
        raise TraceError(f"{path.name}: transformers has no model class for model_type {kind!r}")
    return getattr(transformers, name), config


def _build(body: dict[str, Any], path: Path) -> tuple[nn.Module, Any]:
    cls, config = _class_of(body, path)
    _assume_unpacked()
    with torch.device("meta"), SkipInit():
        try:
            model = cls._from_config(config, attn_implementation="sdpa")
        except ValueError:
            model = cls._from_config(config)
    return model, config


def _assume_unpacked() -> None:
    """One sequence per row: the check for packed ones reads position ids, which have no values on meta."""
    from transformers import masking_utils

    if hasattr(masking_utils, "find_packed_sequence_indices"):
        masking_utils.find_packed_sequence_indices = lambda *_args, **_kwargs: None


def _class_name(body: dict[str, Any], kind: str) -> str:
    """The architecture that the config names, else the first task that transformers maps the type to."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = (body.get("architectures") or [""])[0]
    if isinstance(named, str) and hasattr(transformers, named):
        return named
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ):
        found = mapping.get(kind)
        if found:
            return found if isinstance(found, str) else found[0]
    return ""


def _inputs(
    model: nn.Module, config: Any, path: Path, micro_batch_size: int, seq_len: int
) -> tuple[dict[str, Any], str]:
    main = getattr(model, "main_input_name", "input_ids")
    tokens = torch.empty((micro_batch_size, seq_len), dtype=torch.int64, device="meta")
    if main == "input_ids":
        # An encoder-decoder is traced with as many target as source tokens.
        both = {"input_ids": tokens, "decoder_input_ids": torch.empty_like(tokens)}
        return (both if config.is_encoder_decoder else {"input_ids": tokens}), "tokens"
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        shape = (micro_batch_size, channels, height, width)
        return {"pixel_values": torch.empty(shape, dtype=torch.bfloat16, device="meta")}, "images"
    raise TraceError(f"{path.name}: models that take {main} are not traced from a config: write a model.py")
