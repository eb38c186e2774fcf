"""What all tests, and the scripts that they start, run under."""

import os
from collections.abc import Iterator

import pytest
from processes import end, guard, marked, servers

# As the commands set it for themselves: many processes here are forks of one with torch loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: each process gets one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")
MARK = guard()


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` shows GPUs: all other tests mean the CPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure() -> None:
    end(MARK)  # what fixtures of several tests have left, for which Python would wait at its end


@pytest.fixture(autouse=True)
def nothing_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill what a test has started and left; what serves several tests was there before."""
    before = marked(MARK)
    yield
    if not request.node.get_closest_marker("cluster"):  # a scheduler ends its own jobs
        end(MARK, before | servers())
