"""The table of view policies, and choosing one by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.errors import UserError
from pipeline.storage.checked_json import ShapeError, build
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light

POLICIES: dict[str, type[ViewPolicy]] = {kind.name: kind for kind in (Inception, Light)}


def parameters(kind: type[ViewPolicy]) -> set[str]:
    """Names of a policy's parameters."""
    return {field.name for field in dataclasses.fields(kind)}


def change_policy(policy: ViewPolicy, *, name: str | None = None, **changes: Any) -> ViewPolicy:
    """A policy with some of its parameters changed.

    Args:
      policy: the policy to start from.
      name: name of another policy; it takes over the parameters that both have. By default the same policy.
      **changes: parameters by name. None leaves a parameter unchanged. Parameters that the policy lacks are left out.

    Raises:
      UserError: no policy has that name, or a parameter is out of range.
    """
    if name is not None and name not in POLICIES:
        raise UserError(f"`policy`={name}: expected one of {', '.join(POLICIES)}")
    kind = type(policy) if name is None else POLICIES[name]
    values = {**vars(policy), **{key: value for key, value in changes.items() if value is not None}}
    return kind(**{key: value for key, value in values.items() if key in parameters(kind)})


def policy_from_json(tree: Any, *, path: str = "") -> ViewPolicy:
    """The inverse of `ViewPolicy.to_json`.

    Raises:
      ShapeError: no policy has that name, or a parameter is unknown or out of range.
    """
    fields = dict(build(dict[str, Any], tree, path=path))
    name = build(str, fields.pop("name", None), path=f"{path}.name")
    if name not in POLICIES:
        raise ShapeError(f"{path}.name", f"expected one of {', '.join(POLICIES)}, got {name!r:.100}")
    return build(POLICIES[name], fields, path=path)
