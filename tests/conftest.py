"""What every test runs under: no network, no display, one thread a worker, no deadline on a slow machine."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Set before torch is imported: two workers with two threads each are slower on two cores than two with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("groundscope", deadline=None)
settings.load_profile("groundscope")
