"""The survey and its report: figures on the page are those measured, long texts fit, nothing in a text breaks the page."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveal.core.errors import ConfigError, DataError, ShapeError
from foveal.lens.report import headline, render_report, report_data, shades, token_texts, write_report
from foveal.lens.survey import head_figures, summary, survey, token_figures
from foveal.patterns import SlidingWindow
from foveal.policies import Policy

from .models import eager_weights, tiny, tokens

pytest.importorskip("jinja2", reason="needs jinja2: pip install 'foveal[report]'")
pytest.importorskip("scipy", reason="needs scipy: pip install 'foveal[data]'")

N = 70


@pytest.fixture(scope="module")
def found() -> Any:
    policy = Policy.uniform(SlidingWindow(window=9, sinks=1))
    return survey(tiny(), tokens(1, N), probes=["received", "norms"], policy=policy)


@pytest.fixture(scope="module")
def data(found: Any) -> dict[str, Any]:
    words = [f"w{i}" for i in range(N - 2)] + ["</script><b>", "\u2028&\n"]
    return report_data(found, words, {"model": "tiny", "text": "made up", "policy": "a window"})


def test_figures_are_those_of_eager_attention(found: Any) -> None:
    weights = eager_weights(tiny(), input_ids=tokens(1, N))[0]
    heads = head_figures(found)
    np.testing.assert_allclose(heads["mass on the first token"], weights[..., 0].mean(-1), rtol=1e-3, atol=1e-5)
    away = torch.arange(N)[:, None] - torch.arange(N)
    np.testing.assert_allclose(heads["look-back distance (tokens)"], (weights * away).sum(-1).mean(-1), rtol=1e-3)
    first = (weights * ((away >= 9) & (torch.arange(N) >= 1))).sum(-1).mean(-1)
    np.testing.assert_allclose(heads["mass lost to the policy"][0], first[0], rtol=1e-3, atol=1e-5)
    per_token = token_figures(found)
    np.testing.assert_allclose(per_token["received"], weights.sum(-2).mean((0, 1)), rtol=1e-3, atol=1e-4)
    assert {"norms.key", "norms.value", "prediction entropy"} <= set(per_token)
    assert all(len(v) == N for v in per_token.values()) and {"mean received", "mean norms.key"} <= set(heads)


def test_the_page_holds_what_was_measured(found: Any, data: dict[str, Any]) -> None:
    page = render_report(data)
    held = json.loads(re.search(r'<script id="data" type="application/json">(.+?)</script>', page, re.DOTALL)[1])
    assert held == json.loads(json.dumps(data)) and held["tokens"][-2] == "</script><b>"
    shade = np.frombuffer(base64.b64decode(held["atlas"]["values"]), np.uint8).reshape(3, 4, -1)
    want = found.recording["atlas"].values.numpy().reshape(3, 4, -1)
    np.testing.assert_allclose((shade / 255.0) ** 2, want, atol=4.1e-3)  # half a byte at weight 1
    weight = np.frombuffer(base64.b64decode(held["edges"]["weight"]), "<f4")
    np.testing.assert_allclose(weight, np.nan_to_num(found.recording["edges.weight"].values.numpy()).ravel())
    layer, head, query, key, heaviest = data["lost"]["edges"][0]
    assert heaviest == pytest.approx(float(np.nanmax(found.compared["lost.weight"].values)), rel=1e-4)
    assert query - key >= 9 and 0 <= layer < 3 and 0 <= head < 4
    assert data["lost"]["mean"] == pytest.approx(float(np.nanmean(found.compared["lost.mass"].values)), rel=1e-4)
    assert "http://" not in page and "https://" not in page, "nothing is fetched"


def test_headlines(data: dict[str, Any]) -> None:
    assert headline(data).startswith("The policy drops ")
    plain = {**data, "lost": None}
    assert "no token's residual stream is massive" in headline(plain)
    sinks = {**data["sinks"], "primary": {"position": 0, "on": 2, "off": 9}}
    assert headline({**plain, "sinks": sinks}).endswith("token 0 is massive from layer 2 to 8.")
    assert "What a window drops" not in render_report(plain)


def test_shades_keep_small_weights_apart() -> None:
    assert shades(np.array([0.0, 1e-4, 4e-4, 1.0])).tolist() == [0, 3, 5, 255]


def test_a_summary_for_the_terminal(found: Any) -> None:
    s = summary(found)
    assert len(s["first_key"]) == 3 and len(s["lost_mass"]["by_head"]) == 3 and s["primary_sink"] is None
    json.dumps(s, allow_nan=False)


def test_refusals(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="one text of at least 2 tokens"):
        survey(tiny(), tokens(2, 20))
    with pytest.raises(ConfigError, match="needs a backward pass"):
        survey(tiny(), tokens(1, 20), probes=["importance"])
    with pytest.raises(ConfigError, match="--compare POLICY"):
        survey(tiny(), tokens(1, 20), probes=["lost"])
    with pytest.raises(ConfigError, match="unknown probe"):
        survey(tiny(), tokens(1, 20), probes=["entropie"])
    with pytest.raises(DataError, match="cannot be written"):
        write_report(data, tmp_path / "no" / "such" / "folder.html")


def test_very_short_texts() -> None:
    found = survey(tiny(), tokens(1, 2))
    render_report(report_data(found, ["a", "b"], {"model": "tiny", "text": "two tokens"}))


def test_token_texts() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    assert token_texts(Tokenizer(), torch.tensor([3, 4])) == ["<3>", "<4>"]
