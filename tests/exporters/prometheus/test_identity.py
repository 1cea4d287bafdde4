"""Which run and which rank a process takes itself for."""

from __future__ import annotations

from typing import Any

import pytest

from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters import (
    EventLogConfig,
    PrometheusConfig,
    PushgatewayConfig,
    RunIdentity,
    TextfileConfig,
    configs_of_rank,
)
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig, generated_run_id, identify, shared_run_id
from tests.exporters.helpers import run_info


def _identify(environ: dict[str, str], world_size: int = 8, rank: int | None = None, **settings: Any) -> RunIdentity:
    config = IdentifiedConfig(**settings)
    return identify(config, run_info(world_size=world_size), environ=environ, distributed_rank=lambda: rank)


def test_a_run_of_one_process_has_rank_zero_whatever_its_environment_says() -> None:
    identity = _identify({"RANK": "3", "SLURM_PROCID": "3", "SLURM_JOB_ID": "1"}, world_size=1)
    assert (identity.rank, identity.local_rank) == (0, 0)
    assert identity.run_id.startswith("demo-")


def test_the_process_group_knows_the_rank_and_the_launcher_the_rank_on_the_machine() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "2", "TORCHELASTIC_RUN_ID": "wla-7"}
    assert _identify(environ, rank=6) == RunIdentity("wla-7", 6, 2)
    assert _identify(environ) == RunIdentity("wla-7", 1, 2)


def test_slurm_names_run_and_ranks() -> None:
    environ = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert _identify(environ) == RunIdentity("slurm-4711.2", 5, 1)


def test_without_a_rank_on_the_machine_only_the_first_of_all_counts_as_first_there() -> None:
    assert _identify({"RANK": "4"}, run_id="wla-7").local_rank == 4


def test_a_run_id_that_is_given_wins() -> None:
    assert _identify({"TORCHELASTIC_RUN_ID": "torch"}, run_id="mine").run_id == "mine"


def test_ranks_that_export_need_an_identifier_they_share() -> None:
    with pytest.raises(ExporterError, match="Set run_id to the same text on every rank"):
        _identify({"TORCHELASTIC_RUN_ID": "none"}, rank=1, ranks="all")
    assert _identify({}, rank=0, ranks="zero").run_id.startswith("demo-")


def test_a_generated_identifier_is_the_same_for_every_exporter_of_a_run_and_another_for_another_run() -> None:
    run = run_info(run_name="a run/mit ß ")
    assert generated_run_id(run) == generated_run_id(run.model_copy())
    assert generated_run_id(run) != generated_run_id(run.model_copy(update={"start_timestamp_seconds": 1.0}))
    IdentifiedConfig(run_id=generated_run_id(run))
    IdentifiedConfig(run_id=generated_run_id(run_info(run_name="..")))
    IdentifiedConfig(run_id=generated_run_id(run_info(run_name="x" * 500)))
    assert shared_run_id({"TORCHELASTIC_RUN_ID": "../../etc"}) == "etc"


@pytest.mark.parametrize("run_id", ["", "a/b", "../a", ".hidden", "a b", 'a"b', "a\n", "ß", "x" * 129])
def test_an_identifier_that_is_no_file_name_is_refused(run_id: str) -> None:
    with pytest.raises(ConfigError):
        PrometheusConfig(run_id=run_id)


def test_every_rank_runs_the_exporters_that_ask_for_it() -> None:
    configs = (
        EventLogConfig(),
        PrometheusConfig(ranks="local_zero"),
        PushgatewayConfig(),
        TextfileConfig(ranks="all"),
    )
    kinds = {
        place: [config.kind for config in configs_of_rank(configs, *place)]  # type: ignore[attr-defined]
        for place in ((0, 0), (8, 0), (9, 1))
    }
    assert kinds == {
        (0, 0): ["event_log", "prometheus", "pushgateway", "textfile"],
        (8, 0): ["prometheus", "textfile"],
        (9, 1): ["textfile"],
    }
