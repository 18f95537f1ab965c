"""Events of frames and their tensor: the identities of FE-LSD's spec sheet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import DataError, ShapeError
from foveal.data.events import Events, events_between, events_to_est

SHAPE = (6, 8)


def events(count: int = 50, seed: int = 0) -> Events:
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(count, generator=g, dtype=torch.float64)
    x, y, p = (torch.randint(n, (count,), generator=g) for n in (SHAPE[1], SHAPE[0], 2))
    return Events(t, x, y, p, torch.zeros(count, dtype=torch.long))


@given(st.integers(1, 60), st.integers(0, 99))
def test_identity_1_the_mass_is_the_number_of_events_before_the_last(count, seed):
    e = events(count, seed)
    raw = events_to_est(*e[:4], SHAPE, normalise=False)
    assert float(raw.sum()) == pytest.approx(int((e.t < e.t.max()).sum()), abs=1e-4)


def test_identity_1_an_event_at_a_quarter_past_bin_one():
    t, x, y, p = (
        torch.tensor([0.0, 1.25 / 4, 1.0]),
        torch.tensor([9, 3, 0]),
        torch.tensor([0, 2, 0]),
        torch.tensor([0, 1, 0]),
    )
    raw = events_to_est(t, x, y, p, SHAPE, normalise=False)
    assert float(raw[0, 5 + 1, 2, 3]) == 0.75 and float(raw[0, 5 + 2, 2, 3]) == 0.25
    assert float(raw.sum()) == 1, "the first lies outside and the last weighs nothing"


def test_identity_2_flips_and_polarity_permute_the_tensor():
    e = events()
    e = e._replace(t=torch.cat([e.t[:-1], torch.ones(1, dtype=torch.float64)]))
    est = events_to_est(*e[:4], SHAPE)
    torch.testing.assert_close(events_to_est(e.t, SHAPE[1] - 1 - e.x, e.y, e.p, SHAPE), est.flip(3))
    torch.testing.assert_close(events_to_est(e.t, e.x, SHAPE[0] - 1 - e.y, e.p, SHAPE), est.flip(2))
    torch.testing.assert_close(events_to_est(e.t, e.x, e.y, 1 - e.p, SHAPE), est.roll(5, 1))


def test_identity_2_running_time_backwards_turns_the_bins_around():
    inner = events()
    t = torch.cat([inner.t * 0.9 + 0.05, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    outside = torch.tensor([0, 0])
    x, y, p = torch.cat([inner.x, outside]), torch.cat([inner.y, outside]), torch.cat([inner.p, outside])
    forth, back = (events_to_est(u, x, y, p, SHAPE, normalise=False) for u in (t, 1 - t))
    first = torch.zeros(10, *SHAPE)
    first[0, 0, 0] = 1.0  # of the two ends, the one at 0 counts and the last does not
    turned = (forth[0] - first).unflatten(0, (2, 5)).flip(1).flatten(0, 1)
    torch.testing.assert_close(back[0] - first, turned, atol=1e-5, rtol=0)


def test_nothing_happened_is_zero_and_images_are_apart():
    none = torch.zeros(0)
    assert float(events_to_est(none, none, none, none, SHAPE).abs().max()) == 0
    a, b = events(30, 1), events(20, 2)
    both = Events(*(torch.cat(pair) for pair in zip(a, b, strict=True)))
    image = torch.tensor([0] * 30 + [2] * 20)
    est = events_to_est(*both[:4], SHAPE, image=image, images=3)
    torch.testing.assert_close(est[0], events_to_est(*a[:4], SHAPE)[0])
    torch.testing.assert_close(est[2], events_to_est(*b[:4], SHAPE)[0])
    assert float(est[1].abs().max()) == 0 and float(est[0].max()) == 1


def film(seed: int = 0, steps: int = 7) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return 0.05 + torch.rand(2, steps, *SHAPE, generator=g, dtype=torch.float64)


def test_identity_10_polarities_add_up_to_the_change_of_log_intensity():
    frames, c = film(), torch.tensor([0.1, 0.3], dtype=torch.float64)
    e = events_between(frames, c)
    total = torch.zeros(2, *SHAPE, dtype=torch.float64)
    total.index_put_((e.image, e.y, e.x), (2.0 * e.p - 1) * c[e.image], accumulate=True)
    change = frames[:, -1].log() - frames[:, 0].log()
    assert bool(((total - change).abs() < c.view(2, 1, 1)).all())


def test_events_come_when_the_line_between_frames_crosses_the_next_level():
    level = torch.tensor([0.0, 0.25, 0.25, -0.1], dtype=torch.float64)
    frames = level.exp().view(1, 4, 1, 1)
    e = events_between(frames, torch.tensor([0.1], dtype=torch.float64))
    expected = [(0.1 / 0.25) / 3, (0.2 / 0.25) / 3, (2 + 0.15 / 0.35) / 3, (2 + 0.25 / 0.35) / 3]
    torch.testing.assert_close(e.t[:4], torch.tensor(expected, dtype=torch.float64))
    assert e.p.tolist()[:4] == [1, 1, 0, 0]


def test_a_still_picture_sends_nothing():
    assert len(events_between(film()[:, :1].expand(-1, 5, -1, -1), torch.tensor([0.1, 0.1])).t) == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: events_between(film()[:, :1], torch.ones(2)), ShapeError, "two frames"),
        (lambda: events_between(film(), torch.tensor([0.1, 0.0])), DataError, "above 0"),
        (lambda: events_to_est(*[torch.tensor([v]) for v in (0.1, 0, 0, -1)], SHAPE), DataError, "polarity"),
        (lambda: events_to_est(*[torch.tensor([v]) for v in (-0.1, 0, 0, 1)], SHAPE), DataError, "below 0"),
        (lambda: events_to_est(torch.zeros(2), *[torch.zeros(1)] * 3, SHAPE), ShapeError, r"\(n,\)"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
