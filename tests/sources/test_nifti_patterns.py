import pytest

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.sources import detect_source, load_source

pytest.importorskip("nibabel")

from tests.sources.test_nifti import TABLE, save, write_case, write_msd
from tests.sources.volume_body import NAMES, draw_body, facts

PAIRS = {"images": "{id}/{id}_{sequence}.nii.gz", "labels": "{id}/{id}_seg.nii.gz", "values": NAMES}
RULE = {"planes": ["axial"], "step_mm": 20}


def write_pairs(folder, *cases, sequences=("t1", "t2"), table=""):
    values, labels = draw_body()
    for case in cases or ("B_1",):
        for sequence in sequences:
            save(folder / case / f"{case}_{sequence}.nii.gz", values)
        save(folder / case / f"{case}_seg.nii.gz", labels, table=table)
    return folder


def read(folder, modality="ct", **options):
    return load_source("nifti", folder, dataset="d", modality=modality, options={**RULE, **PAIRS, **options})


def cases_of(source):
    return list(dict.fromkeys(example.image_id.split("/axial/")[0] for example in source))


def test_slices_are_those_of_a_folder_a_case(tmp_path):
    expected = load_source("nifti", write_case(tmp_path / "known"), dataset="d", options=RULE)
    found = read(write_pairs(tmp_path / "pairs", sequences=("ct",)))
    assert [facts(example)[1:] for example in found] == [facts(example)[1:] for example in expected]


def test_sequences_share_their_labels_and_their_patient(tmp_path):
    source = read(write_pairs(tmp_path, "B_1", "B_2"))
    assert cases_of(source) == ["B_1/t1", "B_1/t2", "B_2/t1", "B_2/t2"]
    assert {example.image_id[:3]: example.patient_id for example in source} == {
        name: hash_patient(name, "d") for name in ("B_1", "B_2")
    }
    assert source.unused == [] and cases_of(read(tmp_path, images="{id}/{id}_{sequence:t1}.nii.gz")) == [
        "B_1/t1",
        "B_2/t1",
    ]


def test_visits_of_a_patient_are_one_patients(tmp_path):
    write_pairs(tmp_path, "P-0-000", "P-0-001", sequences=("t1",))
    source = read(
        tmp_path,
        images="{patient:P-*}-{visit}/{patient}-{visit}_t1.nii.gz",
        labels="{patient}-{visit}/{patient}-{visit}_seg.nii.gz",
    )
    assert cases_of(source) == ["P-0/000", "P-0/001"]
    assert {example.patient_id for example in source} == {hash_patient("P-0", "d")}


@pytest.mark.parametrize("values", [NAMES, {str(value): name for value, name in NAMES.items()}, ["", *NAMES.values()]])
def test_values_have_the_names_of_the_option_before_those_in_the_file(tmp_path, values):
    other = TABLE.replace("liver", "stomach")
    for source in (
        read(write_pairs(tmp_path / "plain"), values=values),
        read(write_pairs(tmp_path / "named", table=other), values=values),
    ):
        labels = {region.label for example in source for region in example.regions}
        assert labels == {"liver", "spleen", "vertebra", "liver_tumor"}


def test_names_and_modality_come_from_dataset_json_where_no_option_tells_them(tmp_path):
    description = {"labels": {str(value): name for value, name in NAMES.items()}, "channel_names": {"0": "MRI"}}
    write_msd(tmp_path, description, names=("amos_0001", "amos_0507"))
    options = {"images": "images{part}/{id:amos_0[0-4]*}.nii.gz", "labels": "labels{part}/{id}.nii.gz", "values": {}}
    source = read(tmp_path, modality="unknown", **options)
    assert cases_of(source) == ["Tr/amos_0001"] and source[0].modality == "mri"
    assert read(tmp_path, modality="ct", **options)[0].modality == "ct"
    assert source.unused == [str(tmp_path / "labelsTr/amos_0507.nii.gz")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ""}, "the options images and labels go together"),
        ({"images": "", "labels": ""}, "and values with both"),
        ({"values": {"liver": 1}}, "the option values must name label values"),
        ({"values": [1]}, "option 'values': expected"),
        ({"values": {1: 1}}, "the option values must name label values"),
        ({"values": {1: "(x)"}}, r"the structure name '\(x\)' has no words"),
        ({"values": {1: "liver"}}, r"the values 2, 3, 4 have no name: .*as the option values"),
        ({"values": {}}, "the values 1, 2, 3, 4 have no name"),
        ({"labels": "{id}/{id}_*.nii.gz"}, "are what the pattern of annotations takes for them"),
        ({"images": "{id}/{id}_t1.nii.gz", "labels": "{id}/{id}_*[2g].nii.gz"}, "has several label files"),
    ],
)
def test_options_that_cannot_be_used_are_errors(tmp_path, options, message):
    with pytest.raises(SourceError, match=message):
        list(read(write_pairs(tmp_path), **options))


def test_choice_of_slices_is_made_again_when_the_names_change(tmp_path):
    write_pairs(tmp_path / "data")
    first = read(tmp_path / "data", plans=str(tmp_path / "plans"))
    other = {1: "liver", 2: "spleen", 3: "vertebrae", 4: "colon"}
    again = read(tmp_path / "data", plans=str(tmp_path / "plans"), values=other)
    fresh = read(tmp_path / "data", values=other)
    assert [example.image_id for example in again] == [example.image_id for example in fresh]
    assert len(list((tmp_path / "plans").iterdir())) == 4 and len(first) > 0


def test_folder_alone_keeps_its_own_layout(tmp_path):
    with pytest.raises(SourceError, match="has no layout that is supported"):
        detect_source(write_pairs(tmp_path))
