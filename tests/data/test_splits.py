"""Cross-validation that keeps groups together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ConfigError
from foveal.data.splits import folds


@given(groups=st.integers(3, 12), per=st.integers(1, 5), count=st.integers(2, 3), seed=st.integers(0, 50))
def test_identity_11_no_group_is_on_both_sides(groups, per, count, seed):
    of = torch.arange(groups).repeat_interleave(per)[torch.randperm(groups * per)]
    tested = []
    for train, test in folds(of, count, seed=seed):
        assert not set(of[train].tolist()) & set(of[test].tolist())
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(groups * per))
        tested += test.tolist()
    assert sorted(tested) == list(range(groups * per)), "every example is held out once"


def test_shuffled_windows_share_groups():
    of = torch.arange(10).repeat_interleave(6)
    train, test = folds(of, 5, grouped=False)[0]
    assert set(of[train].tolist()) & set(of[test].tolist()) and len(test) == 12
    with pytest.raises(ConfigError, match="11 for 10 groups"):
        folds(of, 11)
