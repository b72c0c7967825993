"""Between the parameter tree and a PyTorch state dict: names, layouts, and a report of what did not find its place."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

Params = dict[str, Any]
Change = Callable[[np.ndarray], np.ndarray]

# The order in which GLIP, Swin's authors and Hugging Face concatenate the four neighbours that patch merging joins is
# (0, 0), (1, 0), (0, 1), (1, 1) in (row, column), each with all its channels. mmdetection, and so this model, goes
# through the neighbours row by row, and through them fastest. The permutation of the four is its own inverse.
_NEIGHBOURS = (0, 2, 1, 3)


def _merge_to_blocks(x: np.ndarray) -> np.ndarray:
    """[..., C * 4], neighbours fastest in mmdetection's order -> [..., 4 * C], channels fastest in GLIP's."""
    blocks = x.reshape(*x.shape[:-1], -1, 4)[..., _NEIGHBOURS]
    return np.swapaxes(blocks, -1, -2).reshape(x.shape)


def _blocks_to_merge(x: np.ndarray) -> np.ndarray:
    """The inverse of `_merge_to_blocks`."""
    blocks = x.reshape(*x.shape[:-1], 4, -1)[..., _NEIGHBOURS, :]
    return np.swapaxes(blocks, -1, -2).reshape(x.shape)


# How an array changes on its way to PyTorch, and back.
LAYOUTS: dict[str, tuple[Change, Change]] = {
    "copy": (lambda x: x, lambda x: x),
    "scalar as vector": (lambda x: x.reshape(1), lambda x: x.reshape(())),
    "linear": (np.transpose, np.transpose),
    "conv": (lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)),
    "conv of RGB": (lambda x: x.transpose(3, 2, 0, 1)[:, ::-1], lambda x: x[:, ::-1].transpose(2, 3, 1, 0)),
    "linear as conv": (lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T),
    "patch merging norm": (_merge_to_blocks, _blocks_to_merge),
    "patch merging linear": (lambda x: _merge_to_blocks(x.T), lambda x: _blocks_to_merge(x).T),
}


class Weight(NamedTuple):
    """One parameter under two names.

    Attributes:
        ours: its path in the parameter tree, "/" between the levels.
        theirs: its name in the state dict.
        layout: how the array changes, a key of `LAYOUTS`.
    """

    ours: str
    theirs: str
    layout: str


def linear(ours: str, theirs: str, layout: str = "linear", bias: bool = True) -> Iterator[Weight]:
    """Yields the kernel, and the bias, of a linear layer or a convolution."""
    yield Weight(f"{ours}/kernel", f"{theirs}.weight", layout)
    if bias:
        yield Weight(f"{ours}/bias", f"{theirs}.bias", "copy")


def norm(ours: str, theirs: str, layout: str = "copy") -> Iterator[Weight]:
    """Yields the scale and the bias of a LayerNorm or GroupNorm."""
    yield Weight(f"{ours}/scale", f"{theirs}.weight", layout)
    yield Weight(f"{ours}/bias", f"{theirs}.bias", layout)


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What became of the parameters of a state dict.

    Attributes:
        matched: names that found their place.
        missing: names that the model needs and the state dict lacks.
        unexpected: names in the state dict that the model has no place for.
        reshaped: names whose arrays were resized to the model's shapes, with both shapes (theirs, ours, in PyTorch's
            layout); they count as matched.
        misshapen: names whose arrays do not fit, with both shapes.
        ignored: buffers and unused weights, known to carry nothing that the model needs.
    """

    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every parameter of the model was found, and nothing was left over."""
        return not (self.missing or self.unexpected or self.misshapen)

    def describe(self, limit: int = 5) -> str:
        """Returns a line of counts, and a line for each of the first `limit` names of every kind but matched."""
        counts = f"{len(self.matched)} parameters matched"
        for kind in ("missing", "unexpected", "misshapen", "reshaped", "ignored"):
            counts += f", {len(getattr(self, kind))} {kind}" if getattr(self, kind) or kind != "misshapen" else ""
        lines = [counts]
        for kind in ("missing", "unexpected"):
            lines += _first(f"{kind}: ", getattr(self, kind), limit)
        for kind in ("misshapen", "reshaped"):
            named = [f"{name} {list(theirs)}, model {list(ours)}" for name, theirs, ours in getattr(self, kind)]
            lines += _first(f"{kind}: ", named, limit)
        return "\n".join(lines)


def _first(prefix: str, names: Sequence[str], limit: int) -> list[str]:
    more = [f"  {prefix}and {len(names) - limit} more"] if len(names) > limit else []
    return [f"  {prefix}{name}" for name in names[:limit]] + more


def to_state_dict(
    params: Params, weights: Iterable[Weight], *, consume: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters under their other names, one by one, as contiguous arrays.

    Arrays that lie on several devices are gathered only when their turn comes.

    Args:
        params: nested dict of arrays, the model's parameters.
        weights: every parameter of the model.
        consume: empty `params`, and let go of each array once it is yielded.

    Raises:
        ValueError: the parameters are not those that `weights` names.
    """
    weights = list(weights)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    report = ImportReport(
        missing=tuple(sorted({weight.ours for weight in weights} - flat.keys())),
        unexpected=tuple(sorted(flat.keys() - {weight.ours for weight in weights})),
    )
    if not report.complete:
        raise ValueError(f"the parameters and config.model describe different models: {report.describe()}")
    if consume:
        params.clear()
    return (
        (weight.theirs, np.asarray(LAYOUTS[weight.layout][0](np.asarray(flat.pop(weight.ours))), order="C"))
        for weight in weights
    )


def from_state_dict(
    state_dict: Mapping[str, Any],
    weights: Iterable[Weight],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignored: Callable[[str], bool] = lambda name: False,
    resize: Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray | None] = lambda path, x, shape: None,
) -> tuple[Params, ImportReport]:
    """Finds the model's parameters in a state dict; what does not fit is left out and reported.

    Args:
        state_dict: arrays by name; a lazy mapping is read one array at a time.
        weights: every parameter that is wanted.
        shapes: the model's shape of each, by path.
        ignored: tells the names that are no parameters of the model and not missed.
        resize: makes an array of the wanted shape from one of another, given the path; None where it cannot.

    Returns:
        The parameters that were found, a nested dict of NumPy arrays, and the report.
    """
    weights = list(weights)
    names = {weight.theirs for weight in weights}
    flat: dict[str, np.ndarray] = {}
    matched, missing, reshaped, misshapen = [], [], [], []
    for ours, theirs, layout in weights:
        if theirs not in state_dict:
            missing.append(theirs)
            continue
        to_theirs, to_ours = LAYOUTS[layout]
        wanted = tuple(shapes[ours])
        wanted_theirs = to_theirs(np.broadcast_to(np.float32(0), wanted)).shape
        given = np.asarray(state_dict[theirs])
        if given.ndim == len(wanted_theirs) or given.size == 1 == np.prod(wanted_theirs):
            # A scalar is a vector of one element in some versions.
            array = to_ours(given if given.ndim == len(wanted_theirs) else given.reshape(wanted_theirs))
            fitted = array if array.shape == wanted else resize(ours, array, wanted)
        else:
            fitted = None
        if fitted is None:
            misshapen.append((theirs, given.shape, wanted_theirs))
            continue
        if fitted.shape != array.shape:
            reshaped.append((theirs, given.shape, wanted_theirs))
        flat[ours] = np.asarray(fitted, order="C")
        matched.append(theirs)
    left = [name for name in state_dict if name not in names]
    report = ImportReport(
        matched=tuple(matched),
        missing=tuple(missing),
        unexpected=tuple(name for name in left if not ignored(name)),
        reshaped=tuple(reshaped),
        misshapen=tuple(misshapen),
        ignored=tuple(name for name in left if ignored(name)),
    )
    return traverse_util.unflatten_dict(flat, sep="/"), report
