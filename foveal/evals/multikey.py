"""Multi-key retrieval in RULER's manner (arXiv 2404.06654, section 3): many facts of one form, one of them asked for.

Keys are an adjective and a noun, values numbers, all in sentences of the same form; the wrong answers are the values of other keys
in the same context. So it is not enough to have seen a number: it must be tied to its key.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import register
from .base import Material, Passage, Quiz, Task
from .haystack import Fact, Wanted, codes, hide, sample

ADJECTIVES = ("silver", "wooden", "quiet", "bright", "ancient", "gentle", "hollow", "purple", "rapid", "frozen", "golden", "narrow")  # fmt: skip
NOUNS = ("anchor", "basket", "candle", "ladder", "engine", "garden", "hammer", "island", "jacket", "kettle", "lantern", "mirror")  # fmt: skip
KEYS, ASKED, OTHERS = (4, 16, 64), 4, 3
TOKENS_PER_KEY = 24
"""What a fact may take: so many keys are hidden that they fill at most half of the context."""


@register("task", "multikey")
@dataclass(frozen=True)
class MultiKey(Task):
    """4, 16 and 64 keys in a context, as far as it has room; four of them asked for."""

    title = "Multi-key retrieval"
    about = (
        "Many numbered things in sentences of one form, as in RULER; the wrong answers are the numbers of the others."
    )
    axes = ("keys", "depth")
    order = 3

    def items(self, material: Material) -> list[Passage | Quiz]:
        room = material.context // (2 * TOKENS_PER_KEY)
        counts = [k for k in KEYS if k <= room] or [KEYS[0]]
        return [_quiz(material, keys, trial) for keys in counts for trial in range(material.trials)]


def _quiz(material: Material, keys: int, trial: int) -> Quiz:
    key = f"multikey.{keys}.{trial}"
    g = material.generator(key)
    names = [f"the {ADJECTIVES[i % len(ADJECTIVES)]} {NOUNS[i // len(ADJECTIVES)]}" for i in sample(keys, len(ADJECTIVES) * len(NOUNS), g)]  # fmt: skip
    numbers = codes(keys, g)
    facts = [
        Fact(f"The number of {name} is {number}.", (i + 0.5) / keys)
        for i, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    wanted = []
    for part in range(ASKED):  # one key of every quarter of the context
        low, high = part * keys // ASKED, (part + 1) * keys // ASKED
        i = low + sample(1, high - low, g)[0]
        wrong = [j for j in sample(keys, keys, g) if j != i][:OTHERS]
        at = {"keys": keys, "depth": (part + 0.5) / ASKED}
        wanted.append(
            Wanted(
                f"What is the number of {names[i]}?",
                f"The number of {names[i]} is",
                numbers[i],
                tuple(numbers[j] for j in wrong),
                at,
            )
        )
    return hide(material, key, material.context, facts, wanted, g)
