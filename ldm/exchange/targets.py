"""Which slices of a volume become samples: those of each vertebra that is wanted, with its lesion or without.

A lesion belongs to the vertebra that it lies in or at; one that reaches into a second vertebra is divided between the
two, and parts that lie further apart than the larger one is wide are lesions of their own. Each becomes samples of its
own: a mask holds one lesion of one vertebra. A vertebra with a lesion gives no healthy sample, from none of its slices;
nor does one beside which a lesion lies that belongs to none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.tables import counted
from ldm.data.samples import shown
from ldm.volumes.bodies import bodies
from ldm.volumes.labels import LEVELS, VERTEBRAE, Labels, Lesion, structure_named
from ldm.volumes.volume import PLANES, PROJECTION, Slice, Volume, count, cut, orient

BACKGROUND, TARGET, OTHER, DISC, CANAL = range(5)  # of anatomy.png, see docs/data.md
BESIDE = 2.0  # mm: a lesion this near to a label lies at it: labels leave destroyed bone out
NEAR = 10.0  # mm: a vertebra this near to a lesion that belongs to none is not taken for healthy
PART = 0.1  # of a lesion's voxels: less of it in or at a vertebra is none of that vertebra's lesion
STRAY = 10.0  # mm3: a smaller part of a lesion is left out
SMALL = {"body": 0.25, "lesion": 0.1}  # of the largest slice's area: slices with less are left out
CUT_OFF = 0.25  # of its largest cross-section: a body that reaches the image's edge with as much goes on outside
LEAST = 4  # pixels of a lesion in a slice
# Why a vertebra gives no healthy sample:
DISEASED = "has a lesion: its slices without it are not taken for healthy"
REACHED = "a lesion of another vertebra reaches into it: it is not taken for healthy"
BESIDE_IT = "a lesion that was refused lies in it or beside it: it is not taken for healthy"
SECOND_LESION = "another lesion is seen in this slice"  # how the note of such a sample begins


_Box = tuple[slice, ...]
_Part = tuple[_Box, np.ndarray]  # bool mask in a box of the oriented grid


@dataclass(frozen=True, eq=False)
class Cut:
    """One sample to be: the image, its label map and lesion on the slice's own grid.

    anatomy: uint8 HxW as docs/data.md numbers it, lesion: bool HxW; None where nothing is known or there is none.
    ``name`` is unique in the case: level, position of the slice, a letter where a vertebra has several lesions.
    """

    image: Slice
    anatomy: np.ndarray | None
    lesion: np.ndarray | None
    level: str | None
    lesion_of: Lesion | None
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """What does not become a sample, and why; rejected: because something is wrong with the data."""

    what: str
    reason: str
    rejected: bool = False


@dataclass(frozen=True, eq=False)
class _Focus:
    """A vertebra or a lesion of which slices are cut: bool ``mask`` inside a box of the oriented grid."""

    vertebra: int  # its number in the labels; 0: unknown
    level: str | None
    name: str
    box: _Box
    mask: np.ndarray
    lesion: Lesion | None = None
    notes: tuple[str, ...] = ()


def check_asked(slices: str | int, target: Sequence[str]) -> None:
    """UsageError for values of ``--slices`` and ``--target`` that no image can answer."""
    if slices not in ("middle", "lesion", "all") and not (isinstance(slices, int) and slices > 0):
        raise UsageError(f"--slices: expected middle, lesion, all or a number above 0, found {slices}")
    for level in target:
        if structure_named(level) not in (*LEVELS, "sacrum"):
            raise UsageError(f"--target: expected levels such as L3, or sacrum, found {level}")


def choose(
    volume: Volume,
    labels: Labels | None,
    lesions: Sequence[Lesion],
    *,
    plane: str = "sagittal",
    target: Sequence[str] = (),
    slices: str | int = "middle",
    limit: int | None = None,
) -> tuple[list[Cut], list[LeftOut]]:
    """The slices to import, and what is left out.

    ``target``: levels; empty: every vertebra (the sacrum only with a lesion). ``slices`` of each vertebra: its "middle"
    one (with a lesion: where that is largest), those with a "lesion", "all", or this many, evenly spread. ``limit``:
    the most slices, those with lesions first and then one a vertebra in turn. Without labels a slice with a lesion is
    cut with an unknown level, and without lesions too, ``slices`` of the volume. ``check_asked`` refuses other values
    of both. MedSoftError for labels that hold lesions which nobody reads, and for a ``target`` without labels.
    """
    if labels is not None and labels.lesions and not lesions:
        raise MedSoftError(
            f"{volume.name}: its labels hold lesions too ({shown(labels.lesions[0])}), which would count as healthy; "
            "give the same file as --lesions"
        )
    case = _Case(volume, labels, PROJECTION if volume.acquired == PROJECTION else plane)
    wanted = _targets(target, case, volume.name)
    rows, left_out = [], [LeftOut(level, "is not in the labels") for level in wanted if level not in case.levels()]
    ill = case.lesion_foci(lesions, left_out)
    healthy = [] if slices == "lesion" else case.healthy_foci(wanted, left_out)
    for focus in sorted([*_in_target(ill, wanted, left_out), *healthy], key=lambda each: case.rank(each.vertebra)):
        rows.append([(focus, position) for position in case.positions(focus, slices, left_out)])
    order = [(row[rank][0].lesion is None, rank, n) for n, row in enumerate(rows) for rank in range(len(row))]
    order.sort()
    if limit is not None and len(order) > limit:
        left_out.append(LeftOut(counted(len(order) - limit, "slice"), f"beyond the limit of {limit}"))
    return [case.cut(*rows[n][rank], ill) for _, rank, n in sorted(order[:limit], key=lambda o: (o[2], o[1]))], left_out


def _targets(target: Sequence[str], case: "_Case", name: str) -> list[str]:
    """The levels of --target as labels name them. MedSoftError where there are no labels."""
    if target and case.labels is None:
        raise MedSoftError(f"{name}: --target needs to know where the vertebrae are; give --labels")
    return [str(structure_named(text)) for text in target]


def _in_target(foci: Sequence[_Focus], wanted: Sequence[str], left_out: list[LeftOut]) -> list[_Focus]:
    inside = [focus for focus in foci if not wanted or focus.level in wanted]
    left_out += [LeftOut(f"lesion of {focus.name}", "not among --target") for focus in foci if focus not in inside]
    return inside


class _Case:
    """An image with its labels along the axes of the patient, as slices of one plane are cut from it."""

    def __init__(self, volume: Volume, labels: Labels | None, plane: str) -> None:
        self.volume, self.labels, self.plane = volume, labels, plane
        self.grid = orient(volume)
        self.axis = self._normal()
        self.structures: Mapping[int, str] = {}
        self.about_bodies: Mapping[int, str] = {}
        self.diseased: set[int] = set()  # numbers of vertebrae
        self.suspected: dict[int, str] = {}  # why others are not taken for healthy
        self.refused: list[_Focus] = []
        if labels is None:
            return
        self.structures = labels.structures
        self.values = orient(replace(volume, values=labels.values)).values
        self.bodies = self.values  # of a projection the labels as they are: there is no canal to look behind
        if plane != PROJECTION:
            self.bodies, self.about_bodies = bodies(self.values, self.structures, self.grid.spacing)
        self.boxes = dict(enumerate(ndimage.find_objects(self.bodies), 1))
        unknown = [number for number, name in sorted(self.structures.items()) if name == "vertebra"]
        self.names = {  # as samples and messages name them
            n: name if name != "vertebra" else f"V{unknown.index(n) + 1}" for n, name in self.structures.items()
        }

    def _normal(self) -> int:
        if self.plane == PROJECTION:
            return [axis for axis, _ in self.grid.stored].index(2)
        count(self.volume, self.plane)  # MedSoftError for a plane that it does not have
        return PLANES.index(self.plane)

    def levels(self) -> list[str]:
        """The levels that the labels hold."""
        return [*self.structures.values()]

    def level(self, number: int) -> str | None:
        """The level of a vertebra by its number; None where it is not known."""
        name = self.structures.get(number)
        return name if name in (*LEVELS, "sacrum") else None

    def lesion_foci(self, lesions: Sequence[Lesion], left_out: list[LeftOut]) -> list[_Focus]:
        """One for each lesion of each vertebra; those outside of every vertebra are rejected."""
        found: dict[int, list[_Focus]] = {}
        for lesion in lesions:
            parts = self._without_strays(
                lesion, _parts(orient(replace(self.volume, values=lesion.mask)).values), left_out
            )
            for number, (own, notes) in self._by_vertebra(lesion, parts, left_out).items():
                for box, mask in _grouped(own, self.grid.spacing):
                    focus = _Focus(number, self.level(number), self._name(number), box, mask, lesion, notes)
                    found.setdefault(number, []).append(focus)
        self.diseased = {*found}
        return [
            replace(focus, name=f"{focus.name}_{chr(97 + k) if k < 26 else k}" if len(foci) > 1 else focus.name)
            for _, foci in sorted(found.items(), key=lambda item: self.rank(item[0]))
            for k, focus in enumerate(foci)
        ]

    def _name(self, number: int) -> str:
        return self.names[number] if number else "lesion"

    def rank(self, number: int) -> tuple[int, int]:
        level = self.level(number)
        return (LEVELS.index(level) if level in LEVELS else len(LEVELS), number)

    def _without_strays(self, lesion: Lesion, parts: list[_Part], left_out: list[LeftOut]) -> list[_Part]:
        """The parts without specks; the largest one stays, whatever its size."""
        least = max(LEAST, STRAY / float(np.prod(self.grid.spacing)))
        sizes = [np.count_nonzero(mask) for _, mask in parts]
        strays = [part for part, size in zip(parts, sizes, strict=True) if size < least and size < max(sizes)]
        if strays:
            left_out.append(LeftOut(lesion.name, counted(_voxels(strays), "stray voxel")))
        for box, mask in strays if self.labels else ():
            self._suspect(self.values[box][mask], REACHED)
        return [part for part in parts if not any(part is stray for stray in strays)]

    def _by_vertebra(
        self, lesion: Lesion, parts: Sequence[_Part], left_out: list[LeftOut]
    ) -> dict[int, tuple[list[_Part], tuple[str, ...]]]:
        """The parts of a lesion by the number of the vertebra that they belong to (0: unknown), with notes."""
        if self.labels is None:
            return {0: ([*parts], ())} if parts else {}
        outside: list[_Part] = []
        found: dict[int, tuple[list[_Part], tuple[str, ...]]] = {}
        for part in parts:
            pieces = self._divided(*part)
            outside += [] if pieces else [part]
            for number, (piece, notes) in pieces.items():
                earlier, known = found.get(number, ([], ()))
                found[number] = ([*earlier, piece], tuple(dict.fromkeys(known + notes)))
        if outside:
            reason = f"{_voxels(outside)} of its {_voxels(parts)} voxels lie outside of every vertebra of the labels"
            left_out.append(LeftOut(lesion.name, reason, rejected=True))
            self.refused += [_Focus(0, None, "one that was refused", *part, lesion) for part in outside]
        for number in [*found]:
            own = found[number][0]
            inside = sum(np.count_nonzero(mask & (self.values[box] == number)) for box, mask in own)
            if inside == _voxels(own) == np.count_nonzero(self.values == number):
                reason = f"is the whole label of {self._name(number)}; is the lesion file a label map of vertebrae?"
                left_out.append(LeftOut(lesion.name, reason, rejected=True))
                self._suspect(np.array([number]), BESIDE_IT)
                del found[number]
        return found

    def _divided(self, box: _Box, mask: np.ndarray) -> dict[int, tuple[_Part, tuple[str, ...]]]:
        """A connected part of a lesion divided between the vertebrae that hold it; empty if none does."""
        spacing = self.grid.spacing
        box, part = _wider(box, mask, spacing, self.values.shape)
        values = self.values[box]
        vertebrae = [number for number, name in self.structures.items() if name in VERTEBRAE]
        others = [number for number, name in self.structures.items() if name in ("disc", "canal")]
        distance, nearest = _nearest(values, vertebrae, spacing)
        at = part & (distance <= max(BESIDE, 1.01 * min(spacing))) & ~np.isin(values, others)
        votes = np.bincount(nearest[at], minlength=max(vertebrae) + 1)
        holders = [n for n in np.flatnonzero(votes).tolist() if votes[n] >= PART * np.count_nonzero(part)]
        if not holders:
            self._suspect(nearest[part & (distance <= NEAR)], BESIDE_IT)
            return {}
        self._suspect(values[part & np.isin(values, vertebrae)], REACHED)
        owner = _nearest(values, holders, spacing)[1] if len(holders) > 1 else np.full(part.shape, holders[0])
        return {
            holder: ((box, part & (owner == holder)), self._about(holder, part & (owner == holder), holders, values))
            for holder in holders
        }

    def _about(self, holder: int, own: np.ndarray, holders: Sequence[int], values: np.ndarray) -> tuple[str, ...]:
        """What to say of a lesion's part and its vertebra."""
        inside = np.count_nonzero(values[own] == holder) / np.count_nonzero(own)
        shares = (f"{inside:.0%} of the lesion lies in the label of {self._name(holder)}",) if inside < 0.5 else ()
        also = [self._name(other) for other in holders if other != holder]
        return (*(f"the lesion reaches into {name} too and was divided" for name in also), *shares)

    def _suspect(self, numbers: np.ndarray, why: str) -> None:
        self.suspected |= {number: why for number in np.unique(numbers).tolist() if number}

    def healthy_foci(self, wanted: Sequence[str], left_out: list[LeftOut]) -> list[_Focus]:
        """The bodies of the vertebrae without a lesion; without labels the volume, unless it has a lesion."""
        if self.labels is None:
            if self.diseased:
                return []
            whole = tuple(slice(0, n) for n in self.grid.values.shape)
            return [_Focus(0, None, "slice", whole, np.broadcast_to(np.True_, self.grid.values.shape))]
        foci = []
        for number in sorted(self.structures, key=self.rank):
            name, level = self._name(number), self.level(number)
            if self.structures[number] not in (*LEVELS, "vertebra") and not (level and level in wanted):
                continue
            if wanted and level not in wanted:
                continue
            if reason := self._not_healthy(number):
                left_out.append(LeftOut(name, reason))
            else:
                box = self.boxes[number]
                foci.append(_Focus(number, level, name, box, self.bodies[box] == number))
        return foci

    def _not_healthy(self, number: int) -> str | None:
        """Why a vertebra gives no healthy slice."""
        box = self.boxes.get(number)
        if number in self.diseased:
            return DISEASED
        if number in self.suspected:
            return self.suspected[number]
        if box is None:
            return self.about_bodies.get(number, "is not in the image")
        body = self.bodies[box] == number
        for axis in {0, 1, 2} - {self.axis}:
            areas = body.sum(axis=tuple(other for other in range(3) if other != axis))
            ends = ((box[axis].start == 0) * areas[0], (box[axis].stop == self.bodies.shape[axis]) * areas[-1])
            if self.bodies.shape[axis] > 1 and max(ends) >= CUT_OFF * areas.max():
                return "the edge of the image cuts it off"
        return None

    def positions(self, focus: _Focus, slices: str | int, left_out: list[LeftOut]) -> list[int]:
        """The slices to cut of a vertebra or lesion, along the plane's normal."""
        areas = focus.mask.sum(axis=tuple(axis for axis in range(3) if axis != self.axis))
        kind = "lesion" if focus.lesion else "body"
        enough = np.flatnonzero(areas >= max(SMALL[kind] * areas.max(), LEAST))
        if not len(enough):
            reason = f"its {kind} has fewer than {LEAST} pixels in every slice"
            left_out.append(LeftOut(focus.name, reason, rejected=focus.lesion is not None))
            return []
        if slices == "middle" and focus.lesion:
            chosen = [int(areas.argmax())]
        elif slices == "middle":
            middle = np.average(np.arange(len(areas)), weights=areas)
            chosen = [int(enough[np.abs(enough - middle).argmin()])]
        else:
            number = len(enough) if isinstance(slices, str) else min(slices, len(enough))
            chosen = enough[((np.arange(number) + 0.5) * len(enough) / number).astype(int)].tolist()
        small = int(np.count_nonzero(areas)) - len(enough)
        if small and focus.lesion and slices in ("all", "lesion"):
            left_out.append(LeftOut(f"{counted(small, 'slice')} of {focus.name}", "the lesion is too small in them"))
        return [focus.box[self.axis].start + position for position in chosen]

    def cut(self, focus: _Focus, position: int, ill: Sequence[_Focus]) -> Cut:
        """The sample that a slice of a vertebra or lesion is."""
        image = cut(self.volume, self.plane, position)
        anatomy = self._anatomy(focus, position) if self.labels else None
        lesion = self._pixels(focus, position) if focus.lesion else None
        notes = [*self.labels.notes] if self.labels else []
        notes += [*(focus.lesion.notes if focus.lesion else ()), *focus.notes]
        if focus.vertebra in self.about_bodies:
            notes.append(self.about_bodies[focus.vertebra])
        if lesion is not None and anatomy is not None and not (lesion & (anatomy == TARGET)).any():
            notes.append("the lesion does not meet the vertebra's body in this slice")
        for other in (*ill, *self.refused):
            if other is not focus and self._area(other, position):
                notes.append(f"{SECOND_LESION}: {other.name}")
        name, _, letter = focus.name.partition("_")
        unique = "_".join(filter(None, (name, f"{position:03d}", letter)))
        return Cut(image, anatomy, lesion, focus.level, focus.lesion, unique, tuple(dict.fromkeys(notes)))

    def _area(self, focus: _Focus, position: int) -> int:
        place = position - focus.box[self.axis].start
        inside = 0 <= place < focus.mask.shape[self.axis]
        return int(np.count_nonzero(focus.mask.take(place, self.axis))) if inside else 0

    def _pixels(self, focus: _Focus, position: int) -> np.ndarray:
        whole = np.zeros(self.grid.values.shape, bool)
        whole[focus.box] = focus.mask
        return cut(replace(self.grid, values=whole), self.plane, position).pixels

    def _anatomy(self, focus: _Focus, position: int) -> np.ndarray:
        numbers = cut(replace(self.grid, values=self.bodies), self.plane, position).pixels
        meaning = np.zeros(max(self.structures) + 1, np.uint8)
        for number, name in self.structures.items():
            meaning[number] = {"disc": DISC, "canal": CANAL}.get(name, OTHER)
        if focus.vertebra:
            meaning[focus.vertebra] = TARGET
        return meaning[numbers]


def _parts(mask: np.ndarray) -> list[_Part]:
    """The connected parts of a mask, each in its box."""
    along = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    if not all(map(len, along)):
        return []
    place = tuple(slice(int(each[0]), int(each[-1]) + 1) for each in along)
    parts, _ = ndimage.label(mask[place], np.ones((3, 3, 3)))
    boxes = ndimage.find_objects(parts)
    return [
        (
            tuple(slice(p.start + b.start, p.start + b.stop) for p, b in zip(place, box, strict=True)),
            parts[box] == number,
        )
        for number, box in enumerate(boxes, 1)
    ]


def _voxels(parts: Sequence[_Part]) -> int:
    return sum(int(np.count_nonzero(mask)) for _, mask in parts)


def _pasted(box: _Box, parts: Sequence[_Part]) -> np.ndarray:
    """Parts together in a box that holds theirs."""
    whole = np.zeros([side.stop - side.start for side in box], bool)
    for own, mask in parts:
        whole[tuple(slice(o.start - b.start, o.stop - b.start) for o, b in zip(own, box, strict=True))] |= mask
    return whole


def _wider(box: _Box, mask: np.ndarray, spacing: Sequence[float], shape: Sequence[int]) -> _Part:
    """A part in a box with a margin of ``NEAR`` mm."""
    steps = [int(np.ceil(NEAR / length)) + 1 for length in spacing]
    wide = tuple(
        slice(max(side.start - step, 0), min(side.stop + step, n))
        for side, step, n in zip(box, steps, shape, strict=True)
    )
    return wide, _pasted(wide, [(box, mask)])


def _nearest(values: np.ndarray, numbers: Sequence[int], spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each voxel the distance in mm to the nearest of these labels, and its number; infinity and 0 without one."""
    inside = np.isin(values, numbers)
    if not inside.any():
        return np.full(values.shape, np.inf), np.zeros(values.shape, values.dtype)
    distance, places = ndimage.distance_transform_edt(~inside, spacing, return_indices=True)
    return distance, values[tuple(places)]


def _grouped(parts: Sequence[_Part], spacing: Sequence[float]) -> list[_Part]:
    """Parts as lesions: a part joins a larger one that is no further away than that one is wide (as a ball)."""
    box = tuple(
        slice(min(part[axis].start for part, _ in parts), max(part[axis].stop for part, _ in parts))
        for axis in range(3)
    )
    rest = sorted((_pasted(box, [part]) for part in parts), key=np.count_nonzero, reverse=True)
    groups = []
    while rest:
        width = 2 * (3 * np.count_nonzero(rest[0]) * float(np.prod(spacing)) / (4 * np.pi)) ** (1 / 3)
        near = ndimage.distance_transform_edt(~rest[0], spacing) <= width if len(rest) > 1 else rest[0]
        groups.append((box, np.logical_or.reduce([part for part in rest if part[near].any()])))
        rest = [part for part in rest if not part[near].any()]
    return groups
