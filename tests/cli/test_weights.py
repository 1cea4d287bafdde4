from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ess_monitor.cli.weights import load_into, load_weights
from ess_monitor.errors import CheckpointError

WEIGHTS = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


class Bomb:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_safetensors_state_dicts_and_lightning_checkpoints_give_the_same_weights(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    torch.save(nn.Sequential(nn.Linear(3, 2)).state_dict() | WEIGHTS, tmp_path / "ordered.bin")
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": WEIGHTS, "epoch": 3, "optimizer_states": [{"lr": 0.1}]}, tmp_path / "run.ckpt")
    for path in tmp_path.iterdir():
        assert same(load_weights(path), WEIGHTS), path.name


def test_a_prefix_chooses_and_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": {f"model.{name}": w for name, w in WEIGHTS.items()} | {"metric.n": torch.ones(1)}}, path)
    assert same(load_weights(path, prefix="model."), WEIGHTS)
    with pytest.raises(CheckpointError, match=r"prefix: no name .* begins with 'net\.'.*'model\.0\.weight'"):
        load_weights(path, prefix="net.")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    trap = tmp_path / "executed"
    content = {"state_dict": {**WEIGHTS, "bomb": Bomb(trap)}} if wrapped else Bomb(trap)
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        load_weights(tmp_path / "evil.pt")
    assert not trap.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert trap.exists(), "the trap does not work, so the test shows nothing"


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Bomb(trap)))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Bomb(trap)))
    for name in ("evil.safetensors", "evil.pkl"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(tmp_path / name)
    assert not trap.exists()


def test_the_refusal_names_the_class_and_never_recommends_to_load_it_anyway(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "hyper_parameters": Path("x")}, tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match="pathlib") as error:
        load_weights(tmp_path / "run.ckpt")
    assert "weights_only" not in str(error.value)
    assert "model.state_dict()" in str(error.value)


@pytest.mark.parametrize(
    "name", ["empty.pt", "text.pt", "truncated.pt", "archive.zip", "text.safetensors", "short.safetensors"]
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "archive.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "hello")
    elif name == "truncated.pt":
        torch.save(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes({"empty.pt": b"", "short.safetensors": b"\x01"}.get(name, b"hello, this is not a checkpoint"))
    with pytest.raises(CheckpointError, match=name):
        load_weights(path)


@pytest.mark.parametrize("missing", ["nothing.pt", "nothing.safetensors", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        load_weights(tmp_path / missing)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "nothing"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
        ({"model": WEIGHTS, "epoch": 3}, "'model', 'epoch'"),
    ],
)
def test_content_that_is_no_state_dict_is_refused_and_named(tmp_path: Path, content: Any, named: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=named):
        load_weights(tmp_path / "x.pt")


def test_weights_are_put_into_the_model(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    model = nn.Sequential(nn.Linear(3, 2))
    load_into(model, tmp_path / "w.safetensors")
    assert same(model.state_dict(), WEIGHTS)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), r"lacks '1\.weight', '1\.bias'"),
        (nn.Sequential(nn.Linear(3, 2, bias=False)), r"also has '0\.bias'"),
        (nn.Sequential(nn.Linear(4, 2)), r"0\.weight.*\[2, 3\].*\[2, 4\]"),
        (nn.Linear(3, 2), r"lacks 'weight', 'bias' and also has .*'0\.weight'.*prefix"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, model: nn.Module, named: str) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        load_into(model, tmp_path / "w.safetensors")


def test_of_weights_that_are_tied_the_file_may_hold_one(tmp_path: Path) -> None:
    wanted = torch.arange(15.0).reshape(5, 3)
    for name in ("0.weight", "1.weight"):
        save_file({name: wanted}, tmp_path / f"{name}.safetensors")
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        with pytest.raises(CheckpointError, match="lacks"):
            load_into(model, tmp_path / f"{name}.safetensors")
        model[1].weight = model[0].weight
        load_into(model, tmp_path / f"{name}.safetensors")
        assert torch.equal(model[0].weight, wanted)
        assert model[1].weight is model[0].weight
