"""ldm/core/files.py and paths.py: on mounts that cannot do everything, and names that lead elsewhere."""

import errno
import os
import stat
from pathlib import Path

import pytest

from ldm.core import files
from ldm.core.errors import MedSoftError
from ldm.core.paths import confined
from ldm.data.folders import write_sample


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, name: str, kind: str = "any") -> None:
    """Let ``os.NAME`` fail, for every call or for those about a directory only."""
    plain = getattr(os, name)

    def call(what: object, *args: object, **more: object) -> object:
        if kind == "any" or stat.S_ISDIR(os.stat(what).st_mode):
            raise OSError(number, os.strerror(number))
        return plain(what, *args, **more)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_directory_that_cannot_be_synced_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, number, "fsync", "directory")
    files.write_text(tmp_path / "a.txt", "new")
    with files.atomic_folder(tmp_path / "folder") as partial:
        (partial / "b").write_text("new")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "folder" / "b").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_files_that_cannot_be_synced_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, number, "fsync")
    files.write_text(tmp_path / "a.txt", "new")
    write_sample(tmp_path / "sample", {"image.png": b"bytes"}, "healthy", {})
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "sample" / "image.png").read_bytes() == b"bytes"


def test_a_disk_that_fails_after_the_rename_is_not_called_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.EIO, "fsync", "directory")
    with pytest.raises(
        MedSoftError, match=r"a\.txt: could not be written \(Input/output error\); it is there, but may"
    ):
        files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    with (
        pytest.raises(MedSoftError, match=r"folder: could not be written \(Input/output error\); it is there, but may"),
        files.atomic_folder(tmp_path / "folder"),
    ):
        pass
    assert (tmp_path / "folder").is_dir()


def test_a_disk_that_fails_while_writing_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("old")
    refuse(monkeypatch, errno.EIO, "fsync")
    with pytest.raises(MedSoftError, match=r"Input/output error\); nothing was changed there"):
        files.write_text(tmp_path / "a.txt", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_neither_chmod_nor_the_umask_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some mounts refuse chmod; a umask that is 0 for a moment would give another thread's files to everybody."""
    for name in ("chmod", "fchmod", "lchmod", "umask"):
        if hasattr(os, name):
            refuse(monkeypatch, errno.EPERM, name)
    files.write_json(tmp_path / "a.json", [1])
    written = {"image.png": b"bytes", "mask.png": tmp_path / "a.json"}
    write_sample(tmp_path / "sample", written, "healthy", {})
    assert files.read_json(tmp_path / "sample" / "mask.png") == [1]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_new_files_have_the_rights_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


def test_names_inside_a_folder_are_paths_there(tmp_path: Path) -> None:
    for name in ("a", "a/b", "a/../b", "..a", "a b", "é"):
        assert confined(tmp_path, name) == tmp_path / name
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert confined(tmp_path / "link", "b") == tmp_path / "link" / "b"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../..", "a/../../b", "/etc/passwd", "out/a", "a\0b", "a/.."]
)
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(MedSoftError, match=r"leads out of .*folder; expected the name of something inside that folder"):
        confined(folder, name)
