"""Experiments from files and `--set` texts: what is read, what is refused, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from another_process import AnotherProcess

from heterokd.config.experiment import Experiment
from heterokd.config.methods import methods_of
from heterokd.config.reading import dump_experiment, load_experiment, load_recipe
from heterokd.config.yaml_files import read_yaml
from heterokd.domains import Choice, Float
from heterokd.errors import ConfigError, UserError
from heterokd.execution.check import check_experiment
from heterokd.methods import METHODS

Write = Callable[..., Path]

# Key, value as YAML, what the sentence must say beside the key. Each is tried in the file and with --set.
WRONG = [
    # a key that does not exist, at every level
    ("techer", "{network: test_vit}", "did you mean 'teacher'?"),
    ("data.datset", "digits", "did you mean 'dataset'?"),
    ("data.path", "here", "there is no such key"),
    ("teacher.netwrk", "test_vit", "did you mean 'network'?"),
    ("teacher.training.epoch", "3", "did you mean 'epochs'?"),
    ("student.option", "{}", "did you mean 'options'?"),
    ("training.lerning_rate", "0.1", "did you mean 'learning_rate'?"),
    ("search.trails", "3", "did you mean 'trials'?"),
    ("search.space.method", "[kd]", "did you mean 'methods'?"),
    ("tracking.registered_modell", "x", "did you mean 'registered_model'?"),
    ("promotion.min_gian", "0.1", "did you mean 'min_gain'?"),
    ("data.augment", "{rotate: 3}", "did you mean 'rotation'?"),
    # a name that does not exist
    ("data.dataset", "digit", "did you mean 'digits'?"),
    ("data.augment", "digit", "did you mean 'digits'?"),
    ("training.optimizer", "adamm", "did you mean 'adam"),
    ("training.schedule", "cosin", "did you mean 'cosine'?"),
    ("training.precision", "fp16", "did you mean 'bf16'?"),
    ("search.metric", "val/top2", "did you mean 'val/top"),
    ("search.space", "{methods: [kd, hdc]}", "did you mean 'hcd'?"),
    ("search.space", "{overrides: {hdc.num_sublogits: 2}}", "did you mean 'hcd'?"),
    ("search.space", "{overrides: {kd.temprature: 2}}", "did you mean 'temperature'?"),
    ("search.space", "{overrides: {kd: 2}}", "expected METHOD.PARAMETER"),
    ("search.space", "{shared: {training.lr: 0.1}}", "known names is similar"),
    (
        "search.space",
        "{shared: {learning_rate: 0.1}}",
        "expected training.NAME with the name of a setting; did you mean 'learning_rate'?",
    ),
    # a value of another type
    ("name", "3", "expected a string, got 3"),
    ("data", "digits", "expected keys and values, got 'digits'"),
    ("data.image_size", "large", "expected a whole number, got 'large'"),
    ("data.root", "3", "expected a file or folder name, got 3"),
    ("data.augment", "3", "expected a string or keys and values, got 3"),
    ("teacher.options", "[1]", "expected keys and values, got [1]"),
    ("teacher.pretrained", "maybe", "expected true or false, got 'maybe'"),
    ("student.network", "3", "expected a string or a list, got 3"),
    ("student.network", "[test_resnet, 3]", "expected a string, got 3"),
    ("training.epochs", "1.5", "expected a whole number, got 1.5"),
    ("training.epochs", "true", "expected a whole number, got true"),
    ("training.epochs", "'30'", "expected a whole number, got '30'"),
    ("training.epochs", "null", "expected a whole number, got null"),
    ("training.learning_rate", "fast", "expected a number, got 'fast'"),
    ("training.learning_rate", ".inf", "a finite number"),
    ("training.channels_last", "3", "expected true or false or auto, got 3"),
    ("search.space", "3", "expected a file or folder name or keys and values, got 3"),
    ("search.space", "{methods: kd}", "expected all or a list, got 'kd'"),
    ("search.space", "{overrides: {kd.temperature: warm}}", "expected a number, got 'warm'"),
    ("search.space", "{overrides: {hcd.num_sublogits: {low: 1.5, high: 3}}}", "expected a whole number, got 1.5"),
    ("search.space", "{overrides: {hcd.num_sublogits: true}}", "expected a whole number, got true"),
    ("search.space", "{shared: {training.epochs: {low: 1.0, high: 3.0}}}", "expected a whole number, got 1.0"),
    ("search.space", "{shared: {training.optimizer: {options: [sgd, adamm]}}}", "did you mean 'adam"),
    # a value out of range
    ("data.image_size", "4", "must be at least 8, got 4"),
    ("data.labels_per_class", "0", "must be at least 1, got 0"),
    ("teacher.min_score", "97", "must be at most 1, got 97"),
    ("training.epochs", "0", "must be at least 1, got 0"),
    ("training.learning_rate", "0", "must be above 0, got 0"),
    ("training.momentum", "1", "must be below 1, got 1"),
    ("search.trials", "-1", "must be at least 1, got -1"),
    ("search.first_rung", "0.0", "must be above 0, got 0.0"),
    ("promotion.max_params_m", "0", "must be above 0, got 0"),
    ("search.space", "{overrides: {kd.temperature: 0}}", "must be above 0, got 0"),
    ("search.space", "{overrides: {kd.temperature: {low: -1, high: 3, log: false}}}", "must be above 0, got -1"),
    ("search.space", "{shared: {training.learning_rate: {low: 0, high: 1}}}", "must be above 0, got 0"),
    # names that become folders
    ("name", "a/b", "letters, digits"),
    ("name", "../up", "letters, digits"),
    ("name", "''", "letters, digits"),
    ("name", "x" * 65, "at most 64"),
    ("tracking.registered_model", "team/student", "expected a name without / : @"),
    # lists and domains that hold nothing, or too much
    ("student.network", "[]", "the list of networks is empty"),
    ("student.network", "[test_resnet, test_resnet]", "names a network twice"),
    ("search.space", "{methods: []}", "the list is empty"),
    ("search.space", "{methods: [kd, kd]}", "'kd' is listed twice"),
    ("search.space", "{overrides: {kd.temperature: {low: 8, high: 1}}}", "`low <= high` must hold"),
    ("search.space", "{overrides: {kd.temperature: {low: 0, high: 1, log: true}}}", "needs `low > 0`"),
    ("search.space", "{overrides: {kd.temperature: {low: 1, high: .nan}}}", "is not a finite number"),
    ("search.space", "{overrides: {kd.temperature: {low: 1}}}", "expected one value"),
    ("search.space", "{overrides: {kd.temperature: {low: a, high: b}}}", "must be numbers"),
    ("search.space", "{overrides: {kd.temperature: {options: []}}}", "at least one value"),
    ("search.space", "{overrides: {kd.temperature: {options: [1, 1.0]}}}", "must differ"),
    ("search.space", "{overrides: {kd.temperature: {options: [[1]]}}}", "an option is a number"),
    ("search.space", "{overrides: {kd.temperature: {options: 4}}}", "options must be a list"),
    ("search.space", "{overrides: {kd.temperature: [1, 2]}}", "expected one value"),
    ("search.space", "nowhere.yaml", "there is no file 'nowhere.yaml'"),
    # what cannot go together
    ("data", "{dataset: image_folder}", "set data.root"),
    ("teacher.options", "{num_classes: 3}", "num_classes follows from the data set"),
    ("student.options", "{pretrained: true}", "pretrained is no option but a key next to `options`"),
    ("student.options", "{depth:6}", "'depth:6' has no value; write `name: value`"),
    ("training", "{epochs: 2, warmup_epochs: 2}", "2 epochs of warm-up do not fit into 2"),
    ("search.space", "{shared: {training.warmup_epochs: {low: 0, high: 3}}}", "3 epochs of warm-up do not fit into 3"),
    ("teacher", "{network: test_vit, checkpoint: a.safetensors, pretrained: true}", "not both"),
]
JARGON = ("Input should", "Extra inputs", "Value error", "type=", "pydantic", "<class", "Error", "function-", "tuple[")


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("key", "value", "says"), WRONG, ids=[f"{key}={value}"[:60] for key, value, _ in WRONG])
def test_a_fault_is_one_sentence_with_file_and_key(tiny_file: Write, key: str, value: str, says: str) -> None:
    file = tiny_file()
    text = f"{key}={value}"
    from_set = refusal(file, text)
    content = yaml.safe_load(file.read_text())
    put(content, key, yaml.safe_load(value))
    file.write_text(yaml.safe_dump(content))
    from_file = refusal(file)
    for message, place in ((from_file, f"{file}: {key}"), (from_set, f"--set {text}: ")):
        assert len(message.splitlines()) == 1
        assert re.sub(r"\.yaml:\d+:", ".yaml:", message).startswith(place)
        assert says in message
        assert not [word for word in JARGON if word in message.removeprefix(place)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [1, 2", ":1: is not valid YAML"),
        ("name: a\ndata: {x: }}\n", ":2: is not valid YAML"),
        ("name: a\n\tdata: b\n", ":2: is not valid YAML: a tab cannot indent"),
        ("name: a\nname: b\n", ":2: is not valid YAML: the key 'name' appears twice; remove it once"),
        ("a:\n  - {b: 1,\n     b: 2}\n", ":3: is not valid YAML: the key 'b' appears twice"),
        ("a: &x {b: *x}\n", ": is not valid YAML: anchors (&) and aliases (*) are not supported"),
        ("a: !!python/object:os.system {}\n", ":1: is not valid YAML"),
        ("a: 1\n---\na: 2\n", "is not valid YAML"),
        ("a: \x00b\n", ": is not valid YAML: it contains control characters"),
        ("", ": is empty"),
        ("- a\n- b\n", ': expected keys and values (`name: ...`), got ["a", "b"]'),
        ("hello", ": expected keys and values (`name: ...`), got 'hello'"),
        ("1: 2", ": 1: a key must be a string"),
    ],
)
def test_a_file_that_is_no_experiment(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    message = refusal(file)
    assert message.startswith(f"{file}{says}") or (message.startswith(f"{file}:") and says in message)
    assert not [word for word in JARGON if word in message]


def test_files_that_cannot_be_read(tmp_path: Path, tiny_file: Write) -> None:
    tiny_file()
    assert "there is no such file; did you mean 'tiny.yaml'?" in refusal(tmp_path / "tinny.yaml")
    assert "there is no such file; check the path" in refusal(tmp_path / "no" / "tiny.yaml")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\xfe")
    assert "is not text in UTF-8" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("training..epochs=3", "expected key=value"),
        ("name.x=3", "'name' holds a value, not keys"),
        ("training.epochs=[1", "the value is not valid YAML"),
        ("training=3", "expected keys and values, got 3"),
    ],
)
def test_a_set_text_that_sets_nothing(tiny_file: Write, text: str, says: str) -> None:
    message = refusal(tiny_file(), text)
    assert message.startswith(f"--set {text}: ")
    assert says in message


def test_every_fault_has_its_line(tiny_file: Write) -> None:
    message = refusal(tiny_file(training={"epochs": 0, "lr": 1}, student={"network": 3}))
    assert len(message.splitlines()) == 3
    names = "search.space={methods: [kdd, hdc], shared: {training.momentum: 2}, overrides: {kd.weight: -1}}"
    assert len(refusal(tiny_file(), names).splitlines()) == 3, (
        "what the methods' code shows is said once names are right"
    )
    values = "search.space={methods: [kd, heteroakd], overrides: {kd.weight: -1, kd.temprature: 2}}"
    assert len(refusal(tiny_file(), values).splitlines()) == 3


@pytest.fixture
def with_space_file(tmp_path: Path, tiny_file: Write) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "space.yaml").write_text(text)
        return tiny_file(search={"space": "space.yaml"})

    return write


def test_faults_of_a_space_name_its_own_file(tmp_path: Path, with_space_file: Callable[[str], Path]) -> None:
    place = f"{tmp_path / 'space.yaml'}: "
    assert refusal(with_space_file("method: [kd]")).startswith(place + "method: there is no such key")
    assert refusal(with_space_file("methods: [hdc]")).startswith(place + "methods: there is no method 'hdc'")
    message = refusal(with_space_file("overrides: {kd.temperature: -1}"))
    assert message == place + "overrides.kd.temperature: must be above 0, got -1"
    assert "is empty" in refusal(with_space_file(""))
    with_space_file("methods: all")
    message = refusal(tmp_path / "tiny.yaml", "search.space=spaec.yaml")
    assert message.startswith("--set search.space=spaec.yaml: there is no file 'spaec.yaml'")
    assert message.endswith("did you mean 'space.yaml'?")


TABLE = {
    "device.csv": "student,student/latency_ms\ntest_efficientnet,3.2\ntest_resnet,\n",
    "device.yaml": "student/latency_ms: {test_efficientnet: 3.2}\n",
}


@pytest.mark.parametrize("name", TABLE)
def test_a_table_of_costs_may_be_a_file_which_faults_name(name: str, tmp_path: Path, tiny_file: Write) -> None:
    table = tmp_path / name
    table.write_text(TABLE[name])
    file = tiny_file(search={"objectives": ["val/top1", "student/latency_ms"], "costs": name})
    assert load_experiment(file).search.costs == {"student/latency_ms": {"test_efficientnet": 3.2}}
    assert refusal(file, "student.network=[test_resnet, test_efficientnet]") == (
        f"{table}: student/latency_ms: has no value for student test_resnet; add it, or remove the student"
    )
    text = "search.costs={student/latency_ms: {resnet18: 1}}"
    assert refusal(file, text).startswith(f"--set {text}: student/latency_ms: has no value for student test_eff")
    assert refusal(file, "search.costs=devices.csv").startswith("--set search.costs=devices.csv: there is no file")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("student,note\ntest_efficientnet,a\n", "note: there is no such cost of a student"),
        (
            "student,student/latency_ms\ntest_efficientnet,3 ms\n",
            "student/latency_ms.test_efficientnet: expected a number above 0, got '3 ms'",
        ),
        ("student,student/latency_ms\ntest_efficientnet,3,4\n", "the row of test_efficientnet has more cells"),
        ("student,student/latency_ms\na,3\na,4\n", "student/latency_ms: names a twice"),
        ("network,student/latency_ms\ntest_efficientnet,3\n", "has no rows with a column 'student'"),
        ("", "has no rows with a column 'student'"),
    ],
)
def test_faults_of_a_csv_file_name_it(text: str, says: str, tmp_path: Path, tiny_file: Write) -> None:
    (tmp_path / "device.csv").write_text(text)
    message = refusal(tiny_file(search={"costs": "device.csv"}))
    assert message.startswith(f"{tmp_path / 'device.csv'}: ")
    assert says in message


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        ("{student/params_m: {test_resnet: 3}}", "student/params_m: does not depend on a device"),
        ("{latency_ms: {test_resnet: 3}}", "latency_ms: there is no such cost of a student; did you mean"),
        ("{student/latency_ms: {test_resnet: 0}}", "student/latency_ms.test_resnet: expected a number above 0, got 0"),
        ("{student/latency_ms: 3}", "expected keys and values, got 3"),
    ],
)
def test_faults_of_a_table(costs: str, says: str, tiny_file: Write) -> None:
    assert says in refusal(tiny_file(), f"search.costs={costs}")


def test_set_reaches_into_a_space_file(with_space_file: Callable[[str], Path]) -> None:
    file = with_space_file("methods: all\noverrides: {kd.temperature: 2.0}")
    texts = ["search.space.methods=[kd, hcd]", "search.space.overrides.kd.temperature=4.0"]
    experiment = load_experiment(file, texts)
    assert experiment.methods == ("kd", "hcd")
    assert experiment.recipe({"method": "kd"}).params["temperature"] == 4.0
    assert refusal(file, "search.space.overrides.kd.weight=-1") == (
        "--set search.space.overrides.kd.weight=-1: must be at least 0, got -1"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["teacher.network=test_vitt"], "teacher.network 'test_vitt' is not one of timm's: did you mean 'test_vit'?"),
        (["student.network=[test_resnet, resnet_18]"], "student.network 'resnet_18' .* did you mean 'resnet18'?"),
        (["teacher.options={img_siz: 32}"], "teacher.network 'test_vit' has no option 'img_siz'; .*img_size"),
        (["teacher.options={depth: many}"], "teacher.network 'test_vit' cannot be built"),
        (["data={dataset: image_folder, root: /no/where}"], "data.root: there is no folder /no/where"),
        (["data.labels_per_class=5000"], "data.labels_per_class: .* 5000 were asked for"),
        (["training.class_weights={ten: 2.0}"], "training.class_weights: the data set has no class 'ten'"),
        (["teacher.training.class_weights={ten: 2.0}"], "teacher.training.class_weights: the data set has no class"),
        (["promotion.min_recall={ten: 0.5}"], "promotion.min_recall: the data set has no class 'ten'"),
        (["search.space={overrides: {fbt.back_stage: 9}}"], "overrides.fbt.back_stage: 9 is impossible"),
        (["search.space={methods: [fbt], overrides: {fbt.front_stage: 0}}"], "overrides.fbt.front_stage: 0 is imposs"),
        (["search.space={methods: [fbt], overrides: {fbt.back_stage: {options: [3, 9]}}}"], "9 is impossible"),
    ],
)
def test_faults_that_show_before_anything_is_trained(tiny_file: Write, changes: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_experiment(load_experiment(tiny_file(), changes))
    assert len(str(caught.value).splitlines()) == 1


def test_yaml_is_data_and_1e_3_a_number(tmp_path: Path) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text("{a: 1e-3, b: -2E5, c: .5, d: 1_000.5e1, e: 12, f: e3, g: 1e, h: '1e-3', i: 1.e+2, j: 3.25}")
    expected = {"a": 1e-3, "b": -2e5, "c": 0.5, "d": 10005.0, "e": 12, "f": "e3", "g": "1e", "h": "1e-3", "i": 100.0}
    assert read_yaml(file) == {**expected, "j": 3.25}


def test_one_learning_rate_in_many_spellings(tiny_file: Write) -> None:
    for text in ("1e-3", "0.001", "1E-3", "1.0e-3", ".001"):
        assert load_experiment(tiny_file(), [f"training.learning_rate={text}"]).training.learning_rate == 1e-3


def test_dumped_and_loaded_it_is_the_same_experiment(tmp_path: Path, tiny_file: Write) -> None:
    texts = [
        "search.space={methods: all, overrides: {kd.temperature: {low: 2, high: 4}, hcd.num_sublogits: 4}}",
        "student.network=[test_resnet, test_efficientnet]",
        "data.augment={rotation: 5.0, scale: [0.9, 1.1]}",
        "teacher.checkpoint=weights/teacher.safetensors",
    ]
    for overrides in ([], texts):
        experiment = load_experiment(tiny_file(), overrides)
        copy = tmp_path / "copy.yaml"
        copy.write_text(dump_experiment(experiment))
        again = load_experiment(copy)
        assert again == experiment
        assert dump_experiment(again) == dump_experiment(experiment)
        assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.crop=[32, 32]", "data: crop: is for segmentation"),
        ("data.crop=[32]", "crop"),
        ("data.evaluation=sliding", "data: evaluation: is for segmentation"),
        ("data={dataset: digit_scenes, labels_per_class: 3}", "set train_images"),
        ("search.metric=val/miou", "search.metric: 'val/miou' is not measured in classification"),
        ("search.space={methods: [heteroakd]}", "'heteroakd' supports segmentation"),
        ("teacher={network: segformer-mit_b0}", "teacher.network: 'segformer-mit_b0' does not fit data set 'digits'"),
        ("data.train_images=99999", "data.train_images: there are"),
    ],
)
def test_what_belongs_to_the_other_task_is_refused(tiny_file: Write, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_experiment(load_experiment(tiny_file(), [override]))
    assert len(str(caught.value).splitlines()) == 1
    assert says in str(caught.value)


SCENES = [
    "data={dataset: digit_scenes}",
    "teacher={network: segformer-mit_b0}",
    "student={network: fpn-test_resnet}",
]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.sampling=balanced", "training.sampling: counts images of a class, and label maps have none"),
        ("teacher={network: segformer-mit_b0, training: {class_weights: effective}}", "teacher.training.class_weights"),
        ("search.space={shared: {training.sampling: {options: [uniform, balanced]}}}", "shared.training.sampling"),
    ],
)
def test_label_maps_have_no_images_of_a_class(tiny_file: Write, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_experiment(tiny_file(), [*SCENES, override])


def test_settings_of_uneven_classes_are_searched_and_hashed_only_where_they_are_set(tiny_file: Write) -> None:
    weights, sampling = "{options: [none, inverse, effective]}", "{options: [uniform, balanced]}"
    shared = f"{{training.class_weights: {weights}, training.sampling: {sampling}}}"
    space = f"search.space={{methods: [kd], shared: {shared}}}"
    plain = load_experiment(tiny_file(), ["search.space={methods: [kd]}"])
    searched = load_experiment(tiny_file(), [space])
    sample = searched.published("kd")
    assert (sample["training.class_weights"], sample["training.sampling"]) == ("none", "uniform")
    assert searched.recipe(sample).hash == plain.recipe(plain.published("kd")).hash
    changes = ({"training.sampling": "balanced"}, {"training.class_weights": "inverse"})
    hashes = {searched.recipe({**sample, **change}).hash for change in ({}, *changes)}
    assert len(hashes) == 3
    named = load_experiment(tiny_file(), ["training.class_weights={0: 2, 3: 0.5}"])
    assert named.training.class_weights == {"0": 2.0, "3": 0.5}
    recipe = named.recipe({"method": "kd"})
    assert load_recipe(_written(tiny_file, recipe.to_yaml())) == recipe


def _written(tiny_file: Write, text: str) -> Path:
    file = tiny_file().with_name("recipe.yaml")
    file.write_text(text)
    return file


def test_all_methods_are_a_list_once_loaded(tiny_file: Write) -> None:
    experiment = load_experiment(tiny_file(), ["search.space={methods: all}"])
    assert experiment.space.methods == experiment.methods == methods_of("classification")
    assert load_experiment(tiny_file(search={"space": {}})).space.methods == methods_of("classification")
    assert "heteroakd" not in experiment.methods
    scenes = load_experiment(tiny_file(), ["search.space={methods: all}", *SCENES])
    assert scenes.methods == methods_of("segmentation")
    assert {"scratch", "heteroakd"} < set(scenes.methods) < set(METHODS)
    assert scenes.metric == "val/miou"


@pytest.mark.parametrize("method", METHODS)
def test_published_settings_lie_inside_their_domains(tiny_file: Write, tmp_path: Path, method: str) -> None:
    of_the_task = [] if "classification" in METHODS[method].tasks else SCENES
    experiment = load_experiment(tiny_file(), [f"search.space.methods=[{method}]", *of_the_task])
    published = experiment.published(method)
    found = {**experiment.method_domains(method), **experiment.shared_domains()}
    assert set(published) == {"method", *found}
    assert not {key: published[key] for key in found if published[key] not in found[key]}
    defaults = METHODS[method].Params().model_dump()
    for key in experiment.method_domains(method):
        assert published[key] == defaults[key.split(".", 1)[1]], "a default outside its own domain"
    recipe = experiment.recipe(published)
    assert recipe.method_params == METHODS[method].Params()
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.to_yaml())
    assert load_recipe(written) == recipe


def test_a_narrowed_domain_moves_the_published_setting_into_it(tiny_file: Write) -> None:
    space = "{methods: [kd, hcd], overrides: {kd.temperature: {low: 2, high: 4}, kd.weight: {options: [3, 5]}}}"
    experiment = load_experiment(tiny_file(), [f"search.space={space}"])
    assert experiment.published("kd")["kd.temperature"] == 2.0
    assert experiment.published("kd")["kd.weight"] == 3
    assert experiment.method_domains("kd")["kd.temperature"] == Float(2, 4, log=True)


def test_an_override_pins(tiny_file: Write) -> None:
    space = "{methods: [kd, fbt], overrides: {kd.temperature: 4.0, fbt.window: 5}}"
    experiment = load_experiment(tiny_file(), [f"search.space={space}"])
    assert experiment.published("kd")["kd.temperature"] == 4.0
    assert experiment.recipe({"method": "kd"}).params["temperature"] == 4.0
    assert experiment.recipe({"method": "fbt"}).params["window"] == 5
    assert experiment.recipe({"method": "fbt"}).params["front_stage"] == METHODS["fbt"].Params().front_stage


def test_a_list_of_students_is_searched(tiny_file: Write) -> None:
    experiment = load_experiment(tiny_file(), ["student.network=[test_resnet, test_efficientnet]"])
    assert experiment.shared_domains()["student.network"] == Choice("test_resnet", "test_efficientnet")
    assert experiment.published("kd")["student.network"] == "test_resnet"
    assert experiment.recipe({"method": "kd", "student.network": "test_efficientnet"}).student.network == (
        "test_efficientnet"
    )
    assert "student.network" not in load_experiment(tiny_file()).shared_domains()


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({}, "there is no method None"),
        ({"method": "hdc"}, "did you mean 'hcd'?"),
        ({"method": "kd", "kd.temprature": 2}, "did you mean 'temperature'?"),
        ({"method": "kd", "hcd.num_sublogits": 2}, "belongs neither to 'kd' nor to training"),
        ({"method": "kd", "training.lerning_rate": 2}, "sample: training.lerning_rate: there is no such key"),
        ({"method": "kd", "training.epochs": 0}, "sample: training.epochs: must be at least 1, got 0"),
        ({"method": "kd", "kd.temperature": "hot"}, "sample: kd.temperature: expected a number, got 'hot'"),
        ({"method": "kd", "student.network": "vgg11"}, "student.network: 'vgg11' is not in the experiment"),
        ({"method": "kd", "student.options": "x"}, "belongs neither"),
    ],
)
def test_a_sample_with_an_unknown_key_or_value(tiny_file: Write, sample: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(tiny_file()).recipe(sample)
    assert says in str(caught.value)


CHANGES = {
    "data.seed": 1,
    "data.image_size": 24,
    "data.labels_per_class": 5,
    "data.augment": "none",
    "teacher.network": "test_resnet",
    "teacher.options": {"img_size": 32, "patch_size": 4},
    "teacher.training.epochs": 3,
    "teacher.checkpoint": "a.safetensors",
    "teacher.image_size": 64,
    "teacher.fit": "all",
    "student.network": "test_resnet",
    "student.options": {"drop_rate": 0.1},
    "student.pretrained": True,
    "training.epochs": 4,
    "training.batch_size": 10,
    "training.learning_rate": 0.06,
    "training.task_weight": 0.5,
    "training.ema": 0.9,
    "training.clip_grad": 1.0,
    "training.precision": "bf16",
    "training.seed": 1,
    "training.sync_batch_norm": True,
    "training.layer_decay": 0.75,
}
SAME = {
    "name": "other",
    "training.workers": 2,
    "training.gpus_per_worker": 0.5,
    "search.trials": 9,
    "tracking.experiment": "x",
    "teacher.min_score": 0.5,
}


def test_a_recipe_is_named_by_what_decides_its_result(tiny_file: Write) -> None:
    def hash_of(key: str, value: Any, **sample: Any) -> str:
        experiment = load_experiment(tiny_file(), [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"])
        return experiment.recipe({"method": "kd", **sample}).hash

    same = {hash_of(key, value) for key, value in SAME.items()}
    assert len(same) == 1
    changed = [hash_of(key, value) for key, value in CHANGES.items()]
    changed += [hash_of("name", "tiny", **{"kd.temperature": 2.0}), hash_of("name", "tiny", method="dkd")]
    assert len({*same, *changed}) == 1 + len(changed)


def test_a_recipe_has_the_same_name_in_every_process(tiny_file: Write, elsewhere: AnotherProcess) -> None:
    file = tiny_file()
    code = (
        "import sys; from heterokd.config.reading import load_experiment; "
        "print(load_experiment(sys.argv[1]).recipe({'method': 'kd'}).hash)"
    )
    recipe = load_experiment(file).recipe({"method": "kd"})
    assert elsewhere(code, str(file)).strip() == recipe.hash
    assert hash(recipe) == hash(load_experiment(file).recipe({"method": "kd"}))
    assert recipe != load_experiment(file).recipe({"method": "kd"}, seed=5)


def test_a_recipe_file_that_was_changed_by_hand(tmp_path: Path, tiny_file: Write) -> None:
    file = tmp_path / "recipe.yaml"
    recipe = load_experiment(tiny_file()).recipe({"method": "kd"})
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    for text, says in (
        (recipe.to_yaml().replace("method: kd", "method: kdd"), "did you mean 'kd'?"),
        (recipe.to_yaml().replace("temperature: 1.0", "temperature: hot"), "kd.temperature: expected a number"),
        (recipe.to_yaml().replace("method: kd", "methd: kd"), "methd: there is no such key; did you mean 'method'?"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_recipe(file)
        assert str(caught.value).startswith(f"{file}: ")
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[2].glob("experiments/*.yaml")), ids=lambda file: file.stem
)
def test_shipped_experiments_are_right(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the search space is found from anywhere
    experiment = load_experiment(file)
    assert experiment.methods
    for method in experiment.methods:
        experiment.recipe(experiment.published(method))
