"""A share of what tests/fuzz.py tries, and hundreds of thousands of cases in the slow run."""

import pytest

from fuzz import KINDS, fuzz

NORMAL = {"text": 1000, "tokens": 400, "config": 400, "jsonl": 400, "index": 150}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_input_works_or_is_refused_in_a_sentence(kind):
    assert fuzz(kind, NORMAL.get(kind, 100), seed=1).failures == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_times_as_much_mutated_input(kind):
    assert fuzz(kind, 100 * NORMAL.get(kind, 100), seed=2).failures == {}
