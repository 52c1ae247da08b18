"""`medsoft review`: scripted reviewers in headless Chromium, whose rates and kappas are found; bad requests, files."""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import tiny
from browser import CHROMIUM, Browser
from fastapi.testclient import TestClient
from looks import SIZES, flaws, window
from sklearn.metrics import cohen_kappa_score

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import sha256_file
from ldm.data.png import write_png
from ldm.reviews.table import Review, add_review, read_reviews
from ldm.workbench.review import Queue, routes
from ldm.workbench.server import make_app
from tool import review

COUNT = 12
TYPES = ("osteolytic", "osteoblastic", "haemangioma")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")


def draw(root: Path, count: int = COUNT) -> Path:
    """``count`` results with their parents beside them: 16 bits with a window, and, of the last one, 8 bits."""
    rng = np.random.default_rng(3)
    for number in range(count):
        name, deep = f"p{number:02d}", number < count - 1
        before = rng.integers(9000, 12000, (48, 60), dtype=np.uint16)
        before = before if deep else (before >> 8).astype(np.uint8)
        after = before.copy()
        after[20:30, 22:36] *= 2
        mask = np.zeros(before.shape, np.uint8)
        mask[20:30, 22:36] = 255
        write_png(root / "data" / name / "image.png", before)
        folder = root / "results" / f"{name}__v0"
        for file, pixels in (("image", after), ("mask", mask), ("soft_mask", mask)):
            write_png(folder / f"{file}.png", pixels)
        kind = TYPES[number % 3]
        (folder / "prompt.txt").write_text(f"moderate {kind} lesion")
        given = {"patient_id": name, "parent_id": name, "lesion_type": kind, "severity": "moderate", "synthetic": True}
        given |= {"parent_image": f"../../data/{name}/image.png", "window": [8000, 26000] if deep else None}
        given |= {"parent_sha256": sha256_file(root / "data" / name / "image.png")}
        (folder / "meta.json").write_text(json.dumps({key: value for key, value in given.items() if value}))
    return root / "results"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("review"))


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return draw(tmp_path, 3)


# -------------------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def server(drawn: Path) -> Iterator[str]:
    """The address of `medsoft review DRAWN`, which Ctrl-C ends."""
    with children.serving("/api/review", tiny.ROOT / "tool" / "review.py", drawn) as address:
        yield address


@pytest.fixture(scope="module")
def browser(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("downloads")) as made:
        yield made
        made.run("1")
        assert made.errors == []
        assert all(each.startswith((server, "data:")) for each in made.requests), made.requests


def ready(browser: Browser, judged: int) -> str:
    """The id of the sample that is shown once so many are judged."""
    browser.wait(f"window.review && review.item && !review.busy && review.verdicts.size === {judged}")
    return browser.run("review.item.sample_id")


def send(server: str, browser: Browser, reviewer: str, sample_id: str, verdict: str) -> dict[str, Any]:
    """A verdict from elsewhere: another tab, or another reviewer."""
    name = browser.run(f"review.state.items.find((item) => item.sample_id === '{sample_id}').id")
    about = json.load(urllib.request.urlopen(f"{server}/api/items/{name}"))
    content = {"reviewer": reviewer, "sha256": about["sha256"], "verdict": verdict}
    headers = {"X-MedSoft": "1", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{server}/api/items/{name}/verdict", json.dumps(content).encode(), headers)
    return json.load(urllib.request.urlopen(asked))


def press(browser: Browser, verdict: str) -> None:
    """The keys of a verdict; rejected for a seam, the fourth reason."""
    for key in {"accept": "a", "flag": "f", "reject": "r4"}[verdict]:
        browser.press(key)


def perfect(sample_id: str) -> str:
    """Every fourth image is bad."""
    return "reject" if int(sample_id[1:3]) % 4 == 0 else "accept"


def by_chance(sample_id: str) -> str:
    return "reject" if np.random.default_rng(int(sample_id[1:3])).random() < 0.5 else "accept"


def biased(sample_id: str) -> str:
    """All of one type are rejected, and one other image is flagged."""
    return "reject" if int(sample_id[1:3]) % 3 == 0 else "flag" if sample_id.startswith("p01") else "accept"


@in_browser
def test_scripted_reviewers(server: str, browser: Browser, drawn: Path) -> None:
    (drawn.parent / "data" / "p07" / "image.png").unlink()
    rules = {"Perfect": perfect, "Random": by_chance, "Biased": biased}
    said: dict[str, dict[str, str]] = {name: {} for name in rules}
    for reviewer, rule in rules.items():
        browser.open(server)
        browser.wait("document.getElementById('asking').open")
        browser.run(f"document.getElementById('code').value = '{reviewer}'")
        browser.run("document.getElementById('code-form').requestSubmit()")
        while len(said[reviewer]) < COUNT:
            shown = ready(browser, len(said[reviewer]))
            assert shown not in said[reviewer]
            if reviewer == "Perfect" and len(said[reviewer]) == 4:
                one_is_judged_anew_and_the_page_is_loaded_again(browser, server, said[reviewer], shown)
            if reviewer == "Random" and len(said[reviewer]) == 2:
                other = browser.run("review.state.items.at(-1).sample_id")
                said[reviewer][other] = rule(other)
                send(server, browser, "random", other, "accept")  # in another tab, and there twice
                if rule(other) == "reject":
                    said[reviewer][other] = "accept"
                press(browser, rule(shown))
                said[reviewer][shown] = rule(shown)
                continue
            if shown.startswith("p07"):
                assert "p07/image.png: is not there" in browser.run("document.getElementById('fault').textContent")
                assert browser.run("review.viewer.mode") == "off"
            said[reviewer][shown] = rule(shown)
            press(browser, rule(shown))
        browser.wait("!document.getElementById('summary').hidden")
        assert browser.run("document.getElementById('summary-title').textContent") == "All images are judged"
    counts = browser.run("document.getElementById('summary-text').textContent")
    assert counts.startswith("7 accepted, 4 rejected, 1 flagged. Kept in ")
    order = [[row.sample_id for row in read_reviews(drawn / "review.csv") if row.reviewer == name] for name in rules]
    assert list(dict.fromkeys(order[0])) != list(dict.fromkeys(order[2]))  # everybody's own

    assert tiny.call(review, drawn, "--agreement") == 0
    found = json.loads((drawn / "review_agreement.json").read_text())
    for row in found["reviewers"]:
        values = list(said[row["reviewer"]].values())
        assert [row["judged"], *(row[each] for each in ("accept", "reject", "flag"))] == [
            COUNT,
            *(values.count(each) for each in ("accept", "reject", "flag")),
        ]
        assert 0 <= row["median_seconds"] < 60
    for pair in found["pairs"]:
        both = [[said[pair[key]][name] for name in sorted(said[pair[key]])] for key in ("first", "second")]
        assert pair["kappa"]["value"] == pytest.approx(cohen_kappa_score(*both))
        rejected = [[each == "reject" for each in values] for values in both]
        assert pair["kappa_rejected"]["value"] == pytest.approx(cohen_kappa_score(*rejected))
        assert pair["kappa"]["low"] <= pair["kappa"]["value"] <= pair["kappa"]["high"]
    rates = {(row["lesion_type"], row["reviewer"]): row["reject"] / row["judged"] for row in found["verdicts"]}
    assert [rates[kind, "Biased"] for kind in TYPES] == [1, 0, 0]
    assert {row["reason"] for row in found["reasons"]} == {"seam"}
    assert "Cohen" in (drawn / "review_agreement.html").read_text()


def one_is_judged_anew_and_the_page_is_loaded_again(
    browser: Browser, server: str, said: dict[str, str], shown: str
) -> None:
    """Back, another verdict, and a reload: nothing is lost, and it goes on with the image where it was."""
    last = list(said)[-1]
    browser.press("z")
    scale = browser.run("review.viewer.view.scale")
    browser.press("p")
    browser.wait(f"review.item.sample_id === '{last}' && !review.busy")
    assert browser.run("review.viewer.view.scale") == scale  # the lesion is shown large in the next image too
    press(browser, "flag")
    browser.wait(f"review.item.sample_id === '{shown}' && !review.busy")
    assert browser.run(f"review.verdicts.get(review.state.items.find((i) => i.sample_id === '{last}').id)[0]") == "flag"
    browser.press("ArrowLeft")
    browser.wait(f"review.item.sample_id === '{last}' && !review.busy")
    press(browser, said[last])
    browser.wait(f"review.item.sample_id === '{shown}' && !review.busy")
    browser.press("r")  # a reason of one's own, thought better of
    browser.press("r")
    assert browser.run("document.activeElement.id") == "reason"
    browser.press("Escape")
    browser.press("Escape")
    assert browser.run("document.getElementById('rejecting').offsetHeight") == 0
    browser.open(browser.run("location.href"))
    assert ready(browser, len(said)) == shown
    assert browser.run("review.state.reviewer") == "Perfect"


@in_browser
def test_an_image_that_changes_while_it_is_shown_is_shown_again(server: str, browser: Browser, drawn: Path) -> None:
    browser.open(f"{server}/?reviewer=late")
    shown = ready(browser, 0)
    path = drawn / shown / "image.png"
    image = path.read_bytes()
    path.write_bytes(image + b" ")
    browser.press("a")
    browser.wait("!review.busy && document.getElementById('status').className === 'fault'")
    assert "has changed since it was shown" in browser.run("document.getElementById('status').textContent")
    assert ready(browser, 0) == shown
    browser.press("r")
    everything_can_be_pressed_and_read(browser)
    browser.press("Escape")
    browser.press("a")
    ready(browser, 1)
    assert read_reviews(drawn / "review.csv")[-1].image_sha256 == sha256_file(path)
    for filter in ("flag", "accept"):
        browser.run(f"document.getElementById('filter').value = '{filter}'")
        browser.run("document.getElementById('filter').dispatchEvent(new Event('change'))")
        if filter == "flag":
            browser.wait("!document.getElementById('summary').hidden")
            everything_can_be_pressed_and_read(browser)
    assert ready(browser, 1) == shown
    path.write_bytes(image)


def everything_can_be_pressed_and_read(browser: Browser) -> None:
    """Also below a message of many lines."""
    browser.run("void (document.getElementById('status').textContent += ' and again'.repeat(60))")
    for size in SIZES:
        with window(browser, *size):
            assert browser.run("document.getElementById('status').clientHeight") > 60
            assert flaws(browser) == []


# ----------------------------------------------------------------------------------------------- without a browser


def client(folder: Path, **more: Any) -> TestClient:
    app = make_app(routes(Queue(folder, folder / "review.csv", **more)), page="review.html")
    return TestClient(app, base_url="http://127.0.0.1:7861", headers={"X-MedSoft": "1"})


def test_requests_that_cannot_be_meant(few: Path) -> None:
    asked = client(few)
    items = asked.get("/api/review?reviewer=ann").json()["items"]
    name = items[0]["id"]
    path = few / items[0]["sample_id"] / "image.png"
    fine = {"reviewer": "ann", "sha256": sha256_file(path), "verdict": "reject", "reason": "seam"}
    for change, status, line in (
        ({"reviewer": "Ann Lee"}, 400, "reviewer: expected a code of 1 to 32 letters"),
        ({"reviewer": ""}, 400, "reviewer: expected a code"),
        ({"verdict": "maybe"}, 400, "verdict: Input should be"),
        ({"reason": " "}, 400, "reason: expected why the image is rejected"),
        ({"reason": "x" * 1500}, 400, "reason: expected text of at most 1000"),
        ({"sha256": "0" * 64}, 409, "has changed since it was shown"),
    ):
        answer = asked.post(f"/api/items/{name}/verdict", json=fine | change)
        assert (answer.status_code, line in answer.json()["error"]) == (status, True), answer.text
    assert asked.post("/api/items/none/verdict", json=fine).status_code == 404
    assert asked.get(f"/api/items/{name}/other").status_code == 400
    assert asked.get("/api/review?reviewer=a/b").status_code == 400
    assert not (few / "review.csv").exists()
    assert asked.post(f"/api/items/{name}/verdict", json=fine | {"reason": "two\n lines"}).status_code == 200
    assert asked.get("/api/verdicts?reviewer=ANN").json()["verdicts"] == {name: ["reject", "two lines"]}
    path.unlink()
    assert asked.get(f"/api/items/{name}").status_code == 410


def test_another_server_of_the_same_file_is_heard(few: Path) -> None:
    first, second = client(few), client(few, reviewer="ann")
    state = first.get("/api/review?reviewer=ann").json()
    item = state["items"][0]
    digest = second.get(f"/api/items/{item['id']}").json()["sha256"]
    content = {"reviewer": "ann", "sha256": digest, "verdict": "accept", "seconds": 1e8}
    second.post(f"/api/items/{item['id']}/verdict", json=content)
    assert first.get("/api/verdicts?reviewer=ann").json()["verdicts"] == {item["id"]: ["accept", ""]}
    assert read_reviews(few / "review.csv")[0].seconds == 86400
    assert first.get("/api/review").json()["reviewer"] is None
    assert second.get("/api/review").json()["reviewer"] == "ann"


def test_what_was_said_of_an_image_is_known_after_its_folder_was_renamed(few: Path) -> None:
    add_review(
        few / "review.csv", Review("p00__v0", "ann", "reject", sha256_file(few / "p00__v0" / "image.png"), "seam")
    )
    (few / "p00__v0").rename(few / "another")
    asked = client(few)
    state = asked.get("/api/review?reviewer=ann").json()
    names = {item["sample_id"]: item["id"] for item in state["items"]}
    assert state["verdicts"] == {names["another"]: ["reject", "seam"]}
    about = asked.get(f"/api/items/{names['another']}").json()
    content = {"reviewer": "ann", "sha256": about["sha256"], "verdict": "accept"}
    answer = asked.post(f"/api/items/{names['another']}/verdict", json=content).json()
    assert answer["verdicts"] == {names["another"]: ["accept", ""]}


def test_folders_and_files_that_cannot_be_reviewed(few: Path, tmp_path: Path) -> None:
    file = few / "review.csv"
    add_review(file, Review("elsewhere", "ann", "accept", "0" * 64))
    with pytest.raises(FileError, match=r"review.csv: is the review of other images"):
        tiny.call(review, few)
    with pytest.raises(FileError, match=r"review.csv: is the review of other images"):
        tiny.call(review, few, "--agreement")
    file.write_text(file.read_text().replace("accept", "maybe"))
    with pytest.raises(FileError, match=r"review.csv: line 2: verdict"):
        tiny.call(review, few)
    file.unlink()
    with pytest.raises(FileError, match=r"review.csv: this review does not exist"):
        tiny.call(review, few, "--agreement")
    with pytest.raises(UsageError, match=r"--review .*review.csv: the folder .* does not exist"):
        tiny.call(review, few, "--review", tmp_path / "no" / "review.csv")
    with pytest.raises(MedSoftError, match="reviewer: expected a code"):
        tiny.call(review, few, "--reviewer", "Ann Lee")
    with pytest.raises(UsageError, match="nothing: does not exist; expected results"):
        tiny.call(review, tmp_path / "nothing")
    with pytest.raises(UsageError, match="--review: is given several times"):
        tiny.call(review, few, "--review", "a.csv", "--review", "b.csv")
    with pytest.raises(UsageError, match="--reviewer: belongs to the page"):
        tiny.call(review, few, "--agreement", "--reviewer", "ann")
    for folder in few.glob("p*"):
        (folder / "prompt.txt").write_text("healthy")
    with pytest.raises(MedSoftError, match="holds no image with a lesion"):
        tiny.call(review, few)


def test_the_agreement_is_about_what_was_judged_and_no_copies_of_it(few: Path) -> None:
    """Of three equal pictures one verdict would count three times, and only where it is that they are rejected."""
    for folder, verdicts in (("p00__v0", ("reject", "reject")), ("p01__v0", ("accept", "reject"))):
        for who, verdict in zip(("ann", "bob"), verdicts, strict=True):
            add_review(few / "review.csv", Review(folder, who, verdict, sha256_file(few / folder / "image.png")))
    for name in ("copy", "another"):
        shutil.copytree(few / "p00__v0", few / name)
    (few / "p01__v0").rename(few / "moved")
    assert tiny.call(review, few, "--agreement") == 0
    found = json.loads((few / "review_agreement.json").read_text())
    assert [row["judged"] for row in found["reviewers"]] == [2, 2]
    assert (found["pairs"][0]["both"], found["samples"], found["never_reviewed"]) == (2, 5, 3)
    assert found["renamed"] == ["p01__v0"]
    assert "judged under another name" in (few / "review_agreement.html").read_text()


def test_agreement_needs_two_reviewers_who_may_have_written_two_files(few: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file, who in zip(files, ("ann", "bob"), strict=True):
        for folder in sorted(few.iterdir()):
            add_review(file, Review(folder.name, who, "accept", sha256_file(folder / "image.png")))
    with pytest.raises(UsageError, match=r"a.csv: holds the verdicts of one reviewer \(ann\)"):
        tiny.call(review, few, "--agreement", "--review", files[0])
    shutil.rmtree(few / "p02__v0")
    assert tiny.call(review, few, "--agreement", *(word for file in files for word in ("--review", file))) == 0
    found = json.loads((tmp_path / "a_agreement.json").read_text())
    assert (found["pairs"][0]["both"], found["pairs"][0]["agreement"]["value"], found["unknown"]) == (2, 1, ["p02__v0"])
    assert found["pairs"][0]["kappa"]["value"] is None
