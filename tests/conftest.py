"""With pytest-xdist, each worker and each process that it starts gets one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which torch reads when it is imported
