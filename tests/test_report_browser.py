"""The report in a real browser: Debian's Chromium, without a window. Skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from powermc.errors import ChainError
from powermc.report import write
from tests import browser
from tests.browser import Page
from tests.runs import HOSTILE, ODD, made_up

pytestmark = pytest.mark.skipif(browser.COMMAND is None, reason=browser.MISSING)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    try:
        with browser.chromium() as page:
            page.size(1280, 900)
            yield page
    except browser.NotStarted as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("report") / "run.html"
    write(made_up(prompts=2, steps=40), file)
    return file


@pytest.fixture(scope="module")
def run():
    return made_up(prompts=2, steps=40)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Every piece of the vocabulary tries something; so does the prompt."""
    file = tmp_path_factory.mktemp("hostile") / "run.html"
    run = made_up(pieces=(*HOSTILE, *HOSTILE, ""), chains=2, steps=30)
    object.__setattr__(run.prompts[0], "text", "".join(HOSTILE))
    object.__setattr__(run, "model", "<script>alert(1)</script>")
    write(run, file)
    return file


def step_name(page: Page) -> str:
    return page.text("#step-name")


def scroll_through(page: Page) -> None:
    """Every chart is drawn when it comes into view, which takes frames."""
    page.run("document.documentElement.style.scrollBehavior = 'auto'")
    for chart in page.run("[...document.querySelectorAll('[data-chart]')].map((e) => e.dataset.chart)"):
        element = f"document.querySelector('[data-chart={chart}]')"
        page.run(f"{element}.scrollIntoView()")
        page.wait(
            f"new Promise((done) => requestAnimationFrame(() => done({element}.closest('figure').hidden"
            f" || {element}.querySelector('.main-svg') !== null)))"
        )


def test_nothing_is_loaded_and_nothing_complains(page, report):
    page.open(report)
    scroll_through(page)
    assert page.requests == [report.as_uri()]
    assert page.complaints == []
    assert page.run("document.querySelectorAll('[data-chart] .main-svg').length") >= 6


def test_the_policy_lets_nothing_be_loaded_and_nothing_else_run(page, report):
    """What a script in the page could try: it is told so in the console, and nothing leaves."""
    page.open(report)
    page.run(
        """{ const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s) }"""
    )
    page.run("""{ const i = new Image(); i.src = 'http://localhost:9/x.png'; document.body.append(i) }""")
    assert page.run("fetch('http://localhost:9/').then(() => 'got', () => 'refused')") == "refused"
    assert page.run("window.ran === undefined")
    assert len(page.complaints) >= 3
    assert all("Content Security Policy" in text for text in page.complaints)


def test_the_first_view(page, report, run):
    page.open(report)
    assert page.text("h1") == "made-up"
    assert page.text("#prompt-text") == "Prompt 0: how much does she earn?"
    shown = page.run("[...document.querySelectorAll('.answer-text')].map((e) => e.textContent)")
    assert sorted(shown) == sorted(chain.text for chain in run.chains[0])
    first = next(i for i in range(40) if run.infos[0]["changed"][0, i])
    assert step_name(page) == f"step {first + 1} of 40, block 1"
    assert page.text("#verdict .verdict") == "Accepted"


def test_every_step_shows_the_paths_of_the_run(page, report, run):
    """Step by step through a chain by keyboard: kept tokens and the tail that stays are the path after the step."""
    page.open(report, "#prompt=1&chain=2&step=1")
    chain, info = run.chains[1][2], run.infos[1]
    pieces = "(s) => [...document.querySelectorAll(s)].map((e) => e.textContent).join('')"
    for step in range(40):
        assert step_name(page).startswith(f"step {step + 1} of 40")
        path = chain.history[step]
        shown = page.run(f"({pieces})('.kept .token, .tail.wins .token, .tail.same .token')")
        assert shown == "".join(run.pieces[t] for t in path.tokens)
        dropped = page.run(f"({pieces})('.tail.loses .token')")
        drawn = run.proposals[1][2][step]
        if not info["accepted"][2, step] and drawn is not None:
            assert dropped == "".join(run.pieces[t] for t in drawn)
        word = page.text("#verdict .verdict")
        assert (word == "Accepted") == bool(info["changed"][2, step])
        assert (word == "Abandoned") == bool(info["abandoned"][2, step])
        facts = page.run("[...document.querySelectorAll('#facts dt')].map((e) => e.textContent)")
        assert ("stage 2: log ratio" in facts) == bool(info["stage1_accepted"][2, step])
        second = info["log_target"][2, step] - info["log_surrogate"][2, step]
        screened = info["component"][2, step] == 0 and not info["null"][2, step] and not info["same"][2, step]
        first = screened and info["log_ratio"][2, step] != second
        assert any(fact.startswith("stage 1: log ratio") for fact in facts) == bool(first)
        page.press("ArrowRight")
    assert step_name(page).startswith("step 40")  # the last step is the end
    assert page.complaints == []


def test_charts_follow_the_prompt(page, tmp_path):
    """A chart that one prompt has nothing for is back with the next, and shows that one's chains."""
    run = made_up(prompts=2, chains=2, steps=40)
    lonely = replace(run.chains[0][1], error=ChainError("logits are NaN"))
    write(replace(run, chains=((run.chains[0][0], lonely), run.chains[1])), tmp_path / "run.html")
    page.open(tmp_path / "run.html")
    ranks = "document.querySelector('[data-chart=ranks]')"
    assert page.run(f"{ranks}.closest('figure').hidden")  # of one chain there are none
    page.press("n")
    assert not page.run(f"{ranks}.closest('figure').hidden")
    scroll_through(page)
    trace = "document.querySelector('[data-chart=trace]')"
    shown = f"{trace}.data.find((line) => line.meta === 0).y"
    assert page.run(shown) == pytest.approx(run.infos[1]["log_p"][0], abs=1e-3)
    page.run(f"{trace}.scrollIntoView()")
    page.press("p")
    page.wait(f"Math.abs({shown}[0] - {run.infos[0]['log_p'][0, 0]}) < 1e-3")
    assert page.complaints == []


def test_keys(page, report, run):
    page.open(report, "#prompt=0&chain=0&step=1")
    moves = [i + 1 for i in range(40) if run.infos[0]["changed"][0, i]]
    page.press("ArrowRight", shift=True)
    assert step_name(page).startswith(f"step {min(m for m in moves if m > 1)} of")
    page.press("ArrowLeft")
    page.press("j")
    assert page.run("document.getElementById('chain-menu').value") == "1"
    page.press("k")
    page.press("n")
    assert page.text("#prompt-text").startswith("Prompt 1")
    page.press("p")
    for mode in ("changes", "none", "log p"):
        page.press("c")
        assert page.run("document.querySelector('input[name=mode]:checked').value") == mode
    page.press(".")
    assert page.text("#readout").startswith("token 1 ")
    page.press(".")
    assert page.text("#readout").startswith("token 2 ")
    page.press(",")
    assert page.text(".token.picked") == page.run("document.querySelector('#texts .token').textContent")
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    page.press("d")
    assert page.run("getComputedStyle(document.body).backgroundColor") != dark
    page.press("?")
    assert page.run("document.getElementById('help').open")
    page.press("Escape")
    assert not page.run("document.getElementById('help').open")
    page.press("?")
    page.press("Enter")  # the focus is on Close
    assert not page.run("document.getElementById('help').open")
    assert (
        page.run("location.hash")
        == f"#prompt=0&chain=0&step={page.run('Number(document.getElementById(`step`).value)') + 1}"
    )
    assert page.complaints == []


def test_many_answers_are_not_all_shown_at_once(page, tmp_path):
    write(made_up(chains=9, steps=10), tmp_path / "run.html")
    page.open(tmp_path / "run.html")
    answers = "document.querySelectorAll('.answer').length"
    assert (page.run(answers), page.text("#more-answers")) == (6, "Show 3 more")
    page.run("document.getElementById('more-answers').focus()")
    page.press("Enter")
    assert page.run(answers) == 9
    page.press("Enter")  # the focus is on the first of the new ones, and opens its chain
    assert page.run("document.activeElement.id") == "step"
    shown = page.run("document.querySelectorAll('.chain-link')[6].textContent")
    assert page.run("document.getElementById('chain-menu').value") == shown


def test_menus_keep_their_own_arrow_keys(page, report):
    page.open(report, "#prompt=0&chain=0&step=3")
    page.run("document.getElementById('chain-menu').focus()")
    page.press("ArrowRight")
    assert step_name(page).startswith("step 3 ")


def test_everything_can_be_reached_and_has_a_name(page, report):
    """Tab goes through every control, each with a visible focus and a name for screen readers."""
    page.open(report)
    controls = page.run(
        "[...document.querySelectorAll('button, select, input, a, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility() && !e.disabled).length"
    )
    page.run("document.body.focus()")
    seen = set()
    for _ in range(controls + 2):
        page.press("Tab")
        seen.add(
            page.run(
                "(() => { const e = document.activeElement; const own = getComputedStyle(e);"
                " const shown = own.outlineStyle !== 'none' || e.type === 'radio' || e.type === 'range';"
                " const name = e.ariaLabel || e.labels?.[0]?.textContent || e.textContent || e.title;"
                " return JSON.stringify([e.tagName, e.id, name.trim().length > 0, shown]) })()"
            )
        )
    tags = [json.loads(entry) for entry in seen]
    assert {"play", "next", "step", "chain-menu", "prompt-menu", "theme", "help-button"} <= {tag[1] for tag in tags}
    assert all(named and visible for tag, _, named, visible in tags if tag != "BODY")


def test_hostile_text_is_shown_and_never_run(page, hostile):
    page.open(hostile)
    for _ in range(30):
        page.press("ArrowRight")
    page.press(".")
    assert page.complaints == []
    assert page.requests == [hostile.as_uri()]
    assert page.text("h1") == "<script>alert(1)</script>"
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    prompt = page.text("#prompt-text")
    assert "<script>alert(1)</script></script><img src=x onerror=alert(1)><!--{{7*7}}&lt;b&gt;" in prompt
    text = page.run("document.body.innerText")
    assert r"\u202egnp.exe" in text
    assert not set("\u202e\u2028\x1b\x00") & set(text)
    assert "\\ud800" in prompt


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_can_be_looked_at(page, tmp_path, name):
    """Chains without steps, text, or paths; stepping through them, and everything drawn that there is."""
    write(ODD[name](), tmp_path / "run.html")
    page.open(tmp_path / "run.html")
    for key in ("ArrowLeft", "ArrowRight", "ArrowRight", ".", "j", "ArrowRight", "n", "k", "c"):
        page.press(key)
    if name in ("no steps", "interrupted", "a failed chain"):  # which may leave a chart empty; plotly takes a while
        scroll_through(page)
    assert page.complaints == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_can_be_read(page, report, width, dark):
    """Nothing is wider than the window, and text stands out from its ground: WCAG AA, 4.5 to 1."""
    page.size(width, 900, dark=dark, mobile=width < 500)
    try:
        page.open(report)
        if not dark:
            scroll_through(page)
        assert page.run("document.documentElement.scrollWidth") <= width
        for _ in range(3):  # however tokens are coloured
            assert page.run(CONTRAST) == []
            page.press("c")
    finally:
        page.size(1280, 900)


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = (colour, ground) => {
    canvas.fillStyle = ground; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return `rgb(${r}, ${g}, ${b})`;
  };
  const light = (rgb) => rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => over(getComputedStyle(e).backgroundColor, e.parentElement ? ground(e.parentElement) : 'white');
  const bad = [];
  for (const e of document.querySelectorAll('body *:not(script):not(svg *):not(option)')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.matches('.hidden, .skip')) continue;
    const below = ground(e);
    const [a, b] = [light(over(getComputedStyle(e).color, below)), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
  }
  return bad.slice(0, 5);
})()"""


def test_a_large_run_opens_soon(page, tmp_path, capsys):
    """16 chains of 500 steps of 128 to 256 tokens: how long it took is printed and not asserted, as machines differ."""
    file = tmp_path / "large.html"
    write(made_up(chains=16, steps=500, blocks=2, horizon=256), file)
    page.open(file)
    times = page.run(
        "(() => { const [n] = performance.getEntriesByType('navigation');"
        " const [r] = performance.getEntriesByName('powermc-ready'); return [r.startTime, n.loadEventEnd] })()"
    )
    assert page.text("#step-name").endswith("of 500, block 1")
    with capsys.disabled():
        size = file.stat().st_size / 1e6
        print(f"\n{size:.1f} MB, 8,000 steps: ready after {times[0]:.0f} ms, loaded after {times[1]:.0f} ms")
