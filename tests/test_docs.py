"""The documentation: its code runs as it is printed, with smaller numbers, and every command line
is one that the commands take."""

import functools
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest

from ddsm_tf.commands import ddsm
from ddsm_tf.commands.train import changes_of
from ddsm_tf.cost import Cost
from ddsm_tf.edge import cli as edge_cli
from ddsm_tf.errors import InputError
from ddsm_tf.metrics.suite import check_metrics
from ddsm_tf.models import DiffusionModel
from ddsm_tf.noise import NoiseTable
from ddsm_tf.training.data_sheet import data_sheet
from ddsm_tf.training.presets import PRESETS, get_autoencoder, get_preset

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
SMALLER = {"1000, 50)": "1000, 4)", "segments=10": "segments=3", "512": "8"}
SMALLER |= {"population=16": "population=4", "children=8": "children=2"}
SMALLER |= {"max_trials=60": "max_trials=7"}


def test_the_search_in_a_user_s_own_code(tiny_unet, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "search.md").read_text(), re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    for printed, smaller in SMALLER.items():
        assert printed in code
        code = code.replace(printed, smaller)
    monkeypatch.chdir(tmp_path)
    seen = []

    def my_metric(images):
        seen.append(images.shape)
        return 1.0 + float(np.mean(images))

    model = DiffusionModel(tiny_unet, NoiseTable.linear(1000))
    given = {"unet": tiny_unet, "model": model, "my_metric": my_metric}
    exec(compile(code, "search.md", "exec"), dict(given))
    assert seen == [(8, 8, 8, 1)] * 7
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.match(r"[\d.]+ \d+ steps at ", line) for line in lines)
    # It goes on where it stopped: nothing is left to try.
    exec(compile(code, "search.md", "exec"), dict(given))
    assert len(seen) == 7


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What a shell makes of a script; the quotes of a word are `shlex`'s to take off.
SHELL = re.compile(
    r"""
      (?P<blank> [ \t]+ | (?<!\S)\#[^\n]* )
    | (?P<end> [\n;&|()]+ )
    | (?P<output> \d*>+ )
    | (?P<word> ( \\. | '[^']*' | "(\\.|[^"\\])*" | [^\s\\'";&|()>] )+ )
    """,
    re.DOTALL | re.VERBOSE,
)
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def shell_commands(script):
    """The commands of a script as lists of words, ">" among them, its own variables filled in."""
    script = script.replace("\\\n", "") + "\n"
    assert not SHELL.sub("", script), f"what is this shell? {SHELL.sub('', script)}"
    variables, words = {}, []
    for token in SHELL.finditer(script):
        text = token[0]
        if token["output"]:
            words.append(">")
        elif token["word"]:
            if "'" not in text:
                text = VARIABLE.sub(lambda name: variables.get(name[1] or name[2], name[0]), text)
            words += shlex.split(text)
        elif token["end"] and words:
            assignments = [ASSIGNMENT.fullmatch(word) for word in words if word != "export"]
            if all(assignments):
                variables.update(found.groups() for found in assignments)
            yield words
            words = []


def ddsm_commands(script):
    """Every `ddsm` and `ddsm-edge` of a script, from that word on, whatever stands before it."""
    for words in shell_commands(script):
        programs = [Path(word).name in ("ddsm", "ddsm-edge") for word in words]
        if "-c" in words and {"bash", "sh"} & set(words):
            yield from ddsm_commands(words[words.index("-c") + 1])
        elif any(programs):
            first = programs.index(True)
            yield [Path(words[first]).name, *words[first + 1 :]]


def leaves(command):
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from leaves(each)
    else:
        yield command


@pytest.fixture
def parse(monkeypatch):
    """`parse(program, *arguments)`: what the command would be given; nothing runs."""
    for command in leaves(ddsm):
        monkeypatch.setattr(command, "callback", functools.partial(dict, command=command.name))

    def parse(program, *arguments):
        if program == "ddsm-edge":
            return vars(edge_cli._parser().parse_args(arguments))
        return ddsm.main(arguments, prog_name=program, standalone_mode=False)

    return parse


def check_values(given, configs):
    """What a command checks before it does anything, where that needs no files.

    Args:
        given: what `parse` gives.
        configs: run → its configuration, of the runs known so far; a new one is added.
    """
    if given["command"] in ("train", "autoencoder"):
        find = get_preset if given["command"] == "train" else get_autoencoder
        changes = changes_of(given["changes"], given["data"], given["steps"])
        configs[given["out"]] = find(given["preset"]).changed(changes)
    if given["command"] == "export" and (given["out"] is None) == (given["serving"] is None):
        raise InputError("`-o` or `--serving` must be given, and not both")
    if given["command"] == "evaluate" and given["metrics"]:
        config = configs.get(given["run"])
        with_classes = config is None or config.num_classes > 0
        check_metrics(given["metrics"].split(","), with_classes=with_classes)


def faults_of(script, parse):
    """What of a script's `ddsm` and `ddsm-edge` would be refused, one text a command.

    Values of options that only files can tell (a schedule, a data source) may be wrong still.
    `run` is the run of the digits that README trains.
    """
    faults, written, configs = [], set(), {"run": get_preset("digits")}
    for words in ddsm_commands(script):
        line, redirected = " ".join(words), None
        if ">" in words:
            place = words.index(">")
            words, redirected = words[:place], words[place + 1]
        try:
            given = parse(*words)
            check_values(given, configs)
        except (click.ClickException, InputError) as error:
            usage = isinstance(error, click.ClickException)
            faults.append(f"{line}: {error.format_message() if usage else error}")
            continue
        for out in {given.get("out"), redirected} - {None}:
            if out in written and not (given.get("overwrite") or given.get("resume")):
                faults.append(f"{line}: {out} is there already")
            written.add(out)
    return faults


def printed_scripts():
    """Every block of shell commands, and every command of a manifest, by page and line."""
    for page in PAGES:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            scripts = [block[2]] if block[1] == "sh" else []
            if block[1] == "yaml":
                commands = re.findall(r"^ *command: \[(.*)\]$", block[2], re.MULTILINE)
                scripts = [command.replace(", ", " ") for command in commands]
            line = text.count("\n", 0, block.start()) + 1
            for script in scripts:
                yield pytest.param(script, id=f"{page.name}:{line}")


@pytest.mark.parametrize("script", list(printed_scripts()))
def test_commands_as_printed(script, parse):
    assert faults_of(script, parse) == []


def test_commands_in_sentences(parse):
    """Those that name their run or preset. `ddsm sample RUN` names no run, and may be a part."""
    found, faults = [], []
    for page in PAGES:
        sentences = BLOCK.sub("", page.read_text())
        for command in re.findall(r"`(ddsm(?:-edge)? [^`]*)`", sentences):
            words = command.split()
            if len(words) > 2 and words[2].islower() and not words[2].startswith("-"):
                found.append(" ".join(words))
                faults += [f"{page.name}: {fault}" for fault in faults_of(found[-1], parse)]
    assert faults == []
    assert len(found) >= 7


def test_all_commands_of_the_docs_are_found():
    scripts = [script for case in printed_scripts() for script in case.values]
    commands = [words for script in scripts for words in ddsm_commands(script)]
    text = "\n".join(scripts)
    without_comments = re.sub(r"(^|\s)#.*", "", text)
    mentioned = re.findall(r"(?<![\w.-])ddsm(?:-edge)? ", without_comments)
    assert len(commands) == len(mentioned) > 60


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("ddsm train digits --out run --set steps=3  # it's --new", []),
        ("ddsm train digits --set num_classes=10", ["Missing option '--out'"]),
        ("ddsm train digit --out run", ["`PRESET` (='digit')"]),
        ("ddsm train digits --out run --set widht=1", ["did you mean"]),
        ("ddsm autoencoder afhq --out run", ["`PRESET` (='afhq')"]),
        ("ddsm sample run -o a.png --colour", ["No such option"]),
        ("X=1 ddsm sample run -o a.png \\\n  --sampler karras", ["'karras' is not one of"]),
        ("ddsm export run tflite", ["`-o` or `--serving`"]),
        ("ddsm evaluate run --metrics fid,per_class", ["needs a model with classes"]),
        ("ddsm train digits --out c --set num_classes=10\nddsm evaluate c --metrics per_class", []),
        ("edge/bin/ddsm-edge benchmark bundle --quick", ["unrecognized arguments"]),
        ("ddsm-edge sample bundle -n 1", ["are required: -o"]),
        ("srun bash -c 'if true; then exec ddsm search; fi'", ["Missing argument 'RUN'"]),
        ('sh -c "A=$B ddsm search run --cost" && true', ["requires an argument"]),
        ('x="--steps 3 --out a"\nddsm train digits $x && ddsm tune a ${x}', ["a is there"]),
        ("ddsm export run bundle -o b\nddsm export run bundle -o b --batch 1", ["b is there"]),
        ("ddsm export run bundle -o b\nddsm export run bundle -o b --overwrite", []),
        ("ddsm tune run --out a\nddsm tune run --out a --resume", []),
        ("ddsm latency run -o t\nddsm-edge benchmark b --json > t", ["t is there"]),
    ],
)
def test_what_would_be_refused(script, expected, parse):
    faults = faults_of(script, parse)
    assert len(faults) == len(expected), faults
    assert all(part in fault for part, fault in zip(expected, faults, strict=True)), faults


def test_nothing_is_asked_of_an_index_that_does_not_have_it():
    for page in PAGES:
        assert not re.search(r"pip\s+install\s+'?ddsm_tf", page.read_text()), page.name


def test_data_sheets_as_printed(parse):
    """All but the numbers that need the networks; `test_presets.py` has those."""
    of_the_network = re.compile(r"  (width|memory|the paper|[\d.]+ | +FID)")
    (printed,) = re.findall(r"^```\n(.*?)^```", (DOCS / "presets.md").read_text(), re.M | re.S)
    sheets = "\n\n".join(data_sheet(config, {1.0: Cost()}) for config in PRESETS.values()) + "\n"

    def rest(text):
        return [line for line in text.splitlines() if not of_the_network.match(line)]

    assert rest(printed) == rest(sheets)
    commands = re.findall(r"^  \w+ +(ddsm .*)$", printed, re.MULTILINE)
    assert len(commands) == 4 * len(PRESETS) + 2
    assert faults_of("\n".join(commands), parse) == []
    # The folder that a latent preset reads is made before it is read.
    for preset, config in PRESETS.items():
        ours = [command for command in commands if f" {preset} " in command]
        first = parse(*ours[0].split())
        if config.autoencoder:
            assert (first["command"], first["out"]) == ("autoencoder", config.autoencoder)
        else:
            assert first["command"] == "train"
