"""The experts of a bundle without Qt: real bundles, and for one test each the real command in a real process."""

from __future__ import annotations

import ast
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from SlicerKA2ERLib import ExpertSwitches

MODULE = Path(__file__).parents[2] / "scripted_modules" / "SlicerKA2ERExperts"
MAIN_MODULE = MODULE.with_name("SlicerKA2ER")
LIBRARY = MODULE / "SlicerKA2ERExpertsLib"


class Store:
    """SettingsProtocol."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def value(self, key: str) -> Any:
        return self.values.get(key)

    def setValue(self, key: str, value: Any) -> None:
        self.values[key] = value


class Runner:
    """RunnerProtocol: says what a test wants."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.lines: list[str] = []
        self.code: int | None = None
        self.text = ""
        self.cancelled = 0

    def start(self, arguments: Sequence[str]) -> None:
        self.started.append(list(arguments))

    def poll(self) -> tuple[list[str], int | None]:
        lines, self.lines = self.lines, []
        return lines, self.code

    def output(self) -> str:
        return self.text

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module's library, imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == "SlicerKA2ERExpertsLib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(MODULE))
    import SlicerKA2ERExpertsLib.CommandRunner
    import SlicerKA2ERExpertsLib.ExpertsLogic
    import SlicerKA2ERExpertsLib.Protocols

    yield SlicerKA2ERExpertsLib
    for name in [name for name in sys.modules if name.split(".")[0] == "SlicerKA2ERExpertsLib"]:
        del sys.modules[name]


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bundles of one's own go, whatever the system."""
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "data"))
    from KA2ERSegment.bundle import user_bundles_folder

    return user_bundles_folder()


@pytest.fixture(scope="module")
def a_bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny").folder


@pytest.fixture
def settings(a_bundle_folder: Path) -> Store:
    store = Store()
    store.setValue("KA2ERSegment/bundle", str(a_bundle_folder))
    return store


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def a_logic(lib: Any, settings: Store, runner: Runner, user_folder: Path) -> Any:
    """Shows the tiny bundle; `a_logic.events` is what it told."""
    logic = lib.ExpertsLogic.ExpertsLogic(settings, runner)
    logic.events = []
    logic.observers.append(logic.events.append)
    logic.load()
    return logic


def until_idle(logic: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while logic.busy and time.monotonic() < end:
        logic.poll()
        time.sleep(0.005)
    assert not logic.busy


def test_the_bundle_of_the_main_module_is_shown_with_its_experts(a_logic: Any, a_bundle_folder: Path) -> None:
    rows = a_logic.rows()

    assert a_logic.folder == a_bundle_folder
    assert a_logic.isUsed()
    assert [row.name for row in rows] == ["tiny_trunk", "tiny_brain"]
    assert all(row.enabled and row.classes == ("bright", "dark") for row in rows)
    assert "Untrained" in a_logic.card()
    assert a_logic.licences().keys() == {"LICENSE"}
    assert a_logic.megabytes() > 0


def test_looking_at_a_bundle_needs_no_torch(a_bundle_folder: Path) -> None:
    import subprocess

    code = (
        "import sys; sys.path[:0] = sys.argv[1:4]\n"
        "from SlicerKA2ERExpertsLib.ExpertsLogic import ExpertsLogic\n"
        "class Store:\n"
        "    def value(self, key): return sys.argv[4] if key.endswith('bundle') else None\n"
        "logic = ExpertsLogic(Store(), None); logic.load(); assert len(logic.rows()) == 2\n"
        "logic.verify()\n"
        "while logic.busy: logic.poll()\n"
        "assert 'SHA-256' in logic.message, logic.message\n"
        "heavy = {'torch', 'safetensors', 'scipy', 'monai'} & set(sys.modules); assert not heavy, heavy\n"
    )
    arguments = [
        sys.executable,
        "-c",
        code,
        str(MODULE),
        str(MAIN_MODULE),
        str(MODULE.parents[1]),
        str(a_bundle_folder),
    ]
    done = subprocess.run(arguments, capture_output=True, encoding="utf-8", check=False)

    assert done.returncode == 0, done.stderr


def test_an_expert_switched_off_is_in_the_settings_under_the_bundles_identity(a_logic: Any, settings: Store) -> None:
    key = f"KA2ERSegment/experts/{a_logic.identity()}"
    a_logic.setExpertEnabled("tiny_trunk", False)
    assert settings.value(key) == "tiny_trunk"
    assert [row.enabled for row in a_logic.rows()] == [False, True]

    a_logic.setExpertEnabled("tiny_brain", False)
    assert settings.value(key) == "tiny_brain,tiny_trunk"
    a_logic.setExpertEnabled("tiny_trunk", True)
    a_logic.setExpertEnabled("tiny_brain", True)
    assert settings.value(key) == ""
    assert all(row.enabled for row in a_logic.rows())


def test_an_unknown_expert_cannot_be_switched(a_logic: Any, settings: Store) -> None:
    before = dict(settings.values)
    with pytest.raises(BundleError, match="must be one of"):
        a_logic.setExpertEnabled("foundation", False)
    assert settings.values == before


@pytest.mark.parametrize(
    ("stored", "names"),
    [(None, ()), ("", ()), ("a", ("a",)), ("a,b", ("a", "b")), (["a", "b"], ("a", "b")), (("a",), ("a",))],
)
def test_switches_are_read_as_qsettings_gives_them(lib: Any, stored: Any, names: tuple[str, ...]) -> None:
    assert ExpertSwitches.switchedOff(stored) == names


def test_switches_come_back_as_they_were_stored(lib: Any) -> None:
    assert ExpertSwitches.switchedOff(ExpertSwitches.toStored(["b", "a", "b"])) == ("a", "b")


def test_a_whole_bundle_is_verified_piece_by_piece(a_logic: Any, lib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.ExpertsLogic, "PIECE", 4096)
    shares = []
    a_logic.observers.append(lambda event: shares.append(a_logic.progress[1]) if event == "busy" else None)
    a_logic.verify()
    assert a_logic.busy
    until_idle(a_logic)

    told = [share for share in shares if share is not None]
    assert len(told) > 10
    assert told == sorted(told)
    assert told[-1] == 1
    assert a_logic.events[-1] == "done"


@pytest.mark.parametrize("name", ["weights.safetensors", "LICENSE"])
def test_a_damaged_file_is_found_and_named(a_logic: Any, tmp_path: Path, name: str) -> None:
    folder = tiny_bundle(tmp_path / "damaged").folder
    a_logic.load(folder)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    a_logic.verify()
    until_idle(a_logic)

    assert a_logic.events[-1] == "error"
    assert name in a_logic.message


def test_a_folder_that_is_no_bundle_is_said_and_nothing_is_shown(a_logic: Any, tmp_path: Path) -> None:
    a_logic.load(tmp_path)

    assert a_logic.events[-1] == "error"
    assert "a bundle is a folder" in a_logic.message
    assert a_logic.rows() == []
    assert a_logic.folder is None


def test_bundles_to_choose_from_are_the_shipped_one_and_ones_own(
    a_logic: Any, user_folder: Path, a_bundle_folder: Path
) -> None:
    mine = tiny_bundle(user_folder / "mine").folder
    (user_folder / ".mine-scratch").mkdir()

    names = [folder.name for folder in a_logic.folders()]
    assert names == ["ka2er-base", "mine", "tiny"]
    a_logic.load(mine)
    assert not a_logic.isUsed()
    a_logic.use()
    assert a_logic.isUsed()


def test_the_shipped_bundle_is_stored_as_no_choice_at_all(a_logic: Any, settings: Store) -> None:
    a_logic.load(a_logic.folders()[0])
    a_logic.use()

    assert a_logic.isShipped()
    assert settings.value("KA2ERSegment/bundle") == ""


def test_adding_asks_the_command_line_for_a_new_bundle_among_ones_own(
    a_logic: Any, lib: Any, runner: Runner, user_folder: Path, a_bundle_folder: Path
) -> None:
    request = lib.Protocols.AddRequest("/nn/T__P__3d_fullres", " CC0 ", "beads", "0", "/nn/raw", 2.5)
    a_logic.add(request)

    target = str(user_folder / "tiny-beads")
    assert runner.started == [
        ["expert", "add", "/nn/T__P__3d_fullres", "--to", str(a_bundle_folder), "--output", target, "--license", "CC0",
         "--name", "beads", "--fold", "0", "--images", "/nn/raw", "--minutes", "2.5", "--json"]
    ]  # fmt: skip
    runner.lines = ["progress 0.25 reading image 2 of 9", "something else"]
    a_logic.poll()
    assert a_logic.progress == ("reading image 2 of 9", 0.25)
    tiny_bundle(Path(target), tiny_plans(("tiny_trunk", "tiny_brain", "beads")))
    runner.code, runner.text = 0, json.dumps({"output": target, "trained": False, "megabytes": 1.0})
    a_logic.poll()
    assert a_logic.events[-1] == "done"
    assert "does not count" in a_logic.message
    assert [row.name for row in a_logic.rows()] == ["tiny_trunk", "tiny_brain", "beads"]
    assert not a_logic.isUsed()


def test_a_folder_that_is_taken_gets_a_number(a_logic: Any, runner: Runner, user_folder: Path) -> None:
    (user_folder / "tiny-without-tiny_trunk").mkdir(parents=True)
    a_logic.remove("tiny_trunk")

    assert runner.started[0][-2] == str(user_folder / "tiny-without-tiny_trunk-2")


@pytest.mark.parametrize(("results", "licence", "words"), [("", "CC0", "results folder"), ("/nn", " ", "licence")])
def test_an_incomplete_request_is_refused_before_anything_starts(
    a_logic: Any, lib: Any, runner: Runner, results: str, licence: str, words: str
) -> None:
    a_logic.add(lib.Protocols.AddRequest(results, licence))

    assert a_logic.events[-1] == "error"
    assert words in a_logic.message
    assert runner.started == []
    assert not a_logic.busy


@pytest.mark.parametrize(
    ("text", "lines", "words"),
    [
        ('{"error": "must be of nnU-Net v2", "kind": "BundleError"}', [], "must be of nnU-Net v2"),
        ("", ["progress 0.10 x", "ModuleNotFoundError: No module named 'torch'"], "No module named 'torch'"),
        ("", [], "exit code 1"),
    ],
)
def test_what_the_command_refuses_is_said_in_its_words_and_the_bundle_stays(
    a_logic: Any, runner: Runner, a_bundle_folder: Path, text: str, lines: list[str], words: str
) -> None:
    a_logic.remove("tiny_trunk")
    runner.code, runner.text, runner.lines = 1, text, lines
    a_logic.poll()

    assert a_logic.events[-1] == "error"
    assert words in a_logic.message
    assert a_logic.folder == a_bundle_folder
    assert not a_logic.busy


def test_cancel_ends_the_command_and_its_scratch_is_gone(a_logic: Any, runner: Runner, user_folder: Path) -> None:
    a_logic.remove("tiny_trunk")
    (user_folder / ".tiny-without-tiny_trunk-abc").mkdir(parents=True)
    a_logic.cancel()

    assert runner.cancelled == 1
    assert not a_logic.busy
    assert list(user_folder.iterdir()) == []


def test_only_one_thing_at_a_time(a_logic: Any, runner: Runner) -> None:
    a_logic.verify()
    a_logic.remove("tiny_trunk")
    assert runner.started == []
    a_logic.cancel()
    a_logic.remove("tiny_trunk")
    assert len(runner.started) == 1


def test_the_real_command_removes_an_expert_in_another_process(a_logic: Any, lib: Any, user_folder: Path) -> None:
    a_logic._runner = lib.CommandRunner.CommandRunner([sys.executable])
    a_logic.remove("tiny_trunk")
    until_idle(a_logic)

    assert a_logic.events[-1] == "done", a_logic.message
    assert a_logic.folder == user_folder / "tiny-without-tiny_trunk"
    assert [expert.name for expert in load_bundle(a_logic.folder).plans.experts] == ["tiny_brain"]


def test_the_real_command_says_why_it_refuses(a_logic: Any, lib: Any, tmp_path: Path, user_folder: Path) -> None:
    a_logic._runner = lib.CommandRunner.CommandRunner([sys.executable])
    a_logic.add(lib.Protocols.AddRequest(str(tmp_path), "CC0"))
    until_idle(a_logic)

    assert a_logic.events[-1] == "error"
    assert "must have a plans.json" in a_logic.message
    assert not user_folder.exists() or list(user_folder.iterdir()) == []


def test_a_command_that_is_cancelled_is_gone_with_what_it_started(lib: Any, tmp_path: Path) -> None:
    """As with PythonSlicer: a launcher that starts the Python that works."""
    psutil = pytest.importorskip("psutil")
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    runner = lib.CommandRunner.CommandRunner([sys.executable, str(launcher)])
    runner.start(["expert", "list"])
    process = psutil.Process(runner._process.pid)
    end = time.monotonic() + 20
    while not process.children() and time.monotonic() < end:
        time.sleep(0.01)
    child = process.children()[0]
    runner.cancel()

    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    while (code := runner.poll()[1]) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert code not in (None, 0)


def test_a_python_that_is_not_there_is_said(a_logic: Any, lib: Any, tmp_path: Path) -> None:
    a_logic._runner = lib.CommandRunner.CommandRunner([str(tmp_path / "no-python")])
    a_logic.remove("tiny_trunk")

    assert a_logic.events[-1] == "error"
    assert "could not be started" in a_logic.message
    assert not a_logic.busy


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.py")), ids=lambda path: path.name)
def test_only_the_panel_knows_qt_and_nothing_loads_torch(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}

    assert not names & {"torch", "numpy", "monai", "safetensors"}
    assert path.name == "ExpertsWidget.py" or not names & {"qt", "ctk"}
