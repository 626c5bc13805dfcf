"""What every test file shares: one thread, a fixed seed, hypothesis without a clock, and the list of kills."""

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


def pytest_terminal_summary(terminalreporter):
    """List what tests noted with ``record_property("fault", ...)``: every kill, where it fell and what it left."""
    passed = terminalreporter.stats.get("passed", [])
    faults = [(report.nodeid, value) for report in passed for name, value in report.user_properties if name == "fault"]
    if faults:
        terminalreporter.section("faults injected; every run was recorded once and as if undisturbed")
    for number, (test, fault) in enumerate(faults, start=1):
        if number == 1 or test != faults[number - 2][0]:
            terminalreporter.line(test)
        terminalreporter.line(f"  {fault}")
