"""`tl-clt finetune`: a trained CLT trained further, for what it does in the model's place."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tl_clt.cli.app import Backend, CLTName, Device, ModelOfCLT, app, console, load_pair, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import NotWritten, OutputNotEmpty

if TYPE_CHECKING:
    from tl_clt.finetuning import FinetuningStep
    from tl_clt.transcoder import CrossLayerTranscoder


@app.command()
def finetune(
    clt: CLTName,
    dataset: Annotated[str, typer.Option(help="Text to train on: a text file, dataset folder, or hub dataset.")],
    output: Annotated[Path, typer.Option(help="New folder for the CLT and `finetuning.json`.")],
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
    """Train a CLT further, with terms in the loss that ask what it does in the place of the MLPs.

    Ctrl-C leaves the CLT as it is then in OUTPUT-interrupted. `finetuning.json` beside a CLT says how it was made.
    """
    with plain_errors():
        from tl_clt.files import interrupted_beside, require_new

        require_new(output)
        partial = interrupted_beside(output)
        interruption.kept = lambda: f"The CLT is in {output}." if output.exists() else "Nothing was written."
        with console.status("Loading the model and the CLT"):
            from tl_clt.finetuning import FinetuningInterrupted
            from tl_clt.finetuning import finetune as train_further

            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder=False)
        settings: dict[str, Any] = {
            "kl": kl,
            "downstream": downstream,
            "jacobian": jacobian,
            "across": across,
            "n_directions": n_directions,
            "sparsity": sparsity,
            "n_steps": n_steps,
            "lr": lr,
            "batch_size": batch_size,
            "context_size": context_size,
            "pos": pos,
            "seed": seed,
        }
        of_what = {
            "model": model or transcoder.cfg.model_name,
            "clt": clt,
            "clt_fingerprint": transcoder.fingerprint(),
            "dataset": dataset,
            "backend": backend,
            "device": device,
        }
        steps: list[FinetuningStep] = []
        began = time.monotonic()

        def record(n_done: int) -> dict[str, Any]:
            last = steps[-1]._asdict() if steps else None
            seconds = round(time.monotonic() - began, 1)
            return {**of_what, "settings": settings, "steps_done": n_done, "last_step": last, "seconds": seconds}

        try:
            tuned = train_further(hooked, transcoder, dataset, **settings, on_progress=steps.append)
        except FinetuningInterrupted as stopped:
            n_done = stopped.n_done
            _save(stopped.clt, partial, record(n_done))
            interruption.kept = lambda: f"The CLT as it was after {n_done} of {n_steps} steps is in {partial}."
            raise
        _save(tuned, output, record(n_steps))
        console.print(f"CLT written to {output}. Compare: tl-clt evaluate --clt {output} --dataset ... --output ...")


RECORD = "finetuning.json"


def _save(clt: CrossLayerTranscoder, output: Path, record: dict[str, Any]) -> None:
    """Write the CLT and how it was made; where that fails, to the disk of temporary files, which the error names."""
    try:
        _write(clt, output, record)
    except (NotWritten, OutputNotEmpty) as error:
        kept = Path(tempfile.gettempdir()) / f"{output.name}-{secrets.token_hex(4)}"
        _write(clt, kept, record)
        raise NotWritten(
            f"{error} The CLT is not lost: it is in '{kept}'. Copy that folder to where there is room."
        ) from error


def _write(clt: CrossLayerTranscoder, folder: Path, record: dict[str, Any]) -> None:
    from tl_clt.files import files_into

    clt.save_pretrained(folder)
    with files_into(folder) as unfinished:
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n")
