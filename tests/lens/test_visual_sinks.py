"""Image sinks: their flags, contributions against the definition written out, and their place in the picture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.data.scenes import cell_mask
from foveal.lens.visual_sinks import background_share, contributions, visual_sinks
from foveal.steer import VAR, apply, report
from tests.hf import models as text
from tests.steer.models import IMAGE, build, left_padded, prompt


def written_out(model: Any, request: dict[str, Any], rows: Tensor) -> list[Tensor]:
    """α_ij ‖x_j W_V W_O‖ of a Llama-like stack, from eager weights and the modules' own matrices, one head and key at a time."""
    stack = model.model.language_model.layers if hasattr(model.model, "language_model") else model.model.layers
    model.set_attn_implementation("eager")
    states: list[Tensor] = []
    hooks = [block.self_attn.register_forward_pre_hook(lambda m, a, k: states.append(k["hidden_states"]), with_kwargs=True) for block in stack]  # fmt: skip
    weights = model(**request, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    out = []
    for block, alpha, x in zip(stack, weights, states, strict=True):
        a = block.self_attn
        heads, dim = alpha.shape[1], a.head_dim
        found = torch.zeros(alpha.shape[0], heads, alpha.shape[-1], dtype=torch.float64)
        for b in range(alpha.shape[0]):
            for h in range(heads):
                kv = h // a.num_key_value_groups
                w_v = a.v_proj.weight[kv * dim : (kv + 1) * dim].T.double()
                w_o = a.o_proj.weight[:, h * dim : (h + 1) * dim].T.double()
                bias = 0.0 if a.v_proj.bias is None else a.v_proj.bias[kv * dim : (kv + 1) * dim].double()
                lengths = ((x[b].double() @ w_v + bias) @ w_o).norm(dim=-1)
                found[b, h] = (alpha[b, h, rows[b]].double() * lengths).mean(0)
        out.append(found)
    return out


def test_contributions_equal_the_definition_with_images_and_padding() -> None:
    model = build("llava")
    requests = [prompt("llava", 1, before=1, after=3), prompt("llava", 2, before=4, after=6)]
    with torch.no_grad():
        got = contributions(model, left_padded(requests))
        wanted = [written_out(model, r, r["input_ids"] != IMAGE) for r in requests]  # eager gives NaN beside padding
    assert sorted(got) == list(range(4))
    for b, alone in enumerate(wanted):
        for layer, value in enumerate(alone):
            pad = got[layer].shape[-1] - value.shape[-1]
            assert torch.allclose(got[layer][b, :, pad:], value[0], atol=1e-5)  # transformers' eager softmax is float32
            assert bool((got[layer][b, :, :pad] == 0).all()) and float(value.max()) > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_contributions_of_text_models_for_chosen_rows(name: str) -> None:
    model, ids = text.build(name, "sdpa", torch.float64), text.tokens(2, 11)
    rows = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        wanted = written_out(model, {"input_ids": ids}, rows)
        got = contributions(model, {"input_ids": ids}, rows)
    assert all(torch.allclose(got[i], value, atol=1e-5) for i, value in enumerate(wanted))


def test_contributions_through_a_transposed_projection_bound_what_a_head_writes() -> None:
    """GPT-2: one row that sees one key writes exactly that key's contribution."""
    model, ids = text.build("gpt2", "sdpa", torch.float64), text.tokens(1, 6)
    rows = torch.arange(6)[None] == 0
    seen: dict[str, Tensor] = {}
    attention = model.transformer.h[1].attn
    hook = attention.c_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0]))
    with torch.no_grad():
        got = contributions(model, {"input_ids": ids}, rows)[1][0]
    hook.remove()
    heads = seen["z"][0, 0].view(4, 8)
    wanted = torch.stack([heads[h] @ attention.c_proj.weight[h * 8 : (h + 1) * 8] for h in range(4)]).norm(dim=-1)
    assert torch.allclose(got[:, 0], wanted, atol=1e-9) and bool((got[:, 1:] == 0).all())


def test_flags_are_those_that_var_acts_on() -> None:
    """The same tokens given to VAR as its sinks, layer by layer, change the same rows."""
    model, request = build("llava"), prompt("llava")
    found = visual_sinks(model, request, (5, 11), tau=1.5)
    image = request["input_ids"] == IMAGE
    assert sorted(found) == list(range(4)) and all(not bool((f & ~image).any()) for f in found.values())
    assert any(bool(f.any()) for f in found.values())
    setting: dict[str, Any] = {"min_mass": 0.0, "rho": 0.1}
    with torch.no_grad():
        for layer in range(3):
            with apply(model, VAR(dims=(5, 11), tau=1.5, exclude=~image[0], layers=[layer], **setting)) as handle:
                wanted = model(**request).logits
                assert bool(found[layer].any()) == (report(handle)[0]["changed"] > 0)
            with apply(model, VAR(sinks=found[layer], layers=[layer], **setting)):
                assert torch.equal(model(**request).logits, wanted)


def test_background_share_of_known_places() -> None:
    objects = torch.from_numpy(cell_mask(((0, 0), (1, 2)), 48))  # two of nine cells of 16 pixels
    sinks = torch.zeros(6, 6, dtype=torch.bool)  # four tokens to a cell
    sinks[0, 0] = sinks[5, 5] = sinks[3, 0] = True
    found = background_share(sinks, objects)
    assert (found.share, found.sinks) == (pytest.approx(2 / 3), 3)
    assert found.chance == pytest.approx(28 / 36)
    assert math.isnan(background_share(torch.zeros(6, 6, dtype=torch.bool), objects).share)
    every = background_share(torch.ones(6, 6, dtype=torch.bool), objects)
    assert every.share == every.chance


def test_background_share_under_a_crop_padding_and_cells_between_pixels() -> None:
    objects = torch.zeros(10, 20, dtype=torch.bool)
    objects[:, :5] = True
    one = torch.ones(1, 2, dtype=torch.bool)
    assert background_share(one, objects).share == 0.5  # left half: 5 of 10 columns, exactly half, is an object
    assert background_share(one, objects, (0.2, 0.0, 20.2, 10.0)).share == 1.0  # a fifth of a pixel further it is not
    assert background_share(one, objects, (0.0, 0.0, 10.0, 10.0)).share == 0.5
    padded = background_share(torch.ones(2, 2, dtype=torch.bool), objects, (0.0, -10.0, 10.0, 10.0))
    assert padded.share == 0.75, "what lies beyond the picture is background"


def test_bad_input() -> None:
    model, request = build("llava"), prompt("llava")
    with pytest.raises(UnsupportedError, match="no image tokens"):
        visual_sinks(text.build("llama"), {"input_ids": text.tokens(1, 4)}, (3,))
    with pytest.raises(ShapeError, match="none is an image token"):
        visual_sinks(model, {"input_ids": torch.tensor([[3, 4]])}, (3,))
    with pytest.raises(ConfigError, match="dims is empty"):
        visual_sinks(model, request, ())
    with pytest.raises(ShapeError, match="rows has shape"):
        contributions(model, request, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="with a row in every request"):
        contributions(model, request, torch.zeros_like(request["input_ids"], dtype=torch.bool))
    with pytest.raises(ShapeError, match="objects has shape"):
        background_share(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2))
