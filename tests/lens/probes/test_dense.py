"""Every probe against its definition on the full matrix of weights, in float64 and float32, in blocks of any height and in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.lens import blocks
from foveal.lens.probes import (
    Atlas,
    ChosenRows,
    Entropy,
    Influence,
    LookBack,
    Mass,
    Received,
    SinkScore,
    TopEdges,
    WindowedDistance,
)

from ..brute import Brute
from ..calls import HOSTS, Host, array, dense, event, recorded, tensors

Definition = Callable[[Brute], Tensor]


def real(b: Brute) -> Tensor:
    return b.real[:, None]


def weights(b: Brute) -> Tensor:
    """(B, H, Nq, Nk) with the rows of padding out."""
    return b.weights * real(b)[..., None]


def rows_of(per_row: Tensor, b: Brute) -> Tensor:
    return per_row.masked_fill(~real(b), torch.nan)


def keys_of(per_key: Tensor, b: Brute) -> Tensor:
    return per_key.masked_fill(~real(b), torch.nan)


def influence(b: Brute, near: int, far: int | None, start_row: int = 0) -> Tensor:
    away = b.away()
    inside = (away >= near) & (away <= (far if far is not None else 10**9))
    inside = inside & (torch.arange(b.base.q_len) >= start_row)[:, None]
    counted = (inside & b.real[..., None])[:, None]
    count = counted.sum(-2)
    return keys_of((weights(b) * counted).sum(-2) / count.clamp(min=1), b)


def windowed(b: Brute, window: int) -> Tensor:
    return rows_of((b.given_keys * b.away().abs().clamp(max=window)).sum(-1), b)


def atlas(b: Brute, cells: int) -> Tensor:
    n = b.base.q_len
    size = max(1, -(-n // cells))
    cell = torch.arange(n) // size
    one_hot = (cell[:, None] == torch.arange(int(cell[-1]) + 1)).double()
    count = (b.real.double() @ one_hot).clamp(min=1)
    return one_hot.T @ weights(b) @ one_hot / count[:, None, :, None]


def mass(b: Brute, *sets: tuple[int, ...]) -> Tensor:
    rank = b.base.rank.expand(b.weights.shape[0], -1)
    on = [torch.isin(rank, torch.tensor(s))[:, None, None] for s in sets]
    return torch.stack([rows_of((b.weights * o).sum(-1), b) for o in on], -1)


CASES: dict[str, tuple[Any, Definition]] = {
    "entropy": (Entropy(), lambda b: rows_of(b.entropy(), b)),
    "mass": (Mass({"first": (0,), "few": (0, 3, 4)}), lambda b: mass(b, (0,), (0, 3, 4))),
    "received": (Received(), lambda b: keys_of(weights(b).sum(-2), b)),
    "sink score": (SinkScore(), lambda b: influence(b, 1, None)),
    "influence to the end": (Influence(10), lambda b: influence(b, 10, None)),
    "influence in a band": (Influence(2, 9), lambda b: influence(b, 2, 9)),
    "influence of one distance": (Influence(3, 3), lambda b: influence(b, 3, 3)),
    "influence on a response": (Influence(1, 12, 15), lambda b: influence(b, 1, 12, 15)),
    "lookback": (LookBack(), lambda b: rows_of((b.given_keys * b.away().abs()).sum(-1), b)),
    "windowed distance": (WindowedDistance(), lambda b: windowed(b, 10)),
    "windowed distance of 1": (WindowedDistance(1), lambda b: windowed(b, 1)),
    "rows": (ChosenRows((0, 5, 20)), lambda b: weights(b)[:, :, [0, 5, 20]]),
    "atlas": (Atlas(6), lambda b: atlas(b, 6)),
}


def check(probe: Any, want: Tensor, host: Host, dtype: torch.dtype, tolerance: float) -> None:
    given = tensors(host, dtype)
    got = array(recorded({"x": probe}, event(host, given)), "x")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("height", [1 << 19, 150])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case: str, host: str, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", height)
    probe, define = CASES[case]
    if host == "one head, one row":
        probe = {"rows": ChosenRows((0,)), "mass": Mass({"first": (0,)})}.get(case, probe)
        define = {"rows": weights, "mass": lambda b: mass(b, (0,))}.get(case, define)
    given = tensors(HOSTS[host])
    check(probe, define(dense(HOSTS[host], given)), HOSTS[host], torch.float64, 1e-11)


@pytest.mark.parametrize(
    "host",
    [Host(rows=700, heads=6, kv_heads=2), Host({"causal": True, "window": 90}, heads=6, rows=300)],
    ids=["causal", "window"],
)
@pytest.mark.parametrize("case", CASES)
def test_float32_is_exact_to_1e5(case: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 1 << 15)  # many blocks, which do not begin at key 0 under the window
    probe, define = CASES[case]
    given = tensors(host, torch.float32)
    check(probe, define(dense(host, given)), host, torch.float32, 1e-5)


@pytest.mark.parametrize("host", ["causal", "window", "left padding", "softcap, bias, learned sink"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "atlas"])
def test_chunks_and_decode_steps_equal_one_pass(case: str, host: str) -> None:
    probe, h = CASES[case][0], HOSTS[host]
    given = tensors(h)
    whole = array(recorded({"x": probe}, event(h, given)), "x")
    cuts = [0, 10, 11, 30, *range(31, h.rows + 1)]
    chunks = [event(h, given, slice(a, b)) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(
        array(recorded({"x": probe}, *chunks), "x"), whole, equal_nan=True, rtol=1e-12, atol=1e-12
    )


def test_cells_of_an_atlas_join_when_chunks_outgrow_it() -> None:
    h = Host(rows=96)
    given = tensors(h)
    rec = recorded({"x": Atlas(4)}, *(event(h, given, slice(a, a + 8)) for a in range(0, 96, 8)))
    found = rec["x"]
    assert found.shape[-1] <= 8 and found.labels("key_cell")[1] == 16
    want = atlas(dense(h, given), 6)
    torch.testing.assert_close(array(rec, "x"), want)


@pytest.mark.parametrize("height", [1 << 19, 64])
@pytest.mark.parametrize("host", ["causal", "window", "left padding", "packed", "many heads", "bidirectional"])
@pytest.mark.parametrize(("sinks", "distance"), [(1, 1), (0, 0), (2, 4)])
def test_top_edges(host: str, sinks: int, distance: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", height)
    h = HOSTS[host]
    given = tensors(h)
    b = dense(h, given)
    count = 9
    hidden = b.sink(sinks) | (b.away().abs() < distance)
    best = weights(b).masked_fill(hidden, 0.0)
    want = best.flatten(-2).topk(count).values
    rec = recorded({"e": TopEdges(count, sinks, distance)}, event(h, given))
    torch.testing.assert_close(array(rec, "e.weight"), want)
    query, key = array(rec, "e.query"), array(rec, "e.key")
    at = torch.arange(h.batch)[:, None, None], torch.arange(h.heads)[None, :, None]
    torch.testing.assert_close(best[*at, query, key], want)


def test_top_edges_that_do_not_exist() -> None:
    h = Host(rows=3)
    rec = recorded({"e": TopEdges(5, 0, 1)}, event(h, tensors(h)))
    assert array(rec, "e.weight").isnan().sum(-1).unique().tolist() == [2]
    assert (array(rec, "e.key")[..., 3:] == -1).all()


def test_lookback_without_the_first_tokens() -> None:
    h = HOSTS["causal"]
    given = tensors(h)
    b = dense(h, given)
    rest = b.given_keys * (torch.arange(h.rows) >= 3)
    want = (rest * b.away()).sum(-1) / rest.sum(-1).clamp(min=1e-30)
    torch.testing.assert_close(array(recorded({"x": LookBack(3)}, event(h, given)), "x"), want)
