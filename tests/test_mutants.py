"""The mutants of `make mutants` can all be applied; whether they are killed takes minutes, and is asked there."""

from __future__ import annotations

import mutants


def test_every_mutant_changes_one_place_and_names_tests_that_exist() -> None:
    assert len(mutants.MUTANTS) >= 40
    assert len(set(mutants.MUTANTS)) == len(mutants.MUTANTS)
    assert [flaw for mutant in mutants.MUTANTS if (flaw := mutants.flaw(mutant))] == []
