import shutil
from pathlib import Path

import pytest


@pytest.fixture
def stage(trained, tmp_path) -> Path:
    """A copy, to be changed, of the stage that a module's own ``trained`` left."""
    return Path(shutil.copytree(trained, tmp_path / "stage"))
