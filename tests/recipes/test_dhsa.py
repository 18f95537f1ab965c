"""Training DHSA's boundary predictor: labels against a double loop, the loss, a real run, and resuming."""

import math

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.boundary import BoundaryPredictor
from foveal.patterns import DHSA
from foveal.recipes.dhsa import attention_rows, boundary_labels, focal_loss, mass_ratios, train_boundaries
from foveal.recipes.dhsa_record import Recorded, record_layers

transformers = pytest.importorskip("transformers")


def ratios_by_double_loop(a, window):
    """ρ of every position of a full ``(N, N)`` matrix; 1 where the windows do not fit."""
    n = len(a)
    out = torch.ones(n, dtype=torch.float64)
    for i in range(window - 1, n - window):
        past = sum(float(a[r, c]) for r in range(i + window, n) for c in range(i - window + 1, i + 1))
        future = sum(float(a[r, c]) for r in range(i + window, n) for c in range(i + 1, i + window + 1))
        out[i] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    return out


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_identity_5_streamed_ratios_equal_a_double_loop(rows, window):
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 40, 40, generator=g, dtype=torch.float64).tril()
    a = a / a.sum(-1, keepdim=True)
    streamed = mass_ratios(((r, a[:, r : r + rows]) for r in range(0, 40, rows)), 40, window)
    for b in range(2):
        torch.testing.assert_close(streamed[b], ratios_by_double_loop(a[b], window), atol=1e-9, rtol=1e-9)
    assert bool((streamed >= 1).all())
    even = mass_ratios([(0, torch.full((1, 40, 40), 0.3))], 40, window)
    torch.testing.assert_close(even, torch.ones_like(even), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_rows_are_the_head_averaged_softmax(window):
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, 30, 8, generator=g), torch.randn(2, 2, 30, 8, generator=g)
    base = BaseMask.build(30, 30, causal=True, window=window)
    rows = torch.cat([block for _, block in attention_rows(q, k, 0.3, base, rows=7)], 1)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    exact = torch.softmax(logits.masked_fill(~base.dense(2)[:, None], -torch.inf), -1).mean(1)
    torch.testing.assert_close(rows, exact)


def test_labels_and_loss():
    ratios = torch.tensor([[5.0] * 30])
    ratios[0, 12] = 1.99
    labels = boundary_labels(ratios, 4)
    assert labels[0].tolist() == [0] * 8 + [1] * 4 + [0] + [1] * 9 + [0] * 8
    logits, target = torch.tensor([1.2, -0.4, 0.3]), torch.tensor([1.0, 1.0, 0.0])
    mask = torch.tensor([1.0, 1.0, 0.0])
    terms = []
    for x, y in zip(logits.tolist(), target.tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        terms.append((1 - p) ** 2 * 1.3 * -math.log(p) if y else p**2 * -math.log(1 - p))
    assert float(focal_loss(logits, target)) == pytest.approx(sum(terms) / 3, rel=1e-5)
    assert float(focal_loss(logits, target, mask)) == pytest.approx(sum(terms[:2]) / 2, rel=1e-5)


def test_wrong_rows_are_refused():
    with pytest.raises(ShapeError, match="inside 20 rows"):
        mass_ratios([(15, torch.zeros(1, 8, 20))], 20, 4)
    with pytest.raises(ShapeError, match="no attention rows"):
        mass_ratios([], 20, 4)


# --- a real model -------------------------------------------------------------------------------------------------


def tiny(seed=0, **fields):
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=40,
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def test_recording_sees_what_the_softmax_sees():
    model = tiny()
    tokens = torch.randint(0, 40, (2, 21), generator=torch.Generator().manual_seed(0))
    before = model.config._attn_implementation
    layers = list(record_layers(model, tokens))
    assert len(layers) == 2 and layers[0].q.shape == (2, 4, 21, 8) and layers[0].k.shape == (2, 2, 21, 8)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    seen = model(tokens, output_attentions=True).attentions
    for layer, weights in zip(layers, seen, strict=True):
        rows = torch.cat([b for _, b in attention_rows(layer.q, layer.k, layer.scale, layer.base)], 1)
        torch.testing.assert_close(rows, weights.mean(1), atol=1e-5, rtol=1e-4)


def test_recording_restores_the_model_after_an_error():
    model = tiny()
    before = model.config._attn_implementation
    with pytest.raises(IndexError):
        list(record_layers(model, torch.full((1, 9), 10_000)))
    assert model.config._attn_implementation == before


def topics(model, tokens):
    """A stand-in for a model: keys are constant over topics, and later queries attend to some topics only."""
    g = torch.Generator().manual_seed(int(tokens.sum()))
    n = tokens.shape[1]
    lengths = torch.randint(8, 40, (n // 8,), generator=g)
    topic = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:n] % 6
    centres = torch.eye(6, 16) * 4
    k = centres[topic] + 0.3 * torch.randn(n, 16, generator=g)
    liked = (topic[:, None] + torch.tensor([[0, 2]])) % 6
    q = centres[liked].mean(1) * 2
    base = BaseMask.build(n, n, causal=True)
    yield Recorded(q[None, None], k[None, None], 0.25, base)


def batches(count, length=160):
    return [torch.full((1, length), i) for i in range(count)]


def test_training_finds_topic_changes():
    result = train_boundaries(None, batches(6), epochs=20, lr=3e-3, record=topics)
    first, last = sum(result.losses[:6]), sum(result.losses[-6:])
    assert 0.01 < result.positives < 0.5 and last < 0.35 * first
    layer = next(topics(None, torch.full((1, 160), 99)))  # a sequence it has not seen
    labels = boundary_labels(mass_ratios(attention_rows(layer.q, layer.k, layer.scale, layer.base), 160, 4), 4)[0] > 0.5
    logits = result.predictor(layer.k)[0]
    assert logits[labels].mean() > logits[~labels].mean() + 1


def test_training_on_a_real_model_resumes_exactly(tmp_path):
    model = tiny()
    tokens = [torch.randint(0, 40, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    steps = []
    whole = train_boundaries(model, tokens, epochs=3, lr=1e-3, seed=4, progress=lambda *a: steps.append(a))
    assert [s[:2] for s in steps] == [(i + 1, 9) for i in range(9)] and whole.losses[-1] < whole.losses[0]
    path = tmp_path / "p.safetensors"
    train_boundaries(model, tokens, epochs=1, lr=1e-3, seed=4, checkpoint=path)
    older = (tmp_path / "p.safetensors.optimizer").read_bytes()
    resumed = train_boundaries(model, tokens, epochs=3, lr=1e-3, seed=4, checkpoint=path)
    assert resumed.losses == whole.losses and resumed.positives == whole.positives
    for a, b in zip(whole.predictor.parameters(), resumed.predictor.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = BoundaryPredictor.load(path)
    for a, b in zip(whole.predictor.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"'lr': 0\.001.*'lr': 0\.5"):
        train_boundaries(model, tokens, epochs=3, lr=0.5, seed=4, checkpoint=path)
    moments = tmp_path / "p.safetensors.optimizer"
    newer = moments.read_bytes()
    moments.write_bytes(older)
    with pytest.raises(ConfigError, match="different epochs"):
        train_boundaries(model, tokens, epochs=3, lr=1e-3, seed=4, checkpoint=path)
    moments.unlink()
    with pytest.raises(ConfigError, match="cannot resume"):
        train_boundaries(model, tokens, epochs=3, lr=1e-3, seed=4, checkpoint=path)
    moments.write_bytes(newer)
    layer = next(iter(record_layers(model, tokens[0])))
    pattern = DHSA.with_predictor(path, budget=Budget(tokens=24), q_block=16, local=8, sinks=2, instruction=4)
    layout, state = pattern.select(layer.q, layer.k, SelectContext(layer.base))
    assert layout is not None and state.first[0, 0] == 0
    assert all(p.grad is None for p in model.parameters())


def test_no_batches_is_an_error():
    with pytest.raises(ConfigError, match="token_batches is empty"):
        train_boundaries(None, [], record=topics)
