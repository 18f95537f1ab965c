"""WAAD, FAI and what they show: identities of the sheet of arXiv 2510.13554, planted rhythms, a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError
from foveal.lens import record
from foveal.lens.probes import Influence, LookBack, WindowedDistance
from foveal.lens.rhythm import (
    Rhythm,
    bootstrap_ratio,
    coupling,
    delta,
    entropy_at_peaks,
    follows,
    model_rhythm,
    peaks,
    receiver_agreement,
    receivers,
    rhythm_layers,
    rhythm_of,
    rhythm_probes,
    split_heads,
)

from .calls import Host, array, dense, event, recorded, tensors
from .models import eager_weights, tiny, tokens

pytest.importorskip("scipy", reason="needs scipy: pip install 'foveal[data]'")

N = 60


def from_maps(maps: Tensor, probes: object) -> Tensor:
    """A probe's figures of given causal maps ``(H, N, N)``, planted as logits: q is the log of a row, k the identity."""
    heads, n = maps.shape[:2]
    q = maps.clamp(min=1e-30).log()[None].double()
    k = torch.eye(n, dtype=torch.float64).expand(1, heads, n, n)
    host = Host(heads=heads, kv_heads=heads, rows=n, dim=n)
    return array(recorded({"x": probes}, event(host, {"q": q * n**0.5, "k": k})), "x")[0]  # type: ignore[dict-item]


def uniform() -> Tensor:
    return torch.ones(N, N).tril() / torch.arange(1, N + 1)[:, None]


def test_waad_lies_in_its_range_and_has_both_ends() -> None:
    own = torch.eye(N)
    far = torch.zeros(N, N)
    far[torch.arange(N), (torch.arange(N) - 12).clamp(min=0)] = 1
    found = from_maps(torch.stack([own, far, uniform()]), WindowedDistance(10))
    assert float(found.min()) >= 0 and float(found.max()) <= 10 and (found[:, 0] == 0).all()
    assert float(found[0].max()) < 1e-12 and torch.allclose(found[1, 12:], torch.tensor(10.0, dtype=torch.float64))


def test_waad_with_a_window_over_the_text_is_the_mean_distance() -> None:
    host = Host(rows=N)
    rec = recorded({"w": WindowedDistance(N), "d": LookBack()}, event(host, tensors(host)))
    torch.testing.assert_close(array(rec, "w"), array(rec, "d"))


def test_waad_of_uniform_attention_has_the_closed_form() -> None:
    want = [sum(min(e, 10) for e in range(t + 1)) / (t + 1) for t in range(N)]
    torch.testing.assert_close(
        from_maps(uniform()[None], WindowedDistance(10))[0], torch.tensor(want, dtype=torch.float64)
    )


def test_waad_and_fai_are_linear_in_the_maps() -> None:
    host = Host(rows=N)
    given = tensors(host)
    maps = dense(host, given).weights[0]
    for probe in (WindowedDistance(10), Influence(10, 50), Influence(10)):
        mean = from_maps(maps.mean(0, keepdim=True), probe)[0]
        torch.testing.assert_close(
            array(recorded({"x": probe}, event(host, given)), "x")[0].mean(0), mean, rtol=1e-9, atol=1e-12
        )


def test_fai_over_everything_adds_up_to_the_rows() -> None:
    host = Host(rows=N)
    fai = array(recorded({"x": Influence(0, N)}, event(host, tensors(host))), "x")
    count = torch.arange(N, 0, -1)
    torch.testing.assert_close((fai * count).sum(-1), torch.full((1, 4), float(N), dtype=torch.float64))


def test_fai_is_of_the_future_only() -> None:
    """Rows nearer than the horizon do not matter, nor does text after it."""
    host = Host(rows=N)
    given = tensors(host)
    probe = Influence(10, 20)
    want = array(recorded({"x": probe}, event(host, given)), "x")
    s = 25
    changed = {**given, "q": given["q"].clone()}
    changed["q"][:, :, s + 1 : s + 10] += 3
    changed["q"][:, :, s + 21 :] -= 2
    got = array(recorded({"x": probe}, event(host, changed)), "x")
    assert torch.equal(got[..., s], want[..., s]) and not torch.equal(got, want)
    short = Host(rows=s + 21)
    cut = {"q": given["q"][:, :, : s + 21], "k": given["k"][:, :, : s + 21]}
    torch.testing.assert_close(array(recorded({"x": probe}, event(short, cut)), "x")[..., s], want[..., s])


def planted(chunk: int = 12, anchor: int = 4) -> tuple[Tensor, list[int], list[int]]:
    """Local maps that look ever further back until a phrase starts, global maps that look at one token of each phrase."""
    n = 10 * chunk
    at = torch.arange(n)
    local, far = torch.zeros(n, n), torch.zeros(n, n)
    for t in range(n):
        back = 8 if t % chunk == 0 and t else 1
        local[t, max(t - back, 0)] = 1
        phrase = max((t - 10) // chunk, 0)
        marked = [p * chunk + anchor for p in range(phrase + 1) if p * chunk + anchor <= t - 10]
        far[t, marked or [0]] = 1 / len(marked or [0])
    starts = [t for t in range(1, n) if t % chunk == 0]
    return torch.stack([local, far]), starts, [int(a) for a in at if a % chunk == anchor and a + 10 < n - 1]


def test_a_planted_rhythm_is_recovered_exactly() -> None:
    maps, starts, anchors = planted()
    waad, fai = from_maps(maps, WindowedDistance(10))[0], from_maps(maps, Influence(10))[1]
    found = from_maps(maps, LookBack()).mean(-1)
    sets = split_heads(found[None])
    assert sets.local == ((0, 0),) and sets.far == ((0, 1),)
    assert peaks(waad.numpy()).tolist() == starts
    fai[0] = 0  # rows without an anchor yet look at the first token
    assert peaks(fai.numpy()).tolist() == anchors
    assert set(np.flatnonzero(delta(waad.numpy()) > 3)) == {t for s in starts for t in (s - 1, s)}


def test_layers_read_in_training() -> None:
    assert rhythm_layers(36) == [12, 15, 18, 21, 24]
    assert rhythm_layers(3) == [1, 2] and rhythm_layers(1) == [0]


def test_the_head_split() -> None:
    distance = torch.tensor([[5.0, 1.0, 9.0], [2.0, 8.0, float("nan")]])
    sets = split_heads(distance, layers=(4, 7), share=0.4)
    assert sets.local == ((4, 1), (7, 0)) and sets.far == ((7, 1), (4, 2)) and len(sets.distance) == 5
    assert len(split_heads(torch.rand(1, 3)).local) == 1
    with pytest.raises(ConfigError, match=r"share is 0\.7"):
        split_heads(distance, share=0.7)


@torch.no_grad()
def test_a_models_rhythm_equals_its_definition_on_eager_maps() -> None:
    model, ids, start = tiny(), tokens(1, N), 20
    found = model_rhythm(model, ids, start=start, far=30)
    maps = eager_weights(model, input_ids=ids)[0]
    away = torch.arange(N)[:, None] - torch.arange(N)
    distance = (maps * away).sum(-1)[..., start:].mean(-1)
    order = distance.flatten().argsort().tolist()
    assert {layer * 4 + h for layer, h in found.heads.local} == set(order[:3])
    assert {layer * 4 + h for layer, h in found.heads.far} == set(order[-3:])
    local = torch.stack([maps[layer, h] for layer, h in found.heads.local]).mean(0)
    far = torch.stack([maps[layer, h] for layer, h in found.heads.far]).mean(0)
    waad = (local * away.clamp(max=10)).sum(-1)[start:]
    np.testing.assert_allclose(found.waad, waad, rtol=1e-3, atol=1e-4)
    fai = []
    for s in range(start, N):
        rows = list(range(max(s + 10, start), min(N - 1, s + 30) + 1))
        fai.append(float(far[rows, s].mean()) if rows else 0.0)
    np.testing.assert_allclose(found.fai, fai, rtol=1e-3, atol=1e-5)
    assert (found.fai[-10:] == 0).all()
    logp = model(ids).logits[0, start:].log_softmax(-1)
    np.testing.assert_allclose(found.entropy, -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)
    assert found.to_json()["start"] == start and len(found.to_json()["waad"]) == N - start
    some = model_rhythm(model, ids, layers=[1])
    assert {layer for layer, _ in some.heads.local} == {1}


def text(seed: int, coupled: bool) -> Rhythm:
    """A made-up text of 200 tokens; where coupled, anchors follow preplan tokens and these are uncertain."""
    rng = np.random.default_rng(seed)
    preplan = np.sort(rng.choice(180, 15, replace=False)) + 5
    anchors = np.unique(preplan[:10] + 1) if coupled else np.sort(rng.choice(200, 12, replace=False))
    entropy = rng.random(200)
    if coupled:
        entropy[preplan] += 1
    nothing = np.zeros(200)
    with torch.no_grad(), record(tiny(), rhythm_probes()) as rec:
        pass
    return Rhythm(0, nothing, nothing, entropy, preplan, anchors, split_heads(torch.rand(2, 2)), rec)


def test_what_the_rhythm_shows_has_intervals_that_exclude_one_only_when_it_is_there() -> None:
    there, nothing = [text(i, True) for i in range(12)], [text(100 + i, False) for i in range(20)]
    for measure in (entropy_at_peaks, coupling):
        yes, no = measure(there), measure(nothing)
        assert yes.low > 1 and yes.ratio > 1.5 and yes.low <= yes.ratio <= yes.high
        assert no.low < 1 < no.high
        assert measure(there) == yes, "seeded"


def test_anchors_that_follow() -> None:
    assert follows(np.array([3, 10, 20]), np.array([3, 9, 18])) == pytest.approx(2 / 3)
    assert follows(np.array([3, 10]), np.array([3, 9]), within=0) == 0.5
    assert np.isnan(follows(np.array([]), np.array([3])))


@torch.no_grad()
def test_receiver_heads() -> None:
    model = tiny()
    found = model_rhythm(model, tokens(1, N))
    heads = receivers(found, 0.25)
    assert len(heads) == 3
    values = found.recording["fai"].values.double()
    centred = values - values.mean(-1, keepdim=True)
    kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square()
    assert heads[0] == tuple(int(i) for i in torch.unravel_index(kurtosis.argmax(), kurtosis.shape))
    ratio = receiver_agreement([found, model_rhythm(model, tokens(1, N, seed=5))], 0.25)
    assert 0 <= ratio.observed <= 1 and ratio.reference > 0


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match="needs at least 2"):
        bootstrap_ratio(np.array([1.0, np.nan]), np.array([1.0, 1.0]))
    with torch.no_grad(), record(model := tiny(), rhythm_probes()) as rec:
        model(tokens(2, 30))
    with pytest.raises(ShapeError, match="several sequences"):
        rhythm_of(rec)
    with pytest.raises(ShapeError, match="start is 30"):
        model_rhythm(tiny(), tokens(1, 30), start=30)
