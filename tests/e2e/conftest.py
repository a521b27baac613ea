from __future__ import annotations

import pytest

from tests.e2e.world import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A two-layer model. The tests of a module give their runs names of their own."""
    return make_world(tmp_path_factory.mktemp("world"))
