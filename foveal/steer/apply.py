"""``foveal.steer.apply``: run a model with its attention changed, and take the change away again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..core.errors import ConfigError, UnsupportedError
from ..hf import Handle, attach
from ..hf.interventions import Intervention
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..policies.policy import Policy


def apply(
    model: nn.Module,
    interventions: Intervention | Sequence[Intervention],
    policy: Policy | Pattern | None = None,
    *,
    impl: str = "auto",
) -> Handle:
    """Attach interventions to a transformers model: ``with foveal.steer.apply(model, VAR(...)): model.generate(...)``.

    They run in the order given, in the dispatcher of :func:`foveal.attach`, on the attention that ``policy`` computes. In every
    layer changes of attention weights (``VAR``, ``Knockout``) come first and see each other's result, then changes of head
    outputs (``HeadScale``, ``VHR``).

    Args:
        model: any model that :func:`foveal.attach` takes. interventions: one or several.
        policy: sparse attention to combine with; default dense. impl: kernel implementation.

    Returns:
        The handle, a context manager. :func:`report` tells what the interventions did.

    Raises:
        ConfigError: none given, or two that cannot run together, and why.
        UnsupportedError: something that is no intervention on attention, or a model that it does not fit.
    """
    given: Iterable[Any] = interventions if isinstance(interventions, Sequence) else (interventions,)
    chosen = list(given)
    if not chosen:
        raise ConfigError(
            "interventions is empty; expected at least one, such as foveal.steer.HeadScale({0: [1]}, 0.0)."
        )
    for one in chosen:
        if not hasattr(one, "on"):
            hint = "CARVE changes the picture, not the attention: call foveal.steer.carve(...)." if "carve" in repr(one).lower() else "See foveal.steer for what there is."  # fmt: skip
            raise UnsupportedError(f"{one!r} is no intervention on attention. {hint}")
    kinds = [type(one).__name__ for one in chosen if getattr(one, "alone", False)]
    for name in sorted({k for k in kinds if kinds.count(k) > 1}):
        raise ConfigError(
            f"interventions holds {kinds.count(name)} × {name}; the second would see what the first has changed. "
            f"Give one {name} with the settings that you want."
        )
    if any(getattr(one, "takes_the_image_away", False) for one in chosen):
        for one in chosen:
            if getattr(one, "names_positions", False):
                raise ConfigError(
                    f"{type(one).__name__} names positions of the prompt, and VHR also runs the prompt without its image, where they are other "
                    "tokens. Choose heads first and give them to both: VHR(fixed_heads=...)."
                )
    return attach(model, Dense() if policy is None else policy, impl=impl, interventions=chosen)


def report(handle: Handle) -> list[dict[str, Any]]:
    """What each intervention did so far, in order, as JSON values; ``fired`` is False for one that has changed nothing yet."""
    return [act.report() for act in handle.acts]
