"""Serve requests that come and go: each is admitted while others run, and one is cancelled.

    python examples/serving_rows.py
    python examples/serving_rows.py runs/mine --capacity 2

The loop is what a server needs: `admit` when a request arrives, `evict` when its client has gone,
and `step` for the next token of every row.
"""

import argparse

from receptance import Request, Sampling, Slots, load_engine

# When each request arrives, in steps, with its client, its prompt and its options.
ARRIVALS = [
    (0, "Ann", "def main(", Request(sampling=Sampling(temperature=0), max_tokens=30)),
    (0, "Bob", "class Queue:", Request(seed=1, max_tokens=100, ignore_end_of_text=True)),
    (5, "Cid", "import os", Request(sampling=Sampling(top_p=0.7), max_tokens=20, stop="\n\n")),
    (8, "Dot", "for ", Request(sampling=Sampling(top_k=20, temperature=0.8), max_tokens=12)),
]
BOB_GOES = 12


def main() -> None:
    """Say what happens at which step, then compare the texts with those of solo runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-python", help="a model's name or path")
    parser.add_argument("--capacity", type=int, default=3, help="rows that run at the same time")
    options = parser.parse_args()
    engine, tokenizer = load_engine(options.model)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {options.model}")

    slots = Slots(engine, tokenizer, options.capacity, deterministic=True)
    clients, texts = {}, {client: "" for _, client, _, _ in ARRIVALS}
    step, coming = 0, list(ARRIVALS)
    while coming or slots.active or slots.waiting:
        while coming and coming[0][0] == step:
            _, client, prompt, request = coming.pop(0)
            clients[slots.admit(prompt, request)] = client
            waits = len(slots.waiting) > slots.free
            print(f"step {step}: {client} arrives{' and waits for a slot' if waits else ''}")
        if step == BOB_GOES:
            slots.evict(next(row for row, client in clients.items() if client == "Bob"))
            print(f"step {step}: Bob goes; he has got {texts['Bob']!r}")
        for token in slots.step():
            client = clients[token.row]
            texts[client] += token.text
            if token.finish_reason:
                print(f"step {step}: {client} is done ({token.finish_reason}): {texts[client]!r}")
        step += 1

    for _, client, prompt, request in ARRIVALS:
        alone, text = Slots(engine, tokenizer, 1, deterministic=True), ""
        alone.admit(prompt, request)
        while alone.active or alone.waiting:
            text += "".join(token.text for token in alone.step())
        if text != texts[client] and not (client == "Bob" and text.startswith(texts["Bob"])):
            raise SystemExit(f"the text for {client} differs from that of a solo run")
    print("every text is that of a solo run, and Bob's is the beginning of one")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
