"""The one configuration of a monitor: nested frozen models, from keyword arguments, YAML or the environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from ess_monitor import validation
from ess_monitor.capture import CaptureConfig, LayerFilter, ModulationConfig
from ess_monitor.diagnosis import DiagnosisConfig
from ess_monitor.distributed.config import DistributedConfig
from ess_monitor.errors import ConfigError
from ess_monitor.evidence import EvidenceConfig
from ess_monitor.exporters import ExporterConfig
from ess_monitor.interventions import AutopilotConfig
from ess_monitor.runtime import RuntimeConfig
from ess_monitor.validation.settings import Settings, did_you_mean

ENVIRONMENT_PREFIX = "ESS_MONITOR_"
_OTHER_VARIABLES = re.compile(
    r"(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)|TARGETS",
    re.IGNORECASE,
)
"""What follows the prefix in variables that are no settings: Kubernetes sets such for a Service whose name begins with
ess-monitor, and the compose file of the dashboards reads the last one."""
_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://")


class MonitorConfig(Settings):
    """Settings of a `Monitor`. Unknown names are errors.

    Examples:
        >>> config = MonitorConfig(every_n_steps=50, layers=["blocks.*"], capture={"samples": 2})
        >>> config.every_n_steps, config.layers.include
        (50, ('blocks.*',))
    """

    every_n_steps: PositiveInt = 100
    """Optimizer steps between two samples. At 100 a run of 10,000 steps gives a curve of 100 points."""
    overhead_budget_ratio: Annotated[float, Field(gt=0, le=1)] | None = 0.01
    """Share of the training time that capture and computation may take; the interval is stretched to keep it. 1 %.
    None: never stretched, so that the sampled steps do not depend on the machine (a resumed run in mode auto is then
    bitwise the uninterrupted one wherever it runs)."""
    tolerance: NonNegativeFloat = 1e-3
    """tau of the tolerance-ESS: singular values above it count. The paper's value for utilization (appendix C.3)."""
    tolerance_scale: Literal["absolute", "output"] = "absolute"
    """Against what `tolerance` is measured. "absolute": against 1, as in the paper. "output": against what the layer
    puts out at each token: the rows of T are divided by their norms first, so that neither the size of B and C nor a
    norm behind the layer matters (`ess_monitor.ess.measure`)."""
    retention_every_n_samples: PositiveInt = 1
    """In every how many samples of a layer it is measured with A := I, too, for its retention. Without, a sample takes
    0.7 to 0.8 of the time (gated linear attention, Mamba-2) or 0.9 (delta rules). In between, the retention is that of
    the present ESS against the last such size; a layer about which something is to be decided is measured each time."""
    positions: Literal["midpoint", "all"] | PositiveInt = 3
    """Where in the sequence H_i is measured. 3 are a quarter, a half and three quarters, as in our experiments; more
    tighten the certified bound at a cost that grows linearly."""
    modulation: ModulationConfig | None = None
    """Separator tokens at which state modulation is measured: {"separators": [0]}. None: it is not, and costs
    nothing."""
    layers: LayerFilter = LayerFilter()
    """Which layers; a list is read as include patterns."""
    capture: CaptureConfig = CaptureConfig()
    """How much of a forward pass is captured."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where the work runs."""
    distributed: DistributedConfig = DistributedConfig()
    """How the ranks of a distributed run measure together."""
    diagnosis: DiagnosisConfig = DiagnosisConfig()
    """From readings to conditions."""
    evidence: EvidenceConfig = EvidenceConfig()
    """What must support a collapse before a layer is called collapsed."""
    autopilot: AutopilotConfig = AutopilotConfig()
    """What may be done about a collapsed layer: "off", "advise" (the default: says so), "auto", or its settings."""
    exporters: tuple[ExporterConfig, ...] = ()
    """Sinks built by the monitor: a kind ("prometheus") or its settings ({"kind": "prometheus", "port": 0})."""
    handle_sigterm: bool | None = None
    """Record a run whose process is told to end (SIGTERM) as `terminated` before the process ends as it would without
    the monitor. None: where a scheduler or launcher has started the process that ends its jobs so (Slurm, Kubernetes,
    LSF, PBS, torchrun and others, by their environment variables); elsewhere no signal handler is installed."""
    strict: bool = False
    """Raise `PartError` at the next step when a part of the monitor has failed, instead of training on: for tests, and
    to find a cause. Off, because no fault of the monitor should end a run."""
    run_name: str | None = None
    """Name of the run in the exporters; by default the model's class and the time it started."""
    hyperparameters: dict[str, bool | int | float | str | None] = Field(default={})
    """Facts that tell the run from others, such as {"kv_pairs": 8, "seed": 0}; they are written to the event log, and
    read by `ess-monitor study`. The callback for Lightning adds the module's `hparams`."""

    @field_validator("hyperparameters")
    @classmethod
    def _are_finite(cls, given: dict[str, Any]) -> dict[str, Any]:
        wrong = [name for name, value in given.items() if isinstance(value, float) and not math.isfinite(value)]
        if wrong:
            raise ValueError(f"must be finite numbers or texts (got {given[wrong[0]]} for {wrong[0]!r})")
        return given

    @model_validator(mode="after")
    def _samples_are_judged_before_the_next(self) -> MonitorConfig:
        lag, every, auto = self.autopilot.lag_steps, self.every_n_steps, self.autopilot.mode == "auto"
        if lag < every or not (auto or self.distributed.ranks not in (None, "zero", 1)):
            return self
        # Blames what was set.
        defaults = ("", " (the default)")
        lag_text = f"autopilot.lag_steps={lag}{defaults[lag == AutopilotConfig().lag_steps]}"
        every_text = f"every_n_steps={every}{defaults[every == MonitorConfig().every_n_steps]}"
        is_above = lag != AutopilotConfig().lag_steps and every == MonitorConfig().every_n_steps
        problem = f"{lag_text} must be below {every_text}" if is_above else f"{every_text} must be above {lag_text}"
        why = "in mode auto" if auto else f"with distributed.ranks={self.distributed.ranks!r}"
        lower = f", or set autopilot.lag_steps={every - 1}" if every > 1 else ""
        raise ValueError(
            f"{problem}: {why} a sample is judged lag_steps after it was taken, and before the next one is; "
            f"set every_n_steps={lag + 1} or more{lower}"
        )

    @classmethod
    def load(cls, path: str | Path | None = None, *, environment: bool = True, **settings: Any) -> MonitorConfig:
        """Settings from a YAML file, overridden by `ESS_MONITOR_...` variables, overridden by keyword arguments.

        `ESS_MONITOR_EVERY_N_STEPS=50`, `ESS_MONITOR_CAPTURE__SAMPLES=2` (two underscores enter a section), lists and
        objects as JSON. Nested settings are merged, not replaced.

        Raises:
            ConfigError: the file cannot be read or is not a mapping, a name is unknown, or a value is out of range; the
                message names setting, value and allowed range.
        """
        if path is not None:
            validation.instance("path", path, (str, Path), hint="the path of a YAML file")
        validation.flag("environment", environment)
        merged = read_mapping(Path(path)) if path is not None else {}
        if environment:
            merged = _merge(merged, _read_environment())
        return cls(**_merge(merged, settings))


def with_environment(settings: Mapping[str, Any]) -> MonitorConfig:
    """Return these settings on top of those in the environment.

    Raises:
        ConfigError: as for `MonitorConfig.load`.
    """
    return MonitorConfig(**_merge(_read_environment(), settings))


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for name, value in high.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


class _Environment(BaseSettings, MonitorConfig):
    """The settings as environment variables name them. Never instantiated: values are validated by `MonitorConfig`."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__")


def _read_environment() -> dict[str, Any]:
    for name in os.environ:
        if not name.upper().startswith(ENVIRONMENT_PREFIX):
            continue
        after = name[len(ENVIRONMENT_PREFIX) :]
        if _OTHER_VARIABLES.fullmatch(after) or (after.upper().endswith("PORT") and _ADDRESS.match(os.environ[name])):
            continue
        if after.lower().split("__")[0] not in MonitorConfig.model_fields:
            raise ConfigError(f"environment: {name:.200} is not a setting; {_variable_like(after)}")
    try:
        return EnvSettingsSource(_Environment)()
    except RecursionError:
        raise ConfigError("environment: a variable's JSON is nested too deep; settings are a few levels deep") from None
    except SettingsError as error:
        raise ConfigError(f"environment: {error}; lists and objects are written as JSON") from error


def _variable_like(name: str) -> str:
    meant = did_you_mean(MonitorConfig, name.lower())
    if meant and " " not in meant:
        return f"did you mean {ENVIRONMENT_PREFIX}{meant.upper().replace('.', '__')}?"
    return f"after {ENVIRONMENT_PREFIX} comes one of {', '.join(sorted(MonitorConfig.model_fields))}"


MAX_BYTES = 100_000
"""Size of a file. A configuration is a few lines, and the parser takes microseconds for every character."""
MAX_DEPTH = 16
"""Lists and mappings inside each other; the deepest setting lies 4 deep. The loader recurses: there must be an end."""
MAX_NODES = 10_000
"""Values, lists and mappings, an alias counting as all that it stands for: nine lines of aliases can mean a billion."""
MAX_INTEGER = 2**63 - 1
"""Longer ones take time that grows with the square of their digits to be written out, as every message would."""

_UNWRITABLE = re.compile("[\\0\ud800-\udfff]")
"""What an escape can bring in and nothing can take: NUL ends a path, half a surrogate pair has no encoding."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file; none where it is empty.

    Plain values, lists and mappings only: a tag that would make an object is refused (`yaml.SafeLoader`).

    Raises:
        ConfigError: the file cannot be read, is too large, too deep or not YAML, or does not hold a mapping
            of names. The message says where, and quotes no line, as the file may be another one, with secrets in it.
    """
    try:
        with path.open("rb") as file:  # a size asked for beforehand says nothing of a pipe or a device
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"path: cannot read {path}: {error.strerror}; give the path of a YAML file") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"path: {path} is larger than {MAX_BYTES} bytes; a configuration is a few lines")
    try:
        text = raw.decode("utf-8")
        _check_size(text)
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"path: {path} is not YAML of settings: {_explain(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"path: {path} is not YAML: byte {error.start} is not UTF-8") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"path: {path} holds a {type(content).__name__}; it must be a mapping of settings")
    others = [name for name in content if not isinstance(name, str)]
    if others:
        raise ConfigError(f"path: {path} has a {type(others[0]).__name__} as the name of a setting; names are text")
    return content


class _TooMuch(yaml.MarkedYAMLError):
    """Says that the text expands to more than a configuration."""

    def __init__(self, problem: str, found: yaml.Node | yaml.Event) -> None:
        super().__init__(problem=problem, problem_mark=found.start_mark)  # type: ignore[arg-type]


class _Loader(yaml.SafeLoader):
    """Loads plain values. Malformed scalars raise a YAML error, and numbers are limited to 64 bits."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]  # what the value's own type makes of it: `2001-13-01`, `!!int x`
            raise yaml.constructor.ConstructorError(None, None, f"not of type {kind}", node.start_mark) from error
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise _TooMuch("a whole number of more than 64 bits", node)
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise _TooMuch("a character that no file or name can hold", node)
        return value


def _check_size(text: str) -> None:
    """Walk the parser's events, which take no recursion and build nothing, before anything is built.

    Raises:
        yaml.YAMLError: no YAML, too deep, or more than `MAX_NODES` with all aliases written out.
    """
    total = 0
    anchored: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and what had been counted when the node began
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise _TooMuch("an alias inside of what it stands for", event)
            total += anchored.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                anchored[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
            if len(open_nodes) > MAX_DEPTH:
                raise _TooMuch(f"more than {MAX_DEPTH} levels", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                anchored[anchor] = total - before
        if total > MAX_NODES:
            raise _TooMuch(f"more than {MAX_NODES} values, aliases written out", event)


def _explain(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem!s:.100}, in line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character is not allowed, at position {error.position}"
    return type(error).__name__
