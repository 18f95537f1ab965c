"""Train DHSA's boundary predictor (arXiv 2510.24606, v1) on the keys and the attention of a frozen model.

Label of position i, from the head-averaged causal attention A of a layer: with P = Σ_{rows ≥ i+w} Σ_{keys i−w+1…i} A and F
the same over keys i+1…i+w, a boundary is where one half gets at least twice the mass of the other: ρ_i ≥ 2 with
ρ_i = (max(P, F) + ε) / (min(P, F) + ε). Loss: focal binary cross-entropy. One predictor serves all layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError
from ..layers.boundary import BoundaryPredictor
from ..patterns.boundaries import read_predictor
from .dhsa_record import Recorded, record_layers

EPSILON = 1e-6


def mass_ratios(rows: Iterable[tuple[int, Tensor]], length: int, window: int) -> Tensor:
    """ρ of every position from attention rows that are streamed in order; memory O(N · window).

    The mass that key c gets from rows ≥ t is its whole column minus the rows before t, and only t ≤ c + 2w − 1 is ever
    asked for: so a column sum and 2w − 1 entries below the diagonal per key are all that is kept.

    Args:
        rows: ``(first_row, A)`` with A ``(B, R, N)``, covering all rows once; entries after a row's own key are ignored.
        length: N.
        window: w.

    Returns:
        ``(B, N)`` float64; 1 where the windows do not fit (``i < w − 1`` or ``i + w ≥ N``).
    """
    columns = band = None
    for first, block in rows:
        if block.shape[-1] != length or first + block.shape[1] > length:
            raise ShapeError(
                f"attention rows from {first} have shape {tuple(block.shape)}; expected (batch, rows, {length}) inside {length} rows."
            )
        block = block.double().tril(first)
        if columns is None or band is None:
            columns = block.new_zeros(block.shape[0], length)
            band = block.new_zeros(block.shape[0], 2 * window - 1, length)
        columns += block.sum(1)
        for offset in range(2 * window - 1):  # A[c + offset, c]
            diagonal = (
                block.diagonal(first - offset, 1, 2)
                if first >= offset
                else block[:, offset - first :].diagonal(0, 1, 2)
            )
            key = max(first - offset, 0)
            band[:, offset, key : key + diagonal.shape[1]] = diagonal
    if columns is None or band is None:
        raise ShapeError("no attention rows were given; expected all rows of one sequence.")
    # below[:, d, c] = mass that key c gets from rows >= c + d
    below = columns[:, None] - torch.cat([band.new_zeros(band.shape[0], 1, length), band.cumsum(1)], 1)
    at = torch.arange(length, device=columns.device)

    def half(offsets: range) -> Tensor:  # keys i + offset, rows >= i + w
        total = torch.zeros_like(columns)
        for offset in offsets:
            key = (at + offset).clamp(0, length - 1)
            total += below[:, window - offset, key]
        return total

    past, future = half(range(1 - window, 1)), half(range(1, window + 1))
    ratio = (torch.maximum(past, future).clamp(min=0) + EPSILON) / (torch.minimum(past, future).clamp(min=0) + EPSILON)
    fits = (at >= window - 1) & (at + window < length)
    return torch.where(fits, ratio, 1.0)


def attention_rows(q: Tensor, k: Tensor, scale: float, base: BaseMask, rows: int = 128) -> Iterator[tuple[int, Tensor]]:
    """Head-averaged attention ``(first_row, (B, R, N))``, ``rows`` at a time; q ``(B, H, N, D)``, k ``(B, Hkv, N, D)``."""
    keys = torch.arange(base.kv_len, device=q.device)
    b = torch.arange(q.shape[0], device=q.device)[:, None, None]
    grouped = q.unflatten(1, (k.shape[1], -1))
    for first in range(0, q.shape[2], rows):
        at = torch.arange(first, min(first + rows, q.shape[2]), device=q.device)
        seen = base.allowed(b, torch.zeros_like(b), at[None, :, None], keys[None, None])[:, None, None]
        logits = (grouped[:, :, :, at] @ k[:, :, None].transpose(-1, -2)) * scale
        weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
        yield first, weights.mean((1, 2))


def boundary_labels(ratios: Tensor, window: int, beta: float = 2.0) -> Tensor:
    """``(B, N)`` 0 or 1: ρ ≥ β, never within 2w of either end (the paper's soft target, cut at 0.5)."""
    labels = (ratios >= beta).to(torch.float32)
    labels[:, : 2 * window] = 0
    labels[:, max(0, labels.shape[1] - 2 * window) :] = 0
    return labels


def focal_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, gamma: float = 2.0, pos_weight: float = 1.3
) -> Tensor:
    """Mean over ``mask`` of ``(1 − p_t)^γ ·`` cross-entropy, positives weighted; p_t is the probability of the true label."""
    entropy = binary_cross_entropy_with_logits(
        logits, labels, reduction="none", pos_weight=logits.new_tensor(pos_weight)
    )
    right = torch.where(labels > 0.5, torch.sigmoid(logits), torch.sigmoid(-logits))
    loss = (1 - right) ** gamma * entropy
    return loss.mean() if mask is None else (loss * mask).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Trained:
    """A trained predictor, the loss of every step (summed over layers), and the share of boundaries among labels."""

    predictor: BoundaryPredictor
    losses: tuple[float, ...]
    positives: float


def train_boundaries(
    model: Any,
    token_batches: Sequence[Tensor],
    *,
    window: int = 4,
    heads: int = 4,
    gated: bool = False,
    epochs: int = 2,
    lr: float = 1e-4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    record: Callable[[Any, Tensor], Iterable[Recorded]] = record_layers,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train on the keys of all self-attention layers; one optimiser step per batch, gradients summed over its layers.

    Args:
        model: a causal language model that ``record`` understands; its weights do not change.
        token_batches: ``(B, N)`` int64 tokens without padding, N > 4·window.
        window, heads, gated: see :class:`foveal.layers.boundary.BoundaryPredictor`.
        epochs, lr: of Adam.
        seed: of the initial weights and of the order of batches.
        checkpoint: safetensors file, written after every epoch beside ``<name>.optimizer``; when both exist, training
            resumes after the last finished epoch; a predictor alone is not overwritten.
        record: runs the model on one batch and yields queries and keys of each layer.
        progress: called with (step, steps, loss) after every step.

    Raises:
        ConfigError: no batches, or a checkpoint of another setting.
    """
    if not len(token_batches):
        raise ConfigError("token_batches is empty; expected at least one (batch, length) tensor of tokens.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = next(iter(record(model, token_batches[0][:1, : 4 * window + 1])))
        predictor = BoundaryPredictor(first.k.shape[1] * first.k.shape[3], window, heads, gated)
    device = first.k.device
    predictor.to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    setting = {"seed": seed, "lr": lr, "batches": len(token_batches), "gated": gated}
    done, positives, labelled = 0, 0.0, 0
    losses: list[float] = []
    if checkpoint is not None and Path(checkpoint).is_file():
        done, losses, positives, labelled = _resume(Path(checkpoint), predictor, optimizer, setting)
    steps = epochs * len(token_batches)
    for epoch in range(done, epochs):
        order = torch.randperm(
            len(token_batches), generator=torch.Generator().manual_seed(seed * 7919 + epoch)
        ).tolist()
        for index in order:
            optimizer.zero_grad()
            total = 0.0
            for layer in record(model, token_batches[index]):
                ratios = mass_ratios(
                    attention_rows(layer.q, layer.k, layer.scale, layer.base), layer.k.shape[2], window
                )
                labels = boundary_labels(ratios, window).to(device)
                loss = focal_loss(predictor(layer.k.float()), labels)
                loss.backward()
                total += float(loss.detach())
                positives, labelled = positives + float(labels.sum()), labelled + labels.numel()
            optimizer.step()
            losses.append(total)
            if progress is not None:
                progress(len(losses), steps, total)
        if checkpoint is not None:
            _save(Path(checkpoint), predictor, optimizer, setting, epoch + 1, losses, positives, labelled)
    return Trained(predictor.eval(), tuple(losses), positives / max(labelled, 1))


def _save(
    path: Path, predictor: BoundaryPredictor, optimizer: torch.optim.Adam, setting: dict[str, Any], epochs: int, losses: list[float],
    positives: float, labelled: int,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    training = json.dumps({**setting, "epochs": epochs, "losses": losses, "positives": positives, "labelled": labelled})
    moments = {
        f"{name}/{key}": value.detach().cpu()
        for name, p in predictor.named_parameters()
        for key, value in optimizer.state[p].items()
    }
    save_file(moments, f"{path}.optimizer.part", metadata={"training": training})
    Path(f"{path}.optimizer.part").replace(f"{path}.optimizer")
    predictor.save(path, training=training)


def _resume(
    path: Path, predictor: BoundaryPredictor, optimizer: torch.optim.Adam, setting: dict[str, Any]
) -> tuple[int, list[float], float, int]:
    from safetensors import safe_open

    saved, (_, meta) = BoundaryPredictor.load(path), read_predictor(path)
    if not Path(f"{path}.optimizer").is_file():
        raise ConfigError(
            f"{path} exists without {path.name}.optimizer, so training cannot resume; use another file, or delete it to start again."
        )
    with safe_open(f"{path}.optimizer", framework="pt") as file:
        training = json.loads(file.metadata()["training"])
        moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if meta.get("training") != json.dumps(training):
        raise ConfigError(f"{path} and {path.name}.optimizer come from different epochs; delete both to start again.")
    found = {
        **{k: training[k] for k in setting},
        "window": saved.window,
        "heads": saved.heads,
        "key_dim": saved.key_dim,
    }
    wanted = {**setting, "window": predictor.window, "heads": predictor.heads, "key_dim": predictor.key_dim}
    if found != wanted:
        raise ConfigError(
            f"checkpoint {path} was made with {found}; expected {wanted}. Use another file, or the same settings."
        )
    predictor.load_state_dict(saved.state_dict())
    device = predictor.norm.weight.device
    for name, p in predictor.named_parameters():
        optimizer.state[p] = {
            key.rpartition("/")[2]: value.to(device if value.dim() else "cpu")
            for key, value in moments.items()
            if key.rpartition("/")[0] == name
        }
    return training["epochs"], training["losses"], training["positives"], training["labelled"]
