"""The page of a reader study in headless Chromium: scripted readers read it, and the analysis finds their rates."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
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


def enter(browser: Browser, code: str, years: int) -> None:
    """Fill the form in and begin."""
    browser.wait("!document.getElementById('welcome').hidden")
    values = {"code": code, "years": years, "speciality": "radiology", "seen": "never"}
    for name, value in values.items():
        browser.run(f"document.getElementById('{name}').value = {json.dumps(str(value))}")
    browser.run("document.getElementById('start').click()")


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
    browser.run("document.getElementById('save').click()")
    path = browser.downloads / f"answers_{code}_{study['study']}.json"
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return path


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
        browser.load("Runtime.evaluate", expression="document.getElementById('other').click()")
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
    browser.run("document.getElementById('pause').click()")
    content = read(save(browser, key, "R1"))
    assert (content["complete"], content["finished"], len(content["answers"])) == (False, None, 3)
    assert all(row["answer"] == truths(key)[row["item"]] for row in content["answers"])
    browser.run("document.getElementById('back').click()")
    answer(browser, "ArrowLeft", 3)
    browser.wait("state.answers.length === 4")


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
