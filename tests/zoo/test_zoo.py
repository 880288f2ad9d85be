"""Every model type of transformers that can be built small and trained by plain torch trains here with the same bits.

Weights and state on disk at stage 3, units cut to the smallest; see `beside_torch.py` for what is compared. A type is
skipped, with the reason in the summary table, where no small model of it runs in plain torch or torch does not repeat
its own bits.
"""

from __future__ import annotations

import pytest
from conftest import RESULTS
from dispatch import Result

FEWEST = 460
"""Types that are compared at least, of all that the pinned transformers has."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_type_trains_as_plain_torch_does(model_type: str, result: Result) -> None:
    if not result.built:
        pytest.skip(f"no small {model_type}: {result.detail}")
    assert result.faults == []
    if not result.ran:
        pytest.skip("; ".join(detail for _, detail in result.modes.values()))


@pytest.mark.slow
def test_most_types_ran(request: pytest.FixtureRequest) -> None:
    """The harness finds small models: a zoo whose cages are empty would pass, too."""
    results = request.config.stash.get(RESULTS, [])
    from small_models import model_types

    if len(results) < len(model_types()):
        pytest.skip("only a part of the zoo was selected")
    assert len([each for each in results if each.ran]) >= FEWEST
