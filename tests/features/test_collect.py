"""What a store says of each feature, against loops over all activations; and that who reads what does not matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.conftest import small_disk
from tests.features import cases
from tests.features.cases import Case, collect, same_files
from tests.models import tiny_clt
from tests.training.distributed.processes import Processes
from tl_clt import feature_acts
from tl_clt.errors import ConfigError, DatasetError, FormatError, MemoryLimit, NotWritten, OutputNotEmpty, PromptError
from tl_clt.features import FeatureStore, direct_logits, strongest_connections
from tl_clt.features import collect as module
from tl_clt.features.kept import rank_at_random
from tl_clt.lens import load_model, special_token_ids


@pytest.fixture(scope="module")
def case() -> Case:
    return cases.make_case()


@pytest.fixture(scope="module")
def store(case: Case, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return collect(case, tmp_path_factory.mktemp("stores") / "whole")


@pytest.fixture(scope="module")
def activations(case: Case) -> dict[int, torch.Tensor]:
    """By number of the prompt [pos, n_layers, d_transcoder], position 0 left out, without those held out."""
    held_out, left = {}, {1: 40, 3: 40}
    for number, tokens in enumerate(case.prompts):
        part = number % 4
        if part in left and left[part] > 0:
            left[part] -= len(tokens)
            held_out[number] = part
    found = {n: feature_acts(case.model, case.clt, t) for n, t in enumerate(case.prompts) if n not in held_out}
    for acts in found.values():
        acts[0] = 0
    return found


@pytest.fixture(scope="module")
def of_text(activations: dict[int, torch.Tensor]) -> torch.Tensor:
    """All of them, one after another."""
    return torch.cat([acts[1:] for acts in activations.values()])


FEATURES = [(layer, feature) for layer in range(3) for feature in range(12)]


def test_density_maximum_and_histogram_are_those_of_all_activations(store: FeatureStore, of_text: torch.Tensor):
    assert store.n_tokens == len(of_text)
    for layer, feature in FEATURES:
        record, values = store[layer, feature], [v for v in of_text[:, layer, feature].tolist() if v > 0]
        assert record.n_active == len(values)
        assert record.density == len(values) / len(of_text)
        # Batches of other sizes add in another order.
        assert record.max_activation == pytest.approx(max(values, default=0), rel=1e-5)
        edges, counts = record.histogram
        assert sum(counts) == len(values)
        for low, high, n in zip(edges, edges[1:], counts, strict=False):
            assert n == sum(low <= v < high for v in values)


def peaks(activations: dict[int, torch.Tensor], layer: int, feature: int) -> dict[int, tuple[float, int]]:
    """Greatest activation of a feature in each prompt in which it is active, and where it is."""
    found = {}
    for number, acts in activations.items():
        value, at = acts[:, layer, feature].max(dim=0)
        if value > 0:
            found[number] = (float(value), int(at))
    return found


def test_examples_are_the_greatest_peaks_and_quarters_of_a_random_sample(
    case: Case, store: FeatureStore, activations: dict[int, torch.Tensor]
):
    seen_bands = set()
    for layer, feature in FEATURES:
        found = peaks(activations, layer, feature)
        by_peak = sorted(found, key=lambda n: -found[n][0])
        flat = torch.tensor([layer * 12 + feature])
        ranks = {n: int(rank_at_random(flat, torch.tensor([n]), torch.ones(1, 1))) for n in found}
        sample = sorted(found, key=lambda n: ranks[n])[: 4 * module.SAMPLED_PER_BAND]
        expected = [("top", n) for n in by_peak[:3]]
        ordered = sorted(sample, key=lambda n: found[n][0])
        for band, name in zip((3, 2, 1, 0), ("0.75-1.0", "0.5-0.75", "0.25-0.5", "0.0-0.25"), strict=True):
            members = [n for place, n in enumerate(ordered) if place * 4 // len(ordered) == band]
            shown = sorted(members, key=lambda n: ranks[n])[:2]
            expected += [(name, n) for n in sorted(shown, key=lambda n: -found[n][0]) if n not in by_peak[:3]]
        record = store[layer, feature]
        assert [e.quantile for e in record.examples] == [name for name, _ in expected]
        for example, (name, number) in zip(record.examples, expected, strict=True):
            seen_bands.add(name)
            value, at = found[number]
            first, last = max(0, at - 4), min(len(case.prompts[number]), at + 3)
            assert example.position == at - first
            assert example.tokens == [f"#{t}" for t in case.prompts[number][first:last].tolist()]
            # float16 keeps eleven bits of the share of the peak.
            wanted = activations[number][first:last, layer, feature].tolist()
            assert example.activations == pytest.approx(wanted, rel=2**-10, abs=1e-6)
            assert example.activations[example.position] == pytest.approx(value, rel=1e-5)
    assert seen_bands == {"top", "0.75-1.0", "0.5-0.75", "0.25-0.5", "0.0-0.25"}


def test_a_random_sample_takes_prompts_alike():
    """Of 400 prompts each of 2,000 features keeps the 20 of lowest rank: a prompt is kept 100 times, give or take."""
    n, prompts = 2000, torch.arange(400)
    ranks = rank_at_random(torch.arange(n), prompts, torch.ones(n, 400))
    kept = torch.bincount(ranks.argsort(dim=1)[:, :20].flatten(), minlength=400)
    # Standard deviation 9.7: none of 400 is five of them off.
    assert int(kept.min()) > 50 and int(kept.max()) < 150


def test_output_tokens_and_connections_are_products_of_weights(case: Case, store: FeatureStore):
    model, clt = case.model, case.clt
    logits = direct_logits(model, clt, 1, [7])[0]
    record = store[1, 7]
    assert [pair.token for pair in record.top_logits] == [f"#{i}" for i in logits.topk(4).indices.tolist()]
    assert [pair.value for pair in record.bottom_logits] == pytest.approx(logits.sort().values[:4].tolist(), rel=1e-5)
    norm = clt.decoder_rows(1, [7]).norm()
    assert record.decoder_norm == pytest.approx(float(norm), rel=1e-5)

    active = store.statistics()["n_active"] > 0
    for layer, feature in ((0, 3), (1, 7), (2, 1)):
        weights = {}
        for other_layer, other in FEATURES:
            (s, i), (t, j) = sorted([(layer, feature), (other_layer, other)])
            if s == t or not active[other_layer, other] or not active[layer, feature]:
                continue
            written = sum(clt.W_dec[s][i, target - s] for target in range(s, t))
            weights[other_layer, other] = float(written @ clt.W_enc[t][:, j])
        wanted = sorted(weights, key=lambda place: -abs(weights[place]))[:5]
        found = store[layer, feature].connected
        assert [(c.layer, c.feature) for c in found] == wanted
        assert [c.weight for c in found] == pytest.approx([weights[place] for place in wanted], rel=1e-4)


def test_connections_among_few_features_are_fewer(case: Case):
    among = torch.zeros(3, 12, dtype=torch.bool)
    among[0, 2] = among[2, 5] = True
    found = strongest_connections(case.clt, 3, among)
    assert found.partner[0, 2].tolist() == [29, -1, -1] and found.partner[2, 5].tolist() == [2, -1, -1]
    assert (found.partner[1] == -1).all()


def test_special_tokens_are_left_out_as_in_training():
    sae_lens = pytest.importorskip("sae_lens.util")
    model = load_model("atlas")
    assert special_token_ids(model) == sorted(sae_lens.get_special_token_ids(model.tokenizer))
    wanted = module.counted_tokens(torch.tensor([[5, 1, 7], [1, 1, 9]]), torch.tensor([1, 0]))
    assert wanted.tolist() == [[False, False, True], [False, False, True]]


def test_a_prompt_that_cannot_be_taken_is_named_before_the_pass(case: Case, tmp_path):
    wrong = case._replace(prompts=[*case.prompts, torch.tensor([5])])
    with pytest.raises(PromptError, match=r"^prompts\[90\]: The prompt is 1 token long"):
        collect(wrong, tmp_path / "s")
    assert not (tmp_path / "s").exists()


class Cut(Exception):
    """Ends a pass in its midst."""


def test_a_resumed_pass_makes_the_same_store(case: Case, store: FeatureStore, tmp_path, monkeypatch):
    added, add = count(), module.Collected.add
    monkeypatch.setattr(module, "BATCHES_BETWEEN_FILES", 2)

    def cut(self, *args):
        if next(added) == 5:
            raise Cut
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module.Collected, "add", cut)
        with pytest.raises(Cut):
            collect(case, tmp_path / "s")
    with pytest.raises(FormatError, match="unfinished store.*resume=True"):
        FeatureStore.open(tmp_path / "s")
    with pytest.raises(OutputNotEmpty, match="resume=True"):
        collect(case, tmp_path / "s")
    with pytest.raises(ConfigError, match="n_top 3 -> 4"):
        collect(case, tmp_path / "s", n_top=4, resume=True)
    with pytest.raises(DatasetError, match="another text"):
        collect(case._replace(prompts=case.prompts[::-1]), tmp_path / "s", resume=True)
    with pytest.raises(DatasetError, match="another text"):
        collect(case._replace(prompts=case.prompts[:1]), tmp_path / "s", resume=True)
    passed = []
    monkeypatch.setattr(module.Collected, "add", lambda self, *args: (passed.append(1), add(self, *args)))
    collect(case, tmp_path / "s", resume=True)
    same_files(tmp_path / "s", store.folder)
    n_resumed = len(passed)
    collect(case, tmp_path / "whole")
    assert n_resumed == len(passed) - n_resumed - 4  # the four batches that were written are not read again


def test_a_full_disk_before_anything_was_read_leaves_nothing(case: Case, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a" / "s", tmp_path / "empty"):
        with (
            small_disk(),
            pytest.raises(NotWritten, match="part-0.*could not be written.*Nothing half-written is left"),
        ):
            collect(case, folder)
    assert not list((tmp_path / "empty").iterdir()) and not list((tmp_path / "a").glob("*"))


@pytest.mark.parametrize("when", ["in the pass", "at its end"])
def test_a_full_disk_keeps_what_was_read(case: Case, store: FeatureStore, tmp_path: Path, monkeypatch, when: str):
    monkeypatch.setattr(module, "BATCHES_BETWEEN_FILES", 2)
    written, write, finish = count(), module.Collected.write, module._finish

    def fills(self, path):
        with small_disk() if next(written) == 1 and when == "in the pass" else nullcontext():
            write(self, path)

    def fills_at_its_end(*args):
        with small_disk() if when == "at its end" else nullcontext():
            finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module.Collected, "write", fills)
        patch.setattr(module, "_finish", fills_at_its_end)
        with pytest.raises(NotWritten, match=r"What was read before is kept in '.*s': the same call with resume=True"):
            collect(case, tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["unfinished"]
    collect(case, tmp_path / "s", resume=True)
    same_files(tmp_path / "s", store.folder)


def test_an_error_does_not_remove_what_another_call_began(case: Case, tmp_path: Path):
    begun = tmp_path / "s" / "unfinished" / "features.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    with pytest.raises(OutputNotEmpty):
        collect(case, tmp_path / "s")
    with pytest.raises(FormatError):
        collect(case, tmp_path / "s", resume=True)
    assert begun.read_text() == "{}"


def test_a_finished_store_is_given_back_to_whoever_asks_for_the_same(case: Case, tmp_path: Path, monkeypatch):
    made = collect(case, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(module.Collected, "add", lambda *args: pytest.fail("read again"))
        assert collect(case, tmp_path / "s", resume=True).folder == made.folder
        with pytest.raises(
            ConfigError, match="was made with other settings \\(n_top 3 -> 4\\).*Give the same, or a new"
        ):
            collect(case, tmp_path / "s", n_top=4, resume=True)
        with pytest.raises(ConfigError, match="was made with another CLT"):
            collect(case._replace(clt=tiny_clt(case.model, d_transcoder=12, seed=9)), tmp_path / "s", resume=True)
        with pytest.raises(DatasetError, match="was made of another text"):
            collect(case._replace(prompts=case.prompts[::-1]), tmp_path / "s", resume=True)
        with pytest.raises(DatasetError, match="was made of another text"):
            collect(case._replace(prompts=case.prompts[:2]), tmp_path / "s", resume=True)
        with pytest.raises(OutputNotEmpty, match="not empty"):
            collect(case, tmp_path / "s")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(2, tmp_path_factory.mktemp("meeting-points"))
    yield started
    started.close()


def test_two_processes_make_the_same_store(processes: Processes, store: FeatureStore, tmp_path: Path):
    processes.run(2, cases.collect_on_rank, str(tmp_path / "s"))
    same_files(tmp_path / "s", store.folder)


def test_an_error_on_one_process_is_one_on_all(processes: Processes, tmp_path: Path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("mine")
    with pytest.raises(AssertionError, match="OutputNotEmpty"):
        processes.run(2, cases.collect_on_rank, str(tmp_path / "s"))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["mine.txt"]


def test_order_of_prompts_changes_no_statistics(case: Case, store: FeatureStore, tmp_path: Path):
    """With nothing held out, density and histogram do not depend on the order of the text."""
    one = collect(case, tmp_path / "one", label_tokens=0)
    other = collect(case._replace(prompts=case.prompts[::-1]), tmp_path / "other", label_tokens=0)
    assert torch.equal(one.statistics()["n_active"], other.statistics()["n_active"])
    assert one[1, 3].histogram == other[1, 3].histogram


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_top": 0}, "n_top is 0"),
        ({"n_per_band": 7}, "the prompts sampled for a quarter"),
        ({"before": -1}, "before is -1"),
        ({"n_logits": 65}, "the size of the vocabulary"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(case: Case, tmp_path: Path, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        collect(case, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_memory_is_known_before_the_work_starts(case: Case, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryLimit, match="lower n_top"):
        collect(case, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_text_may_be_a_file_and_ends_at_max_tokens(tmp_path: Path):
    from tl_clt import load_organism

    model, clt = load_organism("atlas")
    (tmp_path / "text.txt").write_text("Dallas is a city in Texas .\nthe capital of Texas is Austin .\n" * 20)
    store = module.collect_features(
        model, clt, str(tmp_path / "text.txt"), tmp_path / "s", max_tokens=60, label_tokens=0, progress=False
    )
    assert 60 <= store.n_tokens < 120
    record = next(store[0, f] for f in range(256) if store[0, f].examples)
    assert {"Texas"} & set(record.examples[0].tokens)
    assert json.loads((tmp_path / "s" / "features.json").read_text())["text"]["n_tokens"] == store.n_tokens
