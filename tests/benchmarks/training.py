"""How fast a CLT trains: `python -m tests.benchmarks.training` prints a table. Not collected by pytest.

A full step is forward, losses, backward, clipping by the global norm, and Adam. Ours runs through `fit` of SAELens's
trainer on synthetic activations; beside it run the steps of `plain_steps`. Every case has a process of its own, so
that its peak memory is its own. Pin the cores where others use the machine (`taskset -c 0,1`).

The floor is what the matrix products of a dense step take at the measured rate of one large product: 6 FLOPs per
weight and token (2 forward, 4 backward). A sparse step does less than that, so its share can exceed 100%.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from io import StringIO
from itertools import pairwise
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.benchmarks.plain_steps import LR, SPARSITY, PlainCLT, plain_step

K = 32
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What is trained."""

    n_layers: int
    d_model: int
    d_transcoder: int
    batch: int

    @property
    def n_weights(self) -> int:
        """Of encoders and decoders."""
        return self.d_transcoder * self.d_model * (self.n_layers + self.n_layers * (self.n_layers + 1) // 2)

    @property
    def dense_flops(self) -> float:
        """6 per weight and token."""
        return 6.0 * self.n_weights * self.batch


SIZES = {
    "cpu": Size(n_layers=6, d_model=512, d_transcoder=4096, batch=1024),
    "cuda": Size(n_layers=12, d_model=768, d_transcoder=16384, batch=4096),
}


def synthetic_batch(size: Size, device: str) -> Tensor:
    """Inputs and outputs [batch, 2, n_layers, d_model] of norm about sqrt(d_model), as after scaling."""
    torch.manual_seed(0)
    return torch.randn(size.batch, 2, size.n_layers, size.d_model, device=device)


def plain(size: Size, device: str, n_steps: int, topk: bool) -> list[float]:
    """Seconds of each step in plain torch."""
    batch = synthetic_batch(size, device)
    clt = PlainCLT(size.n_layers, size.d_model, size.d_transcoder, device)
    step = plain_step(clt, partial(clt.topk_loss, k=K) if topk else clt.dense_loss, batch)
    return [_seconds(step, device) for _ in range(n_steps)]


def ours(size: Size, device: str, n_steps: int, topk: bool) -> list[float]:
    """Seconds of each step of the trainer's `fit`, from one request of a batch to the next."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from tl_clt.training.init import init_encoder_biases
    from tl_clt.training.training_clt import TrainingCLT, TrainingCLTConfig

    batch = synthetic_batch(size, device)
    clt = TrainingCLT(
        TrainingCLTConfig(
            d_in=size.d_model,
            d_sae=size.n_layers * size.d_transcoder,
            device=device,
            n_layers=size.n_layers,
            d_transcoder=size.d_transcoder,
            activation="topk" if topk else "jumprelu",
            k=K if topk else None,
            sparsity_coefficient=SPARSITY,
            dead_feature_coefficient=0.0,
        )
    )
    init_encoder_biases(clt, batch[:, 0])
    requests: list[float] = []

    def provider() -> Iterator[Tensor]:
        while True:
            _synchronize(device)
            requests.append(time.perf_counter())
            yield batch

    cfg = SAETrainerConfig(
        total_training_samples=n_steps * size.batch,
        train_batch_size_samples=size.batch,
        lr=LR,
        lr_end=LR,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        device=device,
        autocast=False,
        dead_feature_window=1000,
        n_checkpoints=0,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with redirect_stderr(StringIO()):  # its progress bar
        SAETrainer(cfg=cfg, sae=clt, data_provider=provider()).fit()
    _synchronize(device)
    requests.append(time.perf_counter())
    return [after - before for before, after in pairwise(requests)]


CASES: dict[str, Callable[[Size, str, int], list[float]]] = {
    "dense JumpReLU + tanh, plain torch": partial(plain, topk=False),
    "dense JumpReLU + tanh, ours": partial(ours, topk=False),
    f"TopK k={K}, plain torch": partial(plain, topk=True),
    f"TopK k={K}, ours": partial(ours, topk=True),
}


@dataclass(frozen=True)
class Result:
    """One case's figures."""

    seconds: float
    """Of a step: the median after the first one, which allocates."""

    peak: float
    """Bytes: on the CPU of the whole process, imports included; on a GPU of tensors."""


def run_case(name: str, device: str, n_steps: int) -> Result:
    """A case in this process."""
    seconds = CASES[name](SIZES[device], device, n_steps + 1)[1:]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident()
    return Result(statistics.median(seconds), peak)


def matmul_rate(device: str, repeats: int = 5) -> float:
    """FLOP/s of a float32 product [n, n] @ [n, n]: 2048 on the CPU, 8192 on a GPU. The best of some."""
    n = 2048 if device == "cpu" else 8192
    a, b, out = (torch.randn(n, n, device=device) for _ in range(3))
    step = partial(torch.mm, a, b, out=out)
    _seconds(step, device)
    return 2 * n**3 / min(_seconds(step, device) for _ in range(repeats))


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda; each has a size of its own.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps measured, after one that is not.")] = 4,
    only: Annotated[str, typer.Option(help="Run the cases whose names contain this.")] = "",
    case: Annotated[str, typer.Option(help="Used by the benchmark itself: print one case as JSON.")] = "",
) -> None:
    """Time full training steps, ours beside plain torch."""
    torch.set_num_threads(threads)
    if case:
        print(json.dumps(asdict(run_case(case, device, steps))))
        return
    size, rate = SIZES[device], matmul_rate(device)
    floor = size.dense_flops / rate
    place = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} threads"
    title = (
        f"{size.n_layers} layers, d_model {size.d_model}, {size.d_transcoder} features per layer, batch {size.batch},"
        f" float32\n{place}, torch {torch.__version__}, sae-lens {version('sae-lens')}\n"
        f"matrix products {rate / 1e9:,.0f} GFLOP/s, so the dense floor is {floor:.3f} s"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("full step", "s/step", "tokens/s", "floor / step", "peak GiB"):
        table.add_column(heading, justify="left" if heading == "full step" else "right")
    for name in (n for n in CASES if only in n):
        result = _in_own_process(name, device, threads, steps)
        table.add_row(
            name,
            f"{result.seconds:.3f}",
            f"{size.batch / result.seconds:,.0f}",
            f"{floor / result.seconds:.0%}",
            f"{result.peak / GIB:.2f}",
        )
    Console(width=120).print(table)


def _in_own_process(name: str, device: str, threads: int, steps: int) -> Result:
    options = ["--device", device, "--threads", str(threads), "--steps", str(steps), "--case", name]
    command = [sys.executable, "-m", "tests.benchmarks.training", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def _seconds(step: Callable[[], object], device: str) -> float:
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    typer.run(main)
