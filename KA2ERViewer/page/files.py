"""Volumes into the scene, and results out of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from aiohttp import web
from trame_slicer.core.volumes_reader import VolumesReader

from KA2ERSegment.dicom_segmentation import series_headers
from KA2ERSegment.errors import KA2ERError, SessionStateError, VolumeError
from KA2ERSegment.segmentation_files import write_segmentation
from KA2ERSegment.volume import Volume
from KA2ERViewer.options import Limits
from KA2ERViewer.page.bridge import Bridge
from KA2ERViewer.page.intake import SUFFIXES, check_volume, kind_of, unpack
from KA2ERViewer.page.scene import ViewerScene
from KA2ERViewer.page.structures import structure_of_segment
from KA2ERViewer.page.windows import apply
from SlicerKA2ERLib.SegmentWriter import segmentIds
from SlicerKA2ERLib.VolumeIO import ijkToRas, volumeData

logger = logging.getLogger("KA2ERViewer")
READABLE = "NIfTI (.nii, .nii.gz), NRRD, MHA, DICOM or a zip of DICOM files"


class Files:
    """Files of one page.

    Args:
        around: the scene.
        bridge: is told of a new volume.
        folder: of this page alone; everything is written below it.
        limits: of what is sent.
    """

    def __init__(self, around: ViewerScene, bridge: Bridge, folder: Path, limits: Limits) -> None:
        self._around, self._bridge, self._limits = around, bridge, limits
        self._uploads, self._results = folder / "uploads", folder / "results"
        self._batches: dict[str, list[tuple[Path, str]]] = {}
        self._headers: list[Any] = []
        """Of the slices of the volume that is open, where they were DICOM: a DICOM SEG refers to them."""

    def routes(self) -> list[web.RouteDef]:
        """What the page asks for beside trame's own."""
        return [
            web.post("/upload", _answering(self._begin)),
            web.put("/upload/{batch}", _answering(self._receive)),
            web.post("/upload/{batch}/open", _answering(self._open)),
            web.get("/save/{kind}", self._save),
        ]

    # -- in ----------------------------------------------------------------------------------------------------------

    def open_local(self, path: Path) -> None:
        """A file or folder of this machine, named by who started the viewer."""
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [(one, path.name) for one in found if one.is_file()]
        try:
            self._read(files)
        except KA2ERError as error:
            self._bridge.fail(str(error))

    async def _begin(self, _: web.Request) -> dict[str, Any]:
        batch = secrets.token_hex(8)
        for old in list(self._batches):
            self._forget(old)
        (self._uploads / batch).mkdir(parents=True)
        self._batches[batch] = []
        return {"batch": batch}

    async def _receive(self, request: web.Request) -> dict[str, Any]:
        batch = request.match_info["batch"]
        files = self._batch(batch)
        if len(files) >= self._limits.files:
            message = f"at most {self._limits.files} files can be opened together. Zip the series that you need."
            raise VolumeError(message)
        path = self._uploads / batch / f"{len(files):06d}"
        files.append((path, request.query.get("name", "volume")))
        left = self._limits.upload_bytes - sum(one.stat().st_size for one, _ in files[:-1])
        with path.open("wb") as target:
            async for chunk in request.content.iter_chunked(1 << 20):
                left -= len(chunk)
                if left < 0:
                    self._forget(batch)
                    message = f"at most {self._limits.upload_bytes / 1e9:.1f} GB can be opened together. Crop it."
                    raise VolumeError(message)
                target.write(chunk)
        return {}

    async def _open(self, request: web.Request) -> dict[str, Any]:
        batch = request.match_info["batch"]
        try:
            await asyncio.sleep(0.05)  # the page shows "Reading" first
            self._read(self._batch(batch))
        finally:
            self._forget(batch)
        return {}

    def _batch(self, batch: str) -> list[tuple[Path, str]]:
        if batch not in self._batches:
            message = "these files are not here any more. Open them again."
            raise SessionStateError(message)
        return self._batches[batch]

    def _forget(self, batch: str) -> None:
        self._batches.pop(batch, None)
        shutil.rmtree(self._uploads / batch, ignore_errors=True)

    def _read(self, files: list[tuple[Path, str]]) -> None:
        """Find the volume among files, and show it."""
        by_kind: dict[str, list[tuple[Path, str]]] = {}
        for path, name in files:
            kind = kind_of(path)
            if kind == "zip":
                inner = unpack(path, path.with_name(path.name + "-unpacked"), self._limits)
                for one in inner:
                    by_kind.setdefault(kind_of(one) or "", []).append((one, name))
            else:
                by_kind.setdefault(kind or "", []).append((path, name))
        by_kind.pop("zip", None)
        plain = [(kind, *one) for kind in by_kind if kind not in ("", "dicom") for one in by_kind[kind]]
        notice = ""
        headers: list[Any] = []
        if plain:
            (kind, path, name), *others = plain
            node = self._plain(path, kind, name)
            notice = f"{len(others)} more files were left out: one volume at a time." if others else ""
        elif "dicom" in by_kind:
            node, headers, notice = self._dicom([path for path, _ in by_kind["dicom"]])
        else:
            names = ", ".join(sorted({name for _, name in files})[:3])
            message = f"a volume must be {READABLE}; {names!r} is none of them. Choose another file."
            raise VolumeError(message)
        volumeData(node)
        apply(node, "Automatic")
        self._bridge.show_volume(node)
        self._bridge.notice(notice)
        self._headers, self._bridge.state.from_dicom = headers, bool(headers)

    def _plain(self, path: Path, kind: str, name: str) -> Any:
        check_volume(path, kind, self._limits)
        named = path.with_name(path.name + SUFFIXES[kind])
        own = self._uploads in path.parents
        if own:
            path.rename(named)
        node = VolumesReader.load_single_file_volume(
            self._around.scene, self._around.logic, str(named if own else path)
        )
        if node is None or not node.IsA("vtkMRMLScalarVolumeNode"):
            message = f"{name!r} must be a scalar volume, it could not be read as one. Export it again."
            raise VolumeError(message)
        node.SetName(_stem(name))
        return self._without_file(node)

    def _dicom(self, paths: list[Path]) -> tuple[Any, list[Any], str]:
        series = sorted(VolumesReader.split_volumes([str(path) for path in paths]), key=len, reverse=True)
        if not series or not series[0]:
            message = "none of the DICOM files has an image that can be read. Choose a CT or MR series."
            raise VolumeError(message)
        try:
            node = VolumesReader.load_single_dcm_volume(self._around.scene, series[0])
        except Exception as error:
            message = "the DICOM series could not be read. Convert it to NIfTI first, or choose another one."
            raise VolumeError(message) from error
        headers = []
        with contextlib.suppress(VolumeError):  # without highdicom there is no DICOM SEG, and all else
            headers = series_headers(series[0])
        rest = len(series) - 1
        return self._without_file(node), headers, f"The largest of {rest + 1} series was opened." if rest else ""

    def _without_file(self, node: Any) -> Any:
        """Its file is removed in a moment: a scene that is saved must have the voxels themselves."""
        storage = node.GetStorageNode()
        if storage is not None:
            self._around.scene.RemoveNode(storage)
        return node

    # -- out ---------------------------------------------------------------------------------------------------------

    async def _save(self, request: web.Request) -> web.StreamResponse:
        kind = request.match_info["kind"]
        writers: dict[str, Callable[[Path], None]] = {
            "seg.nrrd": self._write_segmentation,
            "seg.dcm": self._write_labels,
            "nii.gz": self._write_labels,
            "json": self._write_prompts,
            "mrb": self._write_scene,
        }
        if kind not in writers:
            raise web.HTTPNotFound
        folder = self._results / secrets.token_hex(8)
        folder.mkdir(parents=True)
        try:
            name = f"{_safe(self._bridge.logic.volumeNode.GetName())}.{kind}"
            path = folder / name
            writers[kind](path)
            body = path.read_bytes()
        except (KA2ERError, OSError, AttributeError) as error:
            text = str(error) if isinstance(error, KA2ERError) else "nothing could be saved. Open a volume first."
            self._bridge.fail(text)
            self._bridge.state.flush()
            raise web.HTTPNoContent from error  # the page stays, and shows the message
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
        return web.Response(body=body, headers=headers, content_type="application/octet-stream")

    def _segmentation(self) -> Any:
        node = self._bridge.logic.segmentationNode
        if node is None or not segmentIds(node):
            message = "there must be a segment to save, there is none. Place a prompt first."
            raise SessionStateError(message)
        return node

    def _write_segmentation(self, path: Path) -> None:
        storage = slicer.vtkMRMLSegmentationStorageNode()
        storage.SetFileName(str(path))
        if not storage.WriteData(self._segmentation()):
            message = "the segmentation could not be written. There may be no room left on the disk."
            raise VolumeError(message)

    def _write_labels(self, path: Path) -> None:
        node, volume_node = self._segmentation(), self._bridge.logic.volumeNode
        masks, colours, structures = {}, {}, {}
        for segment in segmentIds(node):
            known = node.GetSegmentation().GetSegment(segment)
            name = known.GetName()
            colours[name] = known.GetColor()
            if (structure := structure_of_segment(known)) is not None:
                structures[name] = structure
            array = slicer.util.arrayFromSegmentBinaryLabelmap(node, segment, volume_node)
            masks[name] = np.zeros(volumeData(volume_node).grid.shape_kji, bool) if array is None else array > 0
        data = volumeData(volume_node)
        volume = Volume(data.array, ijkToRas(volume_node), "volume")
        write_segmentation(path, masks, volume, colours=colours, headers=self._headers, structures=structures)

    def _write_prompts(self, path: Path) -> None:
        node, journal = self._segmentation(), self._bridge.logic.journal()
        names = {segment: node.GetSegmentation().GetSegment(segment).GetName() for segment in segmentIds(node)}
        path.write_text(json.dumps(_with_names(journal, names), indent=1), encoding="utf-8")

    def _write_scene(self, path: Path) -> None:
        if not self._around.app.io_manager.save_scene(path):
            message = "the scene could not be written. There may be no room left on the disk."
            raise VolumeError(message)


def _answering(handler: Callable[[web.Request], Awaitable[dict[str, Any]]]) -> Any:
    """Refusals become JSON that the page shows."""

    async def answer(request: web.Request) -> web.Response:
        try:
            return web.json_response(await handler(request))
        except KA2ERError as error:
            return web.json_response({"detail": str(error)}, status=422)

    return answer


def _with_names(journal: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The engine knows segments by their IDs, people by their names."""
    if not journal or len(set(names.values())) < len(names):
        return journal
    return {
        **journal,
        "objects": [names.get(one, one) for one in journal["objects"]],
        "selected": names.get(journal["selected"], journal["selected"]),
        "steps": [{**step, "object": names.get(step["object"], step["object"])} for step in journal["steps"]],
    }


def _stem(name: str) -> str:
    plain = Path(name.replace("\\", "/")).name
    for suffix in (".nii.gz", ".seg.nrrd"):
        if plain.lower().endswith(suffix):
            return plain[: -len(suffix)]
    return Path(plain).stem or "Volume"


def _safe(name: str) -> str:
    """For a header: letters, digits and a few others."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_. ") else "_" for c in name).strip(" .")
    return kept[:80] or "segmentation"
