"""The activation cache: what it rounds is bounded and told, what is damaged is refused, and it changes no order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import small_disk
from tests.training.conftest import batches_of, opened, tiny_model
from tl_clt.errors import FormatError, ModelUnsupported, NotWritten
from tl_clt.training import CLTTrainingRunner
from tl_clt.training.data import cache
from tl_clt.training.data.batches import without_store_noise
from tl_clt.training.data.cache import BOUND, ActivationCache, pack, unpack

TOKENS = torch.arange(12).reshape(3, 4)
NAMES = ["blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"]


def activations(seed: int = 0) -> torch.Tensor:
    """Of 12 tokens and 2 layers, of sizes from 1e-6 to 1e6 over layers and tokens."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12, 2, 2, 5, generator=generator)
    return values * 10.0 ** torch.linspace(-6, 6, 12)[:, None, None, None]


def make(calls: list | None = None, values: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(tokens: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(tokens)
        return activations() if values is None else values

    return run


def a_cache(folder: Path, model: str = "m", dtype: str = "int8") -> ActivationCache:
    return ActivationCache(folder, model, NAMES, dtype, "tiny")  # type: ignore[arg-type]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_rounding_is_within_its_bound_for_every_size_and_measured_exactly(dtype: str) -> None:
    exact = activations()
    packed, error = pack(exact, dtype)  # type: ignore[arg-type]
    difference = (unpack(packed) - exact).abs()
    bound = BOUND[dtype] * exact.abs().amax(dim=-1, keepdim=True)
    assert (difference <= bound * (1 + 1e-5)).all()
    assert difference.max() > 0.5 * bound.max()
    assert torch.equal(error.largest, difference.amax(dim=(0, 3)).double())
    torch.testing.assert_close(error.squared, difference.double().square().sum(dim=(0, 3)))
    torch.testing.assert_close(error.of, exact.double().square().sum(dim=(0, 3)))


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_zeros_and_the_smallest_numbers_stay_numbers(dtype: str) -> None:
    exact = torch.zeros(2, 2, 1, 3)
    exact[1] = 1e-44
    packed, _ = pack(exact, dtype)  # type: ignore[arg-type]
    assert (unpack(packed)[0] == 0).all() and (unpack(packed)[1] - exact[1]).abs().max() < 1e-38


def test_infinite_activations_are_refused_with_their_layer(tmp_path: Path) -> None:
    values = activations()
    values[3, 1, 0, 2] = float("inf")
    with pytest.raises(ModelUnsupported, match="The output of layer 0 is infinite"):
        a_cache(tmp_path).read(TOKENS, make(values=values))
    assert shards(tmp_path) == []


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_first_and_later_reads_are_equal_to_the_bit_and_the_model_runs_once(tmp_path: Path, dtype: str) -> None:
    calls: list = []
    first = a_cache(tmp_path, dtype=dtype).read(TOKENS, make(calls))
    again = a_cache(tmp_path, dtype=dtype).read(TOKENS, make(calls))
    assert torch.equal(first, again) and len(calls) == 1
    assert first.dtype == torch.float32 and not torch.equal(first, activations())


def test_other_tokens_models_and_number_types_have_their_own_shards(tmp_path: Path) -> None:
    calls: list = []
    a_cache(tmp_path).read(TOKENS, make(calls))
    a_cache(tmp_path).read(TOKENS.reshape(2, 6), make(calls))
    a_cache(tmp_path, model="other").read(TOKENS, make(calls))
    a_cache(tmp_path, dtype="float16").read(TOKENS, make(calls))
    assert len(calls) == 4 == len(shards(tmp_path))


def test_index_tells_what_it_is_of_and_the_error_of_each_layer(tmp_path: Path) -> None:
    many = [activations(seed) for seed in range(3)]
    for seed, values in enumerate(many):
        # A new cache each time, as in a new run: the index holds what earlier runs wrote too.
        a_cache(tmp_path).read(TOKENS + 12 * seed, make(values=values))
    (path,) = tmp_path.glob("*/index.json")
    index = json.loads(path.read_text())
    exact = torch.cat(many)
    difference = torch.cat([unpack(pack(values, "int8")[0]) for values in many]) - exact
    assert (index["dtype"], index["hooks"], index["model_name"], index["shards"]) == ("int8", NAMES, "tiny", 3)
    for side, name in enumerate(("inputs", "outputs")):
        largest = difference[:, side].abs().amax(dim=(0, 2))
        relative = difference[:, side].norm(dim=(0, 2)) / exact[:, side].norm(dim=(0, 2))
        assert index["largest_error_per_layer"][name] == pytest.approx(largest.tolist())
        assert index["relative_error_per_layer"][name] == pytest.approx(relative.tolist(), rel=1e-4)
        assert max(index["relative_error_per_layer"][name]) < 0.01


class ElementsRead(TorchDispatchMode):
    """Counts the elements that operations on tensors of float64, as rounding errors are, take in."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [v for arg in args for v in (arg if isinstance(arg, (list, tuple)) else [arg])]
        self.count += sum(v.numel() for v in given if isinstance(v, torch.Tensor) and v.dtype == torch.float64)
        return func(*args, **(kwargs or {}))


def test_one_more_shard_costs_the_same_however_many_there_are(tmp_path: Path, monkeypatch) -> None:
    written, opened, read = [], [], []
    write, open_shard = Path.write_text, cache.safe_open
    monkeypatch.setattr(Path, "write_text", lambda self, text: (written.append(len(text)), write(self, text))[1])
    monkeypatch.setattr(cache, "safe_open", lambda *a, **k: (opened.append(1), open_shard(*a, **k))[1])
    filled = a_cache(tmp_path)
    for n in range(40):
        with ElementsRead() as elements:
            filled.read(TOKENS + n, make())
        read.append(elements.count)
    assert len(written) == 40 and opened == []
    assert max(written) < 1.1 * min(written)  # the same numbers each time, of more or fewer digits
    assert max(read[1:]) == min(read[1:]) > 0
    # A new run reads each header once, and then counts on.
    again = a_cache(tmp_path)
    for n in range(40, 44):
        again.read(TOKENS + n, make())
    assert len(opened) == 40 and json.loads((again.folder / "index.json").read_text())["shards"] == 44


def test_a_shard_deleted_under_a_run_is_made_again_and_counted_once(tmp_path: Path) -> None:
    filled = a_cache(tmp_path)
    for n in (0, 1):
        filled.read(TOKENS + n, make())
    index = (filled.folder / "index.json").read_text()
    shards(tmp_path)[0].unlink()
    for n in (0, 1):
        filled.read(TOKENS + n, make())
    assert len(shards(tmp_path)) == 2 and (filled.folder / "index.json").read_text() == index


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def one_bit_off(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def with_tokens_of_another_type(path: Path) -> None:
    """As good as new by its checksum."""
    with safe_open(path, framework="pt") as opened:
        key = opened.metadata()["key"]
    tensors = load_file(path) | {"tokens": TOKENS.to(torch.uint64)}
    save_file(tensors, path, {"key": key, "sha256": cache._checksum(tensors)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is truncated or no safetensors file"),
        (empty, "is truncated or no safetensors file"),
        (one_bit_off, "does not have|do not have the checksum"),
        (without_metadata, "holds other activations than its folder and name say"),
        (with_tokens_of_another_type, "holds|is damaged|is no"),
    ],
)
def test_damaged_shard_is_refused_by_name_and_the_mend_works(tmp_path: Path, damage: Callable, message: str) -> None:
    expected = a_cache(tmp_path).read(TOKENS, make())
    (path,) = shards(tmp_path)
    damage(path)
    with pytest.raises(FormatError, match=message) as caught:
        a_cache(tmp_path).read(TOKENS, make())
    assert str(path) in str(caught.value) and "Delete this file" in str(caught.value)
    path.unlink()
    assert torch.equal(a_cache(tmp_path).read(TOKENS, make()), expected)


def test_shards_of_other_tokens_or_models_are_refused(tmp_path: Path) -> None:
    for tokens, model in ((TOKENS, "m"), (TOKENS + 1, "m"), (TOKENS, "other")):
        a_cache(tmp_path, model).read(tokens, make())
    mine, other_model = a_cache(tmp_path).folder, a_cache(tmp_path, "other").folder
    (same_tokens,) = other_model.glob("*.safetensors")
    path = mine / same_tokens.name
    (other_tokens,) = set(mine.glob("*.safetensors")) - {path}
    for wrong in (other_tokens, same_tokens):
        path.write_bytes(wrong.read_bytes())
        with pytest.raises(FormatError, match="holds other activations"):
            a_cache(tmp_path).read(TOKENS, make())


def test_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    good = a_cache(tmp_path).read(TOKENS, make())
    before = sorted(tmp_path.rglob("*"))
    big = torch.ones(12, 2, 2, 500)
    with small_disk(), pytest.raises(NotWritten, match="could not be written .* Nothing half-written is left"):
        a_cache(tmp_path).read(TOKENS + 1, make(values=big))
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(a_cache(tmp_path).read(TOKENS, make()), good)


def test_a_run_stopped_while_a_shard_is_written_leaves_no_shard(tmp_path: Path, monkeypatch) -> None:
    def stopped(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        a_cache(tmp_path).read(TOKENS, make())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def count_runs(model, monkeypatch) -> list:
    calls: list = []
    real = model.run_with_cache
    monkeypatch.setattr(model, "run_with_cache", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_second_run_reads_what_the_first_wrote_and_gives_the_same_weights(
    model, tokens, make_config, tmp_path: Path, dtype: str, monkeypatch
) -> None:
    calls = count_runs(model, monkeypatch)
    cfg = make_config(cache_path=str(tmp_path / "cache"), cache_dtype=dtype)
    first = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    weights = first.run().state_dict()
    assert len(calls) == 9  # 57 prompts, 8 at a time, and 3 kept out: repeats of the dataset come from the cache
    second = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    again = second.run().state_dict()
    assert len(calls) == 9
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    # Another seed, fewer positions and left-out tokens need nothing new.
    other = make_config(
        cache_path=cfg.cache_path, cache_dtype=dtype, seed=1, seqpos_slice=(1, None), max_norm_ratio=5.0
    )
    CLTTrainingRunner(other, model=model, dataset=tokens).run()
    assert len(calls) == 9
    uncached = CLTTrainingRunner(make_config(), model=model, dataset=tokens)
    uncached.run()
    assert first.record.metrics.explained_variance == pytest.approx(
        uncached.record.metrics.explained_variance, abs=0.02
    )


def test_one_changed_weight_makes_another_cache(tokens, make_config, tmp_path: Path, monkeypatch) -> None:
    changed = tiny_model()
    cfg = make_config(cache_path=str(tmp_path), prefetch=False)
    dataset = opened(tokens, changed, cfg)
    calls = count_runs(changed, monkeypatch)
    with without_store_noise():
        for runs, change in ((2, 0.0), (2, 0.0), (4, 1e-3)):  # two forward passes fill the buffer
            changed.blocks[0].mlp.W_out.data[0, 0] += change
            next(batches_of(changed, dataset, cfg))
            assert len(calls) == runs
    assert len(list(tmp_path.iterdir())) == 2
