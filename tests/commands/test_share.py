"""tool/card.py, tool/push.py and tool/pull.py: what a card says and does not say, what is shared, what is refused."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from tiny import TEST, TRAIN, VAL, call

from ldm.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import read_json, sha256_file, write_json
from ldm.data.annotations import load_samples
from ldm.data.checks import trained_on
from ldm.sharing.claim import ITEMS, where_table
from tool import card, pull, push

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = {
    "distances": {"frechet": {"value": 2.859, "low": 0.0, "high": 6.409, "between_halves_of_real": 2.8}},
    "copies": {"count": 3, "threshold": 0.95},
    "warnings": ["The real lesions are of 9 patients."],
}
METRICS = {
    "test": {
        "auc": {"value": 0.801, "low": 0.745, "high": 0.854},
        "recall": {"value": None, "low": None, "high": None},
    },
    "confusion": [[90, 30], [37, 83]],
    **{"n_train_healthy": 161, "n_train_diseased": 35, "n_synthetic_used": 7, "n_test": 240, "n_test_patients": 238},
    "notes": ["Training had not converged."],
}


@pytest.fixture(scope="module")
def ckpt(world: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MSC as stage 1 leaves it after the world's training set."""
    found = read_checkpoint(converted)
    patients = [sample.patient_id for sample in load_samples(world / TRAIN)[0]]
    about = {"stage": "stage1", "step": 3, "complete": True, "biomedclip": "ab" * 32}
    about |= {"trained_on": trained_on("stage1", patients), "origin": {"file": "x.ckpt", "sha256": "cd" * 32}}
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    state = {key: value.clone() for key, value in found.state.items() if key.startswith("msc.")}
    write_checkpoint(path, state, {"config": found.metadata["config"], **about}, optimizer_states=[torch.ones(9)])
    return path


def write_card(ckpt: Path, folder: Path, *more: Any) -> Path:
    assert call(card, ckpt, "--output_dir", folder, *more) == 0
    return folder


@pytest.fixture
def carded(ckpt: Path, tmp_path: Path) -> Path:
    return write_card(ckpt, tmp_path / "card")


def test_card_says_what_the_records_say(world: Path, ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    given = ["--train", world / TRAIN, "--val", world / VAL, "--test", world / TEST]
    given += ["--results", tmp_path / "eval", tmp_path / "metrics.json", "--license", "cc-by-nc-4.0", "--name", "Spine"]
    folder = write_card(ckpt, tmp_path / "card", *given)
    text = (folder / "README.md").read_text()
    assert huggingface_hub.ModelCard(text).data.license == "cc-by-nc-4.0"
    for line in (
        "# Spine",
        "**Not for clinical use.**",
        "stage1: 9 patients (the checkpoint's own record).",
        "| optimizer steps | 3 |",
        f"| made from | x.ckpt ({'cd' * 32}) |",
        "| class | diseased | 4 |",
        "| distances frechet | 2.859 | 0 to 6.409 |",
        "| auc | 0.801 | 0.745 to 0.854 |",
        "| recall | none | none |",
        "Trained on 161 healthy and 35 diseased real images and 7 synthetic ones; tested on 240 images of 238",
        "Copies of training images found among the drawn ones: 3.",
        "- Training had not converged.",
    ):
        assert line in text
    data = (folder / "DATA.md").read_text()
    assert "| patients | 9 | 3 | 4 |" in data
    assert "| patients behind the weights | 9 | 0 | 0 |" in data
    assert "| class | healthy | 5 | 1 | 2 |" in data
    assert data.index("| level | T10 |") < data.index("| level | L1 |")  # from the head down
    claim = (folder / "CLAIM.md").read_text()
    assert claim.count("\n| ") - 2 == len(ITEMS) == 44  # a head and its rule
    assert "none of val and test is among those" in claim
    beside = [line.split(" | ")[2] for line in claim.splitlines() if line.startswith("| ") and line[2].isdigit()]
    filled = len(beside) - beside.count("to be written by the authors") - 3
    assert f"{filled} of 44 have something from run records beside them" in claim
    assert "Items 1, 27, 41 have the same text for every checkpoint" in claim
    assert "[[90, 30], [37, 83]]" in claim
    names = {
        name
        for part in (TRAIN, VAL, TEST)
        for s in load_samples(world / part)[0]
        for name in (s.sample_id, s.patient_id)
    }
    everything = "".join(path.read_text() for path in folder.iterdir())
    assert not [name for name in [*names, str(tmp_path), str(world)] if name in everything]


def test_a_card_says_whether_its_checkpoint_drew_what_a_record_is_about(
    ckpt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, other = sha256_file(ckpt), "ef" * 32
    drawn = {
        "All of its 5 synthetic images were drawn by this checkpoint.": [(ours, 5)],
        "**6 of its 8 synthetic images were not drawn by this checkpoint.**": [(other, 4), (None, 2), (ours, 2)],
        "No synthetic image had a part in it.": [],
    }
    for number, (text, counts) in enumerate(drawn.items()):
        behind = [{"checkpoint_sha256": digest, "method": None, "samples": count} for digest, count in counts]
        (tmp_path / "metrics.json").write_text(json.dumps(METRICS | {"drawn_by": behind}))
        caplog.clear()
        folder = write_card(ckpt, tmp_path / str(number), "--results", tmp_path / "metrics.json")
        assert text in (folder / "README.md").read_text()
        assert (f"images that {ckpt} did not draw ({other}, no checkpoint)" in caplog.text) == (len(counts) > 1)
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    folder = write_card(ckpt, tmp_path / "card", "--results", tmp_path / "metrics.json")
    assert "It does not say which checkpoint drew its images" in (folder / "README.md").read_text()


def test_a_card_names_the_record_that_was_read(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "metrics.json"
    record.write_text(json.dumps(METRICS))

    def read(path: Path) -> Any:
        found = read_json(path)
        write_json(path, METRICS | {"n_test": 7})  # classifier.py has ended once more
        return found

    monkeypatch.setattr("ldm.sharing.facts.read_json", read)
    with pytest.raises(MedSoftError, match=r"metrics\.json: was replaced or changed after it had been read"):
        write_card(ckpt, tmp_path / "card", "--results", record)


def test_spacing_of_two_numbers_is_counted(world: Path, ckpt: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    for number, folder in enumerate(sorted(path.parent for path in (tmp_path / "data").rglob("image.png"))):
        file = folder / "meta.json"
        meta = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(meta | {"spacing_mm": [0.4, 0.6] if number else 0.8}))
    text = (write_card(ckpt, tmp_path / "card", "--train", tmp_path / "data") / "DATA.md").read_text()
    assert "| mm a pixel: least, median, most | 0.5, 0.5, 0.8 |" in text


def test_what_is_unknown_is_said(ckpt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    carded = write_card(ckpt, tmp_path / "card")
    text = (carded / "README.md").read_text()
    assert huggingface_hub.ModelCard(text).data.license == "unknown"
    assert "None: no evaluation was given to the card." in text
    assert "how many samples of which class it was trained on (--train)" in text.split("## Not known")[1]
    assert "not known, and the card says so: under which licence" in caplog.text
    assert not (carded / "DATA.md").exists()
    assert "| 44 | funding | to be written by the authors |" in (carded / "CLAIM.md").read_text()


REFUSED: dict[str, tuple[Callable[[Path], list], type[Exception], str]] = {
    "another training set": (lambda world: ["--train", world / TEST], MedSoftError, "none of its patients is among"),
    "a test set it has seen": (lambda world: ["--test", world / TRAIN], MedSoftError, "--test .*patient"),
    "no results": (lambda world: ["--results", world], UsageError, "expected evaluation.json or metrics.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_records_that_do_not_belong_to_it(world: Path, ckpt: Path, tmp_path: Path, case: str) -> None:
    given, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call(card, ckpt, "--output_dir", tmp_path / "card", *given(world))
    assert not (tmp_path / "card").exists()


def test_a_card_is_not_replaced_and_not_of_any_file(carded: Path, ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"README\.md: is there already, perhaps edited"):
        write_card(ckpt, carded)
    torch.save({"state_dict": {"msc.a": torch.ones(1)}}, tmp_path / "bare.ckpt")
    with pytest.raises(MedSoftError, match="says nothing of itself"):
        write_card(tmp_path / "bare.ckpt", tmp_path / "other")


# --------------------------------------------------------------------------------------------------------- push, pull


def shared(ckpt: Path, carded: Path, *more: Any) -> Path:
    folder = carded.parent / "shared"
    assert call(push, ckpt, carded, "--to_folder", folder, *more) == 0
    return folder


@pytest.mark.parametrize("patients", [True, False])
def test_there_and_back(ckpt: Path, carded: Path, tmp_path: Path, patients: bool) -> None:
    """Weights bit for bit, no optimizer; digests of patients only where they are asked for."""
    folder = shared(ckpt, carded, *["--with_patients"] * patients)
    assert call(pull, "--from_folder", folder, "--output_dir", tmp_path / "pulled") == 0
    found, before = read_checkpoint(tmp_path / "pulled" / "model.safetensors"), read_checkpoint(ckpt)
    assert found.state.keys() == before.state.keys()
    assert all(torch.equal(found.state[key], before.state[key]) for key in before.state)
    assert not found.rest
    assert found.metadata["stage"] == "stage1"
    assert ("trained_on" in found.metadata) is patients
    assert found.config.biomedclip.path == "./biomedclip"
    names = {path.name for path in (tmp_path / "pulled").iterdir()}
    assert names == {"model.safetensors", "README.md", "CLAIM.md", "config.yaml", "card.json", "SHA256SUMS"}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda folder: damage(folder / "model.safetensors"), r"model\.safetensors is damaged: SHA-256"),
    "a missing file": (lambda folder: (folder / "README.md").unlink(), r"README\.md of its SHA256SUMS is missing"),
    "no sums": (lambda folder: (folder / "SHA256SUMS").unlink(), "holds no SHA256SUMS"),
    "a name outside": (
        lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n{'0' * 64}  ../x\n"),
        "leads out of|is damaged",
    ),
    "no lines": (lambda folder: (folder / "SHA256SUMS").write_text("nothing\n"), "its SHA256SUMS is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_came_damaged_is_not_taken(ckpt: Path, carded: Path, tmp_path: Path, fault: str) -> None:
    folder = shared(ckpt, carded)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(MedSoftError, match=message):
        call(pull, "--from_folder", folder, "--output_dir", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_nothing_is_shared_without_a_card_or_with_images(ckpt: Path, converted: Path, carded: Path) -> None:
    with pytest.raises(UsageError, match="is the card of another checkpoint"):
        shared(converted, carded)
    (carded / "sheet.png").write_bytes(b"pixels")
    with pytest.raises(UsageError, match=r"sheet\.png: is not one of a card's files \(1 such file is there\), and may"):
        shared(ckpt, carded)
    assert (shared(ckpt, carded, "--with_images") / "sheet.png").read_bytes() == b"pixels"
    with pytest.raises(UsageError, match="is there already"):
        shared(ckpt, carded, "--with_images")
    other = carded.parent / "run"
    other.mkdir()
    with pytest.raises(UsageError, match=r"run: holds no SHA256SUMS, so neither push nor pull wrote it"):
        call(push, ckpt, carded, "--with_images", "--to_folder", other, "--overwrite")
    with pytest.raises(UsageError, match="--public belongs to --repo"):
        call(push, ckpt, carded, "--with_images", "--to_folder", carded.parent / "new", "--public")
    (carded / "README.md").unlink()
    with pytest.raises(UsageError, match=r"README\.md: is missing, and nothing is shared without a card"):
        shared(ckpt, carded, "--overwrite")


def test_by_the_hub(ckpt: Path, carded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub's client: a folder; the repository is made private; what it raises is one line."""
    made, hub, repository = [], tmp_path / "hub", SimpleNamespace(private=False)

    class Client:
        def create_repo(self, repo: str, **how: Any) -> None:
            made.append((repo, how))

        def repo_info(self, repo: str) -> SimpleNamespace:
            return repository

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            shutil.copytree(folder_path, hub)

    def download(repo: str, revision: str | None, local_dir: str) -> None:
        if not hub.exists():
            raise ConnectionError("no way there\nand more")
        shutil.copytree(hub, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        MedSoftError, match=r"^a/b: the hub cannot be reached \(no way there and more\); look at the network"
    ):
        call(pull, "--repo", "a/b", "--output_dir", tmp_path / "pulled")
    with pytest.raises(UsageError, match="--repo a/b: everybody can read it; nothing was shared, give --public"):
        call(push, ckpt, carded, "--repo", "a/b")
    assert not hub.exists()
    repository.private = True
    assert call(push, ckpt, carded, "--repo", "a/b") == 0
    assert made == [("a/b", {"private": True, "exist_ok": True})] * 2
    assert call(pull, "--repo", "a/b", "--output_dir", tmp_path / "pulled") == 0
    assert (tmp_path / "pulled" / "model.safetensors").exists()
    assert not list(tmp_path.glob(".pu*"))
    with pytest.raises(UsageError, match="--revision belongs to --repo"):
        call(pull, "--from_folder", hub, "--revision", "main", "--output_dir", tmp_path / "no")
    for command, given in ((push, [ckpt, carded]), (pull, ["--output_dir", tmp_path / "no"])):
        with pytest.raises(UsageError, match="--repo nobody: expected OWNER/NAME"):
            call(command, *given, "--repo", "nobody")


def answered(kind: str, status: int, words: str = "Client Error.") -> Exception:
    answer = SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(errors, kind)(f"{status} {words}\n\nIts own sentence.", response=answer)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answered("RepositoryNotFoundError", 401), "there is no such repository, or you may not see it (401 Client"),
        (answered("HfHubHTTPError", 404), "there is no such repository, or you may not see it"),
        (answered("RevisionNotFoundError", 404), "the repository has no such revision"),
        (answered("GatedRepoError", 403), "its owner admits readers one by one"),
        (answered("HfHubHTTPError", 401), "you are not logged in, or your token is no longer valid"),
        (errors.LocalTokenNotFoundError("Its own sentence."), "you are not logged in, or your token"),
        (answered("HfHubHTTPError", 403), "your login may not do that"),
        (ConnectionRefusedError(111, "Its own sentence."), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("Its own sentence."), "the hub cannot be reached"),
        (errors.LocalEntryNotFoundError("Its own sentence."), "the hub cannot be reached"),
        (OSError(errno.ENOSPC, "No space left on device. Its own sentence."), "the disk is full"),
        (RuntimeError("Its own sentence. No space left on device (os error 28)"), "the disk is full"),
        (answered("HfHubHTTPError", 503, "Server Error."), "the hub failed (503 Server Error. Its own sentence.)"),
        (RuntimeError(), "the hub failed (RuntimeError)"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def download(*_: str, **__: str) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(MedSoftError, match=rf"^a/b: {re.escape(said)}") as caught:
        call(pull, "--repo", "a/b", "--output_dir", tmp_path / "pulled")
    assert ("Its own sentence." in str(caught.value)) == bool(str(error))
    assert "\n" not in str(caught.value)


def test_no_way_to_the_hub_is_said_by_its_own_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose error has other names from release to release: a port at which nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MedSoftError, match=r"^a/b: the hub cannot be reached \(.+\); look at the network"):
        call(pull, "--repo", "a/b", "--output_dir", tmp_path / "pulled")


# ------------------------------------------------------------------------------------------------- pages, Dockerfile


def test_the_page_of_the_checklist_has_the_items_of_the_command() -> None:
    assert where_table() in (ROOT / "docs" / "claim.md").read_text()


def test_every_file_that_an_item_names_is_there_or_written() -> None:
    written = "".join(path.read_text() for path in (ROOT / "ldm").rglob("*.py"))
    pattern = r"`([\w/]+\.(?:csv|html|json|lock|md|py|yaml))`"
    named = {name for item in ITEMS for name in re.findall(pattern, item.where)}
    assert len(named) > 12
    assert [name for name in sorted(named) if not (ROOT / name).exists() and f'"{name}"' not in written] == []


def test_the_container_copies_files_that_are_there_and_not_ignored() -> None:
    """Not built here: instructions are known ones, and what they copy is let in by .dockerignore."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and line[0] != "#"]
    assert {line[0] for line in words} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    copied = {name for line in words if line[0] == "COPY" for name in line[1:-1]}
    let_in = {line[1:].strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert all(list(ROOT.glob(name)) for name in copied)
