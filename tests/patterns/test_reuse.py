"""Reuse of an earlier layer's choice: in one call, in a model with a growing cache, in a checkpointed backward; refusals."""

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext, Selection
from foveal.core.errors import ConfigError, ShapeError
from foveal.core.layouts import KeySelection
from foveal.patterns import Anchor, BlockTopK, Dense, MoBA, Reuse, SlidingWindow, TokenTopK

CHOOSE = BlockTopK(Budget(tokens=16), q_block=4, kv_block=4, sinks=2)


def tensors(length=40, heads=4, kv_heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, length, 8, generator=g, dtype=torch.float64)
    return q, torch.randn(1, kv_heads, length, 8, generator=g, dtype=torch.float64)


def chosen(pattern, q, k, **ctx):
    base = BaseMask.build(q.shape[2], k.shape[2], causal=True)
    return Selection.of(*pattern.select(q, k, SelectContext(base, q_offset=base.shift, **ctx), None), q, k)


def test_the_layout_of_the_named_layer_is_taken_as_it_is():
    q, k = tensors()
    earlier = {0: chosen(CHOOSE, q, k), 1: chosen(MoBA(4, 2), q, k), 2: chosen(SlidingWindow(5), q, k)}
    for layer in (0, 1, 2):
        assert chosen(Reuse(layer), q, k, layer_index=3, earlier=earlier).layout is earlier[layer].layout


def test_the_nearest_layer_that_left_something_out_is_taken_across_dense_ones():
    q, k = tensors()
    earlier = {0: chosen(CHOOSE, q, k), 1: chosen(SlidingWindow(5), q, k), 2: chosen(Dense(), q, k)}
    assert chosen(Reuse(), q, k, layer_index=3, earlier=earlier).layout is earlier[1].layout
    assert chosen(Reuse(), q, k, layer_index=1, earlier=earlier).layout is earlier[0].layout, (
        "later layers do not count"
    )
    assert chosen(Reuse(), q, k, layer_index=3, earlier={2: earlier[2]}).layout is None


def test_an_anchor_is_dense_and_hands_on_what_it_would_choose():
    q, k = tensors()
    anchor = chosen(Anchor(CHOOSE), q, k)
    assert anchor.layout is None
    taken = chosen(Reuse(0), q, k, layer_index=1, earlier={0: anchor}).layout
    assert torch.equal(taken.kv_indices, chosen(CHOOSE, q, k).layout.kv_indices)


def test_an_anchor_carries_the_state_of_its_pattern():
    q, k = tensors()
    _, state = Anchor(CHOOSE).select(
        q[:, :, :39], k[:, :, :39], SelectContext(BaseMask.build(39, 39, causal=True)), None
    )
    base = SelectContext(BaseMask.build(1, 40, causal=True), q_offset=39)
    _, carried = Anchor(CHOOSE).select(q[:, :, 39:], k, base, state)
    _, rebuilt = Anchor(CHOOSE).select(q[:, :, 39:], k, base, None)
    assert torch.equal(carried.layout.index, rebuilt.layout.index) and carried.state.absorbed == 40


def test_a_budget_of_everything_makes_every_class_dense():
    q, k = tensors()
    everything = BlockTopK(Budget(tokens=40))
    earlier = {0: chosen(everything, q, k), 1: chosen(Anchor(everything), q, k)}
    for pattern in (everything, Anchor(everything), Reuse(0), Reuse(1), Reuse()):
        assert chosen(pattern, q, k, layer_index=2, earlier=earlier).layout is None


def test_a_decode_list_is_unique_and_holds_sinks_and_the_current_block():
    q, k = tensors(length=43)
    anchor = chosen(CHOOSE, q[:, :, 42:], k)
    layout = chosen(Reuse(0), q[:, :, 42:], k, layer_index=1, earlier={0: anchor}).layout
    assert isinstance(layout, KeySelection)
    layout.validate(1, 4, 2, 1, 43)
    for line in layout.index[0, :, 0].tolist():
        assert {0, 1, 40, 41, 42} <= set(line) and max(line) == 42


@pytest.mark.parametrize(
    ("pattern", "layer", "earlier", "names"),
    [
        (Reuse(3), 3, {}, "layer 3 is to take the choice of layer 3.*at most 2"),
        (Reuse(0), 2, {1: None}, r"made none that can be shared.*\[1\]"),
        (Reuse(), 0, {}, "layer 0 has no earlier layer"),
        (Reuse(), 2, {}, "layer 2 has no earlier layer"),
    ],
)
def test_a_choice_that_is_not_there_is_refused(pattern, layer, earlier, names):
    q, k = tensors()
    with pytest.raises(ConfigError, match=names):
        chosen(pattern, q, k, layer_index=layer, earlier=earlier)


@pytest.mark.parametrize("source", [CHOOSE, TokenTopK(Budget(tokens=5)), MoBA(4, 2)])
def test_a_choice_for_other_lengths_or_heads_is_refused(source):
    q, k = tensors()
    earlier = {0: chosen(source, q, k)}
    with pytest.raises(ShapeError, match=r"layer 0.*20 queries and 20 keys"):
        chosen(Reuse(0), q[:, :, :20], k[:, :, :20], layer_index=1, earlier=earlier)
    for heads, kv_heads, rows in ((3, 3, 1), (8, 8, 1), (4, 2, 3)):
        q, k = (t.repeat(rows, 1, 1, 1) for t in tensors(heads=heads, kv_heads=kv_heads))
        if rows == 1 or isinstance(source, MoBA):  # blocks and lists of one row are shared by any batch
            with pytest.raises(ShapeError, match=rf"has {heads} heads, 40 queries and 40 keys in a batch of {rows}"):
                chosen(Reuse(0), q, k, layer_index=1, earlier=earlier)


@pytest.mark.parametrize("known", [True, False])
def test_groups_of_another_batch_or_other_heads_are_refused(known):
    q, k = (t.repeat(2, 1, 1, 1) for t in tensors())
    layout, state = chosen(MoBA(4, 2), q, k).layout, None
    earlier = {0: Selection.of(layout, state, q, k) if known else Selection(layout, state)}
    chosen(Reuse(0), q, k, layer_index=1, earlier=earlier)
    wrong = [(q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1)), (q.repeat(1, 2, 1, 1), k), (q[:1], k[:1])]
    for other_q, other_k in [*wrong, (q.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1))]:
        with pytest.raises(ShapeError, match=r"layer 0.*in a batch of"):
            chosen(Reuse(0), other_q, other_k, layer_index=1, earlier=earlier)


@pytest.mark.parametrize("source", [CHOOSE, TokenTopK(Budget(tokens=5))])
def test_blocks_and_lists_of_another_batch_are_refused(source):
    q, k = (t.repeat(2, 1, 1, 1) for t in tensors())
    earlier = {0: chosen(source, q, k)}
    with pytest.raises(ShapeError, match=r"in a batch of 2; .* in a batch of 3"):
        chosen(Reuse(0), q[:1].repeat(3, 1, 1, 1), k[:1].repeat(3, 1, 1, 1), layer_index=1, earlier=earlier)
