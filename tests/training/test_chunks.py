"""Which tokens are trained on, counted exactly, and chunks found again by their place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from tl_clt.errors import DatasetError
from tl_clt.training.data.batches import MOST_WITHOUT_ANY, ChunkPlace, Chunks, DataCounts, Rules

PASS = [torch.arange(12).reshape(3, 4), torch.arange(12, 24).reshape(3, 4), torch.arange(24, 32).reshape(2, 4)]
"""A dataset of 32 different tokens: two full chunks and a shorter one."""


def read(tokens: torch.Tensor) -> torch.Tensor:
    """Activations that say which token they are of; those of token 5 are huge."""
    norms = torch.where(tokens == 5, 1000.0, 1.0 + tokens / 100)
    return norms.flatten()[:, None, None, None].expand(-1, 2, 2, 3).clone()


def chunks(rules: Rules | None = None, data: list[torch.Tensor] | None = None) -> Chunks:
    return Chunks(lambda: iter(PASS if data is None else data), read, rules or Rules(), full=12)


def token_of(rows: torch.Tensor) -> list[int]:
    return ((rows[:, 0, 0, 0] - 1) * 100).round().int().tolist()


def test_chunks_come_again_and_again_with_the_same_ids() -> None:
    seen = list(islice(chunks().after(None), 5))
    assert [chunk.place for chunk in seen] == [
        ChunkPlace(0, 0),
        ChunkPlace(0, 1),
        ChunkPlace(0, 2),
        ChunkPlace(1, 0),
        ChunkPlace(1, 1),
    ]
    assert [chunk.ids.tolist() for chunk in seen[:3]] == [list(range(12)), list(range(12, 24)), list(range(24, 32))]
    for first, again in zip(seen[:2], seen[3:], strict=True):
        assert torch.equal(first.rows, again.rows) and torch.equal(first.ids, again.ids)
        assert first.tokens_digest == again.tokens_digest
    total = sum((chunk.counts for chunk in seen), DataCounts())
    assert total == DataCounts(epochs=1, prompts=14, kept=56)


def test_every_token_is_kept_or_left_out_for_one_counted_reason() -> None:
    rules = Rules(seqpos_slice=(1, None), excluded=torch.tensor([4, 6]), max_norm_ratio=10.0)
    chunk = next(chunks(rules).after(None))
    # First positions: 0, 4, 8. Excluded among the rest: 6. Outlier: 5.
    assert chunk.ids.tolist() == [1, 2, 3, 7, 9, 10, 11] == token_of(chunk.rows)
    assert chunk.counts == DataCounts(prompts=3, kept=7, other_positions=3, special_tokens=1, outliers=1)


@pytest.mark.parametrize("layer", [0, 1])
def test_outliers_are_those_of_any_layers_input_against_the_median_of_what_is_wanted(layer: int) -> None:
    activations = torch.ones(8, 2, 2, 3)
    activations[6, 0, layer] *= 3.1
    activations[7, 0, layer] *= 2.9
    activations[5, 1, layer] *= 100  # what a layer writes may be of two sizes
    tokens = torch.arange(8).reshape(2, 4)
    kept, counts = Rules(max_norm_ratio=3.0).choose(tokens, activations)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 7] and counts.outliers == 1
    # Five huge tokens that are left out anyway do not move the median.
    activations[:5] *= 1000
    kept, counts = Rules(excluded=torch.arange(5), max_norm_ratio=4.0).choose(tokens, activations)
    assert kept.tolist() == [5, 6, 7] and counts.outliers == 0


@pytest.mark.parametrize("place", [ChunkPlace(0, 0), ChunkPlace(0, 2), ChunkPlace(3, 1)])
def test_going_on_after_a_place_reads_without_the_model_what_was_before(place: ChunkPlace) -> None:
    all_chunks = chunks().after(None)
    seen = list(islice(all_chunks, 3 * place.epoch + place.index + 1))
    runs: list[int] = []

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        runs.append(int(tokens[0, 0]))
        return read(tokens)

    again = Chunks(lambda: iter(PASS), counted, Rules(), full=12).after(place, seen[-1].tokens_digest)
    for expected in islice(all_chunks, 4):
        chunk = next(again)
        assert chunk.place == expected.place and torch.equal(chunk.rows, expected.rows)
        assert (chunk.counts, chunk.tokens_digest) == (expected.counts, expected.tokens_digest)
    assert len(runs) == 4


def test_tokens_are_found_by_their_ids_with_one_run_a_chunk() -> None:
    runs: list[int] = []

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        runs.append(int(tokens[0, 0]))
        return read(tokens)

    ids = torch.tensor([30, 0, 25, 11])
    rows = Chunks(lambda: iter(PASS), counted, Rules(seqpos_slice=(0, 1)), full=12).find(ids)
    assert token_of(rows) == ids.tolist()
    assert runs == [0, 24]


def test_another_dataset_is_refused_on_going_on() -> None:
    digest = next(islice(chunks().after(None), 1, None)).tokens_digest
    changed = [PASS[0].flip(0), *PASS[1:]]
    for data in (changed, PASS[:1], []):
        with pytest.raises(DatasetError, match="other tokens than the run that is to be resumed"):
            next(chunks(data=data).after(ChunkPlace(0, 1), digest))
    with pytest.raises(DatasetError, match="other tokens"):
        chunks(data=PASS[:1]).find(torch.tensor([13]))


def test_a_dataset_of_which_nothing_is_left_is_told() -> None:
    everything_left_out: Iterator = chunks(Rules(excluded=torch.arange(32))).after(None)
    told = "No token is left to train on. Of 8 prompts 0 tokens were kept, and 32 special tokens left out. .*unknown"
    with pytest.raises(DatasetError, match=told):
        list(islice(everything_left_out, 10))


def test_a_long_text_of_which_nothing_is_left_is_not_read_to_its_end() -> None:
    endless = chunks(Rules(excluded=torch.arange(32)), data=PASS[:1] * (MOST_WITHOUT_ANY + 10)).after(None)
    assert len(list(islice(endless, MOST_WITHOUT_ANY))) == MOST_WITHOUT_ANY
    with pytest.raises(DatasetError, match="0 tokens were kept"):
        next(endless)


def test_a_text_whose_beginning_is_left_out_is_read_on() -> None:
    late = [PASS[0]] * (MOST_WITHOUT_ANY - 1) + [PASS[1], PASS[1]]
    found = chunks(Rules(excluded=torch.arange(12)), data=late).after(None)
    assert sum(len(chunk.rows) for chunk in islice(found, len(late) + 1)) == 24
