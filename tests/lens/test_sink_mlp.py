"""The MLP that makes a sink: stages, directions, clamps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.lens.sink_mlp import clamp_mlp, formation, mlp_inputs, mlp_stages, probe_directions

from .models import tiny, tokens, transformers


@torch.no_grad()
def test_stages_recomposed_equal_the_mlp() -> None:
    model, ids = tiny(), tokens()
    mlp, x = mlp_inputs(model, ids, 1)
    stages = mlp_stages(mlp, x)
    torch.testing.assert_close(stages["silu"] * stages["up"], stages["e"])
    torch.testing.assert_close(stages["y"], mlp(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_formation_compares_with_the_primary() -> None:
    model, ids = tiny(), tokens()
    ids[0, 30] = ids[0, 0]
    found = formation(model, ids, 0, [0, 30, 4])
    assert all(float(c[0]) == pytest.approx(1.0, abs=1e-5) for c in found.cosines.values())
    mlp, x = mlp_inputs(model, ids, 0)
    y = mlp(x)[0]
    torch.testing.assert_close(found.cosines["y"], torch.cosine_similarity(y[[0, 30, 4]], y[:1]))
    torch.testing.assert_close(found.norms, y[[0, 30, 4]].norm(dim=-1))
    assert found.primary_norm == pytest.approx(float(y[0].norm()))


class Quadratic(nn.Module):
    """Writes ``u·(x·a)²`` and half of the other directions: only ±a is effective."""

    def __init__(self, a: Tensor, u: Tensor) -> None:
        super().__init__()
        self.a, self.u = nn.Parameter(a), nn.Parameter(u)

    def forward(self, x: Tensor) -> Tensor:
        along = x @ self.a
        return along[..., None] ** 2 * self.u + 0.5 * (x - along[..., None] * self.a)


def test_directions_that_write_the_primary() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    a, u = basis[0], basis[1]
    sinks = 3 * a + 0.3 * torch.randn(20, 8, generator=g)
    others = -3 * a + 0.3 * torch.randn(20, 8, generator=g)
    found = probe_directions(Quadratic(a, u), sinks, others, u, scales=range(-20, 20))
    assert abs(float(found.components[0] @ a)) > 0.99 and found.variance[0] > 0.9
    assert found.effective(0.98) == [(0, -1), (0, 1)]
    big = found.norms[0, (found.scales == 19) | (found.scales == 10)]
    assert float(big[1] / big[0]) == pytest.approx(19**2 / 10**2, rel=0.02), (
        "the norm grows with the square of the scale"
    )
    with pytest.raises(ShapeError, match=r"\(20, 8\) and others \(3, 8\)"):
        probe_directions(Quadratic(a, u), sinks, others[:3], u)


@torch.no_grad()
def test_a_clamp_touches_flagged_rows_only_and_leaves_the_model_as_it_was() -> None:
    model, ids = tiny(), tokens()
    want = model(ids).logits
    mlp, x = mlp_inputs(model, ids, 1)
    y = mlp(x)
    twin = 17
    primary = y[0, twin]
    got: list[Tensor] = []
    with clamp_mlp(model, 1, primary, norm=3.0) as flagged:
        hook = mlp.register_forward_hook(lambda m, a, out: got.append(out))
        model(ids)
        hook.remove()
    assert flagged[0].nonzero().tolist() == [[0, twin]]
    assert float(got[0][0, twin].norm()) == pytest.approx(3.0, rel=1e-5)
    rest = torch.arange(ids.shape[1]) != twin
    assert torch.equal(got[0][0, rest], y[0, rest])
    assert torch.equal(model(ids).logits, want), "hooks off: the logits are bit-identical"


@torch.no_grad()
def test_a_clamp_to_a_tokens_own_norm_changes_nothing() -> None:
    model, ids = tiny(), tokens()
    want = model(ids).logits
    mlp, x = mlp_inputs(model, ids, 1)
    y = mlp(x)
    with clamp_mlp(model, 1, y[0, 17], norm=y.norm(dim=-1)) as flagged:
        got = model(ids).logits
    assert flagged[0].sum() == 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with clamp_mlp(model, 1, y[0, 1], norm=0.0) as flagged:
        assert torch.equal(model(ids).logits, want) and not flagged[0].any(), "the first tokens are protected"


@torch.no_grad()
def test_scaling_what_is_written() -> None:
    model, ids = tiny(), tokens()
    mlp, x = mlp_inputs(model, ids, 1)
    y = mlp(x)
    logits = []
    for factor in (1.0, 0.0):
        with clamp_mlp(model, 1, y[0, 17], factor=factor):
            logits.append(model(ids).logits)
    want = model(ids).logits
    torch.testing.assert_close(logits[0], want)
    assert not torch.allclose(logits[1][0, 17:], want[0, 17:]) and torch.equal(logits[1][0, :17], want[0, :17])


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="layer is 9; expected one of 0 to 2"):
        mlp_inputs(model, tokens(), 9)
    with pytest.raises(ConfigError, match="position 95, but the text has 90 tokens"):
        formation(model, tokens(), 0, [95])
    with pytest.raises(ConfigError, match="neither norm nor factor"), clamp_mlp(model, 0, torch.ones(32), norm=None):
        pass
    config = transformers.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedError, match="no gated MLP"):
        mlp_inputs(transformers.GPT2LMHeadModel(config), tokens(), 0)
