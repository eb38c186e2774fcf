"""What all tests run under."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker, and each process that it starts, gets one thread; torch reads this at import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` shows GPUs: all other tests mean the CPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
