"""Fine-tune a model with LoRA on prompts and responses, and ask it something before and after.

    python examples/fine_tuning.py
    python examples/fine_tuning.py runs/mine chats.jsonl --out tuned --ask "Who are you?"

DATA is a .jsonl of prompts and responses, or of messages; without it a small one is written.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from receptance import generate, load, load_engine
from receptance.adapters import LoRAOptions, make_adapter
from receptance.data import Batches, PrepareOptions, prepare
from receptance.data.templates import find_template
from receptance.training import Trainer, TrainOptions

SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
THINGS = ["ages", "costs", "lengths", "numbers", "prices", "sizes", "times", "values", "weights"]


def write_sample(file: Path) -> Path:
    """Write a record for each pair of verb and thing but the one that is asked for afterwards."""
    pairs = [(verb, thing) for verb in SIGNS for thing in THINGS]
    pairs.remove(("divide", "prices"))
    codes = (f"def {verb}_{thing}(a, b):\n    return a {SIGNS[verb]} b" for verb, thing in pairs)
    prompts = (f"How do I {verb} two {thing}?" for verb, thing in pairs)
    records = [{"prompt": p, "response": c} for p, c in zip(prompts, codes, strict=True)]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def main() -> None:
    """Make tokens of the data, train an adapter beside the frozen model, save it and use it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-python", help="a model's name or path")
    parser.add_argument("data", nargs="?", type=Path, help="a .jsonl, .json or .parquet")
    parser.add_argument("--out", type=Path, default=Path("fine-tuned"), help="folder to write")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ask", default="How do I divide two prices?")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {options.model}")
    prompt = find_template("world").prompt(options.ask)  # "User: ...", and "Assistant:"
    answer = generate(model, tokenizer, prompt, max_tokens=60, temperature=0, stop="\n\n")
    print(f"before: {answer!r}")

    data = options.data or write_sample(options.out / "sample.jsonl")
    how = PrepareOptions(template="world")
    corpus = prepare([str(data)], options.out / "corpus", tokenizer, how, Console(stderr=True))
    if corpus.train_mask is None:  # it is 1 where a response is, which alone is learned
        raise ValueError(f"{data} has no records of prompts and responses")
    train = TrainOptions(
        steps=options.steps, batch=4, context=128, learning_rate=5e-3, final_learning_rate=1e-3
    )
    tokens, mask, end = corpus.train, corpus.train_mask, corpus.end_of_text
    batches = Batches(tokens, mask=mask, end_of_text=end, batch=4, context=128, seed=train.seed)
    adapter = make_adapter(model, LoRAOptions(rank=8))
    with adapter.attach(model):  # freezes the model, which is as before after the block
        trainer = Trainer(model, batches, train, adapter=adapter)
        while not trainer.finished:
            report = trainer.run_step()
            if report.step % 10 == 0:
                print(f"step {report.step}: loss {report.loss:.2f} nats per token of a response")
    file = options.out / "adapter.safetensors"
    adapter.save(file, model.fingerprint())

    engine, _ = load_engine(options.model, adapter=file)
    answer = generate(engine, tokenizer, prompt, max_tokens=60, temperature=0, stop="\n\n")
    print(f"after, with {file}: {answer!r}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
