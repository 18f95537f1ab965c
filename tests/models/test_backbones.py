"""The backbones: caches, masks, policies and factories do what they say; the diffusion models' arithmetic is exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from foveal.core.budget import Budget
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.rotary import rotary, rotate
from foveal.models import (
    DecoderLM,
    DiffusionLM,
    DiT,
    Memory,
    Pass,
    SelfAttention,
    ViT,
    blocks,
    diffusion_lm,
    shifted_factory,
)
from foveal.models.dit import signal
from foveal.models.vit import coordinates
from foveal.patterns import BlockTopK, Dense, Rettention, SlidingWindow, SparseD
from foveal.policies import Policy, Rule

VOCAB = 23


def decoder(**changes: object) -> DecoderLM:
    return DecoderLM(VOCAB, **{"dim": 32, "depth": 3, "num_heads": 4, "num_kv_heads": 2, **changes}).double().eval()


def ids(batch: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class Mean(nn.Module):
    """An attention of another kind: the mean over what came before."""

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


# --- decoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [Dense(), SlidingWindow(5, 2)], ids=str)
@pytest.mark.parametrize("cuts", [(20,), (7, 13), (1,) * 20, (12, 1, 1, 6)])
def test_pieces_through_a_memory_equal_one_pass(pattern, cuts):
    model, x = decoder(), ids(2, 20)
    whole = model(x, pattern)
    memory, parts = Memory(), []
    for part in x.split(cuts, 1):
        parts.append(model(part, pattern, memory))
    assert memory.length == 20
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=1e-10)


def test_the_future_does_not_reach_the_past():
    model, x = decoder(), ids(1, 16)
    other = x.clone()
    other[:, 9:] = (other[:, 9:] + 1) % VOCAB
    same = model(x)[:, :9] == model(other)[:, :9]
    assert bool(same.all()) and not torch.equal(model(x)[:, 9:], model(other)[:, 9:])


def test_left_padding_does_not_matter():
    model, x = decoder(), ids(1, 12)
    padded = torch.cat([ids(1, 5, seed=3), x], 1)
    valid = torch.arange(17)[None] >= 5
    run = model.begin(padded, valid=valid)
    torch.testing.assert_close(model(padded, run=run)[:, 5:], model(x), atol=1e-9, rtol=1e-9)


def test_a_policy_reaches_its_layer_alone_and_is_measured():
    model, x = decoder(), ids(1, 40)
    run = model.begin(x, Policy(layers=((1, Rule(SlidingWindow(4))),)), measuring=True)
    got = model(x, run=run)
    assert not torch.allclose(got, model(x))
    densities = [run.densities[i].density for i in range(3)]
    assert densities[0] == densities[2] == 1.0 and densities[1] == pytest.approx((4 * 40 - 6) / (40 * 41 / 2))


def test_layers_take_another_attention_from_the_factory():
    model = DecoderLM(VOCAB, dim=16, depth=2, attention=lambda i: Mean() if i else SelfAttention(16, 2, 0)).eval()
    assert isinstance(model.layers[1].attention, Mean)
    assert model(ids(2, 9)).shape == (2, 9, VOCAB)


def test_a_memory_counts_the_tokens_of_whichever_layer_keeps_keys():
    model = DecoderLM(VOCAB, dim=16, depth=2, attention=lambda i: SelfAttention(16, 2, 1) if i else Mean()).eval()
    memory = Memory()
    model(ids(1, 5), memory=memory)
    assert memory.length == 5


# --- token shift ------------------------------------------------------------------------------------------------------


def shifted(**changes: object) -> DecoderLM:
    model = decoder(attention=shifted_factory(32, 4, 2), **changes)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.before.copy_(torch.linspace(-1, 2, 32))
    return model


def test_a_shifted_layer_sees_the_token_before_and_no_later_one():
    model, x = shifted(depth=1), torch.randn(2, 6, 32, dtype=torch.float64)
    layer, run = model.layers[0].attention, model.begin(ids(2, 6))
    before = torch.stack([x[:, i - 1] if i else torch.zeros_like(x[:, 0]) for i in range(6)], 1)
    expected = layer.attention(x + layer.before * before, model.begin(ids(2, 6)))
    torch.testing.assert_close(layer(x, run), expected)
    layer.before.data.zero_()
    torch.testing.assert_close(layer(x, model.begin(ids(2, 6))), layer.attention(x, model.begin(ids(2, 6))))


@pytest.mark.parametrize("cuts", [(7, 13), (1,) * 20, (12, 1, 1, 6)])
def test_shifted_pieces_through_a_memory_equal_one_pass(cuts):
    model, x, memory = shifted(), ids(2, 20), Memory()
    parts = [model(part, SlidingWindow(5, 2), memory) for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x, SlidingWindow(5, 2)), atol=1e-10, rtol=1e-10)


def test_shifted_layers_ignore_left_padding():
    model, x = shifted(), ids(1, 12)
    padded, valid = torch.cat([ids(1, 5, seed=3), x], 1), torch.arange(17)[None] >= 5
    run = model.begin(padded, valid=valid)
    torch.testing.assert_close(model(padded, run=run)[:, 5:], model(x), atol=1e-9, rtol=1e-9)
    memory = Memory()
    first = model.begin(padded[:, :5], memory=memory, valid=valid[:, :5])
    model(padded[:, :5], run=first)
    second = model.begin(padded[:, 5:], memory=memory, valid=valid)
    torch.testing.assert_close(model(padded[:, 5:], run=second), model(x), atol=1e-9, rtol=1e-9)


# --- operators --------------------------------------------------------------------------------------------------------


def test_an_operator_runs_instead_of_a_pattern_and_keeps_its_state():
    """With a mask that keeps everything Re-ttention changes nothing; with a window it must, except in its dense steps."""
    model = trained_looking(DiT((4, 4), vocab_size=5, text=2, dim=32, depth=2)).double()
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = ids(2, 2, vocab=5)
    kinds: list[list[bool]] = []

    def watch(run: Pass) -> None:
        kinds.append([state.refreshed == run.step for state in run.states.values()])

    dense = model.sample(noise, 5, text, guidance=2.0)
    whole = Rettention(Dense(), warmup=1, period=2)
    same = model.sample(noise, 5, text, guidance=2.0, policy=replace(whole, ramp=0.0), watch=watch)
    torch.testing.assert_close(same, dense)
    assert kinds == [[False] * 2, [True] * 2, [True] * 2, [False] * 2, [True] * 2], (
        "the state went on from step to step"
    )
    near = model.sample(noise, 5, text, guidance=2.0, policy=replace(whole, pattern=SlidingWindow(2), ramp=0.0))
    assert not torch.allclose(near, dense)


def test_an_operator_is_not_measured():
    model = DiT((3, 3))
    run = model.begin(Rettention(Dense()), step=0, measuring=True)
    with pytest.raises(UnsupportedError, match="rettention is an operator"):
        model(torch.zeros(1, 1, 3, 3), torch.zeros(1), run=run)


def test_rotary_tables_are_made_once_a_pass(monkeypatch):
    made: list[int] = []
    real = blocks.rotary
    monkeypatch.setattr(blocks, "rotary", lambda *args: made.append(1) or real(*args))
    model = decoder()
    model(ids(1, 5))
    model(ids(1, 7))
    assert len(made) == 2


def test_generate_is_greedy_and_stops():
    model, x = decoder(), ids(2, 6)
    got = model.generate(x, 5)
    whole = x
    for _ in range(5):
        whole = torch.cat([whole, model(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, whole[:, 6:])
    assert model.generate(x[:1], 5, stop=[int(got[0, 0])]).shape == (1, 1)


def test_loss_counts_the_scored_tokens_alone():
    model, x = decoder(), ids(2, 9)
    scored = torch.zeros(2, 9, dtype=torch.bool)
    scored[0, 4] = scored[1, 8] = True
    logits = model(x[:, :-1]).log_softmax(-1)
    expected = -(logits[0, 3, x[0, 4]] + logits[1, 7, x[1, 8]]) / 2
    torch.testing.assert_close(model.loss(x, scored), expected)


def test_the_same_seed_gives_the_same_model():
    one, two, other = (DecoderLM(VOCAB, 16, 2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_products_depend_on_differences_alone(axes):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12, generator=g, dtype=torch.float64)
    place = torch.randint(0, 30, (2, axes), generator=g)

    def product(shift: int) -> float:
        a, b = (
            rotate(x, tuple(t.double() for t in rotary(p[None] + shift, 12, 100.0)))
            for x, p in ((q, place[0]), (k, place[1]))
        )
        return float((a * b).sum())

    assert product(0) == pytest.approx(product(11), abs=1e-5)
    assert product(0) != pytest.approx(float((q * k).sum()), abs=1e-3)


# --- masked diffusion -------------------------------------------------------------------------------------------------


def test_diffusion_sees_both_sides_and_ignores_what_is_masked():
    model = DiffusionLM(VOCAB, dim=32, depth=2).double().eval()
    x = ids(1, 10)
    other = x.clone()
    other[0, 9] = (other[0, 9] + 1) % VOCAB
    assert not torch.allclose(model(x)[:, 0], model(other)[:, 0])
    masked, also = x.clone(), other.clone()
    masked[0, 9] = also[0, 9] = model.mask
    assert torch.equal(model(masked), model(also))


def test_diffusion_loss_is_the_weighted_cross_entropy_of_the_masks():
    """With a model that gives every token the same probability the bound's expectation is log V per answer token."""
    model = DiffusionLM(VOCAB, dim=16, depth=1)
    with torch.no_grad():
        model.head.weight.zero_()
    x, answer = ids(64, 20), torch.arange(20)[None].expand(64, -1) >= 8
    g = torch.Generator().manual_seed(0)
    losses = [float(model.loss(x, answer, g).detach()) for _ in range(40)]
    assert sum(losses) / 40 == pytest.approx(math.log(VOCAB), rel=0.05)
    alone = model.loss(x, torch.zeros_like(answer), g)
    assert float(alone.detach()) == 0.0


def test_diffusion_loss_with_every_token_masked_is_plain_cross_entropy(monkeypatch):
    """Exact test 10 of SparseD's sheet: masking probability p = 1."""
    monkeypatch.setattr(diffusion_lm, "LEAST_MASKED", 1.0)
    model, x = trained_looking(DiffusionLM(VOCAB, dim=16, depth=2)), ids(4, 7)
    got = model.loss(x, torch.ones_like(x, dtype=torch.bool), torch.Generator().manual_seed(0))
    logits = model(torch.full_like(x, model.mask))
    torch.testing.assert_close(got, nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()))


def masks_of_three() -> Iterator[Tensor]:
    """All 2³ masks ``(1, 3)``."""
    for mask in itertools.product((False, True), repeat=3):
        yield torch.tensor([mask])


def losses_under(model: DiffusionLM, x: Tensor, mask: Tensor) -> Tensor:
    """``(3,)`` cross entropy of every token when ``mask`` is hidden."""
    return nn.functional.cross_entropy(model(torch.where(mask, model.mask, x))[0], x[0], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("p", [0.001, 0.3, 0.75, 1.0])
def test_diffusion_loss_is_unbiased_over_the_eight_masks_of_three_tokens(monkeypatch, p):
    """Exact test 10: Σ_m P(m)·loss(m) is finite, and the mean over tokens of the cross entropy given that the token is masked
    and the other two are with probability p."""
    model, x = trained_looking(DiffusionLM(5, dim=16, depth=2)), ids(1, 3, vocab=5)
    monkeypatch.setattr(diffusion_lm, "LEAST_MASKED", 0.0)
    found, expected = torch.zeros(2, dtype=torch.float64)
    for mask in masks_of_three():
        draws = iter([torch.full((1, 1), p, dtype=torch.float64), torch.where(mask, 0.0, 1.0)])
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", lambda *_, draws=draws, **__: next(draws))
            loss = model.loss(x, torch.ones_like(mask), torch.Generator())
        assert bool(loss.isfinite())
        chance = [p if hidden else 1 - p for hidden in mask[0].tolist()]
        found += math.prod(chance) * loss
        for i in range(3):
            others = math.prod(chance[:i] + chance[i + 1 :])
            expected += others * losses_under(model, x, mask)[i] / 3 if mask[0, i] else 0.0
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_diffusion_loss_averages_to_the_enumeration_of_its_masks(monkeypatch):
    """With its own draws: the share t is uniform from ε to 1, here ε = 1/4, and every token is masked with probability t."""
    model, x = trained_looking(DiffusionLM(5, dim=16, depth=2)), ids(1, 3, vocab=5)
    monkeypatch.setattr(diffusion_lm, "LEAST_MASKED", 0.25)
    share = 0.25 + 0.75 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    expected = torch.zeros((), dtype=torch.float64)
    for mask in masks_of_three():
        count = int(mask.sum())
        weight = (share ** (count - 1) * (1 - share) ** (3 - count)).mean()
        expected += weight * (losses_under(model, x, mask) * mask[0]).sum() / 3
    rows = x.expand(40_000, -1)
    got = model.loss(rows, torch.ones_like(rows, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert float(got) == pytest.approx(float(expected), rel=0.01)


@pytest.mark.parametrize("block", [None, 4])
def test_sampling_at_temperature_zero_is_deterministic(block):
    """Exact test 12 of SparseD's sheet: the generator has no say; above zero it has."""
    model, prompt = trained_looking(DiffusionLM(VOCAB, dim=16, depth=2)), ids(3, 7)

    def drawn(seed: int, temperature: float) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return model.sample(prompt, 12, 6, block=block, temperature=temperature, generator=g)

    assert torch.equal(drawn(1, 0.0), drawn(2, 0.0)) and torch.equal(
        drawn(1, 0.0), model.sample(prompt, 12, 6, block=block)
    )
    assert not torch.equal(drawn(1, 2.0), drawn(2, 2.0)) and torch.equal(drawn(1, 2.0), drawn(1, 2.0))


def test_sampling_with_only_dense_steps_gives_the_tokens_of_dense_attention():
    """Exact test 1 of SparseD's sheet: s = 1, or ρ = 1; with fewer dense steps and blocks the tokens change."""
    model, prompt = trained_looking(DiffusionLM(VOCAB, dim=16, depth=2)), ids(3, 7)
    want = model.sample(prompt, 12, 6)
    for skip, keep, same in ((1.0, 0.0, True), (0.0, 1.0, True), (0.0, 0.0, False)):
        policy = SparseD(steps=6, skip=skip, keep=keep, block=1, generated=12)
        assert torch.equal(model.sample(prompt, 12, 6, policy=policy), want) == same


@pytest.mark.parametrize(
    ("length", "steps", "block"), [(12, 12, None), (12, 5, None), (12, 6, 4), (12, 3, 4), (5, 1, None)]
)
def test_sampling_fills_every_mask_block_by_block(length, steps, block):
    model, prompt = DiffusionLM(VOCAB, dim=16, depth=1).eval(), ids(3, 7)
    seen: list[int] = []
    blocks: list[list[int]] = []
    real = model.forward

    def spy(x: Tensor, *args: object, run: Pass, **kwargs: object) -> Tensor:
        open_ = (x == model.mask).sum(1).tolist()
        assert len(set(open_)) == 1, "rows unmask at the same pace"
        seen.append(open_[0])
        blocks.append((x[0, 7:] == model.mask).nonzero()[:, 0].tolist())
        return real(x, *args, run=run, **kwargs)

    model.forward = spy  # type: ignore[method-assign]
    out = model.sample(prompt, length, steps, block=block)
    assert torch.equal(out[:, :7], prompt) and not bool((out == model.mask).any())
    assert len(seen) == steps and seen == sorted(seen, reverse=True) and seen[0] == length
    if block is not None:
        per = steps // (length // block)
        assert blocks[per] == list(range(block, length)), "the first block is whole before the second begins"


def test_tokens_that_are_given_stay_and_their_places_are_not_counted():
    model, prompt = DiffusionLM(VOCAB, dim=16, depth=1).eval(), ids(2, 5)
    given = torch.full((2, 8), model.mask)
    given[:, ::2] = ids(2, 4, seed=1)
    opened: list[int] = []
    out = model.sample(prompt, 8, 4, block=4, given=given, watch=lambda run: opened.append(run.step))
    assert torch.equal(out[:, 5::2], given[:, ::2]) and not bool((out == model.mask).any()) and opened == [0, 1, 2, 3]
    with pytest.raises(ShapeError, match=r"given has shape \(2, 7\); expected \(2, length=8\)"):
        model.sample(prompt, 8, 4, given=given[:, 1:])


def test_sampling_keeps_the_most_confident_first():
    model = DiffusionLM(4, dim=16, depth=1).eval()
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1], logits[0, 1, 2], logits[0, 2, 3] = 1.0, 3.0, 2.0
    x = torch.full((1, 3), model.mask)
    got = model._unmask(x, logits, 0, 3, 3, 0.0, None)
    assert got.tolist() == [[model.mask, 2, model.mask]]
    assert model._unmask(got, logits, 0, 3, 1, 0.0, None).tolist() == [[1, 2, 3]]


def test_patterns_keep_their_state_over_the_steps():
    told: list[tuple[int | None, object]] = []

    class Counts(Dense):
        registered_name = "test_counts"

        def select(self, q, k, ctx, state=None):
            told.append((ctx.step, state))
            return None, (state or 0) + 1

    DiffusionLM(VOCAB, dim=16, depth=1).eval().sample(ids(1, 4), 6, 3, policy=Counts())
    assert told == [(0, None), (1, 1), (2, 2)]


# --- diffusion transformer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "patch"), [((3, 4), 1), ((2, 3), 2), ((2, 3, 2), 2)])
def test_patches_and_back(grid, patch):
    model = DiT(grid, channels=2, patch=patch, dim=16, depth=1)
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(0))
    tokens = model._patches(x)
    assert tokens.shape == (3, math.prod(grid), 2 * patch**2)
    assert torch.equal(model._image(tokens), x)
    far = x.clone()
    far[..., -1, -1] += 1
    changed = (model._patches(far) != tokens).any(-1)[0].nonzero()[:, 0].tolist()
    last = coordinates(grid)
    expected = [i for i, at in enumerate(last.tolist()) if at[-2:] == [grid[-2] - 1, grid[-1] - 1]]
    assert changed == expected, "a pixel belongs to the token at its place"


def trained_looking(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that are nowhere zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model.double().eval()


def test_a_new_transformer_predicts_no_noise_and_every_block_is_the_identity():
    model = DiT((3, 3), vocab_size=4, text=2, dim=16, depth=2)
    predicted = model(torch.randn(2, *model.shape), torch.rand(2), ids(2, 2, vocab=4))
    assert float(predicted.detach().abs().max()) == 0.0
    x = torch.randn(2, 11, 16)
    assert torch.equal(model.layers[0](x, torch.randn(2, 16), model.begin()), x)


def test_ddim_finds_the_point_when_the_noise_is_known():
    """Data that is a single point: ε = (x − √ᾱ·x₀) / √(1 − ᾱ) exactly, and any number of steps ends in x₀."""
    model = DiT((2, 2), dim=16, depth=1)
    x0 = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def exact(x: Tensor, t: Tensor, text: Tensor | None = None, *, run: Pass) -> Tensor:
        share = signal(t).view(-1, 1, 1, 1)
        return (x - share.sqrt() * x0) / (1 - share).sqrt()

    model.forward = exact  # type: ignore[method-assign]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for steps in (1, 4, 9):
        torch.testing.assert_close(model.sample(noise, steps), x0, atol=1e-3, rtol=0)


def test_guidance_is_the_extrapolation_from_without_to_with_text():
    model = trained_looking(DiT((3, 3), vocab_size=4, text=2, dim=16, depth=2))
    noise, text = torch.randn(2, *model.shape, dtype=torch.float64), ids(2, 2, vocab=4)
    levels = torch.ones(2, dtype=torch.float64)
    given, none = model(noise, levels, text), model(noise, levels)
    assert not torch.allclose(given, none)
    predicted = none + 3.0 * (given - none)
    now, then = signal(torch.tensor(1.0)), signal(torch.tensor(0.0))
    expected = then.sqrt() * (noise - (1 - now).sqrt() * predicted) / now.sqrt() + (1 - then).sqrt() * predicted
    torch.testing.assert_close(model.sample(noise, 1, text, guidance=3.0), expected, atol=1e-6, rtol=1e-6)
    sizes: list[int] = []
    model.sample(noise, 2, text, guidance=3.0, watch=lambda run: sizes.append(run.step))
    assert sizes == [0, 1]


def test_the_signal_falls_from_one_to_almost_nothing():
    share = signal(torch.linspace(0, 1, 101))
    assert share[0] == pytest.approx(1) and share[-1] == pytest.approx(1e-4) and bool((share.diff() < 0).all())


def test_a_transformer_is_told_grid_and_step():
    told: list[tuple[object, object]] = []

    class Spy(Dense):
        registered_name = "test_spy_grid"

        def select(self, q, k, ctx, state=None):
            told.append((ctx.grid, ctx.step))
            return None, None

    DiT((2, 3, 2), dim=16, depth=1).eval().sample(torch.randn(1, 1, 2, 3, 2), 2, policy=Spy())
    assert told == [((2, 3, 2), 0), ((2, 3, 2), 1)]


# --- vision transformer -----------------------------------------------------------------------------------------------


def test_vit_knows_where_patches_lie_but_only_relative_to_each_other():
    model = trained_looking(ViT(5, channels=1, patch=2, dim=16, depth=2))
    picture = torch.randn(1, 1, 8, 12, dtype=torch.float64)
    run = model.begin((4, 6))
    run.positions = run.positions + 7
    torch.testing.assert_close(model(picture, run=run), model(picture), atol=1e-5, rtol=1e-5)
    turned = model(picture.transpose(2, 3))
    assert not torch.allclose(turned, model(picture), atol=1e-3)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: decoder()(ids(1, 4) + VOCAB), ShapeError, r"tokens from 0 to 22"),
        (lambda: decoder()(torch.zeros(3, dtype=torch.int64)), ShapeError, r"\(batch, length\)"),
        (lambda: SelfAttention(30, 4, 0), ConfigError, "divide"),
        (lambda: SelfAttention(32, 4, 0, 3), ConfigError, "num_kv_heads=3"),
        (lambda: DiffusionLM(9, 16, 1).sample(ids(1, 2, vocab=9), 6, 3, block=4), ConfigError, "block=4"),
        (lambda: DiT((4,), dim=16), ConfigError, r"\(height, width\)"),
        (lambda: DiT((2, 2), dim=16)(torch.zeros(1, 1, 3, 2), torch.zeros(1)), ShapeError, r"\(batch, 1, 2, 2\)"),
        (lambda: DiT((2, 2), dim=16).sample(torch.zeros(1, 1, 2, 2), 2, guidance=2.0), ConfigError, "without text"),
        (lambda: ViT(3, patch=2, dim=16)(torch.zeros(1, 1, 4, 5)), ShapeError, "sides that 2 divides"),
        (
            lambda: decoder()(ids(1, 4), Policy(Rule(heads=((0, 1, Rule(SlidingWindow(2))),)))),
            UnsupportedError,
            "one rule a layer",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def nothing(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DecoderLM(0), "DecoderLM.vocab_size is 0"),
        (lambda: DecoderLM(9, dim=0), "DecoderLM.dim is 0"),
        (lambda: DecoderLM(9, depth=0), "DecoderLM.depth is 0"),
        (lambda: DecoderLM(9, depth=-1), "DecoderLM.depth is -1"),
        (lambda: DecoderLM(9, depth=1.5), "DecoderLM.depth is 1.5"),
        (lambda: DecoderLM(9, num_heads=0), "DecoderLM.num_heads is 0"),
        (lambda: DecoderLM(9, num_kv_heads=0), "DecoderLM.num_kv_heads is 0"),
        (lambda: DecoderLM(9, ratio=0), "ratio is 0"),
        (lambda: DecoderLM(9, ratio=math.nan), "ratio is nan"),
        (lambda: SelfAttention(32, 0, 0), "SelfAttention.num_heads is 0"),
        (lambda: SelfAttention(32, 4, 0, 0), "SelfAttention.num_kv_heads is 0"),
        (lambda: DiffusionLM(0), "DiffusionLM.vocab_size is 0"),
        (lambda: DiffusionLM(9, depth=0), "DiffusionLM.depth is 0"),
        (lambda: DiffusionLM(9, num_heads=0), "DiffusionLM.num_heads is 0"),
        (lambda: DiT((2, 2), patch=0), "DiT.patch is 0"),
        (lambda: DiT((2, 2), channels=0), "DiT.channels is 0"),
        (lambda: DiT((2, 2), depth=0), "DiT.depth is 0"),
        (lambda: DiT((2, 2), num_heads=0), "DiT.num_heads is 0"),
        (lambda: DiT((2, 2), vocab_size=-1), "DiT.vocab_size is -1"),
        (lambda: DiT((2, 2), text=-1), "DiT.text is -1"),
        (lambda: DiT((2, 2), text=3), "DiT.vocab_size is 0 with text=3"),
        (lambda: ViT(0), "ViT.classes is 0"),
        (lambda: ViT(3, patch=0), "ViT.patch is 0"),
        (lambda: ViT(3, depth=-1), "ViT.depth is -1"),
        (lambda: ViT(3, num_heads=0), "ViT.num_heads is 0"),
    ],
)
def test_sizes_that_build_nothing_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: decoder().loss(ids(2, 1)), r"ids has shape \(2, 1\)"),
        (lambda: decoder().loss(ids(0, 5)), r"ids has shape \(0, 5\)"),
        (lambda: decoder().loss(ids(1, 5)[0]), r"ids has shape \(5,\)"),
        (lambda: decoder().loss(ids(2, 5), nothing(2, 4)), r"scored has shape \(2, 4\)"),
        (lambda: decoder().loss(ids(2, 5), nothing(1, 5)), r"scored has shape \(1, 5\)"),
        (lambda: decoder().loss(ids(2, 5), torch.ones(2, 5)), "scored has .* torch.float32"),
        (lambda: DiffusionLM(VOCAB, 16, 1).loss(ids(2, 5), nothing(2, 4), torch.Generator()), "answer has shape"),
        (lambda: DiffusionLM(VOCAB, 16, 1).loss(ids(2, 5), nothing(5), torch.Generator()), "answer has shape"),
        (lambda: DiffusionLM(VOCAB, 16, 1).loss(ids(2, 5) + VOCAB, nothing(2, 5), torch.Generator()), "0 to 22"),
        (lambda: DiT((2, 2), dim=16)(torch.zeros(2, 1, 2, 2), torch.zeros(1)), r"t has shape \(1,\)"),
        (lambda: DiT((2, 2), dim=16)(torch.zeros(2, 1, 2, 2), torch.zeros(())), r"t has shape \(\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(call, words):
    with pytest.raises(ShapeError, match=words):
        call()


@pytest.mark.parametrize(
    ("made_by", "batch", "words"),
    [
        ({"depth": 2}, 1, "memory has 2 layers; expected the 3"),
        ({"depth": 4}, 1, "memory has 4 layers; expected the 3"),
        ({}, 2, r"memory has keys of shape \(2, 2, 5, 8\) in layer 0; expected \(1, 2, length, 8\)"),
        ({"dim": 64}, 1, "memory has keys of shape"),
        ({"num_kv_heads": 4}, 1, "memory has keys of shape"),
    ],
)
def test_a_memory_of_another_model_or_batch_is_refused(made_by, batch, words):
    memory = Memory()
    decoder(**made_by)(ids(batch, 5), memory=memory)
    with pytest.raises(ShapeError, match=words):
        decoder()(ids(1, 3), memory=memory)


def test_a_memory_is_refused_by_its_layers_where_they_keep_no_keys_and_by_the_token_shift():
    memory = Memory()
    DecoderLM(VOCAB, dim=16, depth=2, attention=lambda i: Mean())(ids(1, 5), memory=memory)
    with pytest.raises(ShapeError, match="memory has 2 layers"):
        decoder()(ids(1, 3), memory=memory)
    memory = Memory()
    shifted()(ids(2, 5), memory=memory)
    with pytest.raises(ShapeError, match=r"memory has last tokens of shape \(2, 1, 32\)"):
        shifted()(ids(1, 3), memory=memory)
    with pytest.raises(ShapeError, match="memory is a dict"):
        decoder()(ids(1, 3), memory={})


def test_a_sparse_policy_trains():
    model = DecoderLM(VOCAB, dim=32, depth=2)
    model.loss(ids(2, 40), policy=BlockTopK(Budget(density=0.5), q_block=8, kv_block=8)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
