"""Exports rules, their tests, runbooks, dashboards and examples for a job name and thresholds.

Rules, tests and dashboards are rendered from `rules`, `cases` and `dashboards`. All other files are copied; only the
names of the job and of Grafana's data source are replaced. The committed files are those of the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ess_monitor import validation
from ess_monitor.alerts.cases import render_tests
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.dashboards import render_dashboards
from ess_monitor.alerts.rules import render_grafana, render_rules
from ess_monitor.errors import ConfigError
from ess_monitor.runtime.files import replace_file, require_regular

_ROOT = Path(__file__).resolve().parent
_KINDS = (".json", ".md", ".yaml", ".yml")
_FOLDERS = ("alertmanager", "compose", "grafana", "prometheus", "runbooks")
"""Endings and folders of the exported files. Everything else here is the program that writes them."""
_JOB = re.compile(r"""(\bjob=~?\\?"|\bjob_name:\ "?|\breplacement:\ "?)ess_monitor\b""")
"""Matches the job's name in a selector (escaped in JSON or not), a scrape configuration or a relabeling."""
_SOURCE_UID = re.compile(r"\buid: ess-monitor-prometheus\b")


def render(config: AlertsConfig) -> dict[str, str]:
    """Return the content of every file by its relative path.

    Examples:
        >>> files = render(AlertsConfig(job="llm", stalled_seconds=3600))
        >>> 'ess_monitor_last_step_timestamp_seconds{job="llm"} > 3600' in files["prometheus/ess_monitor.rules.yml"]
        True
    """
    validation.instance("config", config, AlertsConfig)
    files = {}
    for path in sorted(path for folder in _FOLDERS for path in (_ROOT / folder).rglob("*") if path.suffix in _KINDS):
        text = _JOB.sub(rf"\g<1>{config.job}", path.read_text(encoding="utf-8"))
        name = path.relative_to(_ROOT).as_posix()
        files[name] = _SOURCE_UID.sub(f"uid: {config.grafana_datasource_uid}", text)
    return files | render_generated(config)


def render_generated(config: AlertsConfig) -> dict[str, str]:
    """Return the content of the rendered files, rules, rule tests and dashboards, by relative path."""
    return {
        "grafana/provisioning/alerting/ess_monitor.yml": render_grafana(config),
        "prometheus/ess_monitor.rules.yml": render_rules(config),
        **{f"prometheus/tests/{name}": text for name, text in render_tests(config).items()},
        **{f"grafana/dashboards/{name}": text for name, text in render_dashboards(config.job).items()},
    }


def export(
    directory: str | Path, config: AlertsConfig | None = None, *, overwrite: bool = False, **settings: Any
) -> tuple[Path, ...]:
    """Write rules, rule tests, runbooks, dashboards and examples below `directory`.

    Args:
        directory: created if it does not exist.
        config: job name and thresholds.
        overwrite: False keeps files that differ from what would be written, and raises.
        settings: fields of `AlertsConfig`, instead of or on top of `config`.

    Returns:
        The files, in the order of their names.

    Raises:
        ConfigError: a setting is unknown or out of range, a file is there already and differs, or the directory cannot
            be written to. Nothing has been written in the first two cases.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [path.name for path in export(folder, job="llm", overhead_ratio=0.02)]
        >>> "ess_monitor.rules.yml" in names, "EssMonitorStateCollapsed.md" in names
        (True, True)
    """
    validation.instance("directory", directory, (str, Path), hint="give the folder for the files")
    validation.flag("overwrite", overwrite)
    validation.optional("config", config, AlertsConfig)
    files = render(AlertsConfig(**{**({} if config is None else config.model_dump()), **settings}))
    target = Path(directory)
    try:
        if not overwrite:
            _refuse_to_overwrite(target, files)
        for name, text in files.items():
            replace_file(target / name, text.encode())
    except OSError as error:
        raise ConfigError(
            f"directory: cannot write {error.filename or target} ({error.strerror}); give a folder that takes files"
        ) from error
    return tuple(target / name for name in sorted(files))


def _refuse_to_overwrite(target: Path, files: Mapping[str, str]) -> None:
    changed = [
        name
        for name, text in files.items()
        if require_regular(target / name) is not None and (target / name).read_bytes() != text.encode("utf-8")
    ]
    if changed:
        raise ConfigError(
            f"directory={str(target)!r} holds files that differ from what would be written ({', '.join(changed[:3])}"
            f"{', ...' if len(changed) > 3 else ''}); give another folder, or replace them with "
            "overwrite=True (--overwrite)"
        )
