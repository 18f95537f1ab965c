"""HyLRA's reuse in a model: in prefill and while the cache grows, under beams that change places, and in a checkpointed backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.budget import Budget
from foveal.hf.forward import AttentionEvent
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import attend
from foveal.patterns import Anchor, BlockTopK, MoBA, Pattern, Reuse, TokenTopK
from foveal.policies.policy import Policy, Rule

from ..support import assert_close
from . import models
from .models import FAMILIES
from .test_training import assert_same, gradients, ready

SOURCES = [
    TokenTopK(Budget(tokens=6), sinks=1),
    BlockTopK(Budget(tokens=8), q_block=4, kv_block=2, sinks=1),
    MoBA(block=4, top_k=2),
    Anchor(TokenTopK(Budget(tokens=6), sinks=1)),
]
sources = pytest.mark.parametrize("source", SOURCES, ids=str)


def build() -> Any:
    cls, config = FAMILIES["llama"].build()
    return models.fill(cls._from_config(config, attn_implementation="eager")).double().eval()


def after(source: Pattern) -> Policy:
    """Layer 0 chooses, all others take its choice."""
    return Policy(Rule(Reuse(0)), ((0, Rule(source)),))


@sources
def test_every_layer_attends_to_the_first_layers_keys_while_the_cache_grows(source: Pattern) -> None:
    events: list[AttentionEvent] = []
    ids = torch.randint(models.VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), foveal.attach(build(), after(source), probes=[events.append]) as handle:
        handle.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    layers = max(e.layer_index for e in events) + 1
    lengths = [e.call.base.kv_len for e in events[::layers]]
    assert lengths == list(range(14, 23)), "one prefill and eight steps"
    for first in range(0, len(events), layers):
        step = events[first : first + layers]
        layout = step[1].layout
        assert layout is not None
        assert all(e.layout is layout for e in step[1:])
        assert step[0].layout is (None if isinstance(source, Anchor) else layout)
        for event in step:
            call: AttentionCall = event.call.replace(layout=event.layout)
            assert_close(event.out, attend(call)[0], what=f"layer {event.layer_index} with {call.base.kv_len} keys")


@sources
def test_beams_that_change_places_reuse_their_own_keys(source: Pattern) -> None:
    model = build()
    ids = torch.randint(models.VOCAB, (2, 14), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    with torch.no_grad(), foveal.attach(model, after(source)):
        cached = model.generate(ids, use_cache=True, **options)
        each = [model.generate(ids[b : b + 1], use_cache=True, **options) for b in range(2)]
    for b in range(2):
        assert torch.equal(cached[b, : each[b].shape[1]], each[b][0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_backward_reuses_what_its_own_forward_chose(use_reentrant: bool) -> None:
    def run(model: Any) -> dict[str, Tensor]:
        with foveal.attach(model, after(MoBA(block=4, top_k=2))):
            losses = []
            for seed in (0, 1):
                ids = torch.randint(models.VOCAB, (2, 20), generator=torch.Generator().manual_seed(seed))
                losses.append(model(input_ids=ids, use_cache=False).logits.square().mean())
            losses[0].backward()
            losses[1].backward()
        return gradients(model)

    assert_same(run(ready("llama", use_reentrant=use_reentrant)), run(ready("llama")), 1e-9)
