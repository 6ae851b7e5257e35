"""The page as a file: what it holds, and what it never loads."""

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from planted import planted
from tiny import make_model

from receptance.analysis import attention, attribution, causal_trace
from receptance.analysis.page import analyze, token_text
from receptance.evaluation.results import Result
from receptance.tokenizer import ByteTokenizer

TEXT = "a </script><b>狐\n\tend"


@pytest.fixture(scope="module")
def model():
    return make_model(layers=3).requires_grad_(False)


@pytest.fixture(scope="module")
def found(model):
    return analyze(model, ByteTokenizer(), TEXT, name="<tiny> & co")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_it_loads_nothing(found):
    page = found.html()
    assert "default-src 'none'" in page and "DATA" not in page and "TITLE" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)\w*:?//""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    assert page.count("</script>") == 2, "a token of the text ends the script"
    assert page.count("<h1>&lt;tiny&gt; &amp; co</h1>") == 1


def test_its_numbers_are_those_of_the_library(model, found):
    data = data_of(found.html())
    tokens = torch.tensor(ByteTokenizer().encode(TEXT))
    time = len(tokens)
    assert "".join(t["text"] for t in data["tokens"]) == TEXT.replace("狐", "<e7><8b><90>")
    logits = model(tokens[None])[0].log_softmax(-1)[0]
    losses = -logits[:-1].gather(1, tokens[1:, None])[:, 0]
    assert [t["loss"] for t in data["tokens"][1:]] == pytest.approx(losses.tolist(), abs=1e-4)
    assert data["tokens"][0]["loss"] is None
    read = attention(model, tokens[None])
    for layer, text in enumerate(data["reads"]):
        codes = base64.b64decode(text)
        assert len(codes) == time * (time + 1) // 2
        triangle = torch.tril_indices(time, time)
        shares = torch.tensor([(c / 255) ** 2 for c in codes])
        wanted = read.shares(layer)[0, :, 1:][triangle[0], triangle[1]]
        torch.testing.assert_close(shares, wanted, atol=0.005, rtol=0)
    effects = torch.tensor(data["effects"])
    torch.testing.assert_close(effects, attribution(model, tokens), atol=1e-3, rtol=0)
    last = [data["words"][str(i)] for i in data["lens"][3][4]["ids"]]
    assert last == [token_text(ByteTokenizer(), int(i)) for i in logits[4].topk(3).indices]
    assert len(data["rows"]) == 3 and len(data["rows"][0]) == len(data["columns"])


def test_saving_and_results(found, tmp_path):
    path = tmp_path / "page.html"
    found.save(path)
    found.save(path)
    assert path.read_text("utf-8") == found.html()
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    with pytest.raises(ValueError, match="what is there is not such a page; choose another"):
        found.save(tmp_path / "notes.html")
    found.result().save(tmp_path / "r.json")
    result = Result.load(tmp_path / "r.json")
    assert {f.name for f in result.figures} >= {"median half-life", "zeros in channel mixing"}
    assert result.curves[0].y == found.losses
    assert found._repr_html_().startswith("<iframe srcdoc=")


def test_without_effects_and_with_mistakes(model):
    steps = []
    found = analyze(model, ByteTokenizer(), "abc", effects=False, note=steps.append)
    assert found.effects is None and sum(steps) == 3
    assert data_of(found.html())["effects"] is None
    with pytest.raises(ValueError, match="the text has 1 tokens; wanted at least 2"):
        analyze(model, ByteTokenizer(), "a")
    with pytest.raises(
        ValueError, match=r"has 5 tokens, and a page shows at most 4; .* max_tokens"
    ):
        analyze(model, ByteTokenizer(), "abcde", max_tokens=4)
    with pytest.raises(ValueError, match="token id 255 is out of range"):
        analyze(make_model(100), ByteTokenizer(), "\xff\xff".encode("latin-1"))


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(found, tmp_path_factory) -> Path:
    trace = causal_trace(
        planted(),
        torch.tensor([3, 20, 21, 22, 23]),
        [0],
        38,
        generator=torch.Generator().manual_seed(0),
        samples=2,
        texts=["s", "f", "g", "h", "?"],
    )
    path = tmp_path_factory.mktemp("page") / "page.html"
    dataclasses.replace(found, trace=trace, answer="x").save(path)
    return path


@pytest.fixture
def opened(browser, file, request):
    """The page in a window of some size and color scheme, and what went wrong in it."""
    size, scheme, touch = getattr(request, "param", ((1280, 900), "light", False))
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
        has_touch=touch,
        offline=True,
    )
    page = context.new_page()
    page.set_default_timeout(500_000)
    problems, loaded = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert problems == [] and loaded == [file.as_uri()]
    context.close()


WINDOWS = [((1280, 900), "light", False), ((390, 844), "dark", True), ((320, 600), "light", True)]


@pytest.mark.slow
@pytest.mark.parametrize("opened", WINDOWS, indirect=True)
def test_it_fits_every_window(opened):
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.locator("#tokens span").count() == len(TEXT.encode())
    assert opened.locator("#maps canvas").count() == 3
    assert opened.locator("#decays polyline").count() == 3
    assert opened.locator("#cells tr").count() == 6
    ground, ink = opened.evaluate(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    )
    bright = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ground, ink)]
    assert abs(bright[0] - bright[1]) > 400  # readable in both schemes


@pytest.mark.slow
def test_pointing_shows_what_a_token_reads_from(opened, found):
    tokens = opened.locator("#tokens span")
    assert opened.locator("#about").inner_text() == ""
    opened.locator("#view").select_option("1")
    tokens.nth(6).hover()
    about = opened.locator("#about").inner_text()
    assert "What layer 2 reads from here" in about and f"loss {found.losses[5]:.2f}" in about
    strongest = int(found.shares[1][6].argmax())
    shown = opened.locator("#about tr").first.inner_text()
    assert ("itself" if strongest == 6 else f"{6 - strongest} back") in shown
    dark = opened.evaluate(
        "[...document.querySelectorAll('#tokens span')].map(x => "
        "+(x.style.background.match(/[\\d.]+(?=\\))/) || [0])[0])"
    )
    assert dark.index(max(dark)) == strongest and not any(dark[7:])
    opened.mouse.move(2, 2)
    assert opened.locator("#about").inner_text() == ""


@pytest.mark.slow
def test_keys_move_pin_and_release(opened):
    tokens = opened.locator("#tokens span")
    tokens.first.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert "Token 2," in opened.locator("#about").inner_text()
    opened.keyboard.press("Enter")
    opened.keyboard.press("Tab")
    assert "Token 2," in opened.locator("#about").inner_text()
    opened.keyboard.press("Escape")
    assert opened.locator("#about").inner_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("opened", WINDOWS[1:2], indirect=True)
def test_a_tap_pins_and_another_releases(opened):
    token = opened.locator("#tokens span").nth(4)
    token.tap()
    assert "Token 4," in opened.locator("#about").inner_text()
    token.tap()
    assert opened.locator("#about").inner_text() == ""


@pytest.mark.slow
def test_a_map_chooses_its_layer(opened):
    opened.locator("#maps button").nth(2).click()
    assert opened.locator("#view").input_value() == "2"
    assert opened.locator("#maps button[aria-pressed=true]").inner_text().strip() == "layer 3"
    opened.locator("#place").select_option("wkv")
    painted = opened.evaluate(
        "[...document.querySelectorAll('.cell')].filter(x => !/, ?0(\\.0+)?\\)/.test("
        "x.style.background)).length"
    )
    assert painted >= 4  # the planted fact, from the subject to the last filler
