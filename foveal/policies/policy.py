"""Which pattern in which layer and head, for prefill and for decoding; written to and read from JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, nearest
from ..patterns import Pattern
from ..patterns.dense import Dense

VERSION = 1


@dataclass(frozen=True)
class Rule:
    """What one layer does.

    Attributes:
        prefill: pattern for calls with more than one new token.
        decode: pattern for single new tokens; None means the same as ``prefill``.
        heads: ``(first, last, rule)`` triples, inclusive, that override this rule for some query heads.
    """

    prefill: Pattern = field(default_factory=Dense)
    decode: Pattern | None = None
    heads: tuple[tuple[int, int, Rule], ...] = ()

    def pattern(self, decoding: bool) -> Pattern:
        """The pattern for this call."""
        return self.decode if decoding and self.decode is not None else self.prefill

    def patterns(self) -> Iterator[Pattern]:
        """All patterns that the rule names, those of single heads too."""
        yield self.prefill
        if self.decode is not None:
            yield self.decode
        for _, _, rule in self.heads:
            yield from rule.patterns()

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"prefill": self.prefill.to_json()}
        if self.decode is not None:
            out["decode"] = self.decode.to_json()
        if self.heads:
            out["heads"] = {_span(a, b): rule.to_json() for a, b, rule in self.heads}
        return out

    @classmethod
    def from_json(cls, data: Any, where: str) -> Rule:
        if isinstance(data, Mapping) and "pattern" in data:
            return cls(Pattern.from_json(data, where))
        _known(data, ("prefill", "decode", "heads"), where)
        prefill = Pattern.from_json(data["prefill"], f"{where}.prefill") if "prefill" in data else Dense()
        decode = Pattern.from_json(data["decode"], f"{where}.decode") if data.get("decode") is not None else None
        heads = data.get("heads", {})
        if not isinstance(heads, Mapping):
            raise ConfigError(
                f'{where}.heads is {heads!r}; expected an object such as {{"0-3": {{"pattern": "dense"}}}}.'
            )
        spans = [(*_parse_span(s, f"{where}.heads"), s) for s in heads]
        rules = tuple((a, b, cls.from_json(heads[s], f"{where}.heads[{s}]")) for a, b, s in spans)
        _disjoint([(a, b) for a, b, _ in spans], f"{where}.heads")
        return cls(prefill, decode, rules)


@dataclass(frozen=True)
class ModelStamp:
    """What a policy was made for; checked when it is used.

    Attributes:
        architecture: class name of the model.
        layers: number of self-attention layers.
        sha256: digest of the weights' names, shapes and samples (``foveal.hf.fingerprint``); "" when unknown.
    """

    architecture: str = ""
    layers: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Policy:
    """A pattern for every layer.

    Attributes:
        default: rule for layers that have none of their own.
        layers: ``(layer, rule)`` pairs.
        name: shown in tables.
        model: what it was made for (empty: any model).
        dtype: dtype it was measured in, or "".
        context: ``(shortest, longest)`` context tested, or None.
    """

    default: Rule = field(default_factory=Rule)
    layers: tuple[tuple[int, Rule], ...] = ()
    name: str = ""
    model: ModelStamp | None = None
    dtype: str = ""
    context: tuple[int, int] | None = None

    @classmethod
    def uniform(cls, prefill: Pattern, decode: Pattern | None = None, name: str = "") -> Policy:
        """The same pattern in every layer."""
        return cls(Rule(prefill, decode), name=name or str(prefill))

    @classmethod
    def of(cls, policy: Policy | Pattern) -> Policy:
        """``policy`` itself, or the uniform policy of a pattern; raises :class:`ConfigError` for anything else."""
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, Pattern):
            return cls.uniform(policy)
        raise ConfigError(
            f"policy is a {type(policy).__name__}; expected a foveal.Policy or a Pattern such as SlidingWindow(window=1024)."
        )

    def rule(self, layer: int) -> Rule:
        """The rule of one layer."""
        return dict(self.layers).get(layer, self.default)

    def patterns(self) -> set[Pattern]:
        """All patterns that the policy names."""
        return {pattern for rule in (self.default, *(r for _, r in self.layers)) for pattern in rule.patterns()}

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"foveal_policy": VERSION, "name": self.name, "default": self.default.to_json()}
        out["layers"] = {_span(a, b): rule.to_json() for a, b, rule in _runs(self.layers)}
        if self.model is not None:
            out["model"] = {
                "architecture": self.model.architecture,
                "layers": self.model.layers,
                "sha256": self.model.sha256,
            }
        if self.dtype:
            out["dtype"] = self.dtype
        if self.context is not None:
            out["context"] = list(self.context)
        return out

    @classmethod
    def from_json(cls, data: Any, where: str = "policy") -> Policy:
        """Validate and build; raises :class:`ConfigError` naming field, value, expectation and the nearest known name."""
        _known(data, ("foveal_policy", "name", "default", "layers", "model", "dtype", "context"), where)
        version = data.get("foveal_policy")
        if version != VERSION:
            raise ConfigError(
                f"{where}.foveal_policy is {version!r}; this foveal reads version {VERSION}. Make the policy again with `foveal tune`."
            )
        layers = data.get("layers", {})
        if not isinstance(layers, Mapping):
            raise ConfigError(
                f'{where}.layers is {layers!r}; expected an object such as {{"0-11": {{"pattern": "dense"}}}}.'
            )
        spans = [(*_parse_span(s, f"{where}.layers"), s) for s in layers]
        _disjoint([(a, b) for a, b, _ in spans], f"{where}.layers")
        rules = []
        for a, b, s in spans:
            rule = Rule.from_json(layers[s], f"{where}.layers[{s}]")
            rules += [(i, rule) for i in range(a, b + 1)]
        default = Rule.from_json(data["default"], f"{where}.default") if "default" in data else Rule()
        for key in ("name", "dtype"):
            if not isinstance(data.get(key, ""), str):
                raise ConfigError(f"{where}.{key} is {data[key]!r}; expected a string.")
        return cls(default, tuple(sorted(rules, key=lambda r: r[0])), data.get("name", ""), _stamp(data.get("model"), where), data.get("dtype", ""), _context(data.get("context"), where))  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read and validate; raises :class:`ConfigError` naming the file."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"policy file {path} does not exist; make one with `foveal tune MODEL --out DIR`."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"policy file {path} cannot be read: {error}.") from None
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"policy file {path} is not JSON: {error}. Make it again with `foveal tune MODEL --out DIR`."
            ) from None
        return cls.from_json(_beside(data, path.parent), str(path))

    def check_fits(self, layers: int, architecture: str, sha256: str = "") -> None:
        """Raise :class:`ConfigError` when the policy was made for another model or names layers that are not there."""
        top = max((i for i, _ in self.layers), default=-1)
        if top >= layers:
            raise ConfigError(
                f"the policy names layer {top}, but the model has {layers} self-attention layers (0 to {layers - 1})."
            )
        stamp = self.model
        if stamp is None:
            return
        if stamp.layers and stamp.layers != layers:
            raise ConfigError(
                f"the policy was made for {stamp.layers} layers and this model has {layers}; run `foveal tune` on this model."
            )
        if stamp.architecture and stamp.architecture != architecture:
            raise ConfigError(
                f"the policy was made for {stamp.architecture} and this model is {architecture}; run `foveal tune` on this model."
            )
        if stamp.sha256 and sha256 and stamp.sha256 != sha256:
            raise ConfigError(
                f"the policy was made for weights {stamp.sha256[:12]} and this model's are {sha256[:12]}; run `foveal tune` on this model, "
                'or remove the policy\'s "model" entry to use it untested.'
            )


FILES = ("router", "predictor")
"""Fields of patterns that name a file."""


def _beside(data: Any, folder: Path) -> Any:
    """The JSON with names of files that lie beside the policy's own file made paths, so that the folder can be moved."""
    if isinstance(data, list):
        return [_beside(item, folder) for item in data]
    if not isinstance(data, Mapping):
        return data
    out = {key: _beside(item, folder) for key, item in data.items()}
    for name in FILES:
        found = folder / str(out.get(name) or ".")
        if isinstance(out.get(name), str) and found.is_file():
            out[name] = str(found)
    return out


def _known(data: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {data!r}; expected an object with the fields {', '.join(names)}.")
    for key in data:
        if key not in names:
            raise ConfigError(f"{where} has an unknown field {key!r}. {nearest(str(key), names)}")


def _span(a: int, b: int) -> str:
    return str(a) if a == b else f"{a}-{b}"


def _parse_span(text: str, where: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise ConfigError(f'{where} has the entry {text!r}; expected a number such as "3" or a span such as "3-7".')
    return int(first), int(last) if dash else int(first)


def _disjoint(spans: list[tuple[int, int]], where: str) -> None:
    ordered = sorted(spans)
    for (a, b), (c, d) in itertools.pairwise(ordered):
        if c <= b:
            raise ConfigError(
                f"{where} lists {_span(a, b)!r} and {_span(c, d)!r}, which overlap; give each index one rule."
            )


def _runs(layers: tuple[tuple[int, Rule], ...]) -> list[tuple[int, int, Rule]]:
    runs: list[tuple[int, int, Rule]] = []
    for i, rule in sorted(layers, key=lambda r: r[0]):
        if runs and runs[-1][1] == i - 1 and runs[-1][2] == rule:
            runs[-1] = (runs[-1][0], i, rule)
        else:
            runs.append((i, i, rule))
    return runs


def _stamp(data: Any, where: str) -> ModelStamp | None:
    if data is None:
        return None
    _known(data, ("architecture", "layers", "sha256"), f"{where}.model")
    for key, kind in (("architecture", str), ("layers", int), ("sha256", str)):
        if key in data and not isinstance(data[key], kind):
            raise ConfigError(f"{where}.model.{key} is {data[key]!r}; expected {kind.__name__}.")
    return ModelStamp(**data)


def _context(data: Any, where: str) -> tuple[int, int] | None:
    if data is None:
        return None
    if not (
        isinstance(data, list) and len(data) == 2 and all(isinstance(n, int) for n in data) and 0 < data[0] <= data[1]
    ):
        raise ConfigError(f"{where}.context is {data!r}; expected two lengths such as [4096, 4096].")
    return data[0], data[1]
