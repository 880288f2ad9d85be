"""What tests on a GPU run with. All of them are skipped where torch sees none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WHY_NOT = "torch sees no CUDA device"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A directory for compiled kernels that this session fills."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def launcher(cache):
    from zeroxide.kernels.launch import CudaLauncher

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROXIDE_CACHE_DIR", str(cache))
        yield CudaLauncher()


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda", torch.cuda.current_device())
