"""What the callbacks share, apart from any loop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from ess_monitor import CheckpointError, ConfigError
from ess_monitor.distributed.consensus import StoreConsensus
from ess_monitor.featurizers import GLA
from ess_monitor.integrations.common import CallbackBase, LoopFacts, loss_factor, require
from ess_monitor.integrations.json_state import from_json, to_json
from ess_monitor.integrations.step_loss import StepLoss
from tests.programs import run_program


def facts(**changes: object) -> LoopFacts:
    given = {"rank": 0, "local_rank": 0, "world_size": 1, "strategy": "s", "precision": "32", "grad_scale": lambda: 1.0}
    return LoopFacts(**{**given, **changes})  # type: ignore[arg-type]


class Silent:
    name, inline = "silent", True

    def start(self, run, snapshot) -> None: ...
    def export(self, measurement) -> None: ...
    def close(self, status) -> None: ...


@pytest.mark.parametrize("ranks", [None, "all"])
@pytest.mark.parametrize("mode", ["off", "advise", "auto"])
@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_take_part_when_they_are_asked_or_the_autopilot_may_act_and_do_not_export(
    mode: str, rank: int, ranks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands for the process group's store; real ones are used in test_ranks.py.
    monkeypatch.setattr(
        "ess_monitor.pipeline.stages.consensus_of_the_run", lambda *given, acts: StoreConsensus(HashStore(), rank, 2)
    )
    ess = CallbackBase(autopilot=mode, exporters=[Silent(), "terminal"], distributed={"ranks": ranks})
    ess._open(GLA(16, 2), facts(rank=rank, world_size=2), lambda: [Silent()])
    assert (ess.monitor is not None) == (rank == 0 or mode == "auto" or ranks == "all")
    if ess.monitor is not None:
        assert len(ess.monitor.exporters) == (0 if rank else 3)
        ess._close("finished")


@pytest.mark.parametrize("settings", [{"autopilot": "auto"}, {"distributed": {"ranks": 2}}])
def test_ranks_that_have_no_process_group_to_agree_over_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"2 ranks are to agree, but torch.distributed knows 1; call init_process_gr"):
        CallbackBase(**settings)._open(GLA(16, 2), facts(world_size=2), tuple)


@pytest.mark.parametrize(("ranks", "exporting"), [("zero", {0}), ("local_zero", {0, 2}), ("all", {0, 1, 2, 3})])
def test_an_exporter_runs_on_the_ranks_it_is_asked_for(ranks: str, exporting: set[int], tmp_path: Path) -> None:
    opened = set()
    for rank in range(4):  # two machines with two processes each
        textfile = {"kind": "textfile", "path": str(tmp_path / f"{rank}.prom"), "ranks": ranks, "run_id": "run"}
        ess = CallbackBase(exporters=[textfile], table=False)
        ess._open(GLA(16, 2), facts(rank=rank, local_rank=rank % 2, world_size=4), tuple)
        if ess.monitor is not None:
            opened.add(rank)
            assert [exporter.name for exporter in ess.monitor.exporters] == ["textfile"]
        ess._close("finished")
    assert opened == exporting


def test_mode_auto_is_refused_where_the_loss_scale_is_out_of_sight() -> None:
    hidden = facts(scale_known=False, strategy="deepspeed")
    with pytest.raises(ConfigError, match='"auto" is not possible under deepspeed'):
        CallbackBase(autopilot="auto")._open(GLA(16, 2), hidden, tuple)
    ess = CallbackBase(autopilot="advise")
    ess._open(GLA(16, 2), hidden, tuple)
    assert ess.monitor is not None
    ess._close("finished")


def test_a_state_of_something_else_is_an_error_at_the_start() -> None:
    ess = CallbackBase()
    ess.load_state_dict({"version": 99})
    with pytest.raises(CheckpointError, match="version 99 cannot be read"):
        ess._open(GLA(16, 2), facts(), tuple)


def test_a_discarded_callback_closes_its_monitor() -> None:
    ess = CallbackBase()
    ess._open(GLA(16, 2), facts(), tuple)
    monitor = ess.monitor
    assert monitor is not None
    del ess
    assert monitor.snapshot().status == "failed"


def test_the_loss_factor_is_the_scale_over_the_steps() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert loss_factor(scaler, torch.device("cpu"), 4) == torch.tensor(256.0)
    assert loss_factor(torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"), 4) == torch.tensor(0.25)
    assert loss_factor(None, torch.device("cpu"), 2) == 0.5


def test_a_missing_library_is_named_with_the_line_that_installs_it() -> None:
    require("no_such_library", "torch", extra="x")
    with pytest.raises(ModuleNotFoundError, match=r'no_such_library: pip install "ess-monitor\[x\]"'):
        require("no_such_library", "no_such_library.part", extra="x")


def test_every_integration_says_so_when_its_library_is_missing(tmp_path: Path) -> None:
    code = (
        "import importlib, sys\n"
        "for name in ('accelerate', 'transformers', 'lightning', 'lightning_fabric', 'pytorch_lightning'):\n"
        "    sys.modules[name] = None\n"
        "for name in ('accelerate', 'fabric', 'lightning', 'transformers'):\n"
        "    try:\n"
        "        importlib.import_module(f'ess_monitor.integrations.{name}')\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(name, str(error).partition('pip install ')[2])\n"
    )
    out = run_program(["-c", code], tmp_path)
    assert out.stdout.splitlines() == [
        'accelerate "ess-monitor[accelerate]"',
        'fabric "ess-monitor[lightning]"',
        'lightning "ess-monitor[lightning]"',
        'transformers "ess-monitor[transformers]"',
    ], out.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_tensors_survive_json_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 1e3).to(dtype)
    again = from_json(json.loads(json.dumps(to_json({"a": [tensor, None, 0.1, "x"]}))))["a"]
    assert again[0].dtype == dtype
    assert again[0].shape == shape
    assert torch.equal(again[0], tensor)
    assert again[1:] == [None, 0.1, "x"]


def test_a_number_that_is_not_finite_survives_json_in_a_tensor() -> None:
    again = from_json(json.loads(json.dumps(to_json(torch.tensor([math.nan, math.inf, -0.0])))))
    assert again.view(torch.int32).tolist() == torch.tensor([math.nan, math.inf, -0.0]).view(torch.int32).tolist()


@pytest.mark.parametrize("change", [{"dtype": "float99"}, {"shape": [7]}, {"tensor:base64": "?"}])
def test_a_damaged_tensor_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        from_json({**to_json(torch.ones(2)), **change})


class Returning(nn.Module):
    def forward(self, output, **kwargs):
        return output


@pytest.mark.parametrize(
    ("outputs", "kwargs", "expected"),
    [
        ([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(3.0)}], {}, 2.0),
        ([(torch.tensor([1.0]), "logits")], {}, 1.0),
        ([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(3.0)}], {"num_items_in_batch": 9}, 4.0),
        ([{"logits": torch.ones(3)}], {}, None),
        ([(torch.ones(2, 3),)], {}, None),
        ([()], {}, None),
        ([torch.ones(3)], {}, None),
    ],
)
def test_the_loss_of_a_step_is_what_the_model_returned(outputs: list, kwargs: dict, expected: float | None) -> None:
    model = Returning()
    loss = StepLoss(model)
    for output in outputs:
        model(output, **kwargs)
    with torch.no_grad():
        model({"loss": torch.tensor(99.0)})  # an evaluation between the passes
    taken = loss.take()
    assert taken is None if expected is None else taken == torch.tensor(expected)
    assert not model._forward_hooks


def test_a_loss_that_the_loop_rescales_in_place_is_followed() -> None:
    model, output = Returning(), {"loss": torch.tensor(2.0)}
    loss = StepLoss(model)
    model(output)
    output["loss"] *= 4
    assert loss.take() == torch.tensor(8.0)


def test_the_class_of_an_exporter_is_refused_where_the_callback_is_made() -> None:
    with pytest.raises(ConfigError, match="exporters"):
        CallbackBase(exporters=[Silent])
