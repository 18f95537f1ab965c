"""One prompt answered twice, without and with interventions, and the proof that they acted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError
from ..hf import attach
from ..hf.generation import generation_config
from ..hf.vision import require_images
from ..patterns.dense import Dense
from .apply import apply, report
from .request import Request
from .var import VAR
from .vhr import VHR

if TYPE_CHECKING:
    from ..hf.interventions import Intervention


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, its tokens, and the probability that each of them had."""

    text: str
    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The same prompt before and after.

    Attributes:
        before, after: answers. first: likeliest first tokens of either, each with its probability before and after.
        guards: what each intervention did, see :func:`foveal.steer.report`.
        logit_change: largest change of a logit of the first token; divergence: KL(before ‖ after) of its distribution, nats.
        same_tokens: how many tokens both answers share from the start.
    """

    before: Answer
    after: Answer
    first: tuple[tuple[str, float, float], ...]
    guards: tuple[dict[str, Any], ...]
    logit_change: float
    divergence: float
    same_tokens: int

    @property
    def idle(self) -> list[str]:
        """Interventions that changed nothing."""
        return [guard["intervention"] for guard in self.guards if not guard["fired"]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        sides = {
            name: {"text": a.text, "tokens": list(a.tokens), "probabilities": list(a.probabilities)}
            for name, a in (("before", self.before), ("after", self.after))
        }
        return {
            **sides, "first": [{"token": t, "before": a, "after": b} for t, a, b in self.first], "guards": list(self.guards),
            "logit_change": self.logit_change, "divergence": self.divergence, "same_tokens": self.same_tokens,
        }  # fmt: skip


def compare(
    model: nn.Module, request: Request, interventions: Sequence[Intervention], *, max_new_tokens: int = 32, top: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:  # fmt: skip
    """Answer greedily twice: with dense attention of foveal's kernels, and with the interventions on top of the same kernels.

    So a difference is the interventions' and no kernel's.

    Args:
        model: in ``eval`` mode. request: the prompt. interventions: in the order in which they act.
        max_new_tokens: length of the answers. top: likeliest first tokens of each that are listed. progress: called before each answer.

    Raises:
        ConfigError, ShapeError, UnsupportedError: an intervention that does not fit the model or another one; nothing is computed then.
        ModelError: logits that are NaN.
    """
    if max_new_tokens < 1 or top < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and top is {top}; expected at least 1.")
    apply(model, interventions).detach()
    if any(isinstance(one, (VAR, VHR)) for one in interventions):
        require_images(request.image[None])
    progress("answering as it is")
    with attach(model, Dense()):
        ids, plain = _answer(model, request, max_new_tokens)
    progress("answering with the change")
    with apply(model, interventions) as handle:
        changed_ids, changed = _answer(model, request, max_new_tokens)
        guards = report(handle)
    both = [logits[0].log_softmax(-1) for logits in (plain, changed)]
    best = list(dict.fromkeys(t for side in both for t in side.topk(min(top, len(side))).indices.tolist()))
    best.sort(key=lambda t: -max(float(side[t]) for side in both))
    first = tuple((_shown(request, t), float(both[0][t].exp()), float(both[1][t].exp())) for t in best)
    same = 0
    for a, b in zip(ids, changed_ids, strict=False):
        if a != b:
            break
        same += 1
    return Comparison(
        _told(request, ids, plain), _told(request, changed_ids, changed), first, tuple(guards),
        float((plain[0] - changed[0]).abs().nan_to_num(0.0).max()),
        float(torch.nn.functional.kl_div(both[1], both[0], log_target=True, reduction="sum").clamp(min=0)), same,
    )  # fmt: skip


@torch.inference_mode()
def _answer(model: Any, request: Request, count: int) -> tuple[list[int], Tensor]:
    """Generated ids and the logits ``(T, V)`` that chose them, float32 on the CPU."""
    config = generation_config(model, count)
    config.output_logits = config.return_dict_in_generate = True
    out = model.generate(**request.inputs, generation_config=config)
    logits = torch.cat([step.float().cpu() for step in out.logits])
    if bool(logits.isnan().any()):
        raise ModelError("the logits are NaN; try --dtype float32, or a milder intervention.")
    return out.sequences[0, request.length :].tolist(), logits


def _told(request: Request, ids: list[int], logits: Tensor) -> Answer:
    chances = logits.softmax(-1)
    return Answer(
        request.decode(ids), tuple(_shown(request, t) for t in ids), tuple(float(p[t]) for p, t in zip(chances, ids, strict=True))
    )  # fmt: skip


def _shown(request: Request, token: int) -> str:
    """A token's text; special tokens and parts of characters, which have none of their own, by number."""
    text = request.decode([token])
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"<{token}>"
