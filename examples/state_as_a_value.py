"""Read a long text once, keep its state, and continue from there as often as you like.

    python examples/state_as_a_value.py
    python examples/state_as_a_value.py runs/mine --text chapter.txt --state chapter.state

A state has the same size after any number of tokens. Calls return a new one and never change the
one that they were given, so a state is forked by keeping it.
"""

import argparse
import textwrap
import time
from pathlib import Path

from receptance import Generation, Sampling, State, load_engine
from receptance.inference.generation import prefill

QUESTIONS = ["\n\ndef main(", "\n\nclass Test", "\n\nimport "]


def main() -> None:
    """Compare continuing from a state with reading everything again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-python", help="a model's name or path")
    parser.add_argument("--text", type=Path, default=Path(textwrap.__file__), help="a long text")
    parser.add_argument("--state", type=Path, default=Path("text.state"), help="file to write")
    options = parser.parse_args()
    engine, tokenizer = load_engine(options.model)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {options.model}")

    def answers(prompts: list[list[int]], state: State | None = None) -> list[str]:
        greedy, texts = Sampling(temperature=0), [""] * len(prompts)
        for token in Generation(
            engine, tokenizer, prompts, sampling=greedy, max_tokens=20, state=state
        ):
            texts[token.row] += token.text
        return texts

    # Text and questions are tokenized apart, so that no token lies across the border between them.
    text = tokenizer.encode(options.text.read_bytes())
    questions = [tokenizer.encode(question) for question in QUESTIONS]
    began = time.perf_counter()
    _, state = prefill(engine, [text])
    read = time.perf_counter()
    forked = answers(questions, state.rows([0] * len(questions)))  # a row for each question
    done = time.perf_counter()
    whole = answers([text + question for question in questions])
    again = time.perf_counter() - done
    print(f"read {len(text):,} tokens once, into a state of {state.nbytes:,} bytes: ", end="")
    print(f"{read - began:.2f} s")
    print(f"{len(questions)} continuations from that state: {done - read:.2f} s")
    print(f"the same, reading everything for each of them: {again:.2f} s")

    engine.save_state(state, options.state)
    loaded = engine.load_state(options.state)
    if not forked == whole == answers(questions, State.cat([loaded] * len(questions))):
        raise SystemExit("the texts differ")
    print(f"the texts are equal each time, also from the file {options.state}:")
    for question, answer in zip(QUESTIONS, forked, strict=True):
        print(f"  {question + answer!r}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
