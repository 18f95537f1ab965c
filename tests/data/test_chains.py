"""Chained arithmetic: the answers follow from the questions, computed here once more in plain Python."""

from __future__ import annotations

import pytest
import torch

from foveal.core.errors import ConfigError
from foveal.data.chains import LINE, chains, vocabulary
from foveal.data.synthetic import FIRST, SEPARATOR


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("steps", "modulus", "most"), [(1, 2, 1), (5, 7, 9), (12, 11, 12)])
def test_answers_carry_out_the_operations_in_the_order_of_their_labels(steps, modulus, most):
    task = chains(30, steps, generator(), modulus=modulus, most=most)
    assert task.ids.shape == (30, (2 + LINE) * steps + 2) and int(task.ids.max()) < vocabulary(modulus, most)
    first = FIRST + most  # of the values
    orders = set()
    for row, scored in zip(task.ids.tolist(), task.answer.tolist(), strict=True):
        question, answer = row[: task.prompt], row[task.prompt :]
        assert scored == [False] * len(question) + [True] * len(answer)
        assert question[-2] == SEPARATOR
        labels, operations = question[:-2:2], question[1:-2:2]
        orders.add(tuple(labels))
        told, value = dict(zip(labels, operations, strict=True)), question[-1] - first
        expected = []
        for label in range(FIRST, FIRST + steps):
            number = told[label] - first - modulus
            value = (value + number if number < modulus else value * (number - modulus + 1)) % modulus
            expected += [label, told[label], first + value]
        assert answer == expected
    assert len(orders) > 1 or steps == 1, "told in any order"


def test_one_wrong_token_makes_an_answer_wrong():
    task = chains(4, 3, generator())
    answers = task.ids[:, task.prompt :].clone()
    answers[1, 4] += 1
    answers[3, -1] -= 1
    assert task.right(answers).tolist() == [True, False, True, False]
    assert task.question.shape == (4, 8)


def test_everything_follows_from_the_generator():
    one, two, other = (chains(6, 4, generator(s)).ids for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"steps": 33}, {"modulus": 1}])
def test_impossible_chains_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        chains(**{"batch": 1, "steps": 3, "generator": generator(), **changes})
