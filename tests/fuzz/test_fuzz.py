"""Every parser on changed inputs: a duoka error of a few lines or a result, soon, and in little memory."""

import os
import random
import resource
import time
import traceback
import warnings
from collections import Counter

import pytest

from duoka.errors import DuokaError
from fuzz.targets import TARGETS

NUM_INPUTS = int(os.environ.get("DUOKA_FUZZ_INPUTS", "200"))
FIRST_SEED = int(os.environ.get("DUOKA_FUZZ_SEED", "0"))
LONGEST_S = 10
MOST_KIB = 1 << 20
MOST_LINES, MOST_CHARACTERS = 25, 4000
"""A list of differences between a file and a model has up to 21 lines."""


def find_fault(target, seed: int, *, again: bool = True) -> str:
    """Feed one input, and return what is wrong with the outcome; empty if nothing is.

    An input that takes long is fed a second time, because the machine itself may have paused.
    """
    started = time.monotonic()
    try:
        with warnings.catch_warnings(action="ignore"):
            target.feed(random.Random(seed))
    except DuokaError as error:
        text = str(error)
        if text.count("\n") >= MOST_LINES or len(text) > MOST_CHARACTERS:
            return f"a message of {len(text):,} characters: {text[:200]}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {where.filename}:{where.lineno}: {str(error)[:200]}"
    taken_s = time.monotonic() - started
    if taken_s > LONGEST_S:
        return find_fault(target, seed, again=False) if again else f"{taken_s:.1f} s"
    return ""


@pytest.mark.timeout(3600 if NUM_INPUTS > 1000 else 300)
@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.name)
def test_changed_inputs_are_read_or_refused_in_a_few_lines(make, tmp_path):
    target = make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = {seed: fault for seed in range(FIRST_SEED, FIRST_SEED + NUM_INPUTS) if (fault := find_fault(target, seed))}
    kinds = Counter(fault.partition(": ")[0] for fault in faults.values())
    assert not faults, f"{len(faults)} of {NUM_INPUTS} inputs: {kinds.most_common(8)}; {list(faults.items())[:8]}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".duoka-tmp", ".part"))]
