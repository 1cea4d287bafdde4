"""Command line of the package.

    ess-monitor describe TARGET               which layers can be measured, and why the others cannot; nothing is run
    ess-monitor describe --hf-config FILE     the same for the model of a transformers config.json, without its weights
    ess-monitor profile TARGET                ESS of every layer, from one forward pass on random input
    ess-monitor profile featurizers           the paper's featurizers at initialization (its Finding 4)
    ess-monitor minimal-state TARGET          the smallest state that does what each layer did, exactly or nearly
    ess-monitor distill-check TARGET          the loss that no student with a smaller state can avoid
    ess-monitor reduce TARGET                 a checkpoint with smaller states, and what it costs
    ess-monitor hybrid-advice TARGET          which layers would not miss a smaller state, or another mixer
    ess-monitor study DIR                     how ESS and TSS go along with the metric, over many runs
    ess-monitor modulation TARGET             how much of its state each layer lets go of at separators of a text
    ess-monitor report RUN_DIR                one HTML page about a run, from its event log
    ess-monitor compare RUN_A RUN_B           one HTML page that compares two runs
    ess-monitor alerts export DIR             alerting rules, dashboards and runbooks, as files

TARGET is `package.module:name`: a torch module, or a class or function that returns one. Results go to standard output,
as a table or with `--json`; everything else goes to standard error. `EXIT_STATUS` says how a command ends.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from ess_monitor.cli.alerts import alerts_app
from ess_monitor.cli.analysis.distill_check import distill_check
from ess_monitor.cli.analysis.hybrid_advice import hybrid_advice
from ess_monitor.cli.analysis.minimal_state import minimal_state
from ess_monitor.cli.analysis.modulation import modulation
from ess_monitor.cli.analysis.reduce import reduce
from ess_monitor.cli.analysis.study import study
from ess_monitor.cli.describe import describe
from ess_monitor.cli.profile import profile_app
from ess_monitor.cli.report import compare, report
from ess_monitor.errors import EssMonitorError

EXIT_STATUS = (
    "Exit status: 0: done, also where single layers cannot be measured. 1: the target's own code raised, and its "
    "traceback is shown. 2: wrong arguments, or what was asked for is not possible; one line, `error: ...`, says why. "
    "130: interrupted."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_STATUS)
app.command()(describe)
app.add_typer(profile_app, name="profile")
app.command()(minimal_state)
app.command()(distill_check)
app.command()(reduce)
app.command()(hybrid_advice)
app.command()(study)
app.command()(modulation)
app.command()(report)
app.command()(compare)
app.add_typer(alerts_app, name="alerts")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ess-monitor {installed_version('ess-monitor')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """See how much of its memory a sequence model uses."""


def main() -> None:
    """Run the `ess-monitor` command."""
    try:
        app(prog_name="ess-monitor")
    except EssMonitorError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
