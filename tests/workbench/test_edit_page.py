"""The editor's page in headless Chromium, on the real server with a tiny checkpoint: first use, every tool, faults."""

import json
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from looks import SIZES, flaws, window
from made import AXIAL, grid, marked, write_series
from tiny import ROOT

from ldm.data.images import read_image

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")

READY = "window.medsoft && medsoft.placing.facts && medsoft.sentence.tokens && !medsoft.drawing.job"
COUNT = "medsoft.app.mask.count"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "our drawings"


@pytest.fixture(scope="module")
def server(world: Path, final: Path, output_dir: Path) -> Iterator[str]:
    """The address of `medsoft edit WORLD`, which finds checkpoint and sentences itself."""
    flags = ("--ckpt", final, "--output_dir", output_dir, "--device", "cpu", "sampling.steps=2")
    with children.serving("/api/state", ROOT / "tool" / "edit.py", world, *flags) as address:
        yield address


@pytest.fixture(scope="module")
def browser(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("downloads")) as made:
        made.open(server)
        made.wait(READY)
        yield made
        made.run("1")
        assert made.errors == []
        assert all(each.startswith((server, "data:")) for each in made.requests), made.requests


def place(browser: Browser, x: float, y: float) -> tuple[float, float]:
    """Where in the window a place of the image (in pixels) is shown."""
    at = f"medsoft.viewer.toCanvas({x}, {y})"
    found = browser.run(f"((r, p) => [r.left + p.x, r.top + p.y])(medsoft.viewer.canvas.getBoundingClientRect(), {at})")
    return found[0], found[1]


def painted(browser: Browser) -> np.ndarray:
    """The mask as the page has it."""
    width, height = browser.run("[medsoft.app.document.width, medsoft.app.document.height]")
    return np.array(browser.run("Array.from(medsoft.app.mask.pixels)"), np.uint8).reshape(height, width)


def click(browser: Browser, name: str) -> None:
    browser.run(f"document.getElementById('{name}').click()")


def press_act(browser: Browser, label: str) -> None:
    """Press the orange button once it has this label and is no longer deaf."""
    act = "document.getElementById('act')"
    browser.wait(f"{act}.textContent === '{label}' && !{act}.disabled")
    click(browser, "act")


# Presses every place where a button stood while it was drawn, and Enter and A, as soon as the result appears.
HASTE = """new Promise((done) => {
  const places = new Set(), all = () => [...document.querySelectorAll('#step button:not([hidden])')];
  const look = setInterval(() => {
    const boxes = medsoft.drawing.job ? all().map((each) => each.getBoundingClientRect()) : [];
    for (const { x, y, width, height } of boxes) places.add([x + width / 2, y + height / 2].join());
    if (!medsoft.app.shown) return;
    clearInterval(look);
    const hit = [...places].map((each) => document.elementFromPoint(...each.split(',')));
    for (const each of hit) each.click();
    for (const key of ['Enter', 'a']) dispatchEvent(new KeyboardEvent('keydown', { key }));
    done(hit.map((each) => each.id));
  }, 1);
})"""


def test_first_use(browser: Browser, output_dir: Path) -> None:
    """One button, pressed twice, leads to an accepted lesion; a stroke of the brush is in its mask."""
    suggested = painted(browser)
    assert 0 < np.count_nonzero(suggested) < suggested.size / 4
    assert browser.run("document.getElementById('prompt').value === medsoft.sentence.found.prompts[0]")
    y, x = (int(each.mean()) for each in np.nonzero(suggested))
    browser.drag(place(browser, x, y), place(browser, x + 8, y), place(browser, x + 8, y + 6))
    browser.wait("medsoft.app.mask.done.length === 2 && !medsoft.app.mask.stroke")
    mask = painted(browser)
    assert mask[y, x + 4] == mask[y + 6, x + 8] == 255
    assert np.all(mask[suggested == 255] == 255)
    browser.wait("medsoft.placing.facts.pixels === medsoft.app.mask.count && medsoft.app.soft.includes(255)")

    press_act(browser, "Draw")
    assert "act" in browser.run(HASTE)  # where Cancel stood is no button now
    browser.wait("!document.getElementById('act').disabled")
    assert browser.run("medsoft.app.shown.state") == "new"
    assert browser.run("[medsoft.viewer.mode, document.getElementById('act').textContent]") == ["slider", "Accept"]
    at = browser.run("medsoft.viewer.position * medsoft.viewer.width")
    columns = np.flatnonzero(mask.any(axis=0))
    assert at == pytest.approx((columns[0] + columns[-1] + 1) / 2)  # the middle of the lesion
    browser.drag(place(browser, at, 20), place(browser, 30, 20), place(browser, 40, 20))
    assert browser.run("medsoft.viewer.position * medsoft.viewer.width") == pytest.approx(40, abs=1)
    browser.press(" ")
    assert browser.run("[medsoft.viewer.mode, medsoft.viewer.position]") == ["flicker", 1]
    browser.press("4")
    assert browser.run("medsoft.viewer.mode") == "difference"
    shown = np.array(browser.run("Array.from(medsoft.results.loaded.levels)"), np.uint8).reshape(mask.shape)
    press_act(browser, "Accept")
    browser.wait("medsoft.app.shown.state === 'accepted'")
    click(browser, "second")
    assert browser.run("document.getElementById('second').textContent") == "Undo"
    browser.wait("!document.getElementById('second').disabled")
    click(browser, "second")
    browser.wait("medsoft.app.shown.state === 'new'")
    assert not list((output_dir / "accepted").iterdir())
    press_act(browser, "Accept")
    browser.wait("medsoft.app.shown.state === 'accepted'")

    (folder,) = (output_dir / "accepted").iterdir()
    again = ["medsoft", "draw", "--replay", f"{folder}/meta.json", "--output_dir", "again"]
    assert shlex.split(browser.run("document.getElementById('replay').textContent")) == again
    meta = json.loads((folder / "meta.json").read_text())
    image, soft = read_image(folder / "image.png"), read_image(folder / "soft_mask.png")
    parent = np.array(browser.run("Array.from(medsoft.app.levels)"), np.uint8).reshape(mask.shape)
    assert np.array_equal(image, shown)
    assert np.array_equal(read_image(folder / "mask.png"), mask)
    assert np.array_equal(image[soft == 0], parent[soft == 0])
    assert not np.array_equal(image, parent)
    assert meta["synthetic"] is True


def test_every_tool_can_be_undone(browser: Browser) -> None:
    browser.press("Escape")
    browser.press("Delete")
    assert browser.run(COUNT) == 0
    assert browser.run("document.getElementById('hint').textContent").startswith("Paint")
    browser.press("x")
    browser.drag(place(browser, 20.2, 30.1), place(browser, 25, 35), place(browser, 39.9, 42.2))
    mask = painted(browser)
    assert mask[30:42, 20:40].all()
    assert np.count_nonzero(mask) == 12 * 20
    browser.press("g")
    for x, y in ((60, 30), (80, 30), (80, 40), (70, 40), (70, 50), (60, 50), (60, 30)):
        browser.drag(place(browser, x, y))
    assert browser.run(COUNT) == 240 + 300
    browser.press("e")
    browser.run("medsoft.tools.diameter = 4")
    browser.drag(place(browser, 20, 36), place(browser, 40, 36))
    assert browser.run(COUNT) == 540 - 4 * 20
    browser.run("dispatchEvent(new KeyboardEvent('keydown', {key: 'z', ctrlKey: true}))")
    assert browser.run(COUNT) == 540
    click(browser, "undo")
    assert browser.run(COUNT) == 240
    click(browser, "redo")
    assert browser.run(COUNT) == 540
    browser.press("l")
    browser.wait(f"![0, 540].includes({COUNT})")
    click(browser, "undo")
    assert browser.run(COUNT) == 540
    grey = browser.run("medsoft.viewer.window")
    browser.drag(place(browser, 50, 50), place(browser, 60, 60), button="right")
    assert browser.run("medsoft.viewer.window") != grey
    at = browser.run("medsoft.viewer.view")
    browser.press("ArrowRight", shift=True)
    browser.press("ArrowUp", shift=True)
    moved = browser.run("medsoft.viewer.view")
    assert (moved["x"] < at["x"], moved["y"] > at["y"], browser.run("medsoft.app.shown")) == (True, True, None)
    browser.run("medsoft.viewer.fit()")
    assert browser.run(COUNT) == 540


# The sentence of a page that is loaded again arrives only after the page has heard that what was begun is drawn.
LATE_SENTENCE = """(() => {
  const plain = window.fetch, job = `/api/jobs/${JSON.parse(sessionStorage.getItem('medsoft.job'))}`;
  const state = async () => (await (await plain(job)).json()).state;
  window.fetch = async (path, ...options) => {
    if (path.startsWith('/api/sentences')) while (['queued', 'running'].includes(await state()) || medsoft.drawing.job);
    return plain(path, ...options);
  };
})()"""


def test_a_reload_while_drawing_loses_nothing(browser: Browser, server: str, output_dir: Path) -> None:
    """Another tab that goes on to another image changes nothing here either."""
    browser.run("void (document.getElementById('n').value = 3, document.getElementById('seed').value = 77)")
    browser.run("void document.getElementById('n').dispatchEvent(new Event('input'))")
    before, name = painted(browser), browser.run("medsoft.app.document.id")
    browser.wait("!document.getElementById('act').disabled")
    browser.press("d")
    browser.wait("sessionStorage.getItem('medsoft.job')")
    headers = {"X-MedSoft": "1", "Content-Type": "application/json"}
    other = urllib.request.Request(f"{server}/api/go", b'{"index": 1}', headers)
    state: dict[str, Any] = json.load(urllib.request.urlopen(other))
    assert state["document"]["id"] != name
    late = browser.call("Page.addScriptToEvaluateOnNewDocument", source=LATE_SENTENCE)
    browser.open(server)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", **late)
    browser.wait("window.medsoft && medsoft.app.shown && !medsoft.drawing.job && medsoft.results.items.length === 4")
    assert browser.run("medsoft.app.document.id") == name
    assert np.array_equal(painted(browser), before)
    assert browser.run("[medsoft.app.shown.variant, medsoft.app.shown.seed]") == [0, 77]
    assert browser.run("[document.getElementById('n').value, document.getElementById('seed').value]") == ["3", "77"]

    browser.wait("medsoft.results.ready")
    for key in "r4":
        browser.press(key)
    browser.wait("medsoft.app.shown.state === 'rejected' && medsoft.app.shown.reason === 'seam'")
    for key in "  ":
        browser.press(key)
    assert browser.run("[medsoft.viewer.mode, medsoft.viewer.position]") == ["flicker", 0]  # what was there before
    press_act(browser, "Next result")
    browser.wait("medsoft.app.shown.variant === 1 && medsoft.app.shown.state === 'new' && medsoft.results.ready")
    assert browser.run("[medsoft.viewer.mode, medsoft.viewer.position]") == ["flicker", 1]  # not so of another one
    browser.press("a")
    browser.wait("medsoft.app.shown.state === 'accepted'")
    assert len(list((output_dir / "accepted").iterdir())) == 2
    assert len(list((output_dir / "drafts").iterdir())) == 2

    ids = browser.run("medsoft.results.row.map((item) => item.id)")
    assert [each[-2:] for each in ids] == ["-0", "-1", "-2", "-0"]  # the newest first, its variants as they were drawn
    browser.run("medsoft.results.list(medsoft.results.items.slice(0, 3)), medsoft.results.show(medsoft.results.row[2])")
    browser.press("ArrowRight")  # beyond what is listed: older ones come
    browser.wait(f"medsoft.app.shown.id === '{ids[3]}'")
    assert browser.run("medsoft.results.row.map((item) => item.id)") == ids

    browser.press("ArrowLeft")
    browser.wait(f"medsoft.app.shown.id === '{ids[2]}'")
    browser.press("c")
    assert browser.run("document.querySelectorAll('#sheet button').length") == 3
    browser.run("document.querySelector('#sheet button').click()")
    browser.wait(f"medsoft.app.shown.id === '{ids[0]}' && document.getElementById('sheet').hidden")
    browser.press("Escape")
    browser.run("void (document.getElementById('n').value = 8)")
    browser.run("void document.getElementById('n').dispatchEvent(new Event('input'))")
    browser.wait("!document.getElementById('act').disabled")
    browser.press("d")
    browser.wait("medsoft.drawing.job")
    click(browser, "cancel")
    browser.wait("!medsoft.drawing.job && document.getElementById('status').textContent.startsWith('Cancelled')")
    assert browser.run("medsoft.app.shown") is None  # the first variants were there already, one of them accepted
    assert np.array_equal(painted(browser), before)


def test_more_than_eight_variants_are_asked_about_first(browser: Browser) -> None:
    """Whoever says no draws nothing; whoever says yes draws as many, and eight or fewer are drawn at once."""
    click(browser, "suggest")  # a mask that nothing speaks against
    browser.wait("!medsoft.placing.due && medsoft.placing.facts && !medsoft.placing.against")
    browser.run("window.asked = [], window.confirm = (text) => { asked.push(text); return asked.length > 1; }, 1")
    browser.run("void (document.getElementById('n').value = 9)")
    browser.run("void document.getElementById('n').dispatchEvent(new Event('input'))")
    press_act(browser, "Draw 9 variants")
    assert browser.run("[asked, medsoft.drawing.job]") == [["Draw 9 variants?"], None]
    press_act(browser, "Draw 9 variants")
    browser.wait("medsoft.drawing.job")
    assert browser.run("[asked.length, medsoft.drawing.job.images]") == [2, 9]
    click(browser, "cancel")
    browser.wait("!medsoft.drawing.job && document.getElementById('status').textContent.startsWith('Cancelled')")
    browser.run("void (document.getElementById('n').value = 8)")
    browser.run("void document.getElementById('n').dispatchEvent(new Event('input'))")
    press_act(browser, "Draw 8 variants")
    browser.wait("medsoft.drawing.job")
    assert browser.run("[asked.length, medsoft.drawing.job.images]") == [2, 8]
    click(browser, "cancel")
    browser.wait("!medsoft.drawing.job && document.getElementById('status').textContent.startsWith('Cancelled')")


def test_the_menus_find_sentences_that_the_server_has(browser: Browser) -> None:
    """A vertebra of which no sentence is there gets the name put in; words of one's own stay while it is looked for."""
    browser.press("Escape")
    browser.run("void (medsoft.sentence.free = false)")
    value, told = (f"document.getElementById('{name}')" for name in ("prompt", "tokens"))
    levels = browser.run("Array.from(document.getElementById('vertebra').options, (each) => each.value)")
    for level in ("", levels[-1]):
        browser.run(f"void (document.getElementById('vertebra').value = '{level}')")
        browser.run("void document.getElementById('vertebra').dispatchEvent(new Event('change'))")
        browser.wait("!medsoft.sentence.picking && medsoft.sentence.said")
        assert "a training sentence" in browser.run(f"{told}.textContent")
        assert level in browser.run(f"{value}.value")
    browser.run("window.kept = window.fetch, window.fetch = () => Promise.reject(new TypeError('gone')), 1")
    browser.run("void (medsoft.sentence.found = { asked: null, prompts: [] }, medsoft.sentence.pick())")
    browser.wait("document.getElementById('status').textContent.startsWith('The server does not answer')")
    browser.run("void (window.fetch = window.kept)")
    assert not browser.run("document.getElementById('hint').textContent").startswith("The sentence is being read")
    browser.run("medsoft.sentence.pick(), medsoft.sentence.take('my own words'), 1")
    browser.wait("!medsoft.sentence.picking && medsoft.sentence.said")
    assert browser.run(f"{value}.value") == "my own words"


def test_an_old_result_is_named_and_drawn_again_from_there(browser: Browser) -> None:
    """Another image is chosen from the list; a result of the first one is shown then."""
    name = browser.run("medsoft.app.document.name")
    browser.press("Escape")
    browser.press("Delete")
    browser.press("o")
    browser.wait("document.getElementById('finder').open && document.getElementById('entries').options.length > 2")
    other = browser.run("document.getElementById('entries').options[2].text.split(' · ')[1]")
    browser.call("Input.insertText", text=other.upper())
    browser.wait("document.getElementById('entries').options.length === 1")
    browser.press("Enter")
    browser.wait(f"medsoft.app.document.name === '{other}' && !medsoft.app.opening && medsoft.placing.facts")
    header = "document.getElementById('place').textContent + ' ' + document.getElementById('about').textContent"
    assert browser.run(header).startswith(f"3 of {browser.run('medsoft.app.state.collection.count')} {other}: ")

    browser.run("medsoft.results.show(medsoft.results.items.at(-1))")
    browser.wait("medsoft.app.shown")
    assert f"1 of {browser.run('medsoft.app.state.collection.count')} Drawn on {name}: " in browser.run(header)
    assert browser.run("document.getElementById('back').title").startswith(f"Back to {other}, ")
    browser.press("v")  # to move it about: it stays on show
    mask = browser.run("medsoft.app.shown && Array.from(medsoft.results.loaded.mask)")
    click(browser, "again")
    browser.wait(f"medsoft.app.document.name === '{name}' && !medsoft.app.shown && medsoft.placing.facts")
    browser.wait("document.getElementById('act').textContent === 'Draw with another seed'")
    assert browser.run("Array.from(medsoft.app.mask.pixels)") == mask
    assert browser.run("[medsoft.sentence.text, document.getElementById('seed').value]") == browser.run(
        "[medsoft.results.items.at(-1).prompt, String(medsoft.results.items.at(-1).seed)]"
    )
    click(browser, "undo")
    assert browser.run(COUNT) == 0
    click(browser, "redo")


def test_a_fault_stands_in_the_status_line_and_nothing_is_lost(browser: Browser, world: Path, tmp_path: Path) -> None:
    browser.press("Escape")
    before = painted(browser)
    browser.run("document.getElementById('path').value = '/nowhere/image.png'")
    click(browser, "open")
    browser.wait("document.getElementById('status').className === 'fault'")
    assert "/nowhere/image.png: does not exist" in browser.run("document.getElementById('status').textContent")
    assert np.array_equal(painted(browser), before)
    browser.run("document.getElementById('prompt').value = 'osteolytic '.repeat(90)")
    browser.run("void document.getElementById('prompt').dispatchEvent(new Event('input'))")
    browser.wait("document.getElementById('tokens').className.includes('fault')")
    assert browser.run("[document.getElementById('act').textContent, document.getElementById('act').disabled]") == [
        "Draw",
        True,
    ]
    assert "Shorten it" in browser.run("document.getElementById('hint').textContent")

    level = browser.run("medsoft.app.document.level")
    browser.run(f"document.getElementById('prompt').value = 'severe lesion of {'L5' if level != 'L5' else 'L4'}'")
    browser.run("void document.getElementById('prompt').dispatchEvent(new Event('input'))")
    browser.wait("document.getElementById('act').textContent === 'Draw all the same'")
    assert f"the image's level is {level}" in browser.run("document.getElementById('hint').textContent")

    for name in ("a", "b"):
        shutil.copytree(next((world / "val").iterdir()), tmp_path / name)
    (tmp_path / "a" / "image.png").write_bytes(b"damaged")
    browser.run(f"document.getElementById('path').value = '{tmp_path}'")
    click(browser, "open")
    browser.wait("medsoft.app.document.name === 'b' && document.getElementById('status').textContent")
    said = browser.run("document.getElementById('status').textContent")
    assert f"Passed over: {tmp_path}/a/image.png" in said


def test_a_dicom_slice_is_painted_on_drawn_and_accepted(browser: Browser, output_dir: Path, tmp_path: Path) -> None:
    values = marked((48, 40, 1))
    write_series(tmp_path / "ct", values, grid(AXIAL, values.shape, (0.5, 0.5, 3.0)), RescaleIntercept="-1000")
    before = set((output_dir / "accepted").iterdir())
    browser.run(f"document.getElementById('path').value = '{tmp_path}/ct'")
    click(browser, "open")
    browser.wait("medsoft.app.document.width === 48 && !medsoft.app.opening")
    assert browser.run("document.getElementById('about').textContent").endswith(": 48 x 40, 16 bit, 0.5 mm")
    browser.run("document.getElementById('prompt').value = 'osteolytic lesion'")
    browser.run("void document.getElementById('prompt').dispatchEvent(new Event('input'))")
    browser.press("x")
    browser.drag(place(browser, 12.2, 12.1), place(browser, 20, 20), place(browser, 25.9, 23.9))
    mask = painted(browser)
    assert mask[12:24, 12:26].all()
    browser.wait("medsoft.placing.facts && medsoft.sentence.tokens")
    press_act(browser, "Draw")
    browser.wait("medsoft.app.shown && medsoft.app.shown.state === 'new' && !medsoft.drawing.job")
    press_act(browser, "Accept")
    browser.wait("medsoft.app.shown.state === 'accepted'")
    (folder,) = set((output_dir / "accepted").iterdir()) - before
    image, soft, stored = read_image(folder / "image.png"), read_image(folder / "soft_mask.png"), values[:, :, 0].T
    assert image.dtype == np.uint16
    assert np.array_equal(read_image(folder / "mask.png"), mask)
    assert np.array_equal(image[soft == 0], stored[soft == 0])
    assert not np.array_equal(image, stored)


# Where each control stands that can be seen, by its name.
PLACES = """Object.fromEntries([...document.querySelectorAll('button, input, select, textarea, #stage, #results')]
  .filter((each) => each.checkVisibility() && (each.id || each.dataset.tool) && !each.closest('dialog'))
  .map((each) => [each.id || each.dataset.tool, each.getBoundingClientRect()])
  .map(([name, { x, y }]) => [name, [x, y]]))"""


def opened(browser: Browser, path: Path) -> None:
    """Open a path by the form, and wait until all is there."""
    browser.press("Escape")
    before = browser.run("medsoft.app.document.id")
    browser.run(f"document.getElementById('path').value = {json.dumps(str(path))}")
    click(browser, "open")
    browser.wait(f"medsoft.app.document.id !== '{before}' && !medsoft.app.opening && medsoft.placing.facts")


def write(browser: Browser, sentence: str) -> None:
    """Write a sentence, and wait for what the server says of it."""
    browser.run(f"document.getElementById('prompt').value = {json.dumps(sentence)}")
    browser.run("void document.getElementById('prompt').dispatchEvent(new Event('input'))")
    browser.wait("medsoft.sentence.said && !medsoft.sentence.reading")


def test_what_speaks_against_a_drawing_is_said_before_and_what_is_said_moves_nothing(
    browser: Browser, world: Path
) -> None:
    opened(browser, world)
    write(browser, f"severe lesion of {browser.run('medsoft.app.document.level')}")
    browser.press("Delete")
    browser.wait("medsoft.app.mask.empty && !medsoft.placing.due")
    before = browser.run(PLACES)
    assert {"brush", "suggest", "prompt", "seed", "act", "stage", "results"} <= {*before}

    def nothing_has_moved() -> None:
        assert {name: at for name, at in browser.run(PLACES).items() if name in before} == before

    # A mask in the corner, and the orange button at once: the press did not mean what is said of the mask then.
    browser.run("""void (medsoft.app.mask.polygon([{x: 1, y: 1}, {x: 9, y: 1}, {x: 9, y: 9}, {x: 1, y: 9}], 255),
        medsoft.app.mask.finish(), document.getElementById('act').onclick(), window.due = medsoft.placing.due)""")
    browser.wait("medsoft.app.begun === false && medsoft.placing.due === false")
    assert browser.run("[due, medsoft.drawing.job]") == [True, None]
    hint = "document.getElementById('hint').textContent"
    assert browser.run(hint).startswith("Careful: the mask lies outside the image's own vertebra, ")
    assert browser.run("document.getElementById('act').textContent") == "Draw all the same"
    nothing_has_moved()
    other = "L5" if browser.run("medsoft.app.document.level") != "L5" else "L4"
    write(browser, f"severe brontosaurus lesion of {other}")
    assert "; the prompt names L" in browser.run(hint)
    nothing_has_moved()
    browser.run(f"document.getElementById('path').value = '/nowhere{'/far' * 80}.png'")
    click(browser, "open")
    browser.wait("document.getElementById('status').className === 'fault'")
    assert browser.run("document.getElementById('status').clientHeight") > 40  # more than its line
    nothing_has_moved()
    for size in SIZES:  # nor is anything covered
        with window(browser, *size):
            assert flaws(browser) == []
            assert browser.run("['level', 'width'].every((name) => document.getElementById(name).offsetWidth >= 100)")
            assert browser.run("document.getElementById('stage').offsetWidth") >= 390


def test_drawings_that_are_left_undecided_are_named(browser: Browser) -> None:
    """Two presses at once draw one; while it is on show, the mask that is not seen cannot be changed."""
    left = browser.run("medsoft.app.document.id")
    act = "document.getElementById('act')"
    browser.wait(f"{act}.textContent === 'Draw all the same' && !{act}.disabled")
    browser.run("""void (window.draws = 0, window.kept = window.fetch,
        window.fetch = (path, ...more) => (draws += path === '/api/draw', kept(path, ...more)))""")
    browser.run(f"void ({act}.onclick(), {act}.onclick())")
    browser.wait("medsoft.app.shown && medsoft.app.shown.state === 'new' && !medsoft.drawing.job")
    assert browser.run("[window.draws, window.fetch = window.kept][0]") == 1
    assert browser.run("['undo', 'redo', 'clear'].every((name) => document.getElementById(name).disabled)")
    count = browser.run(f"medsoft.results.undecidedOn(['{left}'])")
    assert count >= 1
    browser.press("n")
    browser.wait(f"medsoft.app.document.id !== '{left}' && !medsoft.app.opening && medsoft.placing.facts")
    told = browser.run("document.getElementById('status').textContent")
    assert told.startswith("One drawing that you leave is" if count == 1 else f"{count} drawings that you leave are")
    assert "neither accepted nor rejected" in told
    browser.press("p")  # from an image on which nothing was drawn
    browser.wait(f"medsoft.app.document.id === '{left}' && !medsoft.app.opening && medsoft.placing.facts")
    assert browser.run("document.getElementById('status').textContent") == ""
    assert not browser.run("document.getElementById('clear').disabled")


def test_the_menu_shows_the_images_own_vertebra(browser: Browser, world: Path, tmp_path: Path) -> None:
    """Of which no training sentence is there; also while the sentence is one's own."""
    write(browser, "my own words")
    for name in ("L6", "T13"):
        shutil.copytree(next((world / "val").iterdir()), tmp_path / name)
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        (tmp_path / name / "meta.json").write_text(json.dumps(meta | {"level": name}))
        opened(browser, tmp_path / name)
        assert browser.run("document.getElementById('vertebra').value") == name
    browser.run("void medsoft.sentence.pick()")
    browser.wait("!medsoft.sentence.picking && medsoft.sentence.said")
    assert "T13" in browser.run("document.getElementById('prompt').value")
