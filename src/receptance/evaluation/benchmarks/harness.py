"""lm-evaluation-harness over any engine: it makes requests of tasks, and metrics of answers."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from receptance.data.templates import Message, Template, find_template

try:
    from lm_eval import evaluator
    from lm_eval.api import metrics
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import handle_non_serializable
except ImportError as error:
    raise ValueError(
        f"benchmarks need lm-evaluation-harness ({error}): pip install lm-eval==0.4.13"
    ) from None

from receptance.engine.base import Engine
from receptance.evaluation.benchmarks.answers import (
    Answers,
    Encoded,
    Progress,
    ToContinue,
    request_key,
)
from receptance.evaluation.benchmarks.lambada import local_task
from receptance.evaluation.benchmarks.quiet import own_random_numbers, replaced, silent
from receptance.evaluation.benchmarks.tasks import TaskOptions, TaskRun
from receptance.evaluation.intervals import resampled_error
from receptance.evaluation.journal import Journal
from receptance.tokenizer import Tokenizer

# The texts of so many contexts are remembered with their tokens, because choices follow each other.
_REMEMBERED = 64
# Standard errors without a formula are those of so many resamples.
_RESAMPLES = 1000
# The harness seeds Python with the first and all else with the second, unless it is told otherwise.
_SEEDS = (0, 1234)
# Loggers that would write to the terminal.
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "transformers")


class EngineLM(TemplateLM):
    """The model that the harness asks: log-likelihoods and continuations by any engine.

    Contexts that requests share are read once, whatever their order.
    """

    def __init__(self, answers: Answers, template: str | None = None) -> None:
        super().__init__()
        self.answers = answers
        self.max_length = answers.max_length
        self.answering = False
        """Whether an error would come from the answers and not from a task."""
        self._template: Template | None = None if template is None else find_template(template)
        self._name = f"{answers.tokenizer.fingerprint[:16]}-{template or ''}"
        self._encode = functools.lru_cache(maxsize=_REMEMBERED)(answers.tokenizer.encode)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.answers.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token behind which a text without a context begins."""
        return self.answers.start

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer and the chat template together."""
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """The ids of a text; nothing is added, whatever the options say."""
        return list(self._encode(string))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each (context, continuation)."""
        keys = [request_key("loglikelihood", *request.args) for request in requests]
        missing = self._missing(keys, requests)
        if empty := [request for request in missing.values() if not request.args[1]]:
            raise ValueError(f"task {empty[0].task_name}: a continuation without any text")
        with self._answering():
            if missing:
                super().loglikelihood(list(missing.values()), disable_tqdm=True)
        return [(value, bool(greedy)) for value, greedy in map(self.answers.known, keys)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], **options: Any
    ) -> list[tuple[float, bool]]:
        return self.answers.score(requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, all of whose tokens are predicted."""
        keys = [request_key("loglikelihood_rolling", *request.args) for request in requests]
        missing = self._missing(keys, requests)
        with self._answering():
            self.answers.roll({key: request.args[0] for key, request in missing.items()})
        return [float(self.answers.known(key)) for key in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each (context, arguments), up to a stop string."""
        keys: list[str] = []
        asked: dict[str, int] = {}
        for request in requests:
            key = request_key("generate_until", self.answers.seed, *request.args)
            asked[key] = asked.get(key, 0) + 1
            # A text that is asked for several times is drawn anew each time.
            keys.append(f"{key}-{asked[key]}")
        missing = self._missing(keys, requests)
        with self._answering():
            self.answers.extend({key: self._to_continue(r) for key, r in missing.items()})
        return [self._spaced(str(self.answers.known(key))) for key in keys]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text, up to where the assistant's next words begin.

        Without add_generation_prompt the last message is the beginning of such an answer.
        """
        template = self._template
        if template is None:
            raise ValueError("no chat template was chosen; set apply_chat_template to one")
        every = [Message(turn["role"], turn["content"]) for turn in chat_history]
        turns = [turn for turn in every if turn.role == "assistant" or turn.text.strip()]
        begun = "" if add_generation_prompt or not turns else turns.pop().text
        gap = " " if template.gap == " " else ""
        return "".join(text for text, _ in template.render(turns)) + template.opening + gap + begun

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of a model."""
        engine = self.answers.engine
        return {"model_sha": engine.fingerprint(), **engine.config.to_dict()}

    def _missing(self, keys: list[str], requests: list[Instance]) -> dict[str, Instance]:
        left = self.answers.missing(keys)
        return {key: r for key, r in zip(keys, requests, strict=True) if key in left}

    def _to_continue(self, request: Instance) -> ToContinue:
        # A chat's opening may end with a space, which is a part of the answer's first token.
        context = request.args[0].removesuffix(" ") if self._template else request.args[0]
        return ToContinue(context, request.args[1], request.task_name or "")

    def _spaced(self, text: str) -> str:
        return text.removeprefix(" ") if self._template else text

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        self.answering = True
        yield
        self.answering = False


def run_tasks(
    engine: Engine,
    tokenizer: Tokenizer,
    options: TaskOptions,
    *,
    journal: Journal | None = None,
    progress: Progress = lambda what, done, total: None,
) -> TaskRun:
    """Run benchmarks with `simple_evaluate` of the harness.

    Nothing but the tasks that are named is looked for: the harness's own ones are indexed only if
    one of them is. ValueError says in one line which task is unknown, cannot be loaded, or asks for
    something that cannot be done. Global random generators are afterwards as they were.
    """
    answers = Answers(
        engine,
        tokenizer,
        prefix=options.prefix,
        max_length=options.max_length,
        seed=options.seed or 0,
        journal=journal,
        progress=progress,
    )
    model = EngineLM(answers, options.apply_chat_template)
    with silent(_LOGGERS), own_random_numbers(), _tame():
        loaded, missing = _load(options, progress)
        progress("building requests", 0, 0)
        results = _evaluate(model, loaded, options)
    return TaskRun(results, answers.tokens_read, answers.tokens_spared, answers.kept, missing)


def _evaluate(model: EngineLM, tasks: list[Any], options: TaskOptions) -> dict[str, Any]:
    seed = options.seed
    python_seed, other_seed = _SEEDS if seed is None else (seed, seed)
    try:
        results = evaluator.simple_evaluate(
            model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),  # Its own would index all tasks.
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=_RESAMPLES,
            apply_chat_template=options.apply_chat_template is not None,
            random_seed=python_seed,
            numpy_random_seed=other_seed,
            torch_random_seed=other_seed,
            fewshot_random_seed=other_seed,
        )
    except Exception as error:
        if model.answering or isinstance(error, OSError | MemoryError):
            raise
        raise ValueError(f"a task cannot be evaluated: {_said(error)}") from error
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


# ---- tasks ----------------------------------------------------------------------------------


def _load(options: TaskOptions, progress: Progress) -> tuple[list[Any], dict[str, str]]:
    """The tasks and groups, and the reasons why others are missing."""
    specs = _specs(options, progress)
    found: list[Any] = []
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for number, (name, (manager, spec)) in enumerate(specs.items()):
            progress(f"loading {name}", number, len(specs))
            try:
                found += _outermost(manager.load([spec]))
            except Exception as error:
                missing[name] = _why(error)
                if not options.skip_missing:
                    raise ValueError(f"task {name}: {missing[name]}") from error
                if isinstance(error, ConnectionError):  # Each attempt would take half a minute.
                    _go_offline(stack)
    if not found:
        name, reason = next(iter(missing.items()))
        raise ValueError(f"no task can be loaded; {name}: {reason}")
    return found, missing


def _specs(
    options: TaskOptions, progress: Progress
) -> dict[str, tuple[TaskManager, str | dict[str, Any]]]:
    """What each name is loaded from, and by which index.

    Only if a name is not among the user's own tasks, those of the harness are indexed.
    """
    folders = [str(path) for path in options.include_path]
    own = TaskManager(include_path=folders, include_defaults=False)
    lambada = [] if options.lambada is None else [local_task(options.lambada)]
    local = {task["task"]: (own, task) for task in lambada}
    manager = own
    if not all(name in local or _matching(name, own) for name in options.tasks):
        progress("indexing the harness's tasks", 0, 0)
        manager = TaskManager(include_path=folders, include_defaults=True)
    found: dict[str, tuple[TaskManager, str | dict[str, Any]]] = {}
    for name in options.tasks:
        matching = [name] if name in local else _matching(name, manager)
        if not matching:
            raise ValueError(_unknown(name, manager, options))
        found |= {each: local.get(each, (manager, each)) for each in matching}
    return found


def _matching(name: str, manager: TaskManager) -> list[str]:
    """The tasks that a name, a pattern or a file stands for; none if it is unknown."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"no file {name}; wanted the YAML file of a task")
        return [name]
    if name in manager.task_index:
        return [name]
    return list(manager.match_tasks([name])) if "*" in name else []


def _unknown(name: str, manager: TaskManager, options: TaskOptions) -> str:
    for folder in options.include_path:
        for file in sorted(folder.rglob("*.yaml")):
            try:
                load_yaml(file, resolve_func=False, recursive=True)
            except Exception as error:
                return f"no task {name!r}, and {file} cannot be read: {_said(error)}"
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "name one of the harness or a YAML file"
    return f"no task {name!r}; {hint}"


def _outermost(loaded: Mapping[str, Any]) -> list[Task | Group]:
    """The tasks and groups that are in no other group."""
    groups = loaded.get("groups") or {}
    inside = {name for group in groups.values() for name in group.child_names}
    inside |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    every = [*groups.items(), *loaded["tasks"].items()]
    return [each for name, each in every if name not in inside]


def _why(error: Exception) -> str:
    """Why a task cannot be loaded."""
    if isinstance(error, ConnectionError):
        return (
            "the data set is on the hub, which cannot be reached; give a local copy with a YAML "
            "file of your own"
        )
    return f"it cannot be loaded ({_said(error)})"


def _said(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _go_offline(stack: contextlib.ExitStack) -> None:
    """From now on take data sets of the hub from the disk only, until the stack ends."""
    for name in ("datasets.config", "huggingface_hub.constants"):
        stack.enter_context(replaced(import_module(name), "HF_HUB_OFFLINE", True))


@contextlib.contextmanager
def _tame() -> Iterator[None]:
    """Let the harness start no other program and no other process.

    It asks git for the commit of the current folder and pip for all packages, and draws resamples
    in a pool of processes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(replaced(evaluator, "add_env_info", _add_versions))
        stack.enter_context(replaced(metrics, "bootstrap_stderr", resampled_error))
        yield


def _add_versions(results: dict[str, Any]) -> None:
    results["lm_eval_version"] = metadata.version("lm_eval")
