import pytest

from fedcast.errors import ModelError
from fedcast.models.base import QUANTILES, ModelConfig
from fedcast.spec import ModelSpec

SMALL = {"d_model": 16, "n_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "context": 64, "horizon": 24, "patch": 8}


def test_when_a_spec_is_given_then_the_shape_follows_its_size():
    config = ModelConfig.of(ModelSpec(size="tiny", context=100, horizon=30, patch=8))
    assert (config.d_model, config.size, config.context_patches, config.horizon_patches) == (256, "tiny", 13, 4)


def test_when_a_configuration_is_written_then_it_reads_back_equal():
    config = ModelConfig(**SMALL, position="learned", size="mine")
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch": 0}, "patch"),
        ({"d_model": 10**9}, "d_model"),
        ({"n_heads": 3}, "heads"),
        ({"n_heads": 16}, "heads"),
        ({"position": "alibi"}, "position"),
        ({"dropout": 1}, "dropout"),
        ({"context": "64"}, "context"),
        ({"context": True}, "context"),
    ],
)
def test_when_a_configuration_cannot_be_built_then_the_field_is_named(change, named):
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict(SMALL | change)


def test_when_a_field_is_missing_then_it_is_named():
    with pytest.raises(ModelError, match="horizon"):
        ModelConfig.from_dict({key: value for key, value in SMALL.items() if key != "horizon"})


def test_when_levels_are_learnt_then_they_are_the_nine_deciles():
    assert tuple(k / 10 for k in range(1, 10)) == QUANTILES
