"""The view half of the recipes: the views of published training setups.

Views are fixed when the store is written, so this half belongs to the precompute. The training half is `trainer.config.recipes`.
Comments give the source of each number.
"""

from __future__ import annotations

import dataclasses

from pipeline.errors import UserError
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """The view half of a recipe.

    Attributes:
      policy: view policy.
      eval_crop: evaluation crop.
      temperature: softmax temperature at which the codec's cost is measured.
      source: paper or example that the numbers are from.
    """

    policy: ViewPolicy
    eval_crop: EvalCrop
    temperature: float
    source: str


# Beyer et al. 2021, section 3 and appendix; big_vision's configs/proj/distill/bigsweep_flowers_pet.py and bigsweep_food_sun.py:
# Inception crops of 5-100 %, flips, one ratio per batch of 512, folded to 0.5..1, evaluation on the central 128 pixels of a short
# side of 160.
_BIT = Inception(image_size=128, area_range=(0.05, 1.0), mixup=True, mixup_fold=True, mixup_block=512)
_BIT_EVAL = EvalCrop(kind="resize_small", scale=1.25)

VIEW_RECIPES: dict[str, ViewRecipe] = {
    # Keras's knowledge_distillation_recipes (2021): resize to 160, windows of 128, one unfolded ratio per batch of 64, evaluation on
    # the central 87.5 %. Its partners are the reversed batch, which contains each pair twice. Here the partner is the next view; this
    # is the only intended difference.
    "keras_example": ViewRecipe(
        policy=Light(image_size=128, mixup=True, mixup_fold=False, mixup_block=64),
        eval_crop=EvalCrop(kind="central", scale=0.875),
        temperature=10.0,
        source="Keras example knowledge_distillation_recipes",
    ),
    "bit": ViewRecipe(
        policy=_BIT, eval_crop=_BIT_EVAL, temperature=10.0, source="Beyer et al. 2021 (arXiv 2106.05237)"
    ),
    # big_vision's configs/proj/distill/bit_i1k.py: the same crops at 224 pixels, one ratio per batch of 4,096, folded by
    # u.get_mixup, evaluation on the central 224 pixels of a short side of 256.
    "bit_i1k": ViewRecipe(
        policy=dataclasses.replace(_BIT, image_size=224, mixup_block=4096),
        eval_crop=EvalCrop(kind="resize_small", scale=256 / 224),
        temperature=1.0,
        source="Beyer et al. 2021 (arXiv 2106.05237), ImageNet; big_vision configs/proj/distill/bit_i1k.py",
    ),
    # Chosen for 28 x 28 digits: no flips, which change characters, and no boxes below half of the image, which miss the digit.
    "demo": ViewRecipe(
        policy=Inception(
            image_size=32,
            area_range=(0.5, 1.0),
            flip_probability=0.0,
            mixup=True,
            mixup_fold=True,
        ),
        eval_crop=EvalCrop(kind="resize_small", scale=1.0),
        temperature=2.0,
        source="this project, for the embedded default",
    ),
}


def view_recipe(name: str) -> ViewRecipe:
    """The view half of a recipe.

    Raises:
      UserError: there is no recipe with that name.
    """
    if name not in VIEW_RECIPES:
        raise UserError(f"`recipe`={name}: expected one of {', '.join(VIEW_RECIPES)}")
    return VIEW_RECIPES[name]
