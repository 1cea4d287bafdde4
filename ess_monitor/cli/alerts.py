"""`ess-monitor alerts export`: rules, dashboards and runbooks as files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ess_monitor.alerts import AlertsConfig, export
from ess_monitor.errors import ConfigError
from ess_monitor.validation.settings import did_you_mean

alerts_app = typer.Typer(help="Alerting rules, dashboards and runbooks.", no_args_is_help=True)


@alerts_app.command("export")
def export_alerts(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder; created where it does not exist.")],
    job: Annotated[str | None, typer.Option(help="Name of the scrape configuration. Default: ess_monitor.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=f"A threshold or waiting time; repeatable. Names: {', '.join(AlertsConfig.model_fields)}.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that differ.")] = False,
) -> None:
    """Write Prometheus rules and their tests, Alertmanager routes, Grafana dashboards, runbooks and a compose file.

    The written files are listed. Nothing is written where a file already exists and differs.
    """
    given = [] if job is None else [f"job={job}"]
    for path in export(directory, None, overwrite=overwrite, **_parsed([*given, *(settings or ())])):
        print(path)


def _parsed(settings: Iterable[str]) -> dict[str, str]:
    """Return the text of each setting by name; `AlertsConfig` checks the values."""
    parsed: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting}: expected NAME=VALUE, for example --set stalled_seconds=3600")
        if name not in AlertsConfig.model_fields:
            meant = did_you_mean(AlertsConfig, name)
            hint = f"did you mean {meant}? " if meant else ""
            known = f"the settings are {', '.join(AlertsConfig.model_fields)}"
            raise ConfigError(f"--set {name}: no such setting; {hint}{known}")
        if name in parsed:
            raise ConfigError(f"{name}: given twice, as {parsed[name]} and {value}; drop one of them")
        parsed[name] = value
    return parsed
