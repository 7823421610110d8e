"""One thread a process: the tensors of tests are tiny, and threads that wait for each other on a busy machine take
several times as long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
