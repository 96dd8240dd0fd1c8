"""What transformers' own tests ask of every configuration (ConfigTester in its tests), of each of ours."""

import json

import pytest
from families import CASES, ENCODER_DECODERS

CONFIGS = {name: (case.family.config, case.sizes) for name, case in (CASES | ENCODER_DECODERS).items()}
# keys of every configuration, with values other than the defaults
COMMON = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_can_be_read_and_set_by_their_common_names(name):
    config_class, sizes = CONFIGS[name]
    config = config_class(**sizes)
    for number, key in enumerate(("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"), start=2):
        assert getattr(config, key) >= 2
        setattr(config, key, number)
        assert getattr(config, key) == number
        assert getattr(config_class(**{key: number}), key) == number  # a model of it may be refused


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_written_and_read_unchanged(name, tmp_path):
    config_class, sizes = CONFIGS[name]
    config = config_class(**sizes)
    written = json.loads(config.to_json_string())
    assert {key: written[key] for key in sizes} == sizes
    config.to_json_file(tmp_path / "config.json")
    assert config_class.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "folder" / "sub")
    read = config_class.from_pretrained(tmp_path / "folder" / "sub")
    assert read.to_dict() == config.to_dict()
    assert config_class.from_pretrained(tmp_path / "folder", subfolder="sub").to_dict() == config.to_dict()
    read.save_pretrained(tmp_path / "again")
    assert config_class.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()
    with pytest.raises(OSError, match="gone"):
        config_class.from_pretrained(str(tmp_path / "gone"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_number_of_labels_follows(name):
    config_class, sizes = CONFIGS[name]
    config = config_class(**sizes, num_labels=5)
    assert (len(config.id2label), len(config.label2id)) == (5, 5)
    config.num_labels = 3
    assert (len(config.id2label), len(config.label2id)) == (3, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_needs_no_argument_and_takes_the_common_ones(name):
    config_class, _ = CONFIGS[name]
    assert config_class().model_type == config_class.model_type
    config = config_class(**COMMON)
    for key, value in COMMON.items():
        shown = str(config.dtype).removeprefix("torch.") if key == "dtype" else getattr(config, key)
        assert shown == value, key
