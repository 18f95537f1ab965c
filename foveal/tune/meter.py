"""Run a model once under a policy and measure: time, memory, loss, distance to dense, retrieval, density."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bench.memory import PeakMemory
from ..core.density import Density, measure
from ..core.errors import ModelError
from ..data.needle import Needles, retrieve
from ..hf import AttentionEvent, attach
from ..hf.growing import growing_cache
from ..hf.handle import Handle
from ..kernels.dispatch import explain
from ..policies.policy import Policy

LOGIT_BYTES = 2 << 30
"""Logits kept at once in a quality pass; longer contexts score as many of the last tokens as fit."""


@dataclass(frozen=True)
class Quality:
    """One teacher-forced pass.

    Attributes:
        seconds: time of the prefill without the head. nll: ``(S,)`` loss of the last S tokens, nats.
        kl: mean KL(dense ‖ policy) over the reference rows, nats; 0 when there is no reference.
        density: what the policy kept, over all layers.
    """

    seconds: float
    nll: Tensor
    kl: float
    density: Density


@dataclass(frozen=True)
class Decoding:
    """Prefill, then token by token through the cache: seconds of each, ``(T,)`` loss, peak extra MiB of the prefill, which
    needles were found afterwards, density of the last step."""

    prefill_seconds: float
    step_seconds: float
    nll: Tensor
    peak_mb: float
    hits: tuple[bool, ...]
    density: Density


class Meter:
    """Measures one model on given tokens; ``policy=None`` is the model's own attention.

    Args:
        model: a causal language model in eval mode.
        impl: kernel implementation for policies.
    """

    def __init__(self, model: Any, impl: str = "auto") -> None:
        self.model, self.impl = model, impl
        self.device = next(model.parameters()).device
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def dense_kernel(self, length: int) -> str:
        """The implementation that computes dense causal self-attention over ``length`` tokens of this model."""
        if self.impl != "auto":
            return self.impl
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        q, k = (torch.empty(1, n, length, dim, dtype=self.model.dtype, device=self.device) for n in (heads, kv_heads))
        return explain(q, k, k, causal=True).impl

    @contextlib.contextmanager
    def under(self, policy: Policy | None, probes: tuple[Any, ...] = ()) -> Iterator[Handle | None]:
        """The model with ``policy`` attached, in inference mode."""
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            handle = None
            if policy is not None:
                handle = stack.enter_context(attach(self.model, policy, impl=self.impl, probes=probes))
            yield handle

    def forward(self, ids: Tensor, keep: int, **kwargs: Any) -> tuple[Any, float]:
        """A forward that keeps the last ``keep`` logits (0: all), and the seconds until its hidden states stood."""
        base = self.model.base_model
        marks: dict[str, float] = {}
        hooks = []
        if base is not self.model:
            hooks = [
                base.register_forward_pre_hook(lambda *_: marks.__setitem__("start", self._now())),
                base.register_forward_hook(lambda *_: marks.__setitem__("end", self._now())),
            ]
        try:
            start = self._now()
            extra = {"logits_to_keep": keep} if self.keeps else {}
            out = self.model(input_ids=ids.to(self.device), **extra, **kwargs)
            end = self._now()
        finally:
            for hook in hooks:
                hook.remove()
        return out, marks.get("end", end) - marks.get("start", start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def scored(self, length: int) -> int:
        """How many of the last tokens of a text of this length a quality pass scores: those with at least half of it behind them."""
        return max(1, min(length // 2, LOGIT_BYTES // (4 * self.vocabulary)))

    def quality(
        self, ids: Tensor, policy: Policy | None, reference: DenseLogits | None = None, what: str = "the model"
    ) -> Quality:
        """Teacher-forced loss over ``ids`` ``(1, N)``, and the KL to ``reference`` where it is given.

        Raises:
            ModelError: when a logit is not finite.
        """
        seen = Kept()
        count = self.scored(ids.shape[1])
        with self.under(policy, (seen,)):
            out, seconds = self.forward(ids, count + 1, use_cache=False)
            logits = out.logits[0, -count - 1 :]
            nll = losses(logits[:-1], ids[0, -count:].to(self.device), what)
            kl = reference.kl(logits) if reference is not None else 0.0
            if reference is not None and not reference.filled:
                reference.fill(logits)
        return Quality(seconds, nll, kl, seen.total())

    def decoding(self, needles: Needles, tail: int, policy: Policy | None, what: str = "the model") -> Decoding:
        """Prefill all but the last ``tail`` tokens of the needles' context, score these one at a time through the cache, then
        ask the questions from the same cache. A policy decodes through the cache of ``foveal run``, the model's own attention
        through transformers' default one."""
        ids = needles.context[None]
        split = ids.shape[1] - tail
        held = None if policy is None else growing_cache(self.model)
        seen = Kept()
        with self.under(
            policy
        ) as handle:  # one for all: what a request decided belongs to the handle that ran its prompt
            with PeakMemory(self.device) as peak:
                out, prefill = self.forward(ids[:, :split], 1, use_cache=True, past_key_values=held)
            cache, rows = out.past_key_values, [out.logits[0, -1:]]
            start = self._now()
            for at in range(split, ids.shape[1] - 1):
                out = self.model(input_ids=ids[:, at : at + 1].to(self.device), past_key_values=cache, use_cache=True)
                rows.append(out.logits[0, -1:])
            seconds = self._now() - start
            nll = losses(torch.cat(rows), ids[0, split:].to(self.device), what)
            with contextlib.nullcontext() if handle is None else handle.probing(seen):
                self.model(input_ids=ids[:, -1:].to(self.device), past_key_values=cache, use_cache=True)
            hits = retrieve(self.model, needles, cache)
        return Decoding(prefill, seconds / (tail - 1), nll, peak.extra_mb, hits, seen.total())

    def prefill(self, ids: Tensor, policy: Policy | None) -> float:
        """Seconds of one prefill of ``ids`` ``(1, N)`` with a cache."""
        with self.under(policy):
            return self.forward(ids, 1, use_cache=True)[1]


class Kept:
    """A probe that remembers what each self-attention layer kept and counts it afterwards, outside the timed forward."""

    def __init__(self) -> None:
        self._seen: list[tuple[Any, ...]] = []

    def __call__(self, event: AttentionEvent) -> None:
        if event.role == "self":
            q, k = event.call.q, event.call.k
            self._seen.append((event.layout, event.call.base, q.shape[0], q.shape[1], k.shape[1]))

    def total(self) -> Density:
        """The sum over layers; layers that share a layout object are counted once and multiplied."""
        known: dict[tuple[int, int], Density] = {}
        total = Density(0, 0, 0.0, 0.0)
        for layout, base, *sizes in self._seen:
            key = (id(layout), id(base))
            if key not in known:
                known[key] = measure(layout, base, *sizes)
            total = total + known[key]
        return total


class DenseLogits:
    """The dense model's log-probabilities at some rows, filled by its first quality pass.

    Args:
        rows: how many rows, spread evenly over the scored ones.
    """

    def __init__(self, rows: int = 512) -> None:
        self.rows = rows
        self._log_p: Tensor | None = None

    @property
    def filled(self) -> bool:
        return self._log_p is not None

    def _pick(self, logits: Tensor) -> Tensor:
        at = torch.linspace(0, logits.shape[0] - 1, min(self.rows, logits.shape[0]), device=logits.device).long()
        return logits[at]

    def fill(self, logits: Tensor) -> None:
        """Keep the log-probabilities of these ``(S, V)`` logits."""
        self._log_p = torch.log_softmax(self._pick(logits).float(), -1)

    def kl(self, logits: Tensor) -> float:
        """Mean KL(dense ‖ these logits) over the kept rows, nats."""
        if self._log_p is None:
            return 0.0
        total = 0.0
        picked = self._pick(logits)
        for log_p, row in zip(self._log_p.split(64), picked.split(64), strict=True):
            log_q = torch.log_softmax(row.float(), -1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        return max(total / picked.shape[0], 0.0)


def losses(logits: Tensor, targets: Tensor, what: str) -> Tensor:
    """``(S,)`` negative log-likelihoods in nats of ``targets`` ``(S,)`` under ``logits`` ``(S, V)``.

    Raises:
        ModelError: naming the first position whose logits are not finite.
    """
    parts = []
    for at, part in enumerate(logits.split(256)):
        row = part.float()
        nll = torch.logsumexp(row, -1) - row.gather(1, targets[at * 256 : at * 256 + len(row), None])[:, 0]
        bad = (~torch.isfinite(nll)).nonzero()
        if len(bad):
            raise ModelError(
                f"the logits of {what} are NaN or infinite at scored position {at * 256 + int(bad[0])}; expected finite numbers. "
                "Try --dtype float32, and check that the weights are whole."
            )
        parts.append(nll)
    return torch.cat(parts).cpu()
