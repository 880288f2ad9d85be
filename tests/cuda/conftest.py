"""Kernels built for the host, once a session."""

from __future__ import annotations

import pytest
from emulated import COMPILER, WHY_NOT, Builds


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    if COMPILER is None:
        pytest.skip(WHY_NOT)
    return Builds(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def libraries(builds):
    return builds.build_all()
