"""Training a small model: it learns, the same seed gives the same losses, and an interrupted run goes on exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, DataError
from foveal.recipes.fit import fit, stage_at, step_generator


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def task(model: nn.Module):
    def loss_of(step: int, g: torch.Generator) -> Tensor:
        x = torch.randn(32, 3, generator=g)
        return (model(x)[:, 0] - x.sum(1)).square().mean()

    return loss_of


def test_losses_fall_and_repeat():
    one, two = make(), make()
    losses = fit(one, task(one), 60, warmup=5, lr=1e-2)
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10]) and not one.training
    assert losses == fit(two, task(two), 60, warmup=5, lr=1e-2)
    three = make()
    assert losses != fit(three, task(three), 60, warmup=5, lr=1e-2, seed=1)


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    whole = make()
    expected = fit(whole, task(whole), 30)
    path = tmp_path / "new" / "m.safetensors"
    model, seen = make(), []

    def stop(step: int, steps: int, loss: float) -> None:
        seen.append(step)
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, task(model), 30, checkpoint=path, every=10, progress=stop)
    again = make()
    seen.clear()
    assert fit(again, task(again), 30, checkpoint=path, every=10, progress=lambda s, n, x: seen.append(s)) == expected
    assert seen[0] == 11
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fit(make(), task(again), 30, checkpoint=path) == expected, "a finished run is not trained further"


def test_foreign_checkpoints_are_refused(tmp_path):
    model, path = make(), tmp_path / "m.safetensors"
    fit(model, task(model), 3, checkpoint=path)
    with pytest.raises(ConfigError, match="was made with"):
        fit(model, task(model), 4, checkpoint=path)
    with pytest.raises(ConfigError, match="was made with"):
        fit(model, task(model), 3, checkpoint=path, told={"loss": "another"})
    other = nn.Linear(3, 1)
    with pytest.raises(ConfigError, match="another model"):
        fit(other, task(other), 3, checkpoint=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        fit(model, task(model), 3, checkpoint=path)


def test_a_loss_that_is_not_finite_ends_the_run():
    model = make()
    with pytest.raises(DataError, match="loss is nan at step 2"):
        fit(model, lambda step, g: model(torch.ones(1, 3)).sum() * (float("nan") if step == 2 else 1), 5)


def test_generators_differ_by_step_and_seed():
    drawn = {float(torch.rand((), generator=step_generator(seed, step))) for seed in range(3) for step in range(5)}
    assert len(drawn) == 15


def test_a_step_belongs_to_one_part_of_a_curriculum_and_the_last_has_no_end():
    assert [stage_at(step, [2, 1, 3]) for step in (0, 1, 2, 3, 5, 6, 99)] == [0, 0, 1, 2, 2, 2, 2]
