"""Every figure of a layer profile against the full matrix in float64, for every kind of mask that models use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.core.base_mask import BaseMask
from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels.dispatch import prepare
from foveal.lens import profile_attention, received_mass, row_masses, scores
from foveal.patterns import SlidingWindow

from .brute import brute_force

N, D, WINDOW, SINKS = 150, 16, 20, 3


def random(*shape: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def padding(lengths: list[int], side: str) -> Tensor:
    place = torch.arange(N)
    return torch.stack([(place >= N - n) if side == "left" else (place < n) for n in lengths])


def documents(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "grouped_heads": {"kv_heads": 2},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": random(4, 2 * 40 + 1, seed=5)},
    "learned_sink": {"sink_logits": torch.tensor([-2.0, 0.0, 3.0, 9.0])},
    "everything_at_once": {
        "kv_heads": 2, "scale": 0.4, "softcap": 5.0, "bias": random(4, 31, seed=6), "sink_logits": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "mask": {"causal": True, "valid": padding([150, 97], "left")},
    },
    "left_padding": {"mask": {"causal": True, "valid": padding([150, 60], "left")}},
    "right_padding": {"mask": {"causal": True, "valid": padding([150, 60], "right")}},
    "one_real_token": {"mask": {"causal": True, "valid": padding([150, 1], "left")}},
    "no_real_token": {"mask": {"causal": True, "valid": padding([150, 0], "left")}},
    "own_window": {"mask": {"causal": True, "window": 33}},
    "own_window_inside_ours": {"mask": {"causal": True, "window": 7}},
    "chunks": {"mask": {"causal": True, "chunk": 32}},
    "documents": {"mask": {"causal": True, "segments": documents([40, 1, 70, 39])}},
    "second_chunk_of_a_prefill": {"q_len": 50, "mask": {"causal": True}},
    "static_cache": {"q_len": 50, "mask": {"causal": True, "shift": 30}},
    "one_query": {"q_len": 1, "mask": {"causal": True}},
    "bidirectional": {"mask": {"causal": False}},
    "bidirectional_padded": {"mask": {"causal": False, "valid": padding([150, 90], "right")}},
    "bidirectional_window": {"mask": {"causal": False, "window": 30}},
    "cross": {"q_len": 41, "role": "cross", "mask": {"causal": False, "valid": padding([150, 90], "right")}},
    "predicate": {"mask": {"causal": True, "predicate": lambda b, h, q, k: (k % 3 != 1) | (q == k)}},
    "odd_head_dim": {"head_dim": 5},
    "wide_head": {"head_dim": 80},
}  # fmt: skip


def build(case: str) -> tuple[Tensor, Tensor, BaseMask, dict[str, Any], str]:
    spec = dict(CASES[case])
    mask = spec.pop("mask", {"causal": True})
    q_len, kv_heads, dim, role = (
        spec.pop("q_len", N),
        spec.pop("kv_heads", 4),
        spec.pop("head_dim", D),
        spec.pop("role", "self"),
    )
    q, k = random(2, 4, q_len, dim, seed=1), random(2, kv_heads, N, dim, seed=2)
    return q, k, BaseMask.build(q_len, N, **mask), spec, role


@pytest.mark.parametrize("case", CASES)
def test_all_figures_against_float64(case: str) -> None:
    """With as many sampled rows as there are rows, every figure is exact and every interval has no width."""
    q, k, base, options, role = build(case)
    got = profile_attention(q, k, base, **options, rows=2 * N, window=WINDOW, sinks=SINKS, top=10, role=role)
    want = brute_force(q, k, base, **options, role=role)
    sink, window = want.sink(SINKS), want.window(WINDOW) & ~want.sink(SINKS)
    if role == "cross":
        window = torch.zeros_like(window)

    def close(name: str, value: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 2e-5) -> None:
        torch.testing.assert_close(
            value.double(), expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )

    close("sink_mass", got.sink_mass, want.mean((want.weights * sink).sum(-1)))
    close("window_mass", got.window_mass, want.mean((want.weights * window).sum(-1)))
    close("rest_mass", got.rest_mass, want.mean((want.weights * ~(sink | window)).sum(-1)))
    close("learned_sink_mass", got.learned_sink_mass, want.mean(want.learned))
    close(
        "sum",
        got.sink_mass + got.window_mass + got.rest_mass + got.learned_sink_mass,
        torch.ones(4, dtype=torch.float64),
    )
    away = (want.given_keys * want.away().abs()).sum(-1)
    close("distance", got.distance.mean, want.mean(away) * (torch.nan if role == "cross" else 1.0), atol=2e-3)
    assert got.real_rows == int(want.real.sum())
    allowed = want.allowed()
    entropy, keys90 = want.entropy(), want.keys_for(0.9).double()
    close("entropy", got.entropy.mean, want.mean(entropy), atol=1e-4)
    normalized = entropy / allowed.clamp(min=2).log()[:, None]
    close("entropy_normalized", got.entropy_normalized.mean, want.mean(normalized, allowed > 1), atol=1e-4)
    close("keys90", got.keys90.mean, want.mean(keys90))
    close("keys90_share", got.keys90_share.mean, want.mean(keys90 / allowed.clamp(min=1)[:, None]))
    for name, p in (("keys90_q10", 0.1), ("keys90_median", 0.5), ("keys90_q90", 0.9)):
        expected = [want.values(keys90, h).sort().values[math.ceil(p * got.real_rows - 1e-6) - 1] for h in range(4)]
        close(name, getattr(got, name).mean, torch.stack(expected))
    for name in ("entropy", "entropy_normalized", "keys90", "keys90_share", "keys90_median", "distance"):
        estimate = getattr(got, name)
        close(name + ".low", estimate.low, estimate.mean, rtol=0, atol=0)
        close(name + ".high", estimate.high, estimate.mean, rtol=0, atol=0)
    per_key = (want.given_keys * want.real[:, None, :, None]).sum(2) / want.real.sum(-1).clamp(min=1)[:, None, None]
    close("received", got.received, per_key)
    some = want.real.any(-1, keepdim=True).double().expand(2, 4)
    close("received sum", got.received.sum(-1), some)
    per_key = (
        per_key * torch.where(some > 0, 1.0, torch.nan)[..., None]
    )  # a sequence without a real token has no figure
    close("top_keys", got.top_keys_share.mean, per_key.gather(-1, got.top_keys), atol=1e-5)
    close("top_keys are the top", got.top_keys_share.mean, per_key.topk(got.top_keys.shape[-1]).values, atol=1e-5)


@pytest.mark.parametrize("case", ["grouped_heads", "left_padding", "own_window", "bidirectional", "bias"])
def test_selected_sets(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first set holds the top keys of all heads' mean weights, the others those of one key head's query heads."""
    monkeypatch.setattr(scores, "CPU_SCORES", 1 << 10)  # many chunks of rows, each with a range of keys of its own
    q, k, base, options, _ = build(case)
    got = profile_attention(q, k, base, **options, rows=40, window=WINDOW, sinks=SINKS, top=10)
    want = brute_force(q, k, base, **options)
    kv_heads = k.shape[1]
    per_kv = want.given_keys.view(2, kv_heads, 4 // kv_heads, base.q_len, N).mean(2)
    sets = torch.cat([per_kv.mean(1, keepdim=True), per_kv], 1)
    for b in range(2):
        for r in torch.nonzero(got.rows.weight[b]).flatten().tolist():
            row = int(got.rows.index[b, r])
            assert bool(want.real[b, row])
            visible = int(want.seen[b, row].sum())
            assert int(got.allowed[b, r]) == visible
            for s in range(1 + kv_heads):
                chosen = got.selected[b, s, r]
                assert int((chosen >= 0).sum()) == min(10, visible)
                mine = sets[b, s, row, chosen[chosen >= 0].long()].sum()
                assert torch.isclose(mine, sets[b, s, row].topk(min(10, visible)).values.sum(), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_masses_of_every_row(case: str) -> None:
    """mass on the window = exp(lse_window − lse_all), and V = indicator: for each single row, not only on average."""
    q, k, base, options, role = build(case)
    want = brute_force(q, k, base, **options, role=role)
    sink_logits = options.pop("sink_logits", None)
    bias, softcap = options.pop("bias", None), options.pop("softcap", None)
    call = prepare(q, k, k, causal=True, bias=bias, softcap=softcap, return_lse=True, **options).replace(base=base)
    got = row_masses(call, sink_logits, window=WINDOW, sinks=SINKS, role=role)  # type: ignore[arg-type]
    assert torch.equal(got.real, want.real)
    window = torch.zeros_like(want.window(WINDOW)) if role == "cross" else want.window(WINDOW)
    for value, mask in ((got.sink, want.sink(SINKS)), (got.window, window & ~want.sink(SINKS))):
        torch.testing.assert_close(value.double(), (want.weights * mask).sum(-1), rtol=1e-4, atol=3e-6)
    torch.testing.assert_close(
        got.learned_sink.double(),
        want.learned * (want.seen.any(-1)[:, None] | (want.learned > 0)),
        rtol=1e-4,
        atol=3e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_positions(dtype: torch.dtype) -> None:
    """A bfloat16 output would round a mean position of 4900 by up to 16 tokens; the distance must not be off by one."""
    rows, n = 300, 5000  # blocks of more than 256 keys, so that positions inside a block need two columns
    q, k = random(1, 3, rows, 16, seed=3).to(dtype), random(1, 3, n, 16, seed=4).to(dtype)
    near = torch.zeros(3, 2 * 2000 + 1)  # head 0 looks back a few tokens, head 1 some hundreds, head 2 everywhere
    near[0, :2000], near[1, :2000] = torch.linspace(-400, 0, 2000), torch.linspace(-7, 0, 2000)
    base = BaseMask.build(rows, n, causal=True)
    got = profile_attention(q, k, base, 0.1, bias=near, rows=8)
    want = brute_force(q, k, base, scale=0.1, bias=near)
    distance = want.mean((want.given_keys * want.away()).sum(-1))
    assert float(distance[0]) < 20 < 200 < float(distance[1]) < 500 < 2000 < float(distance[2])
    torch.testing.assert_close(got.distance.mean, distance, rtol=2e-3, atol=0.2)
    call = prepare(q, k, k, causal=True, scale=0.1, bias=near, return_lse=True)
    each = row_masses(call, None, window=64, sinks=4).distance
    assert each is not None
    torch.testing.assert_close(each.double(), (want.given_keys * want.away()).sum(-1), rtol=1e-2, atol=0.6)
    torch.testing.assert_close(got.sink_mass, want.mean((want.weights * want.sink(4)).sum(-1)), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("case", ["causal", "grouped_heads", "left_padding", "softcap", "bidirectional", "bias"])
def test_received_mass_is_the_gradient(case: str) -> None:
    """Column sums equal the gradient with respect to V, over all rows and under a sparse layout."""
    q, k, base, options, _ = build(case)
    want = brute_force(q, k, base, **options)
    call = prepare(q, k, k, causal=True, return_lse=True, **options).replace(base=base)
    per_key = (want.given_keys * want.real[:, None, :, None]).sum(2) / want.real.sum(-1)[:, None, None]
    torch.testing.assert_close(received_mass(call, want.real).double(), per_key, rtol=1e-4, atol=1e-6)
    if case in ("causal", "bidirectional"):
        from foveal.core.context import SelectContext

        layout, _ = SlidingWindow(window=WINDOW, sinks=SINKS).select(q, k, SelectContext(base=base))
        kept = want.given_keys * (want.window(WINDOW) | want.sink(SINKS))
        per_key = (kept / kept.sum(-1, keepdim=True)).mean(2)
        torch.testing.assert_close(received_mass(call.replace(layout=layout)).double(), per_key, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [1, 149, 150, 1000])
def test_window_of_any_size(window: int) -> None:
    for case in ("causal", "bidirectional"):
        q, k, base, _, _ = build(case)
        got = profile_attention(q, k, base, window=window, sinks=SINKS)
        want = brute_force(q, k, base)
        expected = want.mean((want.weights * (want.window(window) & ~want.sink(SINKS))).sum(-1))
        torch.testing.assert_close(got.window_mass, expected, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the most elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.dtype != torch.bool:
                self.most = max(self.most, t.numel())
        return out


def test_no_tensor_grows_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    n, heads, dim = 2048, 4, 16
    monkeypatch.setattr(scores, "CPU_SCORES", 1 << 15)
    q, k = random(1, heads, n, dim, seed=1), random(1, heads, n, dim, seed=2)
    with Largest() as seen:
        profile_attention(q, k, rows=64, window=64)
    linear = heads * n * dim
    assert seen.most <= linear, f"{seen.most} elements; q has {linear}, the scores {heads * n * n}"


def test_dead_sink_local_and_global_heads_are_named() -> None:
    n, dim = 400, 16
    q, k = torch.zeros(1, 5, n, dim), random(1, 5, n, dim, seed=1, spread=0.1)
    q[..., 0] = 1.0
    k[:, 0, 0, 0], k[:, 1, 0, 0] = 100.0, 28.0  # head 0: all on key 0; head 1: most of it
    out = random(1, 5, n, dim, seed=2)
    out[:, 4] *= 1e-4  # head 4 puts out nothing
    ramp = torch.zeros(5, 2 * 300 + 1)
    ramp[2, :300] = torch.linspace(-90, 0, 300)  # head 2: the last few tokens
    got = profile_attention(q, k, bias=ramp, window=32, sinks=4, out=out)
    assert got.labels == ["dead", "sink", "local", "global", "dead"]
    assert float(got.sink_mass[0]) > 0.99 and 0.5 < float(got.sink_mass[1]) < 0.99
    assert got.top_keys[0, 0, 0] == 0 and got.top_keys[0, 1, 0] == 0
    assert profile_attention(q, k, bias=ramp, window=32, sinks=4).labels[4] == "global"
    learned = profile_attention(q, k, sink_logits=torch.tensor([0.0, 0.0, 0.0, 9.0, 30.0]), window=32, sinks=4)
    assert learned.labels[3:] == ["sink", "dead"]


def test_same_seed_same_figures_other_seed_other_rows() -> None:
    q, k = random(1, 4, 500, D, seed=1), random(1, 4, 500, D, seed=2)
    first, again, other = (profile_attention(q, k, rows=50, seed=s) for s in (3, 3, 4))
    assert first.to_json() == again.to_json()
    assert not torch.equal(first.rows.index, other.rows.index)
    assert torch.equal(first.sink_mass, other.sink_mass)


def test_bad_settings_are_named() -> None:
    q, k = random(1, 4, 20, D), random(1, 4, 20, D)
    for options, name in (
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"top": 0}, "top is 0"),
        ({"rows": 1}, "rows is 1"),
    ):
        with pytest.raises(ConfigError, match=name):
            profile_attention(q, k, **options)
    with pytest.raises(ShapeError, match="base was built for"):
        profile_attention(q, k, BaseMask.build(20, 21, causal=True))
    with pytest.raises(ShapeError, match="num_heads must be a multiple"):
        profile_attention(q, k[:, :3])
