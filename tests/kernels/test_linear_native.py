"""Linear attention in C++ against the reference in float64: every instruction set, edges of chunks, spans of threads, gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveal.core.errors import ConfigError, UnsupportedError
from foveal.kernels import native
from foveal.kernels.linear import LinearState, linear_attention, linear_step
from foveal.kernels.linear_ragged import linear_attention_packed

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(native.unavailable() is not None, reason=f"native {native.unavailable()}"),
]
CAUSAL = pytest.mark.parametrize("causal", [False, True])
TOLERANCE = 1e-5
if native.unavailable() is None:
    from foveal.kernels.native import linear as cpp


@pytest.fixture
def set_threads() -> Iterator[Any]:
    """A setter of the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(
    batch: int, heads: int, kv_heads: int, n: int, f: int, d: int, *, keys: int | None = None, seed: int = 0
) -> list[Tensor]:
    """q, k of positive features, v of both signs, and a state; float32."""
    g = torch.Generator().manual_seed(seed)
    m = n if keys is None else keys
    return [
        torch.rand(batch, heads, n, f, generator=g),
        torch.rand(batch, kv_heads, m, f, generator=g),
        torch.randn(batch, kv_heads, m, d, generator=g),
        torch.randn(batch, kv_heads, f, d, generator=g),
        torch.rand(batch, kv_heads, f, generator=g),
    ]


def results(
    tensors: list[Tensor], impl: str, cu: Tensor | None = None, grad: bool = True, **options: Any
) -> dict[str, Tensor]:
    """Out, state, and the gradients of a random combination of them; ``reference`` runs on float64 copies."""
    leaves = [(x.double() if impl == "reference" else x).detach().requires_grad_(grad) for x in tensors]
    state = LinearState(leaves[3], leaves[4]) if len(leaves) > 3 else None
    if cu is None:
        out, end = linear_attention(*leaves[:3], state=state, impl=impl, **options)
    else:
        out, end = linear_attention_packed(*leaves[:3], cu, state=state, impl=impl, **options)
    found = {"out": out, "kv": end.kv, "k": end.k}
    if grad:
        g = torch.Generator().manual_seed(9)
        weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in found.values()]
        loss = sum((x.double() * w).sum() for x, w in zip(found.values(), weights, strict=True))
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        for name, leaf, x in zip(("dq", "dk", "dv", "dkv", "dz"), leaves, grads, strict=False):
            found[name] = torch.zeros_like(leaf) if x is None else x
    return {name: x.detach() for name, x in found.items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Errors relative to a tensor's largest value, or a tenth of all tensors' where its own terms cancel."""
    floor = max((0.1 * float(x.detach().abs().max()) for x in want.values() if x.numel()), default=0.0)
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        if x.numel():
            off = float((got[name].double() - x.double()).detach().abs().max()) / max(
                float(x.detach().abs().max()), floor, 1e-3
            )
            assert off <= tolerance, f"{name} is off by {off:.1e} of the largest value"


def check(tensors: list[Tensor], cu: Tensor | None = None, **options: Any) -> None:
    same(results(tensors, "native", cu, **options), results(tensors, "reference", cu, **options))


@settings(max_examples=60)
@given(
    length=st.integers(1, 150),
    keys=st.integers(1, 150),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    f=st.integers(1, 40),
    d=st.integers(1, 40),
    causal=st.booleans(),
    normalise=st.booleans(),
    with_state=st.booleans(),
    seed=st.integers(0, 9),
)
def test_random_calls(
    length: int, keys: int, batch: int, kv_heads: int, groups: int, f: int, d: int, causal: bool, normalise: bool, with_state: bool,
    seed: int,
) -> None:  # fmt: skip
    tensors = inputs(
        batch, kv_heads * groups, kv_heads, length, f, d, keys=length if causal else keys, seed=seed
    )  # fmt: skip
    check(tensors if with_state else tensors[:3], causal=causal, normalise=normalise, eps=1e-3)


@pytest.mark.parametrize("n", [1, 11, 12, 13, 16, 47, 48, 49, 60, 95, 96, 97, 240])
@CAUSAL
def test_edges_of_chunks_on_every_instruction_set(isa: str, n: int, causal: bool) -> None:
    check(inputs(1, 2, 1, n, 17, 33), causal=causal)


@pytest.mark.parametrize(("f", "d"), [(1, 1), (15, 16), (16, 64), (64, 64), (65, 63), (8, 256), (256, 8)])
def test_edges_of_widths_on_every_instruction_set(isa: str, f: int, d: int) -> None:
    check(inputs(1, 1, 1, 100, f, d), causal=True)
    check(inputs(1, 1, 1, 100, f, d), causal=False)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_spans_of_many_threads_change_nothing(set_threads: Any, count: int, causal: bool, kv_heads: int) -> None:
    tensors = inputs(1, 2 * kv_heads, kv_heads, 1203, 32, 32)
    set_threads(count)
    check(tensors, causal=causal)
    if not causal:
        check(inputs(1, 2, 1, 1203, 32, 32, keys=3), causal=causal)
        check(inputs(1, 2, 1, 3, 32, 32, keys=1203), causal=causal)


@CAUSAL
def test_runs_are_bitwise_equal_at_a_fixed_number_of_threads(set_threads: Any, causal: bool) -> None:
    tensors = inputs(1, 2, 1, 1500, 32, 32)
    for count in (2, 5):
        set_threads(count)
        first = results(tensors, "native", causal=causal)
        for _ in range(3):
            again = results(tensors, "native", causal=causal)
            assert all(torch.equal(first[name], again[name]) for name in first)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=6),
    groups=st.integers(1, 2),
    causal=st.booleans(),
    normalise=st.booleans(),
    with_state=st.booleans(),
    seed=st.integers(0, 9),
)
def test_random_calls_of_packed_sets(
    sizes: list[int], groups: int, causal: bool, normalise: bool, with_state: bool, seed: int
) -> None:
    packed, cu = sets(sizes, groups, seed)
    check(packed if with_state else packed[:3], cu, causal=causal, normalise=normalise, eps=1e-3)


def sets(sizes: list[int], groups: int = 1, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    q, k, v, *_ = inputs(1, 2 * groups, 2, sum(sizes), 9, 20, seed=seed)
    state = inputs(len(sizes), 2, 2, 1, 9, 20, seed=seed)[3:]
    cu = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return [*(x[0].transpose(0, 1).contiguous() for x in (q, k, v)), *state], cu


@CAUSAL
@pytest.mark.parametrize("sizes", [[900, 3, 0, 50], [0, 40, 2000], [300, 300, 300], [0], []], ids=str)
def test_packed_sets_with_a_long_one_on_many_threads(set_threads: Any, causal: bool, sizes: list[int]) -> None:
    packed, cu = sets(sizes)
    set_threads(3)
    check(packed, cu.to(torch.int32), causal=causal, grad=bool(sum(sizes)))


@CAUSAL
def test_packed_sets_and_heads_never_mix_nan(causal: bool) -> None:
    packed, cu = sets([70, 120, 3])
    out = results(packed, "native", cu, causal=causal, grad=False)["out"]
    packed[2] = packed[2].clone()
    packed[2][70:190, 0] = torch.nan
    other = results(packed, "native", cu, causal=causal, grad=False)["out"]
    kept = torch.ones(193, 2, dtype=torch.bool)
    kept[70:190, 0] = False
    assert torch.equal(other[kept], out[kept]) and bool(other[~kept].isnan().all())


def test_the_future_changes_nothing_when_causal(set_threads: Any) -> None:
    q, k, v, *state = inputs(1, 2, 1, 900, 16, 16)
    set_threads(2)
    out = results([q, k, v, *state], "native", causal=True, grad=False)["out"]
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 501:], v2[:, :, 501:] = 3.0, -2.0
    other = results([q, k2, v2, *state], "native", causal=True, grad=False)["out"]
    assert torch.equal(out[:, :, :501], other[:, :, :501]) and not torch.equal(out, other)


def test_any_strides_without_copies() -> None:
    q, k, v, *state = inputs(2, 4, 2, 60, 12, 20)
    want = results([q, k, v, *state], "native", causal=True)
    odd = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        torch.cat([v, v], -1)[..., ::2].contiguous().repeat_interleave(2, -1)[..., ::2],
    ]
    odd[2] = v.repeat_interleave(3, -1)[..., ::3]
    assert not any(x.is_contiguous() for x in odd)
    got = results([*odd, *state], "native", causal=True)
    assert all(torch.equal(got[name], want[name]) for name in want)
    expanded = [q[:, :1].expand(-1, 4, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v]
    check([*expanded, *state], causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@CAUSAL
def test_half_precision_on_every_instruction_set(isa: str, dtype: torch.dtype, causal: bool) -> None:
    tensors = [x.to(dtype).requires_grad_() for x in inputs(1, 2, 1, 200, 16, 16)[:3]]
    out, state = linear_attention(*tensors, causal=causal, impl="native")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want, end = linear_attention(*exact, causal=causal, impl="reference")
    assert (out.dtype, state.kv.dtype) == (dtype, torch.float32)
    same({"kv": state.kv}, {"kv": end.kv})
    eps = torch.finfo(dtype).eps
    same({"out": out}, {"out": want}, eps)
    ones = torch.ones_like(out)
    grads = torch.autograd.grad(out, tensors, ones), torch.autograd.grad(want, exact, ones.double())
    for a, b in zip(*grads, strict=True):
        assert a.dtype == dtype
        same({"grad": a}, {"grad": b}, eps)


@pytest.mark.parametrize("normalise", [False, True])
def test_segments_with_a_carried_state_equal_one_pass_and_single_steps(normalise: bool) -> None:
    q, k, v, *start = inputs(1, 2, 2, 137, 8, 8)
    whole, end = linear_attention(q, k, v, causal=True, normalise=normalise, state=LinearState(*start), impl="native")
    state, outs = LinearState(*start), []
    for a, b in ((0, 1), (1, 12), (12, 12), (12, 136)):
        part = (x[:, :, a:b] for x in (q, k, v))
        out, state = linear_attention(*part, causal=True, normalise=normalise, state=state, impl="native")
        outs.append(out)
    last, state = linear_step(q[:, :, 136], k[:, :, 136], v[:, :, 136], state, normalise=normalise)
    same(
        {"out": torch.cat([*outs, last[:, :, None]], 2), "kv": state.kv, "k": state.k},
        {"out": whole, "kv": end.kv, "k": end.k},
    )


@CAUSAL
def test_edges_without_rows_or_weight(causal: bool) -> None:
    tensors = inputs(2, 2, 1, 0, 4, 4)
    found = results(tensors, "native", causal=causal)
    assert torch.equal(found["kv"], tensors[3]) and found["out"].shape == (2, 2, 0, 4)
    none = results(inputs(0, 2, 1, 5, 4, 4), "native", causal=causal)
    assert none["out"].shape == (0, 2, 5, 4)
    q, k, v, *_ = inputs(1, 1, 1, 9, 4, 4)
    blind = results([q * 0, k, v], "native", causal=causal)
    assert bool((blind["out"] == 0).all()) and all(bool(x.isfinite().all()) for x in blind.values())


@CAUSAL
def test_padding_counts_for_nothing(causal: bool) -> None:
    q, k, v, *_ = inputs(2, 2, 2, 121, 8, 8)
    valid = torch.ones(2, 121, dtype=torch.bool)
    valid[0, 80:] = False
    bad = [torch.where(valid[:, None, :, None], x, torch.nan) for x in (q, k, v)]
    got, _ = linear_attention(*bad, causal=causal, valid=valid, impl="native")
    alone, _ = linear_attention(*(x[:1, :, :80] for x in (q, k, v)), causal=causal, impl="native")
    torch.testing.assert_close(got[:1, :, :80], alone)
    assert bool((got[0, :, 80:] == 0).all())


def test_which_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = cpp.product
    monkeypatch.setattr(cpp, "product", lambda *a, **k: (calls.append(1), real(*a, **k))[1])

    def runs(*tensors: Tensor, impl: str = "fast") -> bool:
        calls.clear()
        linear_attention(*tensors, causal=True, impl=impl)  # type: ignore[arg-type]
        return bool(calls)

    q, k, v, *_ = inputs(1, 1, 1, 9, 4, 4)
    assert runs(q, k, v) and runs(q, k, v, impl="native")
    assert not runs(q, k, v, impl="chunked") and not runs(q, k, v, impl="reference")
    assert not runs(q.double(), k.double(), v.double())
    wide = inputs(1, 1, 1, 9, 257, 4)[:3]
    assert not runs(*wide)
    with pytest.raises(UnsupportedError, match="computes in float32 or lower"):
        runs(q.double(), k.double(), v.double(), impl="native")
    with pytest.raises(UnsupportedError, match="takes 1 to 256 features and channels, not 257 and 4"):
        runs(*wide, impl="native")
    with pytest.raises(ConfigError, match="Did you mean 'native'"):
        runs(q, k, v, impl="nativ")


def test_without_the_compiled_part_the_torch_form_runs() -> None:
    code = """
import sys
sys.modules["foveal.kernels.native._native"] = None
import torch
from foveal.kernels.linear import linear_attention
from foveal.kernels.linear_ragged import linear_attention_packed
q = torch.rand(1, 2, 20, 8)
fast, wanted = (linear_attention(q, q, q, causal=True, impl=i)[0] for i in ("fast", "chunked"))
assert torch.equal(fast, wanted)
linear_attention_packed(q[0], q[0], q[0], torch.tensor([0, 2]))
try:
    linear_attention(q, q, q, impl="native")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("UnsupportedError impl='native' needs its C++ part"), done.stderr


@pytest.mark.parametrize("normalise", [False, True])
@CAUSAL
def test_opcheck(causal: bool, normalise: bool) -> None:
    q, k, v, kv, z = (x.requires_grad_() for x in inputs(1, 4, 2, 60, 6, 5))
    start = torch.cat([kv, z[..., None]], -1) if normalise else kv
    q, k, v = q.unflatten(1, (2, 2)), k[:, :, None], v[:, :, None]
    rest = None, None, start.detach().requires_grad_()
    torch.library.opcheck(cpp._product, (q, k, v, *rest, None, causal, False, normalise, 1e-3))
    flat = (x[:, :, :, :50].detach().requires_grad_() for x in (q, k, v))
    cu = torch.tensor([0, 20, 50])
    sets = start.detach().repeat(2, 1, 1, 1).requires_grad_()
    torch.library.opcheck(cpp._product, (*flat, None, None, sets, cu, causal, False, normalise, 1e-3))


def test_compiled_whole_graph_equals_eager() -> None:
    leaves = [x.requires_grad_() for x in inputs(1, 2, 1, 100, 8, 8)]

    def loss(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor) -> Tensor:
        out, state = linear_attention(2 * q, k, v, causal=True, state=LinearState(kv, z), impl="native")
        return out.square().sum() + state.kv.sum()

    grads = [
        torch.autograd.grad(how(*leaves), leaves)
        for how in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(reentrant: bool) -> None:
    leaves = [x.requires_grad_() for x in inputs(1, 2, 1, 100, 8, 8)[:3]]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, causal=True, impl="native")[0]

    plain = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, plain, strict=True))


def test_second_derivatives_raise() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 1, 9, 4, 4)[:3])
    out, _ = linear_attention(q, k, v, causal=True, impl="native")
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), q, create_graph=True)


def test_the_compiled_door_checks_what_it_is_told() -> None:
    q, k, v, *_ = inputs(1, 1, 1, 9, 4, 4)
    start = torch.zeros(2, 1, 4, 4)
    three = [x[:, :, None] for x in (q, k, v)]

    def call(cu: list[int]) -> None:
        cpp._product(*three, None, None, start, torch.tensor(cu), True, False, False, 0.0)

    call([0, 4, 9])
    for cu, said in (([0, 4, 8], "begin at 0"), ([1, 4, 9], "begin at 0"), ([0, 12, 9], "do not rise")):
        with pytest.raises(ValueError, match=said):
            call(cu)
    grouped = [x.expand(-1, -1, 2, -1, -1) for x in three]
    with pytest.raises(ValueError, match="either q has groups"):
        cpp._product(*grouped, None, None, start[:1], None, True, False, False, 0.0)
