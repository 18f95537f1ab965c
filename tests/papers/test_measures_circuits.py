"""Measures of circuit reuse, CapImagine and context awareness: what is measured is what is said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from foveal.papers.cards import load_card
from foveal.papers.measures import capimagine, circuit_reuse, circuit_reuse_smollm2, context_awareness
from tests.data.tokenizers import byte_tokenizer
from tests.hf import models


def written(tmp_path, result, slug, measure):
    claim = next(c for c in load_card(slug).claims if c.measured_by == measure)
    assert json.loads((tmp_path / slug / f"{claim.id}.json").read_text()) == result and result["claim"] == claim.id


@pytest.mark.parametrize("task", circuit_reuse.TASKS)
def test_symbolic_pairs_change_one_token_and_with_it_the_answer(task):
    pairs = circuit_reuse.draw(task, 60, torch.Generator().manual_seed(0))
    changed = (pairs.clean != pairs.corrupt).nonzero()
    assert changed[:, 0].tolist() == list(range(60))
    assert torch.equal(changed[:, 1:], pairs.places["changed"]) and (pairs.correct != pairs.foil).all()
    for side, answer in ((pairs.clean, pairs.correct), (pairs.corrupt, pairs.foil)):
        if task == "ioi":
            names, subject = side[:, :2], side[:, 3:4]
            assert ((names == answer[:, None]).sum(1) == 1).all() and (subject != answer[:, None]).all()
        elif task == "colored_objects":
            at = (side[:, 1:6:2] == side[:, 7:8]).int().argmax(1)
            assert torch.equal(side.gather(1, 2 * at[:, None])[:, 0], answer)
        else:
            assert torch.equal(
                (side[:, 1] - circuit_reuse.NUMBER + 1) % circuit_reuse.MODULUS + circuit_reuse.NUMBER, answer
            )


def test_lessons_ask_for_every_thing_once():
    for task in circuit_reuse.TASKS:
        ids, answer = circuit_reuse.lesson(task, 30, torch.Generator().manual_seed(1))
        assert ids.shape == answer.shape == (30, circuit_reuse.LONGEST)
        assert answer.sum(1).tolist() == [3 if task == "colored_objects" else 1] * 30
    ids, answer = circuit_reuse.lesson("colored_objects", 30, torch.Generator().manual_seed(1))
    for row, at in zip(ids, answer, strict=True):
        colors = dict(zip(row[1:6:2].tolist(), row[0:6:2].tolist(), strict=True))
        asked = [int(row[i - 2]) for i in at.nonzero()[:, 0]]
        assert sorted(asked) == sorted(colors) and [colors[thing] for thing in asked] == row[at].tolist()
    ids, answer = circuit_reuse.lesson("copy", 30, torch.Generator().manual_seed(1))
    half = circuit_reuse.LONGEST // 2
    assert torch.equal(ids[:, :half], ids[:, half:]) and answer[0].nonzero()[:, 0].tolist() == [
        *range(half + 1, 2 * half)
    ]


def test_circuit_measure(monkeypatch, tmp_path):
    for name, value in {
        "TRAINING": 3,
        "PROMPTS": 6,
        "DEPTH": 3,
        "HEADS": 4,
        "DIM": 16,
        "DRAWS": 20,
    }.items():
        monkeypatch.setattr(circuit_reuse, name, value)
    result = circuit_reuse.measure_symbolic(seeds=2, seed=7, out=tmp_path)
    written(tmp_path, result, "circuit_reuse", "foveal.papers.measures.circuit_reuse:measure_symbolic")
    for run in result["measured"]["per_seed"]:
        a, b = (set(run["circuits"][task]) for task in circuit_reuse.TASKS[:2])
        assert run["overlap"] == pytest.approx(len(a & b) / len(a | b))
        assert not run["learned"] and not run["met"], "three steps teach nothing, so nothing is claimed"


def test_four_heads_are_strong_queries_and_a_negative_mover():
    effect = torch.tensor([[0.5, -0.2, 0.01], [0.3, 0.0, -0.6]])
    stage = SimpleNamespace(effects=SimpleNamespace(top=lambda share: [(1, 2), (0, 0), (1, 0), (0, 1)], effect=effect))
    queries = SimpleNamespace(heads=[(0, 2), (1, 2), (1, 1), (0, 1), (1, 0)])
    groups = circuit_reuse_smollm2.four_heads(SimpleNamespace(stages=[stage, queries]))
    assert groups == {"inhibition": [(0, 2), (1, 1), (0, 1)], "negative mover": [(1, 2)]}


def test_instrument_measure(monkeypatch, tmp_path):
    for name, value in {"TRAINING": 3, "BATCH": 4, "HELD_OUT": 12, "DIM": 16}.items():
        monkeypatch.setattr(capimagine, name, value)
    result = capimagine.measure_instrument(seeds=1, seed=7, out=tmp_path)
    written(tmp_path, result, "capimagine", "foveal.papers.measures.capimagine:measure_instrument")
    (told,) = result["measured"]["per_seed"]
    assert set(told) == set(capimagine.MODELS) and result["measured"]["learned"] == 0
    assert told["bottleneck"]["effects"]["direct"] == pytest.approx(0, abs=1e-5)
    assert told["bottleneck"]["corruptions"]["zero"]["fired"] == 1


def test_context_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(context_awareness, "LENGTHS", (300, 400))
    monkeypatch.setattr(context_awareness, "DEPTHS", (0.0, 1.0))
    monkeypatch.setattr(context_awareness, "ANSWER", 2)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    loaded = SimpleNamespace(
        model=models.fill(transformers.LlamaForCausalLM(config).eval()), tokenizer=byte_tokenizer(bos=True, chat=True)
    )
    for measure in (context_awareness.measure_template, context_awareness.measure_allocation):
        result = measure(seed=7, out=tmp_path, load=lambda: loaded)
        written(tmp_path, result, "context_awareness", f"foveal.papers.measures.context_awareness:{measure.__name__}")
    mean = result["measured"]["mean"]
    assert (
        sum(mean["plain"].values()) == pytest.approx(1, abs=1e-3)
        and mean["plain"]["template"] < mean["templated"]["template"]
    )
