"""A session far away is a session: every verb gives what `Session` gives, and the journal says how it came to be."""

from __future__ import annotations

import json
import os
import socket
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.engine.client import EngineClient, RemoteSession
from KA2ERSegment.engine.process import LocalEngine
from KA2ERSegment.engine.wire import API, Change, EngineError, EngineGoneError, MalformedError, VolumeHeader
from KA2ERSegment.errors import GeometryError, PromptError, SessionStateError, VolumeError
from KA2ERSegment.geometry import Box, apply_affine
from KA2ERSegment.prompts import BoxPrompt, LassoPrompt, MaskPrompt, PointPrompt, Polarity, ScribblePrompt
from KA2ERSegment.session import Session
from KA2ERSegment.steps import Neighbours
from KA2ERSegment.volume import Volume


class Pair:
    """A remote session, a local one, and the masks that a viewer of the remote one shows."""

    def __init__(self, remote: RemoteSession, local: Session) -> None:
        self.remote, self.local = remote, local
        self.shown: dict[str, np.ndarray] = {}

    def both(self, verb: str, *arguments: Any, **keywords: Any) -> Change:
        """Do the same on both sides, write what the answer says, and compare."""
        getattr(self.local, verb)(*arguments, **keywords)
        change: Change = getattr(self.remote, verb)(*arguments, **keywords)
        for one in change.objects:
            mask = self.shown.setdefault(one.name, np.zeros(self.local.volume.shape_kji, dtype=bool))
            mask[one.box.slices] = one.mask
            assert change.box.union(one.box) == change.box
            if not one.exists:
                assert not self.shown.pop(one.name).any()
        self.compare(change)
        return change

    def compare(self, change: Change) -> None:
        """The viewer's masks, names and journal are the local session's."""
        local = self.local
        assert change.names == local.objects == self.remote.names
        assert change.selected == local.selected == self.remote.selected
        assert (change.can_undo, change.can_redo) == (local.can_undo, local.can_redo)
        for name in local.objects:
            prediction = local.prediction_of(name)
            expected = prediction.mask if prediction else np.zeros(local.volume.shape_kji, dtype=bool)
            np.testing.assert_array_equal(self.shown.get(name, np.zeros_like(expected)), expected)
            one = change.of(name)
            if one is not None:
                assert one.voxels == expected.sum()
                assert one.extent == (Box.around(expected) or one.extent)
                assert one.quality == (prediction and pytest.approx(prediction.quality, abs=1e-6))
                assert dict(one.shares) == (pytest.approx(prediction.shares, abs=1e-6) if prediction else {})
        assert self.remote.to_json() == local.to_json()


@pytest.fixture
def a_pair(a_client: EngineClient, a_bundle: Path) -> Callable[[Volume], Pair]:
    def make(volume: Volume) -> Pair:
        local = Session(load_bundle(a_bundle), "cpu")
        local.set_volume(volume)
        return Pair(a_client.open(volume.array_kji, volume.ijk_to_ras, volume.name), local)

    return make


def walk(pair: Pair, volume: Volume) -> None:
    """Every verb at least once."""
    i, j, k = 12, 12, 6
    pair.both("select", "left kidney")
    pair.both("add", PointPrompt.from_ijk((i, j, k), volume))
    pair.both("add", BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), volume))
    pair.both("add", PointPrompt.from_ijk((27, 3, 12), volume, Polarity.NEGATIVE))
    pair.both("undo")
    pair.both("redo")
    pair.both("select", "tumour")
    pair.both("add", PointPrompt.from_ijk((i + 3, j, k), volume), Neighbours.OVERLAP)
    pair.both("add", ScribblePrompt.from_ijk([(15, 10, 6), (17, 13, 6)], volume, radius=1.5), Neighbours.COMPETE)
    pair.both("lock", "left kidney")
    pair.both("add", PointPrompt.from_ijk((20, 18, 4), volume), Neighbours.KEEP)
    pair.both("unlock", "left kidney")
    drawn = np.zeros(volume.shape_kji, dtype=bool)
    drawn[3:7, 5:12, 9:20] = True
    pair.both("edit", MaskPrompt.from_array(drawn, volume))
    drawn[5, 6, 7] = True
    pair.both("edit", MaskPrompt.from_array(drawn, volume), amend=True)
    pair.both("finish", 1.5, False)
    pair.both("use_experts", [pair.local.model.arms[1]])
    pair.both("add", LassoPrompt.from_ijk([(8, 8, 5), (14, 8, 5), (11, 13, 5)], volume))
    pair.both("use_experts", None)
    pair.both("revise", [step for n, step in enumerate(pair.local.steps) if n != 1])
    pair.both("rename", "tumour", "metastasis")
    pair.both("select", "third")
    pair.both("reset")
    pair.both("edit", MaskPrompt.from_array(np.zeros(volume.shape_kji, dtype=bool), volume))
    pair.both("select", "metastasis")
    pair.both("reset")
    pair.both("undo")
    pair.both("remove", "left kidney")
    pair.both("undo")


def test_every_verb_gives_what_a_session_gives(a_pair: Callable[[Volume], Pair], any_volume: Volume) -> None:
    walk(a_pair(any_volume), any_volume)


def test_journal_brings_everything_back_in_another_session(
    a_pair: Callable[[Volume], Pair], a_client: EngineClient, an_oblique_left_handed_volume: Volume
) -> None:
    volume = an_oblique_left_handed_volume
    pair = a_pair(volume)
    walk(pair, volume)
    saved = json.loads(json.dumps(pair.remote.to_json()))
    pair.remote.close()
    assert pair.remote.to_json() == saved

    again = a_client.open(volume.array_kji, volume.ijk_to_ras)
    change = again.give(saved)

    assert again.to_json() == saved
    assert change.names == tuple(saved["objects"])
    for name, mask in pair.shown.items():
        box, crop = again.mask(name)
        shown = np.zeros_like(mask)
        shown[box.slices] = crop
        np.testing.assert_array_equal(shown, mask)
        assert change.of(name).box == box or box.size == 0


def at_voxels(ijk_to_ras: np.ndarray, values: np.ndarray, volume: Volume) -> np.ndarray:
    """What values on a grid of their own say at the places of a volume's voxels: linear, 0 beyond the grid."""
    kji = np.moveaxis(np.indices(volume.shape_kji), 0, -1)
    ras = apply_affine(volume.ijk_to_ras, kji[..., ::-1])
    at = np.moveaxis(apply_affine(np.linalg.inv(ijk_to_ras), ras)[..., ::-1], -1, 0)
    size = np.reshape(values.shape, (3, 1, 1, 1))
    inside = ((at >= -0.5) & (at < size - 0.5)).all(axis=0)
    return map_coordinates(values / 255, at, order=1, mode="nearest") * inside


@pytest.mark.parametrize("change", [
    lambda matrix: None,
    lambda matrix: matrix[:3],
    lambda matrix: [*matrix[:3], [0, 0, 0, "one"]],
    lambda matrix: [[0.0] * 4, *matrix[1:]],
    lambda matrix: [*matrix[:3], [0, 0, 1, 1]],
    lambda matrix: [[1e999] * 4, *matrix[1:]],
])  # fmt: skip
def test_confidence_in_a_place_that_is_none_is_refused(
    a_pair: Callable[[Volume], Pair], a_volume: Volume, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    pair = a_pair(a_volume)
    pair.both("add", PointPrompt.from_ijk((12, 12, 6), a_volume))
    call = pair.remote._call

    def damaged(*arguments: Any) -> tuple[dict[str, Any], list[Any]]:
        head, arrays = call(*arguments)
        return {**head, "ijk_to_ras": change(head["ijk_to_ras"])}, arrays

    monkeypatch.setattr(pair.remote, "_call", damaged)
    with pytest.raises(MalformedError, match="ijk_to_ras"):
        pair.remote.opinion("object", "foundation")
    with pytest.raises(MalformedError, match="ijk_to_ras"):
        pair.remote.disagreement("object")


def test_questions_are_answered_as_a_prediction_answers_them(
    a_pair: Callable[[Volume], Pair], an_oblique_left_handed_volume: Volume
) -> None:
    volume = an_oblique_left_handed_volume
    pair = a_pair(volume)
    pair.both("add", BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), volume))
    prediction = pair.local.prediction
    here, there = pair.local.suggest(), pair.remote.suggest()
    assert (there.ras, there.polarity) == (here.ras, here.polarity)
    assert there.expected_gain == pytest.approx(here.expected_gain, rel=1e-4)  # threads add up in another order

    info = pair.remote.client.info()
    assert info["experts"] == {mode: list(names) for mode, names in prediction.modes.items()}
    assert list(prediction.modes) == ["amalgamation", "decoders", "head"]
    for name in prediction.experts:
        opinion = pair.remote.opinion("object", name)
        probability, weight = prediction.opinion_on_patch(name)
        np.testing.assert_array_equal(opinion.ijk_to_ras, prediction.patch_to_ras)
        np.testing.assert_allclose(opinion.probability / 255, probability, atol=0.003)
        np.testing.assert_allclose(opinion.weight / 255, weight, atol=0.003)
        assert opinion.expert == name
        assert opinion.probability.dtype == opinion.weight.dtype == np.uint8
        whole = prediction.experts[name]
        for values, image in ((opinion.probability, whole.probability), (opinion.weight, whole.weight)):
            np.testing.assert_allclose(at_voxels(opinion.ijk_to_ras, values, volume), image, atol=0.003)
    matrix, disagreement = pair.remote.disagreement("object")
    np.testing.assert_allclose(at_voxels(matrix, disagreement, volume), prediction.disagreement, atol=0.003)
    with pytest.raises(SessionStateError, match="no expert"):
        pair.remote.opinion("object", "nobody")
    with pytest.raises(SessionStateError, match="no object"):
        pair.remote.disagreement("nothing")
    pair.both("select", "empty")
    with pytest.raises(SessionStateError, match="no prediction"):
        pair.remote.suggest()
    assert pair.remote.mask("empty")[1].size == 0


def test_what_a_session_refuses_is_refused_with_its_own_error(
    a_pair: Callable[[Volume], Pair], a_volume: Volume
) -> None:
    pair = a_pair(a_volume)
    pair.both("add", PointPrompt.from_ijk((12, 12, 6), a_volume))
    pair.both("lock", "object")
    refused = {
        "add": (PointPrompt((1000, 0, 0)),),
        "redo": (),
        "unlock": ("nobody",),
        "select": ("",),
        "finish": (1e6, True),
        "use_experts": (["nobody"],),
        "rename": ("object", ""),
        "give": ({"format": 77},),
    }

    for verb, arguments in refused.items():
        with pytest.raises((PromptError, SessionStateError)) as expected:
            getattr(pair.local, verb)(*arguments)
        with pytest.raises(type(expected.value)) as found:
            getattr(pair.remote, verb)(*arguments)
        assert str(found.value) == str(expected.value).replace("'a volume'", "'volume'")
    pair.compare(pair.remote.select("object"))


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8", ">i2"])
@pytest.mark.parametrize("way", ["exchange", "body", "packed"])
def test_voxels_arrive_as_they_are_by_every_way(
    an_engine: LocalEngine, a_bundle: Path, an_array: np.ndarray, dtype: str, way: str
) -> None:
    array = np.clip(an_array, 0, 255).astype(dtype)[:, :, ::-1]  # not contiguous
    matrix = np.diag([0.8, 1.1, 2.5, 1.0])
    client = an_engine.client()
    exchange = client.exchange
    if way != "exchange":
        client = EngineClient(client.url, an_engine.api_key)
    session = packed_session(client, array, matrix) if way == "packed" else client.open(array, matrix)
    local = Session(load_bundle(a_bundle), "cpu")
    local.set_volume(Volume(array, matrix))
    click = PointPrompt.from_ijk((17, 12, 6), local.volume)

    change = session.add(click)

    expected = local.add(click)
    assert change.of("object").extent == expected.box
    np.testing.assert_array_equal(session.mask("object")[1], expected.mask_crop()[1])
    assert list(exchange.iterdir()) == []


def packed_session(client: EngineClient, array: np.ndarray, matrix: np.ndarray) -> RemoteSession:
    """As `EngineClient.open` does over TLS."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    header = VolumeHeader(array.shape, array.dtype.name, matrix, None, True)
    body = zlib.compress(little.tobytes())
    parts = iter([body[:100], body[100:]])
    answer = json.loads(client.request("POST", f"{API}/session", parts, {"X-Meta": json.dumps(header.to_json())}))
    return RemoteSession(client, "volume", array.shape, matrix, answer)


def test_images_that_cannot_be_segmented_are_refused(a_client: EngineClient, an_array: np.ndarray) -> None:
    before = a_client.info()["sessions"]
    for array, error in (
        (np.zeros((3, 4, 5), np.int16), VolumeError),
        (np.full((3, 4, 5), np.nan, np.float32), VolumeError),
        (np.zeros((3, 4), np.int16), VolumeError),
        (np.zeros((0, 4, 5), np.int16), VolumeError),
        (np.zeros((3, 4, 5), complex), VolumeError),
    ):
        with pytest.raises(error):
            a_client.open(array, np.eye(4))
    with pytest.raises(GeometryError):
        a_client.open(an_array, np.zeros((4, 4)))

    assert a_client.info()["sessions"] == before


def test_volume_for_which_the_exchange_folder_has_no_room_goes_another_way(
    an_engine: LocalEngine, a_volume: Volume, tmp_path: Path
) -> None:
    client = EngineClient(an_engine.client().url, an_engine.api_key, exchange=tmp_path / "gone")
    session = client.open(a_volume.array_kji, a_volume.ijk_to_ras)

    assert session.add(PointPrompt.from_ijk((12, 12, 6), a_volume)).seconds > 0
    client.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_disk_that_is_full_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from KA2ERSegment.engine import client

    opened = os.open

    def full(path: Any, flags: int, mode: int) -> int:
        os.close(opened(path, flags, mode))
        return opened("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(client.os, "open", full)

    assert client._file_of(tmp_path, np.zeros((3, 40, 50), dtype=np.int16)) is None
    assert list(tmp_path.iterdir()) == []


def test_replay_may_take_longer_than_an_answer(
    a_pair: Callable[[Volume], Pair], a_volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, allowed = a_pair(a_volume).remote, []
    request = session.client.request

    def watched(*arguments: Any) -> bytes:
        allowed.append(arguments[-1])
        return request(*arguments)

    monkeypatch.setattr(session.client, "request", watched)
    step = {"object": "object", "finish": {"smoothing_mm": 1.0, "islands": True}}
    session.revise([step] * 500)
    session.give({**session.to_json(), "steps": [step] * 500})
    session.undo()

    assert min(allowed[:2]) > 2 * allowed[2]
    assert allowed[2] == session.client.timeout


def test_two_sessions_at_once_do_not_meet(a_pair: Callable[[Volume], Pair], a_volume: Volume) -> None:
    other = Volume(np.ascontiguousarray(a_volume.array_kji.transpose(2, 0, 1)), np.diag([1.0, 2.0, 0.5, 1]))
    pairs = [(a_pair(a_volume), a_volume, (12, 12, 6)), (a_pair(other), other, (12, 6, 12))]
    together = threading.Barrier(2)

    def work(pair: Pair, volume: Volume, ijk: tuple[int, int, int]) -> None:
        for n in range(4):
            together.wait(30)
            pair.both("add", PointPrompt.from_ijk((ijk[0] + n, ijk[1], ijk[2]), volume))
        pair.both("undo")

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, *each) for each in pairs]:
            done.result(120)


def test_journal_is_told_whole_to_a_client_that_missed_an_answer(
    a_pair: Callable[[Volume], Pair], a_volume: Volume
) -> None:
    pair = a_pair(a_volume)
    pair.both("add", PointPrompt.from_ijk((12, 12, 6), a_volume))
    click = PointPrompt.from_ijk((14, 12, 6), a_volume)
    lost = {"known": pair.remote._revision, "prompt": click.to_json()}
    pair.remote._call("add", lost)  # nobody reads the answer
    pair.local.add(click)

    pair.remote.select("object")

    assert pair.remote.to_json() == pair.local.to_json()


def test_closed_session_is_over(a_client: EngineClient, a_volume: Volume) -> None:
    session = a_client.open(a_volume.array_kji, a_volume.ijk_to_ras)
    session.heartbeat()
    assert session.progress() == ("", None)
    session.close()
    session.close()

    with pytest.raises(EngineError) as refused:
        session.undo()
    assert refused.value.kind == "lease"


def test_connection_is_kept_open_and_made_anew_when_the_other_side_closed_it(a_client: EngineClient) -> None:
    a_client.info()
    connection = a_client._connection()
    first = connection.sock
    a_client.info()
    assert connection.sock is first

    first.shutdown(2)  # as a proxy does with connections that it finds idle
    assert a_client.info()["protocol"] == 2
    assert connection.sock is not first


def test_address_where_nobody_listens_is_said_to_be_gone() -> None:
    with pytest.raises(EngineGoneError, match="does not answer"):
        EngineClient("http://127.0.0.1:1", "key").info()


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(EngineError, match="like https://host:port"):
        EngineClient(url)


def test_wrong_key_and_strangers_are_told_apart(an_engine: LocalEngine) -> None:
    with pytest.raises(EngineError) as refused:
        EngineClient(an_engine.client().url, "another").info()
    assert refused.value.kind == "auth"

    with pytest.raises(EngineError) as refused:
        EngineClient(an_engine.client().url + "/elsewhere", an_engine.api_key).info()
    assert refused.value.kind == "protocol"


def test_client_of_another_protocol_is_told_so(a_client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one before the experts of every mode were shown."""
    monkeypatch.setattr("KA2ERSegment.engine.client.PROTOCOL", 1)

    with pytest.raises(EngineError, match=r"must speak protocol 1, it speaks 2 .*Install the same version") as refused:
        a_client.info()
    assert refused.value.kind == "protocol"


def test_engine_of_another_protocol_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of the version before answers: it said which arms there are, and nothing of other experts."""
    old = b'{"version": "0.0.1", "protocol": 1, "device": "cpu", "bundle": {}, "arms": ["foundation"]}'
    monkeypatch.setattr(EngineClient, "request", lambda *_, **__: old)

    with pytest.raises(EngineError, match=r"must speak protocol 2, it speaks 1 \(version '0\.0\.1'\)") as refused:
        EngineClient("http://127.0.0.1:1", "key").info()
    assert refused.value.kind == "protocol"


def test_forgotten_client_stops_its_heartbeat(an_engine: LocalEngine, a_volume: Volume) -> None:
    client = EngineClient(an_engine.client().url, an_engine.api_key)
    client.open(a_volume.array_kji, a_volume.ijk_to_ras)
    client._keep_alive(0.01)
    beating = client._beating
    assert beating is not None
    assert beating.daemon

    client.close()
    beating.join(10)
    assert not beating.is_alive()


def test_answer_that_breaks_off_is_the_end_of_the_engine() -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listening.accept()
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        connection.close()

    threading.Thread(target=answer).start()
    with pytest.raises(EngineGoneError):
        EngineClient(f"http://127.0.0.1:{listening.getsockname()[1]}", "key").info()
    listening.close()
