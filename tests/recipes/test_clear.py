"""CLEAR's distillation: zero losses where student and teacher agree, what is trained, exact resumption, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveal.core.errors import ConfigError, UnsupportedError
from foveal.models import DiT
from foveal.patterns.disc import Disc
from foveal.recipes.clear import Weights, attention_outputs, linearise, losses, self_made, student_of
from foveal.recipes.fit import step_generator

GRID, TEXT = (5, 4), 2
DISC = Disc(2, GRID, TEXT)


def teacher(seed: int = 0) -> DiT:
    """A transformer whose every weight matters, as if trained."""
    model = DiT(GRID, vocab_size=6, text=TEXT, dim=24, depth=5, num_heads=2, seed=seed).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model.eval()


def data(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 1, *GRID, generator=generator, dtype=torch.float64)
    return x, torch.randint(6, (3, TEXT), generator=generator)


def test_a_disc_that_covers_the_image_leaves_nothing_to_learn_from_the_teacher():
    model = teacher()
    x, text = data(0, step_generator(0, 0))
    found = losses(student_of(model), model, Disc(9, GRID, TEXT), x, text, step_generator(0, 1), Weights())
    assert float(found["prediction"].detach()) == float(found["attention"].detach()) == 0.0
    near = losses(student_of(model), model, DISC, x, text, step_generator(0, 1), Weights())
    assert float(near["prediction"].detach()) > 1e-6 and float(near["attention"].detach()) > 1e-6
    assert float(found["own"].detach()) > 0


def test_losses_are_what_the_paper_writes():
    """Recomputed by hand: one noise for both models, outputs before the projection of layers 0 and 4 alone."""
    model, other = teacher(), teacher(1)
    x, text = data(0, step_generator(0, 0))
    found = losses(other, model, DISC, x, text, step_generator(0, 1), Weights(), drop=0.0)
    noisy, t, text, noise = model.noised(x, text, step_generator(0, 1), 0.0)
    seen: dict[str, list[Tensor]] = {"model": [], "other": []}
    for name, one in (("model", model), ("other", other)):
        for layer in (one.layers[0], one.layers[4]):
            real = layer.attention.out
            layer.attention.out = nn.Sequential(Spy(seen[name]), real)
    theirs, ours = model(noisy, t, text), other(noisy, t, text, DISC)
    torch.testing.assert_close(found["own"], mse_loss(ours, noise))
    torch.testing.assert_close(found["prediction"], mse_loss(ours, theirs))
    by_layer = [mse_loss(a, b) for a, b in zip(seen["other"], seen["model"], strict=True)]
    torch.testing.assert_close(found["attention"], (by_layer[0] + by_layer[1]) / 2)


class Spy(nn.Module):
    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def test_the_attention_projections_alone_are_trained_and_the_student_comes_nearer():
    model = teacher()
    before = {name: p.clone() for name, p in model.named_parameters()}
    student = linearise(model, DISC, data, 30, lr=3e-3, weights=Weights(0.0, 0.5, 0.5))
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) == (".attention." not in name), name
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, "the teacher stays as it was"
    x, text = data(0, step_generator(9, 9))
    with torch.no_grad():
        first, last = (
            losses(s, model, DISC, x, text, step_generator(9, 8), Weights())["prediction"] for s in (model, student)
        )
    assert float(last) < 0.7 * float(first)
    assert all(not module._forward_pre_hooks for module in (*model.modules(), *student.modules())), (
        "nothing hangs on them"
    )


def test_an_interrupted_distillation_goes_on_exactly(tmp_path):
    model, path, seen = teacher(), tmp_path / "student.safetensors", []
    whole = linearise(model, DISC, data, 8)

    def stop(step: int, steps: int, loss: float) -> None:
        seen.append((step, steps))
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearise(model, DISC, data, 8, checkpoint=path, every=2, progress=stop)
    again = linearise(model, DISC, data, 8, checkpoint=path, every=2, progress=lambda s, n, x: seen.append((s, n)))
    assert seen == [(1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (5, 8), (6, 8), (7, 8), (8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    for changed in ({"pattern": Disc(3, GRID, TEXT)}, {"weights": Weights(1.0, 0.5, 0.0)}):
        with pytest.raises(ConfigError, match="was made with"):
            linearise(
                **{
                    "teacher": model,
                    "pattern": DISC,
                    "data": data,
                    "steps": 8,
                    "checkpoint": path,
                    "every": 2,
                    **changed,
                }
            )


def test_the_teacher_paints_what_it_is_asked_for():
    text = torch.randint(6, (5, TEXT), generator=torch.Generator().manual_seed(0))
    model = teacher().float()
    one, two = (self_made(model, text, torch.Generator().manual_seed(1), steps=3, batch=2) for _ in range(2))
    assert one.shape == (5, 1, *GRID) and torch.equal(one, two) and float(one.abs().max()) < 1.01


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="Weights are all 0"):
        Weights(0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match=r"Weights\.attention"):
        Weights(attention=-0.5)
    other = DiT(GRID, depth=1, attention=lambda i: nn.Identity())
    with pytest.raises(UnsupportedError, match="layer 0 has a Identity"), attention_outputs(other, [0]):
        pass
