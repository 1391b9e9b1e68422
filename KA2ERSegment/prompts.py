"""Prompts: what a user says about an object, in RAS mm and independent of any volume.

Every prompt is a frozen value with a `polarity`. `region(volume)` answers which voxels of a volume it covers, as a
crop; everything is clipped to the volume, and a prompt of which nothing is left raises PromptError. `to_json` and
`prompt_from_json` turn prompts into plain data and back without loss.

The voxels of a prompt do not depend on the order and direction of the volume's axes: wherever a coordinate lies
exactly between two voxels, the tie is decided in patient space (`_TIE`), so that a prompt covers the same tissue in
`volume` and in `volume.canonical()`.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import operator
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import GeometryError, PromptError
from KA2ERSegment.geometry import BoolArray, Box, FloatArray, Ijk, Ras, apply_affine, check_affine, ras_axes

IntArray = npt.NDArray[np.int64]
Edges = tuple[Ras, Ras, Ras]

_TIE = 1e-6
"""Voxels. Coordinates this close to a voxel face count as on it; well above rounding errors, well below any hand."""
_TINY = 1e-9
"""mm or voxels. Shorter steps are none; dividing by them would overflow."""
_FAR = 1e9
"""mm. Larger coordinates are no place in a patient; below it all index arithmetic is exact in int64."""
_SAME_GRID = 0.01
"""Voxels. Two grids are the same when no corner is further apart than this; `Volume.same_grid` allows as much."""
_CHUNK = 1 << 20
"""Voxels that are worked on at once, so that a huge prompt costs time and not memory."""
_NO_VOXEL = Box((0, 0, 0), (0, 0, 0))
"""Of a mask without a voxel."""
_MAX_MASK_VOXELS = 1 << 30
"""Largest crop of a mask in JSON. A few kB of zlib can claim any size, so the size is bounded before it is believed."""


class Grid(Protocol):
    """The geometry that prompts need: a `Volume`, or anything with these four attributes."""

    @property
    def shape_kji(self) -> tuple[int, int, int]:
        """Shape of the array, (K, J, I)."""

    @property
    def ijk_to_ras(self) -> FloatArray:
        """4x4 affine from voxel index to RAS mm."""

    @property
    def ras_to_ijk(self) -> FloatArray:
        """4x4 affine from RAS mm to continuous voxel index."""

    @property
    def name(self) -> str:
        """Free text for messages."""


class Polarity(Enum):
    """Whether a prompt marks the object or what is not the object."""

    POSITIVE = "positive"
    NEGATIVE = "negative"


@dataclass(frozen=True, slots=True)
class PointPrompt:
    """One click.

    Args:
        ras: where, RAS mm.
        polarity: POSITIVE on the object, NEGATIVE beside it.
    """

    ras: Ras
    polarity: Polarity = Polarity.POSITIVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "ras", _triple("PointPrompt.ras", self.ras))
        _check_polarity(self)

    @classmethod
    def from_ijk(cls, ijk: npt.ArrayLike, volume: Grid, polarity: Polarity = Polarity.POSITIVE) -> PointPrompt:
        """The click on a voxel, (I, J, K); fractions are kept. Raises PromptError if outside `volume`."""
        prompt = cls(_to_ras("PointPrompt", ijk, volume), polarity)
        prompt.ijk(volume)
        return prompt

    def ijk(self, volume: Grid) -> Ijk:
        """Nearest voxel of `volume`, (I, J, K); raises PromptError if outside."""
        index = apply_affine(volume.ras_to_ijk, self.ras) + _tie(volume)
        i, j, k = (math.floor(x + 0.5) for x in index)
        if not Box.of_shape(volume.shape_kji).contains((i, j, k)):
            message = (
                f"PointPrompt at RAS {_text(self.ras)} mm is voxel IJK {(i, j, k)}, outside {_described(volume)}. "
                "Place the click inside."
            )
            raise PromptError(message)
        return i, j, k

    def region(self, volume: Grid) -> tuple[Box, BoolArray]:
        """The one voxel that holds the click, as a box of one voxel and its (1, 1, 1) bool array."""
        i, j, k = self.ijk(volume)
        return Box((i, j, k), (i + 1, j + 1, k + 1)), np.ones((1, 1, 1), dtype=np.bool_)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `prompt_from_json`."""
        return {"type": "point", "ras": list(self.ras), "polarity": self.polarity.value}


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Where the next click is expected to help most.

    Args:
        ras: centre of a voxel, RAS mm.
        polarity: what to click if the present answer there is wrong.
        expected_gain: Dice that the mask is expected to gain if the whole region around the point is put right.
    """

    ras: Ras
    polarity: Polarity
    expected_gain: float


@dataclass(frozen=True, slots=True)
class BoxPrompt:
    """A box of any orientation around the object, or around its cross section in one slice.

    Args:
        corner: outer corner of the box, RAS mm. Of a box of voxels: the corner of its first voxel, not its centre.
        edges: the three edges that leave that corner, in mm. They need not follow the axes of any volume.
        polarity: NEGATIVE means that the object is not in there.
    """

    corner: Ras
    edges: Edges
    polarity: Polarity = Polarity.POSITIVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "corner", _triple("BoxPrompt.corner", self.corner))
        edges = _coordinates("BoxPrompt.edges", self.edges, (3, 3))
        length = np.linalg.norm(edges, axis=1)
        if (length < _TINY).any() or abs(np.linalg.det(edges / length[:, None])) < 1e-6:
            message = (
                f"BoxPrompt.edges must span a box, got {_text(edges)} mm, which is flat or empty. "
                "Give three edges that are not zero and not in one plane; one slice is as thick as its voxels."
            )
            raise PromptError(message)
        object.__setattr__(self, "edges", _tuples(edges))
        _check_polarity(self)

    @classmethod
    def from_ijk(cls, start: Ijk, stop: Ijk, volume: Grid, polarity: Polarity = Polarity.POSITIVE) -> BoxPrompt:
        """The half-open box of voxels `[start, stop)`, both (I, J, K).

        Raises:
            PromptError: empty or inverted, not whole numbers, or wholly outside `volume`. A box that is partly
                outside is fine: `box` clips it.
        """
        first, last = _whole("BoxPrompt start", start), _whole("BoxPrompt stop", stop)
        if any(a >= b for a, b in zip(first, last, strict=True)):
            message = (
                f"BoxPrompt must have start below stop on every axis (IJK, half-open), got start {first} and "
                f"stop {last}. Swap or widen them; one voxel is stop = start + 1."
            )
            raise PromptError(message)
        corner = apply_affine(volume.ijk_to_ras, np.array(first, dtype=np.float64) - 0.5)
        edges = volume.ijk_to_ras[:3, :3].T * (np.array(last, dtype=np.float64) - first)[:, None]
        prompt = cls(_triple("BoxPrompt.corner", corner), _tuples(edges), polarity)
        prompt.box(volume)
        return prompt

    def box(self, volume: Grid) -> Box:
        """Smallest box of voxels around the prompt, clipped to `volume`; raises PromptError if wholly outside.

        Voxels whose centre lies inside count. A box thinner than a voxel is one voxel thick.
        """
        bounds = self._bounds(volume)
        inside = bounds.intersect(Box.of_shape(volume.shape_kji))
        if inside.size == 0:
            message = (
                f"BoxPrompt covers voxels IJK {bounds.start} to {bounds.stop} (half-open), outside "
                f"{_described(volume)}. Draw the box inside."
            )
            raise PromptError(message)
        return inside

    def planar_axis(self, volume: Grid) -> int | None:
        """IJK axis across the slice that this box was drawn on, or None for a box in 3D.

        A box on one slice is one voxel thick along this axis and thicker along the two others. It bounds the object in
        that slice and says nothing about its neighbours.
        """
        sizes = self._bounds(volume).shape_kji[::-1]
        thin = [axis for axis, size in enumerate(sizes) if size == 1]
        return thin[0] if len(thin) == 1 else None

    def region(self, volume: Grid) -> tuple[Box, BoolArray]:
        """Voxels whose centre lies inside, as a crop: all of `box` unless the prompt is oblique to the volume."""
        box = self.box(volume)
        corner, edges, normals = self._at_least_a_voxel(volume)
        steps = np.abs(edges @ volume.ras_to_ijk[:3, :3].T)
        if np.sort(steps, axis=1)[:, :2].max() < _SAME_GRID:
            return box, np.ones(box.shape_kji, dtype=np.bool_)
        mask = np.zeros(box.shape_kji, dtype=np.bool_)
        height = np.einsum("ar,ar->a", edges, normals)
        tie = _TIE * float(np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0).min())
        for slab in _slabs(box):
            from_corner = _centres(slab, volume) - corner
            inside = np.ones(slab.shape_kji, dtype=np.bool_)
            for normal, thickness in zip(normals, height, strict=True):
                depth = from_corner @ normal + tie
                inside &= (depth >= 0) & (depth < thickness)
            mask[slab.within(box).slices] = inside
        return _trimmed(box, mask, "BoxPrompt", volume)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `prompt_from_json`."""
        return {
            "type": "box",
            "corner": list(self.corner),
            "edges": [list(edge) for edge in self.edges],
            "polarity": self.polarity.value,
        }

    def _at_least_a_voxel(self, volume: Grid) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Corner (3,), edges (3, 3) and unit face normals (3, 3), widened about the centre to one voxel."""
        edges = np.array(self.edges)
        normals = np.cross(edges[[1, 2, 0]], edges[[2, 0, 1]])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        normals *= np.sign(np.einsum("ar,ar->a", edges, normals))[:, None]
        height = np.einsum("ar,ar->a", edges, normals)
        wider = np.array([max(1.0, _voxel_across(volume, n) / h) for n, h in zip(normals, height, strict=True)])
        corner = np.array(self.corner) - ((wider - 1) / 2) @ edges
        return corner, edges * wider[:, None], normals

    def _bounds(self, volume: Grid) -> Box:
        """Smallest box of voxels around the prompt, not clipped."""
        corner, edges, _ = self._at_least_a_voxel(volume)
        corners = corner + np.array(list(itertools.product((0, 1), repeat=3))) @ edges
        index = apply_affine(volume.ras_to_ijk, corners) - _tie(volume)
        start = np.ceil(index.min(axis=0)).astype(np.int64)
        stop = np.maximum(np.ceil(index.max(axis=0)).astype(np.int64), start + 1)
        return _box(start, stop)


@dataclass(frozen=True, slots=True)
class ScribblePrompt:
    """A stroke of a brush: a polyline with a thickness.

    Args:
        points: corners of the polyline, RAS mm, at least one.
        radius: of the brush, mm, above zero.
        polarity: POSITIVE on the object, NEGATIVE beside it.
    """

    points: tuple[Ras, ...]
    radius: float = 1.0
    polarity: Polarity = Polarity.POSITIVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _points("ScribblePrompt.points", self.points, 1))
        object.__setattr__(self, "radius", _length("ScribblePrompt.radius", self.radius))
        _check_polarity(self)

    @classmethod
    def from_ijk(
        cls, points: npt.ArrayLike, volume: Grid, polarity: Polarity = Polarity.POSITIVE, *, radius: float = 1.0
    ) -> ScribblePrompt:
        """The stroke through voxels, (n, 3) in IJK; fractions are kept. Raises PromptError if outside `volume`."""
        prompt = cls(_tuples_to_ras("ScribblePrompt", points, volume), radius, polarity)
        prompt._reach(volume)
        return prompt

    def region(self, volume: Grid) -> tuple[Box, BoolArray]:
        """Voxels within `radius` of the polyline and every voxel that it passes, as a crop.

        The second part keeps a stroke free of gaps where the radius is less than a voxel.
        """
        reach = self._reach(volume)
        mask = np.zeros(reach.shape_kji, dtype=np.bool_)
        margin = self._margin(volume)
        index = apply_affine(volume.ras_to_ijk, self.points)
        ends = itertools.pairwise(index) if len(index) > 1 else [(index[0], index[0])]
        for a, b in ends:
            _stamp_passed(a, b, volume, reach, mask)
            _stamp_capsules(a, b, volume, self.radius, margin, reach, mask)
        return _trimmed(reach, mask, "ScribblePrompt", volume)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `prompt_from_json`."""
        return {
            "type": "scribble",
            "points": [list(point) for point in self.points],
            "radius": self.radius,
            "polarity": self.polarity.value,
        }

    def _margin(self, volume: Grid) -> FloatArray:
        """Extent of the brush in voxels along I, J and K."""
        return np.asarray(self.radius * np.linalg.norm(volume.ras_to_ijk[:3, :3], axis=1) + _TIE)

    def _reach(self, volume: Grid) -> Box:
        margin = np.maximum(self._margin(volume), 0.5 + 2 * _TIE)
        return _clipped_reach(apply_affine(volume.ras_to_ijk, self.points), margin, "ScribblePrompt", volume)


@dataclass(frozen=True, slots=True)
class LassoPrompt:
    """A closed polygon drawn on a plane of any orientation.

    Args:
        points: corners of the polygon, RAS mm, at least three, on one plane (to a thousandth of the polygon's extent).
            The last is joined to the first. Where the outline crosses itself the even-odd rule holds.
        thickness: mm across the plane, above zero; None is one voxel of the volume at hand.
        polarity: POSITIVE around the object, NEGATIVE around what is not the object.
    """

    points: tuple[Ras, ...]
    thickness: float | None = None
    polarity: Polarity = Polarity.POSITIVE

    def __post_init__(self) -> None:
        points = _points("LassoPrompt.points", self.points, 3)
        object.__setattr__(self, "points", points)
        if self.thickness is not None:
            object.__setattr__(self, "thickness", _length("LassoPrompt.thickness", self.thickness))
        _check_polarity(self)
        array = np.array(points)
        _, length, width, depth = _plane(array)
        # float32 coordinates, as VTK hands them over, are off by 1e-7 of their value
        rounding = 1e-6 * float(np.abs(array).max())
        if width <= 1e-6 * length + rounding:
            message = (
                f"LassoPrompt must enclose an area, got {len(points)} points on one line or at one place near RAS "
                f"{_text(points[0])} mm. Draw around the object."
            )
            raise PromptError(message)
        if depth > 1e-3 * length + rounding:
            message = (
                f"LassoPrompt must lie on one plane, got points up to {depth:.3g} mm away from it near RAS "
                f"{_text(points[0])} mm. Draw it on one slice view."
            )
            raise PromptError(message)

    @classmethod
    def from_ijk(
        cls,
        points: npt.ArrayLike,
        volume: Grid,
        polarity: Polarity = Polarity.POSITIVE,
        *,
        thickness: float | None = None,
    ) -> LassoPrompt:
        """The polygon through voxels, (n, 3) in IJK; fractions are kept. Raises PromptError if outside `volume`."""
        prompt = cls(_tuples_to_ras("LassoPrompt", points, volume), thickness, polarity)
        prompt._reach(volume)
        return prompt

    def region(self, volume: Grid) -> tuple[Box, BoolArray]:
        """Voxels whose centre projects into the polygon, or onto its outline, from within half the thickness.

        The range across the plane is half-open, so that a thickness of n slices covers n slices. It is never less than
        one voxel, so that each column of voxels across the plane has exactly one.

        Returns:
            The crop, and which of its voxels (K, J, I) are covered.
        """
        reach = self._reach(volume)
        mask = np.zeros(reach.shape_kji, dtype=np.bool_)
        plane, *_ = _plane(np.array(self.points))
        tie = _TIE * float(np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0).min())
        polygon = plane.project(np.array(self.points))
        offset = np.array(reach.start)
        for voxels in _layers(plane, self._across(volume), tie, reach, volume):
            inside = _inside_polygon(plane.project(apply_affine(volume.ijk_to_ras, voxels)), polygon, tie)
            i, j, k = (voxels[inside] - offset).T
            mask[k, j, i] = True
        return _trimmed(reach, mask, "LassoPrompt", volume)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `prompt_from_json`."""
        return {
            "type": "lasso",
            "points": [list(point) for point in self.points],
            "thickness": self.thickness,
            "polarity": self.polarity.value,
        }

    def _across(self, volume: Grid) -> float:
        plane, *_ = _plane(np.array(self.points))
        return max(self.thickness or 0.0, _voxel_across(volume, plane.normal))

    def _reach(self, volume: Grid) -> Box:
        plane, *_ = _plane(np.array(self.points))
        half = plane.normal * self._across(volume) / 2
        both = np.concatenate([np.array(self.points) - half, np.array(self.points) + half])
        # a tenth of a voxel: points that are a little off the plane project back onto it
        margin = np.full(3, 0.1)
        return _clipped_reach(apply_affine(volume.ras_to_ijk, both), margin, "LassoPrompt", volume)


@dataclass(frozen=True, slots=True, eq=False)
class MaskPrompt:
    """An existing mask to start from ("refine this"). Make one with `from_array`.

    Only the crop around its voxels is kept. It belongs to one grid of voxels and fits no other, whatever the order and
    direction of the axes. Two are equal when their voxels, grid and polarity are. An empty one is nothing to start
    from, but may be what a hand left (`Session.edit`).

    Args:
        array_kji: (K, J, I) bool, the part of the mask inside `box`. Copied, and cropped to its true voxels.
        box: where that part lies in the full grid.
        ijk_to_ras: 4x4 affine of the full grid, voxel index to RAS mm.
        shape_kji: shape of the full grid, (K, J, I).
        polarity: NEGATIVE means that the object is not in there.
    """

    array_kji: BoolArray = field(repr=False)
    box: Box
    ijk_to_ras: FloatArray = field(repr=False)
    shape_kji: tuple[int, int, int]
    polarity: Polarity = Polarity.POSITIVE

    def __post_init__(self) -> None:
        shape = _whole("MaskPrompt.shape_kji", self.shape_kji)
        start, stop = (_whole(f"MaskPrompt.box.{n}", getattr(self.box, n)) for n in ("start", "stop"))
        box = Box(start, stop)
        if min(shape) < 1 or (box.size == 0 and box != _NO_VOXEL) or box.intersect(Box.of_shape(shape)) != box:
            message = (
                f"MaskPrompt.box must be a box inside its grid of shape IJK {shape[::-1]}, got IJK {start} to {stop} "
                "(half-open). Use MaskPrompt.from_array."
            )
            raise PromptError(message)
        array = np.asarray(self.array_kji)
        if array.dtype != np.bool_ or array.shape != box.shape_kji:
            message = (
                f"MaskPrompt.array_kji must be bool of the shape of its box, KJI {box.shape_kji}, got {array.dtype} "
                f"of shape {array.shape}. Use MaskPrompt.from_array."
            )
            raise PromptError(message)
        around = Box.around(array)
        crop = np.zeros((0, 0, 0), dtype=bool) if around is None else around.crop(array).copy()
        crop.setflags(write=False)
        try:
            ijk_to_ras = check_affine(self.ijk_to_ras)
        except (GeometryError, ValueError, TypeError) as error:
            message = f"MaskPrompt.ijk_to_ras cannot be used: {error}"
            raise PromptError(message) from error
        object.__setattr__(self, "array_kji", crop)
        object.__setattr__(self, "box", _NO_VOXEL if around is None else around.shift(start))
        object.__setattr__(self, "ijk_to_ras", ijk_to_ras)
        object.__setattr__(self, "shape_kji", shape)
        _check_polarity(self)

    @classmethod
    def from_array(cls, mask_kji: npt.NDArray[Any], volume: Grid, polarity: Polarity = Polarity.POSITIVE) -> MaskPrompt:
        """The mask (K, J, I) on the grid of `volume`: bool, or integers that are 0 and 1.

        Raises:
            PromptError: another shape, or another kind of values.
        """
        mask = np.asarray(mask_kji)
        if mask.shape != tuple(volume.shape_kji):
            message = (
                f"MaskPrompt must lie on the grid of {_described(volume)}, got shape IJK {mask.shape[::-1]}. "
                "Resample the mask to the volume first."
            )
            raise PromptError(message)
        if mask.dtype != np.bool_:
            if mask.dtype.kind not in "iu" or mask.min() < 0 or mask.max() > 1:
                message = (
                    f"MaskPrompt must be made of bool (or 0 and 1), got {mask.dtype} for {_described(volume)}. "
                    "Choose the object first, e.g. labels == 3."
                )
                raise PromptError(message)
            mask = mask.astype(np.bool_)
        box = Box.around(mask) or _NO_VOXEL
        return cls(box.crop(mask), box, volume.ijk_to_ras, volume.shape_kji, polarity)

    def region(self, volume: Grid) -> tuple[Box, BoolArray]:
        """The crop, on the axes of `volume`.

        Raises:
            PromptError: `volume` does not have the voxels of this mask's grid. Another order or direction of its axes,
                as in `Volume.canonical`, is fine.
        """
        to_volume = volume.ras_to_ijk @ self.ijk_to_ras
        turn, shift = np.rint(to_volume[:3, :3]), np.rint(to_volume[:3, 3])
        corners = np.array(list(itertools.product((0, 1), repeat=3))) * (np.array(self.shape_kji[::-1]) - 1)
        rounded = corners @ turn.T + shift
        exact = apply_affine(to_volume, corners)
        if not (
            (np.abs(turn).sum(axis=0) == 1).all()
            and (np.abs(turn).sum(axis=1) == 1).all()
            and np.abs(exact - rounded).max() <= _SAME_GRID
            and (rounded.min(axis=0) == 0).all()
            and (rounded.max(axis=0) == np.array(volume.shape_kji[::-1]) - 1).all()
        ):
            message = (
                f"MaskPrompt on a grid of shape IJK {self.shape_kji[::-1]} with origin RAS "
                f"{_text(self.ijk_to_ras[:3, 3])} mm must lie on the voxels of {_described(volume)} with origin RAS "
                f"{_text(volume.ijk_to_ras[:3, 3])} mm. Resample the mask to the volume first."
            )
            raise PromptError(message)
        if self.box == _NO_VOXEL:
            return self.box, self.array_kji.copy()
        source = np.abs(turn).argmax(axis=1)  # IJK axis of the mask along each IJK axis of the volume
        sign = turn.sum(axis=1)
        ends = np.array([self.box.start, np.array(self.box.stop) - 1]) @ turn.T + shift  # first and last voxel
        box = _box(ends.min(axis=0).astype(np.int64), ends.max(axis=0).astype(np.int64) + 1)
        flip = tuple(slice(None, None, int(sign[axis])) for axis in (2, 1, 0))
        return box, self.array_kji.transpose([2 - source[axis] for axis in (2, 1, 0)])[flip].copy()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `prompt_from_json`: one bit per voxel, zlib, base64."""
        _check_mask_size(self.box)
        bits = np.packbits(self.array_kji.reshape(-1)).tobytes()
        return {
            "type": "mask",
            "array_kji": base64.b64encode(zlib.compress(bits)).decode("ascii"),
            "box": {"start": list(self.box.start), "stop": list(self.box.stop)},
            "ijk_to_ras": self.ijk_to_ras.tolist(),
            "shape_kji": list(self.shape_kji),
            "polarity": self.polarity.value,
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskPrompt):
            return NotImplemented
        return (
            (self.box, self.shape_kji, self.polarity) == (other.box, other.shape_kji, other.polarity)
            and np.array_equal(self.ijk_to_ras, other.ijk_to_ras)
            and np.array_equal(self.array_kji, other.array_kji)
        )

    def __hash__(self) -> int:
        return hash((self.box, self.shape_kji, self.polarity, self.array_kji.tobytes()))


Prompt: TypeAlias = PointPrompt | BoxPrompt | ScribblePrompt | LassoPrompt | MaskPrompt


def prompt_from_json(data: object) -> Prompt:
    """The prompt that `to_json` described.

    Args:
        data: a dict with "type" and exactly the keys that `to_json` of that type writes.

    Raises:
        PromptError: anything else. Nothing in `data` is trusted: a compressed mask is only unpacked to the size of
            its own box.
    """
    if not isinstance(data, Mapping):
        message = f"a prompt in JSON must be an object, got {_short(data)}. Save prompts with to_json."
        raise PromptError(message)
    kind = data.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        message = f'a prompt in JSON must have a "type" out of {", ".join(_READERS)}, got {_short(kind)}.'
        raise PromptError(message)
    keys, read = _READERS[kind]
    missing = [key for key in keys if key not in data]
    unknown = [key for key in data if key != "type" and key not in keys]
    if missing or unknown:
        message = (
            f"a {kind} prompt in JSON must have the keys type, {', '.join(keys)}, got {_short(list(data))}: "
            f"missing {_short(missing)}, unknown {_short(unknown)}. Save prompts with to_json."
        )
        raise PromptError(message)
    value = data["polarity"]
    if value not in [polarity.value for polarity in Polarity]:
        message = f"polarity of a {kind} prompt in JSON must be 'positive' or 'negative', got {_short(value)}."
        raise PromptError(message)
    return read(data, Polarity(value))


def _read_mask(data: Mapping[str, Any], polarity: Polarity) -> MaskPrompt:
    corners = data["box"]
    if not isinstance(corners, Mapping) or set(corners) != {"start", "stop"}:
        message = f'box of a mask prompt in JSON must be {{"start": [i, j, k], "stop": [...]}}, got {_short(corners)}.'
        raise PromptError(message)
    box = Box(*(_whole(f"box.{end} of a mask prompt in JSON", corners[end]) for end in ("start", "stop")))
    _check_mask_size(box)
    array_kji = _unpacked(data["array_kji"], box)
    ijk_to_ras = _coordinates("ijk_to_ras of a mask prompt in JSON", data["ijk_to_ras"], (4, 4))
    return MaskPrompt(array_kji, box, ijk_to_ras, data["shape_kji"], polarity)


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Polarity], Prompt]]] = {
    "point": (("ras", "polarity"), lambda data, polarity: PointPrompt(data["ras"], polarity)),
    "box": (("corner", "edges", "polarity"), lambda data, polarity: BoxPrompt(data["corner"], data["edges"], polarity)),
    "scribble": (
        ("points", "radius", "polarity"),
        lambda data, polarity: ScribblePrompt(data["points"], data["radius"], polarity),
    ),
    "lasso": (
        ("points", "thickness", "polarity"),
        lambda data, polarity: LassoPrompt(data["points"], data["thickness"], polarity),
    ),
    "mask": (("array_kji", "box", "ijk_to_ras", "shape_kji", "polarity"), _read_mask),
}


def _check_mask_size(box: Box) -> None:
    if box != _NO_VOXEL and not 0 < box.size <= _MAX_MASK_VOXELS:
        message = (
            f"box of a mask prompt in JSON must hold 1 to {_MAX_MASK_VOXELS} voxels, got IJK {box.start} to {box.stop} "
            "(half-open). Crop the volume first."
        )
        raise PromptError(message)


def _unpacked(text: object, box: Box) -> BoolArray:
    """The bool array of `box` from base64 of zlib of one bit per voxel; never unpacks more than the box needs."""
    size = (box.size + 7) // 8
    unpack = zlib.decompressobj()
    try:
        if not isinstance(text, str):
            message = f"base64 text is needed, got {_short(text)}"
            raise TypeError(message)
        packed = base64.b64decode(text, validate=True)
        bits = unpack.decompress(packed, size + 1)
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        message = f"array_kji of a mask prompt in JSON is damaged: {error}. Save the prompts again."
        raise PromptError(message) from error
    if len(bits) != size or not unpack.eof or unpack.unused_data:
        message = (
            f"array_kji of a mask prompt in JSON must unpack to the {size} bytes of its box of shape KJI "
            f"{box.shape_kji}, got another size. Save the prompts again."
        )
        raise PromptError(message)
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=box.size).astype(np.bool_).reshape(box.shape_kji)


# --- values -----------------------------------------------------------------------------------------------------------


def _short(value: object) -> str:
    """`repr`, cut short, so that a whole array never lands in a message."""
    cut = reprlib.Repr()
    cut.maxother = cut.maxstring = cut.maxlong = 120
    cut.maxlist = cut.maxtuple = cut.maxdict = 8
    return cut.repr(value)


def _text(points: npt.ArrayLike) -> str:
    """RAS coordinates to a micrometre, as nested tuples."""
    array = np.round(np.asarray(points, dtype=np.float64), 3) + 0.0  # + 0.0 turns -0.0 into 0.0
    return str(tuple(array.tolist()) if array.ndim == 1 else tuple(map(tuple, array.tolist())))


def _described(volume: Grid) -> str:
    return f"volume {volume.name!r} of shape IJK {tuple(volume.shape_kji[::-1])}"


def _coordinates(what: str, value: object, shape: tuple[int, ...]) -> FloatArray:
    """Finite numbers of that shape (-1: any number of rows); refuses text, bool and None as well."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    fits = array.ndim == len(shape) and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=False))
    if not fits or array.dtype.kind not in "iuf":
        sizes = " x ".join("n" if size < 0 else str(size) for size in shape)
        message = f"{what} must be {f'{sizes} numbers' if shape else 'a number'}, got {_short(value)}."
        raise PromptError(message)
    floats = array.astype(np.float64)
    if not (np.abs(floats) <= _FAR).all():  # false for NaN as well
        message = f"{what} must be finite and at most {_FAR:g}, got {_short(value)}. Check where it comes from."
        raise PromptError(message)
    return floats


def _triple(what: str, value: object) -> Ras:
    r, a, s = _coordinates(what, value, (3,)).tolist()
    return r, a, s


def _tuples(edges: FloatArray) -> Edges:
    a, b, c = ((float(x), float(y), float(z)) for x, y, z in edges)
    return a, b, c


def _points(what: str, value: object, at_least: int) -> tuple[Ras, ...]:
    array = _coordinates(f"{what} (at least {at_least})", value, (-1, 3))
    if len(array) < at_least:
        message = f"{what} must be at least {at_least}, got {_short(value)}. Draw more of it."
        raise PromptError(message)
    return tuple((float(r), float(a), float(s)) for r, a, s in array)


def _length(what: str, value: object) -> float:
    length = float(_coordinates(what, value, ()))
    if length <= 0:
        message = f"{what} must be above zero (mm), got {_short(value)}."
        raise PromptError(message)
    return length


def _whole(what: str, value: object) -> Ijk:
    """Three whole numbers."""
    try:
        if any(isinstance(x, bool) for x in value):  # type: ignore[attr-defined]
            raise TypeError
        a, b, c = (operator.index(x) for x in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        message = f"{what} must be three whole numbers, got {_short(value)}."
        raise PromptError(message) from error
    if max(abs(a), abs(b), abs(c)) > _FAR:
        message = f"{what} must be at most {_FAR:g}, got {_short(value)}."
        raise PromptError(message)
    return a, b, c


def _check_polarity(prompt: Prompt) -> None:
    if not isinstance(prompt.polarity, Polarity):
        message = (
            f"{type(prompt).__name__}.polarity must be Polarity.POSITIVE or Polarity.NEGATIVE, got "
            f"{_short(prompt.polarity)}."
        )
        raise PromptError(message)


def _to_ras(owner: str, ijk: npt.ArrayLike, volume: Grid) -> Ras:
    r, a, s = apply_affine(volume.ijk_to_ras, _coordinates(f"{owner} voxel IJK", ijk, (3,))).tolist()
    return r, a, s


def _tuples_to_ras(owner: str, ijk: npt.ArrayLike, volume: Grid) -> tuple[Ras, ...]:
    index = np.array(_points(f"{owner} points IJK", ijk, 1))
    return tuple((float(r), float(a), float(s)) for r, a, s in apply_affine(volume.ijk_to_ras, index))


def _box(start: IntArray, stop: IntArray) -> Box:
    i0, j0, k0 = (int(x) for x in start)
    i1, j1, k1 = (int(x) for x in stop)
    return Box((i0, j0, k0), (i1, j1, k1))


# --- grids ------------------------------------------------------------------------------------------------------------


def _tie(volume: Grid) -> FloatArray:
    """Step towards +R, +A, +S by `_TIE` voxels along each voxel axis.

    A coordinate exactly between two voxels is put on the same side of patient space on a flipped grid.
    """
    axes, signs = ras_axes(volume.ijk_to_ras)
    step = np.zeros(3)
    step[list(axes)] = np.array(signs) * _TIE
    return step


def _voxel_across(volume: Grid, normal: FloatArray) -> float:
    """Thickness in mm of a layer of voxels across a plane: each column of voxels has exactly one in it."""
    return float(np.abs(normal @ volume.ijk_to_ras[:3, :3]).max())


def _slabs(box: Box) -> Iterator[Box]:
    """The box in pieces of about `_CHUNK` voxels along K."""
    k, j, i = box.shape_kji
    step = max(1, _CHUNK // max(1, i * j))
    for first in range(0, k, step):
        k0 = box.start[2] + first
        yield Box((*box.start[:2], k0), (*box.stop[:2], min(k0 + step, box.stop[2])))


def _centres(box: Box, volume: Grid) -> FloatArray:
    """Voxel centres of a box, (K, J, I, 3) in RAS mm."""
    matrix = volume.ijk_to_ras
    i, j, k = (
        np.arange(a, b)[:, None] * matrix[:3, axis] for axis, (a, b) in enumerate(zip(box.start, box.stop, strict=True))
    )
    return np.asarray(k[:, None, None] + j[None, :, None] + (i + matrix[:3, 3])[None, None, :])


def _clipped_reach(index: FloatArray, margin: FloatArray, owner: str, volume: Grid) -> Box:
    """Box of voxels within `margin` voxels of the points (n, 3) in IJK, clipped to the volume."""
    reach = _box(
        np.ceil(index.min(axis=0) - margin).astype(np.int64), np.floor(index.max(axis=0) + margin).astype(np.int64) + 1
    )
    inside = reach.intersect(Box.of_shape(volume.shape_kji))
    if inside.size == 0 and 0 not in reach.shape_kji:
        message = (
            f"{owner} reaches voxels IJK {reach.start} to {reach.stop} (half-open), outside {_described(volume)}. "
            "Draw it inside."
        )
        raise PromptError(message)
    return inside


def _trimmed(box: Box, mask: BoolArray, owner: str, volume: Grid) -> tuple[Box, BoolArray]:
    """Crop cut down to its true voxels."""
    around = Box.around(mask)
    if around is None:
        message = (
            f"{owner} must cover at least one voxel centre of {_described(volume)}, got none. "
            "Draw it larger, or inside."
        )
        raise PromptError(message)
    return around.shift(box.start), around.crop(mask).copy()


# --- scribbles --------------------------------------------------------------------------------------------------------


def _clip_segment(
    a: FloatArray, b: FloatArray, margin: FloatArray, volume: Grid
) -> tuple[FloatArray, FloatArray] | None:
    """Part of the segment a to b (IJK) within `margin` voxels of the volume, so that its length costs nothing."""
    low, high = -0.5 - margin, np.array(volume.shape_kji[::-1]) - 0.5 + margin
    step = b - a
    still = np.abs(step) < _TINY
    if (still & ((a < low) | (a > high))).any():
        return None
    if still.all():
        return a, b
    t = np.sort([(low - a)[~still] / step[~still], (high - a)[~still] / step[~still]], axis=0)
    enter, leave = max(0.0, float(t[0].max())), min(1.0, float(t[1].min()))
    return (a + enter * step, a + leave * step) if enter <= leave else None


def _stamp_passed(a: FloatArray, b: FloatArray, volume: Grid, reach: Box, mask: BoolArray) -> None:
    """Mark the voxels that the segment a to b (IJK) passes: between two crossings of voxel faces it is in one voxel."""
    clipped = _clip_segment(a, b, np.ones(3), volume)
    if clipped is None:
        return
    a, b = (end + 0.5 + _tie(volume) for end in clipped)  # voxel v is now [v, v + 1)
    step = b - a
    cuts = [np.array([0.0, 1.0])]
    for axis in np.flatnonzero(np.abs(step) > _TINY):
        low, high = sorted((a[axis], b[axis]))
        cuts.append((np.arange(math.floor(low) + 1, math.floor(high) + 1) - a[axis]) / step[axis])
    t = np.sort(np.concatenate(cuts))
    # Through an edge of voxels two crossings coincide, and what lies between them is the tie's step, not a voxel.
    real = np.diff(t) * np.linalg.norm(step) > 10 * _TIE
    middle = (t[:-1] + t[1:])[real] / 2
    voxels = np.floor(a + np.concatenate([[0.0, 1.0], middle])[:, None] * step).astype(np.int64)
    voxels = voxels[((voxels >= reach.start) & (voxels < reach.stop)).all(axis=1)] - reach.start
    mask[voxels[:, 2], voxels[:, 1], voxels[:, 0]] = True


def _stamp_capsules(
    a: FloatArray, b: FloatArray, volume: Grid, radius: float, margin: FloatArray, reach: Box, mask: BoolArray
) -> None:
    """Mark the voxels whose centre is within `radius` mm of the segment a to b (IJK).

    The segment is cut into short pieces, since the box around a long oblique one is nearly all air.
    """
    clipped = _clip_segment(a, b, margin, volume)
    if clipped is None:
        return
    a, b = clipped
    pieces = max(1, math.ceil(float((np.abs(b - a) / np.maximum(16.0, 2 * margin)).max())))
    joints = a + np.linspace(0, 1, pieces + 1)[:, None] * (b - a)
    near = radius + _TIE * float(np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0).min())
    for first, last in itertools.pairwise(joints):
        low, high = np.minimum(first, last) - margin, np.maximum(first, last) + margin
        around = _box(np.ceil(low).astype(np.int64), np.floor(high).astype(np.int64) + 1).intersect(reach)
        if around.size == 0:
            continue
        start, stop = apply_affine(volume.ijk_to_ras, np.stack([first, last]))
        along = stop - start
        square = max(float(along @ along), _TINY**2)
        for slab in _slabs(around):
            offset = _centres(slab, volume) - start
            t = np.clip(offset @ along / square, 0, 1)
            offset -= t[..., None] * along
            into = mask[slab.within(reach).slices]
            into |= np.einsum("...r,...r->...", offset, offset) <= near * near


# --- lassos -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Plane:
    """A plane in RAS mm with an orthonormal frame (3, 3): two directions within, and the normal."""

    origin: FloatArray
    frame: FloatArray

    @property
    def normal(self) -> FloatArray:
        return np.asarray(self.frame[2])

    def project(self, ras: FloatArray) -> FloatArray:
        """Points (n, 3) in RAS mm to coordinates (n, 2) within the plane, mm."""
        return np.asarray((ras - self.origin) @ self.frame[:2].T)


def _plane(points: FloatArray) -> tuple[_Plane, float, float, float]:
    """The plane nearest to points (n, 3): length and width of the points in it, and how far they are off it, mm."""
    origin = points.mean(axis=0)
    _, _, frame = np.linalg.svd(points - origin, full_matrices=False)
    normal = frame[2] * np.sign(frame[2][np.abs(frame[2]).argmax()])  # towards +R, +A or +S
    placed = (points - origin) @ frame.T
    length, width, _ = placed.max(axis=0) - placed.min(axis=0)
    frame = np.stack([frame[0], frame[1], normal])
    return _Plane(origin, frame), float(length), float(width), float(np.abs(placed[:, 2]).max())


def _layers(plane: _Plane, thickness: float, tie: float, reach: Box, volume: Grid) -> Iterator[IntArray]:
    """Voxels (n, 3) in IJK whose centre is within half the thickness of the plane, one layer after the other.

    Only columns of voxels along the axis that is steepest across the plane are visited: the cost is that of the area
    drawn, not of the box around it.
    """
    slope = plane.normal @ volume.ijk_to_ras[:3, :3]  # mm off the plane per voxel
    steep = int(np.abs(slope).argmax())
    low, high = np.array(reach.start), np.array(reach.stop)
    flat = high.copy()
    flat[steep] = low[steep] + 1
    columns = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, flat, strict=True)), indexing="ij"), axis=-1)
    columns = columns.reshape(-1, 3)
    columns[:, steep] = 0
    off = (apply_affine(volume.ijk_to_ras, columns) - plane.origin) @ plane.normal
    ends = (np.array([-thickness, thickness])[:, None] / 2 - tie - off) / slope[steep]  # (2, n) index along the column
    if slope[steep] > 0:  # [-thickness / 2, thickness / 2) in mm, so the closed end changes with the direction
        start, stop = np.ceil(ends[0]), np.ceil(ends[1])
    else:
        start, stop = np.floor(ends[1]) + 1, np.floor(ends[0]) + 1
    start, stop = np.maximum(start, low[steep]).astype(np.int64), np.minimum(stop, high[steep]).astype(np.int64)
    for layer in range(int((stop - start).max(initial=0))):
        there = start + layer < stop
        voxels = columns[there]
        voxels[:, steep] = (start + layer)[there]
        yield voxels


def _inside_polygon(points: FloatArray, polygon: FloatArray, tie: float) -> BoolArray:
    """Which points (n, 2) lie inside a polygon (m, 2) by the even-odd rule, or within `tie` of its outline.

    The points are sorted by height once, so that an edge only meets the points at its own height.
    """
    order = points[:, 1].argsort()
    x, y = points[order].T
    inside = np.zeros(len(points), dtype=np.bool_)
    on_edge = np.zeros(len(points), dtype=np.bool_)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        low, high = min(y0, y1), max(y0, y1)
        a, b = np.searchsorted(y, [low, high])  # half-open: an edge's upper end belongs to the next edge
        if a < b:
            inside[a:b] ^= x[a:b] < x0 + (y[a:b] - y0) / (y1 - y0) * (x1 - x0)
        a, b = np.searchsorted(y, [low - tie, high + tie])
        if a < b:
            dx, dy = x1 - x0, y1 - y0
            t = np.clip(((x[a:b] - x0) * dx + (y[a:b] - y0) * dy) / max(dx * dx + dy * dy, _TINY**2), 0, 1)
            on_edge[a:b] |= np.hypot(x[a:b] - x0 - t * dx, y[a:b] - y0 - t * dy) <= tie
    found = np.empty(len(points), dtype=np.bool_)
    found[order] = inside | on_edge
    return found
