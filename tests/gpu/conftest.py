"""What only a GPU can tell. `pytest tests/gpu` on a machine that has one; elsewhere each test says what it lacks."""

from pathlib import Path

import pytest
from liteframe.engines.device import find_gpus


def pytest_collection_modifyitems(items):
    gpus, why = find_gpus()
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not gpus:
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why}"))
