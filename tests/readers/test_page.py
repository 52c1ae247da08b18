"""The page of a reader study in headless Chromium: scripted readers read it, and the analysis finds their rates."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from looks import SIZES, flaws, window
from reading import call, make, make_world, read, truths

from ldm.data.folders import read_sample
from ldm.readers.pictures import crop_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("page"), 12, deep=True, window=[4000, 44000])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("downloads")) as made:
        yield made
        assert made.errors == []


def click(browser: Browser, name: str) -> None:
    browser.run(f"document.getElementById('{name}').click()")


def enter(browser: Browser, code: str, years: int) -> None:
    """Fill the form in and begin."""
    browser.wait("!document.getElementById('welcome').hidden")
    values = {"code": code, "years": years, "speciality": "radiology", "seen": "never"}
    for name, value in values.items():
        browser.run(f"document.getElementById('{name}').value = {json.dumps(str(value))}")
    click(browser, "start")


def answer(browser: Browser, key: str, place: int) -> None:
    """Press a key and Enter at the item ``place`` (from 0), once it is shown."""
    browser.wait(f"state && state.answers.length === {place} && shown.length")
    browser.press(key)
    browser.press("Enter")


def shown_item(browser: Browser, place: int) -> str:
    browser.wait(f"state && state.answers.length === {place} && shown.length")
    return browser.run("state.order[state.answers.length]")


def save(browser: Browser, study: dict[str, Any], code: str) -> Path:
    """Press the button, and the file that comes of it."""
    click(browser, "save")
    path = browser.downloads / f"answers_{code}_{study['study']}.json"
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return path


def pause(browser: Browser) -> None:
    click(browser, "pause")
    browser.wait("!document.getElementById('end').hidden")


def given(browser: Browser) -> list[int]:
    """The answers of this reader that the page knows."""
    return browser.run("state.answers.map(each => each.answer)")


def comment(browser: Browser, text: str) -> None:
    """Type it, and wait until it is kept."""
    field = "document.getElementById('comment')"
    browser.run(f"{field}.value = {json.dumps(text)}, {field}.dispatchEvent(new Event('input')), turn")
    assert browser.run(f"{field}.value") == text


def note(browser: Browser) -> str:
    return browser.run("document.getElementById('note').textContent")


@contextmanager
def at_start(browser: Browser, script: str) -> Iterator[None]:
    """Pages that are opened inside run this before anything of their own."""
    number = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    yield
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=number)


def small(world: Path, browser: Browser, seed: int) -> tuple[dict[str, Any], str]:
    """A study of nine pictures, another one with each seed, and its page opened: the key, and the page's address."""
    study = make(world, f"small{seed}", "--cases", 4, "--seed", seed)
    address = (study / "for_readers" / "index.html").as_uri()
    browser.open(address)
    return read(study / "key.json"), address


def begun(world: Path, browser: Browser, seed: int) -> tuple[dict[str, Any], str]:
    """The same, and R1 has begun to read."""
    key, address = small(world, browser, seed)
    enter(browser, "R1", 2)
    return key, address


def test_scripted_readers_read_single_pictures(world: Path, browser: Browser, tmp_path: Path) -> None:
    study = make(world, "study", "--cases", 11)
    key, address = read(study / "key.json"), (study / "for_readers" / "index.html").as_uri()
    truth, rng, files = truths(key), np.random.default_rng(4), []
    given: dict[str, dict[str, int]] = {"PERFECT": {}, "RANDOM": {}, "BIASED": {}}
    browser.open(address)
    for number, (code, answers) in enumerate(given.items()):
        enter(browser, code.lower(), 3 + 5 * number)
        for place in range(len(truth)):
            item = shown_item(browser, place)
            if number == 0 and place == 5:  # a reload in the middle: the same item, nothing lost
                browser.press("4")
                browser.open(address)
                assert shown_item(browser, 5) == item
                assert browser.run("chosen") is None
            if number == 0 and place == 0:
                about = key["pictures"][item]
                sample = read_sample(about["sample_id"], Path(about["image"]).parent)
                levels = browser.run("Array.from(shown[0].levels)")
                assert levels == crop_of(sample, key["side"], True).ravel().tolist()
            drawn = truth[item] == "drawn"
            steps = {"PERFECT": 6 if drawn else 1, "RANDOM": int(rng.integers(1, 7)), "BIASED": 6 if drawn else 5}
            answers[item] = steps[code]
            answer(browser, str(answers[item]), place)
        browser.wait("!document.getElementById('end').hidden")
        files.append(save(browser, key, code))
        click(browser, "other")
    for path, (code, answers) in zip(files, given.items(), strict=True):
        content = read(path)
        assert (content["reader"]["code"], content["complete"]) == (code, True)
        assert {row["item"]: row["answer"] for row in content["answers"]} == answers
        assert sum(row["seconds"] for row in content["answers"]) > 0
        assert content["finished"] > content["started"]
    orders = [[row["item"] for row in read(path)["answers"]] for path in files]
    assert orders[0] != orders[1]
    folder = address.removesuffix("index.html")
    assert all(each.startswith((folder, f"blob:{folder[:7]}")) for each in browser.requests), browser.requests

    assert call("analyse", study, *files, "--output_dir", tmp_path / "analysis") == 0
    found = read(tmp_path / "analysis" / "analysis.json")
    assert found["readers"] == ["BIASED", "PERFECT", "RANDOM"]
    assert [each["value"] for each in found["numbers"]["auc"]["readers"]][:2] == [1, 1]
    assert [each["value"] for each in found["numbers"]["accuracy"]["readers"]][:2] == [0.5, 1]
    low, high = (found["numbers"]["auc"]["readers"][2][name] for name in ("low", "high"))
    assert low < 0.5 < high
    assert found["agreement"]["intra_by_reader"]["PERFECT"] == 1


def test_a_reader_of_pairs_uses_the_arrows_and_pauses(world: Path, browser: Browser) -> None:
    study = make(world, "pairs", "--design", "pairs", "--cases", 4)
    key = read(study / "key.json")
    browser.open((study / "for_readers" / "index.html").as_uri())
    enter(browser, "R1", 2)
    for place in range(3):
        item = shown_item(browser, place)
        assert browser.run("document.querySelectorAll('#stage canvas').length") == 2
        answer(browser, {"left": "ArrowLeft", "right": "ArrowRight"}[truths(key)[item]], place)
    browser.wait("state.answers.length === 3 && shown.length")
    browser.press("Enter")  # nothing is chosen, so nothing is answered
    browser.press("+")
    assert browser.run("[state.answers.length, view.zoom]") == [3, 1.25]
    pause(browser)
    content = read(save(browser, key, "R1"))
    assert (content["complete"], content["finished"], len(content["answers"])) == (False, None, 3)
    assert all(row["answer"] == truths(key)[row["item"]] for row in content["answers"])
    click(browser, "back")
    answer(browser, "ArrowLeft", 3)
    browser.wait("state.answers.length === 4")


def test_a_control_that_has_the_focus_keeps_its_keys(world: Path, browser: Browser) -> None:
    """A slider is moved, a button pressed, and no answer is given; one that was clicked has no focus."""
    study = make(world, "keys", "--design", "pairs", "--cases", 4, "--seed", 10)
    browser.open((study / "for_readers" / "index.html").as_uri())
    browser.wait("document.activeElement.id === 'code'")
    enter(browser, "R1", 2)
    shown_item(browser, 0)
    x, y = browser.run("(({ x, y, width, height }) => [x + width / 4, y + height / 2])(level.getBoundingClientRect())")
    browser.drag((x, y))
    level = browser.run("view.level")
    assert level < 0.5
    browser.press("ArrowRight")
    assert browser.run("[chosen, view.level]") == ["right", level]
    browser.run("document.getElementById('level').focus()")
    browser.press("ArrowLeft")
    assert browser.run("chosen") == "right"
    assert browser.run("view.level") < level
    browser.run("document.getElementById('pause').focus()")
    browser.press("Enter")
    browser.wait("!document.getElementById('end').hidden")
    assert given(browser) == []
    assert browser.run("document.getElementById('when').textContent").startswith("Once all are answered")


@pytest.mark.parametrize("shift", [False, True], ids=["single", "pairs"])
def test_the_arrows_move_an_enlarged_picture(world: Path, browser: Browser, shift: bool) -> None:
    """With Shift where they choose; held down they go on to the picture's edge. A whole picture stays where it is."""
    study = make(world, f"arrows{shift}", "--design", "pairs" if shift else "single", "--cases", 4, "--seed", 11)
    browser.open((study / "for_readers" / "index.html").as_uri())
    enter(browser, "R1", 2)
    shown_item(browser, 0)
    place = "[view.x * view.zoom, view.y * view.zoom, view.zoom]"  # in widths of what is seen
    browser.press("ArrowRight", shift)
    assert browser.run(place) == [0, 0, 1]
    for _ in range(6):
        browser.press("+")
    for key, x, y in (("Right", -0.1, 0), ("Down", -0.1, -0.1), ("Left", 0, -0.1), ("Up", 0, 0)):
        browser.press(f"Arrow{key}", shift)
        assert browser.run(place)[:2] == pytest.approx([x, y])
    held = "new KeyboardEvent('keydown', { key: 'ArrowRight', shiftKey: true, repeat: true })"
    browser.run(f"for (let k = 0; k < 30; k++) document.dispatchEvent({held})")
    x, _, zoom = browser.run(place)
    assert x == pytest.approx((1 - zoom) / 2)
    assert browser.run("chosen") is None


@pytest.mark.parametrize("design", ["single", "pairs"])
def test_everything_can_be_pressed_and_read(world: Path, browser: Browser, design: str) -> None:
    """At the beginning, while it is read and at the end, in large windows and on a phone."""
    study = make(world, f"looks_{design}", "--design", design, "--cases", 4, "--seed", 12)
    browser.open((study / "for_readers" / "index.html").as_uri())
    browser.wait("!document.getElementById('welcome').hidden")

    def look() -> None:
        for size in SIZES:
            with window(browser, *size):
                assert flaws(browser) == []

    look()
    enter(browser, "R1", 2)
    shown_item(browser, 0)
    browser.press({"single": "2", "pairs": "ArrowLeft"}[design])
    look()
    pause(browser)
    look()


def test_the_order_follows_the_code_and_keeps_repeats_apart(world: Path, browser: Browser) -> None:
    study = make(world, "order", "--cases", 12)
    key = read(study / "key.json")
    browser.open((study / "for_readers" / "index.html").as_uri())
    orders = {code: browser.run(f"orderFor('{code}')") for code in ("R01", "R02", "R03", "R04", "R05", "R06")}
    assert browser.run("orderFor('R01')") == orders["R01"]
    assert len({tuple(order) for order in orders.values()}) == 6
    for order in orders.values():
        assert sorted(order) == sorted(key["items"])
        for name, item in key["items"].items():
            if item["repeat_of"]:
                assert order.index(name) - order.index(item["repeat_of"]) >= len(order) // 6


def test_an_answer_is_kept_before_the_next_item_is_shown(world: Path, browser: Browser) -> None:
    """A page that is loaded again at once has it; Enter twice answers once; a pause waits for the answer before it."""
    key, address = begun(world, browser, 1)
    total = len(key["items"])
    for place in range(total):
        answer(browser, str(1 + place % 6), place)
        browser.wait(f"state && state.answers.length === {place + 1}")
        browser.open(address)
    browser.wait("!document.getElementById('end').hidden")
    content = read(save(browser, key, "R1"))
    assert [row["answer"] for row in content["answers"]] == [1 + place % 6 for place in range(total)]
    assert (content["complete"], note(browser)) == (True, "")

    click(browser, "other")
    enter(browser, "R2", 2)
    shown_item(browser, 0)
    browser.press("4")
    enter_key = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' }))"
    browser.run(f"{enter_key}, {enter_key}")
    shown_item(browser, 1)
    browser.press("2")
    browser.run(f"{enter_key}, document.getElementById('pause').click()")
    browser.wait("document.getElementById('state').textContent.startsWith('2 of')")
    assert given(browser) == [4, 2]
    assert not browser.run("document.getElementById('end').hidden")


def test_two_tabs_lose_no_answer(world: Path, browser: Browser) -> None:
    """A tab that is behind goes on from where the other one is; another reader's answers stay as they are."""
    key, address = begun(world, browser, 2)
    for place in range(2):
        answer(browser, "2", place)
    shown_item(browser, 2)
    with browser.tab():
        browser.open(address)
        for place in (2, 3):
            answer(browser, "5", place)
        shown_item(browser, 4)
        pause(browser)
        click(browser, "other")
        enter(browser, "R2", 2)
        answer(browser, "6", 0)
        shown_item(browser, 1)
    assert given(browser) == [2, 2]
    answer(browser, "1", 2)
    shown_item(browser, 4)
    assert "another tab" in note(browser)
    answer(browser, "3", 4)
    shown_item(browser, 5)
    assert (given(browser), note(browser)) == ([2, 2, 5, 5, 3], "")
    with browser.tab():
        browser.open(address)  # R2 was the last to begin
        pause(browser)
        click(browser, "other")
        enter(browser, "R1", 2)
        answer(browser, "4", 5)
        shown_item(browser, 6)
    shown_item(browser, 6)  # found when the clock was kept, without an answer
    assert "another tab" in note(browser)
    pause(browser)
    assert [row["answer"] for row in read(save(browser, key, "R1"))["answers"]] == [2, 2, 5, 5, 3, 4]
    click(browser, "other")
    enter(browser, "R2", 2)
    shown_item(browser, 1)
    assert given(browser) == [6]


def test_two_tabs_lose_no_comment(world: Path, browser: Browser) -> None:
    """The one typed last stays, beside the answers of the tab that is ahead; another reader's is another one."""
    key, address = begun(world, browser, 7)
    answer(browser, "2", 0)
    shown_item(browser, 1)
    first = browser.session
    with browser.tab():
        browser.open(address)
        shown_item(browser, 1)  # it knows of no comment
        second, browser.session = browser.session, first
        pause(browser)
        comment(browser, "seams")
        browser.session = second
        answer(browser, "5", 1)
        shown_item(browser, 2)
        assert browser.run("state.comment") == "seams"
        browser.session = first
        comment(browser, "seams, and noise")
        assert "another tab" in note(browser)
        browser.session = second
        pause(browser)
        content = read(save(browser, key, "R1"))
        assert (content["comment"], [row["answer"] for row in content["answers"]]) == ("seams, and noise", [2, 5])
        click(browser, "other")
        enter(browser, "R2", 2)
        shown_item(browser, 0)
        pause(browser)
        assert browser.run("[state.comment, document.getElementById('comment').value]") == ["", ""]


def test_a_browser_that_keeps_nothing_is_named_and_the_study_goes_on(world: Path, browser: Browser) -> None:
    with at_start(browser, "Object.defineProperty(window, 'indexedDB', { value: undefined })"):
        key, _ = begun(world, browser, 3)
        for place in range(len(key["items"])):
            answer(browser, "3", place)
            assert "keeps nothing" in note(browser)
        browser.wait("!document.getElementById('end').hidden")
        content = read(save(browser, key, "R1"))
        assert (content["complete"], {row["answer"] for row in content["answers"]}) == (True, {3})
        click(browser, "other")
        enter(browser, "R2", 2)
        answer(browser, "6", 0)
        shown_item(browser, 1)
        pause(browser)
        click(browser, "other")
        enter(browser, "R1", 2)
        browser.wait("!document.getElementById('end').hidden")
        assert browser.run("document.getElementById('state').textContent") == "All are answered."


HELD = """window.timers = [], window.setTimeout = (act) => timers.push(act),
    window.clearTimeout = (number) => { timers[number - 1] = () => {}; }"""
MUTE = """window.plain = indexedDB, window.asked = [], window.put = (value) =>
    Object.defineProperty(window, 'indexedDB', { value, configurable: true }),
    put({ open: () => (asked.push({}), asked.at(-1)) })"""


def test_storage_that_never_answers_is_named_with_what_to_do_and_the_study_goes_on(
    world: Path, browser: Browser
) -> None:
    """It is waited for once, and used again once it has answered."""
    with at_start(browser, f"{HELD}; {MUTE}"):
        _, address = small(world, browser, 8)
        assert browser.run("[document.body.innerText, asked.length, timers.length]") == ["", 1, 1]
        browser.run("timers[0](), 1")
        enter(browser, "R1", 2)
        answer(browser, "3", 0)
        shown_item(browser, 1)
        assert "does not answer" in note(browser)
        assert "Close all windows of this browser and open this page again" in note(browser)
        assert browser.run("[asked.length, timers.length]") == [1, 1]
        browser.run("put(plain), asked[0].result = { close() { asked[0].closed = true; } }, asked[0].onsuccess()")
        assert browser.run("asked[0].closed")
        answer(browser, "4", 1)
        shown_item(browser, 2)
        assert note(browser) == ""
    browser.open(address)
    enter(browser, "R1", 2)
    shown_item(browser, 2)
    assert given(browser) == [3, 4]


def goes_on(browser: Browser, address: str) -> None:
    """The third answer is kept, and the second, which was not, with it."""
    answer(browser, "3", 2)
    shown_item(browser, 3)
    assert note(browser) == ""
    browser.open(address)
    shown_item(browser, 3)
    assert given(browser) == [1, 2, 3]


def test_a_transaction_that_never_ends_is_given_up(world: Path, browser: Browser) -> None:
    """What it was to write is not written later, when it may be old: it comes with the next answer."""
    _, address = begun(world, browser, 9)
    answer(browser, "1", 0)
    shown_item(browser, 1)
    browser.run(f"""{HELD}, window.asked = [], window.ended = [],
        window.original = IDBDatabase.prototype.transaction, void (
        IDBDatabase.prototype.transaction = () => {{
            const made = {{ objectStore: () => ({{ get: () => ({{}}) }}), abort: () => ended.push(made) }};
            asked.push(made);
            return made;
        }})""")
    answer(browser, "2", 1)
    browser.wait("asked.length")
    assert browser.run("[state.answers.length, ended.length]") == [1, 0]
    browser.run("timers.forEach((act) => act()), 1")
    shown_item(browser, 2)
    assert "does not answer" in note(browser)
    browser.run("void (IDBDatabase.prototype.transaction = original, ended[0].onabort())")
    goes_on(browser, address)


def test_answers_that_could_not_be_kept_are_kept_with_the_next_one(world: Path, browser: Browser) -> None:
    """As on a disk that is full for a while."""
    _, address = begun(world, browser, 4)
    answer(browser, "1", 0)
    shown_item(browser, 1)
    browser.run("""void (IDBObjectStore.prototype.original = IDBObjectStore.prototype.put,
        IDBObjectStore.prototype.put = function () { this.transaction.abort(); })""")
    answer(browser, "2", 1)
    shown_item(browser, 2)
    assert "keeps nothing" in note(browser)
    browser.run("void (IDBObjectStore.prototype.put = IDBObjectStore.prototype.original)")
    goes_on(browser, address)


def test_a_study_begun_with_an_earlier_page_goes_on(world: Path, browser: Browser) -> None:
    """It kept all readers in one entry of the local storage, which stays as it is."""
    key, address = small(world, browser, 5)
    entry = f"reader-study {key['study']}"
    readers = {}
    for code, answers in {"R1": [5, 4, 3], "R2": [1]}.items():
        order = browser.run(f"orderFor('{code}')")
        about = {"code": code, "years": 2, "speciality": "radiology", "seen": "never"}
        rows = [{"item": item, "answer": given, "seconds": 2} for item, given in zip(order, answers, strict=False)]
        more = {"started": "2026-01-01T00:00:00.000Z", "finished": None, "comment": "", "spent": 1.5}
        readers[code] = {"format": 1, "reader": about, "order": order, "answers": rows} | more
    before = json.dumps({"current": "R1", "readers": readers})
    # Set in each page before its script: Chromium may show a page the storage as it was before the last one wrote.
    with at_start(browser, f"localStorage.setItem('{entry}', {json.dumps(before)})"):
        browser.open(address)
        answer(browser, "6", 3)
        shown_item(browser, 4)
        browser.open(address)
        shown_item(browser, 4)
        assert given(browser) == [5, 4, 3, 6]
        pause(browser)
        click(browser, "other")
        browser.wait("!document.getElementById('welcome').hidden")
        browser.open(address)
        enter(browser, "R2", 2)
        shown_item(browser, 1)
        assert given(browser) == [1]
        assert browser.run(f"localStorage.getItem('{entry}')") == before


def test_a_damaged_picture_is_named_and_the_reader_can_pause(world: Path, browser: Browser) -> None:
    small(world, browser, 6)
    name = browser.run("study.items[orderFor('R1')[0]][0]")
    (world / "small6" / "for_readers" / "pictures" / f"{name}.js").write_text("")
    enter(browser, "R1", 2)
    browser.wait(f"document.getElementById('stage').textContent.includes('pictures/{name}.js cannot be read')")
    pause(browser)
