"""Running Lightning's `training_step` again: with its arguments and outputs, and without its logs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.featurizers import Backbone, BackboneConfig
from tests.integrations.helpers import callback
from tests.integrations.test_lightning import loader, make_trainer
from tests.integrations.test_replays import EVIDENT, judged_at_once

__all__ = ["judged_at_once"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

pl = pytest.importorskip("pytorch_lightning")


def base_class(framework: Any) -> Any:
    """A module that logs in all ways, and counts its calls in and out of itself."""

    class Base(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = BackboneConfig(
                vocab_size=16, width=16, featurizer="wla", state_size=8, mixer_options={"beta": 1.0}
            )
            self.model = Backbone(config)
            self.dropout = nn.Dropout(0.1)
            self.steps = 0
            self.outside = Outside()

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.dropout(self.model(tokens))
            return logits

        def loss(self, batch: Any, *, by_call: bool = True) -> Tensor:
            tokens = batch[0]
            self.steps += 1
            self.outside.calls += 1
            logits = self(tokens) if by_call else self.forward(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log_dict({"twice": 2 * loss}, on_epoch=True)
            if self.loggers:
                self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
                self.loggers[0].experiment  # noqa: B018
            return loss

        def training_step(self, batch: Any) -> Any:
            return self.loss(batch, by_call=False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Base


class Outside:
    """Counts what no replay can take back."""

    calls = 0


def counting_logger(framework: Any) -> Any:
    base = importlib.import_module(f"{framework.__name__}.loggers.logger").Logger

    class Rows(base):
        name, version = "rows", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int | None, dict[str, float]]] = []

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            own = {name: value for name, value in metrics.items() if "ess" not in name}
            if own:
                self.rows.append((step, own))

        @property
        def experiment(self) -> Any:
            return self

    return Rows()


def fitted(make: Any, folder: Path, framework: Any = pl, watched: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """The module, its logger and the callback after 12 batches."""
    module, logger = make(), counting_logger(framework)
    ess = callback("lightning", **{**EVIDENT, "every_n_steps": 4}, autopilot="advise") if watched else None
    make_trainer(folder, [ess] if watched else [], framework, loggers=logger, **options).fit(module, loader())
    return module, logger, ess


def evidence(ess: Any) -> list[tuple[str, int]]:
    return [(e.basis, e.batches) for e in ess.monitor._results._tracker.evidence.values()]


def state(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


@pytest.mark.parametrize("framework", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_nothing_is_logged_twice_and_the_training_is_bitwise_the_same(
    framework: str, options: dict[str, Any], tmp_path: Path
) -> None:
    library = importlib.import_module(framework)
    make = base_class(library)
    bare, rows_of_bare, _ = fitted(make, tmp_path, library, watched=False, **options)
    module, rows, ess = fitted(make, tmp_path, library, **options)
    accumulated = options.get("accumulate_grad_batches", 1) > 1
    assert evidence(ess) == [("loss", 2)]
    assert ess.monitor.snapshot().health.part_failures_total["replay"] == 0
    assert rows.rows == rows_of_bare.rows
    assert {"direct", "train_loss_step", "train_loss_epoch", "twice_epoch"} <= {k for _, row in rows.rows for k in row}
    assert all(map(torch.equal, state(module), state(bare)))
    assert module.steps == bare.steps == 12
    assert bare.outside.calls == 12
    assert module.outside.calls == 12 + 2 * 4
    assert "log" not in vars(module)
    assert ess.monitor.snapshot().last_step == (6 if accumulated else 12)


def test_the_loss_is_that_of_the_batch_under_the_precision_of_the_training(tmp_path: Path) -> None:
    """Autocast rounds to 8 bits: the loss in float32 would differ."""
    seen: list[tuple[int, float]] = []

    class Module(base_class(pl)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if not torch.is_grad_enabled():
                assert torch.is_autocast_enabled("cpu")
                seen.append((batch_idx, loss.item()))
            return {"loss": loss, "more": 1}

    _, _, ess = fitted(Module, tmp_path, precision="bf16-mixed")
    assert [index for index, _ in seen] == [1] * 4 + [2] * 4
    [found] = ess.monitor._results._tracker.evidence.values()
    assert found.base == pytest.approx((seen[0][1] + seen[4][1]) / 2)
    assert found.m50 == pytest.approx((seen[1][1] - seen[0][1] + seen[5][1] - seen[4][1]) / 2, abs=1e-6)


def takes_anything() -> type:
    class Module(base_class(pl)):
        def training_step(self, *args: Any) -> Any:
            batch, batch_idx = args
            assert isinstance(batch_idx, int)
            return {"loss": self.loss(batch)}

    return Module


def takes_keywords() -> type:
    class Module(base_class(pl)):
        def training_step(self, batch: Any, **kwargs: Any) -> Any:
            return self.loss(batch)

    return Module


def has_a_default() -> type:
    class Module(base_class(pl)):
        def training_step(self, batch: Any, batch_idx: int, scale: float = 1.0) -> Any:
            return scale * self.loss(batch)

    return Module


@pytest.mark.parametrize("make", [takes_anything, takes_keywords, has_a_default])
def test_training_step_gets_the_arguments_that_lightning_gives_it(make: Any, tmp_path: Path) -> None:
    _, _, ess = fitted(make(), tmp_path)
    assert evidence(ess) == [("loss", 2)]


@pytest.mark.parametrize("by_call", [True, False])
def test_under_manual_optimization_training_step_is_not_run_again(
    by_call: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Module(base_class(pl)):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, by_call=by_call))
            optimizer.step()

    bare, rows_of_bare, _ = fitted(Module, tmp_path, watched=False)
    module, rows, ess = fitted(Module, tmp_path)
    assert rows.rows == rows_of_bare.rows
    assert module.outside.calls == 12
    assert all(map(torch.equal, state(module), state(bare)))
    # The outputs of a module that calls itself can be compared.
    assert evidence(ess) == ([("kl", 2)] if by_call else [])
    assert any("the model itself was not called" in r.getMessage() for r in caplog.records) is not by_call


def test_a_step_that_returns_nothing_is_no_step_of_the_optimizer(tmp_path: Path) -> None:
    class Module(base_class(pl)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return None if batch_idx == 1 else loss

    _, _, ess = fitted(Module, tmp_path)
    assert evidence(ess)[0][0] == "loss"


def test_an_error_in_the_replay_leaves_the_loggers_and_the_methods_in_place(tmp_path: Path) -> None:
    class Module(base_class(pl)):
        def training_step(self, batch: Any) -> Any:
            loss = self.loss(batch)
            if not torch.is_grad_enabled():
                raise ZeroDivisionError("injected")
            return loss

    bare, rows_of_bare, _ = fitted(base_class(pl), tmp_path, watched=False)
    module, rows, ess = fitted(Module, tmp_path)
    assert ess.monitor.snapshot().health.part_failures_total["replay"] == 2
    assert rows.rows == rows_of_bare.rows
    assert all(map(torch.equal, state(module), state(bare)))
    assert "log" not in vars(module)
