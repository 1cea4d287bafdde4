"""What a student with a smaller state must lose, and what a trained one loses (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import NotAnalyzed, layers_of, smaller_states
from ess_monitor.analysis.results import Compressibility, LayerCompressibility, StudentLoss
from ess_monitor.analysis.students import LayerCall, OnStudent, StudentTraining, recorded_calls, train_students
from ess_monitor.capture import Captured, find_layers
from ess_monitor.capture.layers import check_model
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.ess.positions import LONGEST
from ess_monitor.inspection import Progress


def compressibility(
    model: nn.Module,
    *inputs: Any,
    student_states: Sequence[int] = (4, 8, 16),
    trial: StudentTraining | None = None,
    on_student: OnStudent | None = None,
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> Compressibility:
    """Return for every layer and state size the operator loss that no student can avoid on these inputs.

    Distillation first matches operators, ||T_s - T_t||_F^2 / ||T_t||_F^2 (appendix C.6). A student whose state has r
    dimensions cannot get below max_i sum_{m>r} sigma_m(H_i)^2 / ||T_t||_F^2, whatever layer it is (Eckart-Young). The
    loss of the truncated realization is that of a recurrence with other matrices for each input. As a bound the floor
    is loose.

    With a `trial` students are trained on these inputs by the paper's two steps: the operator, then the outputs of the
    layer, ||y_s - y_t||^2 / ||y_t||^2. A student is a layer of the teacher's class with the smaller state; it begins
    with the weights that `reduce` cuts out. So there is one of the layers that `reduce` makes smaller; of the others
    `message` says why not. On other inputs a student loses more, so give a batch of many.

    Args:
        model: the teacher; it is run once in eval mode, without gradients, and not changed. With a trial twice.
        *inputs: arguments of its forward.
        **named_inputs: the same by name.
        student_states: state dimensions per head of the students, from 0 up.
        trial: how long students are trained; None trains none.
        on_student: called with the name of the layer, the state size and each trained student.
        config: as in `minimal_state`.
        progress: passes the layers on, such as `rich.progress.track`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be analyzed.
        ConfigError: `student_states` is empty, or holds no whole numbers from 0 up; `on_student` without a trial.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import compressibility
        >>> from ess_monitor.featurizers import GLA
        >>> [layer] = compressibility(GLA(16, 2), torch.randn(1, 32, 16), student_states=[2, 8]).layers
        >>> [student.floor > 0 for student in layer.students]  # its state has 8 dimensions
        [True, False]
        >>> from ess_monitor.analysis import StudentTraining
        >>> few = StudentTraining(operator_steps=5, activation_steps=5)
        >>> [layer] = compressibility(GLA(16, 2), torch.randn(1, 32, 16), student_states=[4], trial=few).layers
        >>> layer.students[0].floor <= layer.students[0].operator_loss < 1
        True
    """
    hint = "the state dimensions per head of each student"
    sizes = validation.wholes("student_states", student_states, 0, LONGEST, hint=hint)
    if not sizes:
        raise ConfigError(f"student_states={validation.shown(student_states)} is empty; give {hint}.")
    sizes = tuple(sorted(set(sizes)))
    config = validation.optional("config", config, MonitorConfig)
    trial = validation.optional("trial", trial, StudentTraining, hint="StudentTraining(), or None to train nothing")
    calls: dict[str, LayerCall] = {}
    if on_student is not None:
        validation.function("on_student", on_student, hint="of the layer's name, the state size and the student")
        if trial is None:
            raise ConfigError("on_student is called with students that are trained; give a trial: StudentTraining()")
    if trial is not None:
        found = find_layers(check_model(model), None if config is None else config.layers)
        calls = recorded_calls(model, inputs, named_inputs, found)
    analyze = partial(_analyzed, sizes=sizes, calls=calls, trial=trial, on_student=on_student)
    layers, skipped = layers_of(model, inputs, named_inputs, config, analyze, LayerCompressibility, progress)
    return Compressibility(
        model=type(model).__name__,
        student_states=sizes,
        operator_steps=None if trial is None else trial.operator_steps,
        activation_steps=None if trial is None else trial.activation_steps,
        layers=layers,
        skipped=skipped,
    )


def _analyzed(
    captured: Captured,
    config: MonitorConfig,
    *,
    sizes: tuple[int, ...],
    calls: dict[str, LayerCall],
    trial: StudentTraining | None,
    on_student: OnStudent | None,
) -> LayerCompressibility:
    states = smaller_states(captured, lambda _: sizes)
    facts = states.facts(captured.layer.name)
    trained: dict[int, tuple[float, float]] = {}
    if trial is not None:
        try:
            trained = train_students(captured, calls.get(captured.layer.name), sizes, trial, on_student)
        except NotAnalyzed as reason:
            facts["message"] = "; ".join(filter(None, (facts["message"], f"no student was trained: {reason.message}")))
    return LayerCompressibility(
        **facts,
        students=tuple(
            StudentLoss(
                state_size=size,
                floor=states.floor(size),
                truncation=states.truncated(size),
                operator_loss=trained[size][0] if size in trained else None,
                activation_loss=trained[size][1] if size in trained else None,
            )
            for size in sizes
        ),
    )
