"""`tl-clt train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tl_clt.cli.app import Backend, ModelName, app, console, errors, plain_errors
from tl_clt.cli.interruption import interruption


@app.command()
def train(
    model: ModelName,
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
    input_hook: Annotated[
        Optional[str], typer.Option(help="Hook that features read: hook_resid_mid, mlp.hook_in, ...")
    ] = None,
    output_hook: Annotated[
        Optional[str], typer.Option(help="Hook that features write: hook_mlp_out, mlp.hook_out.")
    ] = None,
    backend: Backend = "hooked",
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
        from tl_clt.files import require_new

        # Of several processes the main one speaks; its errors are raised on all.
        console.quiet = errors.quiet = "LOCAL_RANK" in os.environ and int(os.environ.get("RANK", "0")) > 0
        require_new(output)
        checkpoint_path = _checkpoint_folder(checkpoints, resume)
        if checkpoints is not None and resume is None:
            require_new(checkpoints)
        interruption.quiet = errors.quiet
        interruption.kept = lambda: _kept(output, checkpoint_path, cache)
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
            "output_hook": output_hook,
            "cache_path": None if cache is None else str(cache),
            "cache_dtype": cache_dtype,
            "max_norm_ratio": max_norm_ratio,
            "checkpoint_path": checkpoint_path,
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


def _checkpoint_folder(checkpoints: Path | None, resume: Path | None) -> str | None:
    """Where new checkpoints go: beside the one resumed from, unless another folder is given."""
    if checkpoints is None and resume is not None:
        checkpoints = resume.parent if resume.name.startswith("step_") else resume
    return None if checkpoints is None else str(checkpoints)


def _kept(output: Path, checkpoint_path: str | None, cache: Path | None) -> str:
    """What of a run is there."""
    if (output / "cfg.json").exists():
        return f"The CLT is in {output}."
    cached = "" if cache is None or not cache.exists() else f" Cached activations stay in {cache}."
    written = sorted(Path(checkpoint_path).glob("step_*")) if checkpoint_path is not None else []
    if not written:
        return "No CLT and no checkpoint was written." + cached
    step = int(written[-1].name.removeprefix("step_"))
    return (
        f"The newest checkpoint is of step {step}: the same command with --resume {written[-1].parent} goes on."
        + cached
    )
