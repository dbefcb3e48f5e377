"""The shuffling buffer: nothing lost, nothing twice, and the same order after going on from any batch."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from tests.training.test_chunks import chunks
from tl_clt.training.data.batches import Chunks, MixedBatches, Rules

SIZE, BATCH = 20, 4
LARGE = [torch.arange(start, min(start + 12, 1000)).reshape(-1, 4) for start in range(0, 1000, 12)]


def identity(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flatten()[:, None, None, None].expand(-1, 2, 1, 1).double()


def mixed(
    kept: int = 10, seed: int = 0, source: Chunks | None = None, position=None, wanted: int = 10_000
) -> MixedBatches:
    source = source or Chunks(lambda: iter(LARGE), identity, Rules(), full=12)
    after = source.after(None) if position is None else source.after(position.place, position.tokens_digest)
    batches = MixedBatches(after, size=SIZE, batch_size=BATCH, kept=kept, seed=seed, wanted=wanted)
    if position is not None:
        batches.go_on(position, source.find(position.ids) if len(position.ids) else None)
    return batches


def tokens_of(batches) -> list[list[int]]:
    return [batch[:, 0, 0, 0].int().tolist() for batch in batches]


@pytest.mark.parametrize("kept", [0, 10, 20])
def test_each_token_comes_once_a_pass_and_what_waits_is_in_the_position(kept: int) -> None:
    batches = mixed(kept)
    seen = [token for batch in tokens_of(islice(batches, 60)) for token in batch]
    assert len(seen) == 240 == len(set(seen))
    position = batches.position
    assert sorted(seen + position.ids.tolist()) == list(range(position.counts.kept))
    assert position.counts.prompts * 4 == position.counts.kept


def test_batches_mix_prompts_from_afar() -> None:
    seen = tokens_of(islice(mixed(), 50))
    assert all(len(batch) == BATCH for batch in seen)
    assert any(max(batch) - min(batch) > 2 * SIZE for batch in seen)
    assert seen != tokens_of(islice(mixed(seed=1), 50)) and seen == tokens_of(islice(mixed(), 50))


def test_order_does_not_depend_on_torchs_random_numbers() -> None:
    before = tokens_of(islice(mixed(), 20))
    torch.rand(1)
    state = torch.get_rng_state()
    assert tokens_of(islice(mixed(), 20)) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kept", [0, 10, 20])
def test_going_on_from_any_batch_gives_the_batches_that_would_have_come(kept: int) -> None:
    batches = mixed(kept)
    whole = tokens_of(islice(mixed(kept), 30))
    for done in range(25):
        again = mixed(kept, position=batches.position)
        assert tokens_of(islice(again, 5)) == whole[done : done + 5], done
        next(batches)


@pytest.mark.parametrize("kept", [0, 10, 20])
@pytest.mark.parametrize("wanted", [6, 12, 50, 61])
def test_no_more_is_read_than_is_wanted(kept: int, wanted: int) -> None:
    batches = mixed(kept, wanted=wanted)
    n_batches = -(-wanted // BATCH)
    seen = [token for batch in tokens_of(islice(batches, n_batches)) for token in batch]
    assert wanted <= len(seen) == len(set(seen)) and max(seen) < -(-wanted // 12) * 12
    assert batches.position.counts.kept == -(-wanted // 12) * 12


@pytest.mark.parametrize("wanted", [50, 61])
def test_going_on_is_the_same_to_the_last_batch_and_beyond(wanted: int) -> None:
    batches, n_batches = mixed(wanted=wanted), -(-wanted // BATCH)
    whole = tokens_of(islice(mixed(wanted=wanted), n_batches + 5))
    for done in range(n_batches + 2):
        assert tokens_of(islice(mixed(position=batches.position, wanted=wanted), 3)) == whole[done : done + 3], done
        next(batches)


def test_going_on_for_longer_cuts_no_batch_short() -> None:
    batches = mixed(wanted=51)
    list(islice(batches, 10))
    longer = mixed(position=batches.position, wanted=101)
    sizes = [len(batch) for batch in islice(longer, 15)]
    assert set(sizes) == {BATCH} and longer.position.counts.kept == 108


def test_going_on_after_passes_over_a_small_dataset() -> None:
    batches = mixed(source=chunks())
    list(islice(batches, 33))
    assert batches.position.counts.epochs == 4
    again = mixed(source=chunks(), position=batches.position)
    for _ in range(20):
        assert torch.equal(next(batches), next(again))
    assert again.position.counts == batches.position.counts
