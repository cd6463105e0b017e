"""federation.toml: a good file is read with its defaults, a bad one is one line that names the key."""

from __future__ import annotations

import pytest

from reft_edge.bundle.manifest import SGD, Adam, CrossEntropy, MeanSquaredError
from reft_edge.coordinator.settings import load_federation, run_digest
from reft_edge.errors import ConfigError
from reft_edge.wire.codec_names import Int8, LayerWise, RandomK, TopK
from reft_edge.wire.compensation_names import EControlOptions, EF21Options
from reft_edge.wire.deployment import HealthRules

MINIMAL = """
federation = "demo"
[model]
name = "vgg16"
input_shape = [3, 32, 32]
n_outputs = 10
[data]
public = { path = "public", labelled = false }
"""


def read(tmp_path, text):
    path = tmp_path / "federation.toml"
    path.write_text(text)
    return load_federation(path)


def test_a_minimal_file_has_working_defaults(tmp_path):
    settings = read(tmp_path, MINIMAL)
    assert settings.model.input_shape == (3, 32, 32)
    assert settings.model.loss_function == CrossEntropy()
    assert settings.model.optimizer == SGD(momentum=0.9)
    assert 0.0 in settings.planning.ratios
    assert settings.round_rules.quorum == settings.quorum


def test_a_full_file_says_what_it_says(tmp_path):
    settings = read(
        tmp_path,
        """
        federation = "field"
        rounds = 1
        quorum = 0.75
        [broker]
        host = "broker.example"
        ca_file = "ca.pem"
        [model]
        name = "mine:build"
        input_shape = [6, 128]
        n_outputs = 2
        loss = { name = "mean_squared_error" }
        optimizer = { name = "adam", beta1 = 0.8 }
        [training]
        local_epochs = 50
        schedule = "cosine"
        [planning]
        policy = "reft"
        ratios = [0, 0.5]
        [distillation]
        epochs = 0
        """,
    )
    assert settings.model.loss_function == MeanSquaredError()
    assert settings.model.optimizer == Adam(beta1=0.8)
    assert settings.training.local_epochs == 50
    assert settings.planning.ratios == (0.0, 0.5)
    assert settings.broker.resolved_in(tmp_path).ca_file == str(tmp_path / "ca.pem")


MODEL = 'federation = "demo"\ndistillation = { epochs = 0 }\n[model]\nname = "vgg16"\ninput_shape = [3, 32, 32]\n'

BAD = {
    "misspelt key": (MODEL + "n_output = 10", r"\[model\] unknown key 'n_output'; did you mean 'n_outputs'\?"),
    "misspelt table": (MODEL + "n_outputs = 10\n[trainig]", "unknown key 'trainig'; did you mean 'training'"),
    "no outputs": (MODEL, "needs n_outputs, or classes"),
    "classes disagree": (MODEL + 'n_outputs = 3\nclasses = ["a", "b"]', "n_outputs = 3 but 2 classes"),
    "class twice": (MODEL + 'classes = ["a", "b", "a"]', "'a' twice"),
    "classes for regression": (
        MODEL + 'loss = "mean_squared_error"\nclasses = ["a", "b"]',
        "classes are for cross_entropy",
    ),
    "accuracy of a regression": (
        MODEL + 'n_outputs = 2\nloss = "mean_squared_error"\n[deployment.rules]\nmin_accuracy = 0.8',
        r"\[deployment.rules\] min_accuracy is for cross_entropy",
    ),
    "unknown loss": (MODEL + 'n_outputs = 2\nloss = "hinge"', "model.loss: .*hinge"),
    "unknown optimizer": (MODEL + 'n_outputs = 2\noptimizer = { name = "lion" }', "model.optimizer.*lion"),
    "empty shape": (MODEL.replace("[3, 32, 32]", "[]") + "n_outputs = 2", "model.input_shape"),
    "zero in shape": (MODEL.replace("[3,", "[0,") + "n_outputs = 2", "model.input_shape"),
    "quorum above 1": ("quorum = 1.5\n" + MODEL + "n_outputs = 2", "quorum"),
    "wrong type": ('rounds = "five"\n' + MODEL + "n_outputs = 2", "rounds: Expected `int`"),
    "ratio twice": (MODEL + "n_outputs = 2\n[planning]\nratios = [0.5, 0.5]", "ratios has a value twice"),
    "empty limits": (MODEL + "n_outputs = 2\n[planning]\nlimits = {}", "limits is empty; give parameters, macs or"),
    "unknown limit": (MODEL + "n_outputs = 2\n[planning]\nlimits = { flops = 9 }", r"\[planning.limits\] unknown key"),
    "ratio of one": (MODEL + "n_outputs = 2\n[planning]\nratios = [1.0]", r"planning.ratios\[0\]|planning.ratios"),
    "name with a slash": (MODEL.replace('"demo"', '"a/b"') + "n_outputs = 2", "federation 'a/b' must be"),
    "distillation without public data": (
        MODEL.replace("epochs = 0", "epochs = 3") + "n_outputs = 2",
        "distillation needs public data",
    ),
    "views of a table": (
        MODEL.replace("epochs = 0", "epochs = 0, augmentation = { flip = true }").replace("[3, 32, 32]", "[9]")
        + "n_outputs = 2",
        r"\[distillation.augmentation\] flip is for pictures",
    ),
    "data from two sources": (
        MODEL + 'n_outputs = 2\n[data]\ntest = { path = "a", function = "b:c" }',
        "either path = .* or function",
    ),
    "no model": ('federation = "demo"', "lacks the key 'model'"),
    "not TOML": ("federation = ", "not valid TOML"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_line(tmp_path, name):
    text, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert "federation.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_makes_a_run_itself_asks_for_a_new_run(tmp_path):
    settings = read(tmp_path, MINIMAL)
    assert run_digest(read(tmp_path, "rounds = 9\ndeadline_s = 5\n" + MINIMAL)) == run_digest(settings)
    assert run_digest(read(tmp_path, "seed = 9\n" + MINIMAL)) != run_digest(settings)
    assert run_digest(read(tmp_path, MINIMAL + "\n[planning]\nlimits = { macs = 9 }")) != run_digest(settings)
    assert run_digest(read(tmp_path, MINIMAL.replace("vgg16", "resnet18"))) != run_digest(settings)


def test_a_codec_is_a_name_or_a_table_with_options(tmp_path):
    by_name = read(tmp_path, MINIMAL + '[training]\nupdate_codec = "top_k"\nweights_codec = "int8"\n').training
    assert (by_name.update_encoding, by_name.weights_encoding) == (TopK(), Int8())
    table = '[training]\nupdate_codec = { name = "layer_wise", error_budget = 0.25 }\n'
    assert read(tmp_path, MINIMAL + table).training.update_encoding == LayerWise(error_budget=0.25)
    training = read(tmp_path, MINIMAL + '[training]\ndelta_codec = "none"\ncompensation = "ef21"\n').training
    assert (training.delta_encoding, training.compensation_method) == (None, EF21Options())
    training = read(tmp_path, MINIMAL + '[training]\ncompensation = { name = "econtrol", strength = 0.5 }\n').training
    assert training.compensation_method == EControlOptions(strength=0.5)
    unbiased = 'update_codec = { name = "random_k", unbiased = true }\ncompensation = "none"\n'
    assert read(tmp_path, MINIMAL + "[training]\n" + unbiased).training.update_encoding == RandomK(unbiased=True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('update_codec = "int9"', "int9"),
        ('update_codec = { name = "top_k", fraction = 0.0 }', "update_codec"),
        ('update_codec = { name = "int8", fraction = 0.1 }', "fraction"),
        ('weights_codec = "top_k"', "leaves out entries"),
        ('weights_codec = { name = "selective", threshold = 0.1 }', "leaves out entries"),
        ('delta_codec = "some"', "delta_codec"),
        ('delta_codec = { name = "random_k", unbiased = true }', "would grow with every round"),
        ('update_codec = { name = "random_k", unbiased = true }', 'set compensation = "none"'),
        ('compensation = "ef22"', "ef22"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(tmp_path, line, says):
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, MINIMAL + f"[training]\n{line}\n")


def test_a_goal_for_latency_is_what_devices_check_unless_the_rules_say_otherwise(tmp_path):
    goal = read(tmp_path, MINIMAL + "[deployment]\nlatency_s = 0.05\n").deployment
    assert (goal.latency_s, goal.health_rules.max_latency_s) == (0.05, 0.05)
    rule = read(
        tmp_path, MINIMAL + "[deployment]\nlatency_s = 0.05\n[deployment.rules]\nmax_latency_s = 0.2\n"
    ).deployment
    assert rule.health_rules.max_latency_s == 0.2
    assert read(tmp_path, MINIMAL).deployment.health_rules == HealthRules()
    with pytest.raises(ConfigError, match=r"\[deployment.rules\] unknown key 'max_latency'"):
        read(tmp_path, MINIMAL + "[deployment.rules]\nmax_latency = 0.2\n")
