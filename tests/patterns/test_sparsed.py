"""SparseD: the identities of its sheet's section 6 (mask and schedule), both selections, padding, and a state that is explicit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError, ShapeError
from foveal.patterns import SparseD, attend
from foveal.patterns import sparsed_blocks as arithmetic

from ..support import assert_close


def tensors(seed: int = 0, length: int = 100, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, length, 8), (batch, kv_heads, length, 8), (batch, kv_heads, length, 6))
    return [torch.randn(*s, generator=make, dtype=torch.float64) for s in shapes]


def at(step: int | None = None, length: int = 100, valid: Tensor | None = None, **extra: Any) -> SelectContext:
    return SelectContext(base=BaseMask.build(length, length, causal=False, valid=valid), step=step, **extra)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def keep(n: int, share: float) -> int:
    return min(n, math.floor(share * n) + 1)


def naive(pattern: SparseD, q: Tensor, k: Tensor, prompt_end: int, length: int) -> Tensor:
    """``(H, q blocks, key blocks)`` of one sequence of ``length`` tokens from the full matrix, row by row, by the sheet's words."""
    heads, b = q.shape[0], pattern.block
    k = k.repeat_interleave(heads // k.shape[0], 0)
    logits = q[:, :length] @ k[:, :length].transpose(-1, -2)
    logits = logits / math.sqrt(heads if pattern.literal else q.shape[-1])
    n = -(-length // b)
    last = -(-prompt_end // b)  # first block wholly in the answer
    out = torch.zeros(heads, n, n, dtype=torch.bool)

    def importance(keys: slice) -> Tensor:
        share = torch.zeros_like(logits)
        share[..., keys] = torch.softmax(logits[..., keys], -1)
        blocks = torch.zeros(heads, n, n, dtype=q.dtype)
        for u in range(n):
            for c in range(n):
                tile = share[:, u * b : (u + 1) * b, c * b : (c + 1) * b]
                blocks[:, u, c] = tile.sum((1, 2)) / (tile.shape[1] * (b if pattern.literal else tile.shape[2]))
        return blocks

    everything, prompt, answer = slice(0, length), slice(0, min(last * b, length)), slice(last * b, length)
    of_prompt = importance(prompt if pattern.selection == "paper" else everything)
    of_answer = importance(answer) if last < n else None
    for h in range(heads):
        for u in range(n):
            candidates = range(last) if pattern.selection == "paper" else range(n)
            best = sorted(candidates, key=lambda c: (-float(of_prompt[h, u, c]), c))
            for c in best[: keep(len(best), pattern.keep)]:
                out[h, u, c] |= c < last
            if of_answer is not None:
                best = sorted(range(last, n), key=lambda c: (-float(of_answer[h, u, c]), c))
                for c in best[: keep(len(best), pattern.keep)]:
                    out[h, u, c] = True
    return out


def expand(blocks: Tensor, block: int, length: int) -> Tensor:
    """Blocks as a mask of pairs."""
    return blocks.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :length, :length]


# --- selection -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_row_blocked_masks_equal_those_from_the_full_matrix(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([1, 15, 16, 17, 40, 63, 64, 65]))
    pattern = SparseD(
        keep=data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        generated=data.draw(st.sampled_from([0, 5, 16, 30, 200])),
        block=data.draw(st.sampled_from([1, 8, 16, 100])),
        selection=data.draw(st.sampled_from(["paper", "code"])),
        literal=data.draw(st.booleans()),
    )
    q, k, _ = tensors(data.draw(st.integers(0, 99)), length)
    got = pattern.blocks(q, k, at(length=length))
    for b in range(2):
        assert torch.equal(got[b], naive(pattern, q[b], k[b], max(length - pattern.generated, 0), length))


def test_memory_is_bounded_by_splitting_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors(heads=8)
    whole = SparseD(block=16, generated=40).blocks(q, k, at())
    monkeypatch.setattr(arithmetic, "_SCORES", 1)
    assert torch.equal(SparseD(block=16, generated=40).blocks(q, k, at()), whole)


def test_each_side_keeps_its_count_and_no_row_is_empty() -> None:
    q, k, _ = tensors(length=16 * 13)
    paper = SparseD(keep=0.3, block=16, generated=16 * 4).blocks(q, k, at(length=208))
    assert (paper[..., :9].sum(-1) == keep(9, 0.3)).all() and (paper[..., 9:].sum(-1) == keep(4, 0.3)).all()
    code = SparseD(keep=0.3, block=16, generated=16 * 4, selection="code").blocks(q, k, at(length=208))
    assert (code[..., 9:].sum(-1) == keep(4, 0.3)).all() and (code[..., :9].sum(-1) <= keep(13, 0.3)).all()
    assert (code[..., :9].sum(-1) < keep(13, 0.3)).any()


def test_heads_choose_for_themselves_and_permuting_heads_permutes_the_mask() -> None:
    q, k, _ = (t.clone() for t in tensors(length=64, heads=4, kv_heads=4))
    pattern = SparseD(keep=0.0, block=16, generated=0)
    k[:] = 0.0
    q[:] = 1.0
    for h in range(4):
        k[:, h, 16 * h : 16 * h + 16] = 2.0  # head h looks at block h alone
    blocks = pattern.blocks(q, k, at(length=64))
    assert torch.equal(blocks, torch.eye(4, dtype=torch.bool)[None, :, None].expand(2, 4, 4, 4))
    order = torch.tensor([2, 0, 3, 1])
    q, k, _ = tensors(length=64, heads=4, kv_heads=4)
    assert torch.equal(
        pattern.blocks(q[:, order], k[:, order], at(length=64)), pattern.blocks(q, k, at(length=64))[:, order]
    )


@pytest.mark.parametrize("selection", ["paper", "code"])
def test_the_answer_is_isolated_from_the_prompt(selection: Any) -> None:
    q, k, _ = (t.clone() for t in tensors(length=128))
    q[..., -1] = 1.0
    pattern = SparseD(keep=0.3, block=16, generated=48, selection=selection)
    plain = pattern.blocks(q, k, at(length=128))
    shifted = k.clone()
    shifted[:, :, 80:, -1] -= 40.0  # a constant on all logits of the answer
    moved = pattern.blocks(q, shifted, at(length=128))
    assert torch.equal(moved[..., 5:], plain[..., 5:])
    assert torch.equal(moved[..., :5], plain[..., :5]) == (selection == "paper")
    starved = k.clone()
    starved[:, :, 80:] *= -100.0
    assert (pattern.blocks(q, starved, at(length=128))[..., 5:].sum(-1) == keep(3, 0.3)).all()


def test_blocks_of_one_token_are_token_top_k_and_large_blocks_are_dense() -> None:
    q, k, v = tensors(length=40)
    pattern = SparseD(keep=0.25, block=1, generated=0)
    weights = torch.softmax(q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5, -1)
    top = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, weights.topk(keep(40, 0.25), -1).indices, True)
    assert torch.equal(pattern.blocks(q, k, at(length=40)), top)
    assert_close(attend(replace(pattern, block=64), q, k, v, at(length=40))[0], dense(q, k, v))


@pytest.mark.parametrize("length", [63, 64, 65, 100, 127])
def test_lengths_that_no_block_divides(length: int) -> None:
    q, k, v = tensors(length=length)
    pattern = SparseD(keep=0.2, block=16, generated=30)
    out, _, _ = attend(pattern, q, k, v, at(length=length))
    assert out.shape[2] == length
    assert_close(out, dense(q, k, v, expand(pattern.blocks(q, k, at(length=length)), 16, length)))


def test_a_partial_block_is_not_diluted_unless_literal() -> None:
    q, k = torch.zeros(1, 4, 300, 8), torch.zeros(1, 4, 300, 8)  # uniform attention
    base = BaseMask.build(300, 300, causal=False)
    sides = arithmetic.Sides.of(base, 128, 0)
    real, _ = arithmetic.side_importance(q, k, base, 1.0, sides, apart=False, padded=False)
    padded, _ = arithmetic.side_importance(q, k, base, 1.0, sides, apart=False, padded=True)
    assert real[0, 0, 0].tolist() == pytest.approx([1 / 300] * 3, rel=1e-4)
    assert padded[0, 0, 0].tolist() == pytest.approx([1 / 300, 1 / 300, 44 / 128 / 300], rel=1e-4)


def test_attention_is_bidirectional() -> None:
    q, k, v = tensors()
    pattern = SparseD(keep=1.0, block=16, generated=40)
    out = attend(pattern, q, k, v, at())[0]
    assert_close(out, dense(q, k, v))
    k2 = k.clone()
    k2[:, :, 90] = 5.0
    assert ((attend(pattern, q, k2, v, at())[0] - out).abs().amax((0, 1, 3)) > 0)[:90].all()


def test_padding_gets_no_weight_and_each_sequence_has_its_own_answer() -> None:
    q, k, v = tensors()
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1, 70:] = False
    pattern = SparseD(keep=0.2, block=8, generated=30)
    blocks = pattern.blocks(q, k, at(valid=valid))
    alone = pattern.blocks(q[1:, :, :70], k[1:, :, :70], at(length=70))
    assert torch.equal(
        blocks[1:, :, : alone.shape[2] - 1, : alone.shape[3]], alone[:, :, :-1]
    )  # the last row block has other rows
    assert torch.equal(blocks[:1], pattern.blocks(q[:1], k[:1], at()))
    out = attend(pattern, q, k, v, at(valid=valid))[0]
    v2 = v.clone()
    v2[1, :, 70:] = 1e6
    assert torch.equal(attend(pattern, q, k, v2, at(valid=valid))[0], out)


def test_gradients_equal_dense_attention_under_the_chosen_mask() -> None:
    qkv = [t.requires_grad_() for t in tensors()]
    pattern = SparseD(keep=0.2, block=16, generated=40)
    seen = expand(pattern.blocks(*qkv[:2], at()), 16, 100)
    got = torch.autograd.grad(attend(pattern, *qkv, at())[0].square().sum(), qkv)
    for a, b in zip(got, torch.autograd.grad(dense(*qkv, seen).square().sum(), qkv), strict=True):
        assert_close(a, b)


# --- steps and state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "skip", "dense_steps"),
    [(128, 0.2, 27), (32, 0.2, 8), (10, 0.0, 2), (10, 1.0, 10), (1, 0.0, 1), (4, 0.9, 4)],
)
def test_the_number_of_dense_steps(steps: int, skip: float, dense_steps: int) -> None:
    pattern = SparseD(keep=0.1, skip=skip, steps=steps, generated=40, block=16)
    assert pattern.dense_steps == dense_steps
    state, kinds = None, []
    for step in range(steps):
        layout, state = pattern.select(*tensors(step, batch=1)[:2], at(step), state)
        kinds.append(layout is None)
    assert kinds == [True] * dense_steps + [False] * (steps - dense_steps)


def test_the_mask_is_made_once_and_never_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = SparseD(keep=0.2, skip=0.2, steps=10, generated=40, block=16)
    made: list[int] = []
    original = SparseD.blocks
    monkeypatch.setattr(SparseD, "blocks", lambda self, q, k, ctx: made.append(ctx.step) or original(self, q, k, ctx))
    state, seen = None, set()
    for step in range(10):
        q, k, v = tensors(step)
        out, _, state = attend(pattern, q, k, v, at(step), state)
        if state.blocks is not None:
            seen.add(hash(state.blocks.numpy().tobytes()))
        expected = dense(q, k, v, expand(state.blocks, 16, 100) if step > pattern.last_dense else None)
        assert_close(out, expected)
    assert made == [pattern.last_dense] == [3] and len(seen) == 1
    *_, fresh = attend(pattern, *tensors(), at(0), state)
    assert fresh.blocks is None  # the next request begins at step 0


def test_state_travels_and_a_lost_one_is_made_again() -> None:
    pattern = SparseD(keep=0.2, steps=10, generated=40, block=16)
    q, k, v = tensors()
    *_, state = attend(pattern, q, k, v, at(3))
    out, _, after = attend(pattern, *tensors(1), at(4), state)
    again, _, _ = attend(pattern, *tensors(1), at(4), copy.deepcopy(state).to("cpu"))
    assert torch.equal(out, again) and after.blocks is state.blocks
    half = attend(pattern, *(t[1:] for t in tensors(1)), at(4), state.rows(slice(1, 2)))[0]
    assert_close(half, out[1:], 1e-12, "guidance halves")
    lost, _, rebuilt = attend(pattern, q, k, v, at(4))
    assert torch.equal(rebuilt.blocks, state.blocks)
    assert_close(lost, attend(pattern, q, k, v, at(4), state)[0])


PATTERN = SparseD(keep=0.2, steps=10, generated=40, block=16)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda s: attend(PATTERN, *tensors(length=99), at(4, 99), s), ShapeError, r"state is of shape \(2, 4, 100, 100\); expected \(2, 4, 99, 99\)"),
        (lambda s: attend(PATTERN, *tensors(batch=1), at(4), s), ShapeError, r"state is of shape .*expected \(1, 4, 100, 100\)"),
        (lambda s: attend(PATTERN, *tensors(), at(4, layer_index=1), s), ShapeError, "state is of layer 0; expected that of layer 1"),
        (lambda s: attend(PATTERN, *tensors(), at(4), {}), ShapeError, "state is a dict; expected a BlocksKept"),
        (lambda s: attend(PATTERN, *tensors(), at(2), s), ConfigError, "state is of step 3 and ctx.step is 2"),
        (lambda s: attend(replace(PATTERN, keep=0.5), *tensors(), at(4), s), ConfigError, "state was made by"),
        (lambda s: SparseD(keep=1.5), ConfigError, "keep is 1.5; expected a value from 0.0 to 1.0"),
        (lambda s: SparseD(steps=0), ConfigError, "steps is 0; expected a value at least 1"),
    ],
)  # fmt: skip
def test_bad_input_names_argument_value_and_what_is_allowed(act: Any, error: type[Exception], words: str) -> None:
    *_, state = attend(PATTERN, *tensors(), at(3))
    with pytest.raises(error, match=words):
        act(state)
