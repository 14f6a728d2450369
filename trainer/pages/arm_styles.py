"""Chart styles of the arms of a comparison: color, dash pattern and marker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.pages.svg import DRAWN

Dashes = tuple[float, tuple[float, ...] | None]


@dataclasses.dataclass(frozen=True)
class ArmStyle:
    """The style of an arm.

    Attributes:
      color: Name of a color of `pipeline.pages.svg`.
      dashes: Offset and pattern, in line widths.
      order: Drawing order; higher arms are on top.
    """

    color: str
    dashes: Dashes
    marker: str
    width: float = 1.6
    opacity: float = 1.0
    order: int = 3

    def line(self) -> dict[str, Any]:
        """Matplotlib settings of a line without markers."""
        return {
            "color": DRAWN[self.color],
            "linestyle": self.dashes,
            "linewidth": self.width,
            "alpha": self.opacity,
            "zorder": self.order,
        }


# Offline is a thin dashed line on top of online's broad one, so that both are visible where they coincide.
ARM_STYLES = {
    "offline": ArmStyle("blue", (0, (3.2, 1.6)), "s", 1.5),
    "online": ArmStyle("orange", (0, None), "o", 2.8, 0.75, 2),
    "fixed": ArmStyle("purple", (0, (1, 1.2)), "^", 1.9),
    "independent": ArmStyle("green", (0, (5, 1.4, 1, 1.4)), "D"),
    "consistent": ArmStyle("grey", (0, (8, 1.6)), "v"),
}
_OTHER = ArmStyle("olive", (0, None), "P")


def arm_style(arm: str) -> ArmStyle:
    """The style of an arm."""
    return ARM_STYLES.get(arm, _OTHER)


def arm_order(arms: Sequence[str]) -> list[str]:
    """Distinct arms in the order of every chart and table: known arms first."""
    known = [arm for arm in ARM_STYLES if arm in arms]
    return known + sorted(set(arms) - set(known))


_SHAPES = {
    "o": '<circle cx="17" cy="7" r="3.4"/>',
    "s": '<rect x="14" y="4" width="6" height="6"/>',
    "^": '<path d="M17 3l4 7h-8z"/>',
    "v": '<path d="M17 11l4-7h-8z"/>',
    "D": '<path d="M17 2.6l4.4 4.4l-4.4 4.4l-4.4-4.4z"/>',
    "P": '<path d="M15.5 3h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z"/>',
}


def arm_key(arm: str) -> str:
    """A sample of an arm's line as an SVG element of 34 x 14 pixels, for use in text."""
    style = arm_style(arm)
    dashes = (
        "" if style.dashes[1] is None else " ".join(f"{style.width * part:.1f}" for part in style.dashes[1])
    )
    color = f"var(--{style.color})"
    return (
        '<svg class="key" viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">'
        f'<path d="M0 7h34" style="stroke: {color}; stroke-width: {style.width}; stroke-dasharray: {dashes or "none"}"/>'
        f'<g style="fill: {color}">{_SHAPES[style.marker]}</g></svg>'
    )
