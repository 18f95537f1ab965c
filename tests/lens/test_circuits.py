"""Stages, overlap with chance, and edits of attention rows."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, ShapeError
from foveal.lens.circuits import (
    Circuit,
    Stage,
    build_pairs,
    chance,
    find_circuit,
    jaccard,
    names,
    overlaps,
    parse_heads,
)
from foveal.lens.effects import Receivers
from foveal.lens.patching import compare, patch_paths
from foveal.lens.row_edit import edit_rows, reaction, sweep

from ..hf import models
from .pairs import toy_pairs

STAGES = (
    Stage("movers", "final", "", "end"),
    Stage("inhibition", "q", "movers", "end"),
    Stage("induction", "kv", "inhibition", "s2"),
)


def tiny():
    return models.build("llama", "sdpa").double()


def circuit(seed: int = 1, share: float = 0.4) -> Circuit:
    return find_circuit(tiny(), toy_pairs(seed=seed), stages=STAGES, share=share)


def test_stages_receive_at_the_heads_of_earlier_ones():
    found = circuit()
    assert [len(f.heads) for f in found.stages] == [
        5,
        5,
        4,
    ]  # ceil(0.4 · 12); only four heads lie below the last receivers
    c = compare(tiny(), toy_pairs(seed=1))
    movers = patch_paths(c)
    assert found.stages[0].heads == movers.top(0.4)
    again = patch_paths(c, Receivers("q", tuple(movers.top(0.4))))
    torch.testing.assert_close(found.stages[1].effects.change, again.change, rtol=0, atol=0)
    assert found.heads == {h for f in found.stages for h in f.heads} and found.at(0.4) == found.heads


def test_a_circuit_ends_where_nothing_feeds_a_stage():
    """Movers in the first layer alone: no head lies below them, so later stages have no receivers."""
    model = tiny()
    for layer in model.model.layers[1:]:
        layer.self_attn.o_proj.weight.data.zero_()
    found = find_circuit(model, toy_pairs(), stages=STAGES, share=0.2)
    assert [f.stage.name for f in found.stages] == ["movers", "inhibition"] and found.stages[1].heads == []
    assert {layer for layer, _ in found.heads} == {0}


def test_overlap_identities():
    """overlap(A, A) = 1, symmetric, disjoint = 0, and the same under relabelling of both."""
    draw = random.Random(0)
    every = [(layer, head) for layer in range(6) for head in range(4)]
    a, b = set(draw.sample(every, 7)), set(draw.sample(every, 9))
    assert jaccard(a, a) == 1 and jaccard(a, b) == jaccard(b, a) and jaccard(a, set(every) - a) == 0
    other = dict(zip(every, draw.sample(every, len(every)), strict=True))
    assert jaccard({other[h] for h in a}, {other[h] for h in b}) == jaccard(a, b)
    assert jaccard({(0, i) for i in range(29)}, {(0, i) for i in range(4, 32)}) == pytest.approx(25 / 32)
    assert math.isnan(jaccard(set(), set()))


def test_chance_is_that_of_random_sets():
    assert chance(29, 28, 384).mean == pytest.approx(0.039, abs=5e-4)  # the spec sheet's figure
    draw, seen = random.Random(0), []
    for _ in range(4000):
        a, b = set(draw.sample(range(40), 9)), set(draw.sample(range(40), 6))
        seen.append(len(a & b) / len(a | b))
    exact = chance(9, 6, 40, 3)
    assert exact.mean == pytest.approx(sum(seen) / len(seen), abs=0.004)
    assert exact.q95 == sorted(seen)[int(0.95 * len(seen))]
    assert exact.p == pytest.approx(sum(s >= 3 / 12 for s in seen) / len(seen), abs=0.02)
    assert chance(5, 5, 5, 5).mean == 1


def test_overlaps_of_two_circuits():
    rows = overlaps(circuit(1), circuit(2), (0.1, 0.4))
    assert [row.share for row in rows] == [0.1, 0.4]
    a, b = circuit(1).heads, circuit(2).heads
    assert rows[1].jaccard == jaccard(a, b) and rows[1].shared == names(a & b) and rows[1].sizes == (len(a), len(b))
    assert json.loads(json.dumps(rows[1].to_json()))["chance_mean"] == rows[1].chance.mean


def test_what_a_report_needs():
    found = circuit()
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["circuit"] == names(found.heads) and len(data["stages"]) == 3
    page = found.html()
    head = found.stages[0].heads[0]
    assert f"head {head[0]}.{head[1]}:" in page and page.count("<figure") == 3 and "<script" not in page
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 6


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_an_edited_row_is_the_mean_of_its_values_and_other_heads_keep_theirs():
    c = compare(tiny(), toy_pairs())
    n = c.pairs.clean.shape[1]
    wrong = torch.tensor([[2, 5]]).expand(3, -1)
    row = torch.zeros(3, n, dtype=torch.float64).scatter(1, wrong, 0.5)
    end = c.pairs.places["end"][:, 0]
    original: dict[int, torch.Tensor] = {}
    c.points.record(c.pairs.clean, weights=original.__setitem__)
    every = [(1, h) for h in range(models.HEADS)]
    edit = edit_rows(c, [(1, 2)], row, watch=every)
    torch.testing.assert_close(edit.attention[:, 2], row)
    for h in (0, 1, 3):
        torch.testing.assert_close(edit.attention[:, h], original[1][torch.arange(3), h, end], rtol=0, atol=1e-12)
    seen = {}
    c.points.record(  # the same edit in a whole run: z of this head is the mean of the two values
        c.pairs.clean,
        {"weights": lambda i, p: _overwrite(p, end, row) if i == 1 else p, "z": lambda i, z: seen.setdefault(i, z)},
    )
    v = c.clean.v[1][torch.arange(3)[:, None], 1, wrong].mean(1)  # head 2 of 4 uses key head 1 of 2
    torch.testing.assert_close(seen[1][torch.arange(3), 2, end], v, rtol=0, atol=1e-12)


def _overwrite(p, end, row):
    p = p.clone()
    p[torch.arange(len(end)), 2, end] = row
    return p


def test_the_original_row_as_weights_is_the_identity():
    c = compare(tiny(), toy_pairs())
    original: dict[int, torch.Tensor] = {}
    c.points.record(c.pairs.clean, weights=original.__setitem__)
    end = c.pairs.places["end"][:, 0]
    rows = {(layer, h): original[layer][torch.arange(3), h, end] for layer in (0, 2) for h in (0, 3)}
    edit = edit_rows(c, list(rows), rows)
    torch.testing.assert_close(edit.difference, c.clean_difference, rtol=0, atol=1e-10)
    assert not torch.allclose(edit_rows(c, list(rows), "s2").difference, c.clean_difference, atol=1e-3)


def test_sweep_has_controls_and_the_unedited_model():
    c = compare(tiny(), toy_pairs(batch=8))
    result = sweep(c, {"inhibition": [(1, 0)], "negative": [(2, 1)]}, "both", controls=3)
    assert set(result.rows) == {"none", "inhibition", "negative", "all", "random heads", "random tokens"}
    assert result.rows["none"]["accuracy"] == edit_rows(c, []).accuracy and result.rows["none"]["new_errors"] == 0
    assert result.rows["all"]["difference"] == pytest.approx(
        float(edit_rows(c, [(1, 0), (2, 1)], "both").difference.mean())
    )
    assert json.loads(json.dumps(result.to_json()))["prompts"] == 8 and "random tokens" in result.html()


def test_movers_react_to_an_edit_before_them_only():
    from dataclasses import replace

    pairs = toy_pairs()
    pairs = replace(pairs, places={**pairs.places, "right": pairs.places["s1"], "wrong": pairs.places["s2"]})
    c = compare(tiny(), pairs)
    movers = patch_paths(c)
    found = reaction(c, [(0, 1)], movers, share=0.9)
    assert found.right != 0 and -1 <= found.spearman <= 1
    with pytest.raises(ConfigError, match="behind"):
        reaction(c, [(2, 0)], movers, share=0.9)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: find_circuit(tiny(), toy_pairs()), ConfigError, "no stages for 'toy'"),
        (lambda: find_circuit(tiny(), toy_pairs(), stages=STAGES, share=0), ConfigError, "share is 0"),
        (lambda: find_circuit(tiny(), toy_pairs(), stages=[STAGES[1]]), ConfigError, "no earlier stage"),
        (lambda: parse_heads("12-3"), ConfigError, "layer.head"),
        (lambda: parse_heads(" "), ConfigError, "at least one"),
        (lambda: build_pairs("io", None, 3), ConfigError, "Did you mean 'ioi'"),
        (lambda: chance(0, 3, 5), ConfigError, "from 1"),
        (lambda: edit_rows(compare(tiny(), toy_pairs()), [(0, 0)], torch.ones(3, 12)), ShapeError, "summing to 1"),
        (lambda: sweep(compare(tiny(), toy_pairs()), {}), ConfigError, "no head"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_heads_are_parsed():
    assert parse_heads("12.3, 13.4") == [(12, 3), (13, 4)] and names([(12, 3)]) == ["12.3"]
