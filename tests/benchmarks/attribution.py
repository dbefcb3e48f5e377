"""How fast prompts are traced: `python -m tests.benchmarks.attribution` prints tables. Not collected by pytest.

Every run is a process of its own, so that its peak memory is its own; seconds are those of `attribute` alone, after
loading. The share is what the matrix products' floating-point operations would take at the measured rate of one large
product, over the time that tracing took. circuit-tracer runs in an environment of its own, whose Python is given by
--circuit-tracer; graphs are compared edge by edge where both are there (`bos="drop", bias_nodes=False`).
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.attribution_cases import Case, gemma, gpt2, read_case, write_case
from tl_clt import CrossLayerTranscoder, attribute
from tl_clt.machine import GIB, held_memory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=150)
HERE = Path(__file__).parent
MEMORY_CASES = [
    {},
    {"keep_edges": 0.9},
    {"max_feature_nodes": 100},
    {"max_unexplored": 0.3},
    {"keep_edges": 0.9, "memory_limit": 0.8},
    {"max_unexplored": 0.3, "memory_limit": 0.8},
    {"max_feature_nodes": 1000, "memory_limit": 0.8},
    {"keep_edges": 0.9, "max_unexplored": 0.3, "memory_limit": 0.6},
    {"keep_edges": 0.9, "memory_limit": 0.3},
]
IN_PLACE = {torch.ops.aten.addmm_: lambda out, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[1]}
"""torch's counter leaves out the in-place product."""


def matmul_rate(size: int = 4096) -> float:
    """FLOP/s of one large float32 product."""
    a = torch.randn(size, size)
    a @ a
    started = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * size**3 / (time.perf_counter() - started)


@app.command()
def one(
    folder: Path,
    output: Path,
    engine: str = "sweep",
    threads: int = 2,
    lazy: bool = False,
    max_unexplored: Optional[float] = None,
    max_feature_nodes: Optional[int] = None,
    keep_edges: Optional[float] = None,
    count: bool = False,
) -> None:
    """One case through one of our engines; prints JSON."""
    torch.set_num_threads(threads)
    model, tokens = read_case(folder)
    clt = CrossLayerTranscoder.from_pretrained(folder / "clt", lazy_decoder=lazy)
    options = {
        "engine": engine,
        "bos": "drop",
        "bias_nodes": False,
        "progress": False,
        "max_unexplored": max_unexplored,
        "max_feature_nodes": max_feature_nodes,
        "keep_edges": keep_edges,
    }
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    graph = attribute(model, clt, tokens, **options)
    seconds = time.perf_counter() - started
    found = {
        "seconds": seconds,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loaded_gib": loaded,
        "planned_gib": graph.info["planned_gib"],
        "n_features": int((graph.nodes.kind == 0).sum()),
        "n_expanded": int((graph.expanded & (graph.nodes.kind == 0)).sum()),
        "unexplored": graph.unexplored,
    }
    if not graph.is_sparse:
        save_file({"adjacency": graph.adjacency, "influence": graph.influence()}, output)
        started = time.perf_counter()
        pruned = graph.prune()
        found["prune_seconds"] = time.perf_counter() - started
        if max_unexplored is not None:
            whole = attribute(model, clt, tokens, **{**options, "max_unexplored": None})
            found["kept_influence"] = kept_influence(whole, graph)
        found["n_pruned"] = len(pruned.nodes)
    if count:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            attribute(model, clt, tokens, **options)
        found["flops"] = counter.get_total_flops()
        found["share"] = counter.get_total_flops() / matmul_rate() / seconds
    typer.echo(json.dumps(found))


def kept_influence(whole, part) -> float:
    """Share of the full graph's node influence (of the nodes that pruning keeps in it) that the pruned part keeps."""
    influence = whole.influence()
    ours, all_of_it = part.prune_masks().nodes, whole.prune_masks().nodes
    return float(influence[ours].sum() / influence[all_of_it].sum())


def run(command: list[str]) -> dict:
    """The JSON that a process prints last."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(folder: Path, output: Path, **options: object) -> dict:
    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [] if value in (False, None) else [flag, str(value)]
    return run([sys.executable, "-m", "tests.benchmarks.attribution", "one", str(folder), str(output), *flags])


def agreement(one_file: Path, other_file: Path) -> str:
    """Largest difference of an edge over the largest edge."""
    one_graph, other = load_file(one_file)["adjacency"], load_file(other_file)["adjacency"]
    if one_graph.shape != other.shape:
        return f"{list(one_graph.shape)} and {list(other.shape)}"
    return f"{float((one_graph - other).abs().max() / other.abs().max()):.0e}"


@app.command()
def peers(
    circuit_tracer: Annotated[
        Optional[Path], typer.Option(help="Python of an environment with circuit-tracer.")
    ] = None,
    case: Annotated[Optional[Path], typer.Option(help="Folder of a case, instead of making one.")] = None,
    threads: int = 2,
    batch_size: Annotated[int, typer.Option(help="circuit-tracer's.")] = 16,
    autograd: Annotated[bool, typer.Option(help="The autograd engine as well.")] = True,
) -> None:
    """The 12-layer case with all features traced: sweep, lazy, bounded, autograd, circuit-tracer."""
    about(threads)
    with tempfile.TemporaryDirectory() as temp:
        folder = case or Path(temp) / "case"
        if case is None:
            write_case(gpt2(24, 3072, 29.7), folder)
        files = {name: Path(temp) / f"{name}.safetensors" for name in ("sweep", "lazy", "bound", "autograd", "peer")}
        rows: list[tuple[str, dict, str]] = []

        def add(name: str, found: dict, file: str = "") -> None:
            rows.append((name, found, file))
            console.print(f"{name}: {found['seconds']:.1f} s")

        if circuit_tracer is not None:
            script = [str(circuit_tracer), str(HERE / "run_circuit_tracer.py"), str(folder)]
            command = [*script, str(files["peer"]), str(threads), str(batch_size), "dense"]
            add(f"circuit-tracer, batch {batch_size}", run(command), "peer")
        add("sweep", ours(folder, files["sweep"], threads=threads, count=True))
        add("sweep, lazy decoders", ours(folder, files["lazy"], threads=threads, lazy=True), "lazy")
        bound = ours(folder, files["bound"], threads=threads, max_unexplored=0.05)
        add("sweep, max_unexplored=0.05", bound)
        if autograd:
            add("autograd", ours(folder, files["autograd"], threads=threads, engine="autograd"), "autograd")
        table = Table(
            "", "seconds", "times sweep", "peak GiB", "features", "traced", "share of rate", "largest difference"
        )
        base = next(found["seconds"] for name, found, _ in rows if name == "sweep")
        for name, found, file in rows:
            table.add_row(
                name,
                f"{found['seconds']:.1f}",
                f"{found['seconds'] / base:.1f}",
                f"{found['gib']:.2f}",
                str(found["n_features"]),
                str(found.get("n_expanded", found["n_features"])),
                f"{found['share']:.0%}" if "share" in found else "",
                agreement(files["sweep"], files[file]) if file else "",
            )
        console.print(table)
        console.print(
            f"max_unexplored=0.05: unexplored {bound['unexplored']:.3f}; its pruned graph keeps"
            f" {bound['kept_influence']:.1%} of the node influence that the full pruned graph has."
        )


@app.command()
def measure(folder: Path, output: Path, options: str, threads: int = 2) -> None:
    """One case traced with some of `attribute`'s options, as JSON; prints what it planned and what it took."""
    torch.set_num_threads(threads)
    model, tokens = read_case(folder)
    clt = CrossLayerTranscoder.from_pretrained(folder / "clt")
    before = held_memory(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here on.
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tracing may end early: that is counted below.
        graph = attribute(model, clt, tokens, progress=False, **json.loads(options))
    seconds = time.perf_counter() - started
    peak, held = peak_memory(), held_memory(torch.device("cpu"))
    graph.influence()
    after = held_memory(torch.device("cpu"))
    found = {
        "seconds": seconds,
        "planned": graph.info["planned_gib"],
        "peak": (peak - before) / GIB,
        "graph": (held - before) / GIB,
        "influence": (after - held) / GIB,
        "file": graph.save(output).stat().st_size / GIB,
        "traced": int((graph.expanded & (graph.nodes.kind == 0)).sum()),
        "features": int((graph.nodes.kind == 0).sum()),
        "unexplored": graph.unexplored,
    }
    typer.echo(json.dumps(found))


def peak_memory() -> int:
    """Bytes that this process held at most since its peak was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@app.command()
def memory(
    case: Annotated[Optional[Path], typer.Option(help="Folder of a case, instead of making one.")] = None,
    threads: int = 2,
) -> None:
    """What traces plan to take and what they take, the 12-layer case; Linux alone tells peaks. Beside it what the graph
    costs afterwards: in memory, in memory once its influence was asked for, and on disk."""
    about(threads)
    columns = ("options", "seconds", "traced of", "unexplored", "planned GiB", "measured GiB", "ratio")
    table = Table(*columns, "graph GiB", "+ influence GiB", "file GiB")
    with tempfile.TemporaryDirectory() as temp:
        folder = case or Path(temp) / "case"
        if case is None:
            write_case(gpt2(24, 3072, 29.7), folder)
        for options in MEMORY_CASES:
            command = [sys.executable, "-m", "tests.benchmarks.attribution", "measure", str(folder)]
            command += [f"{temp}/graph.safetensors", json.dumps(options), "--threads", str(threads)]
            try:
                found = run(command)
            except SystemExit as error:
                # A refusal is a result, too: the last line of what the process said.
                table.add_row(str(options), "refused: " + str(error).strip().splitlines()[-1][:90])
                continue
            table.add_row(
                ", ".join(f"{name}={value}" for name, value in options.items()) or "dense",
                f"{found['seconds']:.1f}",
                f"{found['traced']} of {found['features']}",
                f"{found['unexplored']:.3f}",
                *(f"{found[name]:.2f}" for name in ("planned", "peak")),
                f"{found['peak'] / found['planned']:.2f}",
                *(f"{found[name]:.3f}" for name in ("graph", "influence", "file")),
            )
            console.print(f"{options}: {found['seconds']:.1f} s")
    console.print(table)


@app.command()
def growth(threads: int = 2) -> None:
    """How time and memory grow with positions and with features, on both shapes."""
    about(threads)
    table = Table(
        "case", "features", "edges", "seconds", "us a row and position", "peak GiB", "planned GiB", "share of rate"
    )
    cases: list[Case] = [gpt2(p, 1024, 10) for p in (8, 16, 32, 64)]
    cases += [gpt2(32, 1024, l0) for l0 in (5, 20)]
    cases += [gemma(p, 512, 5) for p in (8, 16, 32, 64)]
    with tempfile.TemporaryDirectory() as temp:
        for i, case in enumerate(cases):
            folder = Path(temp) / str(i)
            write_case(case, folder)
            found = ours(folder, Path(temp) / "graph.safetensors", threads=threads, count=True)
            n = found["n_features"]
            table.add_row(
                f"{case.name}, L0 {case.l0:g}",
                str(n),
                "all",
                f"{found['seconds']:.1f}",
                f"{found['seconds'] * 1e6 / max(n, 1) / case.n_pos:.0f}",
                f"{found['gib']:.2f}",
                f"{found['planned_gib']:.2f}",
                f"{found['share']:.0%}",
            )
    console.print(table)


def about(threads: int) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens"))
    console.print(f"float32, {threads} threads, {platform.machine()}, Python {platform.python_version()}, {packages}")
    torch.set_num_threads(threads)
    console.print(f"one 4096 x 4096 x 4096 product: {matmul_rate() / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    app()
