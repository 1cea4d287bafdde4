from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ess_monitor import ConfigError, LayerFilter, Monitor, MonitorConfig, NoLayersError, capture_operators, describe
from ess_monitor.capture import find_layers
from ess_monitor.featurizers import FEATURIZERS, GLA, LA, SA, WLA, build_mixer


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = nn.Linear(16, 16)


def model() -> nn.Module:
    return nn.Sequential(Block(GLA(16, 2)), Block(SA(16, 2)), Block(LA(16, 2)))


def test_layers_are_found_in_model_order_by_their_module_path() -> None:
    assert [layer.name for layer in find_layers(model())] == ["0.mixer", "1.mixer", "2.mixer"]


def test_a_model_that_is_itself_a_layer_is_found() -> None:
    assert [layer.name for layer in find_layers(GLA(16, 2))] == ["model"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.ModuleDict({"_orig_mod": m})])
def test_wrapper_prefixes_are_not_part_of_a_name(wrap) -> None:
    assert [layer.name for layer in find_layers(wrap(model()))] == ["0.mixer", "1.mixer", "2.mixer"]


def test_patterns_include_and_exclude() -> None:
    chosen = find_layers(model(), LayerFilter(include=("*.mixer",), exclude=("1.*",)))
    assert [layer.name for layer in chosen] == ["0.mixer", "2.mixer"]


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"'blocks\.\*' matches none.*0\.mixer"):
        find_layers(model(), LayerFilter.model_validate(["blocks.*"]))


@pytest.mark.parametrize("name", sorted(FEATURIZERS))
def test_describe_tells_operator_capacity_channels_and_handles(name: str) -> None:
    (info,) = describe(build_mixer(name, 16, 2, 8)).layers
    assert info.supported
    assert info.module == FEATURIZERS[name].__name__
    assert info.operator == ("SoftmaxAttention" if name == "sa" else "DiagonalRecurrence")
    assert info.state_capacity == (None if name == "sa" else 8)
    assert info.channels == (16 if name == "s6" else 2)
    assert bool(info.handles) == (name not in ("la", "sa"))


@pytest.mark.parametrize("name", sorted(FEATURIZERS))
def test_every_parameter_that_a_handle_names_exists(name: str) -> None:
    mixer = build_mixer(name, 16, 2, 8)
    (info,) = describe(mixer).layers
    members = {*dict(mixer.named_parameters()), *dict(mixer.named_modules()), *dict(mixer.named_buffers())}
    for handle in info.handles:
        for parameter in handle.split(": ")[1].split(", "):
            assert parameter in members, f"{name}: handle {handle!r} names {parameter!r}, which does not exist"


def test_what_cannot_be_measured_is_listed_with_the_reason() -> None:
    class FancyAttention(nn.Linear):
        """Mixes in a way that nobody knows."""

    class FancyAttentionNorm(nn.LayerNorm):
        """Has the word in its name and mixes nothing."""

    mixed = nn.Sequential(GLA(16, 2), nn.LSTM(16, 16), FancyAttention(16, 2), FancyAttentionNorm(2))
    lstm, attention = describe(mixed).layers[1:]
    assert (lstm.supported, attention.supported) == (False, False)
    assert "nonlinear recurrence" in lstm.reason
    assert "register_capture(FancyAttention)" in attention.reason


def test_a_mixer_inside_of_a_module_that_calls_an_op_itself_is_a_layer_of_its_own() -> None:
    class Hybrid(nn.Module):
        """Attention in its own code, beside a mixer that it holds; the convolution in front is a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv1d(16, 16, 4, padding=3, groups=16))
            self.qkv = nn.Linear(16, 48)
            self.ssm = GLA(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.front(x.mT)[..., : x.shape[1]].mT
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return self.ssm(x) + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]

    net, x = nn.Sequential(Hybrid()), torch.randn(1, 8, 16)
    assert [(i.name, i.operator) for i in describe(net).layers] == [
        ("0", "SoftmaxAttention"),
        ("0.ssm", "DiagonalRecurrence"),
    ]
    found = capture_operators(net, x)
    inner = capture_operators(net[0].ssm, net[0].front(x.mT)[..., :8].mT)["model"]
    torch.testing.assert_close(found["0.ssm"].materialize(), inner.materialize())
    assert type(found["0"]).__name__ == "SoftmaxAttention"


def test_an_op_in_a_function_beside_the_class_is_listed_whatever_the_class_is_called() -> None:
    class MyAttention(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(super().forward(x))

    class Block(MyAttention):
        """The same, called otherwise."""

    infos = describe(nn.ModuleList([MyAttention(16, 16), Block(16, 16)])).layers
    assert [(i.name, i.supported) for i in infos] == [("0", False), ("1", False)]
    assert "its code has attention" in infos[1].reason
    assert "register_capture(Block)" in infos[1].reason


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_layers_left_out_by_the_filter_are_listed_as_such() -> None:
    infos = describe(model(), layers=LayerFilter(include=("0.*",))).layers
    assert [(i.name, i.supported) for i in infos] == [("0.mixer", True), ("1.mixer", False), ("2.mixer", False)]
    assert "excluded" in infos[1].reason


def test_a_model_without_any_layer_is_an_error_and_not_silence() -> None:
    with pytest.raises(NoLayersError, match=r"Sequential has no sequence mixer.*LSTM.*register_capture"):
        capture_operators(nn.Sequential(nn.LSTM(4, 4)), torch.randn(1, 3, 4))


def test_subclasses_are_read_like_their_base_class() -> None:
    class MyWLA(WLA):
        pass

    assert describe(MyWLA(16, 2)).layers[0].supported


def test_describe_refuses_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match="matches none"):
        describe(model(), layers=LayerFilter(include=("typo.*",)))


def test_a_library_that_moved_a_name_gives_a_reason_with_versions_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    from transformers.models.mamba import modeling_mamba

    from benchmarks.layers.mamba import hf

    class MovedMixer(modeling_mamba.MambaMixer):
        """As in a version that calls its scan by another name."""

        def forward(self, hidden_states, **kwargs):
            return hidden_states

    MovedMixer.__module__ = modeling_mamba.__name__
    net, _, _ = hf("Mamba", state_size=4)
    net.backbone.layers[1].mixer.__class__ = MovedMixer
    kept, moved = describe(net).layers
    assert (kept.supported, moved.supported) == (True, False)
    assert "calls no op of a known name (transformers" in moved.reason
    assert "tested with" in moved.reason
    Monitor(net)
    assert [record.getMessage() for record in caplog.records if record.name == "ess_monitor"] == [
        f"skipped: backbone.layers.1.mixer: {moved.reason}"
    ]


@pytest.fixture
def moved_mamba(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """All of whose mixers are those of a version that calls its scan by another name."""
    pytest.importorskip("transformers")
    from benchmarks.layers.mamba import hf
    from ess_monitor.capture.adapters import mamba

    for name in list(mamba._OPS):
        monkeypatch.delitem(mamba._OPS, name)
    torch.manual_seed(0)
    return hf("Mamba", state_size=4)[0]


@pytest.mark.parametrize("settings", [{}, {"layers": ["backbone.*"]}, {"capture": {"source": "random_tokens"}}])
@pytest.mark.parametrize("mode", ["advise", "auto"])
def test_a_library_that_moved_every_name_is_warned_of_once_and_the_training_goes_on(
    moved_mamba: nn.Module, mode: str, settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    config = MonitorConfig.load(every_n_steps=2, autopilot={"mode": mode, "lag_steps": 1}, strict=True, **settings)
    with Monitor(moved_mamba, config) as monitor:
        bare = trained(copy.deepcopy(moved_mamba))
        losses = trained(moved_mamba, lambda loss: monitor.step({"loss": loss}))
        with monitor.sample():
            moved_mamba(torch.arange(16)[None])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in moved_mamba.modules())
        assert monitor.flush() == monitor.layers == ()
        monitor.load_state_dict(monitor.state_dict())
        assert monitor.snapshot().steps_total == 4
        assert set(monitor.snapshot().measurements_total.values()) == {0}
    assert losses == bare
    [record] = [record for record in caplog.records if record.name == "ess_monitor"]
    assert record.getMessage().startswith("skipped: backbone.layers.1.mixer: MambaMixer calls no op of a known name")
    assert record.getMessage().endswith("Nothing in MambaForCausalLM can be measured: this run has no readings")


def trained(net: nn.Module, after: Callable[[torch.Tensor], object] = lambda loss: None) -> list[float]:
    """The losses of four steps."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(4):
        loss = net(torch.arange(16)[None]).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(loss)
        losses.append(loss.item())
    return losses


def test_what_is_asked_for_once_is_an_error_also_where_a_library_moved_every_name(moved_mamba: nn.Module) -> None:
    with pytest.raises(NoLayersError, match="calls no op of a known name"):
        capture_operators(moved_mamba, torch.arange(16)[None])


def test_a_monitor_of_layers_that_are_refused_or_unknown_beside_moved_ones_is_an_error(moved_mamba: nn.Module) -> None:
    with pytest.raises(NoLayersError):
        Monitor(nn.ModuleList([moved_mamba, nn.LSTM(4, 4)]))
    with pytest.raises(NoLayersError, match="causal"):
        Monitor(encoder())


def encoder() -> nn.Module:
    """Of a known library, refused for a reason that no version changes."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertModel(config)
