"""The scheduler: cached = cold, alone = among neighbors, and nobody is left behind."""

import random

import pytest
import torch
from server_cases import BYTES, NAMESPACE, Answer, ids, make_engine, make_scheduler, run

from receptance.inference.generation import Generation
from receptance.inference.rows import Request
from receptance.inference.sampling import Sampling
from receptance.server.jobs import Job, Ticket
from receptance.server.queue import FairQueue

KINDS = pytest.mark.parametrize("kind", ["torch", "native"])
TEXT = "System: be brief.\n\nUser: what is a fox? " * 3
DRAWN = Request(max_tokens=9, seed=5, likeliest=3)


def job(text: str, *requests: Request, namespace: str | None = NAMESPACE, **options) -> Job:
    return Job(prompt=ids(text), requests=requests, namespace=namespace, **options)


def cold(kind: str, one: Job) -> list[list[tuple]]:
    """What a job gives alone, with an empty cache."""
    [answer] = run(make_scheduler(kind), [one])
    return [answer.bits(i) for i in range(len(one.requests))]


@KINDS
def test_an_answer_is_that_of_generation(kind):
    request = Request(max_tokens=20, sampling=Sampling(top_p=0.8), seed=3, stop=("q",))
    [answer] = run(make_scheduler("native" if kind == "native" else kind), [job(TEXT, request)])
    options = {"sampling": request.sampling, "max_tokens": 20, "seed": 3, "stop": "q"}
    wanted = list(Generation(make_engine(kind), BYTES, [TEXT], **options))
    assert [t.text for t in answer.tokens[0]] == [t.text for t in wanted]
    assert answer.tokens[0][-1].finish_reason == wanted[-1].finish_reason


@KINDS
def test_cached_equals_cold_and_alone_equals_crowded(kind):
    """Random conversations, several times, with cancelled neighbors; every bit is compared."""
    draw = random.Random(4)
    scheduler = make_scheduler(kind, slots=3)
    texts = [TEXT[: draw.randrange(1, len(TEXT))] for _ in range(6)]
    texts += [text + "another turn" * draw.randrange(3) for text in texts]
    jobs = []
    for number, text in enumerate(texts):
        marks = sorted(draw.sample(range(len(text) + 1), min(2, len(text))))
        options = Sampling(temperature=draw.choice([0, 1.0]), top_p=draw.choice([1.0, 0.7]))
        request = Request(max_tokens=draw.randrange(1, 12), seed=number, sampling=options)
        jobs.append(job(text, request, marks=marks))
    wanted = [cold(kind, one) for one in jobs]
    for _ in range(2):
        order = draw.sample(range(len(jobs)), len(jobs))
        noise = [Ticket(job("noise " * n, Request(max_tokens=50))) for n in (1, 9)]
        for ticket in noise:
            scheduler.submit(ticket)
            scheduler.step()
        scheduler.cancel(noise[0])
        answers = run(scheduler, [jobs[i] for i in order])
        assert [[a.bits()] for a in answers] == [wanted[i] for i in order]
    assert scheduler.cache.outcomes["hit"] > len(jobs)


@KINDS
def test_the_second_turn_reads_the_new_tokens_only(kind):
    scheduler = make_scheduler(kind, deterministic=False)
    request = Request(max_tokens=6, sampling=Sampling(temperature=0), ignore_end_of_text=True)
    tokens = ids(TEXT)
    for _ in range(3):
        [answer] = run(scheduler, [Job(prompt=tokens, requests=(request,), namespace=NAMESPACE)])
        tokens += [t.id for t in answer.tokens[0]]
        known = len(tokens) - 1  # the last token was written and not read
        tokens += ids(" More?")
        assert scheduler.cache.find(NAMESPACE, tokens, len(tokens) - 1).length == known


def test_continuations_of_one_prompt_equal_jobs_of_their_own():
    requests = tuple(Request(max_tokens=7, seed=n) for n in range(5))
    for kind in ("torch", "native"):
        [together] = run(make_scheduler(kind, slots=2), [job(TEXT, *requests)])
        for index, request in enumerate(requests):
            assert [together.bits(index)] == cold(kind, job(TEXT, request))
        assert sum(end.whole for end in together.ends) == 1


@KINDS
@pytest.mark.parametrize("text", ["a", "ab", TEXT])
def test_scores_are_those_of_the_model(kind, text):
    [answer] = run(make_scheduler(kind), [job(text, DRAWN, look="scores", likeliest=4)])
    logits, _ = make_engine(kind)(torch.tensor([ids(text)]))
    scores = logits[0, :-1].log_softmax(-1)
    wanted = scores.gather(1, torch.tensor(ids(text)[1:])[:, None])[:, 0]
    assert answer.looked is not None
    found = torch.tensor([score.log_probability for score in answer.looked.scores])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    best = scores.argmax(-1).tolist()
    assert [score.likeliest[0][0] for score in answer.looked.scores] == best
    assert all(len(score.likeliest) == 4 for score in answer.looked.scores)
    # What follows equals what follows without a look.
    assert [answer.bits()] == cold(kind, job(text, DRAWN))


@KINDS
@pytest.mark.parametrize("look", ["mean", "last"])
def test_features_are_those_of_all_positions_or_the_last(kind, look):
    [answer] = run(make_scheduler(kind), [job(TEXT, look=look)])
    features, _ = make_engine(kind).features(torch.tensor([ids(TEXT)]))
    assert answer.looked is not None and answer.looked.features is not None
    wanted = features[0].mean(0) if look == "mean" else features[0, -1]
    torch.testing.assert_close(answer.looked.features, wanted, rtol=1e-4, atol=1e-5)
    assert answer.ends[0].whole


def test_a_state_is_kept_and_continued():
    request = Request(max_tokens=5, sampling=Sampling(temperature=0))
    [first] = run(make_scheduler("native"), [job(TEXT, request, keep=True)])
    state = first.ends[0].state
    assert state is not None
    read = ids(TEXT) + [t.id for t in first.tokens[0]]
    assert state.tokens.tolist() == [len(read)]
    begun = job(" and then", request, state=state, namespace="b" * 64)
    [second] = run(make_scheduler("native"), [begun])
    whole = Job(prompt=[*read, *ids(" and then")], requests=(request,))
    [wanted] = run(make_scheduler("native"), [whole])
    assert second.bits() == wanted.bits()


@pytest.mark.parametrize("steps", range(8))
def test_a_cancelled_job_frees_its_place_at_once(steps):
    scheduler = make_scheduler("native", slots=2)
    request = Request(max_tokens=100, ignore_end_of_text=True)
    jobs = [job(TEXT, request), job(TEXT[1:], look="scores"), job(TEXT[2:], request, request)]
    tickets = [Ticket(one) for one in jobs]
    for ticket in tickets:
        scheduler.submit(ticket)
    for _ in range(steps):
        scheduler.step()
    for ticket in tickets:
        scheduler.cancel(ticket)
        scheduler.cancel(ticket)
    assert (scheduler.active, scheduler.waiting, scheduler.rows) == (0, 0, 0)
    assert scheduler.slots.free == 2 and scheduler.step() == []
    [answer] = run(scheduler, [job(TEXT, DRAWN)])
    assert [answer.bits()] == cold("native", job(TEXT, DRAWN))


def test_other_namespaces_share_nothing():
    scheduler = make_scheduler("native")
    run(scheduler, [job(TEXT, DRAWN)])
    [other] = run(scheduler, [job(TEXT, DRAWN, namespace="c" * 64)])
    [none] = run(scheduler, [job(TEXT, DRAWN, namespace=None)])
    [same] = run(scheduler, [job(TEXT, DRAWN)])
    assert (other.cached, none.cached, same.cached) == (0, 0, len(ids(TEXT)) - 1)


def test_states_at_intervals_serve_texts_that_part_anywhere():
    scheduler = make_scheduler("native", interval=16)
    run(scheduler, [job(TEXT, DRAWN)])
    [other] = run(scheduler, [job(TEXT[:70] + "!?", DRAWN)])
    assert other.cached == 64


def test_the_third_text_finds_the_state_where_the_second_parted():
    scheduler = make_scheduler("native", interval=0)
    lengths = []
    for end in ("one", "two", "three"):
        [answer] = run(scheduler, [job(TEXT[:60] + end, DRAWN)])
        lengths.append(answer.cached)
    assert lengths == [0, 0, 60]


def test_an_engine_that_fails_ends_what_has_begun_and_nothing_else(monkeypatch):
    scheduler = make_scheduler("torch", slots=1)
    begun, waiting = Ticket(job(TEXT, DRAWN)), Ticket(job("later", DRAWN))
    scheduler.submit(begun)
    scheduler.submit(waiting)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.slots, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scheduler.step()
        patch.setattr(scheduler.slots, "step", lambda: torch.empty(1 << 60))
        [failed] = scheduler.step()
    assert failed.ticket is begun
    answers = {waiting: Answer()}
    while scheduler.active or scheduler.waiting:
        for event in scheduler.step():
            answers[event.ticket].add(event)
    assert [answers[waiting].bits()] == cold("torch", job("later", DRAWN))


def test_a_state_of_another_shape_fails_its_own_job():
    other = make_scheduler("torch")
    [read] = run(other, [job("x", keep=True)])
    state = read.ends[0].state
    assert state is not None
    wrong = type(state)({n: x[:1] for n, x in state.tensors.items()}, state.tokens)
    answers = run(other, [job("a", DRAWN, state=wrong), job("a", DRAWN)])
    assert "one of this model holds" in answers[0].failed
    assert [answers[1].bits()] == cold("torch", job("a", DRAWN))


def test_prompts_are_checked():
    with pytest.raises(ValueError, match="without tokens"):
        make_scheduler().check(Job(prompt=[]))
    with pytest.raises(ValueError):
        make_scheduler().check(Job(prompt=[256]))


def test_clients_take_turns_by_what_their_jobs_cost():
    queue: FairQueue[str] = FairQueue()
    for n in range(4):
        queue.push(f"a{n}", "a", 10)
    queue.push("b0", "b", 10)
    queue.push("c0", "c", 100)
    queue.push("c1", "c", 1)
    assert queue.remove("a1") and not queue.remove("a1") and len(queue) == 6
    assert [queue.pop() for _ in range(6)] == ["a0", "b0", "c0", "a2", "a3", "c1"]
    assert not len(queue)
