"""Options from the command line and from YAML."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from pixio.engine.config import option, parse, parse_command, save_config


@dataclass(frozen=True)
class Settings:
    """Settings for a test."""

    data_path: str = option(help="where the images are")
    batch_size: int = option(64, "images per step, 100% of them")
    lr: float | None = option(None, "learning rate; none derives it")
    ratio: float = option(0.75, "share masked", ge=0, le=1)
    pin_mem: bool = option(True, "page-locked memory")
    head: Literal["linear", "dpt"] = option("dpt", "what is trained")
    students: tuple[str, ...] = option(("a",), "student models", aliases=("student",))
    betas: tuple[float, float] = option((0.9, 0.95), "of AdamW")
    blocks: tuple[int, ...] = option((3, 7), "which blocks")
    config: str | None = option(None, "YAML file")

    def __post_init__(self) -> None:
        if self.batch_size % 2:
            raise ValueError(f"--batch_size must be even, found {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Do something.

    And more of it.
    """

    example = "a.jpg --point 1 2"
    images: tuple[str, ...] = option(help="what is read", positional=True)
    point: tuple[tuple[float, float], ...] = option((), "several times", metavar=("X", "Y"), ge=0)
    layout: str = option("nyuv2", "one of {choices}", choices="pixio.synthetic.layouts:LAYOUTS")
    smooth: bool = option(False, "without squares", negatable=False)
    output: Path = option(Path("out.png"), "picture")


def failure(capsys, *argv: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        parse(Settings, list(argv), prog="train")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_defaults_hold_where_nothing_is_given():
    assert parse(Settings, ["--data_path", "x"]) == Settings("x")


def test_every_kind_of_flag_is_read():
    argv = "--data_path x --batch_size 8 --lr 1e-4 --ratio 1 --no_pin_mem --head linear --student b c"
    argv += " --betas 0.5 1 --blocks 1 2 3"
    assert parse(Settings, argv.split()) == Settings(
        "x", 8, 1e-4, 1.0, False, "linear", ("b", "c"), (0.5, 1.0), (1, 2, 3)
    )


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    # 1e-4 without a dot is text in YAML 1.1; a whole number is a fine float.
    path.write_text("data_path: y\nbatch_size: 16\nlr: 1e-4\nratio: 1\nstudent: [s, t]\npin_mem: false\n")
    config = parse(Settings, ["--config", str(path), "--batch_size", "32", "--pin_mem"])
    assert config == Settings("y", 32, 1e-4, 1.0, True, students=("s", "t"), config=str(path))
    assert isinstance(config.ratio, float)


def test_none_on_the_command_line_overrides_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data_path: y\nlr: 0.5\n")
    assert parse(Settings, ["--config", str(path), "--lr", "none"]).lr is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--data_path x --btach_size 4", "unknown flag --btach_size: did you mean --batch_size?"),
        ("--data_path x --no_pin_men", "unknown flag --no_pin_men: did you mean --no_pin_mem?"),
        ("--data_path x stray", "unknown argument stray"),
        ("--data_path x --batch 4", "unknown flag --batch: did you mean --batch_size?"),
        ("--data_path x --batch_size many", "--batch_size must be an integer, found many"),
        ("--data_path x --batch_size 1.5", "--batch_size must be an integer, found 1.5"),
        ("--data_path x --ratio nan", "--ratio must be a number of at least 0 and of at most 1, found nan"),
        ("--data_path x --lr fast", "--lr must be a finite number or none, found fast"),
        ("--data_path x --head dtp", "--head must be one of linear, dpt, found dtp"),
        ("--data_path x --betas 0.9", "--betas: expected 2 arguments"),
        ("--data_path x --batch_size 3", "--batch_size must be even, found 3"),
        ("--data_path x --pin_mem=maybe", "--pin_mem must be true or false, found maybe"),
        ("--batch_size 4", "missing --data_path"),
        ("--config absent.yaml", "absent.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(capsys, argv, words):
    line = failure(capsys, *argv.split())
    assert line.startswith("train: error: ")
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-size: 4", "unknown key batch-size in {path}: did you mean batch_size?"),
        ("batch_size: many", "batch_size in {path} must be an integer, found many"),
        ("batch_size: 2.0", "batch_size in {path} must be an integer, found 2.0"),
        ("batch_size: true", "batch_size in {path} must be an integer, found true"),
        ("pin_mem: 'no'", "pin_mem in {path} must be true or false, found no"),
        ("data_path: 7", "data_path in {path} must be text, found 7"),
        (
            "betas: [1, 2, 3]",
            "betas in {path} must be 2 values: a finite number, a finite number, found 1 2 3",
        ),
        ("students: a", "students in {path} must be a list of text, found a"),
        ("ratio: 2", "ratio in {path} must be a number of at least 0 and of at most 1, found 2"),
        ("ratio: null", "ratio in {path} must be a number of at least 0 and of at most 1, found none"),
        ("student: [a]\nstudents: [b]", "students in {path} is given twice"),
        ("config: other.yaml", "unknown key config"),
        ("- a list", "{path} must hold `key: value` lines"),
        ("a: [", "{path} is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "{path} is not valid YAML"),
    ],
)
def test_a_mistake_in_yaml_is_named_in_one_line(capsys, tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert words.format(path=path) in failure(capsys, "--data_path", "x", "--config", str(path))


def test_help_shows_texts_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, ["--help"], prog="train")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Settings for a test.",
        "where the images are (required)",
        "images per step, 100% of them (default: 64)",
        "--pin_mem, --no_pin_mem page-locked memory (default: true)",
        "{linear,dpt}",
        "--student",
        "learning rate; none derives it (default: none)",
    ):
        assert words in text


def test_a_saved_configuration_parses_to_the_same_values(tmp_path):
    yaml_path, path = tmp_path / "run.yaml", tmp_path / "config.json"
    yaml_path.write_text("lr: 1e-4\nblocks: []\n")
    config = parse(Settings, ["--data_path", "x y", "--ratio", "1e-5", "--config", str(yaml_path)])
    save_config(config, path)
    again = parse(Settings, ["--config", str(path)])
    assert again == dataclasses.replace(config, config=str(path))
    assert yaml.safe_load(path.read_text())["data_path"] == "x y"


@pytest.mark.parametrize(
    ("kind", "bounds", "good", "bad", "words"),
    [
        (int, {"ge": 1}, "1", "0", "a positive integer"),
        (int, {"ge": 0}, "0", "-1", "a non-negative integer"),
        (int, {"ge": 2, "le": 4}, "4", "5", "an integer of at least 2 and of at most 4"),
        (float, {"gt": 0}, "1e-9", "0", "a positive number"),
        (float, {"ge": 0, "lt": 1}, "0", "1", "a number of at least 0 and below 1"),
        (float | None, {"gt": 0}, "0.5", "inf", "a positive number or none"),
        (tuple[float, ...], {"gt": 0, "lt": 1}, "0.5", "1.5", "a number above 0 and below 1"),
    ],
)
def test_a_number_out_of_its_declared_range_is_refused_with_the_range(capsys, kind, bounds, good, bad, words):
    cls = dataclasses.make_dataclass("Cls", [("x", kind, option(None, **bounds))])
    parse(cls, ["--x", good])
    with pytest.raises(SystemExit):
        parse(cls, ["--x", bad], prog="train")
    assert f"train: error: --x must be {words}, found {bad}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--pin_mem=true", True),
        ("--pin_mem=false", False),
        ("--no_pin_mem=true", False),
        ("--no_pin_mem=false", True),
        ("--no_pin_mem --pin_mem=true", True),
        ("--pin_mem --pin_mem=false", False),
    ],
)
def test_a_switch_takes_true_and_false(flags, value):
    assert parse(Settings, ["--data_path", "x", *flags.split()]).pin_mem is value


def test_a_leading_tilde_is_the_home_folder_in_every_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data_path: ~/data\nstudents: [~/a, b~]\n")
    config = parse(Settings, ["--config=~/run.yaml"])
    assert (config.data_path, config.students) == (f"{tmp_path}/data", (f"{tmp_path}/a", "b~"))
    command = parse(Command, ["~/x.jpg", "--output", "~/y.png"])
    assert command == Command(images=(f"{tmp_path}/x.jpg",), output=tmp_path / "y.png")


def test_a_command_has_arguments_without_flags_and_flags_given_several_times():
    argv = "run a b --point 1 2 --point 3 4 --smooth --layout kitti"
    found = parse_command({"run": Command}, argv.split(), "prog")
    assert found == Command(images=("a", "b"), point=((1.0, 2.0), (3.0, 4.0)), smooth=True, layout="kitti")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "prog: error: the following arguments are required: command"),
        ("rnu", "prog: error: argument command: invalid choice: 'rnu'"),
        ("run", "prog run: error: the following arguments are required: images"),
        ("run a --point 1", "--point: expected 2 arguments"),
        ("run a --point 1 -2", "--point must be a non-negative number, found -2"),
        ("run a --layout cifar", "--layout must be one of imagenet-tars, web-tars"),
        ("run a --smoth", "unknown flag --smoth: did you mean --smooth?"),
    ],
)
def test_a_mistake_in_a_command_is_named_in_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as caught:
        parse_command({"run": Command}, argv.split(), "prog")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_help_of_commands_lists_them_and_ends_with_an_example(capsys):
    for argv in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit):
            parse_command({"run": Command}, argv, "prog", "A program.")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "A program.",
        "run Do something.",
        "And more of it.",
        "one of imagenet-tars, web-tars",
        "--point X Y",
        "example: prog run a.jpg --point 1 2",
    ):
        assert words in text
    assert "--no_smooth" not in text
