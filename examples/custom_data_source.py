"""Train a new model on text from a source of your own, here the rows of an SQLite database.

    python examples/custom_data_source.py
    python examples/custom_data_source.py --out diary --steps 300

Whatever can be iterated over becomes a file of tokens, and `merge` makes a corpus of such files,
which `receptance train diary/corpus --out runs/diary` reads as well.
"""

import argparse
import random
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from receptance import Model, ModelConfig, generate
from receptance.data import Batches, TokenFiles, is_corpus, merge
from receptance.inference.scoring import bits_per_byte, negative_log_likelihood
from receptance.tokenizer import ByteTokenizer, Tokenizer
from receptance.training import Trainer, TrainOptions

THINGS = {"sunny": "a hat", "rainy": "an umbrella", "snowy": "boots", "windy": "a scarf"}


def documents() -> Iterator[str]:
    """One document for each row of a table with the weather of 2,000 days."""
    dice, database = random.Random(0), sqlite3.connect(":memory:")
    rows = ((n, dice.choice(list(THINGS)), dice.randint(-9, 30)) for n in range(2000))
    database.execute("CREATE TABLE days (number INTEGER, weather TEXT, degrees INTEGER)")
    database.executemany("INSERT INTO days VALUES (?, ?, ?)", rows)
    for number, weather, degrees in database.execute("SELECT * FROM days"):
        yield f"Day {number}: {degrees} degrees and {weather}, so take {THINGS[weather]}."


def write_tokens(texts: Iterable[str], tokenizer: Tokenizer, file: Path) -> None:
    """Write one flat array of ids, with the end-of-text token after each document."""
    ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.end_of_text)]
    np.save(file, np.array(ids, np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32))


def main() -> None:
    """Make the corpus unless an earlier call did, then train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("diary"), help="folder to write")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    tokenizer, folder = ByteTokenizer(), options.out / "corpus"
    if not is_corpus(folder):
        options.out.mkdir(parents=True, exist_ok=True)
        # A source that does not fit into memory makes several such files.
        write_tokens(documents(), tokenizer, options.out / "tokens.npy")
        merge([options.out / "tokens.npy"], folder, tokenizer, validation=0.05)
    corpus = TokenFiles.open(folder)
    print(f"{folder}: {len(corpus.train):,} tokens, {len(corpus.validation):,} for validation")

    train = TrainOptions(
        steps=options.steps, batch=8, context=128, learning_rate=1e-2, final_learning_rate=1e-3
    )
    end = corpus.end_of_text
    batches = Batches(corpus.train, end_of_text=end, batch=8, context=128, seed=train.seed)
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, width=64, num_layers=2), seed=0)
    trainer = Trainer(model, batches, train)
    while not trainer.finished:
        report = trainer.run_step()
        if report.step % 15 == 0:
            print(f"step {report.step}: loss {report.loss:.2f} nats per token")
    bits = bits_per_byte(negative_log_likelihood(model, corpus.validation), len(corpus.validation))
    print(f"validation: {bits:.2f} bits per byte")
    for day in ("Day 1: 9 degrees and rainy", "Day 2: "):
        print(day + generate(model, tokenizer, day, max_tokens=60, top_p=0.5))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
