"""The command line: `tl-clt demo`, `trace`, `intervene`, `train`, `evaluate`, `tradeoff`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from tl_clt.errors import InterventionError, OutputNotEmpty, TlCltError

if TYPE_CHECKING:
    from tl_clt.attribution import AttributionGraph
    from tl_clt.evaluation import EvaluationReport
    from tl_clt.interventions import InterventionEffect
    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder

app = typer.Typer(
    name="tl-clt",
    help="Cross-layer transcoders for TransformerLens: train one, and trace how a model arrives at its answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

N_EVALUATION_SENTENCES = 100
"""Held-out sentences that the demo measures the CLT on."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show an error of ours as one message, without a traceback, and end with status 1."""
    try:
        yield
    except TlCltError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from error


@app.command()
def demo(
    prompt: Annotated[Optional[str], typer.Option(help="A prompt in atlas's own words.")] = None,
    output: Annotated[Path, typer.Option(help="Graph file to write.")] = Path("atlas-graph.safetensors"),
) -> None:
    """Trace a prompt through the bundled model "atlas" and show how it arrives at its answer."""
    with plain_errors():
        with console.status("Loading the model and its CLT"):
            import torch

            from tl_clt.attribution import attribute
            from tl_clt.organisms import default_prompt, load_organism

            # Handing parts of so small a model to a second thread costs more than it saves.
            torch.set_num_threads(1)
            model, clt = load_organism("atlas")
        with console.status("Tracing the prompt"):
            graph = attribute(model, clt, prompt or default_prompt("atlas"))
        if "<unk>" in graph.prompt_tokens:
            errors.print("Words that atlas does not know became <unk>: it has read of US states and cities only.")
        show_graph(graph, graph.prune(), model, clt)
        with console.status("Measuring how well the CLT stands in for the MLPs"):
            from tl_clt.viewer.tables import evaluation_table

            report = _evaluate_on_atlas(model, clt)
        console.print(evaluation_table(report))
        _write(graph, output)


@app.command()
def trace(
    model: Annotated[str, typer.Option(help="Bundled organism, model folder, .gguf file, or hub name.")],
    clt: Annotated[str, typer.Option(help="CLT folder or hub repository.")],
    prompt: Annotated[str, typer.Option(help="Text whose next token to explain.")],
    output: Annotated[Path, typer.Option(help="Graph file to write.")] = Path("graph.safetensors"),
    backend: Annotated[str, typer.Option(help="hooked (HookedTransformer) or bridge (TransformerBridge).")] = "hooked",
    device: Annotated[str, typer.Option(help="Where to compute, for example cuda.")] = "cpu",
    target: Annotated[
        Optional[list[str]], typer.Option(help="Token to explain; may be given again. Default: the likeliest.")
    ] = None,
    max_n_logits: Annotated[int, typer.Option(help="At most so many output tokens.")] = 10,
    desired_logit_prob: Annotated[float, typer.Option(help="Probability that the output tokens reach.")] = 0.95,
    max_feature_nodes: Annotated[
        Optional[int], typer.Option(help="Trace at most so many features. Default: all.")
    ] = None,
    max_unexplored: Annotated[
        Optional[float], typer.Option(help="Stop when this share of influence is left. Default: trace all.")
    ] = None,
    contrast: Annotated[
        Optional[str], typer.Option(help="A prompt of as many tokens: show what the first has beyond it.")
    ] = None,
    keep_edges: Annotated[
        Optional[float], typer.Option(help="Hold the strongest edges that make up this share of each node's input.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, sweep, or autograd.")] = "auto",
    memory_limit: Annotated[
        Optional[float], typer.Option(help="GiB that tracing may take. Default: 80% of what is free.")
    ] = None,
    bos: Annotated[str, typer.Option(help="Position 0: error, drop, or features.")] = "error",
    bias_nodes: Annotated[bool, typer.Option(help="Position and bias nodes.")] = True,
    node_threshold: Annotated[float, typer.Option(help="Share of influence that shown nodes keep.")] = 0.8,
    edge_threshold: Annotated[float, typer.Option(help="Share of influence that shown edges keep.")] = 0.98,
    lazy_decoder: Annotated[bool, typer.Option(help="Leave decoders on disk, reading only what is needed.")] = False,
) -> None:
    """Trace one prompt into an attribution graph, show it pruned, and write it whole to a file."""
    with plain_errors():
        if output.exists():
            raise OutputNotEmpty(f"'{output}' exists. Give another --output, or remove it first.")
        with console.status("Loading the model and the CLT"):
            from tl_clt.attribution import attribute
            from tl_clt.lens import load_model
            from tl_clt.transcoder import CrossLayerTranscoder

            transcoder = CrossLayerTranscoder.from_pretrained(clt, device=device, lazy_decoder=lazy_decoder)
            hooked: Any = load_model(model, backend=backend, device=device)  # type: ignore[arg-type]
        graph = attribute(
            hooked,
            transcoder,
            prompt,
            target,
            max_n_logits=max_n_logits,
            desired_logit_prob=desired_logit_prob,
            max_feature_nodes=max_feature_nodes,
            max_unexplored=max_unexplored,
            engine=engine,  # type: ignore[arg-type]
            contrast=contrast,
            keep_edges=keep_edges,
            memory_limit=memory_limit,
            bos=bos,  # type: ignore[arg-type]
            bias_nodes=bias_nodes,
        )
        show_graph(graph, graph.prune(node_threshold, edge_threshold), hooked, transcoder)
        _write(graph, output)


@app.command()
def intervene(
    model: Annotated[str, typer.Option(help="Bundled organism, model folder, .gguf file, or hub name.")],
    clt: Annotated[str, typer.Option(help="CLT folder or hub repository.")],
    prompt: Annotated[str, typer.Option(help="Text whose next token to change.")],
    value: Annotated[
        Optional[list[str]],
        typer.Option(help="Set features: layer:pos:feature=number. pos may be all; feature may be 17,30. Repeatable."),
    ] = None,
    scale: Annotated[Optional[list[str]], typer.Option(help="Multiply features, in the same form. Repeatable.")] = None,
    add: Annotated[Optional[list[str]], typer.Option(help="Add to features, in the same form. Repeatable.")] = None,
    through_layer: Annotated[
        Optional[int],
        typer.Option(help="Hold MLP outputs up to this layer (constrained). Default: recompute features (iterative)."),
    ] = None,
    freeze: Annotated[str, typer.Option(help="Hold attention, all (and norms' scales), or none.")] = "attention",
    top: Annotated[int, typer.Option(help="Tokens to show.")] = 10,
    backend: Annotated[str, typer.Option(help="hooked (HookedTransformer) or bridge (TransformerBridge).")] = "hooked",
    device: Annotated[str, typer.Option(help="Where to compute, for example cuda.")] = "cpu",
    lazy_decoder: Annotated[bool, typer.Option(help="Leave decoders on disk, reading only what is needed.")] = False,
) -> None:
    """Change features on a prompt and show which next tokens become likelier or less likely."""
    with plain_errors():
        with console.status("Loading the model and the CLT"):
            from tl_clt.interventions import intervene as change
            from tl_clt.interventions import parse_intervention
            from tl_clt.lens import load_model
            from tl_clt.transcoder import CrossLayerTranscoder

            given = {"value": value, "scale": scale, "add": add}
            changes = [parse_intervention(text, setter) for setter, texts in given.items() for text in texts or ()]
            if not changes:
                raise InterventionError("Nothing is changed: give --value, --scale or --add, for example 2:-1:17=0.")
            transcoder = CrossLayerTranscoder.from_pretrained(clt, device=device, lazy_decoder=lazy_decoder)
            hooked: Any = load_model(model, backend=backend, device=device)  # type: ignore[arg-type]
        effect = change(hooked, transcoder, prompt, changes, through_layer, freeze)  # type: ignore[arg-type]
        show_effect(effect, top)


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Bundled organism, model folder, .gguf file, or hub name.")],
    dataset: Annotated[str, typer.Option(help="Text file, dataset folder, or Hugging Face dataset name.")],
    output: Annotated[Path, typer.Option(help="New folder for the CLT.")],
    d_transcoder: Annotated[int, typer.Option(help="Features per layer.")] = 1024,
    training_tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 1_000_000,
    activation: Annotated[str, typer.Option(help="relu, jumprelu, topk or batchtopk.")] = "jumprelu",
    k: Annotated[
        Optional[int], typer.Option(help="Features per layer and token, for topk; their mean, for batchtopk.")
    ] = None,
    topk_across: Annotated[
        Optional[str], typer.Option(help="What k is counted over: layer (the default), or all_layers together.")
    ] = None,
    k_start: Annotated[Optional[int], typer.Option(help="k at the first step, from where it falls to k.")] = None,
    k_anneal_steps: Annotated[Optional[int], typer.Option(help="Steps over which it falls.")] = None,
    span: Annotated[Optional[int], typer.Option(help="Layers a feature writes to. Default: all later ones.")] = None,
    target_l0: Annotated[
        Optional[float],
        typer.Option(help="Active features per layer and token to reach, for relu and jumprelu: lambda is adjusted."),
    ] = None,
    sparsity: Annotated[Optional[float], typer.Option(help="Sparsity coefficient lambda.")] = None,
    sparsity_loss: Annotated[Optional[str], typer.Option(help="tanh (the default), l0 or quadratic_l0.")] = None,
    straight_through: Annotated[
        Optional[str], typer.Option(help="What JumpReLU's gradient reaches: all (the default) or threshold.")
    ] = None,
    skip: Annotated[bool, typer.Option(help="A linear map of each layer's input beside the features.")] = False,
    far_rank: Annotated[
        Optional[int], typer.Option(help="Rank of the decoders to later layers. Default: full.")
    ] = None,
    lr: Annotated[Optional[float], typer.Option(help="Learning rate.")] = None,
    context_size: Annotated[
        Optional[int],
        typer.Option(help="Tokens of a training context. Default: 128, or the model's own where that is less."),
    ] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Tokens of a training batch.")] = None,
    input_hook: Annotated[Optional[str], typer.Option(help="Hook that features read.")] = None,
    backend: Annotated[str, typer.Option(help="hooked (HookedTransformer) or bridge (TransformerBridge).")] = "hooked",
    device: Annotated[
        str, typer.Option(help="Where to train, for example cuda; under torchrun, a GPU for each process.")
    ] = "cpu",
    n_data_parallel: Annotated[
        int, typer.Option(help="Under torchrun: parts that a batch is split into; features are split within each.")
    ] = 1,
    dtype: Annotated[
        Optional[str], typer.Option(help="Number type of the weights; bfloat16 is rounded at random.")
    ] = None,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    cache: Annotated[
        Optional[Path],
        typer.Option(help="Folder of cached activations: read where they are there, else made and added."),
    ] = None,
    cache_dtype: Annotated[Optional[str], typer.Option(help="Cached as float16, or as int8 in half the space.")] = None,
    max_norm_ratio: Annotated[
        Optional[float], typer.Option(help="Leave out tokens of more than so many times the usual norm.")
    ] = None,
    checkpoints: Annotated[
        Optional[Path], typer.Option(help="New folder for checkpoints. Default: none, or with --resume the same.")
    ] = None,
    checkpoint_every: Annotated[Optional[int], typer.Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[
        Optional[Path],
        typer.Option(help="Checkpoint, or folder of them, of a run that was cut off; give its other options again."),
    ] = None,
    wandb: Annotated[bool, typer.Option(help="Log to Weights & Biases.")] = False,
) -> None:
    """Train a CLT on a model's activations over a text, with SAELens's training loop.

    On several GPUs: torchrun --nproc-per-node 4 -m tl_clt.cli train --device cuda ...
    """
    with plain_errors():
        from tl_clt.transcoder.formats.writing import require_new

        # Of several processes the main one speaks; its errors are raised on all.
        console.quiet = errors.quiet = "LOCAL_RANK" in os.environ and int(os.environ.get("RANK", "0")) > 0
        require_new(output)
        with console.status("Loading the model and the training loop"):
            from tl_clt.lens import load_model
            from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig, own_device

            device = own_device(device)
            hooked: Any = None
            if not console.quiet:
                hooked = load_model(model, backend=backend, device=device)  # type: ignore[arg-type]
        optional = {
            "k": k,
            "span": span,
            "topk_across": topk_across,
            "k_start": k_start,
            "k_anneal_steps": k_anneal_steps,
            "target_l0": target_l0,
            "sparsity_coefficient": sparsity,
            "sparsity_loss": sparsity_loss,
            "straight_through": straight_through,
            "far_rank": far_rank,
            "dtype": dtype,
            "lr": lr,
            "context_size": context_size or (None if hooked is None else min(128, hooked.cfg.n_ctx)),
            "train_batch_size_tokens": batch_size,
            "input_hook": input_hook,
            "cache_path": None if cache is None else str(cache),
            "cache_dtype": cache_dtype,
            "max_norm_ratio": max_norm_ratio,
            "checkpoint_path": _checkpoint_folder(checkpoints, resume),
            "checkpoint_every": checkpoint_every,
        }
        cfg = CLTTrainingRunnerConfig.from_dict(
            {
                "model_name": model,
                "dataset_path": dataset,
                "output_path": str(output),
                "d_transcoder": d_transcoder,
                "training_tokens": training_tokens,
                "activation": activation,
                "skip": skip,
                "autocast": autocast,
                "backend": backend,
                "device": device,
                "n_data_parallel": n_data_parallel,
                "seed": seed,
                "log_to_wandb": wandb,
                **{name: value for name, value in optional.items() if value is not None},
            }
        )
        CLTTrainingRunner(cfg, model=hooked, on_start=lambda memory: console.print(f"Memory: about {memory}")).run(
            resume
        )
        console.print(
            f"CLT written to {output}. Trace with it: tl-clt trace --model {model} --clt {output} --prompt ..."
        )


ModelName = Annotated[str, typer.Option(help="Bundled organism, model folder, .gguf file, or hub name.")]
HeldOutText = Annotated[str, typer.Option(help="Held-out text: a text file, dataset folder, or hub dataset.")]
MaxTokens = Annotated[int, typer.Option(help="Measure on so many tokens of it.")]
ContextSize = Annotated[
    Optional[int], typer.Option(help="Tokens of a prompt at most. Default: 128, or the model's own if less.")
]
NGraphs = Annotated[int, typer.Option(help="Prompts to trace for graph scores; 0 for none.")]
GraphTokens = Annotated[int, typer.Option(help="Tokens of each at most.")]
MaxUnexplored = Annotated[
    Optional[float], typer.Option(help="Share of influence that tracing may leave. Default: trace all.")
]
Backend = Annotated[str, typer.Option(help="hooked (HookedTransformer) or bridge (TransformerBridge).")]
Device = Annotated[str, typer.Option(help="Where to compute, for example cuda.")]


@app.command()
def evaluate(
    model: ModelName,
    clt: Annotated[str, typer.Option(help="CLT folder or hub repository.")],
    dataset: HeldOutText,
    output: Annotated[Path, typer.Option(help="New folder for report.json and figures.")],
    max_tokens: MaxTokens = 65_536,
    context_size: ContextSize = None,
    n_graphs: NGraphs = 8,
    graph_tokens: GraphTokens = 32,
    max_unexplored: MaxUnexplored = None,
    backend: Backend = "hooked",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the draw of prompts to trace.")] = 0,
    lazy_decoder: Annotated[bool, typer.Option(help="Leave decoders on disk, reading only what is needed.")] = False,
) -> None:
    """Measure how good a CLT is on text that it was not trained on."""
    with plain_errors():
        from tl_clt.transcoder.formats.writing import require_new

        require_new(output)
        with console.status("Loading the model and the CLT"):
            from tl_clt.evaluation import evaluate as measure
            from tl_clt.lens import load_model
            from tl_clt.transcoder import CrossLayerTranscoder
            from tl_clt.viewer.tables import evaluation_table, layer_table

            transcoder = CrossLayerTranscoder.from_pretrained(clt, device=device, lazy_decoder=lazy_decoder)
            hooked: Any = load_model(model, backend=backend, device=device)  # type: ignore[arg-type]
        report = measure(
            hooked,
            transcoder,
            dataset,
            max_tokens=max_tokens,
            context_size=context_size,
            n_graphs=n_graphs,
            graph_tokens=graph_tokens,
            max_unexplored=max_unexplored,
            seed=seed,
        )
        report.save(output)
        console.print(layer_table(report))
        console.print(evaluation_table(report))
        console.print(f"The report and its figures are in {output}.")


@app.command()
def tradeoff(
    model: ModelName,
    dataset: HeldOutText,
    output: Annotated[Path, typer.Option(help="New folder for tradeoff.csv, tradeoff.png and what is trained.")],
    clt: Annotated[Optional[list[str]], typer.Option(help="CLT or PLT folder to compare. Repeatable.")] = None,
    neurons: Annotated[
        Optional[list[float]], typer.Option(help="Compare thresholded neurons of this L0 a layer. Repeatable.")
    ] = None,
    train_on: Annotated[
        Optional[str], typer.Option(help="Text to train a PLT and a CLT on for each size and L0 (TopK).")
    ] = None,
    d_transcoder: Annotated[Optional[list[int]], typer.Option(help="Size to train. Repeatable.")] = None,
    l0: Annotated[Optional[list[int]], typer.Option(help="L0 a layer to train. Repeatable.")] = None,
    training_tokens: Annotated[int, typer.Option(help="Tokens to train each on.")] = 1_000_000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 4e-4,
    max_tokens: MaxTokens = 65_536,
    context_size: ContextSize = None,
    n_graphs: NGraphs = 8,
    graph_tokens: GraphTokens = 32,
    max_unexplored: MaxUnexplored = None,
    backend: Backend = "hooked",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of training, and of the draw of prompts to trace.")] = 0,
) -> None:
    """Sparsity against fidelity of neurons, PLTs and CLTs, on the same held-out text."""
    with plain_errors():
        from tl_clt.evaluation.tradeoff import check_training, compare, short_names, train_transcoders, training_config
        from tl_clt.transcoder.formats.writing import require_new

        require_new(output)
        check_training(train_on, d_transcoder, l0)
        with console.status("Loading the model and transcoders"):
            from tl_clt.lens import load_model
            from tl_clt.transcoder import CrossLayerTranscoder
            from tl_clt.viewer.tables import tradeoff_table

            loaded = [CrossLayerTranscoder.from_pretrained(path, device=device) for path in clt or ()]
            given = dict(zip(short_names(clt or ()), loaded, strict=True))
            hooked: Any = load_model(model, backend=backend, device=device)  # type: ignore[arg-type]
        if train_on is not None:
            base = training_config(hooked, training_tokens, lr, context_size, device, seed)
            given |= train_transcoders(hooked, train_on, base, d_transcoder or (), l0 or (), output)
        found = compare(
            hooked,
            dataset,
            given,
            neurons or (),
            max_tokens=max_tokens,
            context_size=context_size,
            n_graphs=n_graphs,
            graph_tokens=graph_tokens,
            max_unexplored=max_unexplored,
            seed=seed,
        )
        found.save(output)
        console.print(tradeoff_table(found.table))
        console.print(f"The table and its figure are in {output}.")


def _checkpoint_folder(checkpoints: Path | None, resume: Path | None) -> str | None:
    """Where new checkpoints go: beside the one resumed from, unless another folder is given."""
    if checkpoints is None and resume is not None:
        checkpoints = resume.parent if resume.name.startswith("step_") else resume
    return None if checkpoints is None else str(checkpoints)


def show_graph(
    graph: AttributionGraph, pruned: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder
) -> None:
    """Print a pruned graph as a tree, and the scores of the whole."""
    import torch

    from tl_clt.features import promoted_tokens
    from tl_clt.viewer import graph_tree
    from tl_clt.viewer.tables import graph_table

    def label(layer: int, feature: int) -> str:
        words = promoted_tokens(model, clt, layer, torch.tensor([feature], device=clt.W_enc.device))[0]
        return "promotes " + ", ".join(w.strip() for w in words)

    console.print(
        "Each line: the share of the input of the node above it, the node, and the tokens it promotes most directly.",
        style="dim",
    )
    console.print(graph_tree(pruned, label=label))
    console.print(graph_table(graph, pruned))


def show_effect(effect: InterventionEffect, top: int) -> None:
    """Print the tokens whose probability changed most."""
    from tl_clt.viewer.tables import effect_table

    for inactive in effect.inactive:
        errors.print(f"Note: {inactive}. Scaling it does nothing.", markup=False)
    console.print(effect_table(effect, top))


def _evaluate_on_atlas(model: HookedModel, clt: CrossLayerTranscoder) -> EvaluationReport:
    """The CLT on two-hop questions that neither it nor the model has seen."""
    from tl_clt.evaluation import evaluate
    from tl_clt.organisms.atlas.text import held_out_questions, sentence_of

    sentences = [sentence_of(q) for q in held_out_questions()[:N_EVALUATION_SENTENCES]]
    return evaluate(model, clt, sentences, n_graphs=0)


def _write(graph: AttributionGraph, output: Path) -> None:
    graph.save(output)
    console.print(f"The whole graph is in {output}: tl_clt.AttributionGraph.load('{output}') reads it.")


if __name__ == "__main__":
    app()
