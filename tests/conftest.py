"""What all tests, and the scripts that they start, run under."""

import os

import pytest

# Threads that wait for each other sleep. As long as they spin, a step of a small model takes a
# hundred times as long on a machine with anything else to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: each process gets one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` shows GPUs: all other tests mean the CPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
