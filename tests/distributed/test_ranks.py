"""Monitors of several ranks: what they agree on, what a late one does to the others, how a run goes on elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ess_monitor import ConfigError, Monitor, MonitorConfig, PartError
from ess_monitor.capture import Sampler
from ess_monitor.distributed.consensus import StoreConsensus
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.records import Measurement
from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE
from tests.ranks import run_ranks


def config(mode: str = "auto", **settings: Any) -> MonitorConfig:
    return MonitorConfig.load(
        environment=False,
        every_n_steps=4,
        overhead_budget_ratio=None,
        capture={"heads": None},
        diagnosis=EAGER_DIAGNOSIS,
        evidence=NO_EVIDENCE,
        autopilot={"mode": mode, "lag_steps": 2, "cooldown_steps": 8},
        **settings,
    )


class Log:
    name, inline = "log", True

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []

    def start(self, run, snapshot) -> None: ...
    def export(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status) -> None: ...


class Rank:
    """A training of one rank, with data of its own."""

    def __init__(self, settings: MonitorConfig, rank: int, agreement: StoreConsensus | None = None) -> None:
        torch.manual_seed(0)
        options = {"beta": 1.0}
        self.model = Backbone(
            BackboneConfig(vocab_size=16, width=16, featurizer="wla", state_size=8, mixer_options=options)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self.rank, self.count, self.log = rank, 0, Log()
        self.monitor = Monitor(self.model, settings, exporters=[self.log], agreement=agreement)

    def run(self, steps: int, average: Callable[[nn.Module], None] | None = None, late: dict[int, float] | None = None):
        self.monitor.start()
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 * self.rank + self.count)
            tokens = torch.randint(0, 16, (2, 24), generator=generator)
            logits = self.model(tokens)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            if average is not None:
                average(self.model)
            self.optimizer.step()
            self.count += 1
            time.sleep((late or {}).get(self.count, 0.0))
            self.monitor.step({"loss": loss, "accuracy": 0.1}, optimizer=self.optimizer)
        return self

    def facts(self) -> dict[str, Any]:
        """All that must be the same on every rank."""
        monitor = self.monitor
        return {
            "sizes": [(r.effective_size, r.utilization_min_ratio, r.worst_rank, r.ranks) for r in monitor.readings],
            "modulation": [r.modulation_ratio for r in monitor.readings],
            "conditions": monitor.conditions,
            "actions": [(a.step, a.layer, a.action, a.outcome) for a in monitor.actions],
            "steps": [m.step for m in self.log.measurements],
            "interval": monitor.snapshot().interval_steps,
            "outcomes": monitor.snapshot().measurements_total,
        }


def all_at_once(ranks: list[Rank], run: Callable[[Rank], Any]) -> list[dict[str, Any]]:
    """Each rank in a thread, then the end of all of them; what each then has to show."""
    errors: list[BaseException] = []

    def caught(rank: Rank) -> None:
        try:
            run(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in ranks:
        rank.monitor.close()
    assert not errors
    return [rank.facts() for rank in ranks]


def in_threads(ranks: list[Rank], *steps: int, **options: Any) -> list[dict[str, Any]]:
    return all_at_once(ranks, lambda r: r.run(*steps, **{name: value[r.rank] for name, value in options.items()}))


def ranks_of(world: int, settings: MonitorConfig, limit: float = 60.0, **options: Any) -> list[Rank]:
    store = dist.HashStore()
    return [Rank(settings, r, StoreConsensus(store, r, world, limit_seconds=limit, **options)) for r in range(world)]


def test_in_mode_advise_all_ranks_measure_their_own_data_and_show_the_same_numbers() -> None:
    ranks = ranks_of(3, config("advise", distributed={"ranks": "all"}))
    facts = in_threads(ranks, 11)
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["steps"] == [0, 4, 8]
    for reading in ranks[0].monitor.readings:
        assert reading.ranks == 3
        assert reading.utilization_min_ratio is not None
        assert reading.utilization_min_ratio <= reading.utilization_ratio
        assert reading.worst_rank in (0, 1, 2)
    # The heads are each rank's own.
    assert len({r.monitor.readings[0].per_head for r in ranks}) == 3


def test_the_mean_the_minimum_and_the_worst_rank_are_those_of_the_ranks_alone() -> None:
    alone = []
    for r in range(3):
        rank = Rank(config("advise"), r).run(1)
        alone.append({reading.layer: reading.utilization_ratio for reading in rank.monitor.flush()})
        rank.monitor.close()
    ranks = ranks_of(3, config("advise", distributed={"ranks": "all"}))
    in_threads(ranks, 3)
    for reading in ranks[2].monitor.readings:
        each = [of_rank[reading.layer] for of_rank in alone]
        assert reading.utilization_ratio == pytest.approx(sum(each) / 3, rel=1e-12)
        assert reading.utilization_min_ratio == min(each)
        assert reading.worst_rank == each.index(min(each))


def test_ranks_that_do_not_measure_have_no_hooks_and_the_same_readings() -> None:
    ranks = ranks_of(3, config(), measuring=(0, 2))
    facts = in_threads(ranks, 11)
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["actions"], "nothing was done, so nothing was compared"
    assert facts[0]["sizes"][0][3] == 2
    assert ranks[1].monitor.readings[0].per_head == ()


def test_a_rank_whose_capture_is_off_still_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_of(2, config())
    broken = ranks[1].monitor._trigger._sampler
    collect = Sampler.collect

    def fail(sampler: Sampler) -> Any:
        if sampler is broken:
            sampler.remove()
            raise ValueError("broken")
        return collect(sampler)

    monkeypatch.setattr(Sampler, "collect", fail)
    facts = in_threads(ranks, 40)
    assert facts[0] == facts[1]
    assert "capture" in ranks[1].monitor.snapshot().health.parts_off
    assert facts[0]["outcomes"]["ok"] == 10
    assert {size[3] for size in facts[0]["sizes"]} == {1}


def test_a_late_rank_makes_all_skip_the_sample_and_all_stay_at_the_same_steps() -> None:
    ranks = ranks_of(2, config(), limit=1.0)
    together = threading.Barrier(2, timeout=120)  # as the training's collectives bring them together at every step
    wait = [lambda model: together.wait()] * 2
    facts = in_threads(ranks, 20, late={0: {}, 1: {6: 3.0}}, average=wait)
    assert facts[0] == facts[1]
    assert facts[0]["outcomes"] == {"ok": 4, "skipped": 1, "failed": 0}
    assert facts[0]["steps"] == [0, 4, 8, 12, 16]
    skipped = ranks[0].log.measurements[1]
    assert {r.status for r in skipped.readings} == {"dropped"}
    assert "skipped on all ranks: nothing came from rank 1" in skipped.readings[0].message
    assert skipped.actions == ()


def test_ranks_that_no_longer_agree_leave_the_model_alone_and_go_on_measuring(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rank = Rank(config(), 0, StoreConsensus(dist.HashStore(), 0, 2, limit_seconds=0.02)).run(30)
    snapshot = rank.monitor.snapshot()
    assert snapshot.health.parts_off == ("agreement",)
    assert snapshot.health.part_failures_total["agreement"] == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "agreement failed (a sample is skipped on all ranks: nothing came from rank 1 within 0.02 s" in said[0]
    assert "agreement is off for the rest of this run: rank 0: 3 samples in a row were skipped" in said[1]
    assert "Attach a new monitor on all ranks" in said[1]
    assert snapshot.measurements_total["skipped"] == 3
    assert snapshot.measurements_total["ok"] >= 3
    assert not snapshot.autopilot_enabled
    assert rank.monitor.actions == ()
    assert rank.monitor.readings[0].ranks == 1
    rank.monitor.close()


def test_a_strict_monitor_raises_at_the_first_sample_that_the_ranks_do_not_agree_on() -> None:
    rank = Rank(config(strict=True), 0, StoreConsensus(dist.HashStore(), 0, 2, limit_seconds=0.02))
    with pytest.raises(PartError, match=r"agreement.*nothing came from rank 1"):
        rank.run(30)
    assert rank.monitor.snapshot().last_step == 2, "the step at which the first sample is judged"
    rank.monitor.close("failed")


def test_steps_that_are_done_again_in_one_process_are_agreed_on_again() -> None:
    ranks = ranks_of(2, config("advise", distributed={"ranks": "all"}))
    sizes: list[list[Any]] = [[], []]

    def back_and_forth(rank: Rank) -> None:
        state = rank.run(3).monitor.state_dict()
        sizes[rank.rank].append(rank.run(4).facts()["sizes"])
        rank.monitor.load_state_dict(state)
        sizes[rank.rank].append(rank.run(4).facts()["sizes"])  # the same steps, with a model that has learnt since

    facts = all_at_once(ranks, back_and_forth)
    assert sizes[0] == sizes[1]
    assert sizes[0][0] != sizes[0][1]
    assert facts[0]["outcomes"]["skipped"] == 0


def test_the_interval_is_the_longest_that_a_rank_wants_until_they_agree_again() -> None:
    settings = config("advise", distributed={"ranks": "all"})
    ranks = ranks_of(2, settings)
    ranks[1].monitor._context.cadence.budget_ratio = 0.5
    ranks[1].monitor._context.cadence._sample_cost = 1e-9
    ranks[1].monitor._context.cadence.spent(1000.0)  # as if it had been very slow once
    facts = in_threads(ranks, 12)
    assert facts[0] == facts[1]
    assert facts[0]["interval"] > 4
    assert facts[0]["steps"] == [0]


# -- processes --------------------------------------------------------------------------------------------------------


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def trained(rank: int, world: int, folder: str, name: str, resume: str, steps: int, late: dict[int, float]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=Path(folder, f"{name}.meet").as_uri(), rank=rank, world_size=world)
    modulation = {"separators": [0, 1], "tolerances": [0.01, 0.1]}
    settings = config(distributed={"limit_seconds": 2.0}, modulation=modulation)
    run = Rank(settings, rank)  # nothing but the monitor, as in a torchrun loop
    if resume:
        state = torch.load(Path(folder, resume), weights_only=True)
        run.monitor.load_state_dict(state["monitor"])
        run.model.load_state_dict(state["model"])
        run.count = state["count"]
    run.run(steps, average_gradients, late if rank == world - 1 else {})
    state = {"monitor": run.monitor.state_dict(), "model": run.model.state_dict(), "count": run.count}
    if rank == 0:
        torch.save(state, Path(folder, f"{name}.state"))
    run.monitor.close()
    facts = {**run.facts(), "exporting": len(run.monitor.exporters)}
    torch.save({"facts": facts, "model": run.model.state_dict()}, Path(folder, f"{name}.{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def of_processes(world: int, folder: Path, name: str, resume: str = "", steps: int = 11, late: Any = None) -> list[Any]:
    run_ranks(trained, world, world, str(folder), name, resume, steps, late or {})
    return [torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in range(world)]


def test_a_skip_parts_no_parameters_in_mode_auto(tmp_path: Path) -> None:
    results = of_processes(2, tmp_path, "late", steps=20, late={10: 6.0})
    assert results[0]["facts"] == results[1]["facts"]
    assert results[0]["facts"]["outcomes"]["skipped"] == 1
    assert results[0]["facts"]["actions"], "nothing was done, so nothing was compared"
    for name, value in results[0]["model"].items():
        assert torch.equal(value, results[1]["model"][name]), name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was saved while a sample waited for its step: it was taken at 12, to be judged at 14."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, of_processes(2, folder, "two", steps=13)[0]["facts"]


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_of_two_ranks_goes_on_with_another_number_of_them(
    world: int, two_ranks: tuple[Path, dict[str, Any]]
) -> None:
    folder, before = two_ranks
    after = of_processes(world, folder, f"now-{world}", resume="two.state", steps=12)
    for result in after[1:]:
        assert result["facts"] == after[0]["facts"]
        assert all(torch.equal(value, result["model"][name]) for name, value in after[0]["model"].items())
    assert before["steps"] == [0, 4, 8]
    assert [[tau for tau, _ in ratios] for ratios in after[0]["facts"]["modulation"]] == [[0.01, 0.1]] * 2
    assert after[0]["facts"]["steps"] == [12, 16, 20]
    assert after[0]["facts"]["outcomes"] == {"ok": 6, "skipped": 0, "failed": 0}
    assert after[0]["facts"]["conditions"] == before["conditions"]


def test_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks are to agree, but torch\.distributed knows 1"):
        Monitor(Backbone(BackboneConfig(vocab_size=16, width=16)), config(), world_size=4)
