"""Whole runs on several processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.distributed import runs
from tests.training.distributed.processes import Processes
from tl_clt.transcoder import CrossLayerTranscoder

GRIDS = {"2 x 1": (2, 1), "1 x 2": (2, 2), "2 x 2": (4, 2)}
KINDS = {
    "relu": {"activation": "relu", "skip": True},
    "jumprelu": {"activation": "jumprelu", "target_l0": 3.0, "far_rank": 4},
    "topk": {"activation": "topk"},
    "batchtopk": {"activation": "batchtopk", "k": 3, "topk_across": "all_layers"},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_run_gives_the_clt_of_one_process(processes: Processes, kind: str, grid: str) -> None:
    n, n_data_parallel = GRIDS[grid]
    want = runs.run(KINDS[kind])
    main, *others = processes.run(n, runs.run, KINDS[kind] | {"n_data_parallel": n_data_parallel})
    assert main["weights"].keys() == want["weights"].keys()
    for name, value in want["weights"].items():
        np.testing.assert_allclose(main["weights"][name], value, rtol=1e-7, atol=1e-9, err_msg=name)
    assert main["seen"] == want["seen"] == [10, 12]
    split_features = n > n_data_parallel
    assert all(other["device"] == "meta" for other in others if split_features)
    for result in (main, *others):
        for name, value in want["metrics"].items():
            got = result["metrics"][name]
            assert got is value if value is None else got == pytest.approx(value, rel=1e-7), name
    assert all(other["seen"] == [] for other in others)


def test_copies_in_bfloat16_end_with_the_same_weights(processes: Processes) -> None:
    main, other = processes.run(2, runs.run, {"dtype": "bfloat16", "n_data_parallel": 2})
    assert other["device"] == "cpu"
    for name, value in main["weights"].items():
        assert np.array_equal(other["weights"][name], value), name


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_checkpoints_are_taken_up_on_another_number_of_processes(
    processes: Processes, tmp_path: Path, kind: str
) -> None:
    often = {"checkpoint_every": 5, "keep_checkpoints": 3}
    with_checkpoints = KINDS[kind] | often | {"training_tokens": 64 * 12 + 32}
    for made_on, (n, n_data_parallel) in {"1 x 1": (1, 1), "4 x 1": (4, 1), "2 x 2": (4, 2)}.items():
        folder = tmp_path / made_on
        changes = with_checkpoints | {"checkpoint_path": str(folder), "n_data_parallel": n_data_parallel}
        want = processes.run(n, runs.run, changes)[0]
        newest = str(folder / "step_00000005")
        for n, n_data_parallel in [(1, 1), (2, 1), (4, 2)]:
            changes = with_checkpoints | {"n_data_parallel": n_data_parallel}
            got = processes.run(n, runs.run, changes, newest)[0]
            assert got["seen"] == [10, 13]
            for name, value in want["weights"].items():
                np.testing.assert_allclose(got["weights"][name], value, rtol=1e-7, atol=1e-9, err_msg=name)


def test_resuming_on_the_same_processes_gives_the_same_weights_to_the_bit(processes: Processes, tmp_path: Path) -> None:
    changes = KINDS["topk"] | {"n_data_parallel": 2, "checkpoint_every": 5, "keep_checkpoints": 3}
    want = processes.run(4, runs.run, changes | {"checkpoint_path": str(tmp_path / "checkpoints")})[0]
    got = processes.run(4, runs.run, changes, str(tmp_path / "checkpoints" / "step_00000005"))[0]
    for name, value in want["weights"].items():
        assert np.array_equal(got["weights"][name], value), name


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_a_run_that_begins_with_a_clt_is_that_of_one_process(processes: Processes, tmp_path: Path, kind: str) -> None:
    first, changes = str(tmp_path / "first"), KINDS[kind] | {"far_rank": None}
    processes.run(1, runs.run, changes | {"output_path": first})
    want = processes.run(1, runs.run, changes | {"init_from": first})[0]
    got = processes.run(4, runs.run, changes | {"init_from": first, "n_data_parallel": 2})[0]
    for name, value in want["weights"].items():
        np.testing.assert_allclose(got["weights"][name], value, rtol=1e-7, atol=1e-9, err_msg=name)


def test_errors_of_the_main_process_are_raised_on_all(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    messages = processes.run(2, runs.refused, {"output_path": str(tmp_path)})
    assert messages[0] == messages[1] and messages[0].startswith("OutputNotEmpty")
    messages = processes.run(2, runs.refused, {"input_hook": "hook_resid_midd"})
    assert messages[0] == messages[1] and messages[0].startswith("HookNotFound")
    messages = processes.run(2, runs.refused, {"d_transcoder": 7})
    assert messages[0] == messages[1] and "2 processes cannot share equally" in messages[0]


def test_a_damaged_table_of_progress_is_told_on_all(processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    changes = {"checkpoint_path": str(folder), "checkpoint_every": 6}
    processes.run(1, runs.run, changes)
    (folder / "progress.csv").write_text("nonsense\n")
    messages = processes.run(2, runs.refused, changes, str(folder / "step_00000006"))
    assert messages[0] == messages[1] and messages[0].startswith("CheckpointError")
    assert "no table of a run's progress" in messages[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_loss_that_is_not_finite_stops_all_processes_alike(processes: Processes, tmp_path: Path, grid: str) -> None:
    n, n_data_parallel = GRIDS[grid]
    written = {"output_path": str(tmp_path / "clt"), "checkpoint_path": str(tmp_path / "steps"), "checkpoint_every": 6}
    changes = written | {"lr": 1e300, "n_data_parallel": n_data_parallel, "dtype": "float32"}
    messages = processes.run(n, runs.refused, changes)
    assert len(set(messages)) == 1 and messages[0].startswith("NotFinite: Training stopped at step")
    assert "Lower lr (now 1e+300)" in messages[0] and not list(tmp_path.iterdir())


def test_torchrun_trains_a_clt_and_only_the_main_process_speaks(tmp_path: Path) -> None:
    output = tmp_path / "clt"
    text = tmp_path / "text.txt"
    text.write_text("the capital of the state containing dallas is austin .\n" * 200)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "tl_clt.cli", "train", "--model", "atlas", "--dataset", str(text)]
    command += ["--output", str(output), "--d-transcoder", "16", "--activation", "topk", "--k", "4"]
    command += ["--training-tokens", "512", "--batch-size", "128"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Memory: about") == done.stdout.count("CLT written to") == 1
    assert "Training SAE" not in done.stderr and done.stdout.count("Training took") == 1
    assert sum(line.lstrip().startswith("4/4 ") for line in done.stdout.splitlines()) == 1
    clt = CrossLayerTranscoder.from_pretrained(output)
    assert clt.cfg.d_transcoder == 16 and clt.W_enc.isfinite().all()
    assert json.loads((output / "training.json").read_text())["tokens_seen"] == 512
