import pathlib

import pytest

from data_pipelines.building.recipe import RecipeError, read_recipe
from data_pipelines.records import RecordsError

RECIPE = """
name: mine
eval_fraction: 1
held_out: {modalities: [oct], labels: [polyp]}
rules: {duplicates_across: keep_first}
data_sets:
  smears: {source: voc, input: bccd, modality: microscopy, mapping: own.yaml}
  ct: {source: nifti, input: scans, options: {planes: [axial], step_mm: 5}}
"""


def read(folder: pathlib.Path, text: str):
    (folder / "recipe.yaml").write_text(text)
    return read_recipe(folder / "recipe.yaml")


def test_recipe_is_read_with_defaults(tmp_path):
    recipe = read(tmp_path, RECIPE.replace("eval_fraction: 1", "eval_fraction: 0"))
    assert list(recipe.data_sets) == ["smears", "ct"]
    assert recipe.data_sets["ct"].options == {"planes": ["axial"], "step_mm": 5}
    assert recipe.held_out.modalities == ("oct",)
    assert (recipe.eval_fraction, recipe.rules.duplicates_across) == (0.0, "keep_first")
    assert recipe.rules.duplicates_within == "merge"


def test_mapping_files_lie_beside_the_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text("")
    recipe = read(tmp_path, RECIPE.replace("eval_fraction: 1", ""))
    assert recipe.data_sets["smears"].mapping == str(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: mine", ""), "the field name is missing"),
        (("held_out:", "heldout:"), "no field heldout; the nearest is held_out"),
        (("modality:", "modalty:"), "no field data_sets.smears.modalty; the nearest is data_sets.smears.modality"),
        (("source: voc", "source: vok"), "data_sets.smears.source is 'vok'; did you mean voc"),
        (("[oct]", "[octt]"), "held_out.modalities is 'octt'; did you mean oct"),
        (("[polyp]", "[polypp]"), "held_out.labels is 'polypp'; did you mean polyp"),
        (("[polyp]", "polyp"), "held_out.labels: expected tuple"),
        (("keep_first", "keep_frist"), "duplicates_across"),
        (("eval_fraction: 1", "eval_fraction: many"), "eval_fraction: expected float, found 'many'"),
        (("name: mine", "name: [mine"), "no recipe can be read"),
        (("name: mine", "name: mine\non_error: ignore"), "on_error is 'ignore'"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(RecipeError, match=r"recipe\.yaml") as error:
        read(tmp_path, RECIPE.replace(*change).replace("eval_fraction: 1\n", "eval_fraction: 0.1\n"))
    assert message in str(error.value)


def test_fraction_and_names_are_checked(tmp_path):
    with pytest.raises(RecordsError, match="evaluation fraction"):
        read(tmp_path, RECIPE)
    with pytest.raises(RecordsError, match="'my set'"):
        read(tmp_path, RECIPE.replace("name: mine", "name: my set").replace("eval_fraction: 1", ""))
