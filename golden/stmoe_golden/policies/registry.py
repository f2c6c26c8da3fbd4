# SPDX-License-Identifier: Apache-2.0
"""Policies by name, and a user's own from a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .adaptive_gating import AdaptiveGating
from .base import Policy
from .belady import Belady
from .lfu import Lfu
from .lru import Lru
from .on_demand import OnDemand
from .oracle import Oracle
from .ours import Ours
from .paper import Paper
from .pregated import Pregated
from .previous import Previous
from .static import Static

__all__ = ["POLICIES", "PolicyError", "load_policy_file"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Ours,
        OnDemand,
        Lru,
        Lfu,
        Static,
        Previous,
        Paper,
        Pregated,
        AdaptiveGating,
        Oracle,
        Belady,
    )
}
"""Every policy, in the order in which tables show them; ``lru`` is one of three forms there."""


class PolicyError(ValueError):
    """A policy that is not known, or a file that holds none; one line."""


def load_policy_file(path: str | Path) -> type[Policy]:
    """The one :class:`Policy` that a Python file defines.

    Raises
    ------
    PolicyError
        The file cannot be read or run, defines no policy or several, or one without a new name.
    """
    where = str(path)
    if not Path(path).is_file():
        raise PolicyError(f"{where}: no such file; a policy file is a Python file")
    spec = importlib.util.spec_from_file_location("stmoe_user_policy", path)
    if spec is None or spec.loader is None:
        raise PolicyError(f"{where}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise PolicyError(f"{where}: {type(error).__name__}: {error}") from None
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Policy) and item.__module__ == spec.name
    ]
    if len(found) != 1:
        raise PolicyError(f"{where}: must define one subclass of Policy, not {len(found)}")
    (policy,) = found
    if not policy.name or policy.name in POLICIES:
        raise PolicyError(
            f"{where}: {policy.__name__}.name must be new and not empty, not {policy.name!r}; "
            f"taken are {', '.join(POLICIES)}"
        )
    return policy
