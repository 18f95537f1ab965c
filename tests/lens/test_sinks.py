"""Sinks: identities of the sheet of arXiv 2512.22213, planted sinks, and both ratios of arXiv 2505.06708."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.lens import record
from foveal.lens.planted_sinks import BOUND, Plant, expected, planted, small_decoder
from foveal.lens.sinks import find_primary, find_sinks, scan_sinks
from foveal.lens.stream import Trace, trace_hidden

from .models import eager_weights, tiny, tokens

L, N, D = 12, 30, 16


def stream(
    seed: int = 0, size: float = 60.0, birth: int = 5, tokens: tuple[int, ...] = (11, 20), off: int = 10
) -> list[Tensor]:
    """Hidden states with a massive token 0 in layers 2 to ``off`` − 1 and sinks from ``birth`` on that random updates bend away."""
    g = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(D, generator=g), dim=0)
    h = torch.randn(1, N, D, generator=g)
    out = []
    for layer in range(L):
        h = h + torch.randn(1, N, D, generator=g)
        if layer == 2:
            h[:, 0] += 900 * u
        if layer == off:
            h[:, 0] -= (h[:, 0] @ u)[:, None] * u
        if layer == birth:
            h[:, list(tokens)] += size * u
        out.append(h.clone())
    return out


def flags(hidden: list[Tensor], **kw: object) -> list[tuple[int, int, int, str]]:
    (found,) = find_sinks(trace_hidden(hidden), **kw)  # type: ignore[arg-type]
    return [(s.position, s.birth, s.lifetime, s.label) for s in found.found]


def test_what_is_planted_is_found() -> None:
    (found,) = find_sinks(trace_hidden(stream()))
    assert found.primary is not None and (found.primary.position, found.primary.on, found.primary.off) == (0, 2, 10)
    assert flags(stream()) == [(11, 5, 5, "secondary"), (20, 5, 5, "secondary")]
    assert found.levels() == {(5, 5): 2} and all(s.contiguous and s.sign == 1 for s in found.secondary)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_scale_invariance(factor: float) -> None:
    base, scaled = (find_sinks(trace_hidden([h * f for h in stream()]))[0] for f in (1.0, factor))
    assert base.primary and scaled.primary
    assert (base.primary.on, base.primary.off) == (scaled.primary.on, scaled.primary.off)
    assert flags(stream()) == flags([h * factor for h in stream()])


def test_rotation_invariance() -> None:
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3))).Q
    assert flags(stream()) == flags([h @ rotation for h in stream()])
    a, b = trace_hidden(stream()), trace_hidden([h @ rotation for h in stream()])
    torch.testing.assert_close(a.cosines, b.cosines, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("away", [-1e-3, 1e-3])
def test_flagged_exactly_inside_the_bound(sign: int, away: float) -> None:
    assert math.isclose(BOUND, math.tan(math.acos(0.9)))
    hidden = [h.double() * 1e-6 for h in stream(tokens=())]
    u, r = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    u[0], r[1] = 1.0, 1.0
    for layer in range(2, 10):
        hidden[layer][:, 0] = 900 * u
    hidden[6][0, 13] = sign * 10 * u + 10 * (BOUND + away) * r
    found = flags([h.float() for h in hidden])
    assert (13 in [f[0] for f in found]) == (away < 0)
    if away < 0:
        (sinks,) = find_sinks(trace_hidden([h.float() for h in hidden]))
        assert next(s for s in sinks.found if s.position == 13).sign == sign


def test_detection_is_causal() -> None:
    whole = flags(stream())
    for n in (12, 21):
        cut = flags([h[:, :n] for h in stream()])
        assert cut == [f for f in whole if f[0] < n]


def test_left_padding_moves_the_candidates() -> None:
    padded = [torch.cat([torch.zeros(1, 7, D), h], 1) for h in stream()]
    valid = torch.arange(N + 7)[None] >= 7
    (found,) = find_sinks(trace_hidden(padded, valid=valid))
    assert found.primary is not None and found.primary.position == 7
    assert [(s.position - 7, *s.level) for s in found.found] == [(p, b, n) for p, b, n, _ in flags(stream())]


def test_no_primary_sink() -> None:
    calm = [torch.randn(1, N, D, generator=torch.Generator().manual_seed(i)) for i in range(L)]
    (found,) = find_sinks(trace_hidden(calm))
    assert found.primary is None and found.found == () and found.levels() == {}


def test_a_primary_written_by_block_0_and_one_that_is_never_erased() -> None:
    norms = torch.ones(L, N)
    norms[:, 0] = 80
    found = find_primary(norms)
    assert found is not None and (found.on, found.off) == (0, L)
    norms[:4, 0] = 1
    found = find_primary(norms)
    assert found is not None and (found.on, found.off) == (4, L)
    norms[9:, 0] = 2
    found = find_primary(norms)
    assert found is not None and (found.on, found.off) == (4, 9)


def test_other_first_tokens_are_candidates_never_secondary() -> None:
    labels = {f[0]: f[3] for f in flags(stream(tokens=(1, 11)))}
    assert labels == {1: "candidate", 11: "secondary"}


def test_the_rules() -> None:
    with pytest.raises(ConfigError, match="L = 12 blocks"):
        find_sinks(trace_hidden(stream()), rule="paper")
    with pytest.raises(ConfigError, match="expected 'relative' or 'paper'"):
        find_sinks(trace_hidden(stream()), rule="strict")  # type: ignore[arg-type]
    norms = torch.ones(1, 40, N)
    norms[0, 3:38, 0] = 100
    cosines = torch.zeros(1, 2, 40, N)
    for token, birth, lifetime in ((5, 3, 35), (6, 20, 6), (7, 20, 4), (8, 10, 25), (9, 10, 24), (10, 5, 10)):
        cosines[0, 0, birth : birth + lifetime, token] = 0.95
    trace = Trace(norms, cosines, torch.tensor([0]), torch.ones(1, N, dtype=torch.bool), torch.ones(40), torch.ones(40))
    paper = {s.position: s.label for s in find_sinks(trace, rule="paper")[0].found}
    assert paper == {5: "primary", 6: "secondary", 7: "noise", 8: "primary", 9: "secondary", 10: "secondary"}
    relative = {s.position: s.label for s in find_sinks(trace)[0].found}
    assert relative == {5: "primary", 6: "secondary", 7: "noise", 8: "secondary", 9: "secondary", 10: "primary"}


def test_hits_that_are_not_contiguous_are_counted() -> None:
    norms, cosines = torch.ones(1, 40, N), torch.zeros(1, 2, 40, N)
    norms[0, 3:38, 0] = 100
    cosines[0, 0, [20, 21, 22, 23, 24, 30], 6] = -0.95
    trace = Trace(norms, cosines, torch.tensor([0]), torch.ones(1, N, dtype=torch.bool), torch.ones(40), torch.ones(40))
    (sink,) = find_sinks(trace)[0].found
    assert sink.level == (20, 6) and not sink.contiguous and sink.sign == -1


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_planted_in_a_decoder_found_with_the_level_that_geometry_predicts(seed: int) -> None:
    model = small_decoder(seed)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (1, 40), generator=g)
    u = torch.nn.functional.normalize(torch.randn(64, generator=g), dim=0)
    at = (torch.randperm(36, generator=g)[:3] + 3).tolist()
    plant = Plant(u, 3e4, 2, 11, at, 5, (40.0, 90.0, 2000.0))
    with planted(model, plant) as written:
        scan = scan_sinks(model, ids)
    (sinks,) = scan.sinks
    assert sinks.primary is not None and (sinks.primary.position, sinks.primary.on, sinks.primary.off) == (0, 2, 11)
    want = {t: level for t in range(2, 40) if (level := expected(written, plant, t))}
    assert {s.position: s.level for s in sinks.found if s.position > 1} == want and set(at[1:]) <= set(want)
    lifetimes = [want.get(t, (0, 0))[1] for t in at]
    assert lifetimes == sorted(lifetimes)


@torch.no_grad()
def test_a_scan_has_scores_and_both_ratios() -> None:
    model, ids = tiny(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    scan = scan_sinks(model, {"input_ids": ids, "attention_mask": mask})
    hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    weights = eager_weights(model, input_ids=ids, attention_mask=mask)
    score = (weights[0].tril(-1).sum(-2) / torch.arange(39, -1, -1).clamp(min=1)).mean(1)
    torch.testing.assert_close(scan.scores()[0].double(), score, rtol=1e-3, atol=1e-4)
    shares = torch.cat([weights[0, ..., 16:, 0], weights[1, ..., 16:, 9]], -1).mean((1, 2))
    torch.testing.assert_close(torch.tensor([f.late for f in scan.attention]).double(), shares, rtol=1e-3, atol=1e-4)
    assert scan.activations.largest[0] == pytest.approx(float(hidden[1][mask.bool()].abs().max()), rel=1e-5)
    assert len(scan.activations.largest) == 3 and scan.to_json()["sequences"][0].keys() == {
        "primary",
        "sinks",
        "levels",
    }


@torch.no_grad()
def test_uniform_attention_has_the_closed_form_score() -> None:
    model, ids = tiny(), tokens(1, 25)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    scan = scan_sinks(model, ids)
    share = 1 / torch.arange(1, 26, dtype=torch.float64)
    want = torch.tensor([float(share[t + 1 :].mean()) if t < 24 else 0.0 for t in range(25)])
    torch.testing.assert_close(scan.scores()[0].double(), want.double().expand(3, -1), rtol=1e-5, atol=1e-6)
    assert scan.attention[0].share == pytest.approx(float(share.mean()), rel=1e-5)


@torch.no_grad()
def test_score_with_key_heads_repeated() -> None:
    """GQA: the mean over query heads does not change when key heads are physically repeated."""
    model, ids = tiny(), tokens(1, 25)
    plain = tiny(num_key_value_heads=4)
    plain.load_state_dict(model.state_dict() | {
        f"model.layers.{i}.self_attn.{p}.weight": getattr(layer.self_attn, p).weight.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
        for i, layer in enumerate(model.model.layers) for p in ("k_proj", "v_proj")
    })  # fmt: skip
    torch.testing.assert_close(scan_sinks(model, ids).scores(), scan_sinks(plain, ids).scores(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_column_sums_equal_the_gradient_of_a_value_of_one_column() -> None:
    from foveal.lens import received_mass

    from .calls import HOSTS, array, event, recorded, tensors

    host = HOSTS["causal"]
    given = tensors(host)
    sums = array(recorded("received", event(host, given)), "received")
    by_gradient = received_mass(event(host, given).call) * host.rows
    torch.testing.assert_close(sums.float(), by_gradient, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 4), float(host.rows), dtype=torch.float64))


@torch.no_grad()
def test_norms_of_keys_and_values() -> None:
    model, ids = tiny("Qwen3"), tokens(1, 20)
    seen = []
    with record(model, "norms") as rec:
        hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, y: seen.append(y))
        model(ids)
        hook.remove()
    want = seen[0].view(20, 2, 8).norm(dim=-1).T
    torch.testing.assert_close(rec["norms.value"].select(layer=1).values, want)
    assert rec["norms.key"].dims == ("layer", "head", "token") and rec["norms.key"].shape == (3, 2, 20)


def test_models_and_texts_that_cannot_be_scanned() -> None:
    with pytest.raises(ShapeError, match="at least 2 tokens"):
        scan_sinks(tiny(), tokens(1, 1))
    with pytest.raises(UnsupportedError, match="expected a transformers PreTrainedModel"):
        scan_sinks(torch.nn.Linear(2, 2), tokens())
