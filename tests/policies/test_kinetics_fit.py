"""The fit of FLOPs and bytes to times: known rates come back, and it says what it cannot tell."""

from __future__ import annotations

import random

import pytest

from foveal.core.errors import ConfigError
from foveal.policies.kinetics import ModelShape, decode_cost
from foveal.policies.kinetics_fit import Step, error, fit_times, r_squared, step_work

SHAPES = [ModelShape("a", 1e6, 2, 8, 2, 16), ModelShape("b", 3e6, 4, 8, 8, 32)]


def synthetic(alpha: float, beta: float, noise: float = 0.0, seed: int = 0) -> list[Step]:
    rng = random.Random(seed)
    out = []
    for shape in SHAPES:
        for context in (128, 512, 2048, 8192):
            work = step_work(shape, batch=8, context=context, kv_bytes=4, weight_bytes=4)
            out.append(Step(*work, (alpha * work[0] + beta * work[1]) * (1 + noise * rng.gauss(0, 1))))
    return out


@pytest.mark.parametrize(("alpha", "beta"), [(1e-11, 1e-10), (1e-9, 1e-12), (0.0, 1e-10), (1e-11, 0.0)])
def test_known_rates_come_back(alpha, beta):
    steps = synthetic(alpha, beta)
    fit = fit_times(steps)
    assert fit.alpha == pytest.approx(alpha, rel=1e-6, abs=1e-18) and fit.beta == pytest.approx(
        beta, rel=1e-6, abs=1e-18
    )
    assert fit.r2 == pytest.approx(1) and error(fit, steps) < 1e-6
    if alpha and beta:
        assert fit.intensity == pytest.approx(beta / alpha)


def test_noise_lowers_r2_and_the_rates_stay_near():
    fit = fit_times(synthetic(1e-11, 1e-10, noise=0.03))
    assert 0.95 < fit.r2 < 1 and fit.beta == pytest.approx(1e-10, rel=0.2)


def test_rates_are_never_negative_and_then_the_best_one_is_alone():
    steps = [Step(s.flops, s.bytes, 1e-10 * s.bytes - 2e-12 * s.flops) for s in synthetic(1e-11, 1e-10)]
    fit = fit_times(steps)
    assert fit.alpha == 0 and fit.beta > 0 and fit == fit_times(steps, ("bytes",))


def test_flops_alone_cannot_explain_times_of_bytes():
    steps = synthetic(1e-12, 1e-9)
    assert error(fit_times(steps, ("flops",)), steps) > 10 * error(fit_times(steps), steps)


def test_held_out_steps_are_predicted():
    steps = synthetic(1e-11, 1e-10)
    fit = fit_times(steps[::2])
    assert error(fit, steps[1::2]) < 1e-6 and r_squared(fit, steps[1::2]) == pytest.approx(1)


def test_steps_add_up_to_the_cost_of_decoding():
    """Every step reads its context: summed, the exact form of the dense cost."""
    shape, prompt, output = SHAPES[0], 100, 400
    works = [step_work(shape, batch=3, context=prompt + t, kv_bytes=2) for t in range(1, output + 1)]
    cost = decode_cost(shape, prompt=prompt, output=output, trials=3, share_prompt=False)
    half = output / 2  # the closed form leaves out half a token per step
    assert sum(f for f, _ in works) == pytest.approx(cost.compute + 3 * 2 * shape.group * shape.kv_elements * half)
    assert sum(b for _, b in works) == pytest.approx(cost.kv + 3 * 2 * shape.kv_elements * half)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Step(1, 1, 0), "seconds is 0"),
        (lambda: Step(-1, 1, 1), "flops is -1"),
        (lambda: fit_times(synthetic(1, 1), ("time",)), "terms is"),
        (lambda: fit_times(synthetic(1, 1)[:3]), "3 steps for 2 terms; expected 4"),
        (lambda: fit_times([Step(x, 2 * x, x) for x in (1, 2, 3, 4)]), "cannot tell flops and bytes apart"),
        (lambda: fit_times([Step(x, 0, x) for x in (1, 2, 3, 4)]), "cannot tell"),
        (lambda: fit_times([Step(x, 1, 1) for x in (1, 2, 3, 4)]), "all times are equal"),
        (lambda: step_work(SHAPES[0], batch=0, context=1, kv_bytes=2), "batch is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
