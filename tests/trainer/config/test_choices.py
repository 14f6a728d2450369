"""trainer.config.choices: values of flags equal those of the modules that implement them."""

from __future__ import annotations

import pytest

from pipeline.cli.choices import CODECS
from pipeline.store.codecs import make_codec
from trainer import models
from trainer.config import choices
from trainer.models import bit
from trainer.targets import arms


def test_names_are_those_of_the_modules() -> None:
    assert tuple(models.STUDENTS) == choices.STUDENTS
    assert tuple(bit.BIT_MODELS) == choices.BIT_MODELS
    assert tuple(models.PRECISIONS) == choices.PRECISIONS
    assert tuple(arms.ARMS) == choices.ARMS
    assert tuple(name for name, arm in arms.ARMS.items() if arm.live) == choices.LIVE_ARMS
    assert arms.OFFLINE.name == choices.DEFAULT_ARM


@pytest.mark.parametrize("name", CODECS)
def test_every_named_codec_can_be_made(name: str) -> None:
    assert make_codec(name.replace("K", "3"), 10, temperature=1.0).num_classes == 10
