"""The circuits of a report: figures on the page are those of patching, and what cannot be patched is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, DataError, UnsupportedError
from foveal.data import text as texts
from foveal.hf.load import LoadedModel, load_model
from foveal.lens.circuit_survey import check_tasks, compared, page_data, survey_circuit, task_pairs, to_json
from foveal.lens.circuits import Circuit, chance, find_circuit, jaccard, names
from foveal.lens.patching import attribute_heads, compare, patch_heads

from ..data.tokenizers import byte_tokenizer
from .pairs import toy_pairs
from .tiny_tasks import HEADS, LAYERS, save_task_model

TASKS = ("ioi", "colored_objects")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_task_model(tmp_path_factory.mktemp("tasks")), device="cpu")


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def found(loaded: LoadedModel, told: list[Any]) -> list[Any]:
    pairs = [task_pairs(task, loaded.tokenizer, 5, seed=3) for task in TASKS]
    return [survey_circuit(compare(loaded.model, p), progress=lambda *a: told.append(a)) for p in pairs]


def test_figures_are_those_of_patching(loaded: LoadedModel, found: list[Any]) -> None:
    differ = False
    for one in found:
        c = compare(loaded.model, one.pairs)
        torch.testing.assert_close(one.screen.change, attribute_heads(c).change)
        torch.testing.assert_close(one.patched.change, patch_heads(c).change)
        again = find_circuit(loaded.model, one.pairs)
        assert one.circuit.to_json() == again.to_json()
        assert {"screen", "heads", *(f.stage.name for f in again.stages)} == {name for name, _, _ in one.maps}
        for share in (0.1, 0.2, 0.3, 0.4, 0.5):
            a, b = set(one.screen.top(share)), set(one.patched.top(share))
            agreed = replace(one, circuit=replace(again, share=share)).agreement()
            assert agreed.jaccard == jaccard(a, b) and agreed.shared == names(a & b)
            assert agreed.chance == chance(len(a), len(b), LAYERS * HEADS, len(a & b))
            differ |= a != b
        moved = one.arrays[f"circuits.{one.circuit.task}.movers"]
        assert moved.shape == (LAYERS, HEADS, 5) and torch.equal(moved.values, again.stages[0].effects.change)
    assert differ, "screen and patching must differ somewhere, else this test could not tell them apart"


def test_progress_names_task_and_stage_and_ends(found: list[Any], told: list[Any]) -> None:
    assert {w.split(":")[0] for w, _, _ in told} == set(TASKS)
    last = {what: (done, total) for what, done, total in told if "estimating" not in what}
    assert "ioi: paths of the movers" in last and "ioi: patching every head" in last
    assert all(done == total > 0 for done, total in last.values())


def test_the_page_holds_every_effect_with_its_interval(loaded: LoadedModel, found: list[Any]) -> None:
    data = json.loads(json.dumps(page_data(found, loaded.tokenizer), allow_nan=False))
    for one, task in zip(found, data["tasks"], strict=True):
        assert task["circuit"] == names(one.circuit.heads) and task["pairs"] == 5
        for (name, _, effects), m in zip(one.maps, task["maps"], strict=True):
            low, high = effects.interval()
            for key, want in (("effect", effects.effect), ("low", low), ("high", high)):
                np.testing.assert_allclose(np.array(m[key], float), want, rtol=1e-3)
            assert m["name"] == name and m["stage"] == (name not in ("screen", "heads"))
        kept = {m["name"]: m["kept"] for m in task["maps"] if m["stage"]}
        assert kept == {f.stage.name: [list(h) for h in f.heads] for f in one.circuit.stages}
    example = data["tasks"][0]["example"]
    subject = example["foil"].strip()
    assert example["clean"].split().count(subject) == 2 and example["corrupt"].split().count(subject) == 1
    assert example["clean"].endswith((" to", " for"))
    length = int(found[0].pairs.place("end")[0, 0]) + 1
    assert length < found[0].pairs.clean.shape[1] and len(texts.tokens(loaded.tokenizer, example["clean"])) == length


def test_overlaps_stand_beside_chance(found: list[Any]) -> None:
    ((a, b, rows),) = compared(found)
    assert (a, b) == TASKS and rows[1].share == 0.02
    assert rows[1].jaccard == jaccard(found[0].circuit.heads, found[1].circuit.heads)
    told = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert told["overlaps"][0]["tasks"] == list(TASKS) and told["overlaps"][0]["at"][1] == rows[1].to_json()
    assert told["tasks"][0]["activation"]["method"] == "activation"


def test_heads_without_any_effect_are_no_circuit(loaded: LoadedModel) -> None:
    """Nothing to rank, nothing to compare: an empty circuit is said, not guessed."""
    import copy

    model = copy.deepcopy(loaded.model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    one = survey_circuit(compare(model, task_pairs("ioi", loaded.tokenizer, 2)))
    assert one.circuit.heads == set() and one.agreement() is None and compared([one, one]) == []
    json.dumps(page_data([one], loaded.tokenizer), allow_nan=False)


def test_a_prompt_of_ones_own(loaded: LoadedModel) -> None:
    text = "Then Mary and John met at the market, and John gave a book to"
    one = survey_circuit(compare(loaded.model, task_pairs("ioi", loaded.tokenizer, 16, prompt=text)))
    assert isinstance(one.circuit, Circuit) and len(one.pairs) == 1
    (task,) = page_data([one], loaded.tokenizer)["tasks"]
    assert task["example"]["clean"] == text and (task["example"]["correct"], task["example"]["foil"]) == (
        " Mary",
        " John",
    )


def bidirectional() -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    return transformers.BertLMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: check_tasks([]), ConfigError, "names no task; expected one or more of ioi, colored_objects"),
        (lambda t: check_tasks(["iou"]), ConfigError, "Did you mean 'ioi'"),
        (lambda t: check_tasks(["ioi", "colored_objects"], True), ConfigError, "builds its own prompts"),
        (lambda t: task_pairs("ioi", t, 3, prompt="Nobody is here"), DataError, "no subject to patch"),
        (lambda t: task_pairs("ioi", byte_tokenizer(), 3), DataError, "names are single tokens"),
        (lambda t: compare(bidirectional(), toy_pairs()), UnsupportedError, "expected a causal decoder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(loaded: LoadedModel, call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(loaded.tokenizer)


def test_the_report_shows_circuits(loaded: LoadedModel, found: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2: pip install 'foveal[report]'")
    pytest.importorskip("scipy", reason="needs scipy: pip install 'foveal[data]'")
    from foveal.lens.report import render_report, report_data
    from foveal.lens.survey import survey

    ids = torch.arange(3, 43)[None]
    seen, about = survey(loaded.model, ids), {"model": "tiny", "text": "made up"}
    words = [f"w{i}" for i in range(40)]
    page = render_report(report_data(seen, words, about, page_data(found, loaded.tokenizer)))
    assert "Heads that ioi and colored_objects share" in page and page.count("<canvas data-task=") == 10
    head = found[0].circuit.stages[0].heads[0]
    assert f"{head[0]}.{head[1]}: " in page
    assert "<h2>Circuits</h2>" not in render_report(report_data(seen, words, about))
