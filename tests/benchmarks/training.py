"""How fast a CLT trains: `python -m tests.benchmarks.training` prints a table of steps, and
`python -m tests.benchmarks.training run --model atlas` one of a whole run beside its parts. Not collected by pytest.

A full step is forward, losses, backward, clipping by the global norm, and Adam. Ours runs through `fit` of SAELens's
trainer on synthetic activations; beside it run the steps of `plain_steps`. Every case has a process of its own, so
that its peak memory is its own. Pin the cores where others use the machine (`taskset -c 0,1`).

The floor is what the matrix products of a dense step take at the rate of one large product: 6 FLOPs per weight and
token (2 forward, 4 backward). A sparse step does less than that, so its share exceeds 100%. The rate is measured
between the steps of each case, because it changes where others use the machine.

A whole run is `CLTTrainingRunner.run` with the model on a thread of its own; beside it stand the same steps on
activations that are there already, and the model's forward passes alone. With one torch thread for each of the two
threads of a run, the slower part is what the run could come to. Processor time of the process, in which the parts add
up, tells what a run does besides, also where others use the machine.
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.benchmarks.plain_steps import LR, SPARSITY, PlainCLT, plain_step

K = 32
GIB = 2**30
WARM_UP = 3
NEVER_FIRES = 100.0
"""Subtracted from a feature's bias."""


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


class Clock:
    """Times steps, and one large matrix product before and after each."""

    def __init__(self, device: str) -> None:
        self.device = device
        n = 2048 if device == "cpu" else 8192
        self.flops = 2 * n**3
        self.a, self.b, self.out = (torch.randn(n, n, device=device) for _ in range(3))
        self.seconds: list[float] = []
        self.rates: list[float] = []
        self.started: float | None = None

    def tick(self) -> None:
        """A step has ended (or none has begun yet), and the next one begins."""
        now = self._now()
        if self.started is not None:
            self.seconds.append(now - self.started)
        torch.mm(self.a, self.b, out=self.out)
        before = self._now()
        torch.mm(self.a, self.b, out=self.out)
        self.started = self._now()
        self.rates.append(self.flops / (self.started - before))

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def plain(size: Size, clock: Clock, n_steps: int, topk: bool) -> None:
    """Steps in plain torch."""
    batch = synthetic_batch(size, clock.device)
    clt = PlainCLT(size.n_layers, size.d_model, size.d_transcoder, clock.device)
    step = plain_step(clt, partial(clt.topk_loss, k=K) if topk else clt.dense_loss, batch)
    for _ in range(n_steps):
        clock.tick()
        step()
    clock.tick()


def ours(
    size: Size,
    clock: Clock,
    n_steps: int,
    topk: bool,
    saelens: bool = False,
    autocast: bool = False,
    without: str | None = None,
    dead: float = 0.0,
    **changes: Any,
) -> None:
    """Steps of the trainer's `fit`, from one request of a batch to the next.

    Args:
        without: what of the fast step is replaced by plain torch: see `plain_parts`.
        dead: share of features that count as dead, and never fire, so that AuxK has work.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from tl_clt.training.clt import TrainingCLT, TrainingCLTConfig, init_encoder_biases
    from tl_clt.training.run.trainer import CLTTrainer

    batch = synthetic_batch(size, clock.device)
    values: dict[str, Any] = {
        "d_in": size.d_model,
        "d_sae": size.n_layers * size.d_transcoder,
        "device": clock.device,
        "n_layers": size.n_layers,
        "d_transcoder": size.d_transcoder,
        "activation": "topk" if topk else "jumprelu",
        "k": K if topk else None,
        "sparsity_coefficient": SPARSITY,
        "dead_feature_coefficient": 0.0,
    }
    clt = TrainingCLT(TrainingCLTConfig(**(values | changes)))
    init_encoder_biases(clt, batch[:, 0])
    is_dead = torch.rand(clt.cfg.d_sae, device=clock.device) < dead
    with torch.no_grad():
        for b_enc, silent in zip(clt.b_enc, is_dead.unflatten(0, (size.n_layers, -1)), strict=True):
            b_enc[silent] -= NEVER_FIRES

    def provider() -> Iterator[Tensor]:
        while True:
            clock.tick()
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
        device=clock.device,
        autocast=autocast,
        dead_feature_window=1000,
        n_checkpoints=0,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with redirect_stderr(StringIO()), ExitStack() as replaced:  # its progress bar goes nowhere
        trainer = (SAETrainer if saelens else CLTTrainer)(cfg=cfg, sae=clt, data_provider=provider())
        replaced.enter_context(mock.patch.object(type(trainer), "dead_neurons", is_dead))
        if without is not None:
            for holder, name, plain_part in plain_parts(trainer)[without]:
                replaced.enter_context(mock.patch.object(holder, name, plain_part))
        trainer.fit()
    clock.tick()


def plain_parts(trainer: Any) -> dict[str, list[tuple[Any, str, Any]]]:
    """Parts of the fast step, each with what plain torch has in its place: what holds it, its name there, and that."""
    from tl_clt.training.fast import step
    from tl_clt.training.losses import jumprelu, tanh_count
    from tl_clt.training.run import trainer as trainer_module

    zero_grad = trainer.optimizer.zero_grad

    def terms(h: Tensor, threshold: Tensor, norms: Tensor, options: Any, _: Tensor) -> Any:
        acts = jumprelu(h, threshold, options.bandwidth, options.straight_through)
        counts = tanh_count(acts, norms, options.tanh_scale)
        return step.Terms(acts, counts, h.new_zeros(()), acts.detach().count_nonzero(dim=0))

    return {
        "gradients in place": [
            (trainer_module, "set_gradients_aside", lambda weights: None),
            (trainer.optimizer, "zero_grad", lambda set_to_none: zero_grad(set_to_none=True)),
        ],
        "memory kept": [(step.FastStep, "take", lambda self, name, layer, shape, like: like.new_empty(shape))],
        "row norms": [(step, "row_norms", lambda W: W.norm(dim=1))],
        "terms in blocks": [(step, "terms_in_blocks", terms)],
    }


CASES: dict[str, Callable[[Size, Clock, int], None]] = {
    "dense JumpReLU + tanh, plain torch": partial(plain, topk=False),
    "dense JumpReLU + tanh, ours": partial(ours, topk=False),
    "  and dead-feature loss": partial(ours, topk=False, dead_feature_coefficient=3e-6),
    "  the definition on SAELens's own step": partial(ours, topk=False, saelens=True),
    "  in bfloat16 autocast": partial(ours, topk=False, autocast=True),
    "  without gradients in place": partial(ours, topk=False, without="gradients in place"),
    "  without memory kept": partial(ours, topk=False, without="memory kept"),
    "  without row norms": partial(ours, topk=False, without="row norms"),
    "  without terms in blocks": partial(ours, topk=False, without="terms in blocks"),
    f"TopK k={K}, plain torch": partial(plain, topk=True),
    f"TopK k={K}, ours": partial(ours, topk=True),
    "  TopK's definition on SAELens's own step": partial(ours, topk=True, saelens=True),
    "  TopK with AuxK, a fifth dead": partial(ours, topk=True, dead=0.2),
    "  TopK without gradients in place": partial(ours, topk=True, without="gradients in place"),
    "  TopK without row norms": partial(ours, topk=True, without="row norms"),
    f"BatchTopK k={K}, ours": partial(ours, topk=True, activation="batchtopk"),
    "  across layers": partial(ours, topk=True, activation="batchtopk", topk_across="all_layers"),
}


@dataclass(frozen=True)
class Result:
    """One case's figures: medians over the steps after the warm-up."""

    seconds: float
    """Of a step."""

    rate: float
    """FLOP/s of one large product, between the steps."""

    share: float
    """Of a step that its dense floor takes, at the rate of the same moment."""

    peak: float
    """Bytes: on the CPU of the whole process, imports included; on a GPU of tensors."""


def run_case(name: str, device: str, n_steps: int) -> Result:
    """A case in this process."""
    clock = Clock(device)
    CASES[name](SIZES[device], clock, n_steps + WARM_UP)
    seconds, rates = clock.seconds[WARM_UP:], [(a + b) / 2 for a, b in pairwise(clock.rates[WARM_UP:])]
    shares = [SIZES[device].dense_flops / rate / s for rate, s in zip(rates, seconds, strict=True)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident()
    return Result(statistics.median(seconds), statistics.median(rates), statistics.median(shares), peak)


app = typer.Typer(invoke_without_command=True)


@app.callback()
def steps_of_cases(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="cpu or cuda; each has a size of its own.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps measured, after three that are not.")] = 4,
    only: Annotated[str, typer.Option(help="Run the cases whose names contain this.")] = "",
    case: Annotated[str, typer.Option(help="Used by the benchmark itself: print one case as JSON.")] = "",
) -> None:
    """Time full training steps, ours beside plain torch."""
    if context.invoked_subcommand is not None:
        return
    torch.set_num_threads(threads)
    if case:
        print(json.dumps(asdict(run_case(case, device, steps))))
        return
    size = SIZES[device]
    place = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} threads"
    title = (
        f"{size.n_layers} layers, d_model {size.d_model}, {size.d_transcoder} features per layer, batch {size.batch},"
        f" float32; {size.dense_flops / 1e9:,.0f} GFLOP\n"
        f"{place}, torch {torch.__version__}, sae-lens {version('sae-lens')}"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("full step", "s/step", "tokens/s", "GFLOP/s of a product", "floor / step", "peak GiB"):
        table.add_column(heading, justify="left" if heading == "full step" else "right")
    for name in (n for n in CASES if only in n):
        result = _in_own_process(name, device, threads, steps)
        table.add_row(
            name,
            f"{result.seconds:.3f}",
            f"{size.batch / result.seconds:,.0f}",
            f"{result.rate / 1e9:,.0f}",
            f"{result.share:.0%}",
            f"{result.peak / GIB:.2f}",
        )
    Console(width=120).print(table)


def _in_own_process(name: str, device: str, threads: int, steps: int) -> Result:
    options = ["--device", device, "--threads", str(threads), "--steps", str(steps), "--case", name]
    command = [sys.executable, "-m", "tests.benchmarks.training", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Result(**json.loads(done.stdout.splitlines()[-1]))


# -- a whole run beside its parts


class Spent:
    """Seconds on the clock, and of the processor in all threads, since it was made; and of calls that it counts."""

    def __init__(self) -> None:
        self.began = (time.perf_counter(), time.process_time())
        self.in_calls = [0.0, 0.0]

    def so_far(self) -> list[float]:
        """Clock and processor."""
        return [time.perf_counter() - self.began[0], time.process_time() - self.began[1]]

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time is added to `in_calls`."""

        def timed(*args: Any, **options: Any) -> Any:
            before = self.so_far()
            result = call(*args, **options)
            self.in_calls = [a + now - b for a, now, b in zip(self.in_calls, self.so_far(), before, strict=True)]
            return result

        return timed


def random_llama(n_layers: int = 6, d_model: int = 256, n_ctx: int = 128) -> Any:
    """A Llama with random weights and 1,024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tl_clt import load_model

    cfg = LlamaConfig(
        vocab_size=1024,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        max_position_embeddings=n_ctx,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(cfg).save_pretrained(folder)
        return load_model(folder)


@app.command("run")
def whole_run(
    model: Annotated[str, typer.Option(help="What `load_model` takes, or random: a Llama of 6 layers.")] = "atlas",
    text: Annotated[Path | None, typer.Option(help="To train on; atlas and random have their own.")] = None,
    tokens: Annotated[int, typer.Option(help="To train on.")] = 50_000,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step; chosen by the run where left out.")] = None,
    d_transcoder: Annotated[int, typer.Option(help="Features per layer.")] = 1024,
    activation: Annotated[str, typer.Option(help="Of the features.")] = "topk",
    span: Annotated[int | None, typer.Option(help="Layers that a feature writes to; 1 for PLTs.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads, of the model and of the steps each.")] = 1,
) -> None:
    """Time a whole run, its steps alone, and the model alone."""
    from tl_clt import CLTTrainingRunner, CLTTrainingRunnerConfig, load_model
    from tl_clt.organisms.atlas.train_clt import text_of_run
    from tl_clt.training.data import batches
    from tl_clt.training.run.trainer import CLTTrainer

    torch.set_num_threads(threads)
    logging.getLogger("tl_clt.training").setLevel(logging.INFO)  # in the place of a bar, as from the command line
    loaded = random_llama() if model == "random" else load_model(model)
    dataset: Any = text
    if model == "random":
        dataset = torch.randint(0, loaded.cfg.d_vocab, (tokens // 64, 128))
    elif text is None:
        dataset = text_of_run(loaded, 0)
    settings = {
        "d_transcoder": d_transcoder,
        "activation": activation,
        "span": span,
        "training_tokens": tokens,
        "train_batch_size_tokens": batch,
        "context_size": min(128, loaded.cfg.n_ctx),
    }
    make_reader, seen = batches._reader, dict[bytes, Tensor]()
    readers: list[Callable[[Tensor], Tensor]] = []

    def remembering(*args: Any) -> Any:
        read = make_reader(*args)
        readers.append(read)
        return lambda prompts: seen.setdefault(prompts.numpy().tobytes(), read(prompts))

    def from_memory(*_: Any) -> Any:
        return lambda prompts: seen[prompts.numpy().tobytes()]

    def run(reader: Any, **changes: Any) -> tuple[Any, list[float]]:
        runner = CLTTrainingRunner(CLTTrainingRunnerConfig(**settings, **changes), model=loaded, dataset=dataset)
        with mock.patch.object(batches, "_reader", reader):
            spent = Spent()
            runner.run()
        return runner, spent.so_far()

    runner, whole = run(remembering)
    steps = Spent()
    with mock.patch.object(CLTTrainer, "_train_step", steps.counted(CLTTrainer._train_step)):
        run(from_memory, prefetch=False)
    alone, n_read = Spent(), 0
    for key in list(seen)[: -(-tokens // (32 * settings["context_size"]))]:
        prompts = torch.frombuffer(bytearray(key), dtype=torch.int64).view(-1, settings["context_size"])
        alone.counted(readers[0])(prompts)
        n_read += prompts.numel()
    times, read = runner.record.times, sum(len(key) for key in seen) // 8
    in_model, in_steps = ([s / n for s in spent] for spent, n in ((alone.in_calls, n_read), (steps.in_calls, tokens)))
    training = [times.seconds / tokens, None]
    rows: dict[str, list[Any]] = {
        "the model's forward passes alone": in_model,
        "steps alone": in_steps,
        "one after the other": [a + b for a, b in zip(in_model, in_steps, strict=True)],
        "training, from the first batch to the last step": training,
        "the whole run": [seconds / tokens for seconds in whole],
    }
    title = (
        f"{model}, {loaded.cfg.n_layers} layers, d_model {loaded.cfg.d_model}, {d_transcoder} features per layer,"
        f" {activation}, {'PLT' if span == 1 else 'CLT'}, {tokens:,} tokens in steps of"
        f" {runner.cfg.data.train_batch_size_tokens}\n"
        f"{platform.machine()} CPU, {threads} threads each, torch {torch.__version__}, sae-lens {version('sae-lens')}"
    )
    table = Table("", "tokens/s", "processor ms a token", title=title, title_justify="left")
    for name, (clock, processor) in rows.items():
        table.add_row(name, f"{1 / clock:,.0f}", "" if processor is None else f"{1e3 * processor:.3f}")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"Training / the slower part alone: {max(in_model[0], in_steps[0]) / training[0]:.0%}; the whole run:"
        f" {max(in_model[0], in_steps[0]) * tokens / whole[0]:.0%}. {times} The model read {read:,} tokens."
    )


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    app()
