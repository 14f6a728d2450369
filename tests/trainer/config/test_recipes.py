"""trainer.config.recipes: numbers of the sources, and the views that a recipe accepts."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import UserError
from pipeline.store.spec import Spec
from pipeline.views.recipes import VIEW_RECIPES, view_recipe
from trainer.config.recipes import DOCUMENTATION, TRAIN_RECIPES, train_recipe
from trainer.models import STUDENTS
from trainer.run.options import check_views, default_recipe
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupConstant


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_every_recipe_names_a_student_views_and_a_source(name: str):
    recipe = train_recipe(name)
    assert recipe.views is None or recipe.views in VIEW_RECIPES
    assert recipe.student in STUDENTS
    assert recipe.source
    recipe_optimizer(recipe, WarmupConstant(0))


def test_unknown_recipe_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"--recipe=slow.*bit_flowers_fast, .*, default, demo"):
        train_recipe("slow")


def test_embedded_default_has_its_own_recipe(spec: Spec):
    assert default_recipe(spec) == "default"
    assert default_recipe(dataclasses.replace(spec, provenance={"embedded_default": True})) == "demo"


def test_recipe_for_any_views_accepts_any_store(spec: Spec):
    check_views("default", spec)


def test_recipe_accepts_its_own_views(spec: Spec):
    half = view_recipe("demo")
    check_views("demo", dataclasses.replace(spec, policy=half.policy, eval_crop=half.eval_crop))


def test_other_views_are_refused_with_every_difference_and_the_remedy(spec: Spec):
    half = view_recipe("demo")
    # Differences in the policy and in the evaluation crop.
    policy = dataclasses.replace(half.policy, image_size=24, flip_probability=0.5)
    eval_crop = dataclasses.replace(half.eval_crop, scale=1.25)
    with pytest.raises(UserError) as error:
        check_views("demo", dataclasses.replace(spec, policy=policy, eval_crop=eval_crop))
    message = str(error.value)
    assert "policy.image_size: 32 in the recipe, 24 in the store" in message
    assert "policy.flip_probability: 0.0 in the recipe, 0.5 in the store" in message
    assert "eval_crop.scale: 1.0 in the recipe, 1.25 in the store" in message
    assert "area_range" not in message
    assert "--recipe=demo" in message
    assert "--allow_recipe_mismatch" in message


@pytest.mark.parametrize(
    ("name", "epochs", "learning_rate", "weight_decay", "temperature"),
    [  # Beyer et al. 2021, table of hyper-parameters; big_vision configs/proj/distill
        ("bit_flowers_fast", 10_000, 0.003, 3e-4, 10),
        ("bit_flowers_medium", 100_000, 0.001, 1e-4, 1),
        ("bit_flowers_long", 1_000_000, 0.0003, 1e-5, 1),
        ("bit_pet_fast", 1_000, 0.01, 1e-3, 5),
        ("bit_pet_medium", 3_000, 0.003, 3e-4, 10),
        ("bit_pet_long", 30_000, 0.003, 1e-5, 2),
        ("bit_food_fast", 100, 0.01, 1e-3, 10),
        ("bit_food_medium", 1_000, 0.001, 3e-4, 10),
        ("bit_food_long", 3_000, 0.01, 1e-4, 5),
        ("bit_sun_fast", 100, 0.01, 1e-3, 10),
        ("bit_sun_medium", 1_000, 0.001, 1e-4, 10),
        ("bit_sun_long", 3_000, 0.01, 3e-5, 10),
        ("bit_i1k", 1_200, 0.03, 3e-4, 1),
    ],
)
def test_paper_recipes_have_the_papers_numbers(
    name: str, epochs: int, learning_rate: float, weight_decay: float, temperature: float
):
    recipe = train_recipe(name)
    assert (recipe.epochs, recipe.learning_rate, recipe.weight_decay) == (epochs, learning_rate, weight_decay)
    assert (recipe.temperature, recipe.student) == (temperature, "bit_r50x1")
    views, batch_size, warmup_steps = ("bit_i1k", 4096, 5000) if name == "bit_i1k" else ("bit", 512, 1500)
    assert (recipe.views, recipe.batch_size, recipe.warmup_steps) == (views, batch_size, warmup_steps)
    assert view_recipe(views).policy.mixup_block == batch_size
    assert (recipe.temperature_squared, recipe.decay_mode, recipe.clip) == (True, "scaled", "global")
    assert recipe.decay_kernels_only


def test_keras_example_is_as_published_with_a_warm_up_longer_than_the_run():
    recipe = train_recipe("keras_example")
    assert (recipe.batch_size, recipe.temperature, recipe.temperature_squared) == (64, 10, False)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.clip_norm) == (0.003, 0.001, 1.0)
    assert (recipe.decay_mode, recipe.decay_kernels_only, recipe.clip) == ("unscaled", False, "per_variable")
    assert recipe.epochs is not None
    assert recipe.warmup_steps is not None
    assert recipe.epochs * 1020 // recipe.batch_size < recipe.warmup_steps
    assert recipe.allow_short_run


@pytest.mark.parametrize("name", TRAIN_RECIPES)
def test_every_recipe_documents_command_cost_result_and_source(name: str):
    for heading in ("Command:", "Cost:", "Expected result:", "Source:"):
        assert heading in DOCUMENTATION[name]
