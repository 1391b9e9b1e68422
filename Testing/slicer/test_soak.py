"""A thousand random steps of the real logic on a real scene: segments stay what the engine says, and nothing piles up.

The engine is the real one with a tiny bundle: its whole application in this process, without a socket, and for a
shorter walk in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import operator
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slicer
import vtk
import vtk.util.numpy_support as numpy_support

from KA2ERSegment.engine.client import EngineClient
from KA2ERSegment.engine.process import LocalEngine
from KA2ERSegment.engine.wire import EngineGoneError, error_from_json
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import Box, apply_affine
from KA2ERSegment.prompts import PointPrompt

SEED, CHAPTERS, STEPS = int(os.environ.get("SOAK_SEED", "0")), 8, 125
"""Steps on one segmentation; then everything that belongs to it must be gone."""
KEY = "a key"
LIVER = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^85756007^Tissue"
    "~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
)


# -- the engine --------------------------------------------------------------------------------------------------------


class ClientHere(EngineClient):
    """`EngineClient` whose requests go to an application in this process, byte for byte what would travel."""

    def __init__(self, app: Any) -> None:
        super().__init__("http://127.0.0.1:1", KEY)
        self.app, self.dead = app, False

    def request(self, method: str, path: str, body: Any = b"", headers: Any = None, timeout: Any = None) -> bytes:
        if self.dead:
            message = "the engine does not answer."
            raise EngineGoneError(message)
        whole = body if isinstance(body, bytes) else b"".join(body)
        app = self.app
        status, data = asyncio.run(self._ask(app, method, path, whole, {**self._headers, **(headers or {})}))
        if self.dead:
            message = "the engine died meanwhile."
            raise EngineGoneError(message)
        if status != 200:
            raise error_from_json(status, data)
        return data

    async def _ask(self, app: Any, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        lines = {"host": "127.0.0.1:1", "content-length": str(len(body)), **{k.lower(): v for k, v in headers.items()}}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in lines.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
        }  # fmt: skip
        coming = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not coming:
                await asyncio.Event().wait()  # this client never hangs up
            return coming.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


class EngineHere:
    """`EngineProtocol` in this process."""

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.log, self.starts = bundle, [], 0
        self._engine: Any = None
        self._client: ClientHere | None = None

    def start(self) -> None:
        from KA2ERSegment.engine.app import make_app
        from KA2ERSegment.engine.serve import Options, load

        if self._client is None:
            self.starts += 1
            self._engine = load(Options(bundle=self.bundle, device="cpu", threads=1, idle_timeout=0, max_sessions=4))
            self._client = ClientHere(make_app(self._engine, KEY))

    def poll(self) -> str:
        return "dead" if self._client is None else "ready"

    def client(self) -> ClientHere:
        client = self._client
        if client is None:
            message = "the engine is dead."
            raise EngineGoneError(message)
        return client

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        if self._client is not None:
            self._client.dead, self._client.app = True, None
            self._engine.worker.close()
        self._client = self._engine = None


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from KA2ERSegment.testing import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


# -- the walk ----------------------------------------------------------------------------------------------------------

CHANCES = {
    "point": 30, "box": 6, "scribble": 8, "lasso": 6, "undo": 12, "redo": 7, "select": 7, "next": 4,
    "delete": 4, "move": 4, "edit": 9, "finish": 4, "reset": 2, "cancel": 3, "remove": 2, "neighbours": 3,
    "outside": 1, "markup": 2, "experts": 1, "rename": 1, "foreign": 1, "die": 0.5, "masking": 2, "overlays": 2,
    "suggest": 1, "transform": 1, "structure": 1,
}  # fmt: skip
"""Of each kind of step, beside each other."""


class Walk:
    """Random steps, and what must hold after them.

    Args:
        around: the scene.
        logic: `PromptLogic`.
        seed: of all that is random.
        kill: ends the engine without a word; None where that is left out.
    """

    def __init__(self, around: Any, logic: Any, seed: int, kill: Callable[[], None] | None = None) -> None:
        self.scene, self.logic, self._kill = around.scene, logic, kill
        self.rng = np.random.default_rng(seed)
        self._order = np.random.default_rng(seed)  # of its own: how much the other one is asked depends on the steps
        self.refusals: list[str] = []
        self.done: Counter[str] = Counter()
        self.trail: list[str] = []
        self._masks: dict[str, np.ndarray] = {}  # of the scene, when all was quiet
        self._taking = False  # whether something since then may take voxels from neighbours
        self._own: set[str] = set()  # segments that were prompted since then
        self._editor = slicer.vtkSlicerSegmentEditorLogic()
        self._editor.SetMRMLScene(around.scene)
        self._parameters = slicer.vtkMRMLSegmentEditorNode()
        self._parameters.SetOverwriteMode(self._parameters.OverwriteNone)
        self._masked = slicer.vtkMRMLSegmentEditorNode()
        logic.observers.append(self._note)

    def _note(self, event: str) -> None:
        if event == "error":
            self.refusals.append(self.logic.lastError)

    def begin(self, volume: Any) -> None:
        """Go to another volume, without a segmentation."""
        self.logic.setVolumeNode(volume)
        self._masks.clear()

    def step(self) -> None:
        names, weights = list(CHANCES), np.array(list(CHANCES.values()))
        name = str(self._order.choice(names, p=weights / weights.sum()))
        self.done[name] += 1
        self.trail.append(name)
        try:
            getattr(self, f"_{name}")()
        except KA2ERError as refused:
            self.refusals.append(str(refused))
        if self.rng.random() < 0.3:
            self.logic.poll()

    # places

    def _ijk(self, margin: int = 0) -> np.ndarray:
        size = np.array(self.logic.volumeNode.GetImageData().GetDimensions())
        return self.rng.integers(margin, size - margin)

    def _world(self, *points: Any) -> list[tuple[float, ...]]:
        """Voxels -> world RAS, the volume's parent transform included."""
        from SlicerKA2ERLib.VolumeIO import ijkToRas, matrixBetween

        matrix = matrixBetween(self.logic.volumeNode, None) @ ijkToRas(self.logic.volumeNode)
        return [tuple(apply_affine(matrix, np.asarray(point, dtype=float)).tolist()) for point in points]

    def _positive(self) -> bool:
        return bool(self.rng.random() < 0.65)

    def _some(self, values: Any) -> Any:
        values = list(values)
        return values[int(self.rng.integers(len(values)))] if values else None

    # steps

    def _prompted(self) -> None:
        self._taking |= self.logic.neighbours == "compete"
        self._own.add(self.logic.selectedSegment)

    def _point(self) -> None:
        self._prompted()
        self.logic.addPoint(self._world(self._ijk())[0], self._positive())

    def _box(self) -> None:
        self._prompted()
        start = self._ijk(4)
        corner, *others = self._world(start, *(start + np.eye(3, dtype=int) * self.rng.integers(2, 9)))
        self.logic.addBox(corner, [tuple(np.subtract(other, corner)) for other in others], self._positive())

    def _scribble(self) -> None:
        self._prompted()
        self.logic.addScribble(self._world(*(self._ijk() for _ in range(3))), self._positive(), 1.5)

    def _lasso(self) -> None:
        self._prompted()
        i, j, k = self._ijk(6) if min(self.logic.volumeNode.GetImageData().GetDimensions()) > 12 else self._ijk()
        self.logic.addLasso(self._world((i, j, k), (i + 5, j, k), (i + 4, j + 5, k)), self._positive())

    def _outside(self) -> None:
        self.logic.addPoint(self._world((-5, 0, 0))[0], True)

    def _undo(self) -> None:
        self._taking = True
        self.logic.undo()

    def _redo(self) -> None:
        self._taking = True
        self.logic.redo()

    def _select(self) -> None:
        if row := self._some(self.logic.segments()):
            self.logic.selectSegment(row.id)

    def _next(self) -> None:
        if len(self.logic.segments()) < 6:
            self.logic.nextSegment()

    def _delete(self) -> None:
        self._taking = True
        if row := self._some(self.logic.prompts()[-4:]):
            self.logic.deletePrompt(row.nodeId)

    def _move(self) -> None:
        """As a mouse does: some positions on the way, none of them told apart from the last."""
        self._taking = True
        points = [row for row in self.logic.prompts()[-6:] if row.kind == "point"]
        if row := self._some(points):
            nodeId, _, point = row.nodeId.partition("#")
            node = self.scene.GetNodeByID(nodeId)
            n = node.GetNthControlPointIndexByID(point)
            for ras in self._world(*(self._ijk() for _ in range(3))):
                node.SetNthControlPointPositionWorld(n, *ras)

    def _markup(self) -> None:
        """A marker goes, or comes, by Slicer's own means."""
        from SlicerKA2ERLib.PromptNodes import removeNode

        self._taking = True
        if row := self._some(self.logic.prompts()[-3:]):
            nodeId, _, point = row.nodeId.partition("#")
            node = self.scene.GetNodeByID(nodeId)
            if not point:
                removeNode(node)
            elif self.rng.random() < 0.5:
                node.RemoveNthControlPoint(node.GetNthControlPointIndexByID(point))
            else:
                node.AddControlPointWorld(*self._world(self._ijk())[0])

    def _edit(self) -> None:
        """A hand paints or erases a box through Slicer's Segment Editor."""
        from SlicerKA2ERLib.SegmentWriter import gridInSegmentation, orientedImage
        from SlicerKA2ERLib.VolumeIO import volumeData

        row, volume, node = self._some(self.logic.segments()), self.logic.volumeNode, self.logic.segmentationNode
        if row is None:
            return
        start, data = self._ijk(4), volumeData(volume)
        box = Box(tuple(start.tolist()), tuple((start + self.rng.integers(1, 5, 3)).tolist())).intersect(data.grid.box)
        image = orientedImage(np.ones(box.shape_kji, dtype=bool), box, gridInSegmentation(node, volume, data))
        self._parameters.SetAndObserveSegmentationNode(node)
        self._editor.SetSegmentEditorNode(self._parameters)
        add = self.rng.random() < 0.6
        before = self.mask(row.id)
        mode = self._editor.ModificationModeAdd if add else self._editor.ModificationModeRemove
        self._editor.ModifySegmentByLabelmap(node, row.id, image, mode, True, True)
        before[box.slices] = add
        assert np.array_equal(self.mask(row.id), before), "this test's own hand"
        if row.id in self._masks and not add:
            self._masks[row.id][box.slices] = False

    def _finish(self) -> None:
        self._own.add(self.logic.selectedSegment)
        self.logic.setFinish(float(self.rng.choice([0.0, 1.0, 2.5])), bool(self.rng.random() < 0.5))

    def _reset(self) -> None:
        self._taking = True
        self.logic.reset()

    def _cancel(self) -> None:
        self.logic.cancel()

    def _remove(self) -> None:
        if len(rows := self.logic.segments()) > 1:
            row = self._some(rows)
            self.logic.removeSegment(row.id)

    def _neighbours(self) -> None:
        self.logic.setNeighbours(str(self.rng.choice(["keep", "keep", "compete", "overlap"])))

    def _masking(self) -> None:
        """The Segment Editor's editable area counts, or does not any more."""
        editor, logic, node = self._masked, self.logic, slicer.vtkMRMLSegmentationNode
        editor.SetMaskMode(int(self.rng.choice([node.EditAllowedEverywhere, node.EditAllowedOutsideAllSegments])))
        editor.SetSourceVolumeIntensityMask(bool(self.rng.random() < 0.5))
        editor.SetSourceVolumeIntensityMaskRange(-5, 1000)
        logic.segmentEditorNode = None if self.rng.random() < 0.5 else editor

    def _overlays(self) -> None:
        names = [row.name for row in self.logic.experts()]
        if name := self._some(names):
            self.logic.setExpertShown(name, bool(self.rng.random() < 0.5))
            self.logic.setDisagreementShown(bool(self.rng.random() < 0.5))

    def _suggest(self) -> None:
        self.logic.suggest()

    def _transform(self) -> None:
        """Volume, segments and markers are moved together: nothing is different."""
        matrix = slicer.util.vtkMatrixFromArray(turned(float(self.rng.uniform(0, 90))))
        self.logic.volumeNode.GetParentTransformNode().SetMatrixTransformToParent(matrix)

    def _structure(self) -> None:
        if row := self._some(self.logic.segments()):
            self.logic.setTerminology(row.id, LIVER)
            self.logic.setStatus(row.id, "completed")

    def _experts(self) -> None:
        experts = [row.name for row in self.logic.experts()][1:]
        if name := self._some(experts):
            self.logic.setExpertEnabled(name, bool(self.rng.random() < 0.6))

    def _rename(self) -> None:
        if row := self._some(self.logic.segments()):
            segment = self.logic.segmentationNode.GetSegmentation().GetSegment(row.id)
            segment.SetName(f"name {self.rng.integers(100)}")

    def _foreign(self) -> None:
        """Another module makes a segment."""
        if self.logic.segmentationNode is not None and len(self.logic.segments()) < 6:
            self.logic.segmentationNode.GetSegmentation().AddEmptySegment()

    def _die(self) -> None:
        if self._kill is not None:
            self._kill()

    # what must hold when all is quiet

    @property
    def session(self) -> Any:
        """`RemoteSession`, None where there is none."""
        return self.logic._engine.link.session

    def mask(self, segmentId: str) -> np.ndarray:
        """(K, J, I) bool on the volume's grid, read by Slicer's own means."""
        from SlicerKA2ERLib.SegmentWriter import gridInSegmentation, orientedImage
        from SlicerKA2ERLib.VolumeIO import volumeData

        volume, node = self.logic.volumeNode, self.logic.segmentationNode
        data, labelmap, found = volumeData(volume), slicer.vtkOrientedImageData(), slicer.vtkOrientedImageData()
        node.GetBinaryLabelmapRepresentation(segmentId, labelmap)
        if labelmap.GetPointData().GetScalars() is None or labelmap.GetNumberOfPoints() == 0:
            return np.zeros(data.array.shape, dtype=bool)
        whole = orientedImage(np.zeros(data.array.shape, bool), data.grid.box, gridInSegmentation(node, volume, data))
        resample = slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage
        assert resample(labelmap, whole, found, False)
        return numpy_support.vtk_to_numpy(found.GetPointData().GetScalars()).reshape(data.array.shape) > 0

    def masks(self) -> dict[str, np.ndarray]:
        return {row.id: self.mask(row.id) for row in self.logic.segments()}

    def edited(self, name: str) -> bool:
        return self.logic._mirror.isEdited(self.logic.segmentationNode, name)

    def check(self) -> None:
        """All is quiet: scene, engine and markers agree."""
        from SlicerKA2ERLib.PromptLedger import journalled

        assert not self.logic._ledger.pending
        masks = self.masks()
        for before in self.refusals:
            assert "went wrong in the module" not in before, before
        if not self._taking:
            for name, before in self._masks.items():
                if name in masks and name not in self._own:
                    assert not (before & ~masks[name]).any(), f"{name} lost voxels; {self.trail[-9:]}"
        self._masks, self._taking, self._own = {name: mask.copy() for name, mask in masks.items()}, False, set()
        if self.session is None or self.logic._engine.mirror.floor is None:
            return
        try:
            for name, mask in masks.items():
                known = self.logic._mirror.known.get(name)
                if known is not None and not known.differs and not self.edited(name):
                    told = self.engineMask(name)
                    assert np.array_equal(mask, told), f"{name} is not what the engine says; {self.trail[-9:]}"
        except EngineGoneError:
            return  # it died since; the next verb starts another
        foreign = {owner for owner, _ in self.logic._ledger.foreign.values()}
        journal = journalled(self.session.steps)
        for name in masks.keys() - foreign:
            told = Counter(described(prompt) for prompt in journal.get(name, []))
            shown = Counter(described(m.prompt) for m in self.logic._markers.markers() if m.segmentId == name)
            assert shown == told, f"markers of {name}; {self.trail[-9:]}"

    def checkReplay(self, bundle: Any, wait: Callable[[Any], None]) -> None:
        """All that was done, done again in a session of its own, gives the same voxels."""
        from KA2ERSegment import Session, Volume
        from SlicerKA2ERLib.VolumeIO import volumeData

        self._taking = True
        self.logic.segmentEditorNode = None
        self.logic.setNeighbours("overlap")
        self.logic.addSegment()
        self.logic.addPoint(self._world(self._ijk())[0], True)  # before it the engine is told what hands did
        wait(self.logic)
        self.check()
        data, saved = volumeData(self.logic.volumeNode), self.session.to_json()
        fresh = Session(bundle, "cpu")
        fresh.set_volume(Volume(data.array, data.grid.ijk_to_ras))
        fresh.give(saved)
        masks = self.masks()
        assert masks[self.logic.selectedSegment].any()
        assert not any(self.edited(name) or known.differs for name, known in self.logic._mirror.known.items())
        for name, mask in masks.items():
            told = fresh.prediction_of(name) if name in fresh.objects else None
            assert np.array_equal(mask, told.mask if told is not None else np.zeros_like(mask)), f"replay of {name}"

    def engineMask(self, name: str) -> np.ndarray:
        mask = np.zeros(self.session.shape_kji, dtype=bool)
        if name in self.session.names:
            box, crop = self.session.mask(name)
            if box.size:
                mask[box.slices] = crop
        return mask


def described(prompt: Any) -> Any:
    from SlicerKA2ERLib.PromptLedger import kindOf

    place = tuple(np.round(prompt.ras, 2) + 0.0) if isinstance(prompt, PointPrompt) else ()
    return kindOf(prompt), prompt.polarity.value, place


# -- what may not pile up ----------------------------------------------------------------------------------------------


IN_SLICER = ("SlicerKA2ERLib", "KA2ERSegment.engine.client", "KA2ERSegment.engine.wire", "KA2ERSegment.session")


def ours() -> Counter[str]:
    """How many objects of the classes that work in Slicer there are, and of the engine's sessions."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith(IN_SLICER):
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return found


def observers(*things: Any) -> int:
    return sum(str(thing).count("vtkObserver (") for thing in things)


def census(around: Any) -> Counter[str]:
    """Nodes by class, items of the subject hierarchy, observers and threads."""
    scene = around.scene
    nodes = [scene.GetNthNode(n) for n in range(scene.GetNumberOfNodes())]
    hierarchy, items = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene), vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), items, True)
    counts = Counter(node.GetClassName() for node in nodes)
    counts["hierarchy items"] = items.GetNumberOfIds()
    counts["observers"] = observers(scene, around.applicationLogic, *nodes)
    counts["threads"] = threading.active_count()
    return counts


def resident() -> int:
    """Bytes of this process in memory, without what the allocator only keeps for later; 0 where nobody says."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_volumes(a_scene, an_array, an_oblique_affine):
    """Anisotropic and oblique, under parent transforms of their own."""
    nodes = []
    for n, array in enumerate((an_array, np.ascontiguousarray(an_array[:, 2:, :26]))):
        node = a_scene.addVolume(array, an_oblique_affine, f"volume {n}")
        transform = a_scene.scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        vtkMatrix = slicer.util.vtkMatrixFromArray(turned(15 + 20 * n))
        transform.SetMatrixTransformToParent(vtkMatrix)
        node.SetAndObserveTransformNodeID(transform.GetID())
        nodes.append(node)
    return nodes


def turned(degrees: float) -> np.ndarray:
    angle, matrix = np.deg2rad(degrees), np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = 40, -25, 10
    return matrix


@pytest.fixture
def a_walk(a_scene):
    """Begins a walk: engine, seed, how the engine is killed."""
    from SlicerKA2ERLib.PromptLogic import PromptLogic

    logic = PromptLogic(a_scene.scene, a_scene.applicationLogic)

    def begin(engine: Any, seed: int, kill: Callable[[], None]) -> Walk:
        logic.connectEngine(lambda: engine)
        return Walk(a_scene, logic, seed, kill)

    yield begin
    logic.close()


def a_chapter(walk: Walk, volume: Any, steps: int, bundle: Any, wait: Callable[[Any], None]) -> None:
    """Walk on a volume, and take away what came of it."""
    from SlicerKA2ERLib.PromptNodes import removeNode

    walk.begin(volume)
    for _ in range(steps):
        walk.step()
        if walk.rng.random() < 0.6:
            wait(walk.logic)
            walk.check()
    wait(walk.logic)
    walk.check()
    walk.checkReplay(bundle, wait)
    removeNode(walk.logic.segmentationNode)
    walk.logic.setVolumeNode(None)
    wait(walk.logic)


@pytest.mark.slow
def test_thousand_random_steps_leave_no_wrong_voxel_and_nothing_behind(a_scene, two_volumes, a_bundle, a_walk, wait):
    engine = EngineHere(a_bundle.folder)
    walk = a_walk(engine, SEED, engine.stop)
    scenes, objects, bytes_ = [], [], []
    for chapter in range(CHAPTERS):
        a_chapter(walk, two_volumes[chapter % 2], STEPS, a_bundle, wait)
        engine.stop()  # what its sessions hold is not the logic's
        scenes.append(census(a_scene))
        objects.append(ours())
        bytes_.append(resident())
    half = CHAPTERS // 2
    most = functools.reduce(operator.or_, scenes[:half])

    assert walk.done.keys() == set(CHANCES)
    assert len(set(walk.refusals)) > 3, "the walk also tries what is refused"
    for late in scenes[half:]:
        assert late - most == Counter(), "there is more in the scene than after any chapter of the first half"
    for late in objects[half:]:
        assert sum(late.values()) <= max(sum(early.values()) for early in objects[:half]) + 10, late
    # 0.5 MB a step would be one volume's mask each; torch's own pools, which share this process, breathe by 100 MB
    assert bytes_[-1] - bytes_[half - 1] < 0.5e6 * STEPS * (CHAPTERS - half)


def test_random_steps_with_an_engine_that_is_a_process_and_is_killed_now_and_then(two_volumes, a_bundle, a_walk, wait):
    engine = LocalEngine([sys.executable], a_bundle.folder, "cpu", arguments=["--threads", "1"])
    killed: list[int] = []

    def kill() -> None:
        killed.append(engine.pid)
        os.kill(engine.pid, signal.SIGTERM)

    walk = a_walk(engine, SEED, kill)
    patiently = functools.partial(wait, seconds=60)
    a_chapter(walk, two_volumes[0], 60, a_bundle, patiently)
    kill()
    a_chapter(walk, two_volumes[1], 10, a_bundle, patiently)

    assert engine.pid not in killed
    assert engine.poll() == "ready"
