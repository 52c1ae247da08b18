"""Judgements of drawings and their history behind the editor's routes: changed, kept, on a full disk."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from editing import Page

from ldm.core.errors import MedSoftError
from ldm.workbench import drafts
from ldm.workbench.drafts import Drafts
from ldm.workbench.editing import kept
from ldm.workbench.editor import Editor


def test_the_command_that_is_named_at_the_end_can_be_copied(tmp_path: Path) -> None:
    (tmp_path / "my drawings/accepted/x").mkdir(parents=True)
    (tmp_path / "my drawings/accepted/x/meta.json").touch()
    said = kept(Drafts(tmp_path / "my drawings"))
    assert said.startswith(f"1 accepted drawing in {tmp_path}/my drawings/accepted; ")
    assert said.endswith(f"medsoft review '{tmp_path}/my drawings/accepted'")


def test_judgements_can_be_changed_and_outlive_the_server(page: Page, deep: Path) -> None:
    (name,) = page.draw(page.open(deep), seed=21)["results"]
    assert page.post(f"results/{name}/reject", reason="a seam")["state"] == "rejected"
    assert page.post(f"results/{name}/accept")["reason"] is None
    item = page.post(f"results/{name}/reject", reason="too dark")
    assert (item["state"], item["reason"], Path(item["folder"]).parent) == (
        "rejected",
        "too dark",
        page.editor.drafts.drafts,
    )
    page.post(f"results/{name}/accept")
    item = page.post(f"results/{name}/undo")
    assert (item["state"], item["reason"], Path(item["folder"]).parent.name) == ("new", None, "drafts")
    page.post(f"results/{name}/accept")
    home = page.editor.drafts.home
    assert f"in {home}/accepted; for a second look by somebody else: medsoft review" in kept(page.editor.drafts)
    assert kept(Drafts(home / "other")) == f"0 drawings kept in {home}/other/drafts, none accepted yet"
    with (home / "history.jsonl").open("a") as file:
        file.write('{"id": "cut sho')  # a crash in the middle of a line
    shutil.copytree(page.get(f"results/{name}")["folder"], home / "drafts" / "deep_00000000beef__v0")  # and before one
    again = Drafts(home)
    assert again.item(name) == page.editor.drafts.item(name)
    assert [each for each in again.items() if each["name"] != "deep_00000000beef__v0"] == page.get("history")
    assert again.item("00000000beef-0")["prompt"] == "severe osteolytic lesion"
    lines = (home / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["id"] == "00000000beef-0"  # not behind what the crash has left of a line
    reopened = Editor(page.editor.found._replace(path=None), again, page.editor.options)
    other = Page(reopened)
    assert other.get("state")["document"] is None
    document = page.editor.drafts.item(name)["document"]
    assert other.get(f"documents/{document}") == page.get(f"documents/{document}")
    deep.unlink()
    third = Page(Editor(page.editor.found._replace(path=None), again, page.editor.options))
    assert "does not exist" in third.fault(f"documents/{document}", 410)
    for each in (reopened, third.editor):
        each.queue.close()


def test_the_history_is_told_in_pages(page: Page, deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = page.draw(page.open(deep), seed=61, n=4)["results"]
    everything = page.get("history")
    assert [each["id"] for each in everything[-4:]] == drawn
    monkeypatch.setattr(drafts, "PAGE", 3)
    assert page.get("state")["history"] == page.get("history") == everything[-3:]
    assert page.get(f"history?before={drawn[1]}") == everything[:-3][-3:]
    assert page.get(f"history?before={everything[0]['id']}") == []
    assert "no drawing none is known" in page.fault("history?before=none", 404)
    assert page.get(f"results/{drawn[0]}") == everything[-4]
    assert "no drawing none is there" in page.fault("results/none", 404)


def test_a_full_disk_on_accept_changes_nothing(page: Page, deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = page.draw(page.open(deep), seed=31)["results"]
    before, history = page.editor.drafts.item(name), (page.editor.drafts.home / "history.jsonl").read_bytes()

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("sync", "os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{drafts.__name__}.{function}", full)
            line = page.fault(f"results/{name}/accept", now=True)
        assert line.endswith("could not be written (No space left on device); nothing was changed")
        assert page.editor.drafts.item(name) == before
        assert (page.editor.drafts.home / "history.jsonl").read_bytes() == history
    assert page.post(f"results/{name}/accept")["state"] == "accepted"


def test_a_full_disk_while_drawing_is_said_and_what_was_drawn_stays(
    page: Page, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, document = drafts.Drafts.add, page.open(deep)

    def once(self: Drafts, item: dict[str, Any]) -> str:
        if item["variant"]:
            raise MedSoftError("history.jsonl: could not be written (No space left on device)")
        return plain(self, item)

    monkeypatch.setattr(drafts.Drafts, "add", once)
    job = page.draw(document, n=3, seed=41)
    assert (job["state"], len(job["results"])) == ("failed", 1)
    assert "No space left on device" in job["error"]
    assert page.editor.drafts.item(job["results"][0])["state"] == "new"
