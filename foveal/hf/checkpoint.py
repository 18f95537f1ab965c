"""Hugging Face checkpoints, in a folder or on the hub: safetensors only, language and vision-language models, errors that teach."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from ..core.errors import ModelError, nearest
from ..core.info import PACKAGED

FORMS = f"a packaged name ({', '.join(PACKAGED)}), a folder, a .gguf file, or a Hugging Face id such as org/model"
"""What a model may be called."""


def read_checkpoint(name: str, dtype: torch.dtype | None, remote: bool, *, pictures: bool = False) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a folder or a hub id; ``dtype`` None keeps the checkpoint's own.

    Args:
        pictures: read a vision-language model, and its processor in the tokenizer's place.

    Raises:
        ModelError: it cannot be found or read, is incomplete, of another kind, or not in safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    maker: Any = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    reader: Any = AutoProcessor if pictures else AutoTokenizer

    offline = not Path(name).is_dir() and not _hub_reachable()
    options: dict[str, Any] = {"trust_remote_code": remote, "local_files_only": offline}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        (_check_pictures if pictures else _check_causal)(config, name)
        tokenizer = reader.from_pretrained(name, **options)
        loaded: Any = maker.from_pretrained(
            name, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
        )
        model, info = loaded
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, SafetensorError, JSON errors, …
        raise ModelError(_explain(name, error, offline)) from error
    lost = {*info["missing_keys"], *(k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"])}
    if lost:
        some = ", ".join(sorted(lost)[:3])
        raise ModelError(
            f"{name}: {len(lost)} weights of {type(model).__name__} are missing or have another shape ({some}). "
            f"Expected a complete checkpoint of a {'vision-language' if pictures else 'causal language'} model."
        )
    return model, tokenizer


def model_folder(path: Path) -> Path:
    """The folder, if it can be loaded without unpickling anything."""
    files = sorted(f.name for f in path.iterdir() if f.is_file())
    if "config.json" not in files:
        gguf = [f for f in files if f.endswith(".gguf")]
        save = "Save one there with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        step = f"It holds {gguf[0]}: give that file." if gguf else save
        raise ModelError(f"folder {path} has no config.json; expected a Hugging Face model folder. {step}")
    if not any(f.endswith(".safetensors") for f in files):
        pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl"))]
        if pickles:
            raise ModelError(
                f"folder {path} has its weights only as a pickle ({pickles[0]}), which can run code when it is opened; "
                "expected safetensors. Where you trust the file, load it and call model.save_pretrained(folder)."
            )
        raise ModelError(f"folder {path} has no weights: no .safetensors file beside config.json.")
    return path


def _check_causal(config: Any, name: str) -> None:
    """Raise :class:`ModelError` unless transformers, or code that the checkpoint brings, makes a causal LM of it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    named = list(getattr(config, "architectures", None) or [])
    known: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([value] if isinstance(value, str) else value)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (named and not known.intersection(named)):
        what = ", ".join(named) or type(config).__name__
        raise ModelError(
            f"{name} is {what}, not a causal language model; expected one that generates text token by token, "
            "such as LlamaForCausalLM."
        )


def _check_pictures(config: Any, name: str) -> None:
    """Raise :class:`ModelError` unless transformers makes a vision-language model of it."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not getattr(config, "auto_map", None):
        what = ", ".join(getattr(config, "architectures", None) or []) or type(config).__name__
        raise ModelError(
            f"{name} is {what}, which has no image tokens and reads no pictures; give text alone, or a vision-language model such as LlavaForConditionalGeneration."
        )


def _explain(name: str, error: Exception, offline: bool) -> str:
    """One sentence that names the cause and the next step."""
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    if "trust_remote_code" in text:
        return f"{name} runs Python code that it brings along; read that code, then allow it: --trust-remote-code."
    if ("no file named" in text and "safetensors" in text) or "use_safetensors" in text:
        return f"{name} has no .safetensors weights, and foveal opens no pickles. Choose a checkpoint that has them."
    if not Path(name).is_dir():
        if offline:
            hint = f" {nearest(name, PACKAGED)}" if nearest(name, PACKAGED).startswith("Did") else ""
            return f"model {name!r}: not found locally, and the Hugging Face hub cannot be reached from here.{hint} Expected {FORMS}."
        if "not a valid model identifier" in text or "Repository Not Found" in text or "404" in text:
            return f"model {name!r} is neither here nor on the Hugging Face hub. Expected {FORMS}."
    if "rocessor" in text:
        return f"{name} has no readable processor ({first}); put one there: processor.save_pretrained(folder)."
    if "okenizer" in text:
        return f"{name} has no readable tokenizer ({first}); put one there: tokenizer.save_pretrained(folder)."
    return f"{name} cannot be loaded: {first}."


def _hub_reachable() -> bool:
    """Whether asking the hub can succeed: it saves half a minute of retries on a machine without a network."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
