"""One language for "how much": tokens, density, or mass."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError
from .serial import check_range, check_types


@dataclass(frozen=True)
class Budget:
    """How many keys a query may see; exactly one field is given.

    Attributes:
        tokens: keys per query (or per query block), an absolute count ``>= 1``.
        density: share of the pairs that the base mask allows, in ``(0, 1]``; dense causal attention is 1.
        mass: smallest selection that holds this share of the (estimated) attention mass, in ``(0, 1]``.

    What was achieved is always measured and reported beside what was asked (``core.density``).
    """

    tokens: int | None = None
    density: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        given = [n for n in ("tokens", "density", "mass") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"Budget has {' and '.join(given) if given else 'no field'}; expected exactly one of tokens, density, mass, "
                'for example {"density": 0.125}.'
            )
        check_range(self, "tokens", low=1)
        for name in ("density", "mass"):
            check_range(self, name, high=1.0)
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"Budget.{name} is {value!r}; expected a value above 0 and at most 1.")

    def keys(self, allowed: float) -> float:
        """Keys that this budget grants a query that may see ``allowed`` keys (not for ``mass``, which depends on scores)."""
        if self.tokens is not None:
            return float(min(self.tokens, allowed))
        if self.density is not None:
            return self.density * allowed
        raise ConfigError("a mass budget has no fixed number of keys; ask the pattern, which sees the scores.")

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        if self.density is not None:
            return f"density {self.density:g}"
        return f"mass {self.mass:g}"
