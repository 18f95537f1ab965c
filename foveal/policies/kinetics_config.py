"""Model shapes and devices by name, from a ``config.json``, or from numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, ModelError, nearest
from .kinetics import HARDWARE, MODELS, Hardware, ModelShape

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def shape_of(model: str | os.PathLike[str], parameters: float | None = None) -> ModelShape:
    """The shape of a known model, or of a ``config.json`` or a folder that holds one.

    Args:
        parameters: active parameters; default those of a decoder with a gated MLP and no biases, counted from the configuration.

    Raises:
        ConfigError: neither a known name nor a file.
        ModelError: a file without the sizes needed, or of a mixture of experts without ``parameters``.
    """
    name = os.fspath(model)
    if name in MODELS:
        known = MODELS[name]
        if parameters is None:
            return known
        return ModelShape(name, parameters, known.layers, known.num_heads, known.num_kv_heads, known.head_dim)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model is {name!r}; expected a known name, a config.json or its folder. {nearest(name, MODELS)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Expected a model's config.json.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, a model's config.json.")
    return _from_config(config, path, parameters)


def _from_config(config: dict[str, Any], path: Path, parameters: float | None) -> ModelShape:
    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: {key} is {value!r}; expected a whole number of at least 1.")
        return value

    layers, heads, dim = size("num_hidden_layers"), size("num_attention_heads"), size("hidden_size")
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", dim // heads)
    if parameters is None:
        if any(config.get(key) for key in _EXPERTS):
            raise ModelError(
                f"{path}: a mixture of experts; its active parameters cannot be counted from here. Give --parameters."
            )
        attention = dim * head_dim * (2 * heads + 2 * kv_heads)
        block = attention + 3 * dim * size("intermediate_size") + 2 * dim
        tables = 1 if config.get("tie_word_embeddings", False) else 2
        parameters = layers * block + tables * size("vocab_size") * dim + dim
    return ModelShape(path.parent.resolve().name, parameters, layers, heads, kv_heads, head_dim)


def hardware_of(text: str) -> Hardware:
    """A known device, or ``"TFLOPS:GBS"``, its peak TFLOP/s and GB/s, such as ``"989:4800"``.

    Raises:
        ConfigError: neither.
    """
    if text in HARDWARE:
        return HARDWARE[text]
    if ":" in text:
        try:
            flops, bandwidth = (float(x) for x in text.split(":"))
        except ValueError:
            raise ConfigError(f"hardware is {text!r}; expected TFLOP/s and GB/s such as 989:4800.") from None
        return Hardware(text, flops * 1e12, bandwidth * 1e9)
    raise ConfigError(
        f"hardware is {text!r}; expected a known name or TFLOP/s:GB/s such as 989:4800. {nearest(text, HARDWARE)}"
    )
