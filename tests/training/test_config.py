"""Settings from YAML, flags and Python: conversion, limits, and errors that name what is wrong."""

import argparse
import dataclasses

import pytest
from places import ROOT

from dpo_kernels.training.config import (
    DEMO,
    TrainConfig,
    add_flags,
    load_config,
    normalize_flags,
    practice_warnings,
    trajectory_settings,
)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_values_take_the_type_of_their_field(tmp_path):
    # YAML 1.1 reads 5e-7 and 1e3 as strings and a bare `no` as false.
    config = load_config(
        write(
            tmp_path,
            "model: m\ndataset: d\nlearning_rate: 5e-7\nmax_steps: 1e3\nbeta: '0.2'\nepochs: 2\nmixed_precision: no\n"
            "loss_type: sigmoid, sft\nloss_weights: [1, 0.5]\nmax_length: null\nadd_eos: 'false'\n",
        )
    )
    assert (config.learning_rate, config.max_steps, config.beta, config.epochs) == (5e-7, 1000, 0.2, 2.0)
    assert isinstance(config.max_steps, int) and isinstance(config.epochs, float)
    assert (config.mixed_precision, config.max_length, config.add_eos) == ("no", None, False)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-6", r"unknown key 'learning_rat' .*did you mean 'learning_rate'\?"),
        ("per_device_train_batch_size: 4", r"did you mean 'per_device_batch_size'\?"),
        ("learning_rate: fast", r"learning_rate: expected a finite number, got 'fast' \(str\)"),
        ("learning_rate: .nan", r"learning_rate: expected a finite number"),
        ("learning_rate: 0", r"learning_rate: expected a number above 0, got 0"),
        ("max_steps: 1.5", r"max_steps: expected a whole number, got 1.5 \(float\)"),
        ("max_steps: true", r"max_steps: expected a whole number, got True \(bool\)"),
        ("seed: null", r"seed: expected a whole number, got None"),
        ("gradient_checkpointing: maybe", r"gradient_checkpointing: expected true or false, got 'maybe'"),
        ("revision: 12345", r"revision: expected a string, got 12345 \(int\)"),
        ("schedule: cosin", r"schedule: expected one of linear, cosine, constant, got 'cosin'; did you mean 'cosine'"),
        ("lora_dropout: 2", r"lora_dropout: expected at most 0.99, got 2"),
        ("loss_type: sigmod", r"loss_type: unknown loss 'sigmod'; did you mean 'sigmoid'\?"),
        ("loss_type: [sigmoid, simpo]", r"loss_type: simpo stands alone, got sigmoid,simpo"),
        ("loss_type: []", r"loss_type: expected at least one loss"),
        ("loss_weights: [1, 2]", r"loss_weights must have one weight for each"),
        ("label_smoothing: 0.1", r"label_smoothing must be 0 for loss_type \['sigmoid'\].*'cdpo'"),
        ("{loss_type: orpo, ld_alpha: 0.5}", r"ld_alpha: loss_type 'orpo' has none, got 0.5"),
        ("{loss_type: simpo, rpo_alpha: 0.5}", r"rpo_alpha: loss_type 'simpo' has none, got 0.5"),
        ("{rpo_alpha: -0.5}", "rpo_alpha must be a finite number of at least 0, got -0.5"),
        ("{loss_type: simpo, reference: copy}", r"reference: loss_type 'simpo' has none, got 'copy'"),
        ("reference: base", r"reference 'base' needs a LoRA policy"),
        ("{eval_fraction: 0, load_best_model_at_end: true}", r"load_best_model_at_end needs held-out pairs"),
        ("{mixed_precision: fp16, dtype: bfloat16}", r"mixed_precision 'fp16' scales the gradients of float32 weights"),
        ("a: [", r"run.yaml is not valid YAML.*line 1"),
        ("- a", r"run.yaml must hold 'key: value' lines, got a list"),
        ("just words", r"run.yaml must hold 'key: value' lines, got a str"),
        ("5", r"run.yaml must hold 'key: value' lines, got a int"),
        ("beta: 0.1\nseed: 1\nbeta: 0.2", r"run.yaml is not valid YAML: beta: there twice"),
        ("beta:\t0.1\n\tseed: 1", r"run.yaml is not valid YAML"),
        ("batch_size: 4", r"unknown key 'batch_size' in .*run.yaml; did you mean 'per_device_batch_size'\?"),
        ("lr: 1", r"unknown key 'lr' in .*run.yaml; known: "),
        ("1: 2", r"unknown key 1 in .*run.yaml"),
        ("yes: 2", r"unknown key True in .*run.yaml"),
        ("beta: -1", r"run.yaml: beta: expected a number above 0"),
        ("save_total_limit: 1", r"run.yaml: save_total_limit: expected at least 2, got 1"),
        ("dataset_weights: [1, -2]", r"run.yaml: dataset_weights: expected at least 0, got -2"),
        (
            "dataset_weights: [1, 2]",
            r"run.yaml: dataset_weights: expected one for each of 1 datasets, got 2: \[1.0, 2.0\]",
        ),
        ("dataset_weights: [0]", r"run.yaml: dataset_weights: expected one above 0, got \[0.0\]"),
        ("dataset_split: [train, test]", r"run.yaml: dataset_split: expected one for each of 1 datasets, got 2"),
        ("eval_dataset: []", r"run.yaml: eval_dataset: expected at least one name, got \[\]"),
        ("eval_dataset: [3]", r"run.yaml: eval_dataset: expected a string, got 3 \(int\)"),
        ("train_on: first", r"run.yaml: train_on: expected one of all, last, got 'first'"),
        ("disable_dropout: 0.1", r"run.yaml: disable_dropout: expected true or false, got 0.1"),
        ("chat_template_kwargs: thinking", r"chat_template_kwargs: expected a JSON object such as .*got 'thinking'"),
        ("chat_template_kwargs: [1]", r"chat_template_kwargs: expected a JSON object .*got \[1\] \(list\)"),
        ("chat_template_kwargs: '[1]'", r"chat_template_kwargs: expected a JSON object .*got \[1\] \(list\)"),
        ("chat_template_kwargs: {1: 2}", r"chat_template_kwargs: expected text for a key, got 1 \(int\)"),
        ("chat_template_kwargs: {date: 2024-07-26}", r"chat_template_kwargs: date: expected what JSON has; in quotes"),
        ("chat_template_kwargs: {x: .nan}", r"chat_template_kwargs: x: expected what JSON has"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"(?s)" + message):
        load_config(path, {"model": "m", "dataset": "d"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: caf\u00e9".encode("latin-1"), "run.yaml is not UTF-8 text"),
        ("model: m".encode("utf-16"), "run.yaml is not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "run.yaml is not UTF-8 text"),
        (b"model: \x00m", "run.yaml is not valid YAML"),
        (b"model: m\ndataset: *d", "run.yaml is not valid YAML"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml")


def test_flags_are_not_blamed_on_the_file(tmp_path):
    path = write(tmp_path, "model: m\ndataset: d\nbeta: 0.1\n")
    with pytest.raises(ValueError, match="^beta: expected a number above 0"):
        load_config(path, {"beta": "-1"})
    (tmp_path / "bom.yaml").write_text("model: m\ndataset: d\n", encoding="utf-8-sig")  # as editors on Windows write it
    assert load_config(tmp_path / "bom.yaml").model == "m"
    merged = write(tmp_path, "model: &m x\ndataset: *m\n")
    assert load_config(merged).dataset == "x"


def test_python_callers_get_the_same_errors():
    with pytest.raises(ValueError, match="beta: expected a number above 0, got -1"):
        TrainConfig(beta=-1)


def test_without_a_file_it_is_the_demo_until_a_model_or_dataset_is_named(tmp_path):
    demo = load_config(None)
    assert all(getattr(demo, name) == value for name, value in DEMO.items())
    assert load_config(None, {"beta": "0.3"}).learning_rate == DEMO["learning_rate"]
    with pytest.raises(ValueError, match="dataset is missing"):
        load_config(None, {"model": "m"})
    assert load_config(None, {"model": "m", "dataset": "d"}).learning_rate == TrainConfig().learning_rate
    with pytest.raises(ValueError, match="model is missing: put it into .*run.yaml"):
        load_config(write(tmp_path, "dataset: d"))


def parse(*arguments):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("config", nargs="?")
    add_flags(parser)
    options = vars(parser.parse_args(normalize_flags(arguments)))
    return options.pop("config"), options


def test_every_field_is_a_flag_in_both_spellings_with_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for entry in dataclasses.fields(TrainConfig):
        flag = f"--{entry.name.replace('_', '-')}"
        assert f"{flag} " in text and entry.metadata["help"], flag
        value = {"bool": "true", "bool | None": "true"}.get(entry.type, "1")
        for spelling in (flag, f"--{entry.name}"):
            assert parse(spelling, value)[1] == {entry.name: value}


def test_boolean_flags_leave_the_next_argument_alone():
    assert parse("--gradient-checkpointing", "run.yaml") == ("run.yaml", {"gradient_checkpointing": "true"})
    assert parse("--gradient-checkpointing", "false", "run.yaml") == ("run.yaml", {"gradient_checkpointing": "false"})
    assert parse("--no-add-eos", "--add_eos=true")[1] == {"add_eos": "true"}
    assert parse("--no-add-eos")[1] == {"add_eos": "false"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dataset", "a", "b"], ["a", "b"]),
        (["--dataset", "a", "b", "c", "--beta", "1"], ["a", "b", "c"]),
        (["--dataset", "a,b"], ["a", "b"]),
        (["--dataset=a, b ,"], ["a", "b"]),
        (["--dataset=a", "b"], ["a", "b"]),
        (["--dataset", "a"], "a"),
        (["--dataset", "a", "run.yaml"], "a"),
        (["run.yaml", "--dataset", "a", "b"], ["a", "b"]),
        (["--dataset", "a,b", "run.yml"], ["a", "b"]),
        (["--dataset", "a", "b", "--no-add-eos", "run.yaml"], ["a", "b"]),
    ],
    ids=" ".join,
)
def test_a_flag_takes_several_datasets(arguments, expected):
    path, options = parse(*arguments)
    assert path == next((argument for argument in arguments if ".y" in argument), None)
    assert TrainConfig(**options).dataset == expected


def test_a_name_with_commas_is_one_where_there_is_such_a_file(tmp_path):
    file = tmp_path / "red,green.jsonl"
    assert TrainConfig(dataset=str(file)).dataset == [str(tmp_path / "red"), "green.jsonl"]
    file.write_text("")
    assert TrainConfig(dataset=str(file)).dataset == str(file)
    assert TrainConfig(**parse("--dataset", str(file), "b")[1]).dataset == [str(file), "b"]
    assert TrainConfig(dataset=["a,b"]).dataset == "a,b" and TrainConfig(eval_dataset="none").eval_dataset is None


def test_weights_of_datasets():
    options = parse("--dataset", "a", "b", "--dataset-weights", "1", "0.5")[1]
    assert TrainConfig(**options).dataset_weights == [1.0, 0.5]
    options = parse("--dataset", "a,b", "--dataset-weights", "1,0.5", "run.yaml")[1]
    assert TrainConfig(**options).dataset_weights == [1.0, 0.5]
    with pytest.raises(ValueError, match="'--dataset' is there twice: expected all its values after one flag"):
        parse("--dataset", "a", "--dataset", "b")


def test_objects_as_flags():
    (value,) = parse("--chat-template-kwargs", '{"enable_thinking": false, "tools": ["a", 1.5]}')[1].values()
    assert TrainConfig(chat_template_kwargs=value).chat_template_kwargs == {
        "enable_thinking": False,
        "tools": ["a", 1.5],
    }
    assert TrainConfig(chat_template_kwargs="none").chat_template_kwargs is None
    assert TrainConfig(chat_template_kwargs="{}").chat_template_kwargs == {}


def test_flags_override_the_file(tmp_path):
    path = write(tmp_path, "model: m\ndataset: d\nbeta: 0.2\nloss_type: ipo\n")
    config = load_config(path, parse("--loss-type", "sigmoid,sft", "--max_grad_norm=0.5")[1])
    assert (config.beta, config.loss_type, config.max_grad_norm) == (0.2, ["sigmoid", "sft"], 0.5)


@pytest.mark.parametrize(
    ("flag", "nearest"), [("--learning-rat", "--learning-rate"), ("--lora_rank", "--lora-"), ("--no-seed", "--seed")]
)
def test_mistyped_flags_get_the_nearest_name(flag, nearest):
    with pytest.raises(ValueError, match=f"unknown flag '{flag}'; did you mean '{nearest}"):
        normalize_flags([flag, "1"])


def test_practice_warnings():
    quiet = TrainConfig(model="m", dataset="d")
    assert practice_warnings(quiet) == []
    for changed, start in (
        ({"learning_rate": 2e-5}, "learning_rate 2e-05 is above 1e-5"),
        ({"epochs": 4}, "epochs 4 is more than 3"),
        ({"beta": 0.6}, "beta 0.6 is outside 0.01 to 0.5"),
        ({"beta": 0.005}, "beta 0.005 is outside 0.01 to 0.5"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' without LoRA"),
        ({"loss_type": "simpo", "beta": 0.1}, "beta 0.1 is below 1: SimPO"),
    ):
        (message,) = practice_warnings(dataclasses.replace(quiet, **changed))
        assert message.startswith(start)
    assert practice_warnings(dataclasses.replace(quiet, loss_type="simpo", beta=2.0)) == []
    assert practice_warnings(dataclasses.replace(quiet, epochs=4, max_steps=10)) == []


def test_where_the_output_goes_is_no_part_of_the_trajectory():
    settings = trajectory_settings(TrainConfig())
    assert {"learning_rate", "seed", "max_length", "eval_steps"} <= settings.keys()
    assert not {"output_dir", "resume", "save_steps", "logging_steps", "trackers", "cache_dir"} & settings.keys()
    assert {"dataset_weights", "train_on", "chat_template_kwargs", "disable_dropout"} <= settings.keys()
    # what these lead to is compared instead: the token ids and the starting weights
    assert not {"model", "dataset", "eval_dataset", "chat_template"} & settings.keys()


@pytest.mark.parametrize(
    ("setting", "value", "belongs"),
    [
        ("eval_split", "test", "eval_dataset"),
        ("lora_alpha", 64, "lora_r"),
        ("lora_dropout", 0.1, "lora_r"),
        ("f_alpha", 0.2, "f_divergence alpha"),
        ("discopop_tau", 0.1, "loss_type discopop"),
        ("simpo_gamma", 3.0, "loss_type simpo"),
        ("cpo_alpha", 0.5, "loss_type cpo"),
    ],
)
def test_settings_without_effect_are_refused(setting, value, belongs):
    with pytest.raises(ValueError, match=f"{setting}: has an effect only with {belongs}"):
        TrainConfig(**{setting: value})


def test_a_model_configuration_is_found_beside_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("model: config:tiny.json\ndataset: demo\n")
    (tmp_path / "tiny.json").write_text("{}")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "run.yaml").model == f"config:{tmp_path / 'tiny.json'}"
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    write(tmp_path, "model: m\ndataset: d\nchat_template: mine.jinja\n")
    assert load_config(tmp_path / "run.yaml").chat_template == str(tmp_path / "mine.jinja")
    write(tmp_path, "model: m\ndataset: d\nchat_template: |\n  {{ messages }}\n  {{ eos_token }}\n")
    assert load_config(tmp_path / "run.yaml").chat_template == "{{ messages }}\n{{ eos_token }}\n"


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_read_and_follow_practice(path):
    config = load_config(path, {"dataset": "pairs.jsonl"})
    assert config.random_weights or practice_warnings(config) == []


def test_there_are_examples():
    assert {path.name for path in EXAMPLES} >= {"full.yaml", "lora.yaml", "tiny_qwen2.yaml"}


def test_a_flag_for_tokens_comes_before_pairs_of_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: demo\ndataset: demo\nper_device_batch_size: 8\n")
    assert load_config(file, {"max_tokens_per_batch": "2000"}).max_tokens_per_batch == 2000
    assert load_config(None, {"max_tokens_per_batch": "2000"}).dataset == "demo"
    with pytest.raises(
        ValueError, match="per_device_batch_size: has no effect beside max_tokens_per_batch 2000, got 8"
    ):
        load_config(file, {"max_tokens_per_batch": "2000", "per_device_batch_size": "8"})
