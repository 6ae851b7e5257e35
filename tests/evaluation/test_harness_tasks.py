"""Benchmarks of one's own through the harness: no network, no noise, nothing computed twice."""

from __future__ import annotations

import json
import subprocess
import sys
from random import getstate

import numpy as np
import pytest
import torch
from numpy.random import get_state
from tiny import make_model, small_bpe

pytest.importorskip("lm_eval")

from receptance.evaluation.benchmarks import harness
from receptance.evaluation.benchmarks.continuations import common_length, generation_options
from receptance.evaluation.benchmarks.tasks import TaskOptions, figures, some_samples
from receptance.evaluation.journal import Journal

TOKENIZER = small_bpe(300)
MODEL = make_model(300)

CHOICE = """
task: {name}
dataset_path: {kind}
dataset_kwargs:
  data_files: {{test: "{data}", train: "{data}"}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}", train: "{data}"}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {arguments}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(12):
        a, b = generator.integers(20, size=2).tolist()
        choices = [str(a + b), str(a + b + 1), "lazy dogs", "狐"]
        question = f"what are {a} and {b} foxes"
        rows.append({"question": question, "choices": choices, "gold": number % 4})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(CHOICE.format(name="mine", kind="json", data=data))
    (folder / "read.yaml").write_text(ROLLING.format(data=data))
    arguments = '{until: ["\\n"], max_gen_toks: 8}'
    (folder / "continue.yaml").write_text(GENERATION.format(data=data, arguments=arguments))
    return folder


def run(folder, *names, journal=None, **options):
    wanted = TaskOptions(tasks=names, include_path=(folder,), **options)
    return harness.run_tasks(MODEL, TOKENIZER, wanted, journal=journal)


def test_figures_have_tasks_shots_and_intervals(folder):
    found = run(folder, "mine", "read", "continue", num_fewshot=2)
    by_name = {(each.about["task"], each.name): each for each in figures(found.results, "m")}
    assert by_name.keys() >= {("mine", "acc"), ("mine", "acc_norm"), ("read", "bits_per_byte")}
    acc = by_name["mine", "acc"]
    assert acc.low <= acc.value <= acc.high and acc.about["shots"] == 2
    assert acc.about["documents"] == 12 and acc.about["higher is better"] is True
    json.dumps(found.results)


def test_shared_shots_are_read_once(folder):
    found = run(folder, "mine", num_fewshot=5)
    tokens = 12 * 4 * 100
    assert found.tokens_read < 0.25 * (found.tokens_read + found.tokens_spared)
    assert found.tokens_read + found.tokens_spared > tokens


def test_generated_texts_share_shots_too_and_end_before_the_stop(folder):
    found = run(folder, "continue", num_fewshot=3)
    assert found.tokens_spared > found.tokens_read
    answers = [each["resps"][0][0] for each in found.results["samples"]["continue"]]
    assert len(answers) == 12 and not any("\n" in answer for answer in answers)


def test_answers_are_kept_and_a_larger_limit_asks_only_for_more(folder, tmp_path):
    for limit, kept in ((4, 0), (12, 4 * (4 + 1 + 1)), (12, 12 * (4 + 1 + 1))):
        with Journal(tmp_path / "journal", {"of": "tests"}) as journal:
            found = run(folder, "mine", "read", "continue", journal=journal, limit=limit)
        assert found.kept == kept
    assert found.tokens_read == 0
    fresh = run(folder, "mine", "read", "continue")
    assert found.results["results"] == fresh.results["results"]


def test_windows_of_a_length(folder):
    short, whole = run(folder, "read", max_length=6), run(folder, "read")
    bits = "bits_per_byte,none"
    assert short.results["results"]["read"][bits] != whole.results["results"]["read"][bits]
    with pytest.raises(ValueError, match="set max_length to more"):
        run(folder, "continue", max_length=4)


def test_prefixes_change_what_is_asked(folder):
    bits = {
        prefix: run(folder, "read", prefix=prefix).results["results"]["read"]["bits_per_byte,none"]
        for prefix in ("none", "newline")
    }
    assert bits["none"] != bits["newline"]


def test_a_chat_template_lays_out_turns(folder):
    found = run(folder, "continue", num_fewshot=1, apply_chat_template="world")
    (arguments,) = found.results["samples"]["continue"][0]["arguments"]
    assert arguments[0].startswith("User: Question:") and arguments[0].endswith("\n\nAssistant: ")
    assert arguments[0].count("\n\nUser: ") == 1


def test_parquet_tasks(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [{"question": "fox", "choices": ["a", "b"], "gold": 1}] * 3
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    text = CHOICE.format(name="columns", kind="parquet", data=tmp_path / "data.parquet")
    (tmp_path / "columns.yaml").write_text(text)
    found = run(tmp_path, "columns")
    assert found.results["n-samples"]["columns"]["effective"] == 3


def test_a_pattern_stands_for_tasks(folder):
    assert run(folder, "*in*", limit=1).results["results"].keys() == {"mine", "continue"}


def test_a_file_may_be_named_itself(folder):
    wanted = TaskOptions(tasks=(str(folder / "mine.yaml"),), limit=2)
    assert "mine" in harness.run_tasks(MODEL, TOKENIZER, wanted).results["results"]


def test_lambada_of_a_file_needs_nothing_else(folder, tmp_path):
    (tmp_path / "l.jsonl").write_text('{"text": "12 little foxes jump"}\n{"text": "lazy dogs"}\n')
    wanted = TaskOptions(tasks=("lambada_openai",), lambada=tmp_path / "l.jsonl")
    found = harness.run_tasks(MODEL, TOKENIZER, wanted).results["results"]["lambada_openai"]
    assert found["perplexity,none"] > 1 and found["perplexity_stderr,none"] > 0


def test_samples_show_what_was_asked_and_answered(folder):
    found = some_samples(run(folder, "mine").results, 2)["mine"]
    assert len(found) == 2 and len(found[0]["arguments"]) == 4 and "acc" in found[0]


class TestMistakes:
    @pytest.mark.slow  # The harness reads all of its 13,000 files.
    def test_an_unknown_task(self, folder):
        with pytest.raises(ValueError, match="no task 'mime'"):
            run(folder, "mime")

    def test_missing_data(self, folder, tmp_path):
        text = CHOICE.format(name="lost", kind="json", data=tmp_path / "none.jsonl")
        (tmp_path / "lost.yaml").write_text(text)
        with pytest.raises(ValueError, match="task lost: it cannot be loaded") as refused:
            run(tmp_path, "lost")
        assert "\n" not in str(refused.value)

    def test_a_field_that_the_data_lacks(self, folder, tmp_path):
        text = (folder / "mine.yaml").read_text().replace("question", "qestion")
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(
            ValueError, match=r"task mine: it cannot be loaded ..*'qestion' is undefined"
        ) as refused:
            run(tmp_path, "mine")
        assert "\n" not in str(refused.value)

    def test_arguments_of_generation_without_effect(self, folder, tmp_path):
        text = GENERATION.format(data=folder / "data.jsonl", arguments="{num_beams: 4}")
        (tmp_path / "continue.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"task continue: .*num_beams"):
            run(tmp_path, "continue")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("tasks", ()), ("limit", 0), ("num_fewshot", -1), ("max_length", 0), ("seed", -1)),
            *(("apply_chat_template", "none"), ("prefix", "bos")),
        ],
    )
    def test_options_are_checked_when_they_are_made(self, name, value):
        with pytest.raises(ValueError):
            TaskOptions(**{"tasks": ("a",)} | {name: value})


class TestArguments:
    def test_names_of_other_libraries_and_stop_strings(self):
        found = generation_options({"until": "x", "max_new_tokens": 3, "num_beams": 1}, 5)
        assert (found.stop, found.max_tokens, found.seed) == (("x",), 3, 5)
        assert found.sampling.temperature == 0
        assert generation_options({"until": ["", "y"]}, 0).stop == ("y",)

    @pytest.mark.parametrize(
        ("arguments", "temperature"),
        [
            ({"do_sample": True, "temperature": 0.7}, 0.7),
            ({"do_sample": False, "temperature": 0.7}, 0.0),
            ({"temperature": 0.7}, 0.7),
            ({"do_sample": True}, 1.0),
            ({}, 0.0),
        ],
    )
    def test_drawing(self, arguments, temperature):
        assert generation_options(arguments, 0).sampling.temperature == temperature

    def test_repeated_requests_are_drawn_anew(self, folder, tmp_path):
        arguments = "{max_gen_toks: 12, do_sample: true, temperature: 1.0}\nrepeats: 3"
        text = GENERATION.format(data=folder / "data.jsonl", arguments=arguments)
        (tmp_path / "continue.yaml").write_text(text)
        answers = [
            run(tmp_path, "continue", limit=2, seed=seed).results["samples"]["continue"]
            for seed in (1, 1, 2)
        ]
        first, again, other = ([each["resps"] for each in one] for one in answers)
        assert len(set(first[0][0])) == 3
        assert first == again != other


@pytest.mark.parametrize(
    ("prompts", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[1]], 0), ([[5, 1], [6, 1]], 0)],
)
def test_a_common_beginning_leaves_a_token_to_each(prompts, length):
    assert common_length(prompts) == length


def test_global_generators_are_as_they_were(folder):
    def states():
        return getstate(), get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    run(folder, "mine", limit=2)
    assert states() == before


@pytest.mark.slow
def test_nothing_is_printed_in_a_folder_without_git(folder, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(sys.path[0])!r})
sys.path.append({str(__import__("pathlib").Path(__file__).parents[1])!r})
from pathlib import Path
from tiny import make_model, small_bpe
from receptance.evaluation.benchmarks import harness
from receptance.evaluation.benchmarks.tasks import TaskOptions
options = TaskOptions(tasks=("mine", "continue"), include_path=(Path({str(folder)!r}),))
harness.run_tasks(make_model(300), small_bpe(300), options)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tasks_without_data_are_left_out_with_their_reasons(folder, tmp_path, monkeypatch):
    for name in ("here", "there"):
        text = CHOICE.format(name=name, kind="json", data=folder / "data.jsonl")
        (tmp_path / f"{name}.yaml").write_text(text)
    load = harness.TaskManager.load

    def unreachable(self, tasks):
        if tasks == ["there"]:
            raise ConnectionError("no network")
        return load(self, tasks)

    monkeypatch.setattr(harness.TaskManager, "load", unreachable)
    found = run(tmp_path, "there", "here", skip_missing=True, limit=2)
    assert found.results["results"].keys() == {"here"}
    assert found.missing.keys() == {"there"} and "cannot be reached" in found.missing["there"]
    with pytest.raises(ValueError, match="task there: the data set is on the hub"):
        run(tmp_path, "there", "here")
    with pytest.raises(ValueError, match="no task can be loaded; there: "):
        run(tmp_path, "there", skip_missing=True)


def test_the_interval_of_a_perplexity_is_positive():
    results = {"results": {"t": {"perplexity,none": 20.0, "perplexity_stderr,none": 30.0}}}
    (found,) = figures(results, "m")
    assert 0 < found.low < 20 < found.high
