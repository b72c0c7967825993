"""Rematerialisation by block: which blocks compute what again in the backward pass, and keep less for it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

# What the backward pass of a block keeps besides its inputs; None is nothing.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
NONE = "none"  # the block computes nothing again

_SHORT = {"none": [], "blocks": [".=full"]}


def block_policies(rules: str, paths: Sequence[str]) -> dict[str, str]:
    """Reads `config.model.remat`.

    Args:
        rules: "PATTERN=POLICY,...", or "none", or "blocks" (".=full"). The first pattern that `re.search` finds in a
            block's path decides; a block that none is found in has the policy none. Patterns have no commas.
        paths: of all blocks, "backbone/stage_0_block_0".

    Returns:
        Path to policy: "none" or one of `POLICIES`.

    Raises:
        ValueError: an entry is no rule, a policy is unknown, or a pattern is no regular expression or in no path.
    """
    policies = dict.fromkeys(reversed(paths), NONE)
    # The first rule is written last, over those that come after it.
    for entry in reversed(_SHORT.get(rules, rules.split(","))):
        pattern, equals, policy = (part.strip() for part in entry.rpartition("="))
        known = ", ".join((NONE, *POLICIES))
        if not equals or not pattern:
            raise ValueError(
                f"config.model.remat is {rules!r}: expected none, blocks, or PATTERN=POLICY,... with a policy "
                f"of {known}; {entry!r} is none of them"
            )
        if policy != NONE and policy not in POLICIES:
            raise ValueError(f"config.model.remat: {policy!r} in {entry!r} is no policy: there are {known}")
        try:
            chosen = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise ValueError(f"config.model.remat: {pattern!r} is no regular expression: {error}") from error
        if not chosen:
            raise ValueError(
                f"config.model.remat: {pattern!r} is in the path of no block: there are {', '.join(paths)}"
            )
        policies |= dict.fromkeys(chosen, policy)
    return {path: policies[path] for path in paths}
