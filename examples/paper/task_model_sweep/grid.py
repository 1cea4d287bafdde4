"""The grid of the sweep: its mixers, tasks and sizes, and selections of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from examples.paper.experiment import Run, Table
from examples.sweep import DEMANDS

MIXERS = {
    "la:rope_base=10": "LA",
    "gla:beta=16": "GLA beta 16",
    "gla:beta=1": "GLA beta 1",
    "wla:beta=16": "WLA beta 16",
    "wla:beta=1": "WLA beta 1",
}
STATE_SIZES = (2, 4, 16)
DIFFICULTIES = {"mqar": (4, 8), "selective_copying": (4, 8), "compression": (8, 16)}
"""Task -> pairs, tokens to copy, size of the vocabulary."""
STEPS = {"mqar": 1250, "selective_copying": 750, "compression": 750}
LOOKS, TEST_SAMPLES = 10, 512
SHORT = {"mqar": "kv", "selective_copying": "tokens to copy", "compression": "vocabulary"}
"""Task -> what makes it harder, in few words."""


def of_task(rows: list[Run], task: str) -> list[Run]:
    """Return the runs of a task."""
    return [row for row in rows if row["task"] == task]


def demand_of(row: Run) -> int:
    """Return what the task asks a memory for: pairs, tokens, or the size of the vocabulary."""
    return int(row[DEMANDS[row["task"]]])


def setting_of(rows: list[Run]) -> str:
    """Say in words what the runs of a task are."""
    demands = listed(rows, demand_of)
    task = {
        "mqar": f"MQAR with {demands} pairs and 32 tokens (vocabulary of 32, new samples in every batch of 32)",
        "selective_copying": f"selective copying of {demands} tokens among 32 (vocabulary of 16, new samples in every "
        "batch of 32)",
        "compression": f"compression of 16 tokens (vocabulary of {demands}, new samples in every batch of 32); the "
        "decoder sees the last token's features alone",
    }[rows[0]["task"]]
    sizes = listed(rows, lambda row: row["state_size"])
    return (
        f"{len(rows)} runs: {listed(rows, mixer_of)}, with TSS {sizes}, on {task}. Two blocks of width 32, two heads; "
        f"{rows[0]['steps']} steps of AdamW, rate 5e-3 after 50 warm-up steps, gradient clipped to norm 1. "
        f"Measured {len(rows[0]['step'])} times on held-out samples: accuracy of {TEST_SAMPLES}, "
        "tolerance-ESS (1e-3) and entropy-ESS of 8, at 3 positions, mean over heads and both layers."
    )


def mixer_of(row: Run) -> str:
    """Return the name of a run's mixer."""
    return MIXERS[row["model"]]


def of_grid(rows: list[Run], value: Callable[[Run], Any]) -> list[Any]:
    """Return the values that runs have, each once."""
    return list(dict.fromkeys(value(row) for row in rows))


def listed(rows: list[Run], value: Callable[[Run], Any]) -> str:
    """Return the values that runs have, as text."""
    return ", ".join(map(str, of_grid(rows, value)))


def places_of(rows: list[Run]) -> list[tuple[int, int]]:
    """Return demand and TSS, from little to much memory that is needed of a state."""
    places = {(demand_of(row), row["state_size"]) for row in rows}
    return sorted(places, key=lambda place: (place[0] / place[1], place[0]))


def named(place: tuple[int, int], task: str) -> str:
    """Return demand and TSS, as text."""
    return f"{SHORT[task]} {place[0]}, TSS {place[1]}"


def at(rows: list[Run], mixer: str, place: tuple[int, int]) -> list[Run]:
    """Return the runs of a mixer with this demand and TSS, in the order of seeds."""
    found = [row for row in rows if mixer_of(row) == mixer and (demand_of(row), row["state_size"]) == place]
    return sorted(found, key=lambda row: int(row["seed"]))


def grid_table(rows: list[Run], title: str, cell: Callable[[list[Run]], str]) -> Table:
    """Return a table of all mixers, demands and TSS of one task."""
    places = places_of(rows)
    return Table(
        title,
        ("", *(named(place, rows[0]["task"]) for place in places)),
        tuple(
            (mixer, *(cell(at(rows, mixer, place)) for place in places)) for mixer in of_grid(rows, mixer_of)
        ),
    )  # fmt: skip


def accuracy_of(row: Run) -> float:
    """Return the accuracy at the end."""
    return float(row["accuracy"][-1])


def used_of(row: Run) -> float:
    """Return the utilization of the second mixer at the end."""
    return float(row["ess"][-1][1] / row["state_size"])


def mean_of(found: list[Run], value: Callable[[Run], float]) -> str:
    """Return a mean over runs, as text."""
    return f"{statistics.fmean(map(value, found)):.2f}"
