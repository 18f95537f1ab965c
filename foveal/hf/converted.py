"""GGUF files, and the fast-loading copies of them that foveal keeps.

De-quantising a GGUF file takes some ten seconds per hundred megabytes; its float32 values in safetensors load in one.
The copy holds exactly the values that transformers makes from the GGUF file, so logits are bit-identical.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ModelError

FORMAT = 1
MAGIC = b"GGUF"
MANIFEST = "foveal.json"

Progress = Callable[[str], None]


def check_gguf(path: Path) -> None:
    """Raise :class:`ModelError` unless ``path`` begins like a GGUF file and the packages that read it are there."""
    with path.open("rb") as file:
        head = file.read(24)
    if head[:4] != MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it begins with {head[:4]!r}; expected {MAGIC!r}. "
            "Give a .gguf file, or a folder with config.json and safetensors weights."
        )
    if len(head) < 24:
        raise ModelError(
            f"{path} is truncated: it ends after {len(head)} bytes, within the header of 24. Download it again."
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"reading {path.name} needs the package {package}: pip install 'foveal[hf]'.")


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(model, tokenizer)`` straight from the GGUF file, de-quantised to ``dtype``.

    Raises:
        ModelError: the file is truncated or damaged, or holds an architecture that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_gguf(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no switch turns off
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
            )
        model, info = loaded
    except MemoryError:
        raise
    except Exception as error:  # the readers raise whatever the damaged bytes make them raise
        _check_whole(path)
        raise ModelError(
            f"{path.name} cannot be read as a language model: {_first_line(error)}. "
            "Use a GGUF whose architecture transformers supports, or the model's safetensors folder."
        ) from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"{path.name} lacks {len(info['missing_keys'])} weights ({some}, …); download it again.")
    for holder in (model.config, model.config.get_text_config()):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
    model.config.architectures = [type(model).__name__]
    model.hf_quantizer = None
    return model.eval(), tokenizer


def copy_folder(path: Path, cache: Path) -> Path:
    """Where the copy of this GGUF file belongs: named by the file's content and transformers' major.minor version."""
    import transformers

    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    version = ".".join(transformers.__version__.split(".")[:2])
    return cache / "models" / f"{content[:32]}-transformers-{version}"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The copy's manifest, or None when there is no copy or one of its files is missing or has another size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if sizes and manifest["format"] == FORMAT and isinstance(manifest["fingerprint"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_copy(folder: Path, path: Path, say: Progress) -> None:
    """Convert ``path`` and put the copy at ``folder``, whole or not at all; replaces a damaged one.

    Raises:
        ModelError: the GGUF file cannot be read.
        OSError: the cache cannot be written (no space, no permission); nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    from .fingerprint import fingerprint

    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    model, tokenizer = read_gguf(path, torch.float32)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < size + (64 << 20):
        raise OSError(f"{free >> 20} MB free, {size >> 20} MB needed")
    say(f"Keeping a fast-loading copy ({size >> 20} MB) for the next time")
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        try:
            save_model(model, str(part / "model.safetensors"), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        model.config.save_pretrained(part)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(part)
        tokenizer.save_pretrained(part)
        manifest = {"format": FORMAT, "source": path.name, "fingerprint": fingerprint(model)}
        manifest["files"] = {f.name: f.stat().st_size for f in sorted(part.iterdir()) if f.is_file()}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        part.chmod(0o755)
        _swap(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        del model, tokenizer
        gc.collect()


def _swap(part: Path, folder: Path) -> None:
    """Rename ``part`` to ``folder``. Another process may have been faster: its whole copy is as good as ours."""
    if folder.exists() and read_manifest(folder) is None:
        drop(folder)
    try:
        part.rename(folder)
    except OSError:
        if read_manifest(folder) is None:
            raise


def drop(folder: Path) -> None:
    """Remove a copy; renamed first, so that nobody sees half of it."""
    with contextlib.suppress(OSError):
        old = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
        folder.rename(old / "old")
        shutil.rmtree(old, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what an interrupted conversion left behind more than a day ago."""
    for part in folder.glob(".part-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 86400:
                shutil.rmtree(part, ignore_errors=True)


def _check_whole(path: Path) -> None:
    """Raise :class:`ModelError` when the header cannot be read or promises more bytes than the file has."""
    from gguf import GGUFReader

    size = os.path.getsize(path)
    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # numpy raises many kinds on damaged bytes
        raise ModelError(
            f"{path} is truncated or damaged ({size} bytes): {_first_line(error)}. Download it again."
        ) from error
    if not reader.tensors:
        raise ModelError(f"{path} is a GGUF file without tensors; expected one that holds a language model's weights.")
    if end > size:
        raise ModelError(f"{path} is truncated: its header promises {end} bytes and it has {size}. Download it again.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
