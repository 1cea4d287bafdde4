"""What a student with a smaller state must lose, before it is trained (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import Progress, layers_of, smaller_states
from ess_monitor.analysis.results import Compressibility, LayerCompressibility, StudentLoss
from ess_monitor.capture import Captured
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.ess.positions import LONGEST


def compressibility(
    model: nn.Module,
    *inputs: Any,
    student_states: Sequence[int] = (4, 8, 16),
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> Compressibility:
    """Return for every layer and state size the operator loss that no student can avoid on these inputs.

    Distillation first matches operators, ||T_s - T_t||_F^2 / ||T_t||_F^2 (appendix C.6). A student whose state has r
    dimensions cannot get below max_i sum_{m>r} sigma_m(H_i)^2 / ||T_t||_F^2, whatever layer it is (Eckart-Young). The
    loss of the truncated realization is what a student can start from. As a bound the floor is loose.

    Args:
        model: the teacher; it is run once in eval mode, without gradients, and not changed.
        *inputs: arguments of its forward.
        **named_inputs: the same by name.
        student_states: state dimensions per head of the students, from 0 up.
        config: as in `minimal_state`.
        progress: passes the layers on, such as `rich.progress.track`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be analyzed.
        ConfigError: `student_states` is empty, or holds no whole numbers from 0 up.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import compressibility
        >>> from ess_monitor.featurizers import GLA
        >>> [layer] = compressibility(GLA(16, 2), torch.randn(1, 32, 16), student_states=[2, 8]).layers
        >>> [student.floor > 0 for student in layer.students]  # its state has 8 dimensions
        [True, False]
    """
    hint = "the state dimensions per head of each student"
    sizes = validation.wholes("student_states", student_states, 0, LONGEST, hint=hint)
    if not sizes:
        raise ConfigError(f"student_states={validation.shown(student_states)} is empty; give {hint}.")
    sizes = tuple(sorted(set(sizes)))
    analyze = partial(_analyzed, sizes=sizes)
    layers, skipped = layers_of(model, inputs, named_inputs, config, analyze, LayerCompressibility, progress)
    return Compressibility(model=type(model).__name__, student_states=sizes, layers=layers, skipped=skipped)


def _analyzed(captured: Captured, config: MonitorConfig, *, sizes: tuple[int, ...]) -> LayerCompressibility:
    states = smaller_states(captured, lambda _: sizes)
    return LayerCompressibility(
        **states.facts(captured.layer.name),
        students=tuple(
            StudentLoss(state_size=size, floor=states.floor(size), truncation=states.truncated(size)) for size in sizes
        ),
    )
