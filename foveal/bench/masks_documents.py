"""Static families over packed documents, whose lengths ``docs`` sum to T; forms and tests as in ``masks_static``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .documents import sample_documents, starts
from .masks import Draw, Plain, family
from .masks_static import Static, triangle


@dataclass(frozen=True)
class Packed(Static):
    """A family over packed documents, whose lengths sum to T."""

    random = True
    docs: tuple[int, ...]

    @cached_property
    def doc(self) -> Tensor:
        """``(T,)`` document number of every token."""
        return torch.repeat_interleave(torch.arange(len(self.docs)), torch.tensor(self.docs))

    @cached_property
    def start(self) -> Tensor:
        """``(T,)`` where every token's document begins."""
        return starts(self.docs)[self.doc]

    @cached_property
    def end(self) -> Tensor:
        """``(T,)`` where every token's document ends."""
        return starts(self.docs)[self.doc + 1]

    def same(self, i: Tensor, j: Tensor) -> Tensor:
        return self.doc[i] == self.doc[j]

    def causal_area(self) -> int:
        return sum(map(triangle, self.docs))

    def facts(self) -> dict[str, Any]:
        return {"documents": len(self.docs), "longest_document": max(self.docs)}


def _documents(draw: Draw, documents: str) -> tuple[int, ...]:
    return sample_documents(documents, draw.length, draw.make)


@family(5, "full_document", "FD")
@dataclass(frozen=True)
class FullDocument(Packed):
    @classmethod
    def draw(cls, draw: Draw, *, documents: str = "auto") -> FullDocument:
        return cls(draw.length, _documents(draw, documents))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return self.same(i, j)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return self.start, self.end

    def area(self) -> int:
        return sum(n * n for n in self.docs)

    def plain(self) -> Plain:
        return Plain(causal=False, documents=self.docs)


@family(6, "causal_document", "CD")
@dataclass(frozen=True)
class CausalDocument(Packed):
    @classmethod
    def draw(cls, draw: Draw, *, documents: str = "auto") -> CausalDocument:
        return cls(draw.length, _documents(draw, documents))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return self.same(i, j) & (j <= i)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return self.start, i + 1

    def area(self) -> int:
        return self.causal_area()

    def plain(self) -> Plain:
        return Plain(causal=True, documents=self.docs)


@family(7, "share_question", "SQ")
@dataclass(frozen=True)
class ShareQuestion(Packed):
    """The first document is a question that every other document (an answer) also sees."""

    @classmethod
    def draw(cls, draw: Draw, *, documents: str = "auto") -> ShareQuestion:
        return cls(draw.length, _documents(draw, documents))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return (self.same(i, j) & (j <= i)) | ((self.doc[j] == 0) & (self.doc[i] > 0))

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return self.start, i + 1

    def head(self, i: Tensor) -> Tensor:
        return torch.where(self.doc > 0, self.docs[0], 0)

    def area(self) -> int:
        return self.causal_area() + self.docs[0] * (self.length - self.docs[0])


@family(8, "causal_blockwise", "CB")
@dataclass(frozen=True)
class CausalBlockwise(Packed):
    """The last document (a test example) sees every document before it."""

    @classmethod
    def draw(cls, draw: Draw, *, documents: str = "auto") -> CausalBlockwise:
        return cls(draw.length, _documents(draw, documents))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        last = len(self.docs) - 1
        return (self.same(i, j) & (j <= i)) | ((self.doc[i] == last) & (self.doc[j] < last))

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(self.doc == len(self.docs) - 1, 0, self.start), i + 1

    def area(self) -> int:
        return self.causal_area() + self.docs[-1] * (self.length - self.docs[-1])


@family(10, "prefix_lm_document", "PLD")
@dataclass(frozen=True)
class PrefixDocument(Packed):
    """The same inside every document, with one prefix for all."""

    prefix: int

    @classmethod
    def draw(cls, draw: Draw, *, documents: str = "auto", prefix: int = 0) -> PrefixDocument:
        """``prefix`` 0: uniform from 1 to the length of the first document."""
        docs = _documents(draw, documents)
        return cls(draw.length, docs, prefix or draw.number(1, docs[0]))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return self.same(i, j) & ((j <= i) | (j - self.start[j] < self.prefix))

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return self.start, torch.maximum(i + 1, torch.minimum(self.start + self.prefix, self.end))

    def area(self) -> int:
        return self.causal_area() + sum(m * (m - 1) // 2 for m in (min(self.prefix, n) for n in self.docs))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "prefix": self.prefix}


@family(12, "block_causal_document", "BCD")
@dataclass(frozen=True)
class BlockCausalDocument(Packed):
    """Causal between blocks of ``block`` tokens, all inside one document; documents are whole blocks."""

    block: int

    @classmethod
    def draw(cls, draw: Draw, *, block: int = 1024) -> BlockCausalDocument:
        """Documents of 1 to 8 blocks; raises :class:`ConfigError` where T is no multiple of ``block``."""
        if draw.length % block:
            raise ConfigError(
                f"mask block_causal_document has blocks of {block} tokens and the length is {draw.length}; expected a multiple. "
                "Use another length or block_causal_document:block=…."
            )
        left, docs = draw.length // block, []
        while left:
            docs.append(min(draw.number(1, 8), left))
            left -= docs[-1]
        return cls(draw.length, tuple(n * block for n in docs), block)

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return self.same(i, j) & (j < (torch.div(i, self.block, rounding_mode="floor") + 1) * self.block)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return self.start, (torch.div(i, self.block, rounding_mode="floor") + 1) * self.block

    def area(self) -> int:
        return sum(self.block**2 * triangle(n // self.block) for n in self.docs)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "block": self.block}
