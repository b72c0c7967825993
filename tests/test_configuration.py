"""Recipes from files, names and runs, and single fields from the command line."""

import pytest

from configs.medglip_t import get_config
from medglip_jax.configuration import ConfigError, load_config, recipes, save_config


def test_json_round_trip_keeps_tuples_and_types(tmp_path):
    config = load_config("medglip_t")
    save_config(config, tmp_path / "config.json")
    again = load_config(tmp_path)
    assert again.to_dict() == config.to_dict() == get_config().to_dict()
    assert again.data.canvas == (800, 1344) and again.activation_rules[0] == ("batch", ("replica", "data", "fsdp"))
    assert type(again.detection.anchor_scale) is float


def test_recipe_is_found_by_name_and_by_file(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from configs import medglip_t\n\n"
        "def get_config():\n    config = medglip_t.get_config()\n    config.seed = 7\n    return config\n"
    )
    assert "medglip_t" in recipes()
    assert load_config(recipe).seed == 7
    assert load_config("medglip_t").seed == 0


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--config.data.train=DIR:train"], "data.train", "DIR:train"),
        (["--config.data.train", "12"], "data.train", "12"),
        (["--config.data.train="], "data.train", ""),
        (["--config.seed=3", "--config.seed", "-4"], "seed", -4),
        (["--config.optimizer.learning_rate=3e-4"], "optimizer.learning_rate", 3e-4),
        (["--config.optimizer.clip_norm=2"], "optimizer.clip_norm", 2.0),
        (["--config.data.canvas=256,320"], "data.canvas", (256, 320)),
        (["--config.model.swin.depths=[1, 1]"], "model.swin.depths", (1, 1)),
        (["--config.data.scale_range=(1, 1)"], "data.scale_range", (1.0, 1.0)),
        (["--config.model.tower.legacy_offsets=false"], "model.tower.legacy_offsets", False),
        (["--config.model.tower.legacy_offsets", "--config.seed=1"], "model.tower.legacy_offsets", True),
        (["--config.sharding_rules=(('a', ['fsdp']),)"], "sharding_rules", (("a", ("fsdp",)),)),
    ],
)
def test_command_line_sets_a_field(arguments, field, value):
    config = load_config("medglip_t", arguments)
    for name in field.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.batchsize=4"], r"no field config\.data\.batchsize; the nearest is config\.data\.batch_size"),
        (["--config.lerning_rate=1"], r"nearest is config\.optimizer\.learning_rate"),
        (["--config.data=4"], r"config\.data is a group"),
        (["--config.seed=1.5"], r"config\.seed is 1\.5 \(float\): expected int"),
        (["--config.seed"], r"--config\.seed needs a value"),
        (["--config.seed=many"], r"config\.seed is 'many'"),
        (["--config.seed=True"], r"config\.seed is True"),
        (["--config.data.canvas=256"], r"config\.data\.canvas is 256 \(int\): expected tuple"),
        (["--config.data.canvas=256,wide"], r"config\.data\.canvas is"),
        (["--config.data.canvas=(256,2.5)"], r"config\.data\.canvas is 2\.5"),
        (["--config.model.tower.legacy_offsets=maybe"], r"legacy_offsets is 'maybe'"),
        (["--steps=4"], r"unknown argument --steps=4"),
        (["stray"], r"unknown argument stray"),
    ],
)
def test_wrong_argument_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config("medglip_t", arguments)


def test_unknown_and_missing_fields_of_a_recipe_are_named(tmp_path):
    config = get_config()
    config.optimizer.weight_decai = 0.1
    save_config(config, tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decai; the nearest is config\.optimizer\.weight_decay"):
        load_config(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from configs import medglip_t\ndef get_config():\n    config = medglip_t.get_config()\n")
    with recipe.open("a") as file:
        file.write("    del config.optimizer.eps\n    return config\n")
    with pytest.raises(ConfigError, match=r"config\.optimizer\.eps is missing"):
        load_config(recipe)


def test_fields_newer_than_a_run_have_the_values_of_the_base_recipe(tmp_path):
    config = get_config()
    config.optimizer.b1 = 0.5
    del config.optimizer.eps
    del config.init
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path).optimizer.eps == get_config().optimizer.eps
    assert load_config(tmp_path).optimizer.b1 == 0.5
    assert load_config(tmp_path).init.model == ""


def test_unreadable_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.py: expected a Python file.*medglip_t"):
        load_config("nowhere.py")
    with pytest.raises(ConfigError, match=r"no .*config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1')
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(tmp_path)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="no function get_config"):
        load_config(tmp_path / "empty.py")


def test_recipe_is_locked_against_new_fields():
    config = load_config("medglip_t")
    config.data.train = "DIR"
    with pytest.raises(AttributeError):
        config.data.trian = "DIR"
