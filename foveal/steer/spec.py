"""Interventions in words: ``scale 3.5=0``, ``knockout Paris``, ``context 0.5``, ``var auto=0.6``, ``vhr 2``; what they act on, then how much.

A file holds a JSON list of objects, one intervention each, in the order in which they act: ``{"knockout": "Paris=0.5", "layers": "0-3"}``.
Further keys are fields of the intervention's class.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import ConfigError, DataError, nearest
from ..hf import families
from ..hf.vision import image_tokens
from .context import ContextSteering
from .heads import HeadScale, head_count
from .keys import Knockout
from .request import Request, numbers
from .sinks import ENERGY, SINK_DIMS, find_sink_dims
from .var import VAR
from .vhr import VHR

if TYPE_CHECKING:
    from ..hf.interventions import Intervention

CLASSES: dict[str, type] = {
    "scale": HeadScale,
    "knockout": Knockout,
    "context": ContextSteering,
    "var": VAR,
    "vhr": VHR,
}
_GIVEN = {
    "heads",
    "factor",
    "keys",
    "user",
    "alpha",
    "profile",
    "dims",
    "sinks",
    "transfer",
    "fixed_heads",
    "processor",
    "wrappers",
}
"""Fields that the words themselves give, or that JSON cannot hold."""
_SPANS = {"spare", "exclude"}


@dataclass(frozen=True)
class Spec:
    """One intervention in words, checked as far as that goes without a model.

    Attributes:
        kind: a key of ``CLASSES``. target: what it acts on. amount: how much, or None for the default. options: further fields.
    """

    kind: str
    target: str
    amount: float | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, kind: str, words: str, options: Mapping[str, Any] | None = None) -> Spec:
        """Read ``words``.

        Raises:
            ConfigError: an unknown kind or option, or a number that is none; naming what was expected.
        """
        if kind not in CLASSES:
            raise ConfigError(f"{kind!r} is no intervention. {nearest(kind, CLASSES)}")
        target, equals, amount = words.rpartition("=")
        if not equals and kind in ("context", "vhr") and _number(words) is not None:
            target, amount, equals = "", words, "="
        elif not equals:
            target, amount = words, ""
        value = _number(amount)
        if equals and value is None:
            raise ConfigError(f"{kind} {words!r}: what follows = is {amount!r}; expected a number. {_EXAMPLES[kind]}")
        target = target.strip()
        if (not target and kind in ("scale", "knockout", "var")) or (target and kind == "vhr"):
            raise ConfigError(f"{kind} {words!r} cannot be read. {_EXAMPLES[kind]}")
        if kind == "context" and value is None:
            raise ConfigError(f"context {words!r} has no α. {_EXAMPLES[kind]}")
        if kind == "scale":
            _heads(target, None)
        return cls(kind, target, value, _checked(kind, options or {}))

    def build(self, model: nn.Module, request: Request) -> Intervention:
        """The intervention for a model and a prompt.

        Raises:
            ConfigError: heads, tokens or sink dimensions that do not exist, or a number out of range.
        """
        options: dict[str, Any] = dict(self.options)
        for name in _SPANS & options.keys():
            options[name] = request.span(options[name])
        return _BUILDERS[self.kind](self, model, request, options)


def read_specs(path: Path) -> list[Spec]:
    """Interventions of a JSON file, in order.

    Raises:
        DataError: it cannot be read. ConfigError: an entry that is no intervention.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f'{path} does not exist; expected a JSON list such as [{{"scale": "3.5=0"}}].') from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON: {error}.") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{path} holds no list of interventions; expected JSON such as [{{"scale": "3.5=0"}}].')
    found = []
    for number, entry in enumerate(entries):
        kinds = [key for key in entry if key in CLASSES] if isinstance(entry, dict) else []
        if len(kinds) != 1:
            raise ConfigError(f"{path}, entry {number}: {json.dumps(entry)} names {len(kinds)} interventions; expected one key of {', '.join(CLASSES)}.")  # fmt: skip
        words = entry[kinds[0]]
        rest = {k: v for k, v in entry.items() if k != kinds[0]}
        found.append(Spec.parse(kinds[0], words if isinstance(words, str) else json.dumps(words), rest))
    return found


_EXAMPLES = {
    "scale": "Write LAYER.HEAD=FACTOR, such as 3.5=0, 3.0-4,7.1=0.5, or 3=0 for the whole layer.",
    "knockout": "Write TOKENS or TOKENS=FACTOR, such as 4-9, image, or Paris=0.5.",
    "context": "Write α, such as 0.5, or TOKENS=α, such as 'the passage=0.5'; α is above 0 and at most 1.",
    "var": f"Write SINKS or SINKS=TRANSFER: auto, dims:5,11, positions, or one of {', '.join(SINK_DIMS)}.",
    "vhr": "Write α, such as 2.",
}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _checked(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are fields of the class and have its types."""
    known = {f.name: f for f in dataclasses.fields(CLASSES[kind]) if f.name not in _GIVEN}
    out: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{kind} has no option {name!r}. {nearest(name, known)}")
        default = known[name].default
        if name == "layers":
            out[name] = numbers(value) if isinstance(value, str) else value
            good = isinstance(out[name], list) and all(type(n) is int for n in out[name])
        elif name in _SPANS:
            out[name], good = value, isinstance(value, str)
        elif isinstance(default, (bool, str)):
            out[name], good = value, isinstance(value, type(default))
        else:
            out[name], good = value, type(value) in (int, float) and math.isfinite(value)
        if not good:
            like = '"0-3" or [0, 1]' if name == "layers" else '"image"' if name in _SPANS else json.dumps(default)
            raise ConfigError(f"{kind}: {name} is {json.dumps(value)}; expected a value like {like}.")
    return out


def _heads(target: str, counts: Mapping[int, int] | None) -> dict[int, list[int]]:
    """``3.0-4,7`` → layer → heads; without ``counts`` only the form is checked."""
    out: dict[int, list[int]] = {}
    for part in target.split(","):
        layers, dot, heads = part.strip().partition(".")
        try:
            chosen = numbers(heads) if dot else None
            for layer in numbers(layers):
                every = list(
                    range(max(1, (counts or {}).get(layer, 1)))
                )  # a missing layer is named when it is attached
                out.setdefault(layer, []).extend(every if chosen is None else chosen)
        except ConfigError:
            raise ConfigError(f"scale {target!r}: {part.strip()!r} names no heads. {_EXAMPLES['scale']}") from None
    return out


def _scale(spec: Spec, model: nn.Module, request: Request, options: dict[str, Any]) -> HeadScale:
    counts = {site.index: head_count(site) for site in families.sites(model) if site.index >= 0}
    return HeadScale(_heads(spec.target, counts), 0.0 if spec.amount is None else spec.amount, **options)


def _knockout(spec: Spec, model: nn.Module, request: Request, options: dict[str, Any]) -> Knockout:
    return Knockout(request.span(spec.target), 0.0 if spec.amount is None else spec.amount, **options)


def _context(spec: Spec, model: nn.Module, request: Request, options: dict[str, Any]) -> ContextSteering:
    assert spec.amount is not None
    return ContextSteering(request.span(spec.target or "user"), spec.amount, **options)


def _var(spec: Spec, model: nn.Module, request: Request, options: dict[str, Any]) -> VAR:
    image_tokens(model)  # a model without any is refused before its sinks are looked for
    if spec.amount is not None:
        options["transfer"] = spec.amount
    word, _, rest = spec.target.partition(":")
    if spec.target == "auto":
        options = {"tau": ENERGY, "tau_mode": "energy", **options}
        dims = find_sink_dims(model, [{**request.inputs}], tau=options["tau"], tau_mode=options["tau_mode"])
        if not dims:
            raise ConfigError(
                f"var auto: {type(model).__name__} has no massive dimensions at its first token, so there are no sinks to take from; "
                "name dims or positions instead, such as dims:5,11."
            )
        return VAR(dims=dims, **options)
    if word == "dims" and rest:
        return VAR(dims=tuple(numbers(rest)), **options)
    if spec.target in SINK_DIMS:
        return VAR(profile=spec.target, **options)
    try:
        sinks = request.span(spec.target)
    except ConfigError as error:
        raise ConfigError(f"var {spec.target!r}: {error} {_EXAMPLES['var']}") from None
    return VAR(sinks=sinks, **options)


def _vhr(spec: Spec, model: nn.Module, request: Request, options: dict[str, Any]) -> VHR:
    if spec.amount is not None:
        options["alpha"] = spec.amount
    return VHR(**options)


_BUILDERS: dict[str, Callable[[Spec, nn.Module, Request, dict[str, Any]], Any]] = {
    "scale": _scale, "knockout": _knockout, "context": _context, "var": _var, "vhr": _vhr,
}  # fmt: skip


def build_all(specs: Sequence[Spec], model: nn.Module, request: Request) -> list[Intervention]:
    """All of them, in order."""
    return [spec.build(model, request) for spec in specs]
