import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.detection.anchors import encode_boxes
from medglip_jax.detection.hierarchy import score_excess, share_outside
from medglip_jax.detection.losses import count_normalizers, detection_losses, match_anchors
from tests.detection import test_losses
from tests.detection.test_losses import ANCHORS, CONFIG, TOKENS, assign_first_image, make_batch, random_outputs

TERMS = ("loss_consistency", "loss_containment")


def with_weights(consistency=1.0, containment=1.0):
    config = CONFIG.copy_and_resolve_references()
    config.score_consistency_weight, config.containment_weight = consistency, containment
    return config


def hierarchy_batch():
    """Box 0 is of token 1, whose broader phrase is token 4, and lies in another box; one of two pairs is padding."""
    batch = make_batch()
    batch["ignore_map"] = np.zeros((2, 3, TOKENS), bool)
    batch["ignore_map"][0, 0, 4] = True
    batch["child_map"] = np.zeros((2, 2, TOKENS), bool)
    batch["parent_map"] = np.zeros((2, 2, TOKENS), bool)
    batch["child_map"][:, 0, 1] = batch["parent_map"][:, 0, 4] = True
    batch["container"] = np.zeros((2, 3, 4), np.float32)
    batch["container"][0, 0] = [4, 4, 60, 50]
    return batch


@jax.jit
def match(batch):
    return match_anchors(batch, CONFIG, jnp.float32)


@jax.jit
def losses_and_gradients(outputs, batch):
    def loss(outputs):
        losses = detection_losses(outputs, batch, with_weights())
        return losses["loss"], losses

    (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(outputs)
    return losses, gradients


def test_ignored_tokens_carry_no_loss_for_the_anchors_of_their_box_alone():
    batch, outputs = hierarchy_batch(), random_outputs()
    ignore_map = batch.pop("ignore_map")
    plain = {name: batch[name] for name in make_batch()}
    ignored, gradients = test_losses.losses_and_gradients(outputs, {**plain, "ignore_map": ignore_map})
    found = np.asarray(gradients["token_logits"])
    assigned = assign_first_image(batch)
    assert not found[0, assigned == 0, 4].any() and (assigned == 0).any()
    assert found[0, assigned != 0, 4].all() and found[1, :, 4].all()
    assert found[0, assigned == 0][:, [0, 1, 2, 3, 5]].all()
    plain, _ = test_losses.losses_and_gradients(outputs, plain)
    assert float(ignored["num_positives"]) == float(plain["num_positives"])
    logits = np.asarray(outputs["token_logits"], np.float64)[0, assigned == 0, 4]
    p = 1 / (1 + np.exp(-logits))
    left_out = np.sum(-(1 - CONFIG.focal_alpha) * p**CONFIG.focal_gamma * np.log(1 - p)) / float(plain["num_positives"])
    np.testing.assert_allclose(float(plain["loss_token"]) - float(ignored["loss_token"]), left_out, rtol=1e-4)


def test_without_weights_the_program_is_that_of_the_plain_loss():
    batch, outputs = hierarchy_batch(), random_outputs()
    added = {name: batch.pop(name) for name in ("ignore_map", "child_map", "parent_map", "container")}

    def program(batch):
        return jax.jit(lambda outputs: detection_losses(outputs, batch, CONFIG)).lower(outputs).as_text()

    assert not set(TERMS) & set(jax.eval_shape(lambda x: detection_losses(x, batch, CONFIG), outputs))
    del added["ignore_map"]
    assert program({**batch, **added}) == program(batch)


def test_terms_are_in_the_loss_with_their_weights():
    batch, outputs = hierarchy_batch(), random_outputs()
    losses, _ = losses_and_gradients(outputs, batch)
    assert all(float(losses[name]) > 0 for name in TERMS)
    parts = ("loss_token", "loss_box", "loss_centerness", *TERMS)
    np.testing.assert_allclose(losses["loss"], sum(losses[name] for name in parts), rtol=1e-6)
    heavier = jax.jit(lambda x, y: detection_losses(x, y, with_weights(3.0, 5.0)))(outputs, batch)
    np.testing.assert_allclose(heavier["loss_consistency"], 3 * losses["loss_consistency"], rtol=1e-5)
    np.testing.assert_allclose(heavier["loss_containment"], 5 * losses["loss_containment"], rtol=1e-5)


def test_consistency_is_the_mean_excess_over_positive_anchors():
    batch, outputs = hierarchy_batch(), random_outputs()
    losses, _ = losses_and_gradients(outputs, batch)
    scores = 1 / (1 + np.exp(-np.asarray(outputs["token_logits"], np.float64)[0]))
    positive = assign_first_image(batch) >= 0
    expected = np.maximum(scores[positive, 1] - scores[positive, 4], 0).mean()
    np.testing.assert_allclose(losses["loss_consistency"], expected, rtol=1e-5)


def test_where_the_child_is_shown_the_parent_rises_and_elsewhere_the_child_falls():
    logits = jnp.tile(jnp.float32([[0.0, 3.0, -3.0, 0.0]]), (1, 2, 1))  # two anchors
    child, parent = (jnp.zeros((1, 1, 4), bool).at[0, 0, place].set(True) for place in (1, 2))
    is_child = jnp.array([[[True], [False]]])
    gradient = np.asarray(jax.grad(lambda x: score_excess(x, child, parent, is_child).sum())(logits))[0]
    assert gradient[0, 1] == 0 and gradient[0, 2] < 0
    assert gradient[1, 1] > 0 and gradient[1, 2] == 0
    assert not gradient[:, [0, 3]].any()
    consistent = jax.grad(lambda x: score_excess(x, parent, child, is_child).sum())(logits)
    assert not np.asarray(consistent).any()


def test_true_boxes_inside_their_containers_cost_nothing():
    batch, outputs = hierarchy_batch(), {k: np.array(v) for k, v in random_outputs().items()}
    outputs["token_logits"][:, :, 4] = 9.0
    assigned = assign_first_image(batch)
    found = np.flatnonzero(assigned >= 0)
    boxes = jnp.asarray(batch["boxes"][0, assigned[found]])
    outputs["box_deltas"][0, found] = encode_boxes(jnp.asarray(ANCHORS[found]), boxes)
    losses, _ = losses_and_gradients(outputs, batch)
    assert float(losses["loss_consistency"]) == 0 and float(losses["loss_containment"]) < 1e-5
    outputs["box_deltas"][0, assigned == 0, 0] += 50.0  # to the right by five times the anchor's side
    losses, _ = losses_and_gradients(outputs, batch)
    np.testing.assert_allclose(losses["loss_containment"], quality_share(batch, assigned), rtol=1e-4)
    batch["container"] = np.zeros_like(batch["container"])
    assert float(losses_and_gradients(outputs, batch)[0]["loss_containment"]) == 0


def quality_share(batch, assigned):
    """The share of box 0 in the centerness targets that weigh the boxes."""
    quality = np.asarray(match(batch).quality)[0]
    return quality[assigned == 0].sum() / max(quality.sum(), 1)


corners, sides = st.floats(0, 100), st.floats(0.01, 100)
boxes = st.tuples(corners, corners, sides, sides).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@given(boxes, boxes)
def test_share_outside_is_a_share_and_zero_inside(box, container):
    share = float(share_outside(jnp.float32(box), jnp.float32(container)))
    assert -1e-4 <= share <= 1
    around = jnp.float32([*np.minimum(box, container)[:2], *np.maximum(box, container)[2:]])
    assert abs(float(share_outside(jnp.float32(box), around))) < 1e-4


def test_images_without_boxes_and_wild_outputs_keep_gradients_finite():
    batch = hierarchy_batch()
    for scale, mask in ((1e4, batch["box_mask"]), (1.0, np.zeros_like(batch["box_mask"]))):
        losses, gradients = losses_and_gradients(random_outputs(scale=scale), {**batch, "box_mask": mask})
        assert all(np.isfinite(np.asarray(x)).all() for x in (*losses.values(), *gradients.values()))
    assert all(float(losses[name]) == 0 for name in TERMS)


def test_terms_are_normalised_over_the_whole_batch():
    batch, outputs = hierarchy_batch(), random_outputs()
    doubled = {k: np.concatenate([v, v]) for k, v in batch.items()}
    one, _ = losses_and_gradients(outputs, batch)
    two, _ = losses_and_gradients({k: jnp.concatenate([v, v]) for k, v in outputs.items()}, doubled)
    for name in TERMS:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)


def test_the_terms_of_micro_batches_sum_to_those_of_the_batch():
    batch = {k: np.concatenate([v, v[:1]]) for k, v in hierarchy_batch().items()}  # boxes in rows 0 and 2
    batch["boxes"][2, 0, 2:] += 9
    outputs = {k: jnp.concatenate([v, -v[:1]]) for k, v in random_outputs().items()}
    whole = count_normalizers(match(batch))

    @jax.jit
    def losses_of(outputs, batch):
        return detection_losses(outputs, batch, with_weights(), whole)

    parts = [
        losses_of(*({k: v[i : i + 1] for k, v in arrays.items()} for arrays in (outputs, batch))) for i in range(3)
    ]
    expected = losses_of(outputs, batch)
    for name in TERMS:
        assert float(parts[0][name]) > 0 and float(parts[2][name]) > 0
        np.testing.assert_allclose(sum(part[name] for part in parts), expected[name], rtol=1e-5)


def test_on_a_mesh_the_terms_are_the_same_and_no_image_leaves_its_device():
    batch = {k: np.concatenate([v] * 4) for k, v in hierarchy_batch().items()}
    outputs = {k: jnp.concatenate([v, -v, 2 * v, -2 * v]) for k, v in random_outputs().items()}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put((outputs, batch), jax.NamedSharding(mesh, jax.P("data")))
    program = losses_and_gradients.lower(*placed).compile()
    (found, gradients), (expected, alone) = program(*placed), losses_and_gradients(outputs, batch)
    for name in TERMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    for name, gradient in alone.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-4, atol=1e-7)
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("child_map", "score_consistency_weight is not 0, but the batch has no child_map: set .*hierarchy.max_pairs"),
        ("container", "containment_weight is not 0, but the batch has no container: set .*hierarchy.containers"),
    ],
)
def test_batch_without_what_a_term_needs_names_the_field(missing, message):
    batch = hierarchy_batch()
    del batch[missing]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda outputs: detection_losses(outputs, batch, with_weights()), random_outputs())
