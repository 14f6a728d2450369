"""trainer.pages.arm_styles: arms differ in more than color."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from trainer.pages.arm_styles import ARM_STYLES, arm_key, arm_order
from trainer.targets.arms import ARMS


def test_arms_differ_without_color() -> None:
    styles = ARM_STYLES.values()
    assert len({style.marker for style in styles}) == len({style.dashes for style in styles}) == len(styles)
    assert arm_order(["zeta", "consistent", "offline", "zeta", "online"]) == [
        "offline",
        "online",
        "consistent",
        "zeta",
    ]
    for arm in [*ARM_STYLES, "zeta"]:
        ET.fromstring(arm_key(arm))


def test_every_arm_has_its_own_style() -> None:
    assert set(ARM_STYLES) == set(ARMS)
