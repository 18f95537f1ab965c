"""The divergence of two inputs' rows against its definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.lens.probes import HeadDivergence

from ..calls import HOSTS, Host, array, dense, event, pads, recorded, tensors

CASES = ["causal", "window", "bidirectional", "softcap, bias, learned sink"]


@pytest.mark.parametrize("kind", ["js", "kl", "tv"])
@pytest.mark.parametrize("host", CASES)
def test_equals_the_definition(host: str, kind: str) -> None:
    h = replace(HOSTS[host], batch=4)
    given = tensors(h)
    p, q = dense(h, given).given_keys[0::2], dense(h, given).given_keys[1::2]
    middle = (p + q) / 2

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)

    want = {"kl": kl(p, q), "js": (kl(p, middle) + kl(q, middle)) / 2, "tv": (p - q).abs().sum(-1) / 2}[kind]
    got = array(recorded({"x": HeadDivergence(kind)}, event(h, given)), "x")  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_equal_inputs_do_not_diverge() -> None:
    h = Host(batch=2)
    given = {name: t[:1].expand_as(t) for name, t in tensors(h).items()}
    assert array(recorded(HeadDivergence("js"), event(h, given)), "divergence").abs().max() < 1e-12


def test_padding_of_either_input_is_no_row() -> None:
    h = Host({"causal": True, "valid": pads((0, 3), (0, 5))}, batch=2)
    got = array(recorded(HeadDivergence("tv"), event(h, tensors(h))), "divergence")
    assert got[0, 0].isnan().nonzero().flatten().tolist() == list(range(32, 37))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="1 sequence; pass two inputs"):
        recorded("divergence", event(Host(), tensors(Host())))
    with pytest.raises(ConfigError, match="expected one of 'js', 'kl', 'tv'"):
        HeadDivergence("cosine")  # type: ignore[arg-type]
    packed = Host({"causal": True, "segments": torch.arange(74).view(2, 37) // 9}, batch=2)
    with pytest.raises(UnsupportedError, match="masks of their own"):
        recorded("divergence", event(packed, tensors(packed)))
