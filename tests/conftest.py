"""What every test module may ask for: each CPU target in turn, and a number of threads that is put back."""

from collections.abc import Callable, Iterator

import pytest
import rnnfast
from hypothesis import settings
from rnnfast import _core

settings.register_profile("rnnfast", deadline=None, derandomize=True, database=None)
settings.load_profile("rnnfast")
_core.share_small_jobs(True)  # also among threads that sleep, so that tests see what a user's calls in a row see


@pytest.fixture(scope="module", params=rnnfast.targets())
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every target that this build has and this CPU runs."""
    before = rnnfast.target()
    rnnfast.use_target(request.param)
    yield request.param
    rnnfast.use_target(before)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    before = rnnfast.get_num_threads()
    yield rnnfast.set_num_threads
    rnnfast.set_num_threads(before)
