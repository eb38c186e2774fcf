"""What all tests, and the scripts that they start, run under."""

import os

import pytest

# As the commands set it for themselves: many processes here are forks of one with torch loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: each process gets one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` shows GPUs: all other tests mean the CPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
