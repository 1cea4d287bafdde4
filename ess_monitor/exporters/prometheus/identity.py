"""Identifies the run and the process, so that the series of one process differ from those of another.

In Prometheus these are the labels `run_id` and `rank`. Service discovery attaches both to the target (`discovery`), a
push puts them into the grouping key, a textfile writes them into the series.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ess_monitor import validation
from ess_monitor.errors import ExporterError
from ess_monitor.records import RunInfo
from ess_monitor.validation.settings import Settings

Ranks = Literal["zero", "local_zero", "all"]
"""Which processes of a distributed run: the first one, the first one of every machine, or each."""

_RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class IdentifiedConfig(Settings):
    """Settings that all exporters of Prometheus metrics share: the identifier of the run, and the ranks that export."""

    run_id: str | None = Field(default=None, pattern=_RUN_ID_PATTERN)
    """Identifier of the run, the same on all its ranks. None: the one of torchrun or Slurm in a distributed run,
    otherwise one made from the run's name. Letters, digits, dot, dash and underscore: it is part of a file name."""
    ranks: Ranks = "zero"
    """Which processes export. "zero" by default: one process sees enough of a data-parallel run, and the autopilot
    acts on its numbers. "local_zero" and "all" show how ranks differ."""


@dataclass(frozen=True)
class RunIdentity:
    """Names one process of one run."""

    run_id: str
    rank: int = 0
    """Position in the whole run."""
    local_rank: int = 0
    """Position on its machine."""

    def __post_init__(self) -> None:
        validation.instance("run_id", self.run_id, str)
        validation.whole("rank", self.rank, 0)
        validation.whole("local_rank", self.local_rank, 0)

    def takes_part(self, ranks: Ranks) -> bool:
        """Return whether this process is one of `ranks`.

        >>> RunIdentity("wla-7", rank=8, local_rank=0).takes_part("local_zero")
        True
        """
        return ranks == "all" or (self.rank if ranks == "zero" else self.local_rank) == 0

    @property
    def labels(self) -> dict[str, str]:
        """Labels of Prometheus."""
        return {"run_id": self.run_id, "rank": str(self.rank)}


def identify(
    config: IdentifiedConfig,
    run: RunInfo,
    *,
    environ: Mapping[str, str] = os.environ,
    distributed_rank: Callable[[], int | None] | None = None,
) -> RunIdentity:
    """Return the identity of this process in `run`; it is the same for every exporter of the process.

    Ranks come from `torch.distributed`, torchrun or Slurm. A run of one process has rank 0 whatever its environment
    says: eight independent runs under one `srun` are not ranks of each other.

    Raises:
        ExporterError: several ranks export, and they share no identifier.
    """
    if run.world_size <= 1:
        return RunIdentity(config.run_id or generated_run_id(run))
    rank = (distributed_rank or _distributed_rank)()
    if rank is None:
        rank = _first_number(environ, "RANK", "SLURM_PROCID") or 0
    local_rank = _first_number(environ, "LOCAL_RANK", "SLURM_LOCALID")
    run_id = config.run_id or shared_run_id(environ)
    if run_id is None:
        if config.ranks != "zero":
            raise ExporterError(
                f'ranks="{config.ranks}" needs an identifier that all {run.world_size} ranks share, and neither '
                'torchrun nor Slurm has set one. Set run_id to the same text on every rank, or use ranks="zero".'
            )
        run_id = generated_run_id(run)
    # With an unknown local rank, no endpoint on a machine is better than several that fight for its port.
    return RunIdentity(run_id, rank, rank if local_rank is None else local_rank)


def shared_run_id(environ: Mapping[str, str]) -> str | None:
    """Return the launcher's identifier of this run, which all ranks share; None if there is none.

    >>> shared_run_id({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"})
    'slurm-4711.0'
    """
    elastic = environ.get("TORCHELASTIC_RUN_ID", "")
    if elastic not in ("", "none"):  # "none": torchrun was given no id
        return _as_run_id(elastic)
    job = environ.get("SLURM_JOB_ID", "")
    if job:
        step = environ.get("SLURM_STEP_ID", "")
        return _as_run_id(f"slurm-{job}.{step}" if step else f"slurm-{job}")
    return None


def generated_run_id(run: RunInfo) -> str:
    """Make an identifier from the run's name and six digits, which tell runs of one name (a sweep) apart."""
    origin = f"{socket.gethostname()} {os.getpid()} {run.start_timestamp_seconds}"
    return f"{_as_run_id(run.run_name)[:100]}-{hashlib.sha256(origin.encode()).hexdigest()[:6]}"


def _as_run_id(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:128] or "run"


def _first_number(environ: Mapping[str, str], *names: str) -> int | None:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)


def _distributed_rank() -> int | None:
    # A process that has not imported it belongs to no process group.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_rank())
