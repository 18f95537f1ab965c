"""Checkpointed forwards are run again by backward; here is what notices when that happens under another attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch
from torch import nn

from ..core.context import Selection
from ..core.errors import UnsupportedError


def in_backward() -> bool:
    """Whether the autograd engine is running, so that a forward now is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def checkpoints_layers(model: nn.Module) -> bool:
    """Whether the model's own gradient checkpointing is switched on."""
    return model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def inside_checkpoint() -> bool:
    """Whether somebody packs what backward needs, as ``torch.utils.checkpoint`` does with ``use_reentrant=False``."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Forgotten(Mapping[int, Selection]):
    """Selections of earlier layers where a checkpointed backward cannot know them; reading any of them raises."""

    def _raise(self) -> NoReturn:
        raise UnsupportedError(
            "a pattern reads what earlier layers selected, which a checkpointed backward of this model has forgotten; "
            "switch gradient checkpointing off, or use a pattern that chooses in each layer anew."
        )

    def __getitem__(self, layer: int) -> Selection:
        self._raise()

    def __iter__(self) -> Iterator[int]:
        self._raise()

    def __len__(self) -> int:
        self._raise()


def refuse(name: str, when: str) -> UnsupportedError:
    """The error for a layer that is recomputed under another attention than it ran with."""
    return UnsupportedError(
        f"backward() recomputes the checkpointed layer {name!r} {when}, which would give wrong gradients. "
        "Call backward() inside the `with foveal.attach(...)` block that ran the forward."
    )


def guard(module: nn.Module, name: str) -> None:
    """Raise if backward recomputes ``module`` after its handle is gone; its next ordinary forward lifts the guard."""

    def check(*_: object) -> None:
        if in_backward():
            raise refuse(name, "after its `with foveal.attach(...)` block has ended")
        hook.remove()

    hook = module.register_forward_pre_hook(check)
