"""Sums in words: the result is that of the terms, and an answer is the last one that a text gives."""

from __future__ import annotations

import re

import pytest
import torch

from foveal.core.errors import ConfigError
from foveal.data.sums import Sum, sums


def test_results_are_those_of_the_terms() -> None:
    made = sums(40, 7, torch.Generator().manual_seed(0), most=99)
    for one in made:
        terms = re.findall(r"(?:[+-] )?\b\d+\b", one.question.partition(" step by step")[0])
        values = [int(term.replace(" ", "")) for term in terms]
        assert len(values) == 7 and values[0] > 0 and all(1 <= abs(v) <= 99 for v in values)
        assert sum(values) == one.answer
    assert {v < 0 for one in made for v in [one.answer]} == {True, False}
    assert (
        made
        == sums(40, 7, torch.Generator().manual_seed(0), most=99)
        != sums(40, 7, torch.Generator().manual_seed(1), most=99)
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("12 + 5 = 17\nAnswer: 1,217", True),
        ("Answer: 3. No: **Answer:** 1217", True),
        ("The answer is \\boxed{1217}.", True),
        ("Answer: 1217\nAnswer: 1218", False),
        ("Answer: -1217", False),
        ("Answer: 12170", False),
        ("Answer: $1{,}217$", True),
        ("Answer: 1217.", True),
        ("Answer: 1217.5", False),
        ("1217", False),
        ("", False),
    ],
)
def test_the_last_answer_counts(text: str, right: bool) -> None:
    assert Sum("?", 1217).right(text) == right


@pytest.mark.parametrize("sign", ["-", "−", "–", "- "])
def test_results_may_be_negative(sign: str) -> None:
    assert Sum("?", -5).right(f"Answer: {sign}5") and not Sum("?", 5).right(f"Answer: {sign}5")


def test_sizes_out_of_range_are_named() -> None:
    for wrong in ({"terms": 1}, {"terms": 2, "most": 0}):
        with pytest.raises(ConfigError, match=next(f"{k}={v}" for k, v in reversed(wrong.items()))):
            sums(1, generator=torch.Generator(), **wrong)
