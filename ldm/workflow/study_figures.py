"""The figures and tables of a paper from the cells and drawings of one study or several. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import write_text
from ldm.core.paths import ROOT
from ldm.core.tables import counted, markdown_table, write_csv
from ldm.data.annotations import read_samples
from ldm.data.crop import CropWindow
from ldm.data.images import intensity_range_of, read_image, to_unit
from ldm.data.masks import TARGET_LABEL, extents, read_anatomy, read_mask
from ldm.data.samples import Sample
from ldm.reports.figures import write_figure
from ldm.workflow.study_design import Design, World, load_design, plan_groups
from ldm.workflow.study_report import mean_with_bounds, reach
from ldm.workflow.study_results import Interval, Study, Treatment, interval
from ldm.workflow.study_run import read_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
COLOURS, STYLES = 10, ("-", "--", ":")  # as many lines differ by colour alone, three times as many by both
ROWS_A_KIND = 2  # of the drawings side by side
AROUND, TILE = 1.6, 128  # side of what is shown there: over the vertebra's longer one, and in pixels

Drawn = Mapping[str, Sample]  # a generator's results by name, which says the parent and the variant


def write_figures(paths: Sequence[Path], folder: Path) -> int:
    """Learning curve, arms, kinds and drawings of these studies in ``folder``, and a page that shows them.

    ``learning_curve`` and, for each study, ``arms_NAME`` as PNG and SVG; ``kinds_NAME.csv``; ``drawings_NAME.png``
    where two generators have drawn here on the same images; ``figures.md``. NAME is that of the study's output folder.
    UsageError for a faulty study or two of one name, MedSoftError without cells.
    """
    studies, designs = dict[str, Study](), dict[str, Design]()
    for path in paths:
        design = load_design(path)
        if design.keys.compare is None:
            raise UsageError(f"{path}: has no arms, so there are no cells to show; its study.html has its drawings")
        name = Path(design.keys.output_dir).name
        if name in studies:
            raise UsageError(f"{path}: {name} is the name of another study's output folder, too")
        designs[name], studies[name] = design, read_study(design, list(plan_groups(design)))[0]
        if not studies[name].cells:
            raise MedSoftError(f"{path}: no cell of it is finished; run the study first")
    parts = ["# Figures", "![by number of real lesions](learning_curve.png)"]
    save(folder, "learning_curve", learning_curve(studies))
    for name, study in studies.items():
        save(folder, f"arms_{name}", arms_figure(study))
        finished = f"{len(study.cells)} of {len(study.planned)} classifiers are finished."
        parts += [f"## {name}", finished, f"![arms of {name}](arms_{name}.png)"]
        if rows := kind_rows(study):
            write_csv(folder / f"kinds_{name}.csv", rows)
            parts.append(kind_table(study))
        try:
            drawings = drawings_figure(designs[name])
        except MedSoftError as error:  # such as data that lie elsewhere by now: the numbers need none
            drawings = None
            print(f"warning: no drawings of {name} are shown: {error}")
        if drawings is not None:
            write_figure(folder / f"drawings_{name}.png", drawings)
            parts.append(f"![drawings of {name}](drawings_{name}.png)")
    write_text(folder / "figures.md", "\n\n".join(parts) + "\n")
    cells = sum(len(each.cells) for each in studies.values())
    print(f"{folder / 'figures.md'}: {counted(len(studies), 'study', 'studies')}, {counted(cells, 'cell')}")
    return cli.DONE


def save(folder: Path, name: str, figure: "Figure") -> None:
    """Write a figure in each of the formats."""
    for suffix in FORMATS:
        write_figure(folder / f"{name}.{suffix}", figure, dpi=200)


def shown_arms(study: Study) -> list[Treatment]:
    """Every arm at the study's ratio, or at none, that has finished cells."""
    ratio = study.chosen_ratio()
    return [treatment for treatment in study.treatments if treatment.ratio in (None, ratio)]


def real_lesions(study: Study, treatment: Treatment) -> float | None:
    """The mean number of real diseased training images of an arm's cells over its worlds."""
    counts = {
        cell.world: cell.n_train_diseased
        for cell in study.cells
        if cell.treatment == treatment and cell.n_train_diseased is not None
    }
    return interval(list(counts.values())).mean if counts else None


def learning_curve(studies: Mapping[str, Study]) -> "Figure":
    """The endpoint by the number of real lesions: a line an arm, a point a study, mean and interval over its worlds.

    Of several studies only arms that two of them have: the others have no course, and would hide those that do.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, lines = figure.add_subplot(), dict[str, dict[float, Interval]]()
    for study in studies.values():
        for treatment in shown_arms(study):
            at, mean = real_lesions(study, treatment), study.mean(treatment)
            if at is not None and mean is not None:
                lines.setdefault(treatment.arm, {})[at] = mean
    lines = {arm: points for arm, points in lines.items() if len(points) > 1} or lines
    what = " or ".join(dict.fromkeys(study.endpoint for study in studies.values()))
    for number, (arm, points) in enumerate(lines.items()):
        places = sorted(points)
        reaches = list(zip(*(reach(points[at]) for at in places), strict=True))
        style = STYLES[number // COLOURS % len(STYLES)]  # matplotlib begins again with its first colour
        means = [points[at].mean for at in places]
        axes.errorbar(places, means, reaches, marker="o", linestyle=style, capsize=3, label=arm)
    axes.set(xlabel="real lesions to train on", ylabel=f"{what}\n(mean and 95 % over worlds)")
    if any(lines.values()):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def arms_figure(study: Study) -> "Figure":
    """What each arm changes against the control: the paired difference of the endpoint with its interval, sorted."""
    from matplotlib.figure import Figure

    control = study.at(study.comparison.control, study.chosen_ratio())
    changes = {arm: study.difference(arm, control) for arm in shown_arms(study) if arm != control}
    known = {arm: change for arm, change in changes.items() if change is not None}
    order = sorted(known, key=lambda arm: known[arm].mean)
    figure = Figure(figsize=(6.4, 1.2 + 0.34 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(order):
        change = known[arm]
        below, above = reach(change)
        colour = "tab:blue" if arm.arm == study.comparison.main else "0.25"
        axes.errorbar([change.mean], [place], xerr=[[below], [above]], fmt="o", capsize=3, color=colour)
    axes.axvline(0, color="0.45", linestyle="--")
    axes.set_yticks(range(len(order)), [str(arm) for arm in order])
    axes.set_xlabel(f"{study.endpoint} minus that of {control} (mean and 95 % over worlds)")
    axes.grid(alpha=0.25, axis="x")
    return figure


def kind_rows(study: Study) -> list[dict[str, str | float | None]]:
    """A row for each kind, severity and arm: the AUC against all healthy test images, or Dice, over worlds."""
    by_kind, rows = study.by_kind(), []
    for name in dict.fromkeys(name for cell in study.cells for name in cell.groups):
        kind, _, severity = name.rpartition(", ")
        for treatment in shown_arms(study):
            mean = by_kind.mean(treatment, name)
            if mean is not None:
                row = {"lesion_type": kind, "severity": severity, "arm": treatment.arm, "ratio": treatment.ratio}
                rows.append(row | {"value": mean.mean, "low": mean.low, "high": mean.high, "worlds": mean.worlds})
    return rows


def kind_table(study: Study) -> str:
    """The same side by side in Markdown, and what the main arm changes against the control."""
    by_kind, arms, ratio = study.by_kind(), shown_arms(study), study.chosen_ratio()
    main, control = study.at(study.comparison.main, ratio), study.at(study.comparison.control, ratio)
    rows = []
    for name in dict.fromkeys(name for cell in study.cells for name in cell.groups):
        kind, _, severity = name.rpartition(", ")
        means = [by_kind.mean(arm, name) for arm in arms]
        shown = ["-" if mean is None else f"{mean.mean:.3f}" for mean in means]
        rows.append([kind, severity, *shown, mean_with_bounds(by_kind.difference(main, control, name), "{:+z.3f}")])
    return markdown_table(["kind", "severity", *map(str, arms), f"{main} minus {control}"], rows)


def drawings_figure(design: Design) -> "Figure | None":
    """The same healthy images after each generator, of the first world in which two have drawn; None if there is none.

    A row for each of two images a lesion type, subtle ones last; ``original``, then a column a generator. Only
    generators that were given the same sentences are shown, as others have no drawing to compare: an oracle has
    sentences of its own. Nor are those whose drawings are chosen among several. MedSoftError for a faulty data set.
    """
    for world in design.worlds:
        drawn = drawings(design, world)
        if len(drawn) > 1:
            originals = {sample.sample_id: sample for sample in read_samples(ROOT / world.train)[0]}
            shown = comparable(drawn, originals)
            if len(shown) > 1:
                return sheet(shown, originals, chosen_names(shown), world.name)
    return None


def drawings(design: Design, world: World) -> dict[str, Drawn]:
    """By generator, in the order of the YAML, the lesions that lie in its folder."""
    found: dict[str, Drawn] = {}
    for name, generator in design.keys.generators.items():
        for made in filter(None, design.all_made(name) if generator.choose is None else ()):
            folder = ROOT / design.home(world, made) / "pictures"
            if any(folder.glob("*/image.png")):
                samples, _ = read_samples(folder)
                found[str(made)] = {sample.sample_id: sample for sample in samples if not sample.healthy}
    return found


def comparable(drawn: Mapping[str, Drawn], originals: Mapping[str, Sample]) -> dict[str, Drawn]:
    """The most generators that mostly had the same sentences, and what all of them have drawn by these."""

    def same(one: Drawn, other: Drawn) -> set[str]:
        return {name for name, each in one.items() if name in other and other[name].prompt == each.prompt}

    groups = [
        {name: each for name, each in drawn.items() if 2 * len(same(first, each)) > len(first)}
        for first in drawn.values()
    ]
    kept = max(groups, key=len, default={})
    first = {name: each for name, each in next(iter(kept.values()), {}).items() if each.parent_id in originals}
    shared = set(first).intersection(*(same(first, each) for each in kept.values()))
    return {name: {each: of[each] for each in sorted(shared)} for name, of in kept.items()} if shared else {}


def chosen_names(drawn: Mapping[str, Drawn]) -> list[str]:
    """Names of the first two drawings of each lesion type, subtle ones last."""
    kinds: dict[str, list[tuple[bool, str]]] = {}
    for name, sample in next(iter(drawn.values())).items():
        kinds.setdefault(sample.lesion_type or "", []).append((sample.severity == "subtle", name))
    return [name for kind in sorted(kinds) for _, name in sorted(kinds[kind])[:ROWS_A_KIND]]


def sheet(drawn: Mapping[str, Drawn], originals: Mapping[str, Sample], names: Sequence[str], world: str) -> "Figure":
    """Squares around the vertebra: a row a name, the original and a column a generator."""
    from matplotlib.figure import Figure

    columns = len(drawn) + 1
    figure = Figure(figsize=(1.25 * columns + 0.3, 1.25 * len(names) + 0.5), layout="constrained")
    figure.suptitle(f"the same images of {world} after each generator", fontsize=9)
    axes = figure.subplots(len(names), columns, squeeze=False)
    for place, title in zip(axes[0], ["original", *drawn], strict=True):
        place.set_title(title, fontsize=8)
    for row, name in zip(axes, names, strict=True):
        samples = [each[name] for each in drawn.values()]
        window = square_around_vertebra(samples)
        for place, sample in zip(row, [originals[samples[0].parent_id or ""], *samples], strict=True):
            place.imshow(tile(sample, window), cmap="gray", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(samples[0].lesion_type or "lesion", fontsize=7)
    return figure


def square_around_vertebra(samples: Sequence[Sample]) -> CropWindow:
    """A square around the vertebra of an image that ``anatomy.png`` marks, or around all lesions that were drawn."""
    region = np.any([read_mask(sample.mask).hard for sample in samples if sample.mask is not None], axis=0)
    if samples[0].anatomy is not None:
        vertebra = read_anatomy(samples[0].anatomy, region.shape) == TARGET_LABEL
        region = vertebra if vertebra.any() else region
    (top, bottom), (left, right) = extents(region)
    side = round(AROUND * max(bottom - top, right - left))
    return CropWindow((top + bottom - side) // 2, (left + right - side) // 2, side, side, TILE)


def tile(sample: Sample, window: CropWindow) -> np.ndarray:
    """What the window shows of a sample's image, in [0, 1]."""
    image = read_image(Path(sample.image))
    return window.forward(to_unit(image, intensity_range_of(image, sample.meta.get("window"))))
