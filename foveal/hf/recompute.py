"""Checkpointed forwards are run again by backward; here is what notices when that happens under another attention."""

from __future__ import annotations

import torch
from torch import nn

from ..core.errors import UnsupportedError


def in_backward() -> bool:
    """Whether the autograd engine is running, so that a forward now is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def may_be_recomputed(model: nn.Module) -> bool:
    """Whether backward may run the forward that is running now once more.

    True for the model's own gradient checkpointing, and inside somebody else's around it, which packs saved tensors.
    """
    packs = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return model.training and (packs or bool(getattr(model, "is_gradient_checkpointing", False)))


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
