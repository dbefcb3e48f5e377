"""Every check of the config names the field and the mend."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tl_clt.errors import ConfigError
from tl_clt.transcoder import CrossLayerTranscoderConfig

pytestmark = pytest.mark.usefixtures("as_users_run_it")

GOOD = {"n_layers": 3, "d_model": 8, "d_transcoder": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0: give at least 1"),
        ({"d_model": -1}, "d_model is -1: give at least 1"),
        ({"d_transcoder": 0}, "d_transcoder is 0: give at least 1"),
        ({"span": 0}, r"span is 0 for 3 layers: give 1 \(PLT\) to 3 \(CLT\)"),
        ({"span": 4}, r"span is 4 for 3 layers"),
        ({"activation": "gelu"}, "activation is 'gelu': give one of relu, jumprelu, topk, batchtopk"),
        ({"activation": "topk"}, "k is None with activation 'topk'"),
        ({"activation": "batchtopk"}, "k is None with activation 'batchtopk'"),
        ({"activation": "relu", "k": 3}, "k is 3 with activation 'relu'"),
        ({"activation": "topk", "k": 0}, "k is 0 for 16 features per layer: give 1 to 16"),
        ({"activation": "topk", "k": 17}, "k is 17 for 16 features"),
        ({"dtype": "int8"}, "dtype is 'int8': give one of float64"),
        ({"input_scale": (1.0, 2.0)}, "input_scale has 2 factors for 3 layers"),
        ({"output_scale": (1.0,)}, "output_scale has 1 factors for 3 layers"),
    ],
)
def test_a_value_out_of_range_is_named(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        CrossLayerTranscoderConfig.from_dict({**GOOD, **change})


@pytest.mark.parametrize(
    ("key", "near"), [("d_trancoder", "d_transcoder"), ("spam", "span"), ("inputhook", "input_hook")]
)
def test_an_unknown_key_raises_with_the_nearest_name(key: str, near: str):
    with pytest.raises(ConfigError, match=f"'{key}' is no key .* Nearest: '{near}'"):
        CrossLayerTranscoderConfig.from_dict({**GOOD, key: 1})


def test_an_unknown_key_like_none_raises_too():
    with pytest.raises(ConfigError, match=r"'zzzzzz' is no key of CrossLayerTranscoderConfig\.$"):
        CrossLayerTranscoderConfig.from_dict({**GOOD, "zzzzzz": 1})


@pytest.mark.parametrize("missing", list(GOOD))
def test_a_missing_key_is_named(missing: str):
    with pytest.raises(ConfigError, match=f"'{missing}' is missing"):
        CrossLayerTranscoderConfig.from_dict({k: v for k, v in GOOD.items() if k != missing})


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layers", "three"), ("d_model", 8.5), ("span", "all"), ("skip", "no"), ("dtype", 32), ("k", "many")],
)
def test_a_value_of_a_wrong_type_is_a_config_error(key: str, value: object):
    with pytest.raises(ConfigError, match=key):
        CrossLayerTranscoderConfig.from_dict({**GOOD, key: value})


def test_defaults_are_a_jumprelu_clt():
    cfg = CrossLayerTranscoderConfig(**GOOD)
    assert (cfg.span, cfg.activation, cfg.input_hook, cfg.output_hook, cfg.dtype) == (
        3,
        "jumprelu",
        "hook_resid_mid",
        "hook_mlp_out",
        "float32",
    )


def test_to_dict_and_json_round_trip_exactly():
    cfg = CrossLayerTranscoderConfig(
        **GOOD,
        span=2,
        activation="batchtopk",
        k=4,
        skip=True,
        input_scale=(1.0, 0.1, 1 / 3),
        output_scale=(2.0, 3.0, 4.0),
        scan="me/mine",
        dtype="bfloat16",
    )
    assert CrossLayerTranscoderConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CrossLayerTranscoderConfig(**GOOD).span = 1  # type: ignore[misc]


@pytest.mark.parametrize("span", [1, 2, 3])
def test_targets_and_sources_agree_with_the_formula(span: int):
    cfg = CrossLayerTranscoderConfig(**GOOD, span=span)
    pairs = {(s, t) for s in range(3) for t in range(3) if t - span < s <= t}
    assert {(s, t) for s in range(3) for t in cfg.targets(s)} == pairs
    assert {(s, t) for t in range(3) for s in cfg.sources(t)} == pairs
