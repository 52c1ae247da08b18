"""A sample, and a sample that cannot be used."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEALTHY = "healthy"


@dataclass(frozen=True)
class Sample:
    """One image with its mask and sentence. Paths are absolute; ``box`` is x, y, w, h as fractions of the image."""

    sample_id: str
    image: Path
    mask: Path | None
    prompt: str
    box: tuple[float, float, float, float]
    patient_id: str
    anatomy: Path | None = None
    soft_mask: Path | None = None
    parent_id: str | None = None
    lesion_type: str | None = None
    level: str | None = None
    severity: str | None = None
    synthetic: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """True if the prompt says so."""
        return self.prompt.strip().lower() == HEALTHY


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used: its id, the file at fault (as the user named its folder) and the reason."""

    sample_id: str
    file: Path
    reason: str

    def __str__(self) -> str:
        return shown(f"{self.file}: {self.reason}")


def shown(text: object) -> str:
    """``text`` on one printable line, whatever characters a folder name contains."""
    text = str(text)
    return text if text.isprintable() else ascii(text)[1:-1]
