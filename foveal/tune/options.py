"""What ``foveal tune`` was asked to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.errors import ConfigError, nearest
from ..core.serial import check_range, check_types
from .candidates import FURTHER

METHODS = ("greedy", "hylra", "flux")
"""How a policy is found, in the order in which they run; "all" is all of them."""


@dataclass(frozen=True)
class TuneOptions:
    """Options of one run.

    Attributes:
        model: ``smollm2``, a folder, a GGUF file, or a Hugging Face id.
        context: tokens at which everything is measured.
        text: file with the text, or None for the embedded one.
        out: folder for ``report.html``, ``results.json``, ``policy.json`` and the journal that makes a run resumable.
        max_ppl_increase: largest relative increase of perplexity that a policy may cost (0.01 is 1 %).
        dtype, device, impl: as in ``load_model`` and ``attach``.
        seed: chooses the text spans, the needles and the sampled rows.
        decode_tokens: tokens scored one by one through the cache.
        search: also search a policy layer by layer.
        method: how the policy of the search is found, ``"greedy"`` (options scored layer by layer, a knapsack) or ``"hylra"`` (layers
            that reuse an earlier layer's choice, planned from a profile), ``"flux"`` (routers that decide for each prompt, from
            ``router``), or ``"all"``: these side by side, flux where there is a router. What one run measured serves the others.
        router: file of trained routers (``foveal train flux``), for flux.
        search_texts: on how many disjoint pieces of the text, at most; the policy must stay inside the limit on each of them.
        trust_remote_code: let a checkpoint run code of its own.
        patterns: further patterns to measure in all layers, names of :data:`foveal.tune.candidates.FURTHER`; they take no part in the
            search. A run that was made without them goes on.
    """

    model: str
    context: int = 4096
    text: str | None = None
    out: str = "foveal-out"
    max_ppl_increase: float = 0.01
    dtype: str = "auto"
    device: str = "auto"
    impl: str = "auto"
    seed: int = 0
    decode_tokens: int = 256
    search: bool = True
    method: str = "greedy"
    search_texts: int = 2
    trust_remote_code: bool = False
    patterns: tuple[str, ...] = ()
    router: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "context", low=64)
        check_range(self, "seed", low=0)
        check_range(self, "decode_tokens", low=2)
        check_range(self, "search_texts", low=1)
        if self.method not in (*METHODS, "all"):
            raise ConfigError(f"method is {self.method!r}. {nearest(self.method, (*METHODS, 'all'))}")
        if self.method == "flux" and not self.router:
            raise ConfigError(
                "method 'flux' needs trained routers: pass --router FILE. Make them with `foveal train flux MODEL --out DIR`."
            )
        if self.router and "flux" not in self.methods:
            raise ConfigError(
                f"router is {self.router!r} with {'method ' + repr(self.method) if self.search else 'no search'}; expected method 'flux' or 'all'."
            )
        for name in self.patterns:
            if name not in FURTHER:
                raise ConfigError(f"patterns has {name!r}. {nearest(name, FURTHER)}")
        if not self.max_ppl_increase > 0:
            raise ConfigError(
                f"max_ppl_increase is {self.max_ppl_increase!r}; expected a value above 0, such as 0.01 for 1 %."
            )
        if self.decode_tokens > self.context // 2:
            raise ConfigError(f"decode_tokens is {self.decode_tokens} and context {self.context}; expected at most half of the context. Pass a longer --context.")  # fmt: skip

    @property
    def methods(self) -> tuple[str, ...]:
        """The searches that run, in order."""
        if not self.search:
            return ()
        if self.method != "all":
            return (self.method,)
        return tuple(m for m in METHODS if m != "flux" or self.router)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)

    def digest(self, **measured: str) -> str:
        """Identity of the measurements: a journal is resumed only when options, model and text are the same."""
        said = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("out", "max_ppl_increase", "search", "method", "patterns", "router")
        }
        return hashlib.sha256(json.dumps({**said, **measured}, sort_keys=True).encode()).hexdigest()
