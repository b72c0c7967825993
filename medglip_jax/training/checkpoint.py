"""Checkpoints of a run: the training state, the loader's position, and what a reader needs to know about them."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policy

from medglip_jax.configuration import CONFIG_FILE, load_config
from medglip_jax.errors import list_mismatches
from medglip_jax.model.lora import LORA, merge_adapters, without_adapters
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import match_rules, path_name, shardings
from medglip_jax.paths import full_path, write_whole
from medglip_jax.training.finetuning import join, select_paths
from medglip_jax.training.state import TrainState

PathLike: TypeAlias = "str | os.PathLike[str]"

CHECKPOINTS = "checkpoints"  # folder in a run's working directory
SCORES_FILE = "scores.json"  # file there: the metric of the checkpoints that were evaluated
BEST = "best"  # WORKDIR/checkpoints/best means the best of them
TOKENIZER = "tokenizer"  # folder in a run's working directory


class Checkpoints:
    """The checkpoints of a run, WORKDIR/checkpoints/STEP; a context manager that ends with all of them written.

    Writing goes on in the background of training. A checkpoint that was not finished is never read.
    """

    def __init__(self, workdir: PathLike, keep: int, *, keep_every: int = 0, keep_best: int = 0):
        """Opens the checkpoints of a run.

        Args:
            workdir: the run's working directory, local or in a bucket; it is made if needed.
            keep: how many of the newest to keep.
            keep_every: steps; those of a multiple of it are kept too. 0 keeps none for that.
            keep_best: how many of those with the highest scores (see `score`) are kept too.

        Raises:
            ValueError: `keep` is less than 1, or another number less than 0; or the path is in a bucket that cannot be
                read.
        """
        for name, value, least in (
            ("keep_checkpoints", keep, 1),
            ("keep_every", keep_every, 0),
            ("keep_best", keep_best, 0),
        ):
            if value < least:
                raise ValueError(f"config.training.{name} is {value}: it must be at least {least}")
        self.directory = full_path(workdir) / CHECKPOINTS
        self.directory.mkdir(parents=True, exist_ok=True)
        self._scores = _read_scores(self.directory)
        policies: list[Any] = [policy.LatestN(keep), _HighestScores(self._scores, keep_best)]
        if keep_every:
            policies.append(policy.EveryNSteps(keep_every))
        self._manager = _Manager(
            self.directory,
            item_handlers={  # pyright: ignore[reportArgumentType]
                "state": ocp.StandardCheckpointHandler(),
                "loader": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,  # left by a start that was killed
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is written, and raises if that failed."""
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None; one that this process is still writing counts."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Returns the folder of a checkpoint."""
        return self.directory / str(step)

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest score, the first of several; None if none has one."""
        return _best(self._scores, self._manager.all_steps())

    def score(self, step: int, value: float | None) -> None:
        """Tells how good a checkpoint is; it takes effect when the next one is saved. All processes call it alike.

        Args:
            step: of the checkpoint.
            value: the higher the better; None, or no number, is no score.
        """
        if value is None or not math.isfinite(value):
            return
        self._scores[step] = float(value)
        if jax.process_index() == 0:
            write_whole(self.directory / SCORES_FILE, json.dumps(self._scores, indent=1) + "\n")

    def save(self, step: int, state: TrainState, loader: Any = None) -> bool:
        """Starts to write a checkpoint; returns once arrays and position are copied, so that both may move on.

        Args:
            step: steps taken.
            state: of the run.
            loader: iterator of `train_loader` whose next batch is the next to train on; all processes stand at the
                same position, and it is written once.

        Returns:
            Whether it is written: not if there is one of this step already.
        """
        if step in self._manager.all_steps():
            return False
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave({"step": step, "processes": jax.process_count(), "jax": jax.__version__}),
        }
        if loader is not None:
            items["loader"] = ocp.args.JsonSave(loader.get_state())
        return self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, target: TrainState, loader: Any = None, step: int | None = None) -> TrainState:
        """Reads a checkpoint, on the mesh it was saved from or on another one.

        Args:
            target: shapes, types and shardings of the state to return, from `abstract_state`.
            loader: iterator of `train_loader` to bring to the position at which the checkpoint was saved, by as many
                processes or others.
            step: which checkpoint; None reads the newest.

        Returns:
            The state.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is damaged, or of another model, or the loader cannot take up its position.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps())
        step = (steps[-1] if steps else None) if step is None else step
        if step not in steps or step is None:
            raise FileNotFoundError(
                f"{self.directory} holds no finished checkpoint{'' if step is None else f' {step}'}"
            )
        self._check_shapes(step, target)
        if loader is not None:
            self._restore_loader(step, loader)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        return restored["state"]

    def _check_shapes(self, step: int, target: TrainState) -> None:
        metadata = self._manager.item_metadata(step).get("state")
        if metadata is None:
            raise ValueError(f"{self.path(step)} has no training state: it is damaged, or of another program")
        found, wanted = _shapes(metadata.tree), _shapes(target)
        for shapes in (found, wanted):
            shapes.pop("rng", None)  # a typed key is stored as its words
        if mismatches := list_mismatches(found, wanted, "this run"):
            raise ValueError(
                f"{self.path(step)} is the checkpoint of another model or optimizer:\n{mismatches}\n"
                f"resume with the run's own {CONFIG_FILE}, or start a new run in another --workdir"
            )

    def _restore_loader(self, step: int, loader: Any) -> None:
        folder = self.path(step) / "loader"
        if not folder.is_dir():
            raise ValueError(f"{self.path(step)} was saved without the loader's position")
        if any(folder.glob("process_*-of-*.json")):
            raise ValueError(
                f"{self.path(step)} holds the loader's position as an older version wrote it, for each process: this "
                "one cannot take it up; start a new run from its parameters with --config.init.model"
            )
        state = self._manager.restore(step, args=ocp.args.Composite(loader=ocp.args.JsonRestore()))["loader"]
        try:
            loader.set_state(state)
        except ValueError as error:
            raise ValueError(f"{self.path(step)}: {error}") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


class _Manager(ocp.CheckpointManager):
    """Leaves it to the run when to save for a preemption: Orbax would ask JAX for it with other numbers of steps."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _HighestScores(policy.PreservationPolicy):
    """Keeps the checkpoints with the highest scores, as they are when it is asked."""

    def __init__(self, scores: Mapping[int, float], number: int):
        self._scores, self._number = scores, number

    def should_preserve(
        self, checkpoints: Sequence[policy.PolicyCheckpointInfo], *, context: policy.PreservationContext
    ) -> list[bool]:
        scored = [info.step for info in checkpoints if info.step in self._scores]
        best = sorted(scored, key=lambda step: (-self._scores[step], step))[: self._number]
        return [info.step in best for info in checkpoints]


def _read_scores(directory: epath.Path) -> dict[int, float]:
    path = directory / SCORES_FILE
    if not path.exists():
        return {}
    try:
        return {int(step): float(value) for step, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the scores begin anew") from error


def _best(scores: Mapping[int, float], steps: Iterable[int]) -> int | None:
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], -step), default=None)


def locate(path: PathLike) -> tuple[epath.Path, int | str | None]:
    """Returns the working directory that a path means, and the step, or `BEST`, if it means one checkpoint."""
    folder = full_path(path)
    if folder.parent.name == CHECKPOINTS and (folder.name.isdigit() or folder.name == BEST):
        return folder.parent.parent, BEST if folder.name == BEST else int(folder.name)
    return folder, None


def load_params(path: PathLike, use_ema: bool | None = None, mesh: Mesh | None = None) -> tuple[Any, ConfigDict]:
    """Reads the model's parameters of a checkpoint, without the optimizer; adapters are merged into them.

    Args:
        path: a run's working directory (its newest checkpoint is read), WORKDIR/checkpoints/STEP, or
            WORKDIR/checkpoints/best, the one with the highest config.training.best_metric.
        use_ema: read the averaged parameters, where the checkpoint has them; None does what the run's recipe says.
        mesh: where to put the parameters, by the run's sharding rules; it need not be the mesh of the training.
            None returns NumPy arrays.

    Returns:
        The parameters, and the recipe of the run.

    Raises:
        FileNotFoundError: it is not the folder of a run, or has no finished checkpoint yet.
        ValueError: the recipe cannot be read, or the checkpoint is of another program.
    """
    workdir, step = locate(path)
    if not (workdir / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{workdir} has no {CONFIG_FILE}: expected the --workdir of a training run")
    config = load_config(workdir)
    use_ema = config.evaluation.use_ema if use_ema is None else use_ema
    directory = workdir / CHECKPOINTS
    finished = {int(x.name): x for x in ocp.utils.checkpoint_steps_paths(directory) if x.name.isdigit()}
    if step == BEST:
        step = _best(_read_scores(directory), finished)
        if step is None:
            raise FileNotFoundError(f"{directory} holds no checkpoint that was evaluated (config.training.keep_best)")
    if not finished or step not in (None, *finished):
        raise FileNotFoundError(f"{directory} holds no finished checkpoint{'' if step is None else f' {step}'}")
    folder = finished[max(finished) if step is None else step] / "state"
    reader = ocp.PyTreeCheckpointHandler()  # a CheckpointManager warns of every item that it is not asked for
    tree = reader.metadata(folder).tree if folder.is_dir() else {}
    if not tree.get("params"):
        raise ValueError(f"{folder.parent} has no parameters: it is damaged, or of another program")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree["params"])
    # What does not train has no average.
    averaged = _paths(tree["ema"]) if use_ema and tree.get("ema") else frozenset()
    if mesh is None:
        arguments = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    else:
        placed = shardings(match_rules(resolve_rules(config), shapes, mesh), mesh)
        arguments = jax.tree.map(lambda x, s: ocp.ArrayRestoreArgs(sharding=s), shapes, placed)
    names = {"ema": averaged, "params": _paths(shapes) - averaged}
    item, restore_args = (
        {name: select_paths(x, paths) for name, paths in names.items() if paths} for x in (shapes, arguments)
    )
    restored = reader.restore(
        folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    )
    params = join(restored.get("params", {}), restored.get("ema", {}))
    if mesh is not None and LORA in params:
        merge = jax.jit(merge_adapters, static_argnums=1, out_shardings=without_adapters(placed))
        return merge(params, config.finetune.lora_alpha), config
    return merge_adapters(params, config.finetune.lora_alpha), config


def _paths(tree: Any) -> frozenset[str]:
    return frozenset(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
