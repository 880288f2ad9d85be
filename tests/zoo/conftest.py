"""The zoo runs beside the tests: workers go through the types that were selected, and each test waits for its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from dispatch import Result, Zoo

MODES = ["tiny", "checkpointing", "bf16"]
RESULTS = pytest.StashKey[list[Result]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        # Collecting for `make test` does without importing transformers.
        excluded = metafunc.config.option.markexpr == "not slow"
        if excluded:
            metafunc.parametrize("model_type", [])
            return
        from small_models import model_types

        metafunc.parametrize("model_type", model_types())


@pytest.fixture(scope="session")
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    items = [item for item in request.session.items if hasattr(item, "callspec")]
    types = [item.callspec.params["model_type"] for item in items if "model_type" in item.callspec.params]
    running = Zoo(types, MODES, tmp_path_factory.mktemp("zoo"), workers=os.cpu_count() or 1)
    yield running
    running.close()


@pytest.fixture
def result(zoo: Zoo, model_type: str, request: pytest.FixtureRequest) -> Result:
    found = zoo.result(model_type)
    request.config.stash.setdefault(RESULTS, []).append(found)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A table: model type, what was built, and what each mode came to."""
    results = config.stash.get(RESULTS, [])
    if not results:
        return
    terminalreporter.section("zoo")
    for each in results:
        terminalreporter.write_line(each.line())
    ran = [each for each in results if each.ran]
    terminalreporter.write_line(
        f"{len(results)} types: {len(ran)} beside plain torch, {sum(not each.faults for each in ran)} of them the same "
        f"in every mode; {len(results) - len(ran)} skipped"
    )
