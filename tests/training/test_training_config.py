"""What a config refuses, and how it says so."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from tl_clt.errors import ConfigError
from tl_clt.training import CLTSettings, CLTTrainingRunnerConfig, DataSettings

DATA = Path(__file__).parents[1] / "data"


def test_defaults_are_valid_and_span_everything() -> None:
    cfg = CLTTrainingRunnerConfig(d_transcoder=64)
    assert (cfg.span, cfg.activation, cfg.tanh_scale, cfg.dead_feature_coefficient) == (
        None,
        "topk",
        4.0,
        3e-6,
    )
    assert not cfg.log_to_wandb


def test_survives_json(make_config) -> None:
    cfg = make_config(exclude_special_tokens=(1, 2), seqpos_slice=(1, None))
    assert CLTTrainingRunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_parts_and_keywords_of_their_own_make_the_same_run() -> None:
    clt, data = CLTSettings(d_transcoder=8, activation="topk", k=3), DataSettings(context_size=64)
    whole = CLTTrainingRunnerConfig(clt=clt, data=data, lr=1e-3)
    assert whole == CLTTrainingRunnerConfig(d_transcoder=8, activation="topk", k=3, context_size=64, lr=1e-3)
    assert hash(whole) == hash(replace(whole)) and whole.clt == clt
    # Chosen from 2,000,000 tokens.
    data = replace(data, train_batch_size_tokens=4096, n_eval_prompts=256, n_batches_for_scale=1)
    assert whole.data == data
    assert (whole.d_transcoder, whole.context_size, whole.lr) == (8, 64, 1e-3)
    changed = replace(whole, k=2, lr=2e-3)
    assert changed.clt == replace(clt, k=2) and changed.data == data and whole.k == 3
    with pytest.raises(AttributeError, match="no field 'n_layers'"):
        _ = whole.n_layers
    with pytest.raises(ConfigError, match="clt is 3, of type int: give a CLTSettings"):
        CLTTrainingRunnerConfig(clt=3)


def test_what_was_given_is_left_as_it_is() -> None:
    clt = CLTSettings(d_transcoder=8)
    cfg = CLTTrainingRunnerConfig(clt=clt)
    clt.d_transcoder = 9
    assert cfg.d_transcoder == 8


def test_no_field_is_written_twice_and_dictionaries_are_flat_or_by_part() -> None:
    own, parts = CLTTrainingRunnerConfig(d_transcoder=4), (CLTSettings, DataSettings)
    names = [
        f.name for kind in (CLTTrainingRunnerConfig, *parts) for f in fields(kind) if f.name not in ("clt", "data")
    ]
    assert len(names) == len(set(names)) and set(own.to_dict()) == set(names)
    by_part = {"clt": {"d_transcoder": 4, "span": 1}, "data": {"context_size": 64}, "seed": 3}
    flat = {"d_transcoder": 4, "span": 1, "context_size": 64, "seed": 3}
    assert CLTTrainingRunnerConfig.from_dict(by_part) == CLTTrainingRunnerConfig.from_dict(flat)
    with pytest.raises(ConfigError, match=r"clt has the keys \['context_size'\]"):
        CLTTrainingRunnerConfig.from_dict({"clt": {"d_transcoder": 4, "context_size": 16}})


def test_the_record_of_an_older_run_still_loads() -> None:
    flat = json.loads((DATA / "training-of-an-older-run.json").read_text())["config"]
    cfg = CLTTrainingRunnerConfig.from_dict(flat)
    assert (cfg.clt.d_transcoder, cfg.data.seqpos_slice, cfg.lr) == (256, (1, None), 0.002)
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in cfg.to_dict().items() if name in flat} == {
        name: value for name, value in flat.items() if name != "n_eval_batches"
    }


@pytest.mark.parametrize(
    ("tokens", "batch"), [(1_000, 128), (65_536, 256), (200_000, 512), (1_000_000, 4096), (10**9, 4096)]
)
def test_what_is_left_out_is_chosen_from_the_budget_and_says_why(tokens: int, batch: int) -> None:
    cfg = CLTTrainingRunnerConfig(d_transcoder=64, training_tokens=tokens, target_l0=8.0)
    assert (cfg.train_batch_size_tokens, cfg.k, cfg.activation) == (batch, 8, "topk")
    assert 0 <= cfg.lr_warm_up_steps <= 1000 and cfg.lr_decay_steps == cfg.n_steps // 5
    assert 16 <= cfg.n_eval_prompts <= 256
    # Rounded to two digits.
    assert cfg.lr == pytest.approx(min(max(0.045 / cfg.n_steps**0.5, 2e-4), 4e-3), rel=0.05)
    of_data = {"context_size", "train_batch_size_tokens", "n_eval_prompts", "n_batches_for_scale"}
    assert set(cfg.chosen) == {"k", "lr", "lr_warm_up_steps", "lr_decay_steps", *of_data} and all(cfg.chosen.values())
    assert all(f"{name} = {getattr(cfg, name)}: {reason}" in cfg.in_words() for name, reason in cfg.chosen.items())
    assert "Activation topk, 8 features" in cfg.in_words() and "above 10 times the median" in cfg.in_words()
    assert cfg.changed(lr=0.5).chosen.keys() == cfg.chosen.keys() - {"lr"}
    given = CLTTrainingRunnerConfig(d_transcoder=64, k=3, lr=0.5, train_batch_size_tokens=256, lr_warm_up_steps=390)
    assert (given.k, given.lr, given.train_batch_size_tokens, given.lr_warm_up_steps) == (3, 0.5, 256, 390)
    assert not {"k", "lr", "train_batch_size_tokens", "lr_warm_up_steps"} & set(given.chosen)


def test_a_few_steps_may_be_all_warm_up() -> None:
    cfg = CLTTrainingRunnerConfig(d_transcoder=64, training_tokens=1280, lr_warm_up_steps=9)
    assert (cfg.n_steps, cfg.lr_decay_steps) == (10, 1)


def test_unknown_key_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="'d_trancoder' is no key .* Nearest: 'd_transcoder'"):
        CLTTrainingRunnerConfig.from_dict({"d_trancoder": 4})
    with pytest.raises(ConfigError, match="'d_trancoder' is no key .* Nearest: 'd_transcoder'"):
        CLTTrainingRunnerConfig(d_trancoder=4)
    with pytest.raises(ConfigError, match="'d_transcoder' is missing"):
        CLTTrainingRunnerConfig.from_dict({})


def test_is_frozen(make_config) -> None:
    with pytest.raises(FrozenInstanceError):
        make_config().lr = 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_transcoder": 0}, "d_transcoder is 0: give more than 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"activation": "relu", "sparsity_coefficient": -1.0}, "sparsity_coefficient is -1.0: give 0 or more"),
        ({"activations_mixing_fraction": 1.5}, "activations_mixing_fraction is 1.5: give 0 to 1"),
        ({"k": 3, "activation": "jumprelu"}, "k is 3 with activation 'jumprelu': topk and batchtopk need k"),
        ({"jumprelu_bandwidth": 2.0}, "jumprelu_bandwidth is 2.0 with activation 'topk', where it has no part"),
        ({"k": 99}, "k is 99 for 24 features per layer: give 1 to 24"),
        ({"span": 0}, "span is 0"),
        ({"activation": "jumprelu", "topk_across": "all_layers"}, "only topk and batchtopk have it"),
        ({"k_start": 12}, "k_start is 12 with k_anneal_steps 0: give both or neither"),
        ({"k_start": 3, "k_anneal_steps": 5}, "k_start is 3 with k 6: k falls from k_start"),
        ({"k_aux": 25}, "k_aux is 25 for 24 features per layer"),
        ({"far_rank": 0}, "far_rank is 0"),
        ({"far_rank": 2, "span": 1}, "write to no far layer"),
        ({"far_write_coefficient": 0.1, "span": 1}, "far_write_coefficient is 0.1 with span 1"),
        ({"far_write_coefficient": -0.1}, "far_write_coefficient is -0.1: give 0 or more"),
        ({"target_l0": 4.0}, "target_l0 is 4.0 and k 6 with activation 'topk', whose L0 is k: give one"),
        ({"target_l0": 25.0, "activation": "jumprelu"}, "target_l0 is 25.0 for 24 features"),
        ({"target_l0": 2.5, "k": None}, "keeps a whole number of features: give 2 or 3, or activation 'jumprelu'"),
        ({"sparsity_loss": "l0", "activation": "relu"}, "which only jumprelu has"),
        ({"sparsity_loss": "l0"}, "which only jumprelu has. Use jumprelu, or leave it out"),
        ({"jumprelu_bandwidth": 2.0}, "leave it out, or set activation to 'jumprelu'[.]$"),
        ({"jumprelu_bandwidth": 2.0, "activation": "relu", "k": None}, "with activation 'relu', where it has no part"),
        ({"tanh_scale": 2.0}, "set activation to 'relu' or 'jumprelu'[.]$"),
        ({"dead_feature_density": 2.0}, "dead_feature_density is 2: give a share of tokens, 0 to 1"),
        ({"lr_end": 1e-4}, "lr_end is 0.0001 with lr_scheduler_name 'constant', which has no such end"),
        ({"exclude_special_tokens": (-1,)}, "0. is -1: give 0 or more, a token id"),
        ({"seed": 2**64}, "seed is 18446744073709551616: give a whole number of 64 bits"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number[.]$"),
        ({"sparsity_loss": "quadratic_l0", "activation": "jumprelu"}, "without target_l0"),
        ({"target_l0": 4.0, "activation": "relu", "sparsity_coefficient": 0.0}, "for lambda to start from"),
        ({"output_hook": "hook_resid_mid"}, "give two different hooks"),
        ({"n_batches_in_buffer": 7}, "buffer of 56 tokens for a batch of 64: give at least 8, better 32"),
        ({"seqpos_slice": (8, None)}, "leaves none of 8 positions"),
        ({"seqpos_slice": (4, None), "n_batches_in_buffer": 15}, "give at least 16"),
        ({"training_tokens": 63}, "less than one batch of 64"),
        ({"lr_warm_up_steps": 30, "lr_decay_steps": 11}, "41 together, but the run has 40 steps"),
        ({"checkpoint_path": "o/c", "output_path": "o"}, "checkpoint_path 'o/c' is within .* give a folder outside"),
        ({"cache_path": "o", "output_path": "o"}, "cache_path 'o' is within .* give a folder outside of it"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"max_norm_ratio": 1.0}, "max_norm_ratio is 1.0: give more than 1"),
        ({"adam_beta1": 1.5}, "adam_beta1 is 1.5: give 0 or more, and less than 1"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0: give 0 or more, and less than 1"),
        ({"adam_beta1": -0.1}, "adam_beta1 is -0.1: give 0 or more"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
    ],
)
def test_bad_value_names_field_and_mend(make_config, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_a_word_is_no_token_id_and_the_mend_speaks_of_ids_alone(make_config, as_users_run_it) -> None:
    told = "exclude_special_tokens.0. is 'pad', of type str: give a whole number, 0 or more, a token id[.]$"
    with pytest.raises(ConfigError, match=told):
        make_config(exclude_special_tokens=("pad",))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", "jumpreluu"),
        ("straight_through", "thresold"),
        ("sparsity_loss", "quadratic_l1"),
        ("topk_across", "all_layer"),
        ("lr_scheduler_name", "constan"),
        ("dtype", "float33"),
        ("backend", "bridg"),
        ("cache_dtype", "int9"),
    ],
)
def test_bad_choice_names_the_nearest(as_users_run_it, field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is '{value}'.*Nearest"):
        CLTTrainingRunnerConfig(d_transcoder=4, **{field: value})


@pytest.mark.parametrize("value", ["abc", "1e-3", float("nan"), float("inf"), [1e-3]])
def test_a_learning_rate_that_is_no_number_is_refused(as_users_run_it, value: object) -> None:
    with pytest.raises(ConfigError, match="lr is .*: give a finite number"):
        CLTTrainingRunnerConfig(d_transcoder=4, lr=value)
    with pytest.raises(ConfigError, match="lr is .*: give a finite number"):
        CLTTrainingRunnerConfig.from_dict({"d_transcoder": 4, "lr": value})


def test_a_context_that_nobody_asked_for_is_no_more_than_the_model_takes():
    """And what depends on it is that of a config that was given it."""
    left_out, given = CLTTrainingRunnerConfig(d_transcoder=8), CLTTrainingRunnerConfig(d_transcoder=8, context_size=8)
    assert left_out.context_size == 128 and left_out.fitted_to(128) is left_out and left_out.fitted_to(4096) is left_out
    assert left_out.fitted_to(8).to_dict() == given.to_dict()
    assert given.fitted_to(4) is given
    assert "context_size = 128: 128, or as many as the model takes" in left_out.in_words()
    assert "context_size = 8: the model takes no more" in left_out.fitted_to(8).in_words()
    assert "context_size" not in given.in_words()
