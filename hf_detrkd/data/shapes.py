"""The built-in data set ``shapes``: textured shapes that hide one another on a textured ground, drawn from a seed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = "shapes"
CLASS_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233))
"""Of the classes, where `ShapesConfig.colour` asks for them: Okabe and Ito's palette."""
VERSION = 1
"""Part of the cache folder's name: raise it whenever the same seed draws other pictures."""

OVERSAMPLING = 2
"""Masks are drawn this much larger and averaged, for soft edges and boxes finer than a pixel."""

MIN_VISIBLE = 0.45
"""Share of every object that stays uncovered."""


@dataclass(frozen=True)
class ShapesConfig:
    """How many images of which size; every image depends on (seed, split, index) alone."""

    train: int = 1600
    validation: int = 300
    test: int = 300
    size: int = 128
    """Width and height in pixels."""
    seed: int = 0
    min_objects: int = 1
    max_objects: int = 8
    min_extent: float = 0.12
    """Smallest diameter of a shape, as a share of the image's width."""
    max_extent: float = 0.45
    """Largest diameter; diameters are drawn evenly in their logarithm."""
    colour: float = 0.0
    """Probability that a shape is painted in the colour of its class; otherwise its colours say nothing. The nearer to 1, the
    easier the classes are told apart."""

    def __post_init__(self):
        for name in ("train", "validation", "test", "size", "min_objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but at least 1 is needed.")
        if not 0 <= self.colour <= 1:
            raise ValueError(f"`colour` is {self.colour}, but a probability between 0 and 1 is needed.")
        if self.max_objects < self.min_objects or not 0 < self.min_extent <= self.max_extent <= 1:
            raise ValueError(
                f"min_objects <= max_objects and 0 < min_extent <= max_extent <= 1 are needed, but objects are "
                f"{(self.min_objects, self.max_objects)} and extents {(self.min_extent, self.max_extent)}."
            )

    @classmethod
    def parse(cls, name: str) -> ShapesConfig:
        """From ``shapes`` or ``shapes:train=1600,size=128``."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        settings = {}
        for part in filter(None, name.partition(":")[2].split(",")):
            key, _, value = (text.strip() for text in part.partition("="))
            if key not in kinds:
                raise ValueError(f"`{name}` sets {key!r}, but shapes knows {', '.join(kinds)}.")
            try:
                settings[key] = kinds[key](value)
            except ValueError:
                raise ValueError(f"`{name}` sets {key} to {value!r}, but {kinds[key].__name__} is needed.") from None
        return cls(**settings)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where made data sets are kept: ``cache_dir``, else ``$HF_DETRKD_CACHE``, else ``~/.cache/hf_detrkd``."""
    return Path(cache_dir or os.environ.get("HF_DETRKD_CACHE") or "~/.cache/hf_detrkd").expanduser()


def generate_shapes(name: str = SHAPES, cache_dir: str | Path | None = None) -> Path:
    """The imagefolder of a ``shapes`` set, drawn into the cache folder unless it is there. Processes may call it at
    once: each draws into a folder of its own, and the first to finish names it."""
    config = ShapesConfig.parse(name)
    settings = "-".join(f"{key}{value}" for key, value in asdict(config).items())
    folder = cache_folder(cache_dir) / f"{SHAPES}-v{VERSION}-{settings}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{SHAPES}-", dir=folder.parent))
    try:
        (draft / "categories.json").write_text(json.dumps(CLASS_NAMES), encoding="utf-8")
        for number, split in enumerate(("train", "validation", "test")):
            _write_split(draft / split, number, getattr(config, split), config)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_split(folder: Path, number: int, images: int, config: ShapesConfig) -> None:
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index in range(images):
            rng = np.random.default_rng((config.seed, number, index))
            pixels, objects = draw_scene(config, rng)
            file_name = f"{index:06d}.png"
            Image.fromarray(pixels).save(folder / file_name, compress_level=1)
            record = {"file_name": file_name, "image_id": index, "width": config.size, "height": config.size}
            metadata.write(json.dumps({**record, "objects": objects}) + "\n")


def draw_scene(config: ShapesConfig, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, list]]:
    """One picture (size, size, 3) uint8 and its objects. Boxes and areas are of what can be seen, as in COCO: a shape
    under another one is annotated where it shows, and placed anew if too little would show."""
    size, large = config.size, config.size * OVERSAMPLING
    picture = _texture(size, size, rng, ground=True)
    owner = np.full((large, large), -1, dtype=np.int64)
    categories: list[int] = []
    whole: list[int] = []
    wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
    for _ in range(4 * wanted):  # a crowded picture may have no room for all of them
        if len(categories) == wanted:
            break
        category = int(rng.integers(len(CLASS_NAMES)))
        mask = _mask(category, config, large, rng)
        covered = np.where(mask, len(categories), owner)
        visible = np.bincount(covered.ravel() + 1, minlength=len(categories) + 2)[1:]
        pixels = np.array([*whole, mask.sum()])
        if not mask.any() or (visible < MIN_VISIBLE * pixels).any():
            continue
        owner = covered
        whole.append(int(mask.sum()))
        categories.append(category)
        # No draw where colours say nothing, so that such a set stays what it was
        told = config.colour > 0 and rng.random() < config.colour
        _paint(picture, mask, rng, COLOURS[category] if told else None)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(2, 12))
    return picture.clip(0, 255).astype(np.uint8), _annotations(owner, categories)


def _paint(
    picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator, colour: tuple[int, int, int] | None
) -> None:
    """Lay a texture of the shape's own over the picture where ``mask`` is. A rim of one darker pixel keeps two shapes
    of like texture apart."""
    steps = range(OVERSAMPLING)
    parts = [mask[i::OVERSAMPLING, j::OVERSAMPLING].astype(np.float32) for i in steps for j in steps]
    coverage = sum(parts) / np.float32(len(parts))
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    alpha = coverage[place][..., None]
    rim = 1 - 4 * alpha * (1 - alpha) * np.float32(rng.uniform(0.1, 0.45))
    layer = _texture(*alpha.shape[:2], rng, ground=False, colour=colour)
    picture[place] += alpha * (layer * rim - picture[place])


def _annotations(owner: np.ndarray, categories: list[int]) -> dict[str, list]:
    """Boxes (xywh, pixels of the picture) and areas of what is visible of every object."""
    objects: dict[str, list] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
    for index, category in enumerate(categories):
        seen = owner == index
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        box = np.array([left, top, right - left, bottom - top]) / OVERSAMPLING
        objects["id"].append(index)
        objects["bbox"].append(np.round(box, 3).tolist())
        objects["category"].append(category)
        objects["area"].append(round(float(seen.sum()) / OVERSAMPLING**2, 3))
        objects["iscrowd"].append(0)
    return objects


def _mask(category: int, config: ShapesConfig, large: int, rng: np.random.Generator) -> np.ndarray:
    """(large, large) bool: one shape, turned, stretched a little, at least half of it inside the picture."""
    extent = np.exp(rng.uniform(np.log(config.min_extent), np.log(config.max_extent))) * large
    stretch = np.array([1.0, rng.uniform(0.75, 1.0)])
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0.03 * large, 0.97 * large, 2)

    def place(points: np.ndarray) -> list[tuple[float, float]]:
        return list(map(tuple, (points * stretch * extent / 2) @ turn.T + centre))

    image = Image.new("1", (large, large))
    draw = ImageDraw.Draw(image)
    outer, inner = _outline(CLASS_NAMES[category], rng)
    draw.polygon(place(outer), fill=1)
    if inner is not None:
        draw.polygon(place(inner), fill=0)
    return np.array(image)


def _outline(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Corners (n, 2) of a shape of radius 1 around 0, and of the hole in it, if it has one."""
    if name == "circle":
        return _polygon(40), None
    if name == "ring":
        return _polygon(40), rng.uniform(0.45, 0.65) * _polygon(40)
    if name == "star":
        return _polygon(10) * np.tile([1.0, rng.uniform(0.38, 0.5)], 5)[:, None], None
    if name == "cross":
        arm = rng.uniform(0.25, 0.38)
        corners = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
        return np.array(corners + [(-x, -y) for x, y in corners]) * 0.95, None
    return _polygon({"square": 4, "triangle": 3}[name]), None


def _polygon(corners: int) -> np.ndarray:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _texture(
    height: int, width: int, rng: np.random.Generator, ground: bool, colour: tuple[int, int, int] | None = None
) -> np.ndarray:
    """(height, width, 3) float32 in [0, 255]: two colours mixed by stripes, checks, blobs or a slope, or one alone;
    colours say nothing of the class. Those of a ground are nearer each other, so that it doesn't look like shapes
    itself."""
    one = rng.uniform(20, 235, 3) if colour is None else np.clip(colour + rng.normal(0, 16, 3), 20, 235)
    other = one + rng.normal(0, 28, 3) if ground else (one + rng.uniform(20, 235, 3)) / 2
    kind = rng.integers(5)
    if kind == 0:
        mix = np.float32(0.5) * np.ones((height, width), dtype=np.float32)
    elif kind == 1:
        mix = _blobs(height, width, int(rng.integers(4, 16)), rng)
    else:
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 32)
        y, x = np.ogrid[:height, :width]
        along = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
        across = (y * np.cos(angle) - x * np.sin(angle)).astype(np.float32)
        stripes, others = along % period > period / 2, across % period > period / 2
        slope = (along - along.min()) / max(float(np.ptp(along)), 1.0)
        mix = (stripes, stripes ^ others, slope)[kind - 2].astype(np.float32)
    return other.astype(np.float32) + mix[..., None] * (one - other).astype(np.float32)


def _blobs(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) smooth noise in [0, 1] of ``cells`` by ``cells`` random values."""
    grid = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
