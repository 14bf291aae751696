"""Pascal VOC: ``Annotations/*.xml``, ``JPEGImages/`` and ``ImageSets/Main/<split>.txt``."""

from __future__ import annotations

import glob
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ..findings import Finding
from ..images import read_header
from ..schema import Row, objects_of, split_name

DIFFICULT = {"": 0, "0": 0, "unspecified": 0, "1": 1}
"""What stands in ``<difficult>``; some tools write Unspecified there, as the challenge does for a pose."""


_FLAG = re.compile(r"\s+(-1|0|1)$")


def finds(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def read(folder: Path, box_format: str | None, findings: list[Finding]) -> tuple[list[str], dict[str, list[Row]]]:
    """Class names, sorted, or those of a ``labels.txt``, and rows of every split.

    Boxes are corners in pixels. The VOC challenge itself counts pixels from 1 and includes the last one, so its files
    (``<database>`` names VOC) have 1 taken off the left and the top; labelImg and others write plain corners. Objects
    marked ``difficult`` become crowds: out of training, and neither right nor wrong in evaluation, as in VOC's own
    protocol.
    """
    members = _members(folder)
    parsed = {split: [_parse(folder, name, findings) for name in names] for split, names in members.items()}
    declared = folder / "labels.txt"
    if declared.is_file():
        class_names = declared.read_text(encoding="utf-8-sig").split("\n")
        class_names = [name.strip() for name in class_names if name.strip()]
    else:
        class_names = sorted({item[0] for rows in parsed.values() for row in rows if row for item in row["items"]})
    position = {name: index for index, name in enumerate(class_names)}
    return class_names, {
        split: [row for entry in entries if entry and (row := _row(entry, position, box_format, findings))]
        for split, entries in parsed.items()
    }


def _members(folder: Path) -> dict[str, list[str]]:
    """Split -> names of its images without their extension. Without split files, everything is train."""
    lists = {path.stem: path for path in sorted(folder.glob("ImageSets/Main/*.txt"))}
    wanted = {name: path for name, path in lists.items() if split_name(name) in ("train", "validation", "test")}
    if "train" not in map(split_name, wanted) and "trainval" in lists:
        wanted = {"train": lists["trainval"], **{name: path for name, path in wanted.items() if name == "test"}}
    if not wanted:
        return {"train": [path.stem for path in sorted(folder.glob("Annotations/*.xml"))]}
    return {
        # The challenge's lists of one class have its 1, 0 or -1 behind the name
        name: [_FLAG.sub("", line.strip()) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        for name, path in wanted.items()
    }


def _parse(folder: Path, name: str, findings: list[Finding]) -> dict | None:
    """What one xml file says: image, size, and (class, corners, difficult) of each object."""
    path = folder / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        findings.append(Finding("missing or broken annotation file", str(path), "file", error))
        return None
    image = _image(folder / "JPEGImages", name, (root.findtext("filename") or f"{name}.jpg").strip())
    from_one = "VOC" in (root.findtext("source/database") or "")
    items = []
    for index, item in enumerate(root.iter("object")):
        try:
            corners = [float(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        except (TypeError, ValueError):
            findings.append(
                Finding("a bndbox needs xmin, ymin, xmax, ymax", str(path), f"object {index}", item.findtext("name"))
            )
            continue
        difficult = (item.findtext("difficult") or "").strip()
        if difficult.lower() not in DIFFICULT:
            findings.append(Finding("difficult must be 0 or 1", str(path), f"object {index}", difficult))
            continue
        if from_one:
            corners[0] -= 1
            corners[1] -= 1
        items.append(((item.findtext("name") or "").strip(), corners, DIFFICULT[difficult.lower()]))
    size = [int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height")]
    return {"path": path, "name": name, "image": image, "size": size, "items": items}


def _image(folder: Path, name: str, said: str) -> Path:
    """The image called like the annotation file, as in the challenge; the one it says only where there is none: copies and
    labelImg keep the name of the image that was labelled first."""
    usual = [said] if Path(said).stem == name else []
    for candidate in (*usual, f"{name}.jpg"):
        if (folder / candidate).is_file():
            return folder / candidate
    return next(iter(sorted(folder.glob(f"{glob.escape(name)}.*"))), folder / said)


def _row(entry: dict, position: dict[str, int], box_format: str | None, findings: list[Finding]) -> Row | None:
    width, height = entry["size"]
    if not width or not height:
        try:
            width, height = read_header(str(entry["image"])).upright
        except OSError as error:
            findings.append(Finding("missing or unreadable image", str(entry["path"]), "filename", error))
            return None
    for index, (name, _, _) in enumerate(entry["items"]):
        if name not in position:
            advice = f"labels.txt has {list(position)}"
            row = f"object {index}"
            findings.append(Finding("object of an unknown class", str(entry["path"]), row, name, advice=advice))
            return None
    objects = objects_of(
        [corners for _, corners, _ in entry["items"]],
        [position[name] for name, _, _ in entry["items"]],
        box_format or "xyxy",
        width,
        height,
        iscrowd=[difficult for _, _, difficult in entry["items"]],
    )
    image = str(entry["image"])
    return {"image": image, "image_id": entry["name"], "width": width, "height": height, "objects": objects}
