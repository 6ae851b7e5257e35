"""Continue several prompts of different lengths as one batch, and compare with solo runs.

    python examples/batch_generation.py
    python examples/batch_generation.py runs/mine "class Queue:" "import os" --max-tokens 100

Each row has its own prompt, random numbers and state, so no row depends on its neighbors.
"""

import argparse
import time
from collections.abc import Sequence

from receptance import Generation, Sampling, load_engine

PROMPTS = ["def main(", "class Queue:\n    def push(self, item):", "import os, sys\n\n"]
COLUMN = 16


def main() -> None:
    """Show every step of the batch, then run each prompt alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-python", help="a model's name or path")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="prompt")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    engine, tokenizer = load_engine(options.model)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {options.model}")

    def run(prompts: Sequence[str], seeds: Sequence[int]) -> Generation:
        how = {"sampling": Sampling(top_p=0.8), "max_tokens": options.max_tokens}
        # Without `deterministic` a row equals its solo run up to rounding.
        return Generation(engine, tokenizer, prompts, seed=seeds, deterministic=True, **how)

    seeds = range(len(options.prompts))
    print("".join(f"{f'row {row}':{COLUMN}}" for row in seeds))
    rows: list[list[tuple[int, float | None]]] = [[] for _ in seeds]
    began, column = time.perf_counter(), 0
    for token in run(options.prompts, seeds):
        if token.row < column:  # the tokens of a step come in the order of the rows
            print()
            column = 0
        gap = " " * COLUMN * (token.row - column)  # the place of rows that have finished
        print(gap + f"{token.text!r:{COLUMN}}", end="", flush=True)
        rows[token.row].append((token.id, token.log_probability))
        column = token.row + 1
    print(f"\n\nall rows together: {time.perf_counter() - began:.2f} s")

    for row, prompt in enumerate(options.prompts):
        began = time.perf_counter()
        alone = list(run([prompt], [row]))
        seconds = time.perf_counter() - began
        if [(token.id, token.log_probability) for token in alone] != rows[row]:
            raise SystemExit(f"row {row} differs from its solo run")
        print(f"\nrow {row} alone: {seconds:.2f} s, {len(alone)} tokens, the same to the bit:")
        print(prompt + "".join(token.text for token in alone))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
