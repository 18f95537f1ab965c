"""What a pattern is: a frozen, hashable, JSON-serialisable dataclass that says who attends to whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from ..core import registry, serial
from ..core.context import SelectContext, State
from ..core.errors import ConfigError
from ..core.layouts import Layout

LookAhead = Literal["none", "block", "prefill"]
"""What a row's selection may read beyond the row: nothing; to the end of its query block; the whole prefill call."""


@dataclass(frozen=True)
class Pattern:
    """Base class of all patterns.

    A subclass is a frozen dataclass decorated with ``@register("pattern", "its_name")``; its fields are its
    hyper-parameters, checked in ``__post_init__``. It implements :meth:`select`. Adding the file is all there is to do.
    """

    registered_name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Context fields that the pattern cannot do without, e.g. ``{"hidden_states"}``."""

    @property
    def static(self) -> bool:
        """True when the layout depends on lengths and base mask only, so that it may be cached and shared by layers."""
        return False

    @property
    def look_ahead(self) -> LookAhead:
        """How far beyond a row its *selection* reads; the no-leak test asserts exactly this."""
        return "none"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """Say which pairs are kept.

        Args:
            q: ``(B, H, Nq, D)`` queries as the softmax will use them (after RoPE).
            k: ``(B, Hkv, Nk, D)`` all keys so far, the new ones last.
            ctx: lengths, offsets, padding and whatever else the tensors cannot say.
            state: what the previous call for this request returned, or None. ``None`` with ``ctx.q_offset > 0`` means
                that the state was lost (a beam was reordered, a cache was cropped): rebuild it from ``k``.

        Returns:
            ``(layout, state)``. A None layout is dense. The layout need not repeat ``ctx.base``; kernels intersect them.
        """
        raise NotImplementedError

    def after_move(self, state: State, reordered: bool) -> State:
        """What is left of ``state`` when the cache was cropped, or its rows perhaps reordered; None: nothing, rebuild it."""
        return None

    def check_model(self, sha256: Callable[[], str], layers: int) -> None:
        """Raise :class:`ConfigError` when the pattern was trained for another model.

        Args:
            sha256: gives the digest of the model's weights (``foveal.hf.fingerprint``). layers: of the model.
        """

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; fields at their default are left out."""
        return {"pattern": self.registered_name, **serial.to_json(self)}

    @classmethod
    def from_json(cls, data: Any, where: str = "pattern") -> Self:
        """Build the pattern that ``data["pattern"]`` names; raises :class:`ConfigError` naming field, value and fix."""
        if not isinstance(data, Mapping) or not isinstance(data.get("pattern"), str):
            raise ConfigError(
                f'{where} is {data!r}; expected an object such as {{"pattern": "sliding_window", "window": 1024}}.'
            )
        found = registry.lookup("pattern", data["pattern"], where)
        fields = {k: v for k, v in data.items() if k != "pattern"}
        pattern = serial.from_json(found, fields, f"{where} ({data['pattern']})")
        if not isinstance(pattern, cls):
            raise ConfigError(f"{where} is the pattern {data['pattern']!r}; expected a {cls.__name__}.")
        return pattern

    def __str__(self) -> str:
        fields = {k: v for k, v in self.to_json().items() if k != "pattern"}
        inside = ", ".join(f"{k}={getattr(self, k)}" for k in fields)
        return f"{self.registered_name}({inside})"
