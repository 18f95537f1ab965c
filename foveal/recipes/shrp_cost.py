"""What SHRP saves, counted: multiply-adds and parameters of an encoder before and after (arXiv 2512.20635, abstract).

Per token, a full layer costs ``4D² + 2DF + 2ND`` multiply-adds and a pruned one ``3Dd + 2Nd + h(d + D)``; embeddings, pooler and
head are left out unless said. Biases and norms count as parameters, not as multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """An encoder; the defaults are BERT-base's. ``expander`` is the hidden width h, 0 for a linear expander.

    Raises:
        ConfigError: heads that do not divide ``dim``.
    """

    layers: int = 12
    dim: int = 768
    num_heads: int = 12
    ffn: int = 3072
    expander: int = 96
    embeddings: int = 23_837_184
    """Parameters outside the encoder's layers; the default is BERT-base's tables and norm, without a pooler."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(
                f"Shape has dim={self.dim} and num_heads={self.num_heads}; expected heads that divide dim."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def full_macs(self, tokens: int) -> int:
        """Per token of a sequence of ``tokens``, one original layer."""
        return 4 * self.dim**2 + 2 * self.dim * self.ffn + 2 * tokens * self.dim

    def pruned_macs(self, tokens: int, router: bool = False) -> int:
        """Per token, one converted layer with one head; ``router`` counts it too."""
        d, expander = self.head_dim, self._expander_macs()
        return 3 * self.dim * d + 2 * tokens * d + expander + (self.dim * self.num_heads if router else 0)

    def _expander_macs(self) -> int:
        d, h = self.head_dim, self.expander
        return h * (d + self.dim) if h else d * self.dim

    def full_parameters(self) -> int:
        """Of one original layer: four projections, two feed-forward maps, two norms."""
        return 4 * (self.dim**2 + self.dim) + 2 * self.dim * self.ffn + self.ffn + self.dim + 4 * self.dim

    def pruned_parameters(self) -> int:
        """Of one pruned layer: three projections of one head, the expander, one norm."""
        d, h = self.head_dim, self.expander
        expander = d * h + h + h * self.dim + self.dim if h else d * self.dim + self.dim
        return 3 * (self.dim * d + d) + expander + 2 * self.dim

    def macs_left(self, converted: int, tokens: int) -> float:
        """Share of the encoder's multiply-adds that remain with ``converted`` layers pruned."""
        self._check(converted)
        ratio = self.pruned_macs(tokens) / self.full_macs(tokens)
        return (self.layers - converted + converted * ratio) / self.layers

    def parameters_cut(self, converted: int, embeddings: bool = False) -> float:
        """Share of the parameters that goes: of the encoder's layers, or with ``embeddings`` of the whole model."""
        self._check(converted)
        total = self.layers * self.full_parameters() + (self.embeddings if embeddings else 0)
        return converted * (self.full_parameters() - self.pruned_parameters()) / total

    def _check(self, converted: int) -> None:
        if not 0 <= converted <= self.layers:
            raise ConfigError(f"converted is {converted}; expected 0 to {self.layers} layers.")
