"""Checks a monitor's state as a whole before any of it is used, and finds its layers in the present model.

A state comes out of a checkpoint, which others may have written or cut short. A wrong type in a counter would show up
as a failing scrape hours later, one in a treatment inside the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from ess_monitor import validation
from ess_monitor.capture.layers import bare_name
from ess_monitor.errors import CheckpointError
from ess_monitor.records import (
    ActionKind,
    ActionOutcome,
    ChangeKind,
    Changes,
    Condition,
    Outcome,
    Reading,
    SampleResult,
    layer_title,
)
from ess_monitor.runtime.guard import logger

STATE_VERSION = 1
"""Version of `Monitor.state_dict`; raised when a field changes its meaning or disappears."""

_Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Seconds = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
"""Some 30,000 years: far from where arithmetic on them overflows."""


class _StatePart(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)


class _CadenceState(_StatePart):
    every_n_steps: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    """Absent in states of 0.1."""
    budget_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """None where there was none."""
    next_step: _Integer
    last_sample: _Integer
    interval_steps: Annotated[int, Field(ge=1, le=2**63 - 1)]
    cost_seconds: _Seconds
    train_seconds: _Seconds
    sample_cost: _Seconds
    cost_since_sample: _Seconds
    debt: _Seconds = 0.0
    steps: list[_Seconds]
    held: bool


class _CountersState(_StatePart):
    steps_total: _Count
    measurements: dict[Outcome, _Count]
    changes: dict[Condition, _Count]
    nonfinite: dict[str, _Count]
    last_intervention_at: dict[ActionKind, FiniteFloat]
    interventions: dict[ActionKind, dict[ActionOutcome, _Count]]


class _ChangesState(_StatePart):
    batches: _Count
    base: FiniteFloat
    first: FiniteFloat
    second: FiniteFloat
    third: FiniteFloat
    first_squared: FiniteFloat
    kind: ChangeKind


class _ReplaysState(_StatePart):
    left: _Count = 0
    begins_at: _Count = 0
    sums: dict[str, _ChangesState] = {}
    settings: dict[str, JsonValue] | None = None
    """Settings of the evidence. None: saved before they were."""


class _ResultState(_StatePart):
    step: _Count
    readings: tuple[Reading, ...]
    metrics: dict[str, FiniteFloat]
    nonfinite: list[str]
    changes: dict[str, _ChangesState] = {}
    slowness: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Absent in states of before there were turns."""


class _TurnsState(_StatePart):
    last_step: dict[str, _Count] = {}
    paces: dict[str, Annotated[list[Annotated[int, Field(ge=-64, le=64)]], Field(max_length=64)]] = {}
    missed: dict[str, _Count] = {}
    kinds: dict[str, str] = {}
    expected: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}


class _UndecayedState(_StatePart):
    last: dict[str, tuple[_Count, Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = {}
    ages: dict[str, _Count] = {}


class _MonitorState(_StatePart):
    step: _Count
    judge_at: _Count | None
    evidence: _ResultState | None
    autopilot: dict[str, Any]
    cadence: _CadenceState
    diagnosis: dict[str, Any]
    ledger: _CountersState
    replays: _ReplaysState = _ReplaysState()
    """Absent in states of 0.1."""
    layer_turns: _TurnsState = _TurnsState()
    """Absent in states of before there were turns."""
    undecayed: _UndecayedState = _UndecayedState()
    """Absent in states of before `retention_every_n_samples`."""
    turn: Annotated[int, Field(ge=0, le=2**62)]
    """Below the 64 bits of a generator's seed, to which it is added."""


def result_state(result: SampleResult) -> dict[str, Any]:
    """Return a sample's result as plain values."""
    return {
        "step": result.step,
        "readings": [reading.model_dump(mode="json") for reading in result.readings],
        "metrics": dict(result.metrics),
        "nonfinite": sorted(result.nonfinite),
        "changes": changes_state(result.changes),
        "slowness": dict(result.slowness),
    }


def result_from_state(state: Mapping[str, Any]) -> SampleResult:
    """Return the result as it was."""
    return SampleResult(
        int(state["step"]),
        tuple(Reading.model_validate(reading) for reading in state["readings"]),
        dict(state["metrics"]),
        frozenset(state["nonfinite"]),
        changes=changes_from_state(state["changes"]),
        slowness=dict(state["slowness"]),
    )


def changes_state(changes: Mapping[str, Changes]) -> dict[str, Any]:
    """Return the changes of each layer as plain values."""
    return {layer: sums._asdict() for layer, sums in changes.items()}


def changes_from_state(state: Mapping[str, Any]) -> dict[str, Changes]:
    """Return the changes as they were."""
    return {layer: Changes(**sums) for layer, sums in state.items()}


def read_state(state: Any) -> dict[str, Any]:
    """Return `state` with every value of the type and in the range that `Monitor.state_dict` gives.

    The parts of the diagnosis and of the autopilot are checked where they are loaded.

    Raises:
        CheckpointError: another version, or not a monitor's state.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if not (isinstance(version, int) and version == STATE_VERSION):
        found = validation.shown_version(version) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"state: version {found} cannot be read, only {STATE_VERSION}; "
            "start without the monitor's state (its measurements begin anew, the training is not affected)"
        )
    if validation.has_long_integer(state):
        raise CheckpointError(
            "state: holds a whole number of more than 64 bits, as no monitor writes; start without it (the "
            "measurements begin anew, the training is not affected)"
        )
    try:
        return _MonitorState.model_validate(dict(state)).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"state: not a monitor's state ({where:.200}: {first['msg']:.200}); start without it (the measurements "
            "begin anew, the training is not affected)"
        ) from None


def has_settings(replays: Mapping[str, Any], evidence: BaseModel) -> bool:
    """Return whether the `replays` of a state are under these settings of the evidence, or older than such states."""
    return replays["settings"] in (None, evidence.model_dump(mode="json"))


def match_layers(saved: Iterable[str], present: Collection[str]) -> dict[str, str]:
    """Return which layer of this model each layer of a state is, by their names.

    Equal names are one layer. Others are compared by `bare_name`. Where no layer is found in this way, all of them may
    stand behind one prefix, in the model or in the state. A name that could be two layers is left out.

    Args:
        saved: names in the state.
        present: names of the measured layers.

    Examples:
        >>> match_layers(["blocks.0.mixer", "head"], ["net.model.blocks.0.mixer", "net.head"])
        {'blocks.0.mixer': 'net.model.blocks.0.mixer', 'head': 'net.head'}
        >>> match_layers(["mixer"], ["model.mixer", "base_model.mixer"])
        {}
    """
    saved = tuple(saved)
    found = {name: name for name in saved if name in present}
    left = _by_bare_name(name for name in saved if name not in found)
    free = _by_bare_name(name for name in present if name not in found)
    pairs = {key: key for key in left if key in free}
    if not (found or pairs):
        pairs = _behind_a_prefix(left, free)
    found |= {left[key][0]: free[other][0] for key, other in pairs.items() if len(left[key]) == len(free[other]) == 1}
    return found


def _by_bare_name(names: Iterable[str]) -> dict[str, list[str]]:
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(bare_name(name), []).append(name)
    return by_key


def _behind_a_prefix(saved: Collection[str], present: Collection[str]) -> dict[str, str]:
    """Return the present name of each saved one, where one prefix, added to all or taken off all, leads to it."""
    first = next(iter(saved), "")
    longer = [name.removesuffix(first) for name in present if first and name.endswith(f".{first}")]
    shorter = [first.removesuffix(name) for name in present if name and first.endswith(f".{name}")]
    ways = [{name: prefix + name for name in saved} for prefix in longer]
    ways += [{name: name.removeprefix(prefix) for name in saved} for prefix in shorter]
    found = [way for way in ways if all(name in present for name in way.values())]
    return found[0] if len(found) == 1 else {}


def rename_layers(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a state that `read_state` has checked, with its layers called as in this model.

    Others are left out, and the log names them. The diagnosis and the autopilot rename theirs where they are loaded.

    Args:
        state: the state.
        names: by a layer's name in the state, that in this model.
    """

    def renamed(by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in by_name.items() if name in names}

    lost = [name for name in state["ledger"]["nonfinite"] if name not in names]
    if lost:
        logger.warning(
            "ess_monitor: the state to go on from has layers that are not among the measured ones, or could be several "
            "of them: %s. What was known of them is dropped, a treatment included.",
            ", ".join(map(layer_title, lost)),
        )
    result = state["evidence"]
    if result is not None:
        readings = [{**each, "layer": names[each["layer"]]} for each in result["readings"] if each["layer"] in names]
        nonfinite = [names[name] for name in result["nonfinite"] if name in names]
        by_name = {key: renamed(result[key]) for key in ("changes", "slowness")}
        result = {**result, "readings": readings, "nonfinite": nonfinite, **by_name}
    ledger = {**state["ledger"], "nonfinite": renamed(state["ledger"]["nonfinite"])}
    replays = {**state["replays"], "sums": renamed(state["replays"]["sums"])}
    turns = {key: renamed(by_name) for key, by_name in state["layer_turns"].items()}
    undecayed = {key: renamed(by_name) for key, by_name in state["undecayed"].items()}
    parts = {"ledger": ledger, "replays": replays, "layer_turns": turns, "undecayed": undecayed}
    return {**state, "evidence": result, **parts}
