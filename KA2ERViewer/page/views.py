"""What lies over each view of the page, and the state of its slice slider."""

from __future__ import annotations

from typing import Any

from trame.widgets import html

from KA2ERViewer.page.scene import COLORS, SLICES

ENDS = (("L", "R"), ("P", "A"), ("I", "S"))
"""Which way in the patient lower and higher values of RAS are."""

OVER = """
<div class="view-head"><span class="view-dot" style="background: {color}"></span><span class="view-title">{title}</span>
  {where}</div>
{legends}
<div class="view-buttons">
  <button type="button" aria-label="Fit the volume into the {title} view" title="Fit"
          @click="trigger('fit', ['{name}'])"><v-icon size="1rem">mdi-fit-to-page-outline</v-icon></button>
  <button type="button" title="Enlarge, or show all views" aria-label="Enlarge the {title} view, or show all views"
          :aria-pressed="layout === '{name}'" @click="layout = layout === '{name}' ? 'Four' : '{name}'"
    ><v-icon size="1rem">{{{{ layout === '{name}' ? 'mdi-arrow-collapse' : 'mdi-arrow-expand' }}}}</v-icon></button>
</div>
{slider}
"""
WHERE = '<span class="view-where" v-if="has_volume">{{{{ slice_{name}_text }}}}</span>'
LEGENDS = """
<ul class="legends" v-if="quality >= 0">
  <li v-for="row in experts.filter((one) => one.shown)" :key="row.name" :style="{{ '--color': row.color }}">
    <span>{{{{ row.title.split(': ')[0] }}}}<span class="words"
      >: {{{{ row.kind === 'share' ? 'where it decides' : 'what it sees' }}}}</span></span>
    <span class="legend-bar">0<i></i>1</span></li>
  <li v-if="disagreement_shown" style="--color: #ffe633">Disagreement <span class="legend-bar">0<i></i>1</span></li>
</ul>
"""
SLIDER = """
<input type="range" class="slice-slider" v-if="has_volume" aria-label="{title} slice" title="{title} slice"
       :min="slice_{name}_least" :max="slice_{name}_most" :step="slice_{name}_step" :value="slice_{name}"
       :aria-valuetext="slice_{name}_text" @input="slice_{name} = Number($event.target.value)">
"""


def decorate(server: Any, view_id: str, view: Any) -> None:
    """Name, buttons and, for slices, the slider over one view."""
    name = view.get_singleton_tag()
    title, sliced = SLICES.get(name, "3D"), name in SLICES
    where = WHERE.format(name=name) if sliced else ""
    legends = LEGENDS.format() if sliced else ""
    slider = SLIDER.format(name=name, title=title) if sliced else ""
    html.Div(
        OVER.format(name=name, title=title, color=COLORS[name], where=where, legends=legends, slider=slider),
        classes="view-over",
        trame_server=server,
    )


def where_text(node: Any, offset: float) -> str:
    """Where in the patient a slice is: in Slicer's sagittal slices a higher offset is further left."""
    normal = [node.GetSliceToRAS().GetElement(axis, 2) for axis in range(3)]
    axis = max(range(3), key=lambda n: abs(normal[n]))
    value = offset if normal[axis] > 0 else -offset
    return f"{ENDS[axis][value >= 0]} {abs(value):.1f} mm"


def follow_slices(state: Any, slices: dict[str, Any]) -> None:
    """Keep the sliders of the page and the views at one place."""
    for name, view in slices.items():
        _follow(state, name, view)


def _follow(state: Any, name: str, view: Any) -> None:
    def to_page(*_: Any) -> None:
        least, most = view.get_slice_range()
        value, step = view.get_slice_value(), abs(view.get_slice_step()) or 1.0
        with state:
            state.update(
                {
                    f"slice_{name}": round(value, 3),
                    f"slice_{name}_least": round(least, 3),
                    f"slice_{name}_most": round(most, 3),
                    f"slice_{name}_step": round(step, 4),
                    f"slice_{name}_text": where_text(view.get_view_node(), value),
                }
            )

    def to_view(**values: Any) -> None:
        wanted = float(values[f"slice_{name}"])
        if abs(wanted - view.get_slice_value()) > 1e-2:
            view.set_slice_value(wanted)

    to_page()
    state.change(f"slice_{name}")(to_view)
    view.modified.connect(to_page)
