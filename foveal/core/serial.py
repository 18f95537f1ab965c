"""JSON round trip of frozen dataclasses, with strict and teaching validation.

Everything that foveal writes as configuration (patterns, budgets, policies) is a frozen dataclass. ``to_json`` gives plain
values; ``from_json`` refuses unknown fields (naming the nearest known one), wrong types and values out of range.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError, nearest

T = TypeVar("T")


_known: dict[type[Any], dict[str, Any]] = {}


def _hints(cls: type[Any]) -> dict[str, Any]:
    """The declared types of a class's fields; reading them takes longer than checking them."""
    if cls not in _known:
        _known[cls] = get_type_hints(cls)
    return _known[cls]


def to_json(value: Any) -> Any:
    """Turn a dataclass instance into JSON values, leaving out fields that hold their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if f.default is not dataclasses.MISSING and type(item) is type(f.default) and item == f.default:
                continue
            out[f.name] = item.to_json() if hasattr(item, "to_json") else to_json(item)
        return out
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def from_json(cls: type[T], data: Any, where: str = "") -> T:
    """Build ``cls`` (a dataclass) from JSON values.

    Raises :class:`ConfigError` naming the field (as ``where.field``), what was received, what was expected, and the
    nearest known name when a field is unknown.
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {data!r}; expected an object with the fields of {cls.__name__}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = _hints(cls)
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where} has an unknown field {key!r}. {nearest(key, fields)}")
    kwargs = {k: _coerce(v, hints[k], f"{where}.{k}") for k, v in data.items()}
    missing = [
        n
        for n, f in fields.items()
        if n not in kwargs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{where} lacks the required field {missing[0]!r}; add it, for example {_example(cls, missing[0])}."
        )
    return cls(**kwargs)


def check_types(instance: Any) -> None:
    """Call from ``__post_init__``: raise :class:`ConfigError` when a field holds a value of another type than declared."""
    cls = type(instance)
    hints = _hints(cls)
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        fixed = _coerce(value, hints[f.name], f"{cls.__name__}.{f.name}")
        if fixed is not value:
            object.__setattr__(instance, f.name, fixed)


def check_range(instance: Any, name: str, low: float | None = None, high: float | None = None) -> None:
    """Raise :class:`ConfigError` unless ``low <= instance.<name> <= high`` (``None`` leaves a side open or skips ``None`` values)."""
    value = getattr(instance, name)
    if value is None:
        return
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise ConfigError(f"{type(instance).__name__}.{name} is {value!r}; expected a value {span}.")


def at_least(name: str, value: int, low: int, owner: object) -> int:
    """``value`` if it is an integer from ``low`` on; raises :class:`ConfigError` naming the owner's class."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; expected an integer of at least {low}.")
    return value


def check_sizes(owner: object, low: int = 1, **sizes: int | None) -> None:
    """:func:`at_least` for several values; None is skipped."""
    for name, size in sizes.items():
        if size is not None:
            at_least(name, size, low, owner)


def _example(cls: type, name: str) -> str:
    return f'"{name}": {_hints(cls)[name]}'.replace("<class '", "").replace("'>", "")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors: list[ConfigError] = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(value, option, where)
            except ConfigError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise ConfigError(f"{where} is {value!r}; expected {_pretty(hint)}.")
    if origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, args))}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {value!r}; expected a list.")
        items = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(items) != len(value):
            raise ConfigError(f"{where} has {len(value)} entries; expected {len(items)}.")
        fixed = tuple(_coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, items, strict=True)))
        return value if isinstance(value, tuple) and all(a is b for a, b in zip(fixed, value, strict=True)) else fixed
    if origin in (dict, Mapping) or origin is not None:
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        builder = getattr(hint, "from_json", None)
        return builder(value, where) if builder else from_json(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if isinstance(value, float) else float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint in (int, float):
            raise ConfigError(f"{where} is {value!r}; expected {_pretty(hint)}.")
        return value
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {_pretty(hint)}.")


def _pretty(hint: Any) -> str:
    if isinstance(hint, type):
        return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}.get(
            hint.__name__, hint.__name__
        )
    args = get_args(hint)
    if args:
        return " or ".join("null" if a is type(None) else _pretty(a) for a in args)
    return str(hint)
