"""What every test file shares: one thread, a fixed seed, and hypothesis without a clock."""

import os

# Before torch is imported: pytest-xdist runs a process a core, and more threads would get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import hypothesis
import numpy
import pytest
import torch

# Machines differ and are shared, so a deadline would fail by chance; the same examples every time, so failures repeat.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    """Each test begins from the same random state, whichever tests ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
