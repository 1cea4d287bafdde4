"""Findings 1 to 3: how ESS goes along with accuracy over a grid of tasks and mixers, and where states stay unused."""

from __future__ import annotations

from collections.abc import Sequence

from examples.paper.experiment import Experiment, Finding, Run
from examples.paper.nets import TEST_SEED, Training, evaluate, readings
from examples.paper.task_model_sweep.correlations import finding_1, finding_2, other_tasks
from examples.paper.task_model_sweep.grid import DIFFICULTIES, LOOKS, MIXERS, STATE_SIZES, STEPS, TEST_SAMPLES, of_task
from examples.paper.task_model_sweep.state_use import finding_3, saturation
from examples.sweep import data, grid, network


def runs(seeds: Sequence[int], short: bool) -> list[Run]:
    """Return a run for each task, mixer, TSS, demand and seed: the grid of `examples/sweep.py`."""
    settings = [
        one
        for task, steps in STEPS.items()
        for one in grid(
            [task], list(MIXERS)[:: 4 if short else 1], seeds[:1] if short else seeds, 1 if short else steps,
            state_sizes=STATE_SIZES[::2] if short else STATE_SIZES, demands=DIFFICULTIES,
            learning_rate=5e-3, warmup_steps=50, clip_norm=1.0,
        )
    ]  # fmt: skip
    return [{name: value for name, value in one.items() if name != "run_id"} for one in settings]


def run(settings: Run) -> Run:
    """Train one net; measure it on held-out samples before, while and after."""
    seed, steps = settings["seed"], settings["steps"]
    training = Training(network(settings), data(settings, 1_000_000, seed), settings["learning_rate"])
    test = data(settings, TEST_SAMPLES, seed + TEST_SEED)
    found: Run = {"step": [], "accuracy": [], "loss": [], "ess": [], "entropy": []}

    def look(training: Training) -> None:
        accuracy, loss = evaluate(training.model, test, TEST_SAMPLES)
        layers = readings(training.model, test.batch(range(8))[0])
        found["step"].append(training.step)
        found["accuracy"].append(accuracy)
        found["loss"].append(loss)
        found["ess"].append([float(each.effective_size) for each in layers])
        found["entropy"].append([float(each.entropy_size) for each in layers])

    training.run(steps, max(1, steps // LOOKS), look)
    return found


def findings(rows: list[Run]) -> list[Finding]:
    """Say what the grid shows."""
    recall = of_task(rows, "mqar")
    return [finding_1(recall), finding_2(recall), saturation(recall), finding_3(recall), *other_tasks(rows)]


EXPERIMENT = Experiment("task_model_sweep", runs, run, findings)
