"""``foveal tune`` end to end on a tiny model: the files, the resume, and every kind of bad input."""

from __future__ import annotations

import json
import math

import pytest

from foveal.core.budget import Budget
from foveal.core.errors import ConfigError, DataError, FovealError, ModelError
from foveal.patterns import BlockTopK, Dense, SlidingWindow
from foveal.policies import Policy
from foveal.tune import TuneOptions, run_tune
from foveal.tune.candidates import FURTHER, further
from tests.tune.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def few(monkeypatch):
    """Three patterns instead of nine: the protocol is the same."""
    listed = [
        ("dense", Dense()),
        ("window 64", SlidingWindow(64, 4)),
        ("block top-k", BlockTopK(budget=Budget(density=0.5))),
    ]
    monkeypatch.setattr("foveal.tune.candidates.patterns", lambda context: listed[1:])
    monkeypatch.setattr("foveal.tune.run.layer_options", lambda context: [pattern for _, pattern in listed])


def options(folder, out, **changes) -> TuneOptions:
    return TuneOptions(**{"model": str(folder), "context": 256, "out": str(out), "decode_tokens": 16, **changes})


NEEDED = {
    "name", "policy", "density", "tile_density", "prefill_speedup", "decode_speedup", "peak_ratio", "ppl", "ppl_increase",
    "decode_ppl_increase", "kl", "needle",
}  # fmt: skip


def test_writes_results_policy_and_report(folder, tmp_path, few):
    seen = []
    results = run_tune(options(folder, tmp_path / "out"), report=lambda what, done, total: seen.append((done, total)))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert {"model", "context", "dtype", "machine", "baseline", "candidates", "chosen"} <= stored.keys()
    assert {"name", "prefill_s", "decode_tok_s", "peak_mb", "ppl", "needle"} <= stored["baseline"].keys()
    names = [c["name"] for c in stored["candidates"]]
    own = [name for name in names if name.startswith("dense (")]
    assert len(own) <= 1, "dense by foveal's own kernel, where it has one"
    assert stored["chosen"] in names and names[: 3 + len(own)] == ["dense", *own, "window 64", "block top-k"]
    assert names[3 + len(own) :] in ([], ["per layer"]), "a search that comes back to dense adds no candidate"
    for row in stored["candidates"]:
        assert row.keys() >= NEEDED
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    dense = stored["candidates"][0]
    assert (
        dense["density"] == 1.0
        and dense["kl"] == pytest.approx(0, abs=1e-6)
        and dense["ppl_increase"] == pytest.approx(0, abs=1e-5)
    )
    policy = Policy.load(tmp_path / "out" / "policy.json")
    assert policy.context == (256, 256) and policy.model.layers == 2 and policy.dtype == "float32"
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert seen[-1][0] <= seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_dense_by_an_own_kernel_is_a_candidate_without_loss(folder, tmp_path, few):
    results = run_tune(options(folder, tmp_path / "out", impl="gather", search=False))
    row = results["candidates"][1]
    assert row["name"] == "dense (gather)" and row["density"] == 1.0
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["decode_ppl_increase"] == pytest.approx(0, abs=1e-5)
    assert row["verdict"] != "over the loss limit"


@pytest.mark.parametrize(("pieces", "texts"), [(2, 1), (3, 2), (9, 2)])
def test_the_search_takes_as_many_texts_as_there_are(folder, tmp_path, few, pieces, texts):
    from transformers import AutoTokenizer

    from foveal.data.text import load_text, tokens

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokens(tokenizer, load_text())[: 256 * pieces + 40]
    (tmp_path / "text").write_text(tokenizer.decode(ids))
    results = run_tune(options(folder, tmp_path / "out", text=str(tmp_path / "text")))
    assert results["search"]["texts"] == texts


def test_an_interrupted_run_goes_on_where_it_stopped(folder, tmp_path, few, monkeypatch):
    from foveal.tune.meter import Meter

    calls = {"decoding": 0}
    real = Meter.decoding

    def broken(self, *args, **kwargs):
        calls["decoding"] += 1
        if calls["decoding"] == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Meter, "decoding", broken)
    with pytest.raises(KeyboardInterrupt):
        run_tune(options(folder, tmp_path / "out", search=False))
    kept = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    monkeypatch.setattr(Meter, "decoding", real)
    quality = Meter.quality

    def never(self, ids, policy, *args, **kwargs):
        raise AssertionError("quality was measured again")

    monkeypatch.setattr(Meter, "quality", never)
    run_tune(options(folder, tmp_path / "out", search=False))
    monkeypatch.setattr(Meter, "quality", quality)
    assert (tmp_path / "out" / "journal.jsonl").read_text().splitlines()[: len(kept)] == kept


def test_further_patterns_join_a_run_that_was_made_without_them(folder, tmp_path, few, monkeypatch):
    from foveal.tune.meter import Meter

    first = run_tune(options(folder, tmp_path / "out", search=False))
    measured: list[str] = []
    real = Meter.decoding

    def noted(self, *args, **kwargs):
        measured.append("decoding")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Meter, "decoding", noted)
    more = run_tune(options(folder, tmp_path / "out", search=False, patterns=("xattention", "moba")))
    old = [c["name"] for c in first["candidates"]]
    assert [c["name"] for c in more["candidates"]] == [
        *old, "moba 25 %", "moba 12.5 %", "xattention 95 %", "xattention 80 %",
    ]  # fmt: skip
    assert len(measured) == 5, "dense once more in this session, and the four new ones"
    moba = next(c for c in more["candidates"] if c["name"] == "moba 25 %")
    assert moba["policy"]["default"]["prefill"] == {"pattern": "moba", "block": 8, "top_k": 8} and moba["density"] < 0.6


@pytest.mark.parametrize("context", [64, 4096, 131072])
def test_every_further_pattern_can_be_made_at_any_context(context):
    found = further(tuple(FURTHER), context)
    assert len({c.name for c in found}) == len(found) > len(FURTHER)
    assert {c.policy.default.prefill.registered_name for c in found} == {"moba", "xattention", "triangle", "dhsa"}
    assert further((), context) == []


def test_loss_figures_repeat_exactly_with_the_same_seed(folder, tmp_path, few):
    one = run_tune(options(folder, tmp_path / "a", search=False))
    two = run_tune(options(folder, tmp_path / "b", search=False))
    other = run_tune(options(folder, tmp_path / "c", search=False, seed=5))
    figures = [[(c["ppl"], c["kl"], c["decode_ppl"], c["density"]) for c in r["candidates"]] for r in (one, two, other)]
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]


def test_a_journal_of_other_options_is_not_mixed_in(folder, tmp_path, few):
    run_tune(options(folder, tmp_path / "out", search=False))
    run_tune(options(folder, tmp_path / "out", search=False, seed=3))
    assert (tmp_path / "out" / "journal.jsonl.old").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "/nowhere/at/all"}, ModelError, "nowhere"),
        ({"context": 4096}, ConfigError, r"at most 1024 tokens.*--context 1024"),
        ({"text": "short"}, DataError, r"longer --text or a smaller --context"),
        ({"text": "missing"}, DataError, "does not exist"),
        ({"out": "file/below"}, DataError, "--out"),
    ],
)
def test_bad_input_is_one_clear_error(folder, tmp_path, few, changes, error, words):
    (tmp_path / "short").write_text("Just a few words.")
    (tmp_path / "file").write_text("")
    paths = {k: str(tmp_path / v) for k, v in changes.items() if k in ("text", "out")}
    with pytest.raises(error, match=words) as caught:
        run_tune(options(folder, **{"out": tmp_path / "out", **changes, **paths}))
    assert isinstance(caught.value, FovealError)


def test_nan_weights_are_named(folder, tmp_path, few):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        run_tune(options(tmp_path / "nan", tmp_path / "out"))


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 10}, {"decode_tokens": 200}, {"max_ppl_increase": 0.0}, {"seed": -1}, {"context": "many"},
        {"patterns": ("mobba",)},
    ],
)  # fmt: skip
def test_options_are_checked_before_anything_is_loaded(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TuneOptions(**{"model": "smollm2", "context": 256, **changes})
