import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.medglip_t import get_config
from medglip_jax.interop.huggingface import load_bert, load_swin
from medglip_jax.model.bert import Bert
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.model.swin import Swin

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SWIN = {"embed_dim": 8, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 64}
BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of Swin's image processors, RGB


@pytest.fixture(scope="module")
def recipe():
    config = get_config()
    swin, bert = config.model.swin, config.model.bert
    swin.embed_dim, swin.depths, swin.num_heads, swin.window = 8, (1, 2, 1, 2), (1, 2, 2, 4), 4
    bert.vocab_size, bert.hidden_size, bert.num_layers, bert.num_heads = 50, 16, 2, 2
    bert.intermediate_size, bert.max_positions = 24, 32
    return config


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swin_backbone(tmp_path_factory):
    config = transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    model = randomized(transformers.SwinBackbone(config))
    return model, save(model, tmp_path_factory.mktemp("swin_backbone"))


@pytest.fixture(scope="module")
def bert_with_heads(tmp_path_factory):
    model = randomized(transformers.BertForPreTraining(transformers.BertConfig(**BERT)))
    return model, save(model, tmp_path_factory.mktemp("bert"))


def copied(folder, target, **settings):
    """Copies a folder, with other settings in its config.json; None takes a setting out."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = target / "config.json"
    found = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return target


def rewrite(folder, change):
    """Replaces the weights of a folder by what `change` makes of them."""
    path = pathlib.Path(folder) / "model.safetensors"
    arrays = change(load_file(path))
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)
    return folder


def our_features(config, params, image):
    pixels = normalize_pixels(jnp.asarray(image), jnp.asarray([image.shape[1:3]]))
    module = Swin(config.model.swin, jnp.dtype(jnp.float32))
    return jax.jit(lambda params: module.apply({"params": params}, pixels, False))(params)


def their_features(model, image):
    pixels = (image / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    with torch.no_grad():
        maps = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))).feature_maps
    return [x.permute(0, 2, 3, 1).numpy() for x in maps[-3:]]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (1, 72, 104, 3), dtype=np.uint8)  # padded in all stages


def test_swin_backbone_computes_the_same_features(recipe, swin_backbone, image):
    model, folder = swin_backbone
    params, report = load_swin(folder, recipe)
    assert report.complete and not report.reshaped
    for ours, theirs in zip(our_features(recipe, params, image), their_features(model, image), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_swin_without_output_norms_reports_them_as_missing(recipe, image, tmp_path):
    model = randomized(transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)))
    params, report = load_swin(save(model, tmp_path), recipe)
    assert len(report.missing) == 6 and all(name.startswith("hidden_states_norms.stage") for name in report.missing)
    assert {"classifier.weight", "layernorm.weight"} <= set(report.ignored) and not report.unexpected
    assert not {"norm_1", "norm_2", "norm_3"} & params.keys()

    stages = ["stage2", "stage3", "stage4"]
    oracle = transformers.SwinBackbone.from_pretrained(tmp_path, out_features=stages).eval()
    fresh = {f"norm_{i}": {"scale": np.ones(8 << i), "bias": np.zeros(8 << i)} for i in (1, 2, 3)}
    for ours, theirs in zip(our_features(recipe, params | fresh, image), their_features(oracle, image), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_swin_model_without_prefix_and_with_old_buffers(recipe, swin_backbone, tmp_path):
    model, folder = swin_backbone
    wanted, _ = load_swin(folder, recipe)
    save(model.swin, tmp_path)
    rewrite(
        tmp_path,
        lambda arrays: {
            "swin.embeddings.mask_token": np.zeros(8, np.float32),
            "encoder.layers.0.blocks.0.attention.self.relative_position_index": np.zeros((16, 16), np.int64),
            **arrays,
        },
    )
    params, report = load_swin(tmp_path, recipe)
    assert len(report.missing) == 6 and not report.unexpected
    np.testing.assert_array_equal(
        params["stage_1_block_1"]["attention"]["qkv"]["kernel"], wanted["stage_1_block_1"]["attention"]["qkv"]["kernel"]
    )


@pytest.mark.parametrize("window", [3, 7])
def test_tables_of_another_window_are_resized_as_swins_authors_do(recipe, swin_backbone, window):
    _, folder = swin_backbone
    config = recipe.copy_and_resolve_references()
    config.model.swin.window = window
    params, report = load_swin(folder, config)
    assert len(report.reshaped) == 6
    assert report.reshaped[0][1:] == ((49, 1), ((2 * window - 1) ** 2, 1))

    name = "encoder.layers.3.blocks.1.attention.self.relative_position_bias_table"
    table = torch.from_numpy(load_file(folder / "model.safetensors")[name])  # [49, heads]
    size = (2 * window - 1, 2 * window - 1)
    wanted = torch.nn.functional.interpolate(table.T.reshape(1, 4, 7, 7), size=size, mode="bicubic")
    ours = params["stage_3_block_1"]["attention"]["relative_position_bias_table"]
    np.testing.assert_allclose(ours, wanted.reshape(4, -1).T, atol=1e-5)


def test_swin_of_other_sizes_is_refused_field_by_field(swin_backbone):
    _, folder = swin_backbone
    config = get_config()
    config.model.swin.mlp_ratio = 2
    with pytest.raises(ValueError) as error:
        load_swin(folder, config)
    for field, ours, theirs in (
        ("embed_dim", 96, 8),
        ("depths", (2, 2, 6, 2), (1, 2, 1, 2)),
        ("num_heads", (3, 6, 12, 24), (1, 2, 2, 4)),
        ("mlp_ratio", 2, 4.0),
    ):
        assert f"config.model.swin.{field} is {ours}, it has {theirs}" in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"), [("patch_size", 2), ("hidden_act", "relu"), ("use_absolute_embeddings", True)]
)
def test_a_swin_that_the_model_cannot_be_is_refused(recipe, swin_backbone, tmp_path, setting, value):
    folder = copied(swin_backbone[1], tmp_path, **{setting: value})
    with pytest.raises(ValueError, match=f"{setting} is .* in this model, which has no setting for it; it has {value}"):
        load_swin(folder, recipe)


def test_missing_weights_of_the_encoder_are_refused(recipe, swin_backbone, tmp_path):
    def without_a_key(arrays):
        return {name: x for name, x in arrays.items() if not name.endswith("layers.1.blocks.0.attention.self.key.bias")}

    folder = rewrite(copied(swin_backbone[1], tmp_path), without_a_key)
    with pytest.raises(
        ValueError, match=r"missing: encoder\.layers\.1\.blocks\.0\.attention\.self\.\{query,key,value}\.bias"
    ):
        load_swin(folder, recipe)


def run_bert(config, params, ids, mask):
    module = Bert(config.model.bert, jnp.dtype(jnp.float32))
    return module.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask, bool), False)


@pytest.fixture(scope="module")
def prompt():
    ids = np.random.default_rng(0).integers(0, 50, (2, 12))
    mask = np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    return ids, mask


def assert_same_text(config, params, model, prompt):
    ids, mask = prompt
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    np.testing.assert_allclose(run_bert(config, params, ids, mask), wanted, atol=1e-5, rtol=1e-5)


def test_bert_computes_the_same_hidden_states(recipe, bert_with_heads, prompt):
    model, folder = bert_with_heads
    params, report = load_bert(folder, recipe)
    assert report.complete and not report.reshaped
    assert {"pooler.dense.weight", "cls.predictions.bias", "cls.seq_relationship.weight"} <= set(report.ignored)
    assert_same_text(recipe, params, model.bert, prompt)


def test_bert_without_prefix(recipe, bert_with_heads, tmp_path, prompt):
    model, _ = bert_with_heads
    params, report = load_bert(save(model.bert, tmp_path), recipe)
    assert report.complete
    assert_same_text(recipe, params, model.bert, prompt)


def test_bert_with_tensorflows_names_old_buffers_and_a_sparse_config(recipe, bert_with_heads, tmp_path, prompt):
    """As in bert-base-uncased, and in .bin files of 2019 such as Bio_ClinicalBERT's."""
    model, folder = bert_with_heads
    copied(folder, tmp_path, model_type=None, layer_norm_eps=None, architectures=None)
    state_dict = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in model.state_dict().items()
    }
    assert "bert.encoder.layer.1.output.LayerNorm.beta" in state_dict
    state_dict["bert.embeddings.position_ids"] = torch.arange(32)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state_dict, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    params, report = load_bert(tmp_path, recipe)
    assert report.complete and "embeddings.position_ids" in report.ignored
    assert_same_text(recipe, params, model.bert, prompt)


def test_more_positions_are_cut_and_reported(recipe, bert_with_heads, prompt):
    model, folder = bert_with_heads
    config = recipe.copy_and_resolve_references()
    config.model.bert.max_positions = 16
    params, report = load_bert(folder, config)
    assert report.reshaped == (("embeddings.position_embeddings.weight", (32, 16), (16, 16)),)
    assert_same_text(config, params, model.bert, prompt)


def test_bert_of_other_sizes_is_refused_field_by_field(bert_with_heads):
    with pytest.raises(ValueError) as error:
        load_bert(bert_with_heads[1], get_config())
    for field, ours, theirs in (
        ("vocab_size", 30522, 50),
        ("hidden_size", 768, 16),
        ("num_layers", 12, 2),
        ("num_heads", 12, 2),
        ("intermediate_size", 3072, 24),
        ("max_positions", 512, 32),
    ):
        assert f"config.model.bert.{field} is {ours}, it has {theirs}" in str(error.value)


def test_weights_that_are_not_those_of_config_json_are_refused(recipe, bert_with_heads, tmp_path):
    def with_fewer_rows(arrays):
        name = "bert.embeddings.word_embeddings.weight"
        return {**arrays, name: arrays[name][:40]}

    folder = rewrite(copied(bert_with_heads[1], tmp_path), with_fewer_rows)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight \[40, 16\], model \[50, 16\]"):
        load_bert(folder, recipe)


def test_a_folder_of_another_architecture_is_refused(recipe, swin_backbone, bert_with_heads):
    with pytest.raises(ValueError, match=r"config\.json describes a model of type 'bert': expected 'swin'"):
        load_swin(bert_with_heads[1], recipe)
    with pytest.raises(ValueError, match="of type 'swin': expected 'bert'"):
        load_bert(swin_backbone[1], recipe)


def test_a_folder_that_is_not_there_says_how_to_fetch_it(recipe):
    with pytest.raises(ValueError, match=r"hf download emilyalsentzer/Bio_ClinicalBERT --local-dir DIR"):
        load_bert("emilyalsentzer/Bio_ClinicalBERT", recipe)


def test_a_folder_without_config_json_is_named(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        load_bert(tmp_path, recipe)
