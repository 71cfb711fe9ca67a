"""What every test shares: one thread, fixed seeds, hypothesis without deadlines."""

import os
import random
import sys

# Before torch is imported: test processes run side by side, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("updp", deadline=None, derandomize=True, print_blob=True, max_examples=50)
settings.load_profile("updp")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fixed seeds; torch and numpy are only touched by tests that import them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
