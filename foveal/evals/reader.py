"""Reads items with a model under a policy: log-probabilities at every position, or of the answers to questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..hf.growing import growing_cache
from ..policies.policy import Policy
from ..tune.meter import Kept, Meter, losses
from .base import Ask, Passage, Quiz

LOGIT_BYTES = 1 << 30
"""Logits kept at once; of longer passages every second, third, … position is scored."""
KL_ROWS = 512
"""Positions of a passage at which the whole distribution is compared."""


@dataclass
class Reference:
    """The dense model's log-probabilities ``(R, V)`` at some positions of one passage at a time."""

    key: str = ""
    log_p: Tensor | None = field(default=None, repr=False)


class Reader:
    """A model that reads items; ``policy=None`` is its own attention.

    Args:
        model: a causal language model in eval mode. impl: kernel implementation for policies.
    """

    def __init__(self, model: Any, impl: str = "auto") -> None:
        self.meter = Meter(model, impl)
        self.model, self.device = model, self.meter.device
        self.reference = Reference()

    # --- passages -----------------------------------------------------------------------------------------------------

    def passage(self, passage: Passage, policy: Policy | None, what: str) -> dict[str, Any]:
        """Losses at the scored positions; for a policy also its KL to dense and its density.

        Args:
            what: names the arm in errors.

        Returns:
            ``position`` and ``nll`` of the scored tokens, ``kl_position`` and ``kl``, ``density``.

        Raises:
            ModelError: a logit is not finite.
        """
        if policy is not None and self.reference.key != passage.key:  # measured in an earlier run: read again
            self.passage(passage, None, "the dense model")
        count = len(passage.ids) - 1
        stride = max(1, -(-4 * count * self.meter.vocabulary // LOGIT_BYTES))
        rows = torch.arange((count - 1) % stride, count, stride)
        some = torch.linspace(0, len(rows) - 1, min(KL_ROWS, len(rows))).long()
        seen = Kept()
        with self.meter.under(policy, (seen,)):
            logits = self._logits(passage.ids, rows)
            nll = losses(logits, passage.ids[rows + 1].to(self.device), what)
            picked = logits[some.to(self.device)].float()
            del logits
            kl: list[float] = []
            if policy is None:
                self.reference = Reference(passage.key, torch.log_softmax(picked, -1))
            else:
                kl = self._kl(picked)
        return {
            "position": (rows + 1).tolist(),
            "nll": _short(nll),
            "kl_position": (rows[some] + 1).tolist() if kl else [],
            "kl": kl,
            "density": seen.total().density if policy is not None else 1.0,
        }

    def _logits(self, ids: Tensor, rows: Tensor) -> Tensor:
        """``(len(rows), V)`` logits of one pass over ``ids``."""
        extra = {"logits_to_keep": rows.to(self.device)} if self.meter.keeps else {}
        out: Tensor = self.model(input_ids=ids[None].to(self.device), use_cache=False, **extra).logits[0]
        return out if self.meter.keeps else out[rows.to(self.device)]

    def _kl(self, logits: Tensor) -> list[float]:
        assert self.reference.log_p is not None
        parts = []
        for log_p, row in zip(self.reference.log_p.split(64), logits.split(64), strict=True):
            parts.append((log_p.exp() * (log_p - torch.log_softmax(row, -1))).sum(-1).clamp(min=0))
        return _short(torch.cat(parts))

    # --- questions ----------------------------------------------------------------------------------------------------

    def quiz(self, quiz: Quiz, policy: Policy | None, what: str) -> dict[str, Any]:
        """Read the context once, then score every question's answers from the same cache.

        Returns:
            ``asks``: per question ``at`` and what :meth:`_ask` says.

        Raises:
            ModelError: a logit is not finite.
        """
        with self.meter.under(policy):
            cache, held = self._read(quiz.context), len(quiz.context)
            asks = []
            for ask in quiz.asks:
                asks.append({"at": ask.at, **self._ask(cache, quiz.context, ask, what)})
                cache = self._back(cache, held)
        return {"asks": asks}

    def _read(self, context: Tensor) -> Any:
        out = self.model(
            input_ids=context[None].to(self.device), past_key_values=growing_cache(self.model), use_cache=True,
            **({"logits_to_keep": 1} if self.meter.keeps else {}),
        )  # fmt: skip
        return out.past_key_values

    def _back(self, cache: Any, held: int) -> Any:
        """The cache with its first ``held`` tokens, or None where this kind of cache forgets them."""
        if cache is None or not all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in cache.layers):
            return None
        extra = cache.get_seq_length() - held
        if extra:
            cache.crop(-extra)
        return cache

    def _ask(self, cache: Any, context: Tensor, ask: Ask, what: str) -> dict[str, Any]:
        """``logp`` of the right answer and of each of the ``others``, nats; of the right one also its ``tokens``, how many of them
        are the most probable one (``right``), and the mean ``gap`` to the best other token, nats."""
        held = len(context) + len(ask.ids)
        first: Tensor | None = None
        found: list[tuple[Tensor, Tensor]] = []
        for answer in (ask.answer, *ask.others):
            if first is None or cache is None:
                cache = self._read(context) if cache is None else cache
                first = self._step(cache, ask.ids)
            rows = [first, *(self._step(cache, token[None]) for token in answer[:-1])]
            logits = torch.stack(rows).float()
            found.append((logits, losses(logits, answer.to(self.device), what)))
            cache = self._back(cache, held)
        logits, nll = found[0]
        target = ask.answer.to(self.device)[:, None]
        other = logits.scatter(1, target, -torch.inf).amax(1)
        gap = logits.gather(1, target)[:, 0] - other
        return {
            "logp": -round(float(nll.sum()), 5),
            "others": [-round(float(loss.sum()), 5) for _, loss in found[1:]],
            "tokens": len(nll),
            "right": int((gap > 0).sum()),
            "gap": round(float(gap.mean()), 5),
        }

    def _step(self, cache: Any, ids: Tensor) -> Tensor:
        """``(V,)`` logits after more tokens."""
        extra = {"logits_to_keep": 1} if self.meter.keeps else {}
        out: Tensor = self.model(
            input_ids=ids[None].to(self.device), past_key_values=cache, use_cache=True, **extra
        ).logits
        return out[0, -1]


def _short(values: Tensor) -> list[float]:
    return [round(x, 5) for x in values.double().tolist()]
