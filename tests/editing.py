"""The editor's page without a browser: what it asks the server, for tests of `medsoft edit`."""

import base64
import time
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from ldm.workbench.drafts import Drafts
from ldm.workbench.editing import routes
from ldm.workbench.editor import Editor
from ldm.workbench.finding import find
from ldm.workbench.options import EditOptions
from ldm.workbench.server import Address, make_app


class Page:
    """What the browser does, without one."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        app = make_app(routes(editor), page=None, address=Address())
        self.client = TestClient(
            app, base_url="http://127.0.0.1:7860", headers={"X-MedSoft": "1"}, raise_server_exceptions=False
        )

    def get(self, route: str) -> Any:
        found = self.client.get(f"/api/{route}")
        assert found.status_code == 200, found.text
        return found.json() if found.headers["content-type"] == "application/json" else found.content

    def post(self, route: str, **body: Any) -> Any:
        found = self.client.post(f"/api/{route}", json=body)
        assert found.status_code == 200, found.text
        return found.json() if found.headers["content-type"] == "application/json" else found.content

    def fault(self, route: str, status: int = 400, **body: Any) -> str:
        found = self.client.post(f"/api/{route}", json=body) if body else self.client.get(f"/api/{route}")
        assert found.status_code == status, found.text
        assert list(found.json()) == ["error"]
        assert "\n" not in found.json()["error"]
        return found.json()["error"]

    def open(self, path: Path, **more: Any) -> dict[str, Any]:
        return self.post("open", path=str(path), **more)["document"]

    def request(self, document: dict[str, Any], **more: Any) -> dict[str, Any]:
        mask = np.zeros((document["height"], document["width"]), np.uint8)
        mask[10:22, 8:20] = 255
        asked = {"document": document["id"], "mask": coded(mask), "prompt": "severe osteolytic lesion", "seed": 3}
        return asked | more

    def draw(self, document: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The job, once it has ended."""
        job = self.post("draw", **self.request(document, **more))
        while job["state"] in ("queued", "running"):
            time.sleep(0.02)
            job = self.get(f"jobs/{job['id']}")
        return job


def coded(mask: np.ndarray) -> str:
    return base64.b64encode(mask.tobytes()).decode()


def started(model: EditOptions, output_dir: Path, **flags: Any) -> Editor:
    options = EditOptions(**vars(model) | {"output_dir": output_dir} | flags)
    return Editor(find(options), Drafts(output_dir), options)
