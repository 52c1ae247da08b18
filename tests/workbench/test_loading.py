"""The editor answers while its model is loaded, and waits only for what it needs."""

import threading
from pathlib import Path
from typing import Any

import pytest

from ldm.core.errors import MedSoftError
from ldm.workbench import editor as module
from ldm.workbench.drafts import Drafts
from ldm.workbench.editor import Editor
from ldm.workbench.finding import find
from ldm.workbench.options import EditOptions


def test_a_prompt_is_read_once_the_tokenizer_is_there_and_before_the_model_is(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that import transformers at once see half of it, so the loading one comes first."""
    imported, loaded, happened = threading.Event(), threading.Event(), []

    def tokenizer() -> None:
        imported.wait()
        happened.append("tokenizer")

    def load(*given: Any) -> None:
        loaded.wait()
        raise MedSoftError("no model in this test")

    def read(*given: Any) -> dict[str, Any]:
        happened.append("read")
        return {}

    for name, put in (("clip_tokenizer", tokenizer), ("read_prompt", read), ("medsoft.load", load)):
        monkeypatch.setattr(f"{module.__name__}.{name}", put)
    options = EditOptions(path=world, ckpt=final, output_dir=tmp_path / "edited")
    edited = Editor(find(options), Drafts(options.output_dir), options)
    asked = threading.Thread(target=edited.read, args=("severe lesion",))
    asked.start()
    asked.join(0.2)  # without the wait it would have been read by now
    imported.set()
    asked.join(60)
    assert happened == ["tokenizer", "read"]
    assert edited.queue.state == "loading"
    loaded.set()
    with pytest.raises(MedSoftError, match="no model in this test"):
        edited.queue.wait()
    edited.queue.close()
