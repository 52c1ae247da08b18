"""Compare synthetic lesions with real ones, and look for copies of training images.

    python tool/evaluate.py dataset results --config ./models/mldm_v15.yaml --output_dir evaluation

REAL and SYNTH are dataset folders or annotation files; their diseased samples are compared, each as the model's crop
around its lesion. Into OUTPUT_DIR: evaluation.json, report.html, closest_pairs.png, lesions.png, neighbours.csv (the
nearest training lesion of every synthetic one), copies.json, rejects.json. Exit code 3: there are copies or rejects.
"""

import argparse
import html
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from ldm.evaluation.lesions import CopyCheck, Lesion, Neighbour

log = logging.getLogger("evaluate")
SHOWN_PAIRS = 12
TILE = 192


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(__doc__, raw=True)
    made.add_argument("real", metavar="REAL", type=Path, help="real samples, best ones the generator has not seen")
    made.add_argument("synthetic", metavar="SYNTH", type=Path, help="results of dataset_infer.py")
    made.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    made.add_argument(
        "--config",
        type=Path,
        default=Path("models/mldm_v15.yaml"),
        help="model YAML: how crops are made, which BiomedCLIP (default: models/mldm_v15.yaml)",
    )
    made.add_argument("--train_json", type=Path, help="what the generator learned from, for copies (default: REAL)")
    made.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    made.add_argument(
        "--quarantine", action="store_true", help="move copies out of SYNTH, into the folder SYNTH_quarantine beside it"
    )
    made.add_argument("--overwrite", action="store_true", help="replace the evaluation of other samples")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return made


def main(args: argparse.Namespace) -> int:
    """Measure, write, say what matters; 3 when there are copies or rejects."""
    check_flags(args)
    from ldm.config import load_config

    given = [f"biomedclip.path={args.biomedclip}"] if args.biomedclip else []
    config = load_config(args.config, [*given, *args.overrides])
    from ldm.core.files import fingerprint
    from ldm.data.preparation import sample_identity
    from ldm.evaluation.lesions import check_copies, quarantine
    from ldm.networks.opening import open_encoder

    sources = {"real": args.real, "synthetic": args.synthetic, "train": args.train_json or args.real}
    samples, rejects = read_sources(sources)
    clip = open_encoder(config.biomedclip)
    run = fingerprint(
        [[sample_identity(s) for s in each] for each in samples.values()] + [clip.fingerprint, str(config)]
    )
    before = previous(args, run)
    if before is not None:
        log.info("%s: already complete", args.output_dir)
        return before
    lesions = {name: read(samples[name], config.data, clip, name, rejects) for name in ("real", "synthetic")}
    own_train = sources["train"] != args.real
    lesions["train"] = read(samples["train"], config.data, clip, "train", rejects) if own_train else lesions["real"]
    check_lesions(sources, lesions)
    found = measure(clip, lesions)
    copies = check_copies(lesions["synthetic"], lesions["train"], lesions["real"] if own_train else None)
    found |= {"copies": copy_numbers(copies), "sources": {name: str(path) for name, path in sources.items()}}
    found["run"] = run
    write_all(args.output_dir, found, copies, lesions, rejects)
    if args.quarantine and copies.copies:
        goal = args.synthetic.with_name(f"{args.synthetic.name}_quarantine")
        quarantine(copies.copies, args.synthetic, goal)
        log.warning("%d copies moved to %s", len(copies.copies), goal)
    return tell(args.output_dir, found, rejects)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse paths that are not there, and what cannot be done with them."""
    for name in ("real", "synthetic", "train_json"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise UsageError(f"{path}: does not exist; expected a dataset folder or an annotation file")
    if args.real.resolve() == args.synthetic.resolve():
        raise UsageError(
            f"{args.real}: REAL and SYNTH are the same; expected real samples and results of dataset_infer.py"
        )
    if args.quarantine and not args.synthetic.is_dir():
        raise UsageError(f"--quarantine: {args.synthetic} is a file; copies are moved out of a results folder")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UsageError(f"--output_dir {args.output_dir}: expected a folder, found a file")


def read_sources(sources: dict[str, Path]) -> tuple[dict[str, list], list]:
    """The samples of each source, diseased or not, and what cannot be read; one that stands for two is read once."""
    from ldm.data.annotations import load_samples

    read = {path: load_samples(path) for path in dict.fromkeys(sources.values())}
    return {name: read[path][0] for name, path in sources.items()}, [r for each in read.values() for r in each[1]]


def read(samples: list, data: Any, clip: Any, name: str, rejects: list) -> "list[Lesion]":
    """The lesions of one source; adds to ``rejects``."""
    from ldm.evaluation.lesions import read_lesions

    found, more = read_lesions(samples, data, clip, name)
    rejects += [reject for reject in more if reject not in rejects]
    return found


def check_lesions(sources: dict[str, Path], lesions: "dict[str, list[Lesion]]") -> None:
    """MedSoftError unless every source has enough diseased samples for a covariance, training one."""
    for name, least in (("real", 2), ("synthetic", 2), ("train", 1)):
        if len(lesions[name]) < least:
            raise MedSoftError(
                f"{sources[name]}: expected at least {least} diseased samples with a mask, found {len(lesions[name])}"
            )


def previous(args: argparse.Namespace, run: str) -> int | None:
    """The exit code of the same evaluation, if it is there already; UsageError if another one is."""
    from ldm.core.files import read_json

    path = args.output_dir / "evaluation.json"
    if not path.exists() or args.overwrite:
        return None
    known = read_json(path, "evaluation")
    if not isinstance(known, dict) or known.get("run") != run:
        raise UsageError(f"{path}: holds the evaluation of other samples or settings; --overwrite replaces it")
    if args.quarantine and known["copies"]["count"]:
        return None
    return cli.SOME_REJECTED if known["copies"]["count"] or known["rejected"] else cli.DONE


def measure(clip: Any, lesions: "dict[str, list[Lesion]]") -> dict[str, Any]:
    """Everything but copies."""
    from ldm.evaluation.lesions import (
        distributions,
        parent_likeness,
        set_distances,
        small_sample_warnings,
        text_agreement,
    )

    real, synthetic = lesions["real"], lesions["synthetic"]
    return {
        "pictures": {name: len(each) for name, each in lesions.items()},
        "extractor": {
            "name": "BiomedCLIP, CLS token after the trunk's final norm, of the model's crop around the lesion",
            "folder": str(clip.folder),
            "fingerprint": clip.fingerprint,
            "dimensions": clip.token_dim,
        },
        "warnings": [*small_sample_warnings(len(real), len(synthetic), clip.token_dim), *seen_before(lesions)],
        "distances": set_distances(real, synthetic),
        "parents": parent_likeness(synthetic),
        "text": {"real": text_agreement(clip, real), "synthetic": text_agreement(clip, synthetic)},
        "lesions": distributions(real, synthetic),
    }


def seen_before(lesions: "dict[str, list[Lesion]]") -> list[str]:
    """A sentence if REAL holds patients of another training set."""
    if lesions["train"] is lesions["real"]:
        return []
    train, real = ({each.sample.patient_id for each in lesions[name]} for name in ("train", "real"))
    shared = (
        f"{len(train & real)} patients of REAL are also in the training set: it is no yardstick for what was not seen."
    )
    return [shared] if train & real else []


def copy_numbers(check: "CopyCheck") -> dict[str, Any]:
    return {
        "count": len(check.copies),
        "threshold": check.threshold,
        "closest_pair_of_training_patients": check.closest_real,
        "nearer_than_95_percent_of_held_out": check.nearer_than_real,
    }


# ------------------------------------------------------------------------------------------------------ writing


def write_all(
    folder: Path, found: dict[str, Any], check: "CopyCheck", lesions: "dict[str, list[Lesion]]", rejects: list
) -> None:
    """All files; evaluation.json last, as the sign of completion."""
    from ldm.core.files import atomic_file, write_json
    from ldm.core.tables import write_csv
    from ldm.data.annotations import write_rejects
    from ldm.data.png import write_png

    (folder / "evaluation.json").unlink(missing_ok=True)
    write_csv(folder / "neighbours.csv", [neighbour_row(each, check.threshold) for each in check.ranked])
    write_json(folder / "copies.json", [neighbour_row(each, check.threshold) for each in check.copies])
    write_rejects(folder / "rejects.json", rejects)
    with atomic_file(folder / "lesions.png") as handle:
        lesion_figure(lesions["real"], lesions["synthetic"]).savefig(handle, format="png", dpi=120)
    write_png(folder / "closest_pairs.png", pair_sheet(check.ranked[:SHOWN_PAIRS], check.threshold))
    found["rejected"] = len(rejects)
    write_page(folder, found, check)
    write_json(folder / "evaluation.json", found)


def neighbour_row(each: "Neighbour", threshold: float) -> dict[str, Any]:
    return {
        "sample_id": each.lesion.sample.sample_id,
        "image": str(each.lesion.sample.image),
        "nearest": each.match.sample.sample_id,
        "nearest_image": str(each.match.sample.image),
        "correlation": round(each.correlation, 4),
        "cosine": round(each.cosine, 4),
        "copy": each.correlation >= threshold,
    }


def lesion_figure(real: "list[Lesion]", synthetic: "list[Lesion]") -> "Figure":
    """Histograms of size, contrast and texture."""
    import numpy as np
    from matplotlib.figure import Figure

    from ldm.evaluation.lesions import MEASURES

    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        both = [np.array([getattr(lesion, name) for lesion in lesions]) for lesions in (real, synthetic)]
        edges = np.histogram_bin_edges(np.concatenate(both), 20)
        for values, colour, who in zip(both, ("tab:green", "tab:blue"), ("real", "synthetic"), strict=True):
            axes.hist(values, edges, density=True, alpha=0.5, color=colour, label=who)
        axes.set(xlabel=label, yticks=[])
    axes.legend(fontsize=8)
    return figure


def pair_sheet(pairs: "list[Neighbour]", threshold: float) -> "np.ndarray":
    """Synthetic crop, its nearest training crop, and both lesions alone; one row a pair, most alike first."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    gap, caption, head = 10, 24, 30
    sheet = Image.new("RGB", (4 * TILE + 5 * gap, head + len(pairs) * (TILE + caption + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(("synthetic", "nearest training image", "drawn lesion", "training lesion")):
        draw.text((gap + column * (TILE + gap), 8), name, "#5d6b7a", ImageFont.load_default(15))
    for row, pair in enumerate(pairs):
        top = head + row * (TILE + caption + gap)
        words = "COPY" if pair.correlation >= threshold else "not a copy"
        text = f"{words}: correlation {pair.correlation:.3f}, cosine {pair.cosine:.3f}; {pair.lesion.sample.sample_id}"
        draw.text((gap, top), text, "#c62828" if words == "COPY" else "#1c2733", ImageFont.load_default(14))
        crops = [pair.lesion.crop, pair.match.crop]
        alone = [np.where(each.inside, each.crop, 255) for each in (pair.lesion, pair.match)]
        for column, crop in enumerate([*crops, *alone]):
            tile = Image.fromarray(crop.astype(np.uint8)).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (TILE + gap), top + caption))
    return np.asarray(sheet)


def write_page(folder: Path, found: dict[str, Any], check: "CopyCheck") -> None:
    """report.html."""
    from ldm.core.files import write_text
    from ldm.reports.pages import image, page, table

    texts = [[who, *(shown(each) for each in (known or {}).values())] for who, known in found["text"].items()]
    numbers = [[name.replace("_", " "), value] for name, value in copy_numbers(check).items()]
    sections = [
        ("distances", "Distances", distances_html(found)),
        ("parents", "Against the parent", parents_html(found["parents"])),
        ("text", "Text and picture", table(["", "own prompt", "other prompts", "difference", "own is closer"], texts)),
        ("lesions", "Lesions", lesions_html(found["lesions"]) + image("lesions.png", "histograms", "plot")),
        ("copies", "Copies", table(["", ""], numbers) + image("closest_pairs.png", "closest pairs", "sheet")),
    ]
    counts = ", ".join(f"{count} {name}" for name, count in found["pictures"].items())
    write_text(folder / "report.html", page("Real and synthetic lesions", sections, f"Diseased samples: {counts}."))


def distances_html(found: dict[str, Any]) -> str:
    from ldm.reports.pages import table

    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in found["warnings"])
    known = found["extractor"]
    named = html.escape(f"{known['name']} ({known['folder']}, SHA-256 {known['fingerprint'][:16]}…)")
    rows = [[name, shown(each), each["between_halves_of_real"]] for name, each in found["distances"].items()]
    shown_ = table(["", "real and synthetic", "two halves of the real ones"], rows)
    return f'{warnings}{shown_}<p class="note">Features: {named}. Intervals by half-samples.</p>'


def parents_html(found: dict[str, Any]) -> str:
    from ldm.reports.pages import table

    places = [(key, place) for place in ("outside", "inside") for key in ("ssim", "psnr")]
    rows = [[f"{key} {place}", shown(found[place][key])] for key, place in places]
    rows.append(["unchanged outside, share of pictures", found["outside"]["unchanged_pictures"]])
    note = (
        f"{found['compared']} pictures; {found['without_parent']} name no parent. PSNR in dB, of pictures that differ."
    )
    return f'{table(["", "mean"], rows)}<p class="note">{note}</p>'


def lesions_html(found: dict[str, Any]) -> str:
    from ldm.evaluation.lesions import MEASURES
    from ldm.reports.pages import table

    rows = [
        [
            label,
            *(quartiles(found[name][f"{who}_quartiles"]) for who in ("real", "synthetic")),
            found[name]["wasserstein"],
        ]
        for name, label in MEASURES.items()
    ]
    return table(["quartiles", "real", "synthetic", "Wasserstein-1"], rows)


def quartiles(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def shown(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    value = f"{estimate['value']:.4g}"
    return value if estimate["low"] is None else f"{value} ({estimate['low']:.4g} to {estimate['high']:.4g})"


def tell(folder: Path, found: dict[str, Any], rejects: list) -> int:
    """The most important numbers on the screen; the exit code."""
    for name, each in found["distances"].items():
        log.info("%s: %s", name, shown(each))
    for text in found["warnings"]:
        log.warning("warning: %s", text)
    numbers = found["copies"]
    count = f"{numbers['count']} of {found['pictures']['synthetic']} synthetic lesions are copies of training lesions"
    log.log(logging.WARNING if numbers["count"] else logging.INFO, "%s (%s)", count, folder / "copies.json")
    if rejects:
        log.warning("%d samples could not be read, listed in %s", len(rejects), folder / "rejects.json")
    log.info("%s", folder / "report.html")
    return cli.SOME_REJECTED if numbers["count"] or rejects else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
