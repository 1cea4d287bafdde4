"""The stance under which compiled code stands aside: held by several, and set before anything is compiled."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

from ess_monitor import Monitor
from ess_monitor.capture.hooks.compiler import EagerStance
from ess_monitor.featurizers import Backbone, BackboneConfig


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture(autouse=True)
def _default() -> Iterator[None]:
    assert stance() == "default"
    yield
    torch._dynamo.eval_frame._stance = torch._dynamo.eval_frame.DynamoStance()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_holders_may_end_in_any_order_and_the_last_one_brings_the_stance_before_back(order: tuple[int, ...]) -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        holders = [EagerStance() for _ in order]
        for holder in holders:
            holder.begin()
            holder.begin()
        for k in order:
            assert stance() == "force_eager"
            holders[k].end()
            holders[k].end()
        assert stance() == "eager_on_recompile"
    assert stance() == "default"


def test_a_holder_may_begin_again_after_its_end() -> None:
    holder = EagerStance()
    for _ in range(2):
        holder.begin()
        assert stance() == "force_eager"
        holder.end()
        assert stance() == "default"


def test_a_holder_that_is_dropped_lets_go() -> None:
    holder, other = EagerStance(), EagerStance()
    holder.begin()
    other.begin()
    del holder
    gc.collect()
    assert stance() == "force_eager"
    other.end()
    assert stance() == "default"


def test_a_monitor_that_is_dropped_while_it_is_armed_does_not_leave_compiled_code_switched_off() -> None:
    monitor = Monitor(Backbone(BackboneConfig(vocab_size=16, width=16, state_size=8)))
    monitor.start()
    assert stance() == "force_eager"
    del monitor
    gc.collect()
    assert stance() == "default"


PROGRAM = """
import sys
import torch
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig

net = Backbone(BackboneConfig(vocab_size=16, width=16, state_size=8))
monitor = Monitor(net, MonitorConfig.load(environment=False, every_n_steps=3, overhead_budget_ratio=None))
assert "torch._dynamo" not in sys.modules, "the order that is tested here is another one"
monitor.start()
called = torch.compile(net, fullgraph=True, backend="eager")
for _ in range(2):
    called(torch.randint(0, 16, (2, 8))).sum().backward()
    monitor.step()
print(len(monitor.flush()), len(monitor.layers), torch._dynamo.utils.counters["stats"]["unique_graphs"])
monitor.close()
"""


def test_a_model_that_is_compiled_after_the_first_sample_was_armed_is_not_traced_with_hooks() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read, layers, graphs = map(int, done.stdout.split()[-3:])
    assert read == layers > 0
    assert graphs == 1
