"""CARE-Edit's layer: the identities of its spec sheet."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.care import CareLayer, Conditions, Edited
from foveal.layers.care_experts import MaskRepaint, needed, resize
from foveal.layers.care_router import EXPERTS, Router, load_loss, mask_loss, mixture_loss

B, DIM, GRID = 3, 16, (4, 5)
N = GRID[0] * GRID[1]


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(started: bool = False, **changes: object) -> CareLayer:
    """``started`` leaves the zero maps at zero."""
    torch.manual_seed(0)
    model = CareLayer(DIM, **changes).double().eval()
    if not started:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "adapter.up" in name:
                    p.copy_(torch.randn(p.shape, dtype=p.dtype))
    return model


def conditions(**changes: object) -> Conditions:
    given = {
        "text": r(B, 6, DIM, seed=1), "base": r(B, N, DIM, seed=2), "ref": r(B, 6, DIM, seed=3), "ref_grid": (2, 3),
        "latent": r(B, DIM, 8, 3, seed=4), "mask": r(B, 1, 9, 9, seed=5).sigmoid(),
    }  # fmt: skip
    return Conditions(**{**given, **changes})


def edit(model: CareLayer, given: Conditions | None = None, h: Tensor | None = None, **options: object) -> Edited:
    task, time = torch.arange(B) % 4, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return model(
        r(B, N, DIM) if h is None else h, GRID, task, time, conditions() if given is None else given, **options
    )


def selected(logits: Tensor, present: Tensor | None = None, temperature: float = 1.0, **changes: object):
    router = Router(4, 4, **{"share": 0.0, **changes})
    present = torch.ones(len(logits), 4, dtype=torch.bool) if present is None else present
    return router.select(logits, present, temperature, torch.zeros(4))


@pytest.mark.parametrize("output", ["mixture", "sum"])
@pytest.mark.parametrize("dispatch", ["dense", "sparse"])
def test_identity_1_a_new_layer_changes_nothing_at_all(output, dispatch):
    assert torch.equal(edit(layer(True, output=output, dispatch=dispatch)).out, r(B, N, DIM))
    assert not torch.allclose(edit(layer(output=output)).out, r(B, N, DIM))


def test_identity_2_routing_weights():
    logits = r(B, N, 4)
    torch.testing.assert_close(selected(logits, top_k=4, temperature=0.7).weights, torch.softmax(logits / 0.7, -1))
    hard = nn.functional.one_hot(logits.argmax(-1), 4).double()
    torch.testing.assert_close(selected(logits, top_k=1).weights, hard)
    for k in (1, 2, 3, 4):
        for share in (0.0, 0.1, 1.0):
            found = selected(logits, top_k=k, share=share)
            torch.testing.assert_close(found.weights.sum(-1), torch.ones(B, N, dtype=torch.float64))
            assert bool((found.weights >= 0).all()) and bool((found.chosen.sum(-1) == k).all())
            outside = found.weights.masked_fill(found.chosen, 0.0)
            outside[..., EXPERTS.index("base")] = 0
            assert float(outside.abs().max()) == 0
    torch.testing.assert_close(
        selected(logits, top_k=2, share=0.25).weights,
        0.75 * selected(logits, top_k=2).weights + 0.25 * torch.tensor([0, 1.0, 0, 0]).double(),
    )


def test_identity_3_equation_8_equals_the_weighted_sum_and_the_gate_has_its_limits():
    model, h = layer(output="sum"), r(B, N, DIM)
    result = edit(model)
    added, _ = model._experts(h, GRID, model.task(torch.arange(B) % 4), conditions(), result.mask, result.routing)
    outputs = torch.stack([h + added[name] for name in EXPERTS], 2)
    torch.testing.assert_close(result.out, (result.routing.weights[..., None] * outputs).sum(2), atol=1e-12, rtol=1e-12)
    mixed = layer()
    mixed.load_state_dict(model.state_dict(), strict=False)
    for bias, expected in ((1e4, outputs[:, :, EXPERTS.index("base")]), (-1e4, result.out)):
        nn.init.zeros_(mixed.gate.weight)
        nn.init.constant_(mixed.gate.bias, bias)
        torch.testing.assert_close(edit(mixed).out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dispatch", ["dense", "sparse"])
def test_identity_4_gradients_of_experts_and_of_the_router(dispatch):
    model = layer(share=0.0, output="sum", top_k=1, dispatch=dispatch)
    for index, expert in enumerate(model.router.experts):
        nn.init.constant_(expert[-1].bias, 1e3 if EXPERTS[index] == "ref" else 0.0)
    result = edit(model)
    assert bool((result.routing.chosen.sum((0, 1)) == torch.tensor([0, 0, B * N, 0])).all())
    result.out.square().sum().backward()
    size = {
        n: sum(float(p.grad.abs().sum()) if p.grad is not None else 0.0 for p in getattr(model, n).parameters())
        for n in EXPERTS
    }
    assert size["ref"] > 0 and size["text"] == size["base"] == size["mask"] == 0
    logits = r(B, N, 4).requires_grad_()
    routing = selected(logits, top_k=2)
    (used,) = torch.autograd.grad((routing.weights * r(B, N, 4, seed=8)).sum(), logits, retain_graph=True)
    assert bool((used[~routing.chosen] == 0).all()) and bool((used[routing.chosen] != 0).all())
    (load,) = torch.autograd.grad(load_loss(routing.probabilities), logits)
    assert bool((load[~routing.chosen] != 0).all())


def test_identity_5_losses_at_their_limits():
    assert float(load_loss(torch.full((B, N, 4), 0.25))) == 0
    collapsed = nn.functional.one_hot(torch.zeros(B, N, dtype=torch.long), 4).double()
    assert float(load_loss(collapsed)) == pytest.approx(0.75)
    turns = nn.functional.one_hot(torch.arange(N) % 4, 4).double()[None]
    assert float(load_loss(turns)) == pytest.approx(0.0)
    constant = torch.softmax(r(B, 1, 4), -1).expand(B, N, 4)
    assert float(mixture_loss(constant, GRID)) == 0 and float(mixture_loss(turns, GRID)) > 0
    step = torch.zeros(1, N, 4)
    step[0, : N // 2, 0] = 1.0
    assert float(mixture_loss(step, GRID)) == pytest.approx(5 / 15), "one of three row differences, everywhere"
    mask = r(B, 1, *GRID)
    assert float(mask_loss(mask + 0.3, mask, smooth=0.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(mask_loss(mask, -mask, smooth=0.0)) > 0.1
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    assert float(mask_loss(ramp, ramp)) == 0.0 and float(mask_loss(ramp**2, ramp**2)) == pytest.approx(0.2)


def test_identity_6_masks_stay_in_the_unit_interval_and_the_printed_rule_only_grows():
    h, mask = r(B, N, DIM), r(B, 1, *GRID, seed=5).sigmoid()
    signed, paper = MaskRepaint(DIM).double(), MaskRepaint(DIM, "paper").double()
    assert torch.equal(signed(h, GRID, None, mask), mask), "signed from zero changes nothing"
    twice = paper(h, GRID, None, paper(h, GRID, None, mask))
    assert torch.equal(twice, torch.ones_like(mask)), "the printed rule fills the mask in two steps"
    for model in (signed, paper):
        nn.init.normal_(model.out.weight, std=5.0)
        now = mask
        for step in range(4):
            new = model(r(B, N, DIM, seed=step), GRID, r(B, DIM, 2, 3), now)
            assert float(new.detach().min()) >= 0 and float(new.detach().max()) <= 1
            assert model is signed or bool((new >= now).all())
            now = new
    assert bool((signed(h, GRID, None, mask) < mask).any()), "signed may shrink"


@pytest.mark.parametrize("output", ["mixture", "sum"])
@pytest.mark.parametrize(("top_k", "share"), [(1, 0.0), (2, 0.0), (2, 0.1)])
def test_identity_7_sparse_dispatch_equals_dense(output, top_k, share):
    found = []
    for dispatch in ("dense", "sparse"):
        model = layer(output=output, top_k=top_k, share=share, dispatch=dispatch)
        with torch.no_grad():
            model.router.key.weight.mul_(30)  # so that tokens differ in what they choose
        h = r(B, N, DIM).requires_grad_()
        result = edit(model, h=h)
        text = result.routing.chosen[..., EXPERTS.index("text")].sum(1)
        assert int(text.min()) > 0 and int(text.max()) < N
        result.out.square().sum().backward()
        found.append([result.out, h.grad, *(p.grad for p in model.text.parameters())])
        if dispatch == "sparse" and output == "sum" and top_k == 1:
            assert result.work < 2 * B * N
    torch.testing.assert_close(*found, atol=1e-11, rtol=1e-11)


def test_needed_tokens_hold_the_wanted_ones_and_their_neighbours():
    wanted = torch.zeros(2, N, dtype=torch.bool)
    wanted[0, 6] = wanted[1, 0] = True
    rows = needed(wanted, GRID)
    assert set(rows[0].tolist()) == {0, 1, 2, 5, 6, 7, 10, 11, 12} and {0, 1, 5, 6} <= set(rows[1].tolist())
    assert needed(torch.zeros(2, N, dtype=torch.bool), GRID).shape == (2, 0)


def test_identity_7_the_order_of_text_tokens_does_not_matter_and_padding_is_not_read():
    model, order = layer(), torch.tensor([4, 2, 0, 5, 1, 3])
    given = conditions()
    shuffled = edit(model, replace(given, text=given.text[:, order]))
    torch.testing.assert_close(shuffled.out, edit(model).out, atol=1e-12, rtol=1e-12)
    valid = torch.tensor([True, True, True, True, False, False]).expand(B, -1)
    noise = torch.cat([given.text[:, :4], 50 + given.text[:, 4:]], 1)
    short = edit(model, replace(given, text=given.text[:, :4]))
    torch.testing.assert_close(
        edit(model, replace(given, text=noise, text_valid=valid)).out, short.out, atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("missing", ["text", "base", "ref", "mask"])
@pytest.mark.parametrize("dispatch", ["dense", "sparse"])
def test_identity_8_dropping_a_condition_is_a_logit_of_minus_infinity(missing, dispatch):
    model = layer(dispatch=dispatch)
    gone = {"latent": None, "mask": None} if missing == "mask" else {missing: None}
    dropped = edit(model, conditions(**gone))
    assert float(dropped.routing.weights[..., EXPERTS.index(missing)].detach().abs().max()) == 0
    present = torch.ones(B, 4, dtype=torch.bool)
    present[:, EXPERTS.index(missing)] = False
    flagged = edit(model, conditions(present=present))
    torch.testing.assert_close(flagged.out, dropped.out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(flagged.routing.weights, dropped.routing.weights)


def test_identity_8_with_the_base_alone_nothing_is_nan():
    model = layer()
    alone = Conditions(base=conditions().base)
    result = edit(model, alone)
    assert bool(result.out.isfinite().all()) and result.mask is None
    assert bool((result.routing.weights[..., EXPERTS.index("base")] == 1).all())
    result.out.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_identity_9_temperature_to_zero_and_a_constant_on_all_logits():
    logits = r(B, N, 4)
    cold = selected(logits, top_k=3, temperature=1e-4).weights
    torch.testing.assert_close(cold, nn.functional.one_hot(logits.argmax(-1), 4).double())
    torch.testing.assert_close(selected(logits + 7, top_k=3).weights, selected(logits, top_k=3).weights)


def test_task_and_time_reach_what_they_say():
    given, h = conditions(), r(B, N, DIM)
    time = torch.full((B,), 0.3, dtype=torch.float64)
    tasks = torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.long)
    literal = layer(task_to_experts=False, time_to_router=False)
    one, other = (literal(h, GRID, t, time, given) for t in tasks)
    assert not torch.equal(one.routing.logits, other.routing.logits)
    later = literal(h, GRID, tasks[0], time + 0.5, given)
    assert torch.equal(later.routing.logits, one.routing.logits) and not torch.equal(later.out, one.out), (
        "γ alone reads time"
    )
    timed = layer()
    assert not torch.equal(
        timed(h, GRID, tasks[0], time, given).routing.logits, timed(h, GRID, tasks[0], time + 0.5, given).routing.logits
    )
    task = literal.task(tasks[0]), literal.task(tasks[1])
    parts = [literal._experts(h, GRID, t, given, one.mask, one.routing)[0]["base"] for t in task]
    assert torch.equal(*parts)
    parts = [timed._experts(h, GRID, t, given, one.mask, one.routing)[0]["base"] for t in task]
    assert not torch.equal(*parts)


def test_smoothing_moves_means_in_training_alone():
    model = layer()
    means = torch.tensor([5.0, -5.0, 0.0, 1.0], dtype=torch.float64)
    plain = edit(model)
    assert torch.equal(edit(model, means=means).routing.logits, plain.routing.logits), (
        "eval does not depend on the batch"
    )
    model.train()
    smoothed = edit(model, means=means).routing
    mean = plain.routing.logits.mean((0, 1))
    torch.testing.assert_close(smoothed.logits.mean((0, 1)), 0.9 * means + 0.1 * mean)
    spread = smoothed.logits - smoothed.logits.mean((0, 1))
    torch.testing.assert_close(spread, plain.routing.logits - mean), "tokens keep their differences"
    torch.testing.assert_close(smoothed.means, 0.9 * means + 0.1 * mean)


def test_resizing_takes_area_means_and_keeps_constants():
    x = r(1, 1, 4, 6)
    torch.testing.assert_close(resize(x, (2, 3)), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(resize(x, (4, 6)), x)
    torch.testing.assert_close(resize(torch.ones(1, 1, 3, 7), (5, 4)), torch.ones(1, 1, 5, 4))


def test_outer_norm_gives_up_the_start_from_nothing_and_round_trips_work():
    assert not torch.allclose(edit(layer(True, outer_norm=True)).out, r(B, N, DIM))
    model = layer()
    twin = layer(True)
    twin.load_state_dict(model.state_dict())
    expected = edit(model).out
    assert torch.equal(edit(twin).out, expected) and torch.equal(edit(copy.deepcopy(model)).out, expected)
    assert torch.equal(edit(torch.compile(model, backend="eager")).out, expected)
    h = r(B, N, DIM).float()
    floats = Conditions(**{k: v.float() if isinstance(v, Tensor) else v for k, v in vars(conditions()).items()})
    task, time = torch.arange(B) % 4, torch.tensor([0.1, 0.5, 0.9])
    with torch.autocast("cpu", torch.bfloat16):
        half = model.float()(h, GRID, task, time, floats)
    assert half.routing.weights.dtype == torch.float32
    torch.testing.assert_close(half.out.double(), expected, atol=0.5, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer(output="mixed"), ConfigError, "Did you mean 'mixture'"),
        (lambda: layer(dispatch="spars"), ConfigError, "Did you mean 'sparse'"),
        (lambda: layer(residual="sign"), ConfigError, "Did you mean 'signed'"),
        (lambda: layer(top_k=5), ConfigError, "1 to 4"),
        (lambda: layer(share=1.5), ConfigError, "share is 1.5"),
        (lambda: layer(num_heads=3), ConfigError, "divisor of dim 16"),
        (lambda: edit(layer(), Conditions()), ConfigError, "no condition at all"),
        (lambda: edit(layer(), conditions(latent=None)), ConfigError, "both latent and mask"),
        (lambda: edit(layer(), temperature=0.0), ConfigError, "temperature is 0.0"),
        (lambda: edit(layer(), h=r(B, N + 1, DIM)), ShapeError, "4·5"),
        (lambda: edit(layer(), conditions(text=r(B, 3, 7))), ShapeError, "text has shape"),
        (lambda: edit(layer(), conditions(mask=r(B, 2, 3, 3))), ShapeError, "mask has shape"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
