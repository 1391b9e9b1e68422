"""Who may ask, and what garbage does: nothing without the key, nothing but 4xx, every session as before."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from KA2ERSegment.engine.app import ASKS, VERBS
from KA2ERSegment.engine.client import EngineClient, RemoteSession
from KA2ERSegment.engine.nninteractive import pack
from KA2ERSegment.engine.process import LocalEngine
from KA2ERSegment.engine.wire import API, EngineGoneError
from KA2ERSegment.prompts import BoxPrompt, MaskPrompt, PointPrompt
from KA2ERSegment.volume import Volume

PEER_POSTS = (
    "set_image",
    "set_target_buffer",
    "set_do_autozoom",
    "predict",
    "add_point_interaction",
    "add_bbox_interaction",
    "add_scribble_interaction",
    "add_lasso_interaction",
    "add_initial_seg_interaction",
)
EYE = np.eye(4).tolist()
META = {"shape_kji": [4, 5, 6], "dtype": "uint8", "ijk_to_ras": EYE}
VOXELS = bytes(range(120))


def ask(
    engine: Any,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    key: str | None = None,
) -> tuple[int, dict[str, Any]]:
    """A request by hand: status and JSON."""
    where = (engine.url if hasattr(engine, "url") else engine.client().url).removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=30)
    everything = {"Authorization": f"Bearer {engine.api_key if key is None else key}", **(headers or {})}
    try:
        connection.request(method, path, body, everything)
        response = connection.getresponse()
        data = response.read()
        assert "access-control-allow-origin" not in {name.lower() for name, _ in response.getheaders()}
    finally:
        connection.close()
    return response.status, json.loads(data) if data[:1] == b"{" else {}


@pytest.fixture
def a_remote(engine_here: Any, a_volume: Volume) -> Iterator[RemoteSession]:
    session = engine_here.client().open(a_volume.array_kji, a_volume.ijk_to_ras)
    session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    yield session
    session.client.close()


@pytest.fixture
def a_lease(engine_here: Any, an_array: np.ndarray) -> Iterator[dict[str, str]]:
    """Of nnInteractive's protocol, with an image."""
    _, answer = ask(engine_here, "POST", "/claim")
    lease = {"X-Lease-Token": answer["lease_token"]}
    assert ask(engine_here, "POST", "/set_image", pack(an_array[None]), lease)[0] == 200
    yield lease
    ask(engine_here, "POST", "/release", headers=lease)


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_no_route_answers_without_the_key(engine_here: Any) -> None:
    routes = engine_here.app._app.routes
    assert len(routes) > 35

    for route in routes:
        (method,) = route.methods - {"HEAD"}
        for key in ("", "another", engine_here.api_key + "x", engine_here.api_key[:-1]):
            status, answer = ask(engine_here, method, route.path, key=key)
            assert (status, answer["kind"]) == (401, "auth"), route.path


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "\u00fc", "[::"])
def test_engine_on_this_machine_is_addressed_as_this_machine(engine_here: Any, host: str) -> None:
    status, answer = ask(engine_here, "GET", f"{API}/info", headers={"Host": host})

    assert status in (400, 403)
    assert answer.get("kind", "forbidden") == "forbidden"


def test_web_pages_of_others_are_refused(engine_here: Any) -> None:
    own = engine_here.url.removeprefix("http://")
    for origin in ("https://evil.example", "null", "http://localhost:1", f"http://{own}.evil.example"):
        status, answer = ask(engine_here, "GET", f"{API}/info", headers={"Origin": origin})
        assert (status, answer["kind"]) == (403, "forbidden")

    assert ask(engine_here, "GET", f"{API}/info", headers={"Origin": f"http://{own}"})[0] == 200


@pytest.mark.parametrize("headers", [{"Host": "[::"}, {"Origin": "http://["}, {"Origin": "http://[::1"}])
def test_address_that_is_none_is_refused_without_a_trace(
    engine_here: Any, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    status, answer = ask(engine_here, "GET", f"{API}/info", headers=headers)

    assert (status, answer["kind"]) == (403, "forbidden")
    assert "Traceback" not in caplog.text


def test_lease_is_needed_beside_the_key(engine_here: Any) -> None:
    for path in ("heartbeat", "cancel", *VERBS, *ASKS):
        status, answer = ask(engine_here, "POST", f"{API}/session/{path}", b"{}", {"X-Lease-Token": "0" * 48})
        assert (status, answer["kind"]) == (410, "lease"), path
    for path in PEER_POSTS:
        assert ask(engine_here, "POST", f"/{path}", b"{}")[0] == 410


# --- volumes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "body", "status"),
    [
        ({}, VOXELS, 200),
        ({}, VOXELS[:-1], 400),
        ({}, VOXELS + b"x", 413),
        ({"shape_kji": [1 << 20, 1 << 20, 1 << 20]}, VOXELS, 413),
        ({"shape_kji": [0, 5, 6]}, VOXELS, 400),
        ({"shape_kji": [4, 5]}, VOXELS, 400),
        ({"dtype": "object"}, VOXELS, 400),
        ({"dtype": "float32"}, VOXELS, 400),
        ({"ijk_to_ras": [[1]]}, VOXELS, 400),
        ({"ijk_to_ras": np.zeros((4, 4)).tolist()}, VOXELS, 400),
        ({"packed": True}, VOXELS, 400),
        ({"file": "0" * 32 + ".volume"}, b"", 400),
        ({}, bytes(120), 422),
    ],
)
def test_volumes_are_checked_before_they_are_taken(engine_here: Any, meta: Any, body: bytes, status: int) -> None:
    before = ask(engine_here, "GET", f"{API}/info")[1]["sessions"]

    headers = {"X-Meta": json.dumps({**META, **meta})}
    found, answer = ask(engine_here, "POST", f"{API}/session", body, headers)

    assert found == status, answer
    if status == 200:
        ask(engine_here, "POST", f"{API}/session/close", headers={"X-Lease-Token": answer["lease"]})
    else:
        assert len(answer["detail"]) > 10
    assert ask(engine_here, "GET", f"{API}/info")[1]["sessions"] == before


def test_compressed_volume_that_grows_is_stopped(engine_here: Any) -> None:
    import zlib

    headers = {"X-Meta": json.dumps({**META, "packed": True})}
    bomb = zlib.compress(bytes(10_000_000))
    connection = http.client.HTTPConnection(engine_here.url.removeprefix("http://"))
    headers |= {"Authorization": f"Bearer {engine_here.api_key}", "Transfer-Encoding": "chunked"}
    connection.request("POST", f"{API}/session", iter([bomb]), headers, encode_chunked=True)
    response = connection.getresponse()

    assert response.status == 400
    assert b"more" in response.read()
    connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_only_plain_files_of_the_right_size_in_the_folder_are_read(an_engine: LocalEngine, tmp_path: Path) -> None:
    folder = an_engine.client().exchange
    secret = tmp_path / "secret"
    secret.write_bytes(VOXELS)
    link, short, fine, pipe = (folder / (c * 32 + ".volume") for c in "abcd")
    link.symlink_to(secret)
    short.write_bytes(VOXELS[:-1])
    fine.write_bytes(VOXELS)
    (folder / ("e" * 32 + ".volume")).mkdir()
    os.mkfifo(pipe)
    others = ("e" * 32 + ".volume", "f" * 32 + ".volume", f"../{folder.name}/{fine.name}")
    for name in (link.name, short.name, pipe.name, *others):
        headers = {"X-Meta": json.dumps({**META, "file": name})}
        status, answer = ask(an_engine, "POST", f"{API}/session", headers=headers)
        assert status == 400, (name, answer)
    headers = {"X-Meta": json.dumps({**META, "file": fine.name})}
    status, answer = ask(an_engine, "POST", f"{API}/session", headers=headers)
    assert status == 200
    ask(an_engine, "POST", f"{API}/session/close", headers={"X-Lease-Token": answer["lease"]})
    for path in (link, short, fine, pipe):
        path.unlink()
    (folder / ("e" * 32 + ".volume")).rmdir()


# --- garbage ----------------------------------------------------------------------------------------------------------

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1e308, -1, 2**70])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def fine_arguments(volume: Volume) -> dict[str, dict[str, Any]]:
    """What each verb and question takes, so that garbage gets as deep as it can."""
    mask = np.zeros(volume.shape_kji, dtype=bool)
    mask[3:5, 4:6, 5:9] = True
    prompt = PointPrompt.from_ijk((12, 12, 6), volume).to_json()
    step = {"object": "a", "prompt": prompt}
    return {
        "select": {"name": "object"},
        "add": {"prompt": prompt, "neighbours": "keep"},
        "edit": {"mask": MaskPrompt.from_array(mask, volume).to_json(), "amend": False},
        "finish": {"smoothing_mm": 1.0, "islands": True},
        "revise": {"steps": [step]},
        "lock": {"name": "object"},
        "unlock": {"name": "object"},
        "remove": {"name": "object"},
        "rename": {"old": "object", "new": "b"},
        "use_experts": {"names": []},
        "give": {"saved": {"format": 1, "objects": ["a"], "selected": "a", "steps": [step]}},
        "opinion": {"name": "object", "expert": "foundation"},
        "disagreement": {"name": "object"},
        "mask": {"name": "object"},
        "suggest": {"name": "object"},
    }


def damaged(data: Any, draw: Any) -> Any:
    """The same, with something in it replaced by anything."""
    if isinstance(data, dict) and data and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(data)))
        return {**data, key: damaged(data[key], draw)}
    if isinstance(data, list) and data and draw(st.booleans()):
        return [damaged(data[0], draw), *data[1:]]
    return draw(values)


slow_fixture = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("verb", [*VERBS, *ASKS])
@slow_fixture
@given(data=st.data())
def test_garbage_is_refused_and_changes_nothing(
    engine_here: Any, a_remote: RemoteSession, a_volume: Volume, verb: str, data: st.DataObject
) -> None:
    arguments = damaged(fine_arguments(a_volume).get(verb, {}), data.draw)
    try:
        body = data.draw(st.just(json.dumps(arguments).encode()) | st.binary(max_size=40))
    except UnicodeEncodeError:
        return
    session = session_of(engine_here, a_remote._lease)
    before = session.to_json()

    status, answer = ask(engine_here, "POST", f"{API}/session/{verb}", body, a_remote._lease)

    assert status < 500, answer
    if status != 200:
        assert len(answer["detail"]) > 10
        assert session.to_json() == before


@pytest.mark.parametrize("path", PEER_POSTS)
@slow_fixture
@given(data=st.data())
def test_garbage_in_the_other_protocol_is_refused_and_changes_nothing(
    engine_here: Any, a_lease: dict[str, str], path: str, data: st.DataObject
) -> None:
    fine = {
        "coordinates": [6, 12, 12],
        "bbox_coords": [[3, 10], [7, 18], [6, 19]],
        "include_interaction": True,
        "run_prediction": False,
        "shape": [14, 22, 30],
        "dtype": "uint8",
        "do_autozoom": True,
        "interaction_bbox": [[3, 4], [7, 8], [6, 19]],
        "image_properties": {"spacing": [1, 2, 3]},
    }
    text = json.dumps(damaged(fine, data.draw)).encode()
    mask = pack(np.ones((1, 1, 13), bool))
    body = data.draw(st.sampled_from([text, mask]) | st.binary(max_size=40))
    before = session_of(engine_here, a_lease).steps

    status, answer = ask(engine_here, "POST", f"/{path}", body, {**a_lease, "X-Meta": text.decode()})

    assert status < 500, answer
    if status != 200:
        assert len(answer["detail"]) > 10
        assert session_of(engine_here, a_lease).steps == before


def session_of(engine_here: Any, lease: dict[str, str]) -> Any:
    return engine_here.engine.places.get(lease["X-Lease-Token"]).session


def test_prompts_that_waited_are_answered_together_or_not_at_all(engine_here: Any, a_lease: dict[str, str]) -> None:
    session = engine_here.engine.places.get(a_lease["X-Lease-Token"]).session

    def give(*points: tuple[int, int, int, bool]) -> None:
        for k, j, i, positive in points:
            told = {"coordinates": [k, j, i], "include_interaction": positive, "run_prediction": False}
            assert ask(engine_here, "POST", "/add_point_interaction", json.dumps(told).encode(), a_lease)[0] == 200

    give((6, 12, 12, True), (6, 12, 13, True), (6, 12, 12, False))
    assert ask(engine_here, "POST", "/predict", headers=a_lease)[0] == 400
    assert not session.can_undo

    assert ask(engine_here, "POST", "/undo", headers=a_lease)[0] == 200  # the one that contradicts another
    assert ask(engine_here, "POST", "/predict", headers=a_lease)[0] == 200
    assert len(session.steps) == 2
    session.undo()
    assert session.steps == ()


def test_request_that_is_too_long_is_refused_by_its_head(engine_here: Any, a_remote: RemoteSession) -> None:
    host, port = engine_here.url.removeprefix("http://").split(":")
    head = (
        f"POST {API}/session/add HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {engine_here.api_key}\r\n"
        f"X-Lease-Token: {a_remote._lease['X-Lease-Token']}\r\nContent-Length: {1 << 40}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(head.encode())
        assert b" 413 " in sock.recv(100)


def test_bytes_that_are_no_http_do_no_harm(engine_here: Any) -> None:
    host, port = engine_here.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b" 400 " in sock.recv(100)

    assert ask(engine_here, "GET", "/healthz") == (200, {"ok": True})


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificate_of_a_proxy_is_verified(
    engine_here: Any, a_volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(secret), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=proxy, args=(listening, context, engine_here.url), daemon=True).start()
    url = f"https://localhost:{listening.getsockname()[1]}"

    with pytest.raises(EngineGoneError, match=r"(?i)certificate"):
        EngineClient(url, engine_here.api_key).info()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client = EngineClient(url, engine_here.api_key)
    session = client.open(a_volume.array_kji, a_volume.ijk_to_ras)
    change = session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))

    assert change.objects
    client.close()
    listening.close()


def proxy(listening: socket.socket, context: ssl.SSLContext, url: str) -> None:
    """The least that a TLS proxy does."""
    host, port = url.removeprefix("http://").split(":")
    while True:
        try:
            inner, _ = listening.accept()
        except OSError:
            return
        try:
            front = context.wrap_socket(inner, server_side=True)
        except (ssl.SSLError, OSError):
            inner.close()
            continue
        back = socket.create_connection((host, int(port)))
        for source, sink in ((front, back), (back, front)):
            threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for each in (source, sink):
            each.close()
