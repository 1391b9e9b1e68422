"""What the logic promises as a whole: the protocol, no Qt, no torch, jobs in order."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[2] / "scripted_modules" / "SlicerKA2ER"
LOGIC_FILES = (
    "Confidence",
    "Conversation",
    "EngineLink",
    "EngineMirror",
    "Jobs",
    "Outline",
    "Overlays",
    "PromptLedger",
    "PromptLogic",
    "PromptNodes",
    "Protocols",
    "SegmentWriter",
    "SequenceLogic",
    "SliceTools",
    "Terminology",
    "VolumeIO",
)


def test_logic_has_all_that_the_protocol_promises(a_logic):
    from SlicerKA2ERLib.Protocols import PromptLogicProtocol

    methods = [name for name in vars(PromptLogicProtocol) if not name.startswith("_")]
    promised = {*methods, *PromptLogicProtocol.__annotations__}
    assert len(promised) > 50
    assert [name for name in sorted(promised) if not hasattr(a_logic, name)] == []


def test_logic_loads_without_qt_and_without_torch():
    program = "\n".join([
        "import sys",
        f"sys.path.append({str(MODULE)!r})",
        "for name in ('qt', 'ctk', 'torch', 'PySide6', 'slicer.i18n', 'slicer.ScriptedLoadableModule'):",
        "    sys.modules[name] = None  # importing it raises",
        "import SlicerKA2ERLib.PromptLogic",
        "assert not any(name.split('.')[0] in ('monai', 'scipy', 'SimpleITK') for name in sys.modules)",
    ])  # fmt: skip
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", LOGIC_FILES)
def test_no_file_of_the_logic_prints_or_imports_qt(name):
    tree = ast.parse((MODULE / "SlicerKA2ERLib" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported & {"qt", "ctk", "torch", "PySide6"} == set()
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in called


def test_worker_thread_never_touches_the_scene():
    """Files whose functions run in the worker know neither slicer nor vtk."""
    for name in ("EngineLink", "Jobs", "EngineMirror", "Conversation", "PromptLedger"):
        tree = ast.parse((MODULE / "SlicerKA2ERLib" / f"{name}.py").read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert names & {"slicer", "vtk", "vtk.util.numpy_support"} == set()


def job(text, log, *, key=None, background=False, gate=None, error=None):
    from SlicerKA2ERLib.Jobs import Job

    def work():
        if gate is not None:
            assert gate.wait(10)
        if error is not None:
            raise error
        return text

    return Job(text, lambda: work, log.append, lambda raised: log.append(repr(raised)), key, background)


def drain(jobs):
    while not jobs.idle:
        jobs.poll()


def test_jobs_go_in_order_background_last_and_later_ones_replace_those_of_their_key():
    from SlicerKA2ERLib.Jobs import Jobs

    jobs, log, gate = Jobs("test"), [], threading.Event()
    jobs.submit(job("first", log, gate=gate))
    jobs.submit(job("overlay", log, background=True))
    jobs.submit(job("slider 1", log, key="slider"))
    jobs.submit(job("slider 2", log, key="slider"))
    jobs.submit(job("fails", log, error=ValueError("no")))
    jobs.submit(job("last", log))
    gate.set()
    drain(jobs)

    assert log == ["first", "slider 2", "ValueError('no')", "last", "overlay"]
    jobs.close()
    jobs.join(10)


def test_closed_jobs_deliver_nothing_and_their_thread_ends():
    from SlicerKA2ERLib.Jobs import Jobs

    jobs, log, gate = Jobs("test"), [], threading.Event()
    jobs.submit(job("first", log, gate=gate))
    jobs.submit(job("second", log))
    jobs.close()
    gate.set()
    jobs.join(10)
    jobs.poll()

    assert log == []
    assert not any(thread.name == "test" and thread.is_alive() for thread in threading.enumerate())


def test_engine_of_somebody_else_is_left_running():
    from SlicerKA2ERLib.EngineLink import RemoteEngine

    engine = RemoteEngine("http://127.0.0.1:9", "key")
    assert engine.poll() == "dead"
    engine.start()
    assert engine.poll() == "ready"
    engine.restart()
    assert engine.poll() == "ready"
    engine.stop()
    assert engine.poll() == "dead"
