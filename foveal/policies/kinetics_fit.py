"""Does time follow arithmetic plus bytes? The two rates that explain measured decode times best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import ConfigError
from .kinetics import ModelShape, at_least


@dataclass(frozen=True)
class Step:
    """One measured decode step of a whole batch.

    Attributes:
        flops: of the step. bytes: read by it. seconds: measured.

    Raises:
        ConfigError: flops or bytes below 0, or seconds that are not positive.
    """

    flops: float
    bytes: float
    seconds: float

    def __post_init__(self) -> None:
        at_least("flops", self.flops, 0)
        at_least("bytes", self.bytes, 0)
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"seconds is {self.seconds}; expected a positive, finite time.")


@dataclass(frozen=True)
class TimeFit:
    """``seconds = alpha · FLOPs + beta · bytes``.

    Attributes:
        alpha: seconds per FLOP. beta: seconds per byte. r2: share of the variance of the fitted times that is explained.
    """

    alpha: float
    beta: float
    r2: float

    @property
    def intensity(self) -> float:
        """FLOP per byte at which arithmetic and memory cost the same here; nan when arithmetic costs nothing."""
        return self.beta / self.alpha if self.alpha else math.nan

    def predict(self, step: Step) -> float:
        """Seconds."""
        return self.alpha * step.flops + self.beta * step.bytes


def step_work(
    shape: ModelShape, *, batch: int, context: int, kv_bytes: float, weight_bytes: float = 0.0
) -> tuple[float, float]:
    """FLOPs and bytes of one dense decode step of ``batch`` sequences that read ``context`` keys each.

    Args:
        kv_bytes: per element of the cache. weight_bytes: per parameter, read once per step; 0 as in the paper, which
            assumes a batch so large that weights do not count.
    """
    at_least("batch", batch, 1)
    at_least("context", context, 0)
    elements = batch * context * shape.kv_elements
    flops = 2.0 * batch * shape.parameters + 2.0 * shape.group * elements
    return flops, kv_bytes * elements + weight_bytes * shape.parameters


def fit_times(steps: Sequence[Step], terms: tuple[str, ...] = ("flops", "bytes")) -> TimeFit:
    """Least squares with rates of at least 0.

    Args:
        steps: two measurements per term at least. terms: ``("flops", "bytes")`` or one of them.

    Raises:
        ConfigError: other terms, too few steps, or steps that cannot tell the terms apart.
    """
    if not terms or not set(terms) <= {"flops", "bytes"} or len(set(terms)) != len(terms):
        raise ConfigError(f"terms is {terms!r}; expected 'flops', 'bytes' or both.")
    if len(steps) < 2 * len(terms):
        raise ConfigError(
            f"{len(steps)} steps for {len(terms)} terms; expected {2 * len(terms)} at least. Measure more."
        )
    columns = np.array([[getattr(s, t) for t in terms] for s in steps])
    times = np.array([s.seconds for s in steps])
    scale = columns.max(0)
    if (scale == 0).any() or np.linalg.matrix_rank(columns / np.where(scale == 0, 1, scale), tol=1e-6) < len(terms):
        raise ConfigError(
            f"the steps cannot tell {' and '.join(terms)} apart, which are proportional or zero in all of them. Vary the context or the model."
        )
    rates = np.linalg.lstsq(columns / scale, times, rcond=None)[0] / scale
    if (rates < 0).any():  # the constrained optimum then lies on the edge where that rate is zero
        return max((fit_times(steps, (t,)) for t in terms), key=lambda fit: fit.r2)
    found = dict(zip(terms, map(float, rates), strict=True))
    alpha, beta = found.get("flops", 0.0), found.get("bytes", 0.0)
    fit = TimeFit(alpha, beta, 0.0)
    return TimeFit(alpha, beta, r_squared(fit, steps))


def r_squared(fit: TimeFit, steps: Sequence[Step]) -> float:
    """Of the fit on these steps: 1 minus the squared error over the squared distance from their mean.

    Raises:
        ConfigError: times that do not differ.
    """
    times = np.array([s.seconds for s in steps])
    spread = float(((times - times.mean()) ** 2).sum())
    if spread == 0:
        raise ConfigError("all times are equal, so no share of their variance can be explained. Vary the context.")
    return 1.0 - float(((np.array([fit.predict(s) for s in steps]) - times) ** 2).sum()) / spread


def error(fit: TimeFit, steps: Sequence[Step]) -> float:
    """Mean of ``|predicted − measured| / measured``."""
    return float(np.mean([abs(fit.predict(s) - s.seconds) / s.seconds for s in steps]))
