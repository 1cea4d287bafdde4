"""What holds for every test: few threads, fixed seeds, and tools that are missing are named."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

MAX_THREADS = int(os.environ.get("TEST_THREADS", "1"))
"""Many small tensors: more threads only fight each other. The suite holds with 2 as well (see CONTRIBUTING.md)."""

LONGEST_FILES = (
    "observability/test_end_to_end.py",
    "test_sweep.py",
    "test_ranks_examples.py",
    "capture/adapters/test_decay_power.py",
    "interventions/test_compiled.py",
    "capture/adapters/test_pull.py",
    "capture/adapters/test_faithful.py",
    "faults/test_faults.py",
    "trust/test_runner.py",
    "pipeline/test_replays_resumed.py",
    "integrations/test_contract.py",
)
"""They begin, the longest first: one that came last would run alone while the other processes have nothing left."""

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

# Read by the processes that tests start: theirs would fight with each other and with those of the other tests.
os.environ.setdefault("OMP_NUM_THREADS", str(MAX_THREADS))

if not torch.cuda.is_available():
    # Read when triton and fla are imported, which other libraries do: fla is tested in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FLA_USE_COMPILE", "0")


class _TorchRandom:
    """torch's generator as hypothesis expects one, so that an example that fails is found again."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM = _TorchRandom()
hypothesis.register_random(_TORCH_RANDOM)
hypothesis.settings.register_profile("local", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True, print_blob=True)
# More inputs for tests/fuzz, which says how many, and new ones every time.
hypothesis.settings.register_profile("long", deadline=None, max_examples=300, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if IN_CI else "local"))


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Started in the background of a shell. Programs that are tested with Ctrl-C would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an accelerator: torch.cuda.is_available() is False")
    if item.get_closest_marker("servers") and shutil.which("promtool") is None:
        reason = "promtool is not on PATH; install the package `prometheus` (Debian, Ubuntu) or a Prometheus release"
        if IN_CI:
            pytest.fail(f"CI promises the server tools, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_left_in_the_compiler() -> Iterator[None]:
    """Name the test that leaves a sample armed or a regularizer attached: compiled code of later tests would see it."""
    yield
    compiler = sys.modules.get("ess_monitor.capture.hooks.compiler")
    if compiler is not None:
        if compiler._HOLDERS:
            gc.collect()  # of a monitor that was never closed, which is what some tests are about
        assert not compiler._HOLDERS, "a sample is still armed"
        assert not compiler._SEEN_BY_COMPILER, "a regularizer is still attached"
