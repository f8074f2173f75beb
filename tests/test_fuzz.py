"""A share of what tests/fuzz.py tries, and hundreds of thousands of cases in the slow run."""

import pytest

from fuzz import KINDS, fuzz

NORMAL = {"text": 400, "tokens": 400, "jsonl": 400, "config": 200, "weights": 50, "index": 50}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_input_works_or_is_refused_in_a_sentence(kind):
    assert fuzz(kind, NORMAL.get(kind, 100), seed=1).failures == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_thousands_of_mutated_inputs(kind):
    assert fuzz(kind, 200 * NORMAL.get(kind, 100), seed=2).failures == {}
