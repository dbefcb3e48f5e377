"""Training of cross-layer transcoders with SAELens's trainer and activation store. The only importer of sae_lens.

    config.py     what a user says of a run: the CLT, the data, the run; what is chosen where nothing is said; checks
    clt.py        what is trained: its weights and start, the definition of a step's forward pass and losses, and the
                  classes through which SAELens sees it
    losses.py     the terms of the loss, with their settings, and phi with straight-through gradients
    resampling.py dead features begun anew
    export.py     to a `CrossLayerTranscoder`, with the scaling of training folded into the weights
    fast/         the same step in less time and memory: step, products
    data/         from a dataset to shuffled batches of scaled activations: dataset, batches, cache
    run/          runner, trainer, progress, metrics, checkpoints, memory
    parallel.py   the processes of a run, and what they tell each other

Names are loaded when they are first used: `config` needs neither SAELens nor a model, so that the command line's help
does not wait for them.

Of SAELens a run uses as they are: its `ActivationsStore`, which makes prompts of a dataset and runs the model over
them; the loop of its `SAETrainer`, with the schedules of the learning rate and of the losses' coefficients, the counts
of tokens and steps, and the logs; and its `TrainingSAE` and registries, through which SAELens's own trainer and loaders
take a CLT too (they take the step from its definition).

In the place of SAELens's stand:
    the step             `CLTTrainer._train_step` with `FastStep`. SAELens makes two copies of all activations to count
                         firing, flattened and as 0 and 1; here firing is counted layer by layer, and flattened
                         activations are made on logging steps only.
    gradients            clipped to norm 1 as in SAELens, but over all processes of a run, by fused Adam
                         while it reads them; and neither dropped nor zeroed: the next step writes its own over them
                         (`fast.products`).
    Adam                 fused; for bfloat16 weights `RandomRoundingAdam`, because most of its updates would round to
                         nothing.
    dead features        those whose density over a window of steps is low (`RunningDensity`), not those that have not
                         fired for some steps: a feature that fires once in a million tokens is as good as dead.
                         SAELens's own counts go on beside it, for its logs. Once a window, up to two thirds of a run,
                         they begin anew from tokens that are reconstructed badly (`resampling`).
    lambda               with `target_l0`, adjusted by `L0Controller` in the place of SAELens's ramp.
    the end              on exactly the tokens asked for: the last batch may be shorter (`CLTTrainerConfig`).
    checkpoints          `run.checkpoints`: with all that a step depends on, so that a resumed run ends with the same
                         weights, and each file with its checksum. SAELens's say how far the dataset was read, but not
                         what waits in the shuffling buffer, nor where random numbers were; its `save_checkpoint` and
                         `load_trainer_state` work, and are not used.
    the bar              lines of what a person wants to know (`run.progress`), where somebody takes them.
    mixing               `MixedBatches` shuffles as SAELens's `mixing_buffer` does, with random numbers of its own and a
                         position that can be taken up again.
"""

from typing import Any

from tl_clt.lazy import load_name, modules_of_names

_MODULES = modules_of_names(__name__)
"""Names of this room, and the module of each."""

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    value = globals()[name] = load_name(__name__, _MODULES, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
