"""Crops padded rows of every kind of operator on a simulated second device. Runs in a process of its own.

    python -m tests.capture.crop_on_second_device

Prints as JSON, for each kind, by how much T differs from that on the host, and what was read on the host meanwhile.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.hooks.given_tokens import TokenWatch
from ess_monitor.ess import Operator
from tests.ess.kinds import KINDS, LENGTH, SAMPLES
from tests.faults import second_device

REAL = torch.tensor([[0] * 3 + [1] * 9, [0] * 5 + [1] * 5 + [0] * 2, [1] * 12])
_READS = ("_local_scalar_dense", "nonzero", "equal", "unique")


def cropped(whole: Operator, real: Tensor) -> Operator:
    """Return seven tokens of each row."""
    layer = nn.Identity()
    call = Call(layer, layer, "op", kwargs={"attention_mask": real}, output=real)
    heads = range(whole.heads)
    return TokenWatch().select(call, whole, slice(0, SAMPLES), heads, 7, most=SAMPLES)


def main() -> None:
    """Compare every kind."""
    reads: list[str] = []
    computed = second_device._computed

    def noted(func: Any, args: Any, kwargs: Any) -> Any:
        reads.extend(read for read in _READS if read in func._schema.name)
        return computed(func, args, kwargs)

    second_device._computed = noted
    found = {}
    for name, make in KINDS.items():
        whole = make()
        assert (whole.batch, whole.length) == (SAMPLES, LENGTH)
        expected = cropped(whole, REAL).materialize()
        with second_device.SecondDevice():
            there, real = whole.map(lambda tensor: tensor.to("second")), REAL.to("second")
            reads.clear()
            few = cropped(there, real)
            seen = list(reads)
            assert few.device.type == "second"
            T = few.map(lambda tensor: tensor.to("cpu")).materialize()
        found[name] = (float((T - expected).abs().max()), seen)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
