"""Methods are found by their file; names are unique; unknown names get a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveal import patterns
from foveal.core import registry
from foveal.core.errors import ConfigError
from foveal.patterns import Pattern


def test_every_registered_file_is_found() -> None:
    folder = Path(patterns.__file__).parent
    files = {f.stem for f in folder.glob("*.py") if '\n@register("pattern"' in f.read_text(encoding="utf-8")}
    assert {cls.__module__.rpartition(".")[2] for cls in patterns.names().values()} == files


def test_names_and_classes_agree() -> None:
    for name, cls in patterns.names().items():
        assert issubclass(cls, Pattern)
        assert cls.registered_name == name
        assert getattr(patterns, cls.__name__) is cls
        assert registry.lookup("pattern", name) is cls


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"layer 3: unknown pattern 'sliding_windw'. Did you mean 'sliding_window'?"):
        registry.lookup("pattern", "sliding_windw", "layer 3")
    with pytest.raises(AttributeError, match="no attribute 'SlidingWindw'"):
        _ = patterns.SlidingWindw  # type: ignore[attr-defined]


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(ConfigError, match=r"pattern 'dense' is registered twice.*rename"):
        registry.register("pattern", "dense")(type("Other", (), {}))
    assert patterns.names()["dense"].__name__ == "Dense"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("dense", r"pattern is 'dense'; expected an object such as"),
        ({"window": 3}, r"expected an object such as \{\"pattern\": \"sliding_window\""),
        ({"pattern": "dens"}, "unknown pattern 'dens'. Did you mean 'dense'?"),
        (
            {"pattern": "sliding_window", "windw": 3},
            r"pattern \(sliding_window\) has an unknown field 'windw'. Did you mean 'window'?",
        ),
        ({"pattern": "sliding_window"}, "lacks the required field 'window'"),
    ],
    ids=str,
)
def test_wrong_pattern_json(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pattern.from_json(data)


def test_a_subclass_reads_only_its_own() -> None:
    with pytest.raises(ConfigError, match="is the pattern 'dense'; expected a SlidingWindow"):
        patterns.SlidingWindow.from_json({"pattern": "dense"})
