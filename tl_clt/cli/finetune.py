"""`tl-clt finetune`: a trained CLT trained further, for what it does in the model's place."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tl_clt.cli.app import Backend, CLTName, Device, ModelOfCLT, app, console, load_pair, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import NotWritten, OutputNotEmpty

if TYPE_CHECKING:
    from tl_clt.transcoder import CrossLayerTranscoder


@app.command()
def finetune(
    clt: CLTName,
    dataset: Annotated[str, typer.Option(help="Text to train on: a text file, dataset folder, or hub dataset.")],
    output: Annotated[Path, typer.Option(help="New folder for the CLT.")],
    model: ModelOfCLT = None,
    kl: Annotated[float, typer.Option(help="Weight of the KL divergence of next tokens, all MLPs replaced.")] = 0.0,
    downstream: Annotated[
        float, typer.Option(help="Weight of squared errors while the CLT stands in for all MLPs.")
    ] = 0.0,
    jacobian: Annotated[float, typer.Option(help="Weight of errors of each MLP's derivative.")] = 0.0,
    across: Annotated[float, typer.Option(help="Weight of errors of later layers' derivatives.")] = 0.0,
    n_directions: Annotated[int, typer.Option(help="Random directions a step, for derivatives.")] = 1,
    sparsity: Annotated[
        Optional[float], typer.Option(help="lambda of relu and jumprelu. Default: as many active features as before.")
    ] = None,
    n_steps: Annotated[int, typer.Option(help="Steps of training.")] = 300,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Prompts of a step at most.")] = 16,
    context_size: Annotated[
        Optional[int], typer.Option(help="Tokens of a prompt at most. Default: 128, or the model's own if less.")
    ] = None,
    pos: Annotated[
        Optional[int], typer.Option(help="Train at this position of each prompt alone. Default: all but position 0.")
    ] = None,
    backend: Backend = "hooked",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the order of prompts and of directions.")] = 0,
) -> None:
    """Train a CLT further, with terms in the loss that ask what it does in the place of the MLPs."""
    with plain_errors():
        from tl_clt.files import require_new

        require_new(output)
        interruption.kept = lambda: f"The CLT is in {output}." if output.exists() else "Nothing was written."
        with console.status("Loading the model and the CLT"):
            from tl_clt.finetuning import finetune as train_further

            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder=False)
        tuned = train_further(
            hooked,
            transcoder,
            dataset,
            kl=kl,
            downstream=downstream,
            jacobian=jacobian,
            across=across,
            n_directions=n_directions,
            sparsity=sparsity,
            n_steps=n_steps,
            lr=lr,
            batch_size=batch_size,
            context_size=context_size,
            pos=pos,
            seed=seed,
        )
        _save(tuned, output)
        console.print(f"CLT written to {output}. Compare: tl-clt evaluate --clt {output} --dataset ... --output ...")


def _save(clt: CrossLayerTranscoder, output: Path) -> None:
    """Write the CLT; where that fails, to the disk of temporary files, which the error names."""
    try:
        clt.save_pretrained(output)
    except (NotWritten, OutputNotEmpty) as error:
        kept = Path(tempfile.gettempdir()) / f"{output.name}-{secrets.token_hex(4)}"
        clt.save_pretrained(kept)
        raise NotWritten(
            f"{error} The CLT is not lost: it is in '{kept}'. Copy that folder to where there is room."
        ) from error
