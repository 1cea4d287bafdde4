"""SIGTERM during a fit of Lightning's Trainer, which ends after the batch, whoever handles the signal first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ess_monitor.exporters import read_event_log
from ess_monitor.runtime.termination import SCHEDULER_VARIABLES
from tests.programs import run_program

pytest.importorskip("pytorch_lightning")

FIT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
import torch
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import GLA
from ess_monitor.integrations.lightning import ESSMonitorCallback

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = GLA(8, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if batch_idx > 2:
            import time
            time.sleep(0.05)
        loss = self.model(batch).square().mean()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_exception(self, exception):
        print("exception", type(exception).__name__, flush=True)

who, wanted = sys.argv[1], {"yes": True, "no": False}[sys.argv[2]]
torch.set_num_threads(1)
module = Module()
sinks = [{"kind": "event_log", "path": "events.jsonl"}]
settings = {"every_n_steps": 1, "exporters": sinks, "handle_sigterm": wanted}
callbacks = [ESSMonitorCallback(**settings, table=False)] if who == "callback" else []
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.path[0] or ".",
)
data = torch.utils.data.DataLoader([torch.ones(8, 8)] * 200, batch_size=1)
if who == "monitor":
    with Monitor(module, MonitorConfig(**settings)):
        trainer.fit(module, data)
else:
    trainer.fit(module, data)
print("after the fit")
"""


@pytest.mark.parametrize(
    ("who", "wanted"), [("nobody", "no"), ("callback", "yes"), ("callback", "no"), ("monitor", "yes")]
)
def test_lightning_ends_the_fit_as_it_does_alone(who: str, wanted: str, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in SCHEDULER_VARIABLES}
    fit = run_program(["-c", FIT, who, wanted], tmp_path, cwd=tmp_path, env=environ, imports=["pytorch_lightning"])
    print(fit.returncode, fit.stdout, fit.stderr)
    assert (fit.returncode, "after the fit" in fit.stdout) == (0, False)
    if who != "nobody":
        events = list(read_event_log(tmp_path / "events.jsonl"))
        assert [event.data.status for event in events if event.event == "run_finished"] == ["terminated"]
