"""Attention masks and padding, on either side: hooks must give each prompt what it gets by itself."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.models import Model, randomise, save_hf, tiny_clt, tiny_hf
from tl_clt import Intervention, attach, intervene, intervention_hooks, load_model
from tl_clt.errors import InterventionError, PromptError
from tl_clt.interventions import DirectionIntervention, Freeze, InterventionEffect

PROMPTS = ["w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12 w13"]
CHANGES = {
    "nothing": [],
    "a feature everywhere": [Intervention(layer=0, feature=3, value=20)],
    "the last token": [Intervention(layer=1, pos=-1, feature=[3, 5], value=[9.0, 20.0])],
    "the second token on": [Intervention(layer=0, pos=slice(1, None), feature=4, add=15)],
    "one prompt": [Intervention(layer=1, pos=1, prompt=1, feature=3, value=20)],
    "noise": [Intervention(layer=0, pos=-1, feature=3, noise=20)],
    "a direction": [DirectionIntervention(layer=0, pos=1, vector=torch.ones(32), add=2)],
}
# In float32 (Hugging Face's masks overflow in float64): attention adds up other numbers of terms when padded, and the
# largest values are about 100, so that a hundred roundings of them come to 1e-3.
CLOSE = {"rtol": 0, "atol": 1e-3}


@pytest.fixture(scope="module", params=[f"{b}-{f}" for b in ("hooked", "bridge") for f in ("gpt2", "llama")])
def padding(request, tmp_path_factory) -> Model:
    backend, family = request.param.split("-")
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = load_model(save_hf(tiny_hf(family), folder), backend=backend, dtype=torch.float32)
    if isinstance(model, HookedTransformer):
        randomise(model, 0)
    return model


@pytest.fixture(params=["left", "right"])
def side(request, padding: Model):
    before = padding.tokenizer.padding_side
    padding.tokenizer.padding_side = request.param
    yield request.param
    padding.tokenizer.padding_side = before


def padded(model: Model, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded with id 2."""
    rows = [model.to_tokens(text)[0] for text in PROMPTS]
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), 2), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask


@pytest.fixture(scope="module")
def alone(padding: Model) -> Callable[..., InterventionEffect]:
    """What a prompt gets when it runs by itself, which knows nothing of sides: run once for both."""
    clt = tiny_clt(padding, skip=True, dtype=torch.float32)

    @functools.cache
    def run(row: int, change: str, through_layer: int | None, freeze: Freeze) -> InterventionEffect:
        kept = [c for c in CHANGES[change] if c.prompt in (None, row)]
        own = [type(c)(**{**vars(c), "prompt": None}) for c in kept]
        return intervene(padding, clt, PROMPTS[row], own, through_layer, freeze)

    return run


@pytest.mark.parametrize("freeze", ["attention", "none", "all"])
@pytest.mark.parametrize("through_layer", [None, 1])
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "noise"])
def test_each_prompt_of_a_batch_gets_what_it_gets_by_itself(padding: Model, alone, side, change, through_layer, freeze):
    clt = tiny_clt(padding, skip=True, dtype=torch.float32)
    tokens, mask = padded(padding, side)
    batch = intervene(padding, clt, PROMPTS, CHANGES[change], through_layer, freeze)
    given = intervene(padding, clt, tokens, CHANGES[change], through_layer, freeze, attention_mask=mask)
    assert batch.attention_mask is not None and torch.equal(batch.attention_mask, mask)
    for row in range(len(PROMPTS)):
        one = alone(row, change, through_layer, freeze)
        own = mask[row].bool()
        for effect in (batch, given):
            torch.testing.assert_close(effect.baseline_logits[row, own], one.baseline_logits[0], **CLOSE)
            torch.testing.assert_close(effect.logits[row, own], one.logits[0], **CLOSE)
            torch.testing.assert_close(effect.feature_acts[row, own], one.feature_acts[0], **CLOSE)
        top = batch.top_changes(3)
        moved = [torch.tensor(table.change.tolist()) for table in (top[top.prompt == row], one.top_changes(3))]
        torch.testing.assert_close(*moved, **CLOSE)


def test_clean_runs_of_hooks_see_the_mask_of_the_call(padding: Model, side: str):
    """Under an empty list of interventions the model gives what it gives without hooks."""
    clt, (tokens, mask) = tiny_clt(padding, dtype=torch.float32), padded(padding, side)
    with torch.no_grad():
        for call in ({}, {"attention_mask": mask}):
            expected = padding(tokens, **call)
            for through_layer, freeze in ((None, "attention"), (1, "all"), (2, "none")):
                hooks = intervention_hooks(padding, clt, tokens, [], through_layer, freeze)  # type: ignore[arg-type]
                with padding.hooks(fwd_hooks=hooks):
                    torch.testing.assert_close(padding(tokens, **call)[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_generation_from_unequal_prompts(padding: Model, side: str, cache: bool, within: bool):
    """An empty list of interventions changes no word; and steering steers each prompt as if it were alone."""
    clt = tiny_clt(padding, dtype=torch.float32)
    steer = [Intervention(layer=0, pos=slice(2, None), feature=3, value=30)]

    def generate(prompts, hooks: list) -> Tensor:
        with torch.no_grad(), padding.hooks(fwd_hooks=hooks):
            return padding.generate(
                prompts,
                max_new_tokens=4,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=cache,
                return_type="tokens",
                verbose=False,
            )[:, -4:].clone()

    def both() -> tuple[Tensor, Tensor]:
        hooks = [intervention_hooks(padding, clt, PROMPTS, change, freeze="attention") for change in ([], steer)]
        return generate(PROMPTS, hooks[0]), generate(PROMPTS, hooks[1])

    own = generate(PROMPTS, [])
    if within:
        with attach(padding, clt, "replace_with_error"):
            nothing, steered = both()
    else:
        nothing, steered = both()
    assert torch.equal(nothing, own)
    assert not torch.equal(steered, own)
    if side == "left":
        for row, text in enumerate(PROMPTS):
            assert torch.equal(generate(text, [])[0], own[row])
            one = generate(text, intervention_hooks(padding, clt, text, steer, freeze="attention"))
            assert torch.equal(one[0], steered[row])


def test_noise_is_drawn_anew_for_each_prompt(padding: Model, side: str):
    effect = intervene(padding, tiny_clt(padding, dtype=torch.float32), PROMPTS, CHANGES["noise"])
    changed = effect.feature_acts - effect.baseline_feature_acts
    drawn = {round(float(row.abs().amax()), 6) for row in changed[:, :, 0, 3]}
    assert len(drawn) == 3


def test_what_listens_to_masks_goes_with_the_hooks(padding: Model):
    def listening() -> int:
        inner = [] if isinstance(padding, HookedTransformer) else padding.original_model.modules()
        return sum(len(m._forward_pre_hooks) for m in {*padding.modules(), *inner})

    clt = tiny_clt(padding, dtype=torch.float32)
    padding(PROMPTS[0])  # A bridge sets up hooks of its own on the first call.
    before = listening()
    intervene(padding, clt, PROMPTS[0], [])
    assert listening() == before
    hooks = intervention_hooks(padding, clt, PROMPTS[0], [])
    assert len(hooks) and listening() == before + 1
    del hooks
    gc.collect()
    assert listening() == before


def test_masks_and_positions_that_do_not_fit(padding: Model):
    clt, (tokens, mask) = tiny_clt(padding, dtype=torch.float32), padded(padding, "left")
    gap = mask.clone()
    gap[0, -2] = 0
    for prompts, wrong, message in (
        (tokens, mask[:, 1:], "attention_mask has shape"),
        (PROMPTS, mask, "padded already"),
        (tokens, gap, "gap"),
        (tokens, torch.zeros_like(mask), "0 tokens long"),
    ):
        with pytest.raises(PromptError, match=message):
            intervene(padding, clt, prompts, [], attention_mask=wrong)
    with pytest.raises(InterventionError, match="no position 4. The prompt has 3 tokens"):
        intervene(padding, clt, PROMPTS, [Intervention(layer=0, pos=4, feature=0, value=1)])
    intervene(padding, clt, PROMPTS, [Intervention(layer=0, pos=4, feature=0, value=1, prompt=0)])
