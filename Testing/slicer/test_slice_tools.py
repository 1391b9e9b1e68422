"""Prompts by the mouse in offscreen slice views: axial, oblique, with Slicer's own interaction around ours."""

from __future__ import annotations

import numpy as np
import pytest
import slicer


@pytest.fixture(params=["Axial", "Sagittal", "Coronal", "oblique"])
def a_view(request, a_scene, a_volume_node, a_logic):
    """A slice view of each orientation, showing the volume, with the tools of `a_logic`."""
    view = a_scene.addView("Red", "Axial" if request.param == "oblique" else request.param)
    if request.param == "oblique":
        matrix = slicer.util.vtkMatrixFromArray(_turned(35, 20))
        view.node.GetSliceToRAS().DeepCopy(matrix)
        view.node.UpdateMatrices()
    view.show(a_volume_node)
    view.jumpTo(_centre(a_volume_node))
    a_logic.addSliceView(view.interactor, view.node)
    return view


def _turned(first, second):
    a, b = np.deg2rad([first, second])
    one = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    two = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = one @ two
    return matrix


def _centre(node):
    bounds = [0.0] * 6
    node.GetRASBounds(bounds)
    return [(bounds[2 * n] + bounds[2 * n + 1]) / 2 for n in range(3)]


def steps(engine):
    return engine.sessions[-1].steps if engine.sessions else ()


def normal_of(view):
    return np.array([view.node.GetSliceToRAS().GetElement(r, 2) for r in range(3)])


def test_click_places_a_point_where_the_mouse_is(a_view, a_logic, an_engine, wait, segment_array):
    a_logic.setTool("point")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(x + 3, y - 5)
    wait(a_logic)

    (step,) = steps(an_engine)
    assert np.allclose(step["prompt"]["ras"], a_view.ras(x + 3, y - 5))
    assert step["prompt"]["polarity"] == "positive"
    assert segment_array(a_logic).sum() > 0


def test_alt_flips_the_polarity_for_one_click(a_view, a_logic, an_engine, wait):
    a_logic.setTool("point")
    at = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(*at, alt=True)
    a_logic.setPolarity(False)
    a_view.click(at[0] + 40, at[1], alt=True)
    wait(a_logic)

    assert [step["prompt"]["polarity"] for step in steps(an_engine)] == ["negative", "positive"]


def test_box_lies_on_the_slice_and_is_one_slice_thick(a_view, a_logic, an_engine, wait):
    a_logic.setTool("box")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.drag([(x - 30, y - 20), (x, y), (x + 35, y + 25)])
    wait(a_logic)

    (step,) = steps(an_engine)
    corner, edges = np.array(step["prompt"]["corner"]), np.array(step["prompt"]["edges"])
    middle = corner + edges.sum(axis=0) / 2
    expected = (np.array(a_view.ras(x - 30, y - 20)) + a_view.ras(x + 35, y + 25)) / 2
    assert np.allclose(middle, expected, atol=1e-3)
    lengths = np.linalg.norm(edges, axis=1)
    across = np.abs(edges @ normal_of(a_view) / lengths)
    assert np.allclose(np.sort(across), [0, 0, 1], atol=1e-6)
    assert lengths[across.argmax()] <= 2.6  # mm: the thickest voxels of the volume
    assert a_logic.prompts()[0].kind == "box"


def test_scribble_and_lasso_follow_the_mouse(a_view, a_logic, an_engine, wait):
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    circle = [(round(x + 25 * np.cos(t)), round(y + 20 * np.sin(t))) for t in np.linspace(0, 6, 60)]
    for tool in ("scribble", "lasso"):
        a_logic.setTool(tool)
        a_view.drag(circle)
    wait(a_logic)

    assert a_logic.lastError == ""
    scribble, lasso = (step["prompt"] for step in steps(an_engine))
    for prompt in (scribble, lasso):
        points = np.array(prompt["points"])
        assert 10 < len(points) < 60
        assert np.allclose((points - points[0]) @ normal_of(a_view), 0, atol=1e-6)
    assert scribble["radius"] == a_logic.brushRadius


def test_escape_forgets_what_is_being_drawn(a_view, a_logic, an_engine, wait):
    a_logic.setTool("lasso")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.event("LeftButtonPressEvent", x, y)
    a_view.event("MouseMoveEvent", x + 30, y)
    a_view.event("MouseMoveEvent", x + 30, y + 30)
    a_view.event("KeyPressEvent", x + 30, y + 30, key="Escape")
    a_view.event("LeftButtonReleaseEvent", x, y)
    wait(a_logic)

    assert steps(an_engine) == ()
    assert a_logic.prompts() == []


def test_drag_asks_the_engine_once_and_shows_a_line_meanwhile(a_view, a_logic, an_engine, wait):
    a_logic.setTool("scribble")
    a_logic.warmUp()
    wait(a_logic)
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    before = a_view.render()
    a_view.event("LeftButtonPressEvent", x - 30, y)
    a_view.event("MouseMoveEvent", x, y)
    a_view.event("MouseMoveEvent", x + 30, y)
    during = a_view.render()
    assert (during != before).any()
    assert an_engine.asked["add"] == 0
    a_view.event("LeftButtonReleaseEvent", x + 30, y)
    wait(a_logic)
    assert an_engine.asked["add"] == 1


def test_slicers_own_interaction_stays_out_of_ours_and_works_beside_it(a_view, a_logic, a_scene, wait):
    """Slicer's place mode would put a point of another list under the same click."""
    selection, interaction = (
        a_scene.applicationLogic.GetSelectionNode(),
        a_scene.applicationLogic.GetInteractionNode(),
    )
    theirs = a_scene.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    theirs.CreateDefaultDisplayNodes()
    selection.SetReferenceActivePlaceNodeClassName("vtkMRMLMarkupsFiducialNode")
    selection.SetActivePlaceNodeID(theirs.GetID())
    interaction.SetPlaceModePersistence(1)
    interaction.SetCurrentInteractionMode(interaction.Place)
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(x - 20, y)
    assert theirs.GetNumberOfDefinedControlPoints() == 1
    a_logic.setTool("point")
    a_view.click(x, y)
    wait(a_logic)
    assert theirs.GetNumberOfDefinedControlPoints() == 1
    assert len(a_logic.prompts()) == 1

    reached = []
    a_view.interactor.AddObserver("LeftButtonPressEvent", lambda *_: reached.append("left"), 5.0)  # before Slicer's own
    a_view.interactor.AddObserver("MiddleButtonPressEvent", lambda *_: reached.append("middle"), 5.0)
    a_view.click(x + 30, y)
    assert reached == []
    a_view.click(x + 30, y, shift=True)  # pans
    a_view.click(x + 30, y, control=True)  # blends
    a_view.event("MiddleButtonPressEvent", x, y)
    assert reached == ["left", "left", "middle"]
    wait(a_logic)
    assert len(a_logic.prompts()) == 2


def test_double_click_is_two_clicks_at_most_and_never_maximises(a_view, a_logic, an_engine, wait):
    a_logic.setTool("point")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    for event in ("Press", "Release", "Press", "DoubleClick", "Release"):
        a_view.event(f"LeftButton{event}Event", x, y)
    wait(a_logic)

    assert len(steps(an_engine)) <= 2


def test_point_that_is_there_is_dragged_and_the_mask_follows(a_view, a_logic, an_engine, a_scene, wait, segment_array):
    a_logic.setTool("point")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(x, y)
    wait(a_logic)
    before = segment_array(a_logic)
    a_view.render()

    a_view.drag([(x, y), (x + 10, y), (x + 45, y + 10)])
    wait(a_logic)

    assert len(a_logic.prompts()) == 1
    assert an_engine.asked["revise"] == 1
    assert np.allclose(steps(an_engine)[0]["prompt"]["ras"], a_view.ras(x + 45, y + 10), atol=0.5)
    assert (segment_array(a_logic) != before).any()


def test_without_a_tool_a_click_is_slicers(a_view, a_logic, an_engine, wait):
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(x, y)
    a_logic.setTool("point")
    a_logic.removeSliceViews()
    a_view.click(x, y)
    wait(a_logic)

    assert a_logic.prompts() == []


def test_click_beside_the_volume_is_an_error_for_the_user_and_nothing_more(a_view, a_logic, an_engine, wait):
    a_logic.setTool("point")
    a_view.jumpTo(np.add(_centre(a_logic.volumeNode), normal_of(a_view) * 500))
    a_view.click(200, 150)
    wait(a_logic)

    assert "outside volume" in a_logic.lastError
    assert a_logic.prompts() == []


def test_roi_placed_by_two_clicks_is_a_prompt(a_view, a_logic, an_engine, wait):
    a_logic.setTool("roi")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(x, y)
    a_view.click(x + 30, y + 25)
    wait(a_logic, lambda: a_logic.tool == "none" and a_logic.isIdle)

    assert a_logic.lastError == ""
    assert [row.kind for row in a_logic.prompts()] == ["roi"]
    assert steps(an_engine)[0]["prompt"]["type"] == "box"


def test_roi_keeps_its_handles_when_it_comes_back_by_redo(a_view, a_logic, a_scene, an_engine, wait):
    a_logic.setTool("roi")
    x, y = a_view.pixel(_centre(a_logic.volumeNode))
    a_view.click(x, y)
    a_view.click(x + 30, y + 25)
    wait(a_logic, lambda: a_logic.tool == "none" and a_logic.isIdle)

    for verb in (a_logic.undo, a_logic.redo):
        verb()
        wait(a_logic)

    assert a_logic.lastError == ""
    assert [row.kind for row in a_logic.prompts()] == ["roi"]
    node = a_scene.scene.GetNodeByID(a_logic.prompts()[0].nodeId)
    assert node.GetDisplayNode().GetHandlesInteractive()


def test_roi_tool_that_is_left_leaves_no_node(a_view, a_logic, a_scene, wait):
    a_logic.setTool("roi")
    a_logic.setTool("point")
    wait(a_logic)

    assert a_scene.scene.GetNumberOfNodesByClass("vtkMRMLMarkupsROINode") == 0
    interaction = a_scene.applicationLogic.GetInteractionNode()
    assert interaction.GetCurrentInteractionMode() != interaction.Place
