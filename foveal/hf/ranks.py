"""``foveal.context_parallel``: a Llama-type transformers model on a sequence that is spread over ranks.

Everything but attention works token by token, so each rank runs the model on its own tokens with their global positions;
attention goes through :func:`foveal.context_parallel_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..kernels.context_parallel import Partition, RankMesh, context_parallel_attention, mask_of
from ..patterns.dense import Dense
from ..policies.policy import Policy
from .handle import Handle

IGNORED = -100
"""Label of a token without a loss, as in transformers."""


class Shared:
    """One batch as this handle cut it: its partition, and the mask of each window that layers ask for."""

    def __init__(self, partition: Partition, documents: Sequence[int] | None, valid: Tensor | None) -> None:
        self.partition, self.documents, self.valid = partition, documents, valid
        self.masks: dict[int | None, BaseMask] = {}

    def mask(self, window: int | None) -> BaseMask:
        """Causal, with the batch's documents and padding."""
        if window not in self.masks:
            self.masks[window] = mask_of(
                self.partition.total, causal=True, window=window, documents=self.documents, valid=self.valid
            )
        return self.masks[window]


class RankHandle(Handle):
    """A model whose attention spans ranks; a context manager like :class:`foveal.hf.Handle`.

    Attributes:
        mesh, method, kind: how the sequence is spread. See :meth:`shard`, :meth:`total`, :meth:`reduce_gradients`.
    """

    def __init__(self, model: nn.Module, mesh: RankMesh, method: str, kind: str, impl: str) -> None:
        super().__init__(model, Policy.of(Dense()), impl, False, ())
        self.mesh, self.method, self.kind = mesh, method, kind
        self.batches: Any = WeakTensorKeyDictionary()
        self.across = self._attend
        cross = [site.name for site in self.sites.values() if site.index < 0]
        config: Any = model.config
        chunk = getattr(config, "attention_chunk_size", None)
        if cross or chunk:
            what = f"cross-attention ({cross[0]})" if cross else f"chunked attention ({chunk})"
            raise UnsupportedError(
                f"{type(model).__name__} has {what}, which does not run over ranks; expected a Llama-type decoder."
            )
        if not all(getattr(site.module, "is_causal", False) for site in self.sites.values()):
            raise UnsupportedError(
                f"{type(model).__name__} is no causal decoder; context parallelism of models needs one."
            )

    def shard(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        documents: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        pad: bool = False,
    ) -> dict[str, Any]:
        """This rank's part of a batch that every rank holds whole; call ``model(**batch)`` with it.

        Args:
            input_ids: ``(B, t)``. labels: ``(B, t)`` as transformers takes them (−100 for none); they are shifted here, before
                the sequence is cut. documents: lengths of packed documents, the same in every row; positions begin anew.
            attention_mask: ``(B, t)``, 0 on padding tokens. pad: fill lengths that do not divide over the ranks.

        Returns:
            ``input_ids``, global ``position_ids``, ``use_cache=False`` and, with labels, what transformers' loss takes.

        Raises:
            ShapeError: a length that does not divide over the mesh without ``pad``.
        """
        total = input_ids.shape[1]
        cut = tuple(documents) if documents is not None else None
        partition = Partition(total, self.mesh.ring, self.mesh.ulysses, self.kind, cut, pad)
        place, device = self.mesh.place, input_ids.device
        positions = torch.arange(total, device=device)
        if cut is not None:
            positions = torch.cat([torch.arange(length, device=device) for length in cut])
        mine = partition.dispatch(positions[None], *place, dim=1).expand(input_ids.shape[0], -1).contiguous()
        batch: dict[str, Any] = {
            "input_ids": partition.dispatch(input_ids, *place, dim=1), "position_ids": mine, "use_cache": False,
        }  # fmt: skip
        if labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            part = partition.dispatch(shifted, *place, dim=1, fill=IGNORED)
            batch |= {"labels": part, "shift_labels": part, "num_items_in_batch": (shifted != IGNORED).sum()}
        valid = None if attention_mask is None else attention_mask.bool().cpu()
        self.batches[mine] = Shared(partition, cut, valid)
        return batch

    def total(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch: the sum over ranks of what each rank's model returned; for reading, without gradient."""
        return self.mesh.everyone.all_reduce(loss.detach().clone())

    def reduce_gradients(self) -> None:
        """After ``backward()``: add up every parameter's gradient over the ranks, so that it is that of one process."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.mesh.everyone.all_reduce(parameter.grad)

    def gather(self, x: Tensor, batch: dict[str, Any]) -> Tensor:
        """The whole of a per-token result ``(B, n, …)``, such as logits, on every rank; without gradient."""
        flat = self.mesh.everyone.all_gather(x.detach().contiguous().view(-1))
        parts = [flat[i].view(x.shape) for i in self.mesh.order]
        return self._shared(batch["position_ids"]).partition.undispatch(parts, dim=1)

    def _shared(self, positions: Tensor | None) -> Shared:
        if positions is None or positions not in self.batches:
            raise ConfigError(
                "the model runs over ranks, but its position_ids are not those of a batch from shard(...). "
                "Call model(**handle.shard(input_ids, labels)), and keep the batch's tensors as they are."
            )
        found = self.batches[positions]
        assert isinstance(found, Shared)
        return found

    def _attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, kwargs: dict[str, Any]
    ) -> Tensor:
        if kwargs.get("s_aux") is not None:
            raise UnsupportedError(f"{type(module).__name__} has sink logits, which do not run over ranks.")
        around = self.live.surroundings.get(module)
        positions = None if around is None else around.position_ids
        if positions is None or positions not in self.batches:
            positions = self.live.forward.positions
        shared = self._shared(positions)
        if q.shape[2] != k.shape[2]:
            raise ShapeError(
                f"{type(module).__name__} has {q.shape[2]} queries and {k.shape[2]} keys; a cache does not run over ranks. Pass use_cache=False."
            )
        return context_parallel_attention(
            q, k, v, shared.mask(kwargs.get("sliding_window")), mesh=self.mesh, method=self.method, partition=shared.partition,
            scale=scale, softcap=kwargs.get("softcap"), impl=self.impl,
        )  # fmt: skip


def context_parallel(
    model: nn.Module, mesh: RankMesh, method: str = "ring", *, partition: str = "zigzag", impl: str = "auto"
) -> RankHandle:
    """Run a Llama-type transformers model on sequences spread over ranks; the same loss and gradients as one process.

    Args:
        model: a causal ``PreTrainedModel``, with the same weights on every rank. mesh: of
            :func:`foveal.kernels.context_parallel.mesh_for`. method, impl: as in :func:`foveal.context_parallel_attention`.
        partition: ``"zigzag"`` (documents are cut one by one), ``"contiguous"`` or ``"striped"``.

    Returns:
        A handle; ``with foveal.context_parallel(model, mesh) as ranks:`` or ``ranks.detach()``.

    Raises:
        UnsupportedError: a model that is no causal decoder, or whose attention cannot be honoured.

    >>> with foveal.context_parallel(model, mesh, "ring") as ranks:
    ...     loss = model(**ranks.shard(input_ids, labels=input_ids)).loss
    ...     loss.backward()
    ...     ranks.reduce_gradients()
    """
    handle = RankHandle(model, mesh, method, partition, impl)
    handle._enter()
    return handle
