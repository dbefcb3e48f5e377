"""From a config to a trained CLT, and what is written down about the run."""

from __future__ import annotations

import json
import logging
import math
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
import wandb
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import SAEMetadata
from wandb.errors import Error as WandbError

from tl_clt.arguments import shown
from tl_clt.errors import ConfigError, NotFinite, NotWritten, OutputNotEmpty, TrainingWarning
from tl_clt.files import files_into, new_folder, require_new
from tl_clt.lens import HookedModel, load_model, mlp_hook_points, model_fingerprint, model_name, require_model
from tl_clt.training.clt import TrainingCLT, TrainingCLTConfig, init_from_tokens
from tl_clt.training.config import CLTTrainingRunnerConfig
from tl_clt.training.data.batches import (
    ActivationBatch,
    ActivationBatches,
    ActivationScale,
    DataCounts,
    Handout,
    apply_scale,
    check_fits,
    estimate_scale,
    from_main,
    without_store_noise,
)
from tl_clt.training.data.dataset import AnyDataset, DatasetSource, open_dataset, text_fingerprint
from tl_clt.training.export import export, require_same_kind, take_over
from tl_clt.training.parallel import ProcessGrid, only_main_shows, own_device, process_grid
from tl_clt.training.run.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    TrainingState,
    find_checkpoint,
    gather_clt,
    has_more_tokens,
    n_done,
    position_of,
    read_checkpoint,
    require_checkpoint_folder,
    require_same_model,
    require_same_text,
    restore,
    scale_of,
)
from tl_clt.training.run.memory import MemoryEstimate, estimate_memory, require_memory
from tl_clt.training.run.metrics import Metrics, cut_alike, fit_thresholds, measure, sets_thresholds
from tl_clt.training.run.progress import (
    FIGURE,
    TABLE,
    LayerWatch,
    ProgressMeter,
    ProgressTable,
    TrainingProgress,
    TrainingTimes,
    Waiting,
    bar,
    draw_progress,
    logger,
    read_lines,
)
from tl_clt.training.run.trainer import CLTTrainer, CLTTrainerConfig, mend_of_growth, require_finite_weights
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import Weights
from tl_clt.transcoder.formats import native


class TrainingRecord(NamedTuple):
    """What `training.json` holds."""

    config: dict[str, Any]
    """The run's config."""

    tokens_seen: int
    """Tokens trained on."""

    data: DataCounts
    """What was read, and what of it was left out; a little more than `tokens_seen`, because it is read in chunks."""

    seconds: float
    """Wall time of the run, loading and measuring included; of a resumed one, with what it took before."""

    sae_lens_version: str
    """Version of SAELens that trained it."""

    coefficients: dict[str, float]
    """Weights of the loss terms at the last step; "sparsity" is the lambda that `target_l0` came to."""

    metrics: Metrics
    """After training."""

    times: TrainingTimes
    """Where the time of training went."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {"metrics": self.metrics._asdict(), "data": asdict(self.data), "times": self.times._asdict()}
        return self._asdict() | parts


RECORD = "training.json"
OWN_PATHS = ("output_path", "checkpoint_path", "cache_path")
"""Left out of the record: where a run was written says nothing of it, and folders move."""


class Start(NamedTuple):
    """What the main process found before training: plain values, which all processes get."""

    n_layers: int
    """Layers of the model."""

    d_model: int
    """Width of its residual stream."""

    n_ctx: int
    """Tokens that it takes."""

    name: str
    """The model's, as the CLT's config has it."""

    fingerprint: str | None
    """Of the model, where the run makes or takes up checkpoints."""

    text_fingerprint: str
    """Of the dataset (`text_fingerprint`)."""

    checkpoint: Checkpoint | None
    """To go on from."""


class CLTTrainingRunner:
    """Trains a `CrossLayerTranscoder` with SAELens's activation store and trainer; see `CLTTrainer` for its step.

    Under torchrun, or where the caller has set up torch.distributed, all processes train one CLT together: see
    `parallel`. The main process alone loads the model and the dataset, calls back, and writes.
    """

    record: TrainingRecord | None = None
    """What `training.json` holds; set when `run` is done."""

    clt: CrossLayerTranscoder | None = None
    """What `run` gives; set when training is done, before anything is written."""

    _table: ProgressTable | None = None

    def __init__(
        self,
        cfg: CLTTrainingRunnerConfig,
        model: HookedModel | None = None,
        dataset: DatasetSource | None = None,
        on_progress: Callable[[TrainingProgress], None] | None = None,
        on_start: Callable[[MemoryEstimate], None] | None = None,
    ) -> None:
        """Take a run's parts; nothing is loaded yet.

        Args:
            cfg: the run.
            model: used in place of loading `cfg.model_name`.
            dataset: used in place of `cfg.dataset_path`; see `open_dataset` for what it may be.
            on_progress: called every `cfg.log_every` steps and after the last, in the place of SAELens's progress bar.
                `print` prints a line. It may use the model: running it for the next batches is paused, which may
                have to wait for a forward pass. The logger "tl_clt.training" has the same lines, at level INFO,
                without.
            on_start: told what memory the run will need, before any activations are made.

        Raises:
            ConfigError: there is no model or no dataset, or one GPU is named for several processes.
        """
        if not isinstance(cfg, CLTTrainingRunnerConfig):
            raise ConfigError(f"CLTTrainingRunner: cfg is {shown(cfg)}: give a CLTTrainingRunnerConfig.")
        if model is not None:
            require_model(model)
        for name, call in (("on_progress", on_progress), ("on_start", on_start)):
            if call is not None and not callable(call):
                raise ConfigError(f"CLTTrainingRunner: {name} is {shown(call)}: give a function, or None.")
        if model is None and cfg.model_name is None:
            raise ConfigError("CLTTrainingRunner: there is no model. Set model_name in the config, or pass model=.")
        if dataset is None and cfg.dataset_path is None:
            raise ConfigError(
                "CLTTrainingRunner: there is no dataset. Set dataset_path in the config, or pass dataset=."
            )
        self.cfg = cfg.changed(device=own_device(cfg.device))
        self.model = model
        self.dataset = dataset
        self.on_progress = on_progress
        self.on_start = on_start

    @property
    def progress(self) -> Sequence[TrainingProgress]:
        """The lines of the run so far, on the main process: what `progress.csv` holds."""
        return () if self._table is None else tuple(self._table.lines)

    def run(self, resume: str | Path | None = None) -> CrossLayerTranscoder:
        """Train, save to `cfg.output_path` where given, and return the CLT, which takes raw activations.

        Where features were split among several processes, the main one returns it in main memory, and the others
        return one without values, on the "meta" device. An error that one of them alone meets while training ends
        that one; torchrun then ends the others.

        The state of torch's random numbers is afterwards as it was before.

        Args:
            resume: a checkpoint, or a `checkpoint_path` whose newest to take: the run goes on from there, and on the
                CPU ends with the same weights, to the bit, as if it had never stopped. The config must be the same in
                all that decides the weights, and model and dataset must hold the same. `training_tokens` alone may be
                more than they were, also after a run that came to its end: from that step on schedules are those of
                the new length. The result is then not that of one run of this length, whose schedules would have been
                others before that step.

        Raises:
            OutputNotEmpty: the output or checkpoint folder holds something (found before any work).
            CheckpointError: the checkpoint is damaged, or of another run.
            HookNotFound, DatasetError, TokenizerMissing, ConfigError, ModelNotFound, ModelUnsupported,
                NotEnoughMemory: before training; nothing is written.
            NotFinite: a loss, gradient or weight is infinite or no number; nothing is written.
            NotWritten: a folder cannot be written to (found before any work), or a disk is full. Checkpoints and cached
                activations from before stay good. A trained CLT that could not be written is in `clt`, and where there
                was room, in a folder that the error names.
        """
        with process_grid(self.cfg.n_data_parallel, self.cfg.device) as grid:
            return self._run_on(grid, resume)

    def _run_on(self, grid: ProcessGrid, resume: str | Path | None) -> CrossLayerTranscoder:
        started = time.monotonic()
        cfg = self.cfg
        source: list[tuple[HookedModel, AnyDataset]] = []
        start = grid.on_main(lambda: self._prepare(resume, source))
        self.cfg = cfg = cfg.fitted_to(start.n_ctx)
        if start.checkpoint is not None:
            # What this run chose by itself, for another number of tokens perhaps, is as it was.
            before = start.checkpoint.about["config"]
            self.cfg = cfg = cfg.changed(**{name: before[name] for name in cfg.chosen if name in before})
        grid.everywhere(lambda: self._check_memory(start, grid))
        first: list[Weights] = []
        grid.everywhere(lambda: self._read_first(start, first))
        state = None
        if start.checkpoint is not None:
            state = read_checkpoint(start.checkpoint, cfg.device, grid)
            started -= start.checkpoint.about["seconds"]
        with (
            without_store_noise(),
            _seeded(cfg),
            _wandb(cfg, start, grid),
            only_main_shows(grid),
            ExitStack() as opened,
        ):
            raw = None
            for model, dataset in source:
                opened.enter_context(mlp_hook_points(model))
                batches = ActivationBatches(
                    model,
                    dataset,
                    cfg.clt,
                    cfg.data,
                    device=cfg.device,
                    seed=cfg.seed,
                    model_name=start.name,
                    position=None if state is None else position_of(state),
                    n_trained=0 if state is None else n_done(state, "n_training_samples"),
                )
                raw = opened.enter_context(closing(batches))
            model = source[0][0] if source else None
            clt = self._train(start, model, raw, grid, started, state, first)
        self.clt = clt
        if grid.is_main:
            self._save(clt)
        return clt

    def _prepare(self, resume: str | Path | None, source: list[tuple[HookedModel, AnyDataset]]) -> Start:
        """Check what the main process can check before the work, and add the model and the dataset to `source`."""
        cfg = self.cfg
        if cfg.output_path is not None:
            require_new(Path(cfg.output_path))
        checkpoint = None if resume is None else find_checkpoint(cfg, Path(resume))
        require_checkpoint_folder(cfg, checkpoint)
        model = self.model or self._load_model()
        cfg = cfg.fitted_to(model.cfg.n_ctx)
        check_fits(model, cfg.clt, cfg.data)
        source_of_data = cfg.dataset_path if self.dataset is None else self.dataset
        assert source_of_data is not None
        dataset = open_dataset(
            source_of_data,
            model,
            context_size=cfg.data.context_size,
            batch_size=cfg.data.train_batch_size_tokens,
            prepend_bos=cfg.data.prepend_bos,
            streaming=cfg.data.streaming,
        )
        fingerprint = None
        if checkpoint is not None or cfg.checkpoint_path is not None:
            fingerprint = model_fingerprint(model)
        if checkpoint is not None and fingerprint is not None:
            require_same_model(checkpoint, fingerprint)
        text = text_fingerprint(dataset)
        if checkpoint is not None:
            require_same_text(checkpoint, text)
        source.append((model, dataset))
        name = cfg.model_name or model_name(model)
        return Start(model.cfg.n_layers, model.cfg.d_model, model.cfg.n_ctx, name, fingerprint, text, checkpoint)

    def _check_memory(self, start: Start, grid: ProcessGrid) -> None:
        shape = replace(self._clt_config(start, None), device="meta")
        estimate = estimate_memory(TrainingCLT(shape, grid=grid), self.cfg.data)
        if self.on_start is not None and grid.is_main:
            self.on_start(estimate)
        require_memory(estimate, torch.device(self.cfg.device))

    def _read_first(self, start: Start, first: list[Weights]) -> None:
        """Add the weights that the run is to begin with, if any, to `first`; decoders stay on disk until then."""
        name = self.cfg.init_from
        if name is not None and start.checkpoint is None:
            weights = CrossLayerTranscoder.from_pretrained(name, lazy_decoder=True).weights
            require_same_kind(TrainingCLT(replace(self._clt_config(start, None), device="meta")), weights, name)
            first.append(weights)

    def _load_model(self) -> HookedModel:
        cfg = self.cfg
        assert cfg.model_name is not None
        dtype = getattr(torch, cfg.model_dtype)
        return load_model(cfg.model_name, backend=cfg.backend, device=cfg.device, dtype=dtype)

    def _train(
        self,
        start: Start,
        model: HookedModel | None,
        raw: ActivationBatches | None,
        grid: ProcessGrid,
        started: float,
        state: TrainingState | None,
        first: list[Weights],
    ) -> CrossLayerTranscoder:
        cfg = self.cfg
        sae, scale = self._new_clt(start, raw, grid) if state is None else self._clt_to_restore(start, state, grid)
        if raw is not None and state is None:
            _warn_of_constant_outputs(raw.peek(cfg.data.n_batches_for_scale))
        for weights in first:
            take_over(sae, weights)
            scale = ActivationScale(tuple(sae.cfg.input_scale), tuple(sae.cfg.output_scale))
        trainer_cfg = self._trainer_config(state)
        trainer = CLTTrainer(cfg=trainer_cfg, sae=sae, data_provider=None)
        if state is not None:
            restore(trainer, state, longer=start.checkpoint is not None and has_more_tokens(cfg, start.checkpoint))

        def own_part(batches: Iterator[ActivationBatch] | None) -> Iterator[ActivationBatch]:
            handed_out = Handout(batches, grid, (2, start.n_layers, start.d_model), sae.dtype, sae.device)
            return (apply_scale(batch, scale) for batch in handed_out)

        waiting = Waiting(own_part(None if raw is None else self._for_training(raw, trainer)))
        trainer.data_provider = waiting

        def upcoming() -> ActivationBatch:
            ahead = None if raw is None else torch.cat(raw.peek(cfg.data.n_batches_for_scale))
            return apply_scale(from_main(ahead, grid, sae.dtype, sae.device), scale)

        trainer.upcoming = upcoming if cfg.resample_dead else None

        def about() -> dict[str, Any]:
            assert model is not None, "the main process has the model"
            fingerprint = start.fingerprint or model_fingerprint(model)
            return {"model_fingerprint": fingerprint, "text_fingerprint": start.text_fingerprint}

        resumed_at = None if state is None else trainer.n_training_steps
        checkpoints = CheckpointWriter(cfg, about, lambda: None if raw is None else raw.position, started, resumed_at)
        trainer.after_step = checkpoints
        table = self._table = self._progress_table(start, sae, checkpoints.folder)
        meter = trainer.progress = ProgressMeter(
            cfg.steps_per_line,
            trainer_cfg.total_training_steps,
            cfg.data.training_tokens,
            started,
            self._teller(table, raw),
        )
        in_model = 0.0 if raw is None else raw.seconds_in_model
        if grid.is_main:
            logger.info("%s", cfg.in_words())
        meter.begin(trainer.n_training_samples)
        try:
            with checkpoints, bar(show=self.on_progress is None and not logger.isEnabledFor(logging.INFO)):
                trainer.fit()
                checkpoints.write_last(trainer)
        finally:
            table.write_beside_checkpoints()
        in_model = 0.0 if raw is None else raw.seconds_in_model - in_model
        times = meter.times(trainer.seconds_in_steps, waiting.seconds, in_model)
        # Before held-out text is read, which may fail: the CLT is not to be lost for it.
        self.clt = clt = export(gather_clt(sae))
        metrics = self._measure(raw, scale, trainer)
        self.record = TrainingRecord(
            config={k: v for k, v in cfg.to_dict().items() if k not in OWN_PATHS},
            tokens_seen=trainer.n_training_samples,
            data=grid.on_main(lambda: raw.position.counts if raw is not None else DataCounts()),
            seconds=round(time.monotonic() - started, 1),
            sae_lens_version=sae_lens.__version__,
            coefficients=trainer.get_coefficients(),
            metrics=metrics,
            times=times,
        )
        if grid.is_main:
            logger.info("%s", times)
            logger.info("%s", f"{self.record.data.in_words()} {metrics.in_words(cfg.l0_asked_for)}")
        if sets_thresholds(sae):
            self.clt = clt = export(gather_clt(sae))
        grid.on_main(lambda: _require_finite(clt, metrics, cfg))
        return clt

    def _measure(self, raw: ActivationBatches | None, scale: ActivationScale, trainer: CLTTrainer) -> Metrics:
        """Set thresholds by one half of the held-out text, where there are any to set, and measure on the other.

        On a grid every rank sees all of its tokens, so that the numbers are those of a single process.
        """
        cfg, sae = self.cfg, trainer.sae
        with nullcontext() if raw is None else raw.paused():
            held_out = None if raw is None else raw.held_out()
            n_tokens, kept_out = sae.grid.on_main(lambda: (0, False) if held_out is None else held_out[:2])
            # An even number of equal batches, of which thresholds may take half.
            n_batches = 2 * -(-n_tokens // (2 * cfg.data.train_batch_size_tokens))
            size = -(-n_tokens // n_batches)
            n_batches = -(-n_tokens // size)
            cut = None if held_out is None else cut_alike(held_out.batches, size)

            def for_everyone() -> Iterator[ActivationBatch]:
                for _ in range(n_batches):
                    batch = None if cut is None else next(cut)
                    yield apply_scale(from_main(batch, sae.grid, sae.dtype, sae.device), scale)

            batches = for_everyone()
            before = None
            to_measure = islice(batches, n_batches)
            if sets_thresholds(sae):
                first = list(islice(to_measure, (n_batches + 1) // 2))
                before = fit_thresholds(sae, first, trainer.fast_step)
                to_measure = to_measure if n_batches > 1 else iter(first)
            return measure(
                sae,
                to_measure,
                trainer.fast_step,
                dead_share_in_training=float(trainer.dead_neurons.double().mean()),
                dead_window_steps=cfg.dead_window_steps,
                held_out=kept_out,
                l0_before_thresholds=before,
            )

    def _new_clt(
        self, start: Start, raw: ActivationBatches | None, grid: ProcessGrid
    ) -> tuple[TrainingCLT, ActivationScale]:
        first = [] if raw is None else raw.peek(self.cfg.data.n_batches_for_scale)
        scale = grid.on_main(lambda: estimate_scale(first))
        sae = TrainingCLT(self._clt_config(start, scale), grid=grid)
        scaled = torch.cat([apply_scale(batch, scale) for batch in first]) if first else None
        sides = [None if scaled is None else scaled[:, side] for side in (0, 1)]
        inputs, outputs = (from_main(side, grid, sae.dtype, sae.device) for side in sides)
        init_from_tokens(sae, inputs, outputs)
        return sae, scale

    def _clt_to_restore(
        self, start: Start, state: TrainingState, grid: ProcessGrid
    ) -> tuple[TrainingCLT, ActivationScale]:
        scale = scale_of(state, start.n_layers)
        return TrainingCLT(self._clt_config(start, scale), grid=grid), scale

    def _save(self, clt: CrossLayerTranscoder) -> None:
        """Write the CLT to `output_path`, or where that fails, to another place, which the error names."""
        if self.cfg.output_path is None:
            return
        output = Path(self.cfg.output_path)
        try:
            self._write(clt, output)
        except (NotWritten, OutputNotEmpty) as error:
            raise NotWritten(f"{error} {self._write_elsewhere(clt, output)}") from error

    def _write(self, clt: CrossLayerTranscoder, folder: Path) -> None:
        assert self.record is not None and self._table is not None
        with new_folder(folder) as unfinished:
            native.save(clt.weights, unfinished)
            (unfinished / RECORD).write_text(json.dumps(self.record.to_dict(), indent=2) + "\n")
            if self.progress:
                self._table.write(unfinished / TABLE)
        if not self.progress:
            return  # a run resumed at its end made no step
        figure = draw_progress(self.progress, self.cfg.l0_asked_for, f"Training of a CLT of {clt.cfg.model_name}")
        try:
            with files_into(folder) as unfinished:
                figure.savefig(unfinished / FIGURE, dpi=120)
        except NotWritten as error:  # the CLT is there
            warnings.warn(f"{FIGURE} is missing: {error}", TrainingWarning, stacklevel=2)

    def _write_elsewhere(self, clt: CrossLayerTranscoder, output: Path) -> str:
        """Write the CLT to the disk of the checkpoints, or of temporary files; what to tell of it."""
        checkpoints = self.cfg.checkpoint_path
        places = [] if checkpoints is None else [Path(checkpoints).absolute()]
        failed = []
        for place in (*places, Path(tempfile.gettempdir())):
            folder = place / f"{output.name}-{secrets.token_hex(4)}"
            try:
                self._write(clt, folder)
            except (NotWritten, OutputNotEmpty) as error:
                failed.append(f"{place} ({error.__cause__ or error})")
            else:
                return (
                    f"The trained CLT is not lost: it is in '{folder}'. Copy that folder to where there is room, or"
                    f" load it from there: CrossLayerTranscoder.from_pretrained('{folder}')."
                )
        resume = "" if checkpoints is None else f" Resuming from '{checkpoints}' makes it again without training anew."
        return (
            f"Nor could it be written elsewhere: {', '.join(failed)}. In Python the trained CLT is runner.clt:"
            f" runner.clt.save_pretrained(folder).{resume}"
        )

    def _progress_table(self, start: Start, clt: TrainingCLT, checkpoints: Path | None) -> ProgressTable:
        before: list[TrainingProgress] = []
        if (checkpoint := start.checkpoint) is not None:
            before = clt.grid.on_main(lambda: read_lines(checkpoint.folder.parent / TABLE, checkpoint.step))
        losses = ["mse_loss", *(f"{name}_loss" for name in clt.get_coefficients())]
        return ProgressTable(losses, checkpoints if clt.grid.is_main else None, before)

    def _teller(self, table: ProgressTable, raw: ActivationBatches | None) -> Callable[[TrainingProgress], None]:
        """What each line of progress is given to. On other processes than the main one it does nothing."""
        watch = LayerWatch(self.cfg.clt)

        def tell(line: TrainingProgress) -> None:
            if raw is None:
                return
            table.add(line)
            logger.info("%s", line)
            if self.on_progress is not None:
                with raw.paused():
                    self.on_progress(line)
            watch.look(line)

        return tell

    def _for_training(self, raw: ActivationBatches, trainer: CLTTrainer) -> Iterator[ActivationBatch]:
        """The batches, the last cut to the tokens that are left."""
        warned = False
        for batch in raw:
            warned = warned or _warn_of_repeats(raw.position.counts, self.cfg.data.training_tokens)
            yield batch[: self.cfg.data.training_tokens - trainer.n_training_samples]

    def _clt_config(self, start: Start, scale: ActivationScale | None) -> TrainingCLTConfig:
        cfg = self.cfg
        return TrainingCLTConfig(
            **vars(cfg.clt),
            d_in=start.d_model,
            d_sae=start.n_layers * cfg.clt.d_transcoder,
            device=cfg.device,
            n_layers=start.n_layers,
            model_name=start.name,
            input_scale=None if scale is None else scale.inputs,
            output_scale=None if scale is None else scale.outputs,
            # lambda rises over the whole run; a controller's target is reached half-way and kept.
            sparsity_warm_up_steps=cfg.n_steps if cfg.clt.target_l0 is None else cfg.n_steps // 2,
            metadata=SAEMetadata(
                model_name=start.name,
                hook_name=cfg.clt.input_hook,
                hook_name_out=cfg.clt.output_hook,
                context_size=cfg.data.context_size,
                prepend_bos=cfg.data.prepend_bos,
            ),
        )

    def _trainer_config(self, state: TrainingState | None) -> CLTTrainerConfig:
        cfg = self.cfg
        ours = {
            "steps_done": 0 if state is None else n_done(state, "n_training_steps"),
            "samples_done": 0 if state is None else n_done(state, "n_training_samples"),
            "total_training_samples": cfg.data.training_tokens,
            "train_batch_size_samples": cfg.data.train_batch_size_tokens,
            "lr_end": cfg.lr / 10 if cfg.lr_end is None else cfg.lr_end,
            "dead_feature_window": cfg.dead_window_steps,
            "checkpoint_path": None,  # checkpoints are ours
            "logger": LoggingConfig(**_of_same_name(cfg, LoggingConfig)),
        }
        return CLTTrainerConfig(**(_of_same_name(cfg, CLTTrainerConfig) | ours))


def _require_finite(clt: CrossLayerTranscoder, metrics: Metrics, cfg: CLTTrainingRunnerConfig) -> None:
    """Raise where a CLT, or what was measured of it, is infinite or no number.

    Raises:
        NotFinite: with the weight, or the layers.
    """
    require_finite_weights(clt.state_dict(), "At the end of training", cfg)
    layers = [layer for layer, ev in enumerate(metrics.explained_variance_per_layer) if not math.isfinite(ev)]
    if layers:
        raise NotFinite(
            f"At the end of training, the error of the reconstruction of layers {', '.join(map(str, layers))} is"
            f" infinite or no number. Nothing is saved of these weights. {mend_of_growth(cfg)}"
        )


MANY_PASSES = 16
"""Times that a run reads its dataset, from which on a warning says so."""


def _warn_of_repeats(counts: DataCounts, training_tokens: int) -> bool:
    """Warn, from the second pass over the dataset on, where there will be many; whether that was so."""
    if counts.epochs == 0 or counts.kept == 0:
        return False
    per_pass = counts.kept // counts.epochs
    passes = max(counts.epochs, training_tokens // max(1, per_pass))
    if passes < MANY_PASSES:
        return False
    warnings.warn(
        f"The dataset is read about {passes} times for {training_tokens} training_tokens: a pass over it gives at most"
        f" {per_pass}. The CLT will fit this text better than any other. Give more text, or fewer training_tokens.",
        TrainingWarning,
        stacklevel=2,
    )
    return True


CONSTANT_BELOW = 1e-10
"""Share of outputs' squares that varies, below which it is taken for rounding."""


def _warn_of_constant_outputs(batches: Sequence[ActivationBatch]) -> None:
    """Warn where some layer's outputs are the same at all tokens."""
    constant = []
    for layer in range(batches[0].shape[2]):
        y = torch.cat([batch[:, 1, layer] for batch in batches]).double()
        if float((y - y.mean(dim=0)).square().sum()) <= CONSTANT_BELOW * float(y.square().sum()):
            constant.append(layer)
    if constant:
        warnings.warn(
            f"The output of layers {', '.join(map(str, constant))} is the same at every token of the first batches:"
            " biases alone can write it, and features have nothing to learn. Give more varied data, or check hooks.",
            TrainingWarning,
            stacklevel=2,
        )


def _of_same_name(cfg: CLTTrainingRunnerConfig, kind: type) -> dict[str, Any]:
    """The values of a run's config that a config of SAELens's has under the same name."""
    names = {f.name for f in fields(kind)} & {f.name for f in fields(cfg)}
    return {name: getattr(cfg, name) for name in names}


@contextmanager
def _seeded(cfg: CLTTrainingRunnerConfig) -> Iterator[None]:
    """Within the block, torch's random numbers are those of the run's seed; afterwards they are as before."""
    device = torch.device(cfg.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(cfg.seed)
        yield


@contextmanager
def _wandb(cfg: CLTTrainingRunnerConfig, start: Start, grid: ProcessGrid) -> Iterator[None]:
    """Within the block, a Weights & Biases run is open where the config asks for one: that of a resumed run goes on.

    What other processes than the main one log goes nowhere.

    Raises:
        ConfigError: Weights & Biases knows no account here, or cannot be reached.
    """
    if not cfg.log_to_wandb:
        yield
        return
    run_id = None if start.checkpoint is None else start.checkpoint.about["wandb_run_id"]
    try:
        run = wandb.init(
            project=cfg.wandb_project,
            entity=cfg.wandb_entity,
            name=cfg.run_name,
            config=cfg.to_dict(),
            mode=None if grid.is_main else "disabled",
            id=run_id,
            resume=None if run_id is None else "must",
        )
    except WandbError as error:
        raise ConfigError(
            f"log_to_wandb is True, but Weights & Biases has no run for this one ({error}) Log in with `wandb login`,"
            " set WANDB_MODE=offline in the environment, or leave log_to_wandb out."
        ) from error
    with run:
        yield
