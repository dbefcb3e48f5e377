"""`tl-clt features`: what the features of a CLT mean, as a store of contexts and labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tl_clt.cli.app import Backend, CLTName, Device, LazyDecoder, ModelOfCLT, app, console, load_pair, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import ConfigError

if TYPE_CHECKING:
    from tl_clt.features import FeatureRecord, FeatureStore

LABELS = ("rules", "endpoint", "none")


@app.command()
def features(
    clt: CLTName,
    dataset: Annotated[str, typer.Option(help="Text to read: a text file, dataset folder, or hub dataset.")],
    output: Annotated[Path, typer.Option(help="New folder for the store.")],
    model: ModelOfCLT = None,
    max_tokens: Annotated[Optional[int], typer.Option(help="Read so many tokens of it. Default: all.")] = None,
    context_size: Annotated[
        Optional[int], typer.Option(help="Tokens of a prompt at most. Default: 128, or the model's own if less.")
    ] = None,
    n_top: Annotated[int, typer.Option(help="Contexts of the greatest activations of each feature.")] = 8,
    n_per_band: Annotated[int, typer.Option(help="Contexts of each quarter of a random sample.")] = 2,
    label_tokens: Annotated[
        int, typer.Option(help="Tokens kept out for choosing labels, and as many for scoring them.")
    ] = 16_384,
    labels: Annotated[str, typer.Option(help="rules, endpoint (a language model), or none.")] = "rules",
    endpoint: Annotated[
        Optional[str],
        typer.Option(help="Base URL of an OpenAI-compatible endpoint, for example http://localhost:8000/v1."),
    ] = None,
    endpoint_model: Annotated[Optional[str], typer.Option(help="Name of the model there.")] = None,
    key_from: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    top: Annotated[int, typer.Option(help="Features to show; an endpoint labels these alone.")] = 20,
    resume: Annotated[bool, typer.Option(help="Go on with what an interrupted run left in --output.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random dictionary, and of the contexts that score labels.")] = 0,
    backend: Backend = "hooked",
    device: Device = "cpu",
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Read a text and keep what each feature of a CLT is active at, with labels and what these are worth."""
    with plain_errors():
        from tl_clt.arguments import as_choice, as_whole
        from tl_clt.features import EndpointLabeller, FeatureStore, RuleLabeller, collect_features, label_features
        from tl_clt.features.store import UNFINISHED
        from tl_clt.files import require_new

        as_choice("--labels", labels, LABELS)
        as_whole("--top", top, 1)
        named = None
        if labels == "endpoint":
            if endpoint is None or endpoint_model is None:
                raise ConfigError("--labels endpoint asks a language model: give --endpoint and --endpoint-model.")
            named = EndpointLabeller(endpoint, endpoint_model, key_from=key_from)
        if not resume:
            require_new(output)
        interruption.kept = lambda: (
            f"What was read is in {output}: the same command with --resume goes on from there."
            if any((output / UNFINISHED).glob("part-*"))
            else f"The store is in {output}, without labels." if (output / "features.json").is_file()
            else "Nothing was read yet; remove the folder, or go on with --resume."
        )  # fmt: skip
        finished = resume and (output / "features.json").is_file()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from tl_clt.training import own_device

            device = own_device(device)
        with console.status("Loading the model and the CLT"):
            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
        if finished:
            # Interrupted between reading and labels, or to be labelled anew.
            store = FeatureStore.open(output, transcoder)
        else:
            store = collect_features(
                hooked,
                transcoder,
                dataset,
                output,
                max_tokens=max_tokens,
                context_size=context_size,
                n_top=n_top,
                n_per_band=n_per_band,
                label_tokens=label_tokens,
                resume=resume,
            )
        if not _is_main():
            return
        strongest = _strongest(store, top)
        if labels == "rules":
            from tl_clt.organisms import known_variables

            label_features(
                hooked, transcoder, store, RuleLabeller(known_variables(transcoder.cfg.model_name)), seed=seed
            )
        elif named is not None:
            label_features(hooked, transcoder, store, named, features=strongest, seed=seed)
        _show(store, [store[place] for place in strongest])


def _is_main() -> bool:
    """Whether this process is the first, or the only one, of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def _strongest(store: FeatureStore, n: int) -> list[tuple[int, int]]:
    """The features that write most at their greatest activation."""
    stats = store.statistics()
    written = (stats["max_activation"] * stats["decoder_norm"]).flatten()
    order = written.argsort(descending=True, stable=True)[:n].tolist()
    return [divmod(number, store.d_transcoder) for number in order if written[number] > 0]


def _show(store: FeatureStore, records: list[FeatureRecord]) -> None:
    """Print the table of features, and what labels are worth beside a random dictionary's."""
    from tl_clt.viewer.tables import feature_table, label_table

    console.print(feature_table(records))
    if store.is_labelled:
        console.print(label_table(store.label_summary()))
    console.print(
        f"The store is in {store.folder}: tl_clt.FeatureStore.open('{store.folder}') reads it.", soft_wrap=True
    )
