"""pipeline.views.recipes: the published numbers."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import UserError
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.recipes import VIEW_RECIPES, view_recipe


def test_bit_is_as_in_the_paper() -> None:
    """Beyer et al. 2021: Inception crops of 5-100 %, a folded ratio a batch of 512, 160 then central 128."""
    recipe = view_recipe("bit")
    policy = recipe.policy
    assert (policy.name, policy.image_size, policy.area_range) == ("inception", 128, (0.05, 1.0))
    assert (policy.mixup, policy.mixup_fold, policy.mixup_block) == (True, True, 512)
    assert policy.flip_probability == 0.5
    assert recipe.eval_crop == EvalCrop(kind="resize_small", scale=160 / 128)


def test_bit_i1k_has_the_crops_of_bit_at_224_pixels() -> None:
    """big_vision's bit_i1k.py: batches of 4,096, evaluation on the central 224 pixels of a short side of 256."""
    bit, recipe = view_recipe("bit").policy, view_recipe("bit_i1k")
    assert recipe.policy == dataclasses.replace(bit, image_size=224, mixup_block=4096)
    assert round(recipe.eval_crop.scale * 224) == 256
    assert recipe.temperature == 1


def test_keras_example_is_as_published() -> None:
    """Resize to 160, window of 128, an unfolded ratio a batch of 64; evaluation on the central 87.5 %."""
    recipe = view_recipe("keras_example")
    policy = recipe.policy
    assert (policy.name, policy.image_size, policy.canvas_size) == ("light", 128, 160)
    assert (policy.mixup, policy.mixup_fold, policy.mixup_block) == (True, False, 64)
    assert recipe.eval_crop == EvalCrop(kind="central", scale=0.875)
    assert recipe.temperature == 10


def test_demo_never_flips_digits() -> None:
    assert view_recipe("demo").policy.flip_probability == 0


def test_every_recipe_has_a_source() -> None:
    assert all(recipe.source for recipe in VIEW_RECIPES.values())


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"`recipe`=vit: .*keras_example, bit, bit_i1k, demo"):
        view_recipe("vit")
