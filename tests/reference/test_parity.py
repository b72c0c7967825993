"""The model against mmdetection's GLIP-T, from the same weights, by the code of `python -m benchmarks.parity`."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from benchmarks import parity
from benchmarks.reference import KEYS_FILE, ReferenceWeights, load_reference, reference_weight


@pytest.fixture(scope="module")
def directory(shared_dir):
    return shared_dir / "reference" / "glip_t_2blocks"


@pytest.fixture(scope="module")
def reference(directory):
    return load_reference(directory)


@pytest.fixture(scope="module", params=parity.DTYPES)
def rows(request, reference):
    return parity.compare(reference, seed=0, dtype=request.param)


def test_every_stage_loss_and_detection_agrees_with_mmdetection(rows):
    assert [line for line, row in zip(parity.table(rows), rows, strict=True) if not row.holds] == []
    names = {row.name for row in rows}
    stages = {name for name in names if name.startswith(("swin", "fpn", "text", "tower", "cls", "box", "ctr"))}
    assert len(stages) == 49
    if rows[0].dtype == "bfloat16":
        assert [row.error for row in rows if row.name.startswith("best detections")] == [0, 0]
    else:
        assert len(names - stages) == 5 + 2 * 2 * 3


def test_stages_and_detections_that_differ_are_told(reference):
    config = parity.model_config(reference)
    outputs = parity.stored_outputs(reference)
    moved = {**outputs, "box_deltas": outputs["box_deltas"] + 0.01}
    broken = [row.name for row in parity.compare_detections(reference, moved, config, "float32", "") if not row.holds]
    assert any(name.endswith("boxes") for name in broken)

    stages = {name: x for name, x in reference.vectors.items() if name.startswith(parity.STAGES)}
    assert all(row.holds and row.error == 0 for row in parity.compare_stages(reference, stages, "float32"))
    stages["fpn_3"] = stages["fpn_3"] * 1.001
    stages["cls_0"] = np.full_like(stages["cls_0"], np.nan)
    broken = {row.name for row in parity.compare_stages(reference, stages, "float32") if not row.holds}
    assert broken == {"fpn_3", "cls_0"}
    with pytest.raises(ValueError, match="swin_0"):
        parity.compare_stages(reference, {k: x for k, x in stages.items() if k != "swin_0"}, "float32")


def test_command_fails_where_a_bound_is_broken(monkeypatch, capsys, directory, tmp_path):
    good = parity.Row("float32", "swin_0", 1e-6, 1e-4, "of the largest value")
    monkeypatch.setattr(parity, "compare", lambda reference, seed, dtype: [good])
    assert parity.main([str(directory), "--dtype", "float32", "--json", str(tmp_path / "rows.json")]) == 0
    assert '"swin_0"' in (tmp_path / "rows.json").read_text()
    bad = dataclasses.replace(good, error=1e-3)
    monkeypatch.setattr(parity, "compare", lambda reference, seed, dtype: [good, bad])
    assert parity.main([str(directory), "--dtype", "float32"]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_folder_without_vectors_is_told(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 1
    assert KEYS_FILE in capsys.readouterr().err


def test_checkpoint_of_the_reference_is_that_of_its_own_rule(shared_dir, reference):
    spec = importlib.util.spec_from_file_location("weights", shared_dir / "reference" / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    for name, shape in list(reference.shapes.items())[::7] + list(reference.shapes.items())[-20:]:
        ours = reference_weight(name, shape, seed=3)
        np.testing.assert_allclose(ours, weights.weight(name, shape, 3).reshape(shape), rtol=1e-14, err_msg=name)


def test_sizes_that_the_checkpoint_does_not_fit_are_told(reference):
    config = parity.model_config(reference)
    config.model.tower.num_blocks = 3
    with pytest.raises(ValueError, match=r"missing: .*dyhead_tower\.6"):
        parity.load_params(reference, config, 0, "float32")
    assert ReferenceWeights(reference.shapes)["bbox_head.head.scales.0.scale"].shape == ()
