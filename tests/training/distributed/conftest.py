"""Four processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.distributed.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(4, tmp_path_factory.mktemp("meeting-points"))
    yield started
    started.close()
