"""One fabricated run, with hostile texts in it, for all tests of the report."""

import pytest
from fabricated import Fabricated, fabricate


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    """A home with every artifact of a finished run; not changed by tests."""
    return fabricate(tmp_path_factory.mktemp("fabricated") / "home")
