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
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "topk": {"activation": "topk"},
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
    assert main["seen"] == want["seen"] == [10]
    split_features = n > n_data_parallel
    assert all(other["device"] == "meta" for other in others if split_features)
    for result in (main, *others):
        for name, value in want["metrics"].items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-7), name
    assert all(other["seen"] == [] for other in others)


def test_errors_of_the_main_process_are_raised_on_all(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    messages = processes.run(2, runs.refused, {"output_path": str(tmp_path)})
    assert messages[0] == messages[1] and messages[0].startswith("OutputNotEmpty")
    messages = processes.run(2, runs.refused, {"input_hook": "hook_resid_midd"})
    assert messages[0] == messages[1] and messages[0].startswith("HookNotFound")
    messages = processes.run(2, runs.refused, {"d_transcoder": 7})
    assert messages[0] == messages[1] and "2 processes cannot share equally" in messages[0]


def test_torchrun_trains_a_clt_and_only_the_main_process_speaks(tmp_path: Path) -> None:
    output = tmp_path / "clt"
    text = tmp_path / "text.txt"
    text.write_text("the capital of the state containing dallas is austin .\n" * 200)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "tl_clt.cli", "train", "--model", "atlas", "--dataset", str(text)]
    command += ["--output", str(output), "--d-transcoder", "16", "--activation", "topk", "--k", "4"]
    command += ["--training-tokens", "512", "--batch-size", "128"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Memory: about") == done.stdout.count("CLT written to") == 1
    assert done.stderr.count("Training SAE") >= 1
    clt = CrossLayerTranscoder.from_pretrained(output)
    assert clt.cfg.d_transcoder == 16 and clt.W_enc.isfinite().all()
    assert json.loads((output / "training.json").read_text())["tokens_seen"] == 512
