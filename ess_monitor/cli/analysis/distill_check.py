"""`ess-monitor distill-check`: what students with smaller states must lose, and what trained ones lose."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from ess_monitor.cli.analysis.output import Heads, check_outputs, progress, put_out
from ess_monitor.cli.options import (
    AsJson,
    Batch,
    Checkpoint,
    Html,
    Input,
    InputKind,
    Kwargs,
    Layers,
    Length,
    Prefix,
    Seed,
    Target,
    VocabSize,
    Width,
    whole_numbers,
)
from ess_monitor.errors import ConfigError

if TYPE_CHECKING:
    from ess_monitor.analysis import StudentTraining

States = Annotated[str, typer.Option(metavar="R,R,...", help="State dimensions per head of each student.")]
WithTrial = Annotated[bool, typer.Option("--trial", help="Train students, which takes seconds for each of them.")]
Steps = Annotated[
    int | None,
    typer.Option(min=0, help="Steps of a student with --trial; default: 50 on the operator, 100 on outputs."),
]


def distill_check(
    target: Target,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    kind: Input = InputKind.gaussian,
    batch: Batch = 2,
    heads: Heads = 16,
    length: Length = 128,
    width: Width = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    student_states: States = "4,8,16",
    trial: WithTrial = False,
    operator_steps: Steps = None,
    activation_steps: Steps = None,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Show the operator loss that no student with a smaller state can avoid, layer by layer.

    The loss is that of section 4.3, the squared difference of T as a share of the teacher's. Nothing is trained,
    unless --trial asks for it: then students, the same layers with smaller states, are trained on the input by the two
    steps of appendix C.6.
    """
    from ess_monitor.analysis import compressibility
    from ess_monitor.cli.measuring import config_of, loaded, run_on
    from ess_monitor.report import render_compressibility

    check_outputs(html, as_json, checkpoint)
    config = config_of(batch, length, layer, heads=heads)
    states = whole_numbers("student_states", student_states, 0)
    training = _training(trial, operator_steps, activation_steps)
    with redirect_stdout(sys.stderr):
        model, inputs = loaded(target, kwargs, checkpoint, prefix, kind, batch, length, width, vocab_size, seed)
        settings = {"student_states": states, "trial": training, "config": config, "progress": progress}
        result = run_on(model, inputs, compressibility, **settings)
    title = f"{result.model}, {kind.value} input {tuple(inputs.shape)}: operator loss of a student, at least"
    page = render_compressibility(result) if html is not None else None
    put_out(result, page, title, as_json=as_json, html=html)


def _training(trial: bool, operator_steps: int | None, activation_steps: int | None) -> StudentTraining | None:
    from ess_monitor.analysis import StudentTraining

    steps = {"operator_steps": operator_steps, "activation_steps": activation_steps}
    given = {name: value for name, value in steps.items() if value is not None}
    if given and not trial:
        raise ConfigError(f"{next(iter(given))}: students are trained with --trial only; add it")
    return StudentTraining(**given) if trial else None
