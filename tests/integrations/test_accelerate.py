"""What is peculiar to loops with Hugging Face accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ess_monitor import CheckpointError, ConfigError
from tests.integrations.helpers import LanguageModel, callback, dataset, measurements, train

accelerate = pytest.importorskip("accelerate")


def logged(folder: Path, **settings: object):
    log = folder / "log.jsonl"
    return log, callback("accelerate", exporters=[{"kind": "event_log", "path": str(log)}], **settings)


def prepared(**options: object):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = LanguageModel()
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("name_of_own", ["rows", "wandb"])
def test_readings_go_through_every_tracker(name_of_own: str, tmp_path: Path) -> None:
    from accelerate.tracking import GeneralTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: list[tuple[int, dict]] = []

    class Rows(GeneralTracker):
        name, requires_logging_directory, tracker = name_of_own, False, None

        def store_init_configuration(self, values: dict) -> None: ...

        def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
            rows.append((step, values))

    accelerator, model, optimizer = prepared(log_with=["tensorboard", Rows()], project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    with callback("accelerate").watch(accelerator, model) as ess:
        for tokens in dataset().split(4):
            loss = model(tokens)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ess.step({"loss": loss}, optimizer=optimizer)
    accelerator.end_training()
    tag = "ess_utilization_ratio/model.blocks.0.mixer"
    assert [step for step, _ in rows] == [0, 3, 6, 9]
    assert tag in rows[0][1]
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars(tag)] == [0, 3, 6, 9]


def test_a_short_last_group_of_an_epoch_is_a_step(tmp_path: Path) -> None:
    """accelerate steps at the end of the data, full group or not."""
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=5)
    loader = accelerator.prepare(torch.utils.data.DataLoader(dataset(), batch_size=4))
    with callback("accelerate").watch(accelerator, model) as ess:
        for tokens in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                ess.step(optimizer=optimizer)
    assert ess.monitor.snapshot().steps_total == 3


def test_a_state_loaded_within_the_run_takes_it_back_there(tmp_path: Path) -> None:
    train("accelerate", tmp_path, callback("accelerate"), steps=7)
    accelerator, model, optimizer = prepared()
    log, ess = logged(tmp_path)
    with ess.watch(accelerator, model):
        accelerator.load_state(str(tmp_path / "7"))
        for tokens in dataset().split(4)[7:]:
            accelerator.backward(model(tokens)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            ess.step(optimizer=optimizer)
    assert [m.step for m in measurements(log)] == [9]
    assert ess.monitor.snapshot().last_step == 12


def test_watching_twice_registers_once(tmp_path: Path) -> None:
    accelerator, model, _ = prepared()
    ess = callback("accelerate").watch(accelerator, model).watch(accelerator, model)
    assert len(accelerator._save_model_state_pre_hook) == len(accelerator._load_model_state_pre_hook) == 1
    with ess as entered:
        assert entered.monitor is not None


def test_validation_batches_can_be_the_source(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    log, ess = logged(tmp_path, capture={"source": "validation"})
    with ess.watch(accelerator, model):
        for k, tokens in enumerate(dataset().split(4)):
            model.train()
            accelerator.backward(model(tokens)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            ess.step(optimizer=optimizer)
            if k % 2:
                model.eval()
                with torch.no_grad(), ess.sample({"accuracy": 0.5}):
                    model(tokens)
    assert [m.step for m in measurements(log)] == [2, 6, 10]
    assert {m.metrics["accuracy"] for m in measurements(log)} == {0.5}


def test_starting_without_something_to_watch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to watch"), callback("accelerate"):
        pass


def test_two_callbacks_of_one_accelerator_keep_their_states_apart(tmp_path: Path) -> None:
    accelerator, model, _ = prepared()
    other = accelerator.prepare(LanguageModel())
    first, second = (callback("accelerate").watch(accelerator, watched) for watched in (model, other))
    with first, second:
        for _ in range(3):
            first.step()
        second.step()
        accelerator.save_state(str(tmp_path / "s"))
        first.step()
        accelerator.load_state(str(tmp_path / "s"))
        assert [ess.state_dict()["step"] for ess in (first, second)] == [3, 1]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    train("accelerate", tmp_path, callback("accelerate"), steps=1)
    (tmp_path / "1" / "ess_monitor.json").write_text("{")
    accelerator, model, _ = prepared()
    callback("accelerate").watch(accelerator, model)
    with pytest.raises(CheckpointError, match=r"ess_monitor.json: cannot be read .* delete it"):
        accelerator.load_state(str(tmp_path / "1"))


def test_a_folder_without_the_state_begins_the_measurements_anew(tmp_path: Path) -> None:
    train("accelerate", tmp_path, None, steps=1)
    accelerator, model, _ = prepared()
    with callback("accelerate").watch(accelerator, model) as ess:
        for _ in range(3):
            ess.step()
        accelerator.load_state(str(tmp_path / "1"))
        assert ess.state_dict()["step"] == 0


def test_a_step_outside_of_the_run_is_an_error_before_it_and_a_warning_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerator, model, _ = prepared()
    ess = callback("accelerate").watch(accelerator, model)
    for call in (ess.step, lambda: ess.sample().__enter__()):
        with pytest.raises(ConfigError, match=r"not started.*`with callback.watch"):
            call()
    with ess:
        ess.step()
    for _ in range(3):
        ess.step()
    assert sum("closed" in record.message for record in caplog.records) == 1
