"""Long additions and subtractions in words, for models that reason, and what an answer says."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..core.errors import ConfigError

ASK = "Work out {terms} step by step, one operation at a time. End with a line that says 'Answer: ' and the result."
_ANSWER = re.compile(r"answer[^\d-]{0,20}(-?[ $]?\d+(?:,\d{3})*)(?![\d.]*\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Sum:
    """A question and its result."""

    question: str
    answer: int

    def right(self, text: str) -> bool:
        """Whether the last thing that ``text`` calls its answer is the result."""
        plain = re.sub("[−–]", "-", text.replace("{,}", ","))
        found = _ANSWER.findall(plain)
        return bool(found) and int(re.sub("[, $]", "", found[-1])) == self.answer


def sums(count: int, terms: int, generator: torch.Generator, *, most: int = 999) -> list[Sum]:
    """Questions of ``terms`` numbers from 1 to ``most``, each added or subtracted.

    Raises:
        ConfigError: fewer than two terms, or ``most`` below 1.
    """
    if terms < 2 or most < 1:
        raise ConfigError(
            f"sums has terms={terms}, most={most}; expected at least 2 terms and a largest number from 1."
        )
    numbers = torch.randint(1, most + 1, (count, terms), generator=generator)
    signs = torch.randint(2, (count, terms), generator=generator) * 2 - 1
    signs[:, 0] = 1
    found = []
    for first, *rest in (numbers * signs).tolist():
        terms_told = "".join(f" {'+' if n > 0 else '-'} {abs(n)}" for n in rest)
        found.append(Sum(ASK.format(terms=f"{first}{terms_told}"), first + sum(rest)))
    return found
