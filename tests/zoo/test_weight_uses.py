"""Whoever uses a weight, it is there: unusual models on disk, cut to the smallest units and in those of the default."""

from __future__ import annotations

import pytest
from beside_torch import MODES, compare
from weight_uses import WAYS

from zeroxide.errors import ZeroxideError

MAY_REFUSE = {"a penalty on all weights outside of forward", "a loss that uses a block again outside of forward"}
"""Reads outside of every pass: right, or refused by name."""


@pytest.mark.parametrize("mode", ["tiny", "whole"])
@pytest.mark.parametrize("name", list(WAYS))
def test_unusual_use_of_weights_has_plain_torchs_bits(name, mode, tmp_path):
    try:
        assert "units" in compare(WAYS[name], MODES[mode], tmp_path)
    except ZeroxideError as error:
        if name not in MAY_REFUSE or "is empty" not in str(error):
            raise
