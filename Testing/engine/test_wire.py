"""What travels: everything survives the way, and garbage is refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from KA2ERSegment import errors
from KA2ERSegment.engine import wire
from KA2ERSegment.engine.wire import (
    Change,
    EngineError,
    MalformedError,
    ObjectChange,
    VolumeHeader,
    change_from_head,
    change_to_head,
    error_from_json,
    error_to_json,
    inflate,
    pack_frame,
    read_json,
    suggestion_from_json,
    suggestion_to_json,
    unpack_frame,
    write_json,
)
from KA2ERSegment.geometry import Box
from KA2ERSegment.prompts import Polarity, Suggestion

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def test_clients_need_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys, KA2ERSegment.engine.client, KA2ERSegment.engine.process, KA2ERSegment.engine.wire; "
        "heavy = {'torch', 'scipy', 'monai', 'starlette', 'uvicorn', 'blosc2', 'httpx', 'psutil'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)

    assert done.stdout.strip() == "[]"


@settings(deadline=None)
@given(
    st.lists(arrays.arrays(st.sampled_from([bool, np.uint8]), arrays.array_shapes(min_dims=3, max_dims=3, min_side=0))),
    st.sampled_from([0, 1]),
)
def test_frames_keep_their_arrays(given_arrays: list[np.ndarray], level: int) -> None:
    head, found = unpack_frame(pack_frame({"a": "ü"}, given_arrays, level=level))

    assert head["a"] == "ü"
    assert len(found) == len(given_arrays)
    for one, other in zip(given_arrays, found, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_frames_are_refused(data: st.DataObject) -> None:
    whole = bytearray(pack_frame({"box": [1, 2, 3]}, [np.ones((3, 4, 5), bool), np.ones((2, 2, 2), np.uint8)]))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        whole[at] = value

    with suppress(MalformedError):  # and nothing else
        unpack_frame(bytes(whole[: data.draw(st.integers(0, len(whole)))]), 1000)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        unpack_frame(data)


def test_frame_larger_than_allowed_is_refused_before_it_is_unpacked() -> None:
    frame = pack_frame({}, [np.zeros((200, 200, 200), np.uint8)])

    assert len(frame) < 100_000
    with pytest.raises(MalformedError, match="smaller"):
        unpack_frame(frame, 1_000_000)
    assert len(inflate(zlib.compress(bytes(1 << 20)), 10)) == 11


@settings(deadline=None, max_examples=200)
@given(json_values)
def test_heads_of_changes_are_checked(value: object) -> None:
    change = Change((), Box((0, 0, 0), (0, 0, 0)), "a", ("a",), True, False, 0.1, 0.05)
    head, _ = change_to_head(change)
    assert change_from_head(head, []).names == ("a",)

    for key in head:
        with suppress(MalformedError):  # and nothing else
            change_from_head({**head, key: value}, [])


def test_changes_come_back_as_they_were() -> None:
    mask = np.random.default_rng(0).random((2, 3, 4)) > 0.5
    box = Box((1, 2, 3), (5, 5, 5))
    one = ObjectChange("a b", box, mask, box.dilate(1), 9, 0.5, {"foundation": 0.25}, False)
    change = Change((one,), box, "a b", ("a b", "ü"), True, False, 1.5, 0.5)

    found = change_from_head(*unpack_frame(pack_frame(*change_to_head(change))))

    assert repr(found) == repr(change)
    np.testing.assert_array_equal(found.of("a b").mask, mask)
    assert found.of("ü") is None


def test_a_frame_of_another_protocol_says_what_to_do() -> None:
    frame = bytearray(pack_frame({"a": 1}))
    frame[4:8] = (1).to_bytes(4, "little")
    with pytest.raises(MalformedError, match=r"protocol 2, got one of 1\. Install the same version"):
        unpack_frame(bytes(frame))


def test_suggestions_come_back_as_they_were() -> None:
    suggestion = Suggestion((1.0, -2.5, 3.0), Polarity.NEGATIVE, 0.25)

    assert suggestion_from_json(json.loads(json.dumps(suggestion_to_json(suggestion)))) == suggestion
    assert suggestion_from_json(suggestion_to_json(None)) is None
    with pytest.raises(MalformedError):
        suggestion_from_json({"ras": [1, 2], "polarity": "positive", "expected_gain": 1})


@pytest.mark.parametrize(
    "kind",
    [
        "PromptError",
        "SessionStateError",
        "VolumeError",
        "GeometryError",
        "BundleError",
        "DeviceError",
        "CancelledError",
    ],
)
def test_errors_of_the_library_arrive_as_themselves(kind: str) -> None:
    status, body = error_to_json(getattr(errors, kind)("why"))
    found = error_from_json(status, write_json(body))

    assert 400 <= status < 500
    assert type(found) is getattr(errors, kind)
    assert str(found) == "why"


@pytest.mark.parametrize("kind", ["auth", "capacity", "lease", "malformed", "memory", "protocol", "too large"])
def test_errors_of_the_engine_keep_their_kind(kind: str) -> None:
    found = error_from_json(
        *(part if n == 0 else write_json(part) for n, part in enumerate(error_to_json(EngineError("why", kind))))
    )

    assert isinstance(found, EngineError)
    assert (str(found), found.kind) == ("why", kind)


def test_unexpected_errors_tell_no_more_than_their_class() -> None:
    status, body = error_to_json(ValueError("Miller^Anna is not on the list"))

    assert status == 500
    assert "Miller" not in json.dumps(body)


@settings(deadline=None)
@given(st.integers(100, 599), st.binary(max_size=50) | json_values.map(lambda value: json.dumps(value).encode()))
def test_answers_of_strangers_are_named_as_such(status: int, body: bytes) -> None:
    assert isinstance(error_from_json(status, body), EngineError)


def test_foreign_names_of_errors_make_no_objects() -> None:
    found = error_from_json(422, write_json({"detail": "x", "kind": "refused", "error": "__builtins__"}))

    assert type(found) is EngineError
    assert type(error_from_json(422, write_json({"detail": "x", "kind": "refused", "error": []}))) is EngineError


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": Infinity}', "[1]", "", "{", '{"a": 1' + "0" * 5000 + "}", '{"a":' * 5000, b"\xff\xfe{}"],
)
def test_json_that_is_none_is_refused(text: str | bytes) -> None:
    with pytest.raises(MalformedError):
        read_json(text)


HEADER = {"shape_kji": [2, 3, 4], "dtype": "int16", "ijk_to_ras": np.eye(4).tolist(), "file": None, "packed": False}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(HEADER)), json_values)
def test_headers_of_volumes_are_checked(key: str, value: object) -> None:
    assert VolumeHeader.from_json(HEADER, 24).nbytes == 48

    with suppress(EngineError):  # and nothing else
        assert VolumeHeader.from_json({**HEADER, key: value}, 24).nbytes <= 8 * 24


@pytest.mark.parametrize("name", ["../" + "a" * 29, "a" * 32, "/" + "a" * 31 + ".volume", "a" * 32 + ".volume\n", ""])
def test_only_names_of_our_own_making_are_files(name: str) -> None:
    with pytest.raises(MalformedError, match="hexadecimal"):
        VolumeHeader.from_json({**HEADER, "file": name}, 24)


def test_volume_of_too_many_voxels_is_refused_by_its_header() -> None:
    with pytest.raises(EngineError, match="at most 23") as refused:
        VolumeHeader.from_json(HEADER, 23)
    assert refused.value.kind == "too large"


def test_every_kind_of_error_has_a_status() -> None:
    for kind in wire._STATUS:
        status, _ = error_to_json(EngineError("why", kind))
        assert 400 <= status < 600
