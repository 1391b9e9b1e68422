"""The whole path in a real Slicer: volume loaded, module, click, segment with overlays. Prints times, takes pictures.

    export KA2ER_VOLUME=ct.nii.gz KA2ER_POINT=89,126,-766 KA2ER_OTHER=-83,99,-790 KA2ER_PYTHON=.venv/bin/python
    Slicer --no-splash --additional-module-paths scripted_modules/SlicerKA2ER --python-script Testing/desktop/walk.py

KA2ER_POINT is in RAS mm and lies in the structure, KA2ER_OTHER in another one. Without KA2ER_PYTHON the engine runs in
Slicer's own Python. Pictures and walk.json go to KA2ER_OUTPUT (output/walk). Mouse events are Qt's own, sent to the
slice view. The exit code is 0 only where every step came out.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import qt
import slicer
import vtk

OUTPUT = Path(os.environ.get("KA2ER_OUTPUT", "output/walk")).resolve()
PATIENCE = 180.0


class Gaps:
    """The longest time for which Qt's event loop did not come round."""

    def __init__(self):
        self.longest, self._last = 0.0, time.perf_counter()
        self._timer = qt.QTimer()
        self._timer.setInterval(2)
        self._timer.timeout.connect(self._tick)
        self._timer.start()

    def _tick(self):
        now = time.perf_counter()
        self.longest = max(self.longest, now - self._last)
        self._last = now

    def start(self):
        self.longest, self._last = 0.0, time.perf_counter()


def wait(condition, what):
    begin = time.perf_counter()
    while not condition():
        if time.perf_counter() - begin > PATIENCE:
            message = f"{what} did not happen within {PATIENCE:.0f} s"
            raise TimeoutError(message)
        slicer.app.processEvents(qt.QEventLoop.AllEvents, 20)
    return time.perf_counter() - begin


def linger(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        slicer.app.processEvents(qt.QEventLoop.AllEvents, 20)


def shot(name):
    linger(0.5)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    slicer.util.mainWindow().grab().save(str(OUTPUT / f"{name}.png"))


def click(ras, view="Red", modifiers=qt.Qt.NoModifier):
    """A left click of Qt's on a slice view, at a point of the patient."""
    slice_widget = slicer.app.layoutManager().sliceWidget(view)
    node = slice_widget.mrmlSliceNode()
    node.JumpSliceByCentering(*ras)
    linger(0.2)
    inverse = vtk.vtkMatrix4x4()
    vtk.vtkMatrix4x4.Invert(node.GetXYToRAS(), inverse)
    x, y, _, _ = inverse.MultiplyPoint((*ras, 1.0))
    widget = slice_widget.sliceView().VTKWidget()
    ratio = widget.devicePixelRatio
    ratio = ratio() if callable(ratio) else ratio
    position = qt.QPointF(x / ratio, widget.height - y / ratio)
    for kind, buttons in (
        (qt.QEvent.MouseMove, qt.Qt.NoButton),
        (qt.QEvent.MouseButtonPress, qt.Qt.LeftButton),
        (qt.QEvent.MouseButtonRelease, qt.Qt.NoButton),
    ):
        button = qt.Qt.NoButton if kind == qt.QEvent.MouseMove else qt.Qt.LeftButton
        slicer.app.sendEvent(widget, qt.QMouseEvent(kind, position, button, buttons, modifiers))
        slicer.app.processEvents()


def voxels(logic):
    if logic.segmentationNode is None or not logic.selectedSegment:
        return 0
    array = slicer.util.arrayFromSegmentBinaryLabelmap(logic.segmentationNode, logic.selectedSegment, logic.volumeNode)
    return int(np.count_nonzero(array))


def walk():
    report = {}
    settings = slicer.app.settings()
    if "KA2ER_PYTHON" in os.environ:
        settings.setValue("KA2ERSegment/engine", "python")
        settings.setValue("KA2ERSegment/python", str(Path(os.environ["KA2ER_PYTHON"]).absolute()))
    volume = slicer.util.loadVolume(os.environ["KA2ER_VOLUME"])
    slicer.util.mainWindow().resize(1600, 1000)
    linger(0.5)
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    point = tuple(float(x) for x in os.environ["KA2ER_POINT"].split(","))
    gaps = Gaps()
    linger(1.0)

    begin = time.perf_counter()
    slicer.util.selectModule("SlicerKA2ER")  # first user action
    report["module opened, s"] = time.perf_counter() - begin
    panel = slicer.modules.slicerka2er.widgetRepresentation().self().panel
    logic = panel.logic
    shot("1-opened")
    gaps.start()
    begin = time.perf_counter()
    click(point)  # second
    wait(lambda: voxels(logic) > 0 and logic.isIdle, "the first mask")
    report["first mask, s after the click"] = time.perf_counter() - begin
    report["longest gap of the event loop, first click, ms"] = 1000 * gaps.longest
    report["voxels after the first click"] = voxels(logic)
    shot("2-first-click")

    later, longest = [], []
    for n in range(6):
        turn = np.pi * n / 3
        offset = np.array(point) + 25.0 * np.array([np.cos(turn), np.sin(turn), 0.0])
        gaps.start()
        begin = time.perf_counter()
        click(tuple(offset))
        begin += 0.2  # `click` lingers so long before it clicks
        wait(lambda: logic.isIdle, "a later mask")
        later.append(time.perf_counter() - begin)
        longest.append(gaps.longest)
    report["later clicks, median s"] = float(np.median(later))
    report["longest gap of the event loop, later clicks, ms"] = [round(1000 * gap) for gap in longest]

    report["prompts"] = len(logic.prompts())

    before = voxels(logic)
    click((point[0] - 60.0, point[1], point[2]), modifiers=qt.Qt.AltModifier)
    wait(lambda: logic.isIdle, "the negative click")
    report["negative prompts"] = sum(not row.positive for row in logic.prompts())
    logic.undo()
    wait(lambda: logic.isIdle, "undo")
    report["undo brought back every voxel"] = voxels(logic) == before

    for name in [row.name for row in logic.experts()][:1]:
        logic.setExpertShown(name, True)
    wait(lambda: logic.isIdle, "the overlay")
    shot("3-expert")
    for row in logic.experts():
        logic.setExpertShown(row.name, False)
    logic.setDisagreementShown(True)
    wait(lambda: logic.isIdle, "the disagreement")
    shot("4-disagreement")
    logic.setDisagreementShown(False)

    finished, state = logic.selectedSegment, voxels(logic)
    logic.nextSegment()
    click(tuple(float(x) for x in os.environ["KA2ER_OTHER"].split(",")))
    wait(lambda: logic.isIdle, "the second segment")
    report["voxels of the second segment"] = voxels(logic)
    logic.selectSegment(finished)
    report["the finished segment is as it was"] = voxels(logic) == state
    shot("5-two-segments")

    path = OUTPUT / "walk.mrb"
    prompts = len(logic.prompts())
    slicer.util.saveScene(str(path))
    slicer.mrmlScene.Clear()
    linger(0.5)
    slicer.util.loadScene(str(path))
    linger(1.0)
    logic.selectSegment(finished)
    report["prompts restored with the scene"] = f"{len(logic.prompts())} of {prompts}"
    click(tuple(np.add(point, (0.0, 8.0, 0.0))))
    wait(lambda: logic.isIdle, "a click in the restored scene")
    report["voxels after a click in the restored scene"] = voxels(logic)
    shot("6-restored")
    report["last error"] = logic.lastError
    return report


code = 1
try:
    done = walk()
    print(json.dumps(done, indent=1), flush=True)  # noqa: T201
    (OUTPUT / "walk.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    code = 0 if done["undo brought back every voxel"] and done["the finished segment is as it was"] else 2
except BaseException:
    import traceback

    traceback.print_exc()
    shot("failed")
finally:
    slicer.util.exit(code)
