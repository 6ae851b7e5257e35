"""Help texts: what is common fits a screen, everything is behind --help-all, examples are true."""

import importlib
import shlex

import pytest
from command import call

from receptance.__main__ import APPS
from receptance.apps.options import flags, parse

KINDS = {
    name: importlib.import_module(f"receptance.apps.{name}").Options
    for name in APPS
    if name != "data"
}
WITH_COMMON = [name for name, kind in KINDS.items() if hasattr(kind, "COMMON")]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(*words: str) -> list[str]:
    result = call(*words)
    assert (result.code, result.err) == (0, "")
    return result.out.splitlines()


@pytest.mark.parametrize("name", KINDS)
def test_help_fits_a_screen(name):
    lines = shown(name, "--help")
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", WITH_COMMON)
def test_what_is_common_is_shown_and_the_rest_is_told_of(name):
    kind = KINDS[name]
    lines = shown(name, "--help")
    listed = [line.split()[0] for line in lines if line.startswith("  --")]
    assert listed == kind.COMMON.split()
    assert set(listed) <= set(flags(kind).values())
    assert lines[-1].startswith(f"receptance {name} --help-all describes all ")


@pytest.mark.parametrize("name", KINDS)
def test_help_all_describes_every_option(name):
    lines = shown(name, "--help-all")
    listed = [line.split()[0].strip(",") for line in lines if line.startswith("  -")]
    assert listed[0] == "-h" and set(flags(KINDS[name]).values()) <= set(listed)


@pytest.mark.parametrize("name", KINDS)
def test_examples_can_be_parsed(name):
    kind = KINDS[name]
    assert kind.EXAMPLES
    for example in kind.EXAMPLES:
        command, app, *words = shlex.split(example.partition(" >")[0])
        assert (command, app) == ("receptance", name)
        parse(kind, words, f"receptance {name}")
        assert f"  {example}" in shown(name, "--help")


def test_a_description_is_one_paragraph_whatever_its_lines_are_in_the_code():
    lines = shown("train", "--help-all")
    at = next(i for i, line in enumerate(lines) if line.startswith("  --resume"))
    paragraph = " ".join(line.strip() for line in lines[at + 1 : at + 6])
    assert paragraph.startswith("Continue the run in --out from its newest whole checkpoint; its")


def test_a_default_that_is_expected_is_not_told():
    lines = "\n".join(shown("generate", "--help"))
    assert "(default: 1.0)" in lines and "(default: 0)" not in lines
    assert "(default: 0)" in "\n".join(shown("generate", "--help-all"))


def test_a_switch_that_is_on_shows_how_to_switch_it_off():
    assert "  --effects or --no-effects" in shown("analyze", "--help")
    assert not any("--no-" in line for line in shown("compare", "--help"))


def test_dots_within_a_statement_do_not_end_it():
    text = " ".join(line.strip() for line in shown("generate", "--help"))
    assert "cpu, cuda, ...; auto takes a GPU where there is one. (default: auto)" in text


def test_the_description_of_a_section_is_no_option():
    assert "lora options:" not in shown("train", "--help")
