"""A run that is killed and resumed ends as one that was not; what is damaged or of another run is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import small_disk
from tests.training.conftest import tiny_model
from tl_clt.errors import CheckpointError, ConfigError, DatasetError, NotWritten, OutputNotEmpty, TrainingWarning
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig, TrainingProgress
from tl_clt.training.data.dataset import ROWS_IN_FINGERPRINT
from tl_clt.training.run import checkpoints, runner
from tl_clt.training.run.trainer import CLTTrainer
from tl_clt.transcoder import CrossLayerTranscoder

STEPS = 24


@pytest.fixture
def cfg(make_config, tmp_path: Path) -> CLTTrainingRunnerConfig:
    return make_config(
        activation="jumprelu",
        training_tokens=64 * STEPS,
        checkpoint_path=str(tmp_path / "checkpoints"),
        checkpoint_every=5,
        log_every=1,
        lr_warm_up_steps=4,
        lr_decay_steps=8,
        lr_scheduler_name="cosineannealing",
        sparsity_coefficient=0.1,
        dead_feature_coefficient=1e-3,
    )


ENDS: dict[CLTTrainingRunnerConfig, CLTTrainingRunner] = {}


def uninterrupted(cfg, model, tokens) -> CLTTrainingRunner:
    """A run that was not stopped, with its CLT in `result`. Each config is run once for all tests."""
    cfg = replace(cfg, checkpoint_path=None)
    if cfg not in ENDS:
        ENDS[cfg] = CLTTrainingRunner(cfg, model=model, dataset=tokens)
        ENDS[cfg].result = ENDS[cfg].run()
    return ENDS[cfg]


def stop_at(step: int) -> Callable[[TrainingProgress], None]:
    def stop(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


def interrupted(cfg, model, tokens, at: int) -> Path:
    with pytest.raises(KeyboardInterrupt):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=stop_at(at)).run()
    return Path(cfg.checkpoint_path)


def assert_same(run: CLTTrainingRunner, clt: CrossLayerTranscoder, expected: CLTTrainingRunner) -> None:
    for name, value in expected.result.state_dict().items():
        assert torch.equal(clt.state_dict()[name], value), name
    assert run.record.metrics == expected.record.metrics
    assert run.record.data == expected.record.data
    assert run.record.tokens_seen == expected.record.tokens_seen == expected.cfg.training_tokens


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]


@pytest.mark.parametrize("at", [5, 6, 14, 21, 23])
def test_resumed_run_ends_with_the_same_weights_to_the_bit(cfg, model, tokens, at: int) -> None:
    expected = uninterrupted(cfg, model, tokens)
    folder = interrupted(cfg, model, tokens, at)
    assert steps_in(folder)[-1] == at // 5 * 5
    torch.rand(7)
    told: list[TrainingProgress] = []
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=told.append)
    clt = run.run(resume=folder)
    assert_same(run, clt, expected)
    assert [p.step for p in told] == list(range(at // 5 * 5 + 1, STEPS + 1))
    assert told[0].tokens == 64 * told[0].step
    assert run.record.seconds >= 0


NO_LAMBDA = {"sparsity_coefficient": 1.0, "dead_feature_coefficient": 3e-6}
"""As they are where they have no part."""

VARIANTS = {
    "topk": {"activation": "topk", "k": 6, **NO_LAMBDA},
    "relu": {"activation": "relu"},
    "bfloat16 weights, rounded at random": {"dtype": "bfloat16"},
    "autocast": {"autocast": True},
    "float64": {"dtype": "float64"},
    "short last batch": {"training_tokens": 64 * STEPS - 17},
    "left-out tokens": {"seqpos_slice": (1, None), "exclude_special_tokens": (3, 4), "max_norm_ratio": 2.0},
    "all kept for mixing": {"activations_mixing_fraction": 1.0},
    "no prefetch": {"prefetch": False},
    "batchtopk over layers, annealed, AuxK, low rank, skip": {
        **NO_LAMBDA,
        **{"activation": "batchtopk", "k": 3, "k_start": 8, "k_anneal_steps": 20, "topk_across": "all_layers"},
        **{"auxk_coefficient": 0.1, "dead_feature_window": 8, "far_rank": 2, "skip": True},
    },
    "target L0": {"target_l0": 3.0},
    "warm restarts": {"lr_scheduler_name": "cosineannealingwarmrestarts"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_run_resumes_to_the_bit_twice(cfg, model, tokens, name: str) -> None:
    cfg = replace(cfg, **VARIANTS[name])
    expected = uninterrupted(cfg, model, tokens)
    folder = interrupted(cfg, model, tokens, 7)
    with pytest.raises(KeyboardInterrupt):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=stop_at(18)).run(resume=folder)
    assert steps_in(folder) == [10, 15]
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    assert_same(run, run.run(resume=folder), expected)


def test_text_and_cache_resume_to_the_bit(cfg, model_with_tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = ["red", "green", "blue", "cat", "dog", "sees", "eats", "the", "a", "."]
    text.write_text("\n".join(" ".join(words[(i * j) % 10] for j in range(1, 4 + i % 9)) for i in range(90)))
    cfg = replace(cfg, cache_path=str(tmp_path / "cache"), cache_dtype="int8", max_norm_ratio=4.0)
    folder = interrupted(cfg, model_with_tokenizer, text, 13)
    expected = uninterrupted(cfg, model_with_tokenizer, text)
    run = CLTTrainingRunner(cfg, model=model_with_tokenizer, dataset=text)
    assert_same(run, run.run(resume=folder), expected)


def test_prefetch_changes_nothing(cfg, model, tokens) -> None:
    one, other = (uninterrupted(replace(cfg, prefetch=prefetch), model, tokens) for prefetch in (True, False))
    assert_same(one, one.result, other)


def test_killed_process_resumes_to_the_bit(cfg, tokens, tmp_path: Path) -> None:
    """SIGKILL at a moment of chance: while a step, a checkpoint or a removal is going on."""
    cfg = replace(cfg, training_tokens=64 * 4000, checkpoint_every=3)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg.to_dict()))
    torch.save(tokens, tmp_path / "tokens.pt")
    script = (
        "import json, sys, torch; from tests.training.conftest import tiny_model;"
        "from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig; torch.set_num_threads(1);"
        "folder = sys.argv[1]; cfg = CLTTrainingRunnerConfig.from_dict(json.load(open(folder + '/cfg.json')));"
        "CLTTrainingRunner(cfg, model=tiny_model(), dataset=torch.load(folder + '/tokens.pt')).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.DEVNULL)
    folder = Path(cfg.checkpoint_path)
    try:
        while process.poll() is None and (not folder.is_dir() or max([0, *good_steps(folder)]) < 30):
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    step = max(good_steps(folder))
    # The course of training must be that of the long run: stop a resumed one and a fresh one at the same step.
    model, folders = tiny_model(), [tmp_path / "resumed", tmp_path / "fresh"]
    stop, ends = stop_at(step + 4), []
    for fresh, checkpoint_path in zip((False, True), folders, strict=True):
        again = replace(cfg, checkpoint_path=str(checkpoint_path), checkpoint_every=step + 3)
        with pytest.raises(KeyboardInterrupt):
            CLTTrainingRunner(again, model=model, dataset=tokens, on_progress=stop).run(None if fresh else folder)
        ends.append(checkpoints.read_checkpoint(checkpoints.find(checkpoint_path), "cpu"))
    resumed, fresh_one = ends
    assert resumed.values == fresh_one.values
    for group, tensors in fresh_one.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(resumed.tensors[group][name], value), (group, name)


def good_steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in folder.glob("step_*") if (path / "checkpoint.json").is_file()]


def test_the_last_checkpoints_are_kept_and_nothing_else(cfg, model, tokens) -> None:
    CLTTrainingRunner(replace(cfg, keep_checkpoints=3), model=model, dataset=tokens).run()
    assert steps_in(Path(cfg.checkpoint_path)) == [15, 20, 24]


def test_weights_and_moments_are_plain_files_by_parameter(cfg, model, tokens) -> None:
    folder = interrupted(cfg, model, tokens, 12) / "step_00000010"
    weights = load_file(folder / "weights.safetensors")
    assert {"b_dec", "W_enc.0", "W_dec.2"} <= set(weights)
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = load_file(folder / f"{moment}.safetensors")
        assert {name: value.shape for name, value in moments.items()} == {n: w.shape for n, w in weights.items()}
    assert all(counts.shape[-1] == 3 * 24 for counts in load_file(folder / "feature_counts.safetensors").values())
    # The buffer's activations are made again, so they take no space.
    assert set(load_file(folder / "data.safetensors")) == {"ids", "generator"}


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), r"has \d+ bytes of \d+"),
        ("exp_avg_sq.safetensors", lambda path: path.unlink(), "exp_avg_sq.safetensors is missing"),
        ("state.json", lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"2", 1)), "the checksum"),
        ("checkpoint.json", lambda path: path.write_text("{"), "checkpoint.json cannot be read"),
        ("checkpoint.json", lambda path: path.unlink(), "checkpoint.json cannot be read"),
        ("checkpoint.json", lambda path: path.write_text('{"format": 9, "step": 10}'), "is of format 9"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name_and_the_newest_good_one_is_offered(
    cfg, model, tokens, file: str, damage: Callable, message: str
) -> None:
    folder = interrupted(replace(cfg, keep_checkpoints=9), model, tokens, 16)
    damage(folder / "step_00000015" / file)
    for given in (folder, folder / "step_00000015"):
        with pytest.raises(CheckpointError, match=f"step_00000015' is damaged: .*{message}") as caught:
            CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=given)
        assert f"The newest good one is '{folder / 'step_00000010'}'" in str(caught.value)
    run = CLTTrainingRunner(replace(cfg, keep_checkpoints=3), model=model, dataset=tokens)
    clt = run.run(resume=folder / "step_00000010")
    assert_same(run, clt, uninterrupted(cfg, model, tokens))
    assert steps_in(folder) == [15, 20, 24]  # the damaged one was made again
    assert checkpoints.find(folder / "step_00000015").step == 15


@pytest.mark.parametrize("key", ["config", "seconds", "model_fingerprint", "wandb_run_id", "step", "format", "files"])
def test_a_manifest_that_lacks_something_is_damaged(cfg, model, tokens, key: str) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    path = folder / "step_00000005" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    for damaged in ({k: v for k, v in manifest.items() if k != key}, {**manifest, key: [1]}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="step_00000005' is damaged"):
            CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=folder)


def test_without_a_good_checkpoint_that_is_said(cfg, model, tokens, tmp_path: Path) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    (folder / "step_00000005" / "random.safetensors").unlink()
    with pytest.raises(CheckpointError, match="There is no other good one: start anew"):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=folder)
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="holds no checkpoint .* Give the run's checkpoint_path"):
            CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=nothing)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 0.5}, "lr"),
        ({"training_tokens": 64 * 20}, "training_tokens"),
        ({"seed": 7}, "seed"),
        ({"d_transcoder": 25}, "d_transcoder"),
        ({"exclude_special_tokens": (3,)}, "exclude_special_tokens"),
        ({"cache_path": "somewhere"}, "cache_dtype"),
    ],
)
def test_another_config_is_refused_by_field(cfg, model, tokens, changes: dict, field: str) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    with pytest.raises(CheckpointError, match=f"was made with {field}=.*, but this run has {field}="):
        CLTTrainingRunner(replace(cfg, **changes), model=model, dataset=tokens).run(resume=folder)


def test_what_changes_no_step_may_differ(cfg, model, tokens, tmp_path: Path) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    changed = replace(
        cfg, model_name="moved", checkpoint_path=str(tmp_path / "elsewhere"), prefetch=False, checkpoint_every=9
    )
    run = CLTTrainingRunner(changed, model=model, dataset=tokens)
    assert_same(run, run.run(resume=folder), uninterrupted(cfg, model, tokens))
    assert steps_in(tmp_path / "elsewhere") == [18, 24] and steps_in(folder) == [5]


def test_another_model_or_dataset_is_refused(cfg, model, tokens) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    changed = tiny_model()
    changed.blocks[2].mlp.W_in.data[0, 0] += 1
    with pytest.raises(CheckpointError, match="was made with another model"):
        CLTTrainingRunner(cfg, model=changed, dataset=tokens).run(resume=folder)
    for other in (tokens.flip(0), torch.cat([tokens, tokens[:1]])):
        with pytest.raises(CheckpointError, match="was made with another text"):
            CLTTrainingRunner(cfg, model=model, dataset=other).run(resume=folder)
    same_first_rows = torch.cat([tokens[:ROWS_IN_FINGERPRINT], tokens[ROWS_IN_FINGERPRINT:].flip(0)])
    with pytest.raises(DatasetError, match="other tokens than the run that is to be resumed"):
        CLTTrainingRunner(cfg, model=model, dataset=same_first_rows).run(resume=folder)
    assert steps_in(folder) == [5]


def test_checkpoint_folder_of_another_run_is_not_written_to(cfg, model, tokens, tmp_path: Path) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    with pytest.raises(OutputNotEmpty):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(OutputNotEmpty):
        elsewhere = replace(cfg, checkpoint_path=str(tmp_path / "full"))
        CLTTrainingRunner(elsewhere, model=model, dataset=tokens).run(resume=folder)


def test_full_disk_leaves_the_earlier_checkpoint_good(cfg, model, tokens) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    before = sorted(folder.rglob("*"))
    with (
        small_disk(),
        pytest.raises(NotWritten, match="step_00000010' could not be written .* Earlier checkpoints stay good"),
    ):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=folder)
    assert sorted(folder.rglob("*")) == before
    assert checkpoints.find(folder).step == 5


@pytest.mark.parametrize("during", ["save_file", "_flush", "_size_and_sha256"])
def test_a_run_stopped_while_a_checkpoint_is_written_keeps_the_earlier_one(
    cfg, model, tokens, monkeypatch, during: str
) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    real, calls = getattr(checkpoints, during), []

    def stopped(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3 + 9 * (during == "_size_and_sha256"):  # reading the first checkpoint takes eight
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, during, stopped)
        with pytest.raises(KeyboardInterrupt):
            CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["progress.csv", "step_00000005"]
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    assert_same(run, run.run(resume=folder), uninterrupted(cfg, model, tokens))


class Courses(CLTTrainer):
    """Notes the learning rate and lambda of each step."""

    seen: list[tuple[float, float]]

    def _train_step(self, sae, sae_in):
        self.seen.append((self.optimizer.param_groups[0]["lr"], self.get_coefficients()["sparsity"]))
        return super()._train_step(sae, sae_in)


@pytest.mark.parametrize("stopped_at", [None, 12])
@pytest.mark.parametrize("scheduler", ["cosineannealing", "constant"])
def test_a_run_goes_on_with_more_tokens_on_the_schedules_of_its_new_length(
    cfg, model, tokens, monkeypatch, scheduler: str, stopped_at: int | None
) -> None:
    monkeypatch.setattr(runner, "CLTTrainer", Courses)
    cfg = replace(cfg, lr_scheduler_name=scheduler)
    longer = replace(cfg, training_tokens=64 * 40)
    Courses.seen = whole = []
    CLTTrainingRunner(replace(longer, checkpoint_path=None), model=model, dataset=tokens).run()
    Courses.seen = []
    if stopped_at is None:
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
        start = STEPS
    else:
        interrupted(cfg, model, tokens, stopped_at)
        start = 10
    Courses.seen = rest = []
    run = CLTTrainingRunner(longer, model=model, dataset=tokens)
    run.run(resume=cfg.checkpoint_path)
    assert run.record.tokens_seen == 64 * 40 and len(rest) == 40 - start
    # The course of a cosine is computed from step to step, and rounds.
    for now, expected in zip(rest, whole[start:], strict=True):
        assert now == pytest.approx(expected, rel=1e-9)
    assert steps_in(Path(cfg.checkpoint_path)) == [35, 40]


def test_a_lengthened_run_resumes_to_the_bit(cfg, model, tokens) -> None:
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    longer = replace(cfg, training_tokens=64 * 40 - 5, keep_checkpoints=5)
    expected = CLTTrainingRunner(longer, model=model, dataset=tokens)
    expected.result = expected.run(resume=cfg.checkpoint_path)
    run = CLTTrainingRunner(longer, model=model, dataset=tokens)
    assert_same(run, run.run(resume=Path(cfg.checkpoint_path) / "step_00000030"), expected)
    with pytest.raises(
        CheckpointError, match="training_tokens=2555, but .* training_tokens=1536: give the same or more"
    ):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=cfg.checkpoint_path)


def test_a_run_that_ended_on_a_short_batch_goes_on_longer_for_as_many_steps_as_it_says(cfg, model, tokens) -> None:
    cfg = replace(cfg, training_tokens=64 * STEPS - 17)
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    told: list[TrainingProgress] = []
    run = CLTTrainingRunner(replace(cfg, training_tokens=64 * 30), model=model, dataset=tokens, on_progress=told.append)
    run.run(resume=cfg.checkpoint_path)
    assert [line.step for line in told] == list(range(STEPS + 1, 32)) and {line.n_steps for line in told} == {31}
    assert [line.tokens for line in told][-2:] == [64 * 30 - 17, 64 * 30] and told[-1].seconds_left == 0


def test_the_checkpoint_of_the_end_gives_the_same_clt_without_a_step(cfg, model, tokens) -> None:
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    told: list[TrainingProgress] = []
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=told.append)
    assert_same(run, run.run(resume=cfg.checkpoint_path), uninterrupted(cfg, model, tokens))
    assert told == []


def test_a_last_checkpoint_that_cannot_be_written_is_warned_of_and_the_clt_is_kept(
    cfg, model, tokens, tmp_path: Path, monkeypatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "save_file", full)
    cfg = replace(cfg, checkpoint_every=99, output_path=str(tmp_path / "clt"))
    with pytest.warns(TrainingWarning, match="without its last checkpoint.*no space left"):
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "clt").cfg.d_transcoder == 24
    assert steps_in(Path(cfg.checkpoint_path)) == []


@pytest.fixture
def handler() -> Iterator[None]:
    """Ctrl-C as Python has it: runs started in the background of a shell leave it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_at(step: int) -> Callable[[TrainingProgress], None]:
    return lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.step == step else None


@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize("at", [7, 9])
def test_ctrl_c_ends_the_step_and_writes_a_checkpoint(cfg, model, tokens, at: int) -> None:
    """It is pressed before step 8, or before step 10, at which there is a checkpoint anyway."""
    stopped = CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=press_at(at))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    folder = Path(cfg.checkpoint_path)
    assert steps_in(folder) == [5, at + 1]
    # The step that it falls into has its line: what goes on from there does not make it again.
    assert [line.step for line in stopped.progress] == list(range(1, at + 2))
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    assert_same(run, run.run(resume=folder), uninterrupted(cfg, model, tokens))
    assert [line.step for line in run.progress] == list(range(1, STEPS + 1))


@pytest.mark.usefixtures("handler")
def test_without_checkpoints_ctrl_c_is_heeded_at_once(cfg, model, tokens) -> None:
    told: list[int] = []

    def press(progress: TrainingProgress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        told.append(progress.step)

    with pytest.raises(KeyboardInterrupt):
        CLTTrainingRunner(replace(cfg, checkpoint_path=None), model=model, dataset=tokens, on_progress=press).run()
    assert told == []


@pytest.mark.usefixtures("handler")
def test_a_second_ctrl_c_while_a_checkpoint_is_written_leaves_none_of_it(cfg, model, tokens, monkeypatch) -> None:
    real, calls = checkpoints._flush, []

    def press(path: Path) -> None:
        if ".step_00000008." in str(path):
            calls.append(path)
            os.kill(os.getpid(), signal.SIGINT)
        real(path)

    monkeypatch.setattr(checkpoints, "_flush", press)
    monkeypatch.setattr(checkpoints, "SAME_PRESS_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=press_at(7)).run()
    folder = Path(cfg.checkpoint_path)
    assert len(calls) == 1 and sorted(path.name for path in folder.iterdir()) == ["progress.csv", "step_00000005"]
    assert checkpoints.find(folder).step == 5


def test_leftovers_of_a_killed_run_are_removed_on_resuming(cfg, model, tokens) -> None:
    folder = interrupted(cfg, model, tokens, 6)
    (folder / ".step_00000010.abc").mkdir()
    (folder / ".step_00000010.abc" / "weights.safetensors").write_bytes(b"half")
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=folder)
    assert steps_in(folder) == [20, 24]


def test_wandb_run_goes_on(cfg, model, tokens, monkeypatch) -> None:
    class Run:
        id = "abc123"

        def __enter__(self) -> None:
            monkeypatch.setattr(checkpoints.wandb, "run", self)

        def __exit__(self, *_: object) -> None:
            monkeypatch.setattr(checkpoints.wandb, "run", None)

    asked: list[dict] = []
    monkeypatch.setattr("wandb.init", lambda **options: (asked.append(options), Run())[1])
    monkeypatch.setattr("wandb.log", lambda *_, **__: None)
    cfg = replace(cfg, log_to_wandb=True, wandb_log_frequency=1)
    folder = interrupted(cfg, model, tokens, 6)
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run(resume=folder)
    assert [(options["id"], options["resume"]) for options in asked] == [(None, None), ("abc123", "must")]


def test_without_an_account_at_wandb_the_mend_is_told_and_nothing_is_written(cfg, model, tokens, monkeypatch) -> None:
    def refuse(**options: object) -> None:
        raise checkpoints.wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(ConfigError, match="No API key configured.. Log in with `wandb login`, set WANDB_MODE=offline"):
        CLTTrainingRunner(replace(cfg, log_to_wandb=True), model=model, dataset=tokens).run()
    assert not Path(cfg.checkpoint_path).exists()


def test_what_a_config_chose_by_itself_is_as_it_was_when_a_run_goes_on_longer(
    model, tokens, make_config, tmp_path: Path
) -> None:
    given = {"activation": "topk", "checkpoint_path": str(tmp_path / "checkpoints"), "train_batch_size_tokens": None}
    short = make_config(**given, training_tokens=128 * 20)
    long = make_config(**given, training_tokens=128 * 40)
    assert short.lr_decay_steps != long.lr_decay_steps and "lr_decay_steps" in long.chosen
    CLTTrainingRunner(short, model=model, dataset=tokens).run()
    run = CLTTrainingRunner(long, model=model, dataset=tokens)
    run.run(resume=tmp_path / "checkpoints")
    assert run.record.tokens_seen == 128 * 40
    assert run.cfg.lr_decay_steps == short.lr_decay_steps and run.record.config["lr_decay_steps"] == 4
