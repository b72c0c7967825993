import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.curate import SourceError
from data_pipelines.sources.patterns import Pattern, pair_files

NAMES = st.text(st.sampled_from("ab_-(). 1[]{}*?é"), min_size=1, max_size=6).filter(lambda name: name[0] != ".")


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def pairs_of(folder, images, *annotations):
    """Image id: names of its annotations; and the names of what is unused."""
    pairs, unused = pair_files(folder, images, annotations)
    found = {pair.image_id: [path.relative_to(folder).as_posix() for path, _, _ in pair.annotations] for pair in pairs}
    return found, [path.removeprefix(f"{folder}/") for path in unused]


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("{id}/{id}_{sequence}.nii.gz", "B_1/B_1_t1ce.nii.gz", {"id": "B_1", "sequence": "t1ce"}),
        ("{id}/{id}_{sequence}.nii.gz", "B_1/B_2_t1ce.nii.gz", None),
        ("{id}/{id}_{sequence:t1*}.nii.gz", "B/B_t2.nii.gz", None),
        ("Fold {f}/fold{f}.npy", "Fold 2/fold2.npy", {"f": "2"}),
        ("{id}.png", "a/b.png", None),
        ("{id}.png", ".png", None),
        ("*/{id}.png", "a/b.png", {"id": "b"}),
        ("*/{id}.png", "a/c/b.png", None),
        ("**/{id}.png", "b.png", {"id": "b"}),
        ("**/{id}.png", "a/c/b.png", {"id": "b"}),
        ("{id}.p?g", "b.png", {"id": "b"}),
        ("{id:amos_0[0-4]*}.gz", "amos_0407.gz", {"id": "amos_0407"}),
        ("{id:amos_0[!0-4]*}.gz", "amos_0407.gz", None),
        ("{id:amos_0[!0-4]*}.gz", "amos_0/07.gz", None),
        ("{id}_[sS]eg.png", "a_Seg.png", {"id": "a"}),
        ("{id}[^&].png", "a^.png", {"id": "a"}),
        ("{id}[^&].png", "ab.png", None),
        ("{id}[[].png", "a[.png", {"id": "a"}),
        ("{id}+(1).png", "aa(1).png", None),
    ],
)
def test_pattern_fits_whole_paths_and_tells_their_words(text, path, words):
    assert Pattern(text).match(path) == words


@given(NAMES, NAMES)
def test_words_of_a_name_are_found_again(first, second):
    path = f"x {first}/{second}+{first}.png"
    assert Pattern("x {a}/{b}+{a}.png").match(path) == {"a": first, "b": second}


@given(NAMES)
def test_text_outside_of_marks_means_itself(name):
    text = re.sub(r"[\[*?{}]", lambda mark: {"{": "?", "}": "?"}.get(mark[0], f"[{mark[0]}]"), name)
    assert Pattern(f"{text}/{{id}}").match(f"{name}/7") == {"id": "7"}


@pytest.mark.parametrize(
    "text", ["", "/{id}.png", "../{id}.png", "a/../{id}", "{ID}.png", "{id", "id}", "{}", "{a:{b}}", "{a:}"]
)
def test_what_is_no_pattern_is_an_error_that_shows_one(text):
    with pytest.raises(SourceError, match=re.escape(f"pattern {text!r} must be a path below the input folder")):
        Pattern(text)


def test_word_that_is_told_twice_and_empty_set_are_errors():
    with pytest.raises(SourceError, match=r"says twice what \{a\} is"):
        Pattern("{a:b*}/{a:c*}")
    assert Pattern("{a:b*}/{a}").match("bc/bc") == {"a": "bc"}
    with pytest.raises(SourceError, match=r"has an empty \[\] in it"):
        Pattern("{id}[!]")


def test_masks_beside_their_images_are_no_images(tmp_path):
    touch(tmp_path, *(f"benign/benign (1){end}.png" for end in ("", "_mask", "_mask_1")), "normal/normal (1).png")
    touch(tmp_path, "normal/normal (1)_mask.png", "benign/benign (2).png", "malignant/benign (2)_mask.png")
    found, unused = pairs_of(tmp_path, "{class}/{id}.png", "{class}/{id}_mask*.png")
    assert found == {
        "benign/benign (1)": ["benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png"],
        "normal/normal (1)": ["normal/normal (1)_mask.png"],
    }
    assert unused == ["benign/benign (2).png", "malignant/benign (2)_mask.png"]


@pytest.mark.parametrize("order", [("a", "a_b"), ("a_b", "a")])
def test_id_is_the_longest_that_an_image_has(tmp_path, order):
    touch(tmp_path, *(f"images/{name}.png" for name in order))
    touch(tmp_path, "masks/a_left_lung.png", "masks/a_b_left_lung.png", "masks/c_lung.png")
    found, unused = pairs_of(tmp_path, "images/{id}.png", "masks/{id}_{class}.png")
    assert found == {"a": ["masks/a_left_lung.png"], "a_b": ["masks/a_b_left_lung.png"]}
    assert unused == ["masks/c_lung.png"]


@given(st.sets(st.text("ab_", min_size=1, max_size=4), min_size=1, max_size=5), st.sampled_from(["x", "x_y", "_"]))
def test_every_mask_finds_an_image_whose_id_begins_its_name(tmp_path_factory, ids, class_):
    folder = tmp_path_factory.mktemp("pairs")
    touch(folder, *(f"images/{name}.png" for name in ids), *(f"masks/{name}_{class_}.png" for name in ids))
    pairs, unused = pair_files(folder, "images/{id}.png", ["masks/{id}_{class}.png"])
    masks = [path.stem for pair in pairs for path, _, _ in pair.annotations]
    assert sorted(masks) == sorted(f"{name}_{class_}" for name in ids)
    for pair in pairs:
        for path, words, _ in pair.annotations:
            assert path.stem == f"{pair.words['id']}_{words['class']}"
            longer = [other for other in ids if len(other) > len(pair.words["id"])]
            assert not any(path.stem.startswith(f"{other}_") and path.stem != f"{other}_" for other in longer)
    assert all("images" in path for path in unused)


def test_several_images_share_an_annotation_and_patterns_are_numbered(tmp_path):
    touch(tmp_path, *(f"A/A_{name}.gz" for name in ("t1", "t2", "seg")), "A/A.txt")
    pairs, unused = pair_files(tmp_path, "{id}/{id}_{sequence}.gz", ["{id}/{id}_seg.gz", "{id}/{id}.txt"])
    assert [pair.image_id for pair in pairs] == ["A/t1", "A/t2"]
    assert [[number for _, _, number in pair.annotations] for pair in pairs] == [[1, 0], [1, 0]]
    assert unused == []


def test_hidden_files_and_litter_belong_to_nothing(tmp_path):
    touch(tmp_path, "a.png", "a_mask.png", "._a.png", ".x/b.png", "__MACOSX/a.png")
    assert pairs_of(tmp_path, "**/{id}.png", "**/{id}_mask.png") == ({"a": ["a_mask.png"]}, [])


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ("images/{id}.jpg", "masks/{id}.png", r"no file is named 'images/\{id\}\.jpg'; found images/a\.png, "),
        ("images/{id}.png", "masks/{id}.jpg", r"no file is named 'masks/\{id\}\.jpg'; found images/a\.png, "),
        (
            "images/{id}.png",
            "other/{id}_m.png",
            r"no file named 'other.*' belongs to one named 'images.*such as images/a",
        ),
        ("images/{id}.png", "masks/{name}.png", r"share no word: write \{id\} into both"),
        ("*/{id}.png", "masks/{id}_*.png", r"images/a\.png and .*masks/a\.png have the same id 'a'"),
    ],
)
def test_patterns_that_find_nothing_are_errors_that_show_what_there_is(tmp_path, images, masks, message):
    touch(tmp_path, "images/a.png", "masks/a_x.png", "masks/a.png", "other/b_m.png", "other/a.png")
    with pytest.raises(SourceError, match=message):
        pair_files(tmp_path, images, [masks])
