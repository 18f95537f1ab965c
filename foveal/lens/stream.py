"""The residual stream after every block, looked at while the model runs: O(N) numbers per block are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ShapeError, UnsupportedError


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, in order: what holds each self-attention and stands in the model's list of layers.

    Raises:
        UnsupportedError: a model without such a list.
    """
    from ..hf.families import sites

    found: list[nn.Module] = []
    for site in sites(model):
        path = site.name.split(".")
        while path and not path[-1].isdigit():
            path.pop()
        block = model.get_submodule(".".join(path)) if path else None
        if site.index >= 0 and block is not None and block not in found:
            found.append(block)
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no list of blocks; expected a decoder such as Llama or Qwen."
        )
    return found


def gated_mlp(block: nn.Module, layer: int) -> nn.Module:
    """The block's gated MLP, with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.

    Raises:
        UnsupportedError: the block has none.
    """
    for module in block.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            return module
    raise UnsupportedError(
        f"block {layer} ({type(block).__name__}) has no gated MLP (gate_proj, up_proj, down_proj); its stages cannot be told apart."
    )


@dataclass(frozen=True, eq=False)
class Trace:
    """What sinks are found from.

    Attributes:
        norms: ``(B, L, N)`` float32 norm of the residual stream after each block; NaN on padding.
        cosines: ``(B, C, L, N)`` float32 cosine to each of the first ``C`` real tokens in the same layer, with its sign.
        first: ``(B,)`` position of the first real token. valid: ``(B, N)`` bool.
        largest: ``(L,)`` largest absolute entry after each block, and token: ``(L,)`` the position where it is.
    """

    norms: Tensor
    cosines: Tensor
    first: Tensor
    valid: Tensor
    largest: Tensor
    token: Tensor

    @property
    def layers(self) -> int:
        return self.norms.shape[1]


class Tracer:
    """Takes the residual stream block by block."""

    def __init__(self, candidates: int = 2, valid: Tensor | None = None) -> None:
        self.candidates, self.valid = candidates, valid
        self._norms: list[Tensor] = []
        self._cosines: list[Tensor] = []
        self._peaks: list[tuple[float, int]] = []

    @torch.no_grad()
    def take(self, hidden: Tensor) -> None:
        """The next block's output, ``(B, N, D)``; norms and cosines in float32, since those of massive vectors need it."""
        h = hidden.detach().float()
        if self.valid is None:
            self.valid = torch.ones(h.shape[:2], dtype=torch.bool)
        valid = self.valid.to(h.device).bool()
        if h.dim() != 3 or valid.shape != h.shape[:2] or h.shape[1] < self.candidates:
            raise ShapeError(
                f"a block gave hidden states of shape {tuple(h.shape)} with a padding mask of {tuple(valid.shape)}; expected (batch, tokens, dim) "
                f"with at least {self.candidates} tokens, in one prefill."
            )
        norm = h.norm(dim=-1)
        at = (valid.long().argmax(-1)[:, None] + torch.arange(self.candidates, device=h.device)).clamp(
            max=h.shape[1] - 1
        )
        heads = h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))
        cosine = heads @ h.transpose(1, 2)
        cosine = cosine / (heads.norm(dim=-1)[..., None] * norm[:, None]).clamp(min=1e-30)
        peak = h.abs().amax(-1).masked_fill(~valid, 0.0)
        self._peaks.append((float(peak.max()), int(peak.argmax()) % h.shape[1]))
        self._norms.append(norm.masked_fill(~valid, torch.nan).cpu())
        self._cosines.append(cosine.masked_fill(~valid[:, None], torch.nan).cpu())

    def trace(self) -> Trace:
        """Everything taken so far."""
        if not self._norms:
            raise ShapeError("no block gave hidden states; expected at least one.")
        assert self.valid is not None
        valid = self.valid.bool().cpu()
        largest, token = zip(*self._peaks, strict=True)
        return Trace(
            torch.stack(self._norms, 1), torch.stack(self._cosines, 2), valid.long().argmax(-1), valid,
            torch.tensor(largest), torch.tensor(token),
        )  # fmt: skip


def trace_hidden(hidden: Sequence[Tensor], candidates: int = 2, valid: Tensor | None = None) -> Trace:
    """From hidden states at hand, ``(B, N, D)`` after each block (a Hugging Face model's ``hidden_states[1:]``)."""
    tracer = Tracer(candidates, valid)
    for h in hidden:
        tracer.take(h)
    return tracer.trace()


@contextmanager
def on_outputs(modules: Sequence[nn.Module], see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``see(index, output)`` when a module gives its output; a tensor that it returns takes the output's place."""

    def hook(index: int) -> Callable[..., Any]:
        def called(module: nn.Module, args: Any, output: Any) -> Any:
            whole = isinstance(output, Tensor)
            changed = see(index, output if whole else output[0])
            if changed is None:
                return None
            return changed if whole else (changed, *output[1:])

        return called

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
