"""Damaged files of every kind: a load succeeds or raises this package's errors, in bounded memory."""

from __future__ import annotations

import pytest

from tests import mutations


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", mutations.LOADERS)
def test_a_damaged_file_loads_or_is_refused_by_name(name: str) -> None:
    with mutations.bounded_memory():
        outcome = mutations.run(name, 100, seed=0)
    assert not outcome.faults, outcome.faults[0]
    assert outcome.loads > 0 and outcome.refusals.total() > 20
