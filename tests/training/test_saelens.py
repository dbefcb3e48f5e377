"""What a user of SAELens relies on: CLTs are known to it, train in its own trainer with its own store, and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, SAETrainer

from tests.training.conftest import D_MODEL, N_CTX, N_LAYERS
from tests.training.small_clts import build, trainer_config
from tests.warm_process import WarmProcess
from tl_clt.errors import ConfigError
from tl_clt.training import (
    CLTTrainingRunner,
    TrainingCLT,
    TrainingCLTConfig,
    apply_scale,
    clt_disk_loader,
    estimate_scale,
    hook_names,
    init_from_tokens,
    pack,
)
from tl_clt.training.clt import InferenceCLT
from tl_clt.training.export import export
from tl_clt.training.run.trainer import CLTTrainer
from tl_clt.transcoder import CrossLayerTranscoder

KNOWN = """
from sae_lens import registry
registries = registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY
assert [known["cross_layer_transcoder"][0].__name__ for known in registries] == ["InferenceCLT", "TrainingCLT"]
# SAELens is as it is without us: whoever asks for its files gets them.
import sae_lens, importlib.resources
assert type(sae_lens.__spec__.loader).__name__ == type(sae_lens.__loader__).__name__ == "SourceFileLoader"
assert importlib.resources.files("sae_lens").joinpath("pretrained_saes.yaml").is_file()
"""


def test_importing_tl_clt_alone_makes_saelens_know_clts() -> None:
    # To ask whether SAELens is there, as many libraries do, is not to import it.
    ours = "import tl_clt, sys, importlib.util as u; u.find_spec('sae_lens'); assert 'sae_lens' not in sys.modules"
    subprocess.run([sys.executable, "-c", ours + KNOWN], check=True)


def test_a_saelens_that_is_loaded_already_comes_to_know_clts(warm_process: WarmProcess) -> None:
    ended = warm_process.run("import sae_lens, sys; assert 'tl_clt' not in sys.modules; import tl_clt" + KNOWN)
    assert ended.status == 0, ended.stderr


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_clt_trains_in_saelens_own_trainer_on_its_own_store(model, tokens, tmp_path: Path, activation: str) -> None:
    torch.manual_seed(0)
    cfg = TrainingCLTConfig(
        n_layers=N_LAYERS,
        d_in=D_MODEL,
        d_transcoder=24,
        d_sae=N_LAYERS * 24,
        activation=activation,
        k=6 if activation == "topk" else None,
        sparsity_coefficient=0.1,
    )
    names = hook_names(model, cfg)
    store = ActivationsStore.from_config_multi_hook(
        model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        hook_names=names,
        hook_d_ins=dict.fromkeys(names, D_MODEL),
        context_size=N_CTX,
        n_batches_in_buffer=16,
        store_batch_size_prompts=8,
        train_batch_size_tokens=64,
        prepend_bos=False,
    )
    raw = (pack([batch[name] for name in names], names, D_MODEL) for batch in store.get_multi_hook_data_loader())
    first = [next(raw) for _ in range(2)]
    scale = estimate_scale(first)
    cfg.input_scale, cfg.output_scale = scale.inputs, scale.outputs
    clt = TrainingCLT(cfg)
    inputs, outputs = apply_scale(torch.cat(first), scale).unbind(dim=1)
    init_from_tokens(clt, inputs, outputs)
    trainer = SAETrainer(trainer_config(64 * 150, 64), clt, (apply_scale(batch, scale) for batch in raw))
    assert type(trainer) is SAETrainer and trainer.fit() is clt
    # It has learned the MLPs: most of what a held-out batch varies by.
    x, y = next(raw).unbind(dim=1)
    exported = export(clt).requires_grad_(False)
    error = (exported(x) - y).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    assert 1 - float(error.mean()) > 0.5
    clt.save_inference_model(tmp_path / "clt")
    loaded = SAE.load_from_disk(tmp_path / "clt")
    assert isinstance(loaded, InferenceCLT)
    # Two sums of the same products in float32, in another order.
    torch.testing.assert_close(loaded(apply_scale(torch.stack([x, y], dim=1), scale)[:, 0]), exported_scaled(x, clt))


def exported_scaled(x: torch.Tensor, clt: TrainingCLT) -> torch.Tensor:
    """What the exported CLT writes for raw inputs, in units of training."""
    return export(clt)(x) * torch.tensor(clt.cfg.output_scale)[:, None]


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "topk"},
        {"activation": "topk", "topk_across": "all_layers", "skip": True},
        {"activation": "batchtopk", "span": 2},
        {"activation": "jumprelu", "far_rank": 3},
        {"activation": "relu", "span": 1},
    ],
)
def test_what_a_runner_writes_loads_in_saelens(model, tokens, make_config, tmp_path: Path, changes: dict) -> None:
    cfg = make_config(**changes, training_tokens=64 * 30, output_path=str(tmp_path / "clt"), dtype="float64")
    ours = CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    loaded = SAE.load_from_disk(tmp_path / "clt", converter=clt_disk_loader)
    assert isinstance(loaded, InferenceCLT) and loaded.cfg.d_sae == N_LAYERS * 24
    assert loaded.cfg.metadata.hook_name == "hook_resid_mid"
    _, cache = model.run_with_cache(tokens[:20])
    x = torch.stack([cache[f"blocks.{s}.hook_resid_mid"] for s in range(N_LAYERS)], dim=-2).flatten(0, 1).double()
    scaled = x * torch.tensor(loaded.cfg.input_scale, dtype=torch.float64)[:, None]
    acts = loaded.encode(scaled)
    # A threshold goes through its logarithm and back, and scales are taken out and put in again: rounding of float64.
    torch.testing.assert_close(acts, ours.encode(x).flatten(1), rtol=1e-9, atol=1e-12)
    assert (acts > 0).any()
    if not cfg.skip:  # SAELens's decode is not given the inputs, which a skip connection reads
        written = loaded(scaled) / torch.tensor(loaded.cfg.output_scale, dtype=torch.float64)[:, None]
        torch.testing.assert_close(written, ours(x), rtol=1e-9, atol=1e-12)
    assert SAE.load_from_disk(tmp_path / "clt", converter=clt_disk_loader, dtype="float32").dtype == torch.float32


def test_a_clt_that_saelens_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    for name, activation, refused in (("norms", "topk", "decoders of norm"), ("below", "jumprelu", "below 0")):
        clt = export(build(activation))
        with torch.no_grad():
            if activation == "topk":
                for W_dec in clt.W_dec:
                    W_dec.mul_(3.0)
            else:
                clt.threshold[1, 0] = -1.0
        clt.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=f"{refused}.*CrossLayerTranscoder"):
            clt_disk_loader(tmp_path / name)
    CrossLayerTranscoder.from_pretrained(tmp_path / "norms")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_l0": 4.0}, "target_l0 is 4, which SAELens's SAETrainer would ignore.*set sparsity_coefficient"),
        ({"target_l0": 4.0, "activation": "relu"}, "CLTTrainingRunner"),
        ({"dead_feature_density": 1e-3}, "dead_feature_density is 0.001, which SAELens's SAETrainer would ignore"),
    ],
)
def test_what_saelens_trainer_would_ignore_it_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SAETrainer(trainer_config(640, 64), build(**changes), iter(()))
    CLTTrainer(trainer_config(640, 64), build(**changes), iter(()))


def test_a_quadratic_penalty_needs_no_controller() -> None:
    clt = build("jumprelu", target_l0=4.0, sparsity_loss="quadratic_l0")
    assert set(SAETrainer(trainer_config(640, 64), clt, iter(())).coefficient_schedulers) == {
        "sparsity",
        "dead_feature",
        "auxk",
    }
