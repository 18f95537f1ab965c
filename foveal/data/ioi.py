"""Indirect Object Identification: "…, Mary and John … John gave a book to" → Mary, built to a tokenizer.

Task of arXiv 2211.00593; pairs as in arXiv 2310.08744: the second mention of the subject becomes the indirect object, so that the
right answer flips (``corruption="swap"``), or three unrelated names stand everywhere (``"abc"``, the parent work's). Own sentences.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, DataError
from .pairs import Pair, PromptPairs, align, find, single_tokens
from .text import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = (
    "Adam", "Alan", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anthony", "Arthur", "Ben", "Brian", "Carl", "Charles", "Chris", "Claire",
    "Dan", "Daniel", "David", "Diana", "Edward", "Elizabeth", "Emily", "Emma", "Eric", "Eva", "Frank", "Fred", "George", "Grace",
    "Harry", "Helen", "Henry", "Ian", "Jack", "Jacob", "James", "Jane", "Jason", "Jean", "Jennifer", "Jim", "Joe", "John", "Jonathan",
    "Joseph", "Julia", "Justin", "Karen", "Kate", "Kevin", "Laura", "Lee", "Linda", "Lisa", "Lucy", "Luke", "Maria", "Mark", "Martin",
    "Mary", "Matthew", "Max", "Michael", "Michelle", "Nick", "Oliver", "Paul", "Peter", "Rachel", "Richard", "Robert", "Rose", "Ryan",
    "Sam", "Samuel", "Sarah", "Scott", "Simon", "Sophie", "Stephen", "Steven", "Susan", "Thomas", "Tim", "Tom", "Tony", "Victoria",
    "William",
)  # fmt: skip
PLACES = ("market", "school", "station", "garden", "library", "hospital", "beach", "theater")
OBJECTS = ("book", "ring", "drink", "flower", "letter", "camera", "ball", "key")
TEMPLATES = (
    "Yesterday{A} and{B} walked to the {place}.{S} handed a {object} to",
    "Then{A} and{B} met at the {place}, and{S} gave a {object} to",
    "While{A} and{B} were at the {place},{S} passed a {object} to",
    "After{A} and{B} left the {place},{S} sent a {object} to",
    "When{A} and{B} came home from the {place},{S} showed a {object} to",
    "Last week{A} and{B} worked at the {place}, where{S} offered a {object} to",
    "Once{A} and{B} had found the {place},{S} brought a {object} to",
    "Because{A} and{B} liked the {place},{S} bought a {object} for",
    "Friends of{A} and{B} said that at the {place}{S} gave a {object} to",
    "Before{A} and{B} went to the {place},{S} lent a {object} to",
    "This morning{A} and{B} waited near the {place}. Then{S} threw a {object} to",
    "At noon{A} and{B} talked in the {place}, and later{S} mailed a {object} to",
    "The day{A} and{B} saw the {place},{S} gave a {object} to",
    "Soon{A} and{B} stopped by the {place}, and{S} carried a {object} to",
    "As{A} and{B} ran to the {place},{S} tossed a {object} to",
)
CORRUPTIONS = ("swap", "abc")


def build(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0, corruption: str = "swap") -> PromptPairs:
    """Draw pairs; half in the order A B B A, half B A B A.

    Places: ``io``, ``s1``, ``s1+1``, ``s2``, ``end``.

    Args:
        tokenizer: the model's; names that are not one token of it are left out. count: pairs. seed: of the draw.
        corruption: ``"swap"`` or ``"abc"``.

    Raises:
        ConfigError: an unknown corruption or no pairs. DataError: a tokenizer without enough single-token names.
    """
    if corruption not in CORRUPTIONS or count < 1:
        raise ConfigError(
            f"corruption is {corruption!r} and count {count}; expected one of {CORRUPTIONS} and at least 1."
        )
    names = single_tokens(tokenizer, NAMES, 8, "names")
    places, objects = (single_tokens(tokenizer, words, 2, "nouns") for words in (PLACES, OBJECTS))
    draw = random.Random(seed)
    pairs = []
    for i in range(count):
        template, nouns = draw.choice(TEMPLATES), {"place": draw.choice(places), "object": draw.choice(objects)}
        io, subject, *others = draw.sample(names, 5)
        clean = _fill(template, (io, subject) if i % 2 else (subject, io), subject, nouns)
        corrupt = (
            _fill(template, (io, subject) if i % 2 else (subject, io), io, nouns)
            if corruption == "swap" else _fill(template, (others[0], others[1]), others[2], nouns)
        )  # fmt: skip
        pairs.append(_pair(tokenizer, clean, corrupt, io, subject))
    return align(tokenizer, "ioi", pairs, {"count": count, "seed": seed, "corruption": corruption, "bos": False})


def from_text(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> PromptPairs:
    """Pairs from prompts of your own, corrupted by ``"swap"``; each must name one of :data:`NAMES` twice and another once.

    Raises:
        DataError: a prompt without a repeated name, or without a second one: there is no subject to patch.
    """
    pairs = []
    for text in prompts:
        words = [word.strip(".,;:!?\"'") for word in text.split()]
        counts = {name: words.count(name) for name in NAMES if name in words}
        subjects, others = [n for n, c in counts.items() if c == 2], [n for n, c in counts.items() if c == 1]
        if len(subjects) != 1 or len(others) != 1:
            raise DataError(
                f"the prompt {text!r} names {counts or 'nobody'}; there is no subject to patch. Expected one name twice and another once, "
                "such as 'Then Mary and John met, and John gave a book to'."
            )
        head, _, tail = text.rpartition(subjects[0])
        pairs.append(_pair(tokenizer, text, head + others[0] + tail, others[0], subjects[0]))
    return align(tokenizer, "ioi", pairs, {"count": len(pairs), "corruption": "swap", "bos": False, "own": True})


def _fill(template: str, two: tuple[str, str], subject: str, nouns: dict[str, str]) -> str:
    return template.format(A=f" {two[0]}", B=f" {two[1]}", S=f" {subject}", **nouns)


def _pair(tokenizer: PreTrainedTokenizerBase, clean: str, corrupt: str, io: str, subject: str) -> Pair:
    ids = tokens(tokenizer, clean)
    own, other = (int(tokens(tokenizer, f" {name}")[0]) for name in (subject, io))
    s = find(ids, own, f"the subject {subject!r}")
    if len(s) != 2:
        raise DataError(
            f"the subject {subject!r} is {len(s)} times in {clean!r} as one token; expected two: put a space before it."
        )
    where = {"io": find(ids, other, f"the indirect object {io!r}")[:1], "s1": s[:1], "s1+1": [s[0] + 1], "s2": s[1:]}
    return Pair(clean, corrupt, f" {io}", f" {subject}", where, (f" {io}", f" {subject}"))
