"""What a pattern is told."""

from __future__ import annotations

import dataclasses

import pytest

from ..support import Host, context


def test_decoding_is_one_query_against_a_cache() -> None:
    assert context(Host(1, 9)).decoding
    assert not context(Host(2, 9)).decoding
    assert not context(Host(1, 1)).decoding


def test_a_context_is_fixed_and_its_defaults_are_neutral() -> None:
    told = context(Host(4, 9))
    assert (told.role, told.q_offset, told.scale, told.layer_index, told.num_layers) == ("self", 0, None, 0, 1)
    assert dict(told.earlier) == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.q_offset = 1  # type: ignore[misc]
