"""Checkpoints: what comes back is what was saved, to the bit, on any mesh; and what is refused with which words."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs.medglip_t import get_config
from data_pipelines.loader import train_loader
from data_pipelines.records import write_records
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax.configuration import save_config
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.training.checkpoint import Checkpoints, load_params, locate
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state, create_state


class Small(nn.Module):
    """A model whose parameters the sharding rules split; checkpoints do not ask what it computes."""

    features: int = 8

    @nn.compact
    def __call__(self, pixels, input_ids, attention_mask):
        x = nn.Dense(self.features, name="query")(pixels.mean(axis=(1, 2)).repeat(4, axis=-1))
        return nn.Dense(4, name="output")(x) + nn.Embed(16, 4, name="word_embeddings")(input_ids).mean(axis=1)


def mesh_of(data, fsdp, tensor):
    sizes = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def filled(state, seed):
    """A state with other numbers everywhere, where it was."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(seed), x.sharding)
        values = rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.full(x.shape, seed)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(fill, state)


def raw(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y), strict=True), a, b)


@pytest.fixture(scope="module")
def parts():
    config = get_config()
    return Small(), config, make_optimizer(config), jax.random.key(0)


@pytest.fixture(scope="module")
def state(parts):
    """A state on a mesh, with a number of its own in every place."""
    return filled(create_state(*parts, mesh_of(2, 2, 2))[0], seed=7)


@pytest.fixture
def run(tmp_path, parts, state):
    """A working directory with its recipe and the checkpoints of steps 1 and 2."""
    save_config(parts[1], tmp_path / "config.json")
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        assert checkpoints.save(1, filled(state, seed=1)) and checkpoints.save(2, state)
    return tmp_path


@pytest.fixture(scope="module")
def loader_of(tmp_path_factory):
    """Makes a loader of the same few records."""
    folder = tmp_path_factory.mktemp("records")
    write_records(Phantoms(6, size=64), folder, name="phantoms")
    data = get_config().data
    data.train, data.canvas, data.num_threads, data.prefetch = str(folder), (64, 64), 1, 2

    def make(process=0, processes=1):
        return train_loader(data, seed=5, batch_size=4 // processes, process_index=process, process_count=processes)

    return make


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (1, 1, 1)])
def test_state_comes_back_to_the_bit_on_any_mesh(run, parts, state, sizes):
    target = abstract_state(*parts, mesh_of(*sizes))
    with Checkpoints(run, keep=5) as checkpoints:
        assert checkpoints.latest_step == 2
        restored = checkpoints.restore(target)
        first = checkpoints.restore(target, step=1)
    assert_same_bits(restored, state)
    assert_same_bits(first, filled(state, seed=1))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)


def test_a_checkpoint_of_a_mesh_of_three_axes_comes_back_on_one_of_five(tmp_path, parts, state):
    """Runs of version 0.1.0 had the axes data, fsdp and tensor."""
    kinds = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=kinds)
    old = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), state)
    target = abstract_state(*parts, make_mesh({"replica": 2, "fsdp": 2, "sequence": 2}))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, old)
        restored = checkpoints.restore(target)
    assert_same_bits(restored, state)
    assert restored.params["query"]["kernel"].sharding.spec == PartitionSpec(("replica", "fsdp"))


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path, parts, state):
    before = filled(state, seed=3)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s.replace(rng=None)), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, before)
        overwrite(before)
        restored = checkpoints.restore(abstract_state(*parts, mesh_of(1, 1, 1)))
    assert before.params["query"]["kernel"].is_deleted()
    assert_same_bits(restored, filled(state, seed=3))


def test_a_step_is_written_once(run, state):
    with Checkpoints(run, keep=5) as checkpoints:
        assert not checkpoints.save(2, filled(state, seed=9))


def test_the_newest_are_kept(run, state):
    with Checkpoints(run, keep=2) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "4"]
    with pytest.raises(ValueError, match=r"keep_checkpoints is 0"):
        Checkpoints(run, keep=0)


def steps_after(folder, state, steps, scores=(), **keep):
    with Checkpoints(folder, **keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state)
            checkpoints.score(step, dict(scores).get(step))
    with Checkpoints(folder, **keep) as checkpoints:
        kept = sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.is_dir())
        return kept, checkpoints.best_step


def test_multiples_and_the_best_are_kept_beside_the_newest(tmp_path, state):
    scores = {1: 0.1, 2: 0.5, 3: float("nan"), 4: 0.5, 5: 0.3, 6: None, 7: 0.2, 8: 0.1}
    few = {"step": state.step}
    few = state.replace(params=few, opt_state=(), ema=None)
    assert steps_after(tmp_path / "a", few, range(1, 9), keep=1, keep_every=3) == ([3, 6, 8], None)
    kept, best = steps_after(tmp_path / "b", few, range(1, 9), scores.items(), keep=2, keep_best=1)
    assert (kept, best) == ([2, 7, 8], 2)  # of equal ones the first
    kept, best = steps_after(tmp_path / "b", few, [9, 10], {9: 0.9}.items(), keep=1, keep_best=2)
    assert (kept, best) == ([2, 9, 10], 9)


def test_best_checkpoint_is_found_by_name(run, state):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint that was evaluated"):
        load_params(run / "checkpoints" / "best")
    with Checkpoints(run, keep=5) as checkpoints:
        checkpoints.score(1, 0.7)
        checkpoints.score(2, 0.6)
    assert locate(run / "checkpoints" / "best") == (run, "best")
    params, _ = load_params(run / "checkpoints" / "best", use_ema=False)
    assert_same_bits(params, filled(state, seed=1).params)


@pytest.mark.parametrize(("name", "value"), [("keep", 0), ("keep_every", -1), ("keep_best", -1)])
def test_numbers_to_keep_are_checked(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"config.training.keep.* is {value}: it must be at least"):
        Checkpoints(tmp_path, **{"keep": 1, name: value})


def test_damaged_scores_are_named(run):
    (run / "checkpoints" / "scores.json").write_text("[1")
    with pytest.raises(ValueError, match=r"scores.json is damaged .*remove it"):
        Checkpoints(run, keep=1)


def test_loader_goes_on_with_the_next_batch(tmp_path, parts, state, loader_of):
    loader = loader_of()
    for _ in range(3):
        next(loader)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, loader)
        expected = [next(loader) for _ in range(2)]
    loader.close()

    fresh = loader_of()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(abstract_state(*parts, mesh_of(1, 1, 1)), fresh)
    for batch in expected:
        found = next(fresh)
        assert found.keys() == batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    fresh.close()


def test_checkpoint_without_a_position_is_no_start_for_a_loader(run, parts, loader_of):
    loader = loader_of()
    with Checkpoints(run, keep=5) as checkpoints, pytest.raises(ValueError, match="without the loader's position"):
        checkpoints.restore(abstract_state(*parts, mesh_of(1, 1, 1)), loader)
    loader.close()


def test_other_processes_take_up_the_position_together(tmp_path, parts, state, loader_of):
    loader, target = loader_of(), abstract_state(*parts, mesh_of(1, 1, 1))
    next(loader)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, loader)
        expected = next(loader)["image_id"].tolist()
        loader.close()
        found = []
        for process in range(2):
            part = loader_of(process=process, processes=2)
            checkpoints.restore(target, part)
            found.append(next(part)["image_id"].tolist())
            part.close()
    assert found[0] + found[1] == expected


def test_position_as_older_versions_wrote_it_is_a_clear_error(tmp_path, parts, state, loader_of):
    loader, target = loader_of(), abstract_state(*parts, mesh_of(1, 1, 1))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, loader)
    folder = tmp_path / "checkpoints" / "1" / "loader"
    (folder / "process_0-of-1.json").write_text('{"next_index": 4}')
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(
            ValueError, match=r"checkpoints/1 holds the loader's position as an older version.*init\.model"
        ):
            checkpoints.restore(target, loader)
        (folder / "process_0-of-1.json").unlink()
        (folder / "metadata").write_text('{"next_index": 4}')
        with pytest.raises(ValueError, match=r"checkpoints/1: .*no position in the training data"):
            checkpoints.restore(target, loader)
    loader.close()


def test_model_of_another_size_is_named_by_its_parameters(run, parts):
    _, config, optimizer, rng = parts
    target = abstract_state(Small(features=6), config, optimizer, rng, mesh_of(1, 1, 1))
    message = (
        r"(?s)checkpoints/2 is the checkpoint of another model.*params/query/kernel: \(12, 8\) in the checkpoint, "
    )
    with Checkpoints(run, keep=5) as checkpoints, pytest.raises(ValueError, match=message + r"\(12, 6\) in this run"):
        checkpoints.restore(target)


def test_run_without_an_average_does_not_take_one_up(run, parts):
    model, config, optimizer, rng = parts
    config = config.copy_and_resolve_references()
    config.optimizer.ema = 0.0
    target = abstract_state(model, config, optimizer, rng, mesh_of(1, 1, 1))
    with Checkpoints(run, keep=5) as checkpoints, pytest.raises(ValueError, match=r"ema/output/bias: \(4,\) in the"):
        checkpoints.restore(target)


def test_unfinished_checkpoint_is_ignored_and_written_again(run, parts, state):
    folder = run / "checkpoints"
    shutil.copytree(folder / "1" / "state", folder / "3.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp")
    params, _ = load_params(run)
    assert_same_bits(params, jax.device_get(state.ema))
    with Checkpoints(run, keep=5) as checkpoints:
        assert checkpoints.latest_step == 2
        assert_same_bits(checkpoints.restore(abstract_state(*parts, mesh_of(1, 1, 1))), state)
        assert checkpoints.save(3, filled(state, seed=4))
    assert_same_bits(load_params(run, use_ema=False)[0], jax.device_get(filled(state, seed=4).params))


def test_missing_checkpoints_are_named(tmp_path, parts, run):
    target = abstract_state(*parts, mesh_of(1, 1, 1))
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(FileNotFoundError, match="new/checkpoints holds no finished checkpoint"):
            checkpoints.restore(target)
    with Checkpoints(run, keep=5) as checkpoints, pytest.raises(FileNotFoundError, match="no finished checkpoint 7"):
        checkpoints.restore(target, step=7)


@pytest.mark.parametrize("use_ema", [True, False, None])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 4)])
def test_parameters_are_read_without_the_optimizer(run, state, use_ema, sizes):
    mesh = sizes and mesh_of(*sizes)
    params, config = load_params(run, use_ema, mesh)
    assert_same_bits(params, jax.device_get(state.params if use_ema is False else state.ema))
    assert config.schedule.steps == get_config().schedule.steps
    if mesh:
        kernel = params["query"]["kernel"]
        assert kernel.sharding.mesh == mesh and tuple(kernel.sharding.spec) == ("fsdp", "tensor")
    else:
        assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))


def test_recipe_decides_whether_the_average_is_read(run, parts, state):
    config = parts[1].copy_and_resolve_references()
    config.evaluation.use_ema = False
    save_config(config, run / "config.json")
    assert_same_bits(load_params(run)[0], jax.device_get(state.params))


def test_without_an_average_the_parameters_are_read(tmp_path, parts, state):
    save_config(parts[1], tmp_path / "config.json")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state.replace(ema=None))
    assert_same_bits(load_params(tmp_path, use_ema=True)[0], jax.device_get(state.params))


def test_folder_of_one_checkpoint_means_that_one(run, state):
    assert locate(run / "checkpoints" / "1") == (run, 1) and locate(run) == (run, None)
    params, _ = load_params(run / "checkpoints" / "1", use_ema=False)
    assert_same_bits(params, jax.device_get(filled(state, seed=1).params))
    with pytest.raises(FileNotFoundError, match="no finished checkpoint 7"):
        load_params(run / "checkpoints" / "7")


def test_reading_parameters_says_nothing_on_the_terminal(run, caplog):
    load_params(run)
    assert not caplog.records


def test_folders_that_are_no_run_are_named(tmp_path, parts):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=f"{folder} has no config.json: expected the --workdir"):
            load_params(folder)
    save_config(parts[1], tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
        load_params(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
        load_params(tmp_path)


def test_damaged_checkpoint_is_named(run, parts):
    shutil.rmtree(run / "checkpoints" / "2" / "state")
    with pytest.raises(ValueError, match="checkpoints/2 has no parameters: it is damaged"):
        load_params(run)
    with Checkpoints(run, keep=5) as checkpoints, pytest.raises(ValueError, match="has no training state"):
        checkpoints.restore(abstract_state(*parts, mesh_of(1, 1, 1)))
