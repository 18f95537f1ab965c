"""Gradients through ``foveal.attach``, and the checkpointed backward that must not run under another attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveal
from foveal.core.context import SelectContext, State
from foveal.core.errors import UnsupportedError
from foveal.core.layouts import Layout
from foveal.patterns import Dense, Pattern, SlidingWindow

from ..support import assert_close
from . import models
from .models import FAMILIES, inputs, output
from .patterns import BlockSums

TRAINABLE = [name for name in FAMILIES if name not in ("clip",)]
"""CLIP's towers are in the table of vision-language models; its text stack trains as CLIP's only half that foveal touches."""
reentrant = pytest.mark.parametrize("use_reentrant", [False, True])
BOTH = pytest.mark.parametrize("name", ["llama", "vit"], ids=["with a mask", "without a mask"])


def ready(
    name: str, dtype: torch.dtype = torch.float64, use_reentrant: bool | None = None, implementation: str = "eager"
) -> Any:
    """A model in training mode without dropout, checkpointed if asked for."""
    cls, config = FAMILIES[name].build()
    for holder in (config, config.get_text_config(), getattr(config, "vision_config", config)):
        for field in vars(holder):
            if "dropout" in field or "drop" in field.rsplit("_", 1)[-1]:
                setattr(holder, field, 0.0)
    model = models.fill(cls._from_config(config, attn_implementation=implementation)).to(dtype).train()
    if use_reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads() if name != "vit" else require_grad_of_patches(model)
    return model


def require_grad_of_patches(model: Any) -> None:
    model.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())


def given(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    arguments = inputs(name, length=20)
    moved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
    return moved | ({"use_cache": False} if FAMILIES[name].kind == "decoder" else {})


def loss_of(model: Any, name: str) -> Tensor:
    out = output(model, **given(name, model.dtype))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return (out * weights).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by parameter name; clears them."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == expected.keys()
    least = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        key = name.removesuffix("k_proj.bias")  # a key's bias has no gradient, only the rounding of its weight's
        size = (g if key == name else expected[f"{key}k_proj.weight"]).abs().max().clamp(min=least)
        assert_close(got[name] / size, g / size, atol, name)


@pytest.mark.parametrize("impl", ["gather", "auto"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_through_dense_equal_eagers(name: str, impl: str) -> None:
    dtype = torch.float32 if name == "gpt_oss" else torch.float64  # its experts have no float64
    model = ready(name, dtype)
    loss_of(model, name).backward()
    expected = gradients(model)
    with foveal.attach(model, Dense(), impl=impl):
        loss_of(model, name).backward()
    # eager computes its softmax in float32 in most families, whatever the model's dtype
    assert_same(gradients(model), expected, 2e-4 if dtype == torch.float32 else 5e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "bert", "vit"])
def test_gradients_through_a_pattern_equal_the_references(name: str) -> None:
    model = ready(name, torch.float32)
    found = []
    for impl in ("gather", "reference"):
        with foveal.attach(model, SlidingWindow(window=3, sinks=1), impl=impl):
            loss_of(model, name).backward()
        found.append(gradients(model))
    assert_same(found[0], found[1], 1e-3)


# --- checkpointing ----------------------------------------------------------------------------------------------------


@reentrant
@pytest.mark.parametrize("pattern", [Dense(), SlidingWindow(window=3, sinks=1), BlockSums()], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert", "vit"])
def test_checkpointed_gradients_inside_the_block_equal_the_plain_ones(
    name: str, pattern: Pattern, use_reentrant: bool
) -> None:
    if isinstance(pattern, BlockSums) and name in ("bert", "vit"):
        pattern = SlidingWindow(window=2)
    plain = ready(name)
    with foveal.attach(plain, pattern):
        loss_of(plain, name).backward()
    model = ready(name, use_reentrant=use_reentrant)
    with foveal.attach(model, pattern):
        loss_of(model, name).backward()
    assert_same(gradients(model), gradients(plain), 1e-9)


def test_checkpointing_really_recomputes_the_attention() -> None:
    calls: list[int] = []
    model = ready("llama", use_reentrant=False)
    with foveal.attach(model, Dense(), probes=[lambda e: calls.append(e.layer_index)]):
        loss_of(model, "llama").backward()
    assert calls == [0, 1, 2, 2, 1, 0]


@reentrant
@BOTH
def test_backward_after_leaving_raises_instead_of_giving_wrong_gradients(name: str, use_reentrant: bool) -> None:
    model = ready(name, use_reentrant=use_reentrant)
    with foveal.attach(model, SlidingWindow(window=2)):
        loss = loss_of(model, name)
    with pytest.raises(UnsupportedError, match=r"Call backward\(\) inside the"):
        loss.backward()


@reentrant
@BOTH
def test_backward_under_another_attach_raises(name: str, use_reentrant: bool) -> None:
    model = ready(name, use_reentrant=use_reentrant)
    with foveal.attach(model, SlidingWindow(window=2)):
        loss = loss_of(model, name)
    with (
        foveal.attach(model, SlidingWindow(window=3)),
        pytest.raises(UnsupportedError, match=r"[cC]all backward\(\) inside the"),
    ):
        loss.backward()


@reentrant
@BOTH
def test_backward_under_an_inner_attach_raises_and_works_after_it(name: str, use_reentrant: bool) -> None:
    model = ready(name, use_reentrant=use_reentrant)
    with foveal.attach(model, SlidingWindow(window=2)):
        loss_of(model, name).backward()
        expected = gradients(model)
        loss = loss_of(model, name)
        with foveal.attach(model, Dense()), pytest.raises(UnsupportedError, match=r"[cC]all backward\(\) inside the"):
            loss.backward()
        model.zero_grad()
        loss_of(model, name).backward()
        assert_same(gradients(model), expected, 1e-12)


@BOTH
def test_training_without_foveal_goes_on_after_a_forgotten_backward(name: str) -> None:
    model = ready(name, use_reentrant=False)
    loss_of(model, name).backward()
    expected = gradients(model)
    with foveal.attach(model, SlidingWindow(window=2)):
        loss_of(model, name)
    loss_of(model, name).backward()
    assert_same(gradients(model), expected, 1e-12)
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n.endswith(("attn", "attention")))


@BOTH
def test_a_checkpoint_around_the_whole_model_is_noticed_too(name: str) -> None:
    model = ready(name)
    with foveal.attach(model, SlidingWindow(window=2)):
        loss = checkpoint(lambda: loss_of(model, name), use_reentrant=False)
        assert isinstance(loss, Tensor)
    with pytest.raises(UnsupportedError, match=r"Call backward\(\) inside the"):
        loss.backward()


def test_a_checkpointed_forward_with_the_callers_own_mask_is_noticed_too() -> None:
    model = ready("llama", use_reentrant=False)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with foveal.attach(model, SlidingWindow(window=2)):
        loss = model(**given("llama"), attention_mask=mask).logits.mean()
    with pytest.raises(UnsupportedError, match=r"Call backward\(\) inside the"):
        loss.backward()


def test_layers_that_share_a_module_take_one_rule_in_a_checkpointed_backward() -> None:
    from foveal.policies.policy import Policy, Rule

    model = ready("albert")

    def run() -> Tensor:
        return checkpoint(lambda: loss_of(model, "albert"), use_reentrant=False)  # type: ignore[return-value]

    with foveal.attach(model, SlidingWindow(window=2)):
        run().backward()
    with foveal.attach(model, Policy(layers=((1, Rule(SlidingWindow(window=2))),))):
        loss = run()
        with pytest.raises(UnsupportedError, match="layers of this model share one module"):
            loss.backward()


def test_inference_leaves_no_guards_behind() -> None:
    model = ready("vit", torch.float32).eval()
    with foveal.attach(model, Dense()), torch.no_grad():
        loss_of(model, "vit")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class ReusesFirst(BlockSums):
    """Layer 0 chooses by content; every later layer keeps what layer 0 kept."""

    registered_name = "test_reuses_first"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        if ctx.layer_index == 0:
            return super().select(q, k, ctx, state)
        assert list(ctx.earlier) == list(range(ctx.layer_index))
        return ctx.earlier[0].layout, None


@reentrant
def test_a_checkpointed_backward_reads_the_selections_of_its_own_forward(use_reentrant: bool) -> None:
    """Two forwards over different tokens, then both backwards: each layer is recomputed with what its own forward chose."""

    def run(model: Any) -> dict[str, Tensor]:
        with foveal.attach(model, ReusesFirst()):
            losses = []
            for seed in (0, 1):
                ids = torch.randint(models.VOCAB, (2, 20), generator=torch.Generator().manual_seed(seed))
                losses.append(model(input_ids=ids, use_cache=False).logits.square().mean())
            losses[0].backward()
            losses[1].backward()
        return gradients(model)

    expected = run(ready("llama"))
    assert_same(run(ready("llama", use_reentrant=use_reentrant)), expected, 1e-9)


def test_a_pattern_that_reads_earlier_layers_is_refused_where_backward_cannot_know_them() -> None:
    model = ready("llama", use_reentrant=False)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with foveal.attach(model, ReusesFirst()):
        loss = model(**given("llama"), attention_mask=mask).logits.mean()
        with pytest.raises(UnsupportedError, match="reads what earlier layers selected"):
            loss.backward()
