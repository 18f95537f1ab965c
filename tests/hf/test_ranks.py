"""A model on a sequence spread over ranks: loss, logits and gradients are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import foveal
from foveal.kernels import context_parallel as cp
from tests.ranks import RankPool

pytest.importorskip("transformers")

TOTAL, DOCUMENTS = 32, (9, 16, 7)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def build(family: str) -> Any:
    import transformers as hf

    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=6)).double()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).double()


def compare(family: str, method: str, options: dict[str, Any], documents: tuple[int, ...] | None, checkpointed: bool) -> list[float]:  # fmt: skip
    """Differences of loss, logits and gradients from one process."""
    ids = torch.randint(1, 61, (2, TOTAL), generator=torch.Generator().manual_seed(1))
    alone, model = build(family), build(family)
    positions = None if documents is None else torch.cat([torch.arange(n) for n in documents])[None].expand(2, -1)
    expected = alone(ids, labels=ids, position_ids=positions, use_cache=False)
    expected.loss.backward()
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable()
    mesh = cp.mesh_for(method, timeout=60, **options)
    with foveal.context_parallel(model, mesh, method, impl="gather") as ranks:
        batch = ranks.shard(ids, ids, documents=documents, pad=documents is not None)
        other = ranks.shard(ids, ids)  # a batch that waits does not disturb
        out = model(**batch)
        del other
        out.loss.backward()
        ranks.reduce_gradients()
        logits = ranks.gather(out.logits, batch)
        loss = ranks.total(out.loss)
    assert max(float(q.grad.abs().max()) for q in alone.parameters()) > 1e-3
    gaps = [(p.grad - q.grad).abs().max() for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    return [float(abs(loss - expected.loss)), float((logits - expected.logits).abs().max()), float(max(gaps))]


def check(gaps: list[float]) -> None:
    loss, *rest = gaps
    assert loss < 2e-6, gaps  # transformers' loss is float32
    assert max(rest) < 1e-10, gaps


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("ring", {}), ("ulysses", {}), ("usp", {"ulysses": 2}), ("double_ring", {}), ("all_gather", {})],
)
def test_loss_and_gradients_are_those_of_one_process(pool: RankPool, family: str, method: str, options: dict[str, Any]) -> None:  # fmt: skip
    for documents in (None, DOCUMENTS):
        for gaps in pool.run(compare, family, method, options, documents, False):
            check(gaps)


def test_checkpointed_layers(pool: RankPool) -> None:
    for gaps in pool.run(compare, "llama", "ring", {}, None, True):
        check(gaps)


def refused() -> list[str]:
    model, said = build("llama"), []
    mesh = cp.mesh_for("ring", timeout=60)
    ids = torch.ones(1, TOTAL, dtype=torch.long)
    with foveal.context_parallel(model, mesh) as ranks:
        for call in (lambda: model(ids, use_cache=False), lambda: ranks.shard(ids[:, :30])):
            with pytest.raises(foveal.FovealError) as error:
                call()
            said.append(str(error.value))
    assert dist.is_initialized()
    return said


def test_what_is_refused(pool: RankPool) -> None:
    for first, second in pool.run(refused):
        assert "not those of a batch from shard" in first
        assert "30 tokens do not divide over 4 ring" in second
