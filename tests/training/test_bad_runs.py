"""Runs that cannot end well say so, with the mend, and leave nothing that passes for a good CLT."""

from __future__ import annotations

import errno
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import tiny_model
from tl_clt.errors import ConfigError, NotFinite, NotWritten, TrainingWarning
from tl_clt.training import CLTTrainingRunner
from tl_clt.training.run import runner
from tl_clt.training.run.trainer import CLTTrainer, require_finite_weights
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.formats import native

# -- infinities, and what is no number


@pytest.mark.parametrize("changes", [{"activation": "topk"}, {"activation": "jumprelu"}, {"dtype": "bfloat16"}])
def test_a_learning_rate_far_too_high_stops_the_run_by_step_and_term(
    model, tokens, make_config, tmp_path: Path, changes: dict
) -> None:
    folders = {"output_path": str(tmp_path / "clt"), "checkpoint_path": str(tmp_path / "steps")}
    cfg = make_config(lr=1e30, checkpoint_every=5, **folders, **changes)
    with pytest.raises(NotFinite, match=r"stopped at step \d of 40: .*mse_loss is \w+.* Lower lr .now 1e\+30"):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    assert list(tmp_path.iterdir()) == []


def test_the_weights_of_a_step_that_is_not_finite_are_those_before_it(model, tokens, make_config, monkeypatch) -> None:
    trainers: list[CLTTrainer] = []
    real = CLTTrainer._forward

    def poisoned(self: CLTTrainer, sae, step_input):
        trainers[:] = [self]
        output = real(self, sae, step_input)
        if step_input.n_training_steps < 3:
            return output
        # A term whose value is finite and whose gradient is not.
        b = sae.b_enc[1].sum()
        endless = torch.sqrt(b - b.detach())
        return replace(output, loss=output.loss + endless)

    monkeypatch.setattr(CLTTrainer, "_forward", poisoned)
    with pytest.raises(NotFinite, match="at step 4 of 40: the gradient's norm is inf, from b_enc.1.") as caught:
        CLTTrainingRunner(make_config(), model=model, dataset=tokens).run()
    assert "Lower lr (now 0.01), lengthen lr_warm_up_steps" in str(caught.value)
    assert all(value.isfinite().all() for value in trainers[0].sae.state_dict().values())


def test_activations_that_are_not_finite_are_told_as_the_models(tokens, make_config, monkeypatch) -> None:
    broken, calls = tiny_model(), []
    mlp = broken.blocks[2].mlp
    forward = mlp.forward

    def spoil(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        value = forward(x)
        return value.masked_fill(torch.arange(value.shape[-1]) == 3, torch.inf) if len(calls) > 6 else value

    monkeypatch.setattr(mlp, "forward", spoil)
    with pytest.raises(NotFinite, match="the model's activations are infinite .* float32 .model_dtype."):
        CLTTrainingRunner(make_config(prefetch=False), model=broken, dataset=tokens).run()


def test_weights_that_are_not_finite_are_not_saved(model, tokens, make_config, monkeypatch, tmp_path: Path) -> None:
    real = CLTTrainer.fit

    def then_break(self: CLTTrainer):
        result = real(self)
        with torch.no_grad():
            self.sae.W_enc[2][0, 0] = torch.nan
        return result

    cfg = make_config(output_path=str(tmp_path / "clt"))
    with monkeypatch.context() as patched:
        patched.setattr(CLTTrainer, "fit", then_break)
        with pytest.raises(NotFinite, match="At the end of training, these weights .*: W_enc. Nothing is saved"):
            CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFinite, match="After step 3, .*: b. .*dtype='float32' without autocast"):
        weights = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])}
        require_finite_weights(weights, "After step 3", replace(cfg, autocast=True))


def test_a_last_step_that_ruins_the_clt_is_found(model, tokens, make_config) -> None:
    """Its weights are finite, and what they write is not."""
    with pytest.raises(NotFinite, match="the error of the reconstruction of layers 0, 1, 2 is infinite or no number"):
        cfg = make_config(activation="relu", lr=1e30, training_tokens=64)
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()


def test_weights_in_float16_are_refused_with_the_mend(make_config) -> None:
    with pytest.raises(ConfigError, match="dtype is 'float16': .* Give 'bfloat16', .* or 'float32'"):
        make_config(dtype="float16")
    assert make_config(model_dtype="float16").model_dtype == "float16"


# -- folders that cannot be written to


def no_work(*args: object, **kwargs: object) -> None:
    pytest.fail("the model was loaded")


@pytest.mark.parametrize("which", ["output_path", "checkpoint_path"])
@pytest.mark.parametrize("place", ["below a file", "where the system keeps all", "read-only"])
def test_a_folder_that_takes_nothing_is_found_before_the_model_is_loaded(
    tokens, make_config, tmp_path: Path, monkeypatch, which: str, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    folders = {"below a file": tmp_path / "file" / "clt", "where the system keeps all": Path("/proc/clt/new")}
    cfg = make_config(model_name="tiny", **{which: str(folders.get(place, tmp_path / "new" / "clt"))})

    def denied(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(runner, "load_model", no_work)
    with monkeypatch.context() as patched:
        if place == "read-only":  # nothing is forbidden to root, who may run this
            patched.setattr(Path, "mkdir", denied)
        with pytest.raises(NotWritten, match="is no folder. Give another path|takes nothing .* Give another path"):
            CLTTrainingRunner(cfg, dataset=tokens).run()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("beside", ["checkpoints", "temporary files"])
def test_a_trained_clt_is_not_lost_where_its_disk_is_full(
    model, tokens, make_config, tmp_path: Path, monkeypatch, beside: str
) -> None:
    full, roomy, temporary = (tmp_path / name for name in ("full", "roomy", "temporary"))
    temporary.mkdir()
    monkeypatch.setattr(runner.tempfile, "gettempdir", lambda: str(temporary))
    real, refused = native.save, [full] if beside == "checkpoints" else [full, roomy]

    def save(weights: object, folder: Path) -> None:
        if any(place in folder.parents for place in refused):
            (folder / "half").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(weights, folder)

    monkeypatch.setattr(runner.native, "save", save)
    cfg = make_config(output_path=str(full / "clt"), checkpoint_path=str(roomy / "checkpoints"))
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    with pytest.raises(
        NotWritten, match="'.*full/clt' could not be written .No space left.* is not lost: it is in "
    ) as e:
        run.run()
    where = roomy / "checkpoints" if beside == "checkpoints" else temporary
    (found,) = [path for path in where.iterdir() if path.name.startswith("clt-")]
    assert f"CrossLayerTranscoder.from_pretrained('{found}')" in str(e.value)
    loaded = CrossLayerTranscoder.from_pretrained(found)
    assert run.clt is not None and (found / "training.json").is_file()
    for name, value in run.clt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not full.exists() and not list(tmp_path.rglob("half"))


def test_where_there_is_no_room_at_all_the_clt_is_still_in_memory(
    model, tokens, make_config, tmp_path: Path, monkeypatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runner.native, "save", full)
    monkeypatch.setattr(runner.tempfile, "gettempdir", lambda: str(tmp_path))
    run = CLTTrainingRunner(make_config(output_path=str(tmp_path / "clt")), model=model, dataset=tokens)
    with pytest.raises(NotWritten, match="Nor could it be written .*No space left.* is runner.clt: runner.clt"):
        run.run()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    run.clt.save_pretrained(tmp_path / "clt")
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "clt").cfg == run.clt.cfg


# -- data of which little can be learned, and devices that are not there


def test_outputs_that_do_not_vary_are_warned_of(make_config, tokens) -> None:
    silent = tiny_model()
    silent.blocks[1].mlp.W_out.data.zero_()
    silent.blocks[1].mlp.b_out.data.fill_(0.5)
    with pytest.warns(TrainingWarning, match="The output of layers 1 is the same at every token .* Give more varied"):
        CLTTrainingRunner(make_config(training_tokens=64 * 3), model=silent, dataset=tokens).run()


def test_a_text_that_is_read_many_times_is_warned_of_once(model, make_config, tokens) -> None:
    with pytest.warns(TrainingWarning, match=r"The dataset is read about \d+ times for 5120 training_tokens") as caught:
        CLTTrainingRunner(make_config(training_tokens=64 * 80), model=model, dataset=tokens[:30]).run()
    assert len([warning for warning in caught if warning.category is TrainingWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        CLTTrainingRunner(make_config(), model=model, dataset=tokens).run()


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:99", "meta", "xpu", "cpu:x"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(model, make_config, tokens, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ConfigError, match=f"device is '{device}', which is not here: give one of cpu"):
        CLTTrainingRunner(make_config(device=device), model=model, dataset=tokens)
