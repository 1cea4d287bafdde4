"""The backbone: stacks, hybrids, decoders, and that it can learn."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from ess_monitor.errors import ConfigError, OperatorError
from ess_monitor.featurizers import FEATURIZERS, GLA, SA, Backbone, BackboneConfig
from ess_monitor.tasks import Compression, CompressionConfig, accuracy, loss

TOKENS = torch.arange(26).view(2, 13) % 11


@pytest.mark.parametrize("mlp", ["swiglu", "mlp"])
@pytest.mark.parametrize("name", FEATURIZERS)
def test_logits_have_the_documented_shape_and_are_causal(name: str, mlp: str) -> None:
    backbone = Backbone(BackboneConfig(vocab_size=11, featurizer=name, mlp=mlp, state_size=4))
    changed = TOKENS.clone()
    changed[:, 8:] = 0
    logits, other = backbone(TOKENS), backbone(changed)
    assert logits.shape == (2, 13, 11)
    torch.testing.assert_close(logits[:, :8], other[:, :8], rtol=0, atol=1e-5)


def test_a_hybrid_gives_each_block_its_mixer_and_its_options() -> None:
    config = BackboneConfig(
        vocab_size=11, featurizer=("gla", "sa"), mixer_options={"beta": 1.0, "gate_rank": 3, "rope_base": 20.0}
    )
    first, second = (block.mixer for block in Backbone(config).blocks)
    assert isinstance(first, GLA)
    assert isinstance(second, SA)
    assert (first.beta, first.gate.down.out_features, second.rotary.base) == (1.0, 3, 20.0)


def test_a_mixer_can_be_fed_features_on_its_own() -> None:
    backbone = Backbone(BackboneConfig(vocab_size=11, width=16))
    assert backbone.blocks[1].mixer(torch.randn(2, 9, 16)).shape == (2, 9, 16)


def test_the_last_token_decoder_sees_nothing_but_the_last_position() -> None:
    backbone = Backbone(BackboneConfig(vocab_size=11, decoder="last_token"))
    features = torch.randn(2, 13, 32)
    changed = torch.cat([torch.randn(2, 12, 32), features[:, -1:]], dim=1)
    decoded = backbone.decoder(features)
    assert torch.equal(decoded, backbone.decoder(changed))
    distances = torch.cdist(decoded[0], decoded[0]) + torch.eye(13)
    assert distances.min() > 1e-3, "every position must be decoded differently"


def test_the_last_token_decoder_learns_to_compress() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(vocab_size=4, width=32, depth=1, featurizer="gla", decoder="last_token")
    backbone, data = Backbone(config), Compression(CompressionConfig(length=4, vocab_size=4))
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=5e-3)
    for step in range(250):
        inputs, targets = data.batch(range(64 * step, 64 * step + 64))
        optimizer.zero_grad()
        loss(backbone(inputs), targets).backward()
        optimizer.step()
    inputs, targets = data.batch(range(100_000, 100_256))
    assert accuracy(backbone(inputs), targets) > 0.7, "chance is 1/3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"featurizer": "mamba"}, "featurizer 'mamba' is unknown; take one of la, wla"),
        ({"featurizer": ("gla",)}, "featurizer names 1 mixers for depth=2 blocks"),
        ({"mixer_options": {"alpha": 3.0}}, "option 'alpha' is unknown to gla"),
        ({"width": 0}, "greater than or equal to 1"),
        ({"dropout": 0.1}, "dropout: unknown setting"),
        ({"decoder": "first_token"}, "'every_token' or 'last_token'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(vocab_size=11, **settings)


def test_sizes_that_do_not_go_together_are_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="num_heads=3 must divide width=32"):
        Backbone(BackboneConfig(vocab_size=11, num_heads=3))


@pytest.mark.parametrize("tokens", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3)])
def test_tokens_of_the_wrong_shape_or_type_are_refused(tokens: torch.Tensor) -> None:
    expected = r"expected integers \(torch.int64 or torch.int32\) of shape \(batch, length\)"
    with pytest.raises(OperatorError, match=expected):
        Backbone(BackboneConfig(vocab_size=11))(tokens)


def test_the_config_is_frozen_and_survives_json() -> None:
    config = BackboneConfig(vocab_size=11, featurizer=("gla", "sa"), mixer_options={"gate_rank": 3, "beta": 1.0})
    assert BackboneConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.width = 64
