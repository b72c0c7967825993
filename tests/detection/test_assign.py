import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import assign_plainly
from medglip_jax.detection.anchors import level_shapes, make_anchors
from medglip_jax.detection.assign import assign_anchors

STRIDES = (8, 16, 32, 64, 128)
assign = jax.jit(assign_anchors, static_argnums=(1, 4))


def random_boxes(seed, number, height, width):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, [width - 20, height - 20], (number, 2))
    sides = rng.uniform(6, 90, (number, 2))
    return np.concatenate([corners, np.minimum(corners + sides, [width, height])], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed, canvas", [(0, (160, 192)), (1, (64, 96)), (2, (128, 40)), (3, (400, 24))])
def test_assignment_equals_the_plain_one(seed, canvas):
    anchors, sizes = make_anchors(*canvas, STRIDES, 8.0)
    shapes = level_shapes(*canvas, STRIDES)
    boxes = random_boxes(seed, 12, *canvas)
    assigned = assign(anchors, shapes, boxes, jnp.ones(12, bool), 9)
    expected = assign_plainly(anchors, sizes, boxes, 9)
    np.testing.assert_array_equal(assigned, expected)
    assert (expected >= 0).sum() > 10


def test_padded_boxes_take_no_anchor():
    anchors, shapes = make_anchors(96, 96, STRIDES, 8.0)[0], level_shapes(96, 96, STRIDES)
    boxes = random_boxes(3, 4, 96, 96)
    padded = np.concatenate([boxes, boxes + 1, np.zeros((2, 4), np.float32)])
    mask = np.arange(10) < 4
    alone = assign(anchors, shapes, jnp.array(boxes), jnp.ones(4, bool), 9)
    np.testing.assert_array_equal(assign(anchors, shapes, jnp.array(padded), jnp.array(mask), 9), alone)
    none = assign(anchors, shapes, jnp.array(padded), jnp.zeros(10, bool), 9)
    np.testing.assert_array_equal(none, -1)


def test_of_equal_boxes_the_first_is_assigned():
    anchors, shapes = make_anchors(96, 96, STRIDES, 8.0)[0], level_shapes(96, 96, STRIDES)
    box = np.float32([20, 20, 80, 70])
    assigned = np.asarray(assign(anchors, shapes, jnp.array([box, box]), jnp.ones(2, bool), 9))
    assert set(assigned) == {-1, 0}


def test_single_anchor_is_no_nan():
    anchors, shapes = make_anchors(8, 8, (8,), 8.0)[0], ((1, 1),)
    box = jnp.float32([[0, 0, 8, 8]])
    np.testing.assert_array_equal(assign(anchors, shapes, box, jnp.ones(1, bool), 9), [0])


def test_batch_by_vmap():
    anchors, shapes = make_anchors(64, 64, STRIDES, 8.0)[0], level_shapes(64, 64, STRIDES)
    boxes = jnp.array(np.stack([random_boxes(s, 5, 64, 64) for s in (4, 5)]))
    batched = jax.vmap(lambda b: assign(jnp.array(anchors), shapes, b, jnp.ones(5, bool), 9))(boxes)
    for image in range(2):
        np.testing.assert_array_equal(batched[image], assign(anchors, shapes, boxes[image], jnp.ones(5, bool), 9))


def test_on_a_mesh_no_image_leaves_its_device():
    anchors, shapes = make_anchors(64, 64, STRIDES, 8.0)[0], level_shapes(64, 64, STRIDES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    boxes = jax.device_put(np.stack([random_boxes(s, 5, 64, 64) for s in (4, 5)]), sharding)
    batched = jax.vmap(lambda b: assign_anchors(jnp.array(anchors), shapes, b, jnp.ones(5, bool), 9))
    compiled = jax.jit(batched, out_shardings=sharding).lower(boxes).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(compiled(boxes), batched(np.asarray(boxes)))
