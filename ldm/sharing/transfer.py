"""Sharing of a checkpoint with its card, by a folder or by the Hugging Face hub, and getting it back whole.

What is shared is a folder: model.safetensors (weights and what they say of themselves, no optimizer), the files of
the card, SHA256SUMS. The checksums find damage; they are no signature.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ldm.checkpoints.files import verify
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_folder, read_json, read_text, sha256_file, write_text
from ldm.core.paths import confined, walk
from ldm.core.tables import counted, shortened
from ldm.data.checks import TRAINED_ON
from ldm.sharing.card import CARD_FILES, MODEL_CARD, RECORD, portable

log = logging.getLogger(__name__)

MODEL, SUMS = "model.safetensors", "SHA256SUMS"
HARMLESS = {*CARD_FILES, "LICENSE", "LICENSE.md", "CITATION.cff"}  # files of a card that hold no image
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
MOST_WORDS = 300  # of what the hub's package says, which may be several lines
FULL = (errno.ENOSPC, errno.EDQUOT)
# What Python, httpx (by whatever name it is installed) and the hub's package raise where there is no way to the hub.
UNREACHED = {"ConnectionError", "TimeoutError", "gaierror", "TransportError"}
UNREACHED |= {"LocalEntryNotFoundError", "RevisionResolutionError"}
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class PushOptions:
    """What is shared, and where; the flags of tool/push.py. One of ``to_folder`` and ``repo`` is given."""

    ckpt: Path
    card: Path
    to_folder: Path | None
    repo: str | None
    public: bool
    with_images: bool
    with_patients: bool
    overwrite: bool


def push(options: PushOptions) -> None:
    """Share a checkpoint with its card.

    Raises UsageError without a card of this very checkpoint, for files beside the card that may hold images or names
    (unless ``with_images``), for a target folder that is there, and for a repository that everybody can read (unless
    ``public``); MedSoftError for a damaged checkpoint and for what the hub answers.
    """
    checkpoint = read_checkpoint(options.ckpt)
    extra = _check_card(options.card, checkpoint, options.with_images)
    if options.to_folder is not None:
        _check_free(f"--to_folder {options.to_folder}", options.to_folder, options.overwrite)
        if options.public:
            raise UsageError("--public belongs to --repo")
        with atomic_folder(options.to_folder) as folder:
            _fill(folder, checkpoint, options, extra)
        log.info("written: %s", options.to_folder)
        return
    if not REPOSITORY.fullmatch(options.repo or ""):
        raise UsageError(f"--repo {options.repo}: expected OWNER/NAME")
    with tempfile.TemporaryDirectory(prefix=".push-", dir=options.card.parent) as place:
        folder = Path(place)
        _fill(folder, checkpoint, options, extra)
        _upload(folder, str(options.repo), options.public)


def _check_free(flag: str, folder: Path, overwrite: bool) -> None:
    """UsageError for a folder that is there, unless ``overwrite`` is given and it holds what was shared or pulled."""
    if not folder.exists():
        return
    if not overwrite:
        raise UsageError(f"{flag}: is there already; give another one, or --overwrite")
    if not (folder / SUMS).is_file():
        raise UsageError(f"{flag}: holds no {SUMS}, so neither push nor pull wrote it: give another one")


def _check_card(card: Path, checkpoint: Checkpoint, with_images: bool) -> list[Path]:
    """The files of the card's folder that go along, as they lie below it."""
    for name in (MODEL_CARD, RECORD):
        if not (card / name).is_file():
            raise UsageError(
                f"{card / name}: is missing, and nothing is shared without a card; medsoft card writes one"
            )
    record = read_json(card / RECORD)
    if not isinstance(record, dict) or record.get("ckpt_sha256") != checkpoint.sha256():
        raise UsageError(
            f"{card}: is the card of another checkpoint than {checkpoint.path}; write this one's with medsoft card"
        )
    files = sorted((place / name).relative_to(card) for place, names in walk(card) for name in names)
    more = [file for file in files if file.as_posix() not in HARMLESS]
    if more and not with_images:
        raise UsageError(
            f"{card / more[0]}: is not one of a card's files "
            f"({counted(len(more), 'such file is', 'such files are')} there), and may hold images or names of "
            "patients; take out what is none, or give --with_images if it may be shared"
        )
    if taken := [file for file in files if file.as_posix() in (MODEL, SUMS)]:
        raise UsageError(f"{card / taken[0]}: has the name of a file that is written while sharing; rename it")
    return files


def _fill(folder: Path, checkpoint: Checkpoint, options: PushOptions, files: list[Path]) -> None:
    """Write all that is shared into ``folder``."""
    log.info("checked: %s, %s", options.ckpt, verify(options.ckpt))
    metadata = portable(checkpoint.metadata)
    if not options.with_patients and metadata.get(TRAINED_ON):
        del metadata[TRAINED_ON]
        log.warning(
            "warning: %s: shared without the digests of the patients behind it, so whoever takes it cannot keep them "
            "out of validation and test sets; --with_patients shares them",
            options.ckpt,
        )
    write_checkpoint(folder / MODEL, checkpoint.state, metadata, checkpoint)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.card / file, folder / file)
    names = [MODEL, *(file.as_posix() for file in files)]
    write_text(folder / SUMS, "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names))


def _upload(folder: Path, repo: str, public: bool) -> None:
    import huggingface_hub

    with _hub_errors(repo):
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        hidden = api.repo_info(repo).private
        if hidden or public:
            done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model, card and checksums")
    if not hidden and not public:
        raise UsageError(f"--repo {repo}: everybody can read it; nothing was shared, give --public if that is meant")
    log.info("shared: %s (%s), commit %s", repo, "private" if hidden else "public", getattr(done, "oid", "?"))
    if hidden and public:
        log.warning("warning: %s was there already and stays private; its settings on the hub make it public", repo)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What goes wrong between here and the hub, as one line: of which kind it is, the package's own words, a cure."""
    try:
        yield
    except Exception as error:  # of the hub's package, of the connection, of the disk
        what, cure = _fault(error)
        words = shortened(" ".join(str(error).split()), MOST_WORDS) or type(error).__name__
        raise MedSoftError(f"{repo}: {what} ({words}){cure and '; '}{cure}") from error


def _fault(error: Exception) -> tuple[str, str]:
    """What has failed, and what to do about it, where the error tells."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
        return "the disk is full", "make room, there or where TMPDIR and HF_HOME lie, and run the same command again"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision", "give another --revision, or none"
    if isinstance(error, errors.GatedRepoError):
        return "its owner admits readers one by one", "ask for access on its page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and "EntryNotFoundError" not in kinds):
        cure = "look at the name; `hf auth login` gives access to a private one"
        return "there is no such repository, or you may not see it", cure
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "you are not logged in, or your token is no longer valid", "`hf auth login`"
    if status == 403:
        return "your login may not do that", "`hf auth login` with a token that may, or ask the repository's owner"
    if kinds & UNREACHED:
        return "the hub cannot be reached", "look at the network, and that HF_HUB_OFFLINE is not set"
    return "the hub failed", ""


def pull(source: Path | str, output_dir: Path, revision: str | None, overwrite: bool) -> None:
    """Get what ``push`` has shared from a folder (a Path) or a repository (a text), verified, into ``output_dir``.

    Only files of SHA256SUMS are taken. Raises MedSoftError for one that is missing or differs, with nothing written.
    """
    _check_free(f"--output_dir {output_dir}", output_dir, overwrite)
    if isinstance(source, Path):
        if revision is not None:
            raise UsageError("--revision belongs to --repo")
        _take(source, source, output_dir)
        return
    if not REPOSITORY.fullmatch(source):
        raise UsageError(f"--repo {source}: expected OWNER/NAME")
    import huggingface_hub

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=output_dir.parent) as place:
        with _hub_errors(source):
            huggingface_hub.snapshot_download(source, revision=revision, local_dir=place)
        _take(Path(place), source, output_dir)


def _take(folder: Path, source: Path | str, output_dir: Path) -> None:
    """Copy the files that ``folder`` lists in SHA256SUMS, each compared with its sum; ``source`` is for messages."""
    if not (folder / SUMS).is_file():
        raise MedSoftError(f"{source}: holds no {SUMS}, so it was not shared by medsoft push, or is incomplete")
    lines = read_text(folder / SUMS).splitlines()
    sums = {found[2]: found[1] for line in lines if (found := _SUM.fullmatch(line))}
    if len(sums) != len(lines) or MODEL not in sums:
        raise MedSoftError(
            f"{source}: its {SUMS} is damaged; expected lines of a SHA-256 and a name, {MODEL} among them"
        )
    with atomic_folder(output_dir) as taken:
        for name, digest in sums.items():
            file = confined(folder, name)
            if not file.is_file():
                raise MedSoftError(f"{source}: {name} of its {SUMS} is missing; get it again")
            (taken / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, taken / name)
            if (now := sha256_file(taken / name)) != digest:
                raise MedSoftError(f"{source}: {name} is damaged: SHA-256 {now}, in {SUMS} {digest}; get it again")
        shutil.copyfile(folder / SUMS, taken / SUMS)
        verify(taken / MODEL)
    log.info("written: %s, %s as %s says", output_dir, counted(len(sums), "file"), SUMS)
