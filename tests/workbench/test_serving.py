"""medsoft serve: it draws what dataset_infer.py writes; who may call, how much, and what MONAI Label's calls get."""

import email
import io
import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from fastapi import HTTPException
from made import spine, write_nifti
from PIL import Image
from starlette.testclient import TestClient
from tiny import CLIP, PHANTOM, SD, Small, call, dataset_infer, infer, metas

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.masks import Feather, Mask, soft_mask_for
from ldm.data.png import encode_png, write_png
from ldm.inference.results import provenance_of
from ldm.workbench import intake, server, serving
from ldm.workbench.options import ServeOptions
from ldm.workbench.server import Address
from tool import serve

HOME = "http://127.0.0.1:8000"
PROMPT = "osteolytic lesion of Mrs Secret"
WORDS = ("sampling.steps=2", "sampling.batch_size=1", f"biomedclip.path={CLIP}")
SHAPE = (44, 36)


def picture(kind: type = np.uint8) -> np.ndarray:
    most = np.iinfo(kind).max
    return np.random.default_rng(0).integers(most // 8, most // 2, SHAPE).astype(kind)


def marked() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[14:26, 10:24] = 255
    return mask


@pytest.fixture(scope="module")
def drawer(small: Small) -> Iterator[serving.Drawer]:
    given = ServeOptions(
        ckpt=small.last, config=PHANTOM, device="cpu", per_minute=10**6, overrides=[*small.sizes, *WORDS]
    )
    made = serving.Drawer(given)
    yield made
    made.warnings.detach()


@pytest.fixture
def client(drawer: serving.Drawer) -> TestClient:
    return TestClient(serving.application(drawer, Address(port=8000)), HOME)


def parts(image: Any = None, mask: Any = None, names: tuple[str, str] = ("image", "mask")) -> dict[str, Any]:
    image = encode_png(picture()) if image is None else image
    mask = encode_png(marked()) if mask is None else mask
    return {names[0]: ("C:\\patients/Secret, Mary.png", image), names[1]: ("../mask.png", mask)}


def test_draws_what_the_command_writes_and_replays(
    client: TestClient, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_png(tmp_path / "Secret, Mary.png", picture(np.uint16))
    write_png(tmp_path / "mask.png", marked())
    words = [*small.sizes, *WORDS]
    given = ["--image", tmp_path / "Secret, Mary.png", "--mask", tmp_path / "mask.png", "--prompt", PROMPT]
    given += ["--spacing", 0.5, "--window", 2000, 50000, "--seed", 3, "--variants", 2]
    assert infer(small.last, tmp_path / "out", *given, *words) == 0
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    files = parts(encode_png(picture(np.uint16)))
    asked = {"prompt": PROMPT, "seed": 3, "spacing_mm": "0.5", "window": "2000 50000"}
    answer = client.post("/draw", files=files, data=asked | {"n": 2})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        packed.extractall(tmp_path)
    ours, theirs = metas(tmp_path / "drawn"), metas(tmp_path / "out")
    assert list(ours) == list(theirs) == ["Secret, Mary__v0", "Secret, Mary__v1"]
    for name, meta in theirs.items():
        for file in ("image.png", "mask.png", "soft_mask.png", "prompt.txt"):
            assert (tmp_path / "drawn" / name / file).read_bytes() == (tmp_path / "out" / name / file).read_bytes()
        others = {key for key in {*meta, *ours[name]} if meta.get(key) != ours[name].get(key)}
        assert others == {"command", "overrides"}  # and parent_image is found, as seen from drawn
        assert "--" not in ours[name]["command"]
    alone = client.post("/draw", files=files, data=asked)
    assert alone.headers["content-type"] == "image/png"
    assert alone.content == (tmp_path / "out" / "Secret, Mary__v0" / "image.png").read_bytes()
    replay = ["--replay", tmp_path / "drawn" / "Secret, Mary__v1" / "meta.json", "--output_dir", tmp_path / "again"]
    assert call(dataset_infer, *replay, "--device", "cpu") == 0
    again = tmp_path / "again" / "Secret, Mary__v1" / "image.png"
    assert again.read_bytes() == (tmp_path / "out" / "Secret, Mary__v1" / "image.png").read_bytes()
    assert client.post("/draw", files=files, data={"prompt": PROMPT, "plane": "axial"}).status_code == 400
    assert not list((tmp_path / "t").iterdir())  # nothing stays on the disk
    served = "".join(record.getMessage() for record in caplog.records if "out" not in record.getMessage())
    assert "Secret" not in served.split("inpainting")[0]


def test_a_feather_in_mm_is_the_soft_mask_that_the_command_would_be_given(
    client: TestClient, small: Small, tmp_path: Path
) -> None:
    asked = {"prompt": PROMPT, "feather_mm": 3, "spacing_mm": "0.5 1", "format": "zip"}
    answer = client.post("/draw", files=parts(), data=asked)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        packed.extractall(tmp_path)
    write_png(tmp_path / "Secret, Mary.png", picture())
    soft = tmp_path / "drawn" / "Secret, Mary__v0" / "soft_mask.png"
    given = ["--image", tmp_path / "Secret, Mary.png", "--mask", soft, "--prompt", PROMPT]
    assert infer(small.last, tmp_path / "out", *given, *small.sizes, *WORDS) == 0
    image = soft.with_name("image.png").read_bytes()
    assert image == (tmp_path / "out" / "Secret, Mary__v0" / "image.png").read_bytes()
    wide = soft_mask_for(Mask((marked() / 255).astype(np.float32)), Feather(3, "mm"), [0.5, 1])
    assert np.array_equal(np.asarray(Image.open(soft)), np.rint(wide * 255))
    again = client.post("/draw", files=parts(mask=soft.read_bytes()), data=asked)
    assert again.json()["error"].startswith("feather_mm: the mask is soft already and is used as it is")


def test_a_slice_of_a_volume(client: TestClient, small: Small, tmp_path: Path) -> None:
    made = spine()
    image = write_nifti(tmp_path / "scan.nii.gz", made.image, made.affine)
    mask = write_nifti(tmp_path / "lesion.nii.gz", made.lesion.astype(np.uint8), made.affine)
    given = ["--image", image, "--mask", mask, "--prompt", "lesion", "--plane", "sagittal", *small.sizes, *WORDS]
    assert infer(small.last, tmp_path / "out", *given) == 0
    files = {"image": ("scan.nii.gz", image.read_bytes()), "mask": ("lesion.nii.gz", mask.read_bytes())}
    answer = client.post("/draw", files=files, data={"prompt": "lesion", "plane": "sagittal", "format": "zip"})
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        packed.extractall(tmp_path)
    (name,) = metas(tmp_path / "out")
    assert (tmp_path / "drawn" / name / "image.png").read_bytes() == (
        tmp_path / "out" / name / "image.png"
    ).read_bytes()
    parent = metas(tmp_path / "drawn")[name]["parent_image"]
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "drawn" / name / parent)),
        np.asarray(Image.open(tmp_path / "out" / name / metas(tmp_path / "out")[name]["parent_image"])),
    )


# --------------------------------------------------------------------------------------------------- what is refused

EMPTY, FULL = encode_png(marked() * 0), encode_png(np.full(SHAPE, 255, np.uint8))
LARGE = encode_png(np.zeros((4097, 4097), np.uint8))
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "no image": ({"mask": ("m.png", FULL)}, {"prompt": "x"}, 400, "image: is missing"),
    "no mask": ({"image": ("i.png", FULL)}, {"prompt": "x"}, 400, "mask: is missing"),
    "another file": ({**parts(), "more": ("m", b"x")}, {"prompt": "x"}, 400, "Too many files"),
    "a file of another name": (
        {"picture": ("m", b"x")},
        {"prompt": "x"},
        400,
        "picture: is a file; expected the files",
    ),
    "no prompt": (parts(), {}, 400, "prompt: Field required"),
    "a blank prompt": (parts(), {"prompt": "  "}, 400, "prompt: the prompt is empty"),
    "two lines": (parts(), {"prompt": "a\nb"}, 400, "prompt: holds 2 lines"),
    "a long prompt": (parts(), {"prompt": "a" * 1001}, 400, "prompt: String should have at most 1000"),
    "more tokens than are read": (
        parts(),
        {"prompt": "bone " * 90},
        400,
        "prompt: Stable Diffusion's text encoder reads",
    ),
    "an unknown part": (
        parts(),
        {"prompt": "x", "feather": "1"},
        400,
        "feather: Extra inputs are not permitted; expected",
    ),
    "no number": (parts(), {"prompt": "x", "n": "many"}, 400, "n: Input should be a valid integer"),
    "too many": (parts(), {"prompt": "x", "n": "17"}, 400, "n: Input should be less than or equal to 16"),
    "a negative seed": (parts(), {"prompt": "x", "seed": "-1"}, 400, "seed: Input should be greater"),
    "a feather that is none": (parts(), {"prompt": "x", "feather_mm": "nan"}, 400, "feather_mm: Input should be"),
    "mm of unknown pixels": (parts(), {"prompt": "x", "feather_mm": "1"}, 400, "spacing_mm"),
    "no spacing": (parts(), {"prompt": "x", "spacing_mm": "0"}, 400, "spacing_mm: expected one or two numbers"),
    "three spacings": (parts(), {"prompt": "x", "spacing_mm": "1 1 1"}, 400, "spacing: expected one or two numbers"),
    "a window of 8 bits": (parts(), {"prompt": "x", "window": "1 9"}, 400, "has 8 bits"),
    "a slice of an image": (parts(), {"prompt": "x", "slice": "1"}, 400, "choose a slice of a volume"),
    "an unknown plane": (parts(), {"prompt": "x", "plane": "oblique"}, 400, "plane: Input should be 'sagittal'"),
    "two in one png": (parts(), {"prompt": "x", "n": "2", "format": "png"}, 400, "format: png holds one image"),
    "text for an image": (parts(b"hello"), {"prompt": "x"}, 400, "image.png: not an image: this is a text file"),
    "an empty file": (parts(b""), {"prompt": "x"}, 400, "image: the file is empty"),
    "half an image": (parts(encode_png(picture())[:300]), {"prompt": "x"}, 400, "image.png: "),
    "a large image": (parts(LARGE), {"prompt": "x"}, 400, "image: has 4097 x 4097 pixels; at most 16777216"),
    "an empty mask": (parts(mask=EMPTY), {"prompt": "x"}, 400, "mask.png: the mask is empty"),
    "a mask of another size": (parts(mask=encode_png(marked()[:20])), {"prompt": "x"}, 400, "mask.png: has "),
    "packed text": (parts(b"\x1f\x8b" + b"x" * 400), {"prompt": "x"}, 400, "image"),
    "half a DICOM": (parts(b"\0" * 128 + b"DICM" + b"x" * 90), {"prompt": "x"}, 400, "image"),
    "half a NIfTI": (parts(b"\0" * 344 + b"n+1\0"), {"prompt": "x"}, 400, "image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(client: TestClient, case: str) -> None:
    files, data, status, message = REFUSED[case]
    answer = client.post("/draw", files=files, data=data)
    line = answer.json()["error"]
    assert (answer.status_code, message in line) == (status, True), line
    assert "\n" not in line
    assert tempfile.gettempdir() not in line
    assert "Secret" not in line


def test_a_volume_that_would_become_too_large(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = ("m.png", encode_png(marked()))
    flat = write_nifti(tmp_path / "a.nii.gz", np.zeros((9, 9, 9), np.int16), np.diag([1.0, 1.0, 40.0, 1.0]))
    answer = client.post("/draw", files={"image": ("a", flat.read_bytes()), "mask": mask}, data={"prompt": "x"})
    assert "image: its voxels have sides of 40 and 1 mm" in answer.json()["error"]
    monkeypatch.setattr("ldm.workbench.intake.MOST_VOXELS", 100)
    answer = client.post("/draw", files={"image": ("a", flat.read_bytes()), "mask": mask}, data={"prompt": "x"})
    assert "image: becomes larger than 0 MiB when it is unpacked" in answer.json()["error"]
    plain = write_nifti(tmp_path / "a.nii", np.zeros((9, 9, 9), np.int16), np.eye(4))
    answer = client.post("/draw", files={"image": ("a", plain.read_bytes()), "mask": mask}, data={"prompt": "x"})
    assert "image: has 9 x 9 x 9 voxels; at most 100 are taken" in answer.json()["error"]


def test_only_programs_and_those_who_know_the_token_may_call(client: TestClient, drawer: serving.Drawer) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9"):
        answer = client.post("/draw", files=parts(), data={"prompt": "x"}, headers={"Origin": origin})
        assert (answer.status_code, "another server" in answer.json()["error"]) == (403, True)
    assert client.get("/info/", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/draw", json={"prompt": "x"}).json()["error"].startswith("expected multipart/form-data")
    assert client.post("/draw", content=b"x", headers={"Content-Length": str(2**27)}).status_code == 413
    outside = TestClient(serving.application(drawer, Address("0.0.0.0", 8000, "password1")), "http://10.0.0.1:8000")
    assert outside.get("/info/").status_code == 401
    assert outside.post("/draw", headers={"Authorization": "Bearer password2"}).status_code == 401
    assert outside.get("/info/", headers={"Authorization": "Bearer password1"}).status_code == 200


def test_one_at_a_time_and_not_too_many(
    client: TestClient, drawer: serving.Drawer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = intake.Turns(per_minute=4, waiting=1)
    monkeypatch.setattr(drawer, "turns", turns)
    went = threading.Event()
    with turns.taken(1):
        second = threading.Thread(target=lambda: [went.set() for _ in [turns.taken(1).__enter__()]])
        second.start()
        while turns._inside < 2:
            time.sleep(0.001)
        answer = client.post("/draw", files=parts(), data={"prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"] == "1 request is waiting already; ask again later"
        assert not went.is_set()
    second.join(5)
    assert went.is_set()
    turns = intake.Turns(per_minute=4)
    monkeypatch.setattr(drawer, "turns", turns)
    with turns.taken(3):
        pass
    answer = client.post("/draw", files=parts(), data={"prompt": "x", "n": 2})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    answer = client.post("/draw", files=parts(), data={"prompt": "x", "n": 5})
    assert "n: at most 4 images a minute" in answer.json()["error"]
    later = time.monotonic() + server.PERIOD
    monkeypatch.setattr(server.time, "monotonic", lambda: later)
    with turns.taken(4), pytest.raises(HTTPException):
        turns.taken(1).__enter__()


def test_a_stop_ends_what_is_being_drawn_and_what_waits(
    client: TestClient, drawer: serving.Drawer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawer, "_closing", threading.Event())
    draw, steps = drawer.model.inpainter.draw, []

    def stopped_while_drawing(prepared: Any, jobs: Any, on_step: Any) -> Any:
        def step(done: int) -> None:
            steps.append(done)
            drawer.close()
            on_step(done)

        return draw(prepared, jobs, step)

    monkeypatch.setattr(drawer.model.inpainter, "draw", stopped_while_drawing)
    for _ in range(2):
        answer = client.post("/draw", files=parts(), data={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]) == (503, "the server is being stopped")
    assert steps == [1]


# ------------------------------------------------------------------------------------------------------- MONAI Label


def test_monai_labels_inference_call(client: TestClient) -> None:
    about = client.get("/info/").json()
    assert set(about) >= {"name", "description", "version", "labels", "models", "trainers", "strategies", "datastore"}
    ((name, model),) = about["models"].items()
    assert set(model) == {"type", "labels", "dimension", "description", "config"}
    params = {"prompt": "lesion", "seed": 3, "client_id": "slicer", "result_extension": ".nrrd"}
    sent = {"files": parts(mask=FULL, names=("file", "label")), "data": {"params": json.dumps(params)}}
    whole = client.post(f"/infer/{name}", **sent)
    assert whole.status_code == 200, whole.text
    message = email.message_from_bytes(
        b"Content-Type: " + whole.headers["content-type"].encode() + b"\n\n" + whole.content
    )
    first, second = message.get_payload()
    told = json.loads(first.get_payload())
    assert (told["prompt"], told["seed"], told["synthetic"], told["width"]) == ("lesion", 3, True, SHAPE[1])
    assert "100 % of the image is marked" in told["warnings"][0]
    assert (second.get_param("name", header="content-disposition"), second.get_filename()) == ("image", "drawn.png")
    png = client.post(f"/infer/{name}?output=image", **sent)
    assert png.content == second.get_payload(decode=True)
    assert "100 % of the image is marked" in json.loads(png.headers["x-warnings"])[0]
    assert client.post(f"/infer/{name}?output=json", **sent).json() == told
    sent["data"] = {"params": json.dumps({"prompt": "lesion 脊椎"})}
    for _ in range(2):  # each time
        said = client.post(f"/infer/{name}?output=json", **sent).json()["warnings"]
        assert said[0].startswith("prompt: the encoders have no token for ")
        assert len(said) == 2


def test_what_monai_label_has_and_this_has_not(client: TestClient) -> None:
    both = parts(names=("file", "label"))
    for path, more, status, message in (
        ("/infer/spleen", {"files": both}, 404, "there is no model spleen; expected lesion_inpainting"),
        ("/infer/lesion_inpainting?image=1.2.3", {"data": {"params": "{}"}}, 400, "expected multipart/form-data"),
        ("/infer/lesion_inpainting?image=1.2", {"files": {"label": ("l", FULL)}}, 404, "there is no datastore"),
        ("/infer/lesion_inpainting?session_id=1", {"files": both}, 501, "there are no sessions"),
        ("/infer/lesion_inpainting?output=dicom_seg", {"files": both}, 501, "output dicom_seg is not given"),
        ("/infer/lesion_inpainting", {"files": both, "data": {"params": "{"}}, 400, "params: expected a JSON object"),
        ("/infer/lesion_inpainting", {"files": both, "data": {"params": "{}"}}, 400, "prompt: Field required"),
        (
            "/infer/lesion_inpainting",
            {"files": both, "data": {"prompt": "x"}},
            400,
            "prompt: expected the text part params",
        ),
    ):
        answer = client.post(path, **more)
        assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    for method, path in (
        ("PUT", "/session/"),
        ("GET", "/train/?check_if_running=true"),
        ("PUT", "/datastore/label"),
        ("POST", "/activelearning/random"),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, "this server has no" in answer.json()["error"]) == (501, True)


def test_openapi_describes_the_calls_and_no_page_loads_from_elsewhere(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert set(found["paths"]) == {"/draw", "/info/", "/infer/{model}"}
    form = found["paths"]["/draw"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image", "mask", "prompt"]
    assert set(form["properties"]) == {"image", "mask", *serving.DrawForm.model_fields}
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/")} == {404}


# ------------------------------------------------------------------------------------------------------- the command


def until(holds: Callable[[], Any]) -> None:
    """Wait for it; machines with other work are slow."""
    end = time.monotonic() + 180
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)


def post(port: int, **asked: Any) -> tuple[int, bytes]:
    body = TestClient(None).build_request("POST", HOME, files=parts(), data={"prompt": PROMPT, **asked})
    headers = {"Content-Type": body.headers["content-type"]}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/draw", body.read(), headers)
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_real_server_answers_and_ends_with_ctrl_c(small: Small, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.listen()
        with pytest.raises(UsageError, match=f"--port {port}: is in use"):
            call(serve, "--ckpt", small.last, "--config", PHANTOM, "--port", port, *small.sizes, *WORDS)
    words = ["--ckpt", small.last, "--config", PHANTOM, "--port", port, "--device", "cpu", *small.sizes, *WORDS]
    child = children.start(Path(serve.__file__), *words, "sampling.steps=40", folder=tmp_path, TMPDIR=str(tmp_path))
    until(lambda: "open http" in child.said_until_now())
    status, png = post(port)
    assert (status, np.asarray(Image.open(io.BytesIO(png))).shape) == (200, SHAPE)
    with ThreadPoolExecutor(1) as caller:
        long = caller.submit(post, port, n=16, seed=1)
        until(lambda: [*tmp_path.glob("medsoft-*")])  # it is drawing
        os.kill(child.process.pid, signal.SIGINT)
        assert long.result() == (503, b'{"error":"the server is being stopped"}')
    ended = child.wait(180)
    assert (ended.returncode, ended.stderr) == (130, "interrupted; run the same command again to go on\n")
    assert "Secret" not in ended.stdout
    assert not [*tmp_path.glob("medsoft-*")]


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--ckpt", "none.ckpt"], UsageError, r"--ckpt none\.ckpt: does not exist"),
        (["--ckpt", str(PHANTOM), "--token", "no"], UsageError, "--token: expected 8 to 128"),
        (
            ["--ckpt", str(SD)],
            UsageError,
            r"config\.yaml: does not exist; name a model YAML",
        ),
        (["--ckpt", str(PHANTOM), "--config", str(PHANTOM)], MedSoftError, r"phantom\.yaml"),
    ],
)
def test_a_server_that_cannot_be(words: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(serve, *words, "--port", 8123)


def test_no_record_holds_the_token(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--token", "password1"], ["--tok=password1"]):
        monkeypatch.setattr("sys.argv", ["tool/edit.py", *words, "--port", "8000"])
        command = provenance_of(read_checkpoint(small.last), PHANTOM, {}, [], False)["command"]
        assert (
            command
            == f"python tool/edit.py {words[0].partition('=')[0]}{' ' if len(words) > 1 else '='}... --port 8000"
        )
