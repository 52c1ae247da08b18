"""The flags of the commands that serve pages, and what they say where FastAPI is missing. Nothing heavy is imported."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError
from ldm.core.paths import shipped

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("fastapi", "uvicorn", "python_multipart")  # of the extra `edit`
PORT = cli.Number(int, 1, 65535)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{8,128}")


def require_extra() -> None:
    """UsageError with the line that installs the extra ``edit``, where a package of it is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the packages that serve pages to a browser are not installed (missing: {', '.join(missing)}): "
            "in the repository's folder run python -m pip install -e '.[edit]'"
        )


@dataclass(frozen=True)
class ServerOptions:
    """The flags of every command that serves."""

    host: str = cli.flag(
        "address to listen on; with another one than this machine's own 127.0.0.1, who calls needs the token",
        "127.0.0.1",
    )
    port: int = cli.flag("port to listen on", 7860, type=PORT)
    token: str | None = cli.flag(
        "what a caller has to know: 8 to 128 letters, digits, - or _ (default: none with 127.0.0.1, else a random one, "
        "which is printed)"
    )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can call."""
        return self.host in LOOPBACK

    def check_token(self) -> None:
        """UsageError for a token that an address or a cookie could not hold as it is."""
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise UsageError(f"--token: expected 8 to 128 letters, digits, - or _, found {self.token!r}")


@dataclass(frozen=True)
class PageOptions(ServerOptions):
    """The flags of every command that serves pages."""

    no_browser: bool = cli.flag("do not open the page in a browser", False)


@dataclass(frozen=True)
class EditOptions(PageOptions):
    """The flags of tool/edit.py, under their names; ``path`` and ``overrides`` are its positional arguments."""

    path: Path | None = None
    ckpt: Path | None = cli.flag("a final checkpoint (default: the one found beside PATH)")
    config: Path | None = cli.flag("model YAML (default: config.yaml beside the checkpoint)")
    train_json: Path | None = cli.flag("training annotations, for the sentences (default: those found beside PATH)")
    output_dir: Path = cli.flag("folder to write: drafts/, accepted/, history.jsonl", Path("edited"))
    device: str = cli.flag("auto, cpu, cuda, cuda:1, ...", "auto")
    overrides: Sequence[str] = ()  # KEY=VALUE of the YAML

    def validate(self) -> None:
        """UsageError for flags that cannot be meant and for paths that are not there."""
        self.check_token()
        for name in ("path", "ckpt", "config", "train_json"):
            given = getattr(self, name)
            if given is not None and not given.exists():
                raise UsageError(f"{'PATH' if name == 'path' else f'--{name}'} {given}: does not exist")
        for word in self.overrides:
            if "=" not in word:
                raise UsageError(f"{word}: expected KEY=VALUE of the YAML, such as sampling.steps=8; PATH is only one")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServerOptions):
    """The flags of tool/serve.py, under their names; ``overrides`` is its positional argument."""

    ckpt: Path = cli.flag("a final checkpoint, such as stage2_2/last.ckpt", MISSING)
    config: Path | None = cli.flag("model YAML (default: config.yaml beside the checkpoint)")
    port: int = cli.flag("port to listen on", 8000, type=PORT)
    per_minute: int = cli.flag("at most so many images are drawn in a minute", 60, type=cli.Number(int, 1, 10**6))
    device: str = cli.flag("auto, cpu, cuda, cuda:1, ...", "auto")
    overrides: Sequence[str] = ()  # KEY=VALUE of the YAML

    def validate(self) -> None:
        """UsageError for flags that cannot be meant and for files that are not there."""
        self.check_token()
        for name in ("ckpt", "config"):
            given = getattr(self, name)
            if given is not None and not shipped(given).is_file():
                raise UsageError(f"--{name} {given}: does not exist, or is no file")


@dataclass(frozen=True)
class ReviewOptions(PageOptions):
    """The flags of tool/review.py, under their names; ``results`` is its positional argument."""

    results: Path = Path()
    port: int = cli.flag("port to listen on", 7861, type=PORT)
    reviewer: str | None = cli.flag("your code, letters and digits (default: the page asks)", metavar="CODE")
    review: Sequence[Path] | None = cli.flag(
        "the file of verdicts (default: RESULTS/review.csv, of an annotation file NAME.review.csv beside it); with "
        "--agreement it may be given several times",
        metavar="FILE",
        action="append",
        type=Path,
    )
    agreement: bool = cli.flag("say how far the reviewers of the file agree, and serve nothing", False)

    @property
    def files(self) -> list[Path]:
        """The files of verdicts."""
        beside = self.results / "review.csv" if self.results.is_dir() else self.results.with_suffix(".review.csv")
        return [*self.review] if self.review else [beside]

    def validate(self) -> None:
        """UsageError for flags that cannot be meant and for results that are not there."""
        self.check_token()
        if not self.results.exists():
            raise UsageError(f"{self.results}: does not exist; expected results of dataset_infer.py")
        if len(self.files) > 1 and not self.agreement:
            raise UsageError("--review: is given several times, which only --agreement takes; the page writes one file")
        if self.agreement and self.reviewer:
            raise UsageError("--reviewer: belongs to the page; --agreement is about all reviewers of the file")
