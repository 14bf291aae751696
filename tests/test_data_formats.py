from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest
import tiny_datasets as tiny

from hf_detrkd.data import DatasetError, check_dataset, keep_classes, load_detection_dataset, split_off_validation
from hf_detrkd.data.schema import BOX_FORMATS, class_names_of, split_name, to_xywh, whole_ids

WRITERS = {
    "coco": tiny.write_coco,
    "official coco": tiny.write_official_coco,
    "roboflow": tiny.write_roboflow,
    "imagefolder": tiny.write_imagefolder,
    "imagefolder with names": lambda folder: tiny.write_imagefolder(folder, names=True),
    "yolo": tiny.write_yolo,
    "voc": tiny.write_voc,
    "voc challenge": lambda folder: tiny.write_voc(folder, "The VOC2007 Database"),
}


def objects_by_name(split) -> list[list[tuple]]:
    """Per image: (class name, box) of every object."""
    names = split.features["objects"]["category"].feature.names
    return [
        [(names[category], np.round(box, 3).tolist()) for category, box in zip(o["category"], o["bbox"], strict=True)]
        for o in split["objects"]
    ]


def expected_objects(split: str) -> list[list[tuple]]:
    return [[(tiny.NAMES[category], list(box)) for box, category, _ in objects] for _, _, objects in tiny.SPLITS[split]]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_schema_and_objects(kind, tmp_path):
    loaded = load_detection_dataset(WRITERS[kind](tmp_path / "set"))
    assert set(loaded) == {"train", "validation"}
    for name, split in (("train", "train"), ("validation", "val")):
        assert set(loaded[name].features) == {"image", "image_id", "width", "height", "objects"}
        assert objects_by_name(loaded[name]) == expected_objects(split)
        sizes = [size for _, size, _ in tiny.SPLITS[split]]
        assert [(row["width"], row["height"]) for row in loaded[name]] == sizes
        assert [row["image"].size for row in loaded[name]] == sizes
        assert all(isinstance(number, int) for number in loaded[name]["image_id"])
        names = loaded[name].features["objects"]["category"].feature.names
        assert sorted(names) == sorted(tiny.NAMES)
    if "names" not in kind:  # names alone come sorted: there is no other order
        assert names == tiny.NAMES
    crowds = [o["iscrowd"] for o in loaded["train"]["objects"]]
    assert crowds == [[0, 0], [], [0, 0] if kind == "yolo" else [1, 0]]


@pytest.mark.parametrize("kind", ["coco", "imagefolder"])
def test_ids_and_areas_are_the_sources(kind, tmp_path):
    train = load_detection_dataset(WRITERS[kind](tmp_path / "set"))["train"]
    assert train["image_id"] == [100, 107, 114]
    assert train[0]["objects"]["area"] == [120.0, 360.0]


def test_images_stay_files_on_disk(tmp_path):
    train = load_detection_dataset(tiny.write_coco(tmp_path / "set"))["train"]
    source = train.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert source["bytes"] is None and source["path"].endswith("images/train/a1.png")


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("sizes", [True, False])
def test_saved_datasets(labels, sizes, tmp_path):
    splits = {split: tiny.hub_split(split, labels, sizes) for split in tiny.SPLITS}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    loaded = load_detection_dataset(tmp_path / "set")
    names = loaded["train"].features["objects"]["category"].feature.names
    assert names == (tiny.NAMES if labels else ["class_0", "class_1", "class_2"])
    assert loaded["train"][2]["objects"]["iscrowd"] == [1, 0]
    assert [row["width"] for row in loaded["train"]] == [40, 20, 32]
    if labels:
        assert objects_by_name(loaded["validation"]) == expected_objects("val")


def with_names(split: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    """The split with its classes in another order, or with others."""
    old = split.features["objects"]["category"].feature.names

    def renamed(record):
        objects = record["objects"]
        return {"objects": {**objects, "category": [names.index(old[one]) for one in objects["category"]]}}

    features = split.features.copy()
    features["objects"] = {**features["objects"], "category": datasets.Sequence(datasets.ClassLabel(names=names))}
    return split.map(renamed, features=features)


def test_splits_that_count_the_same_classes_in_another_order(tmp_path):
    splits = {split: tiny.hub_split(split) for split in tiny.SPLITS}
    splits["val"] = with_names(splits["val"], tiny.NAMES[::-1])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    loaded = load_detection_dataset(tmp_path / "set")
    assert class_names_of(loaded["validation"]) == tiny.NAMES
    assert objects_by_name(loaded["validation"]) == expected_objects("val")


def test_splits_of_other_classes_are_refused(tmp_path):
    splits = {split: tiny.hub_split(split) for split in tiny.SPLITS}
    splits["val"] = with_names(splits["val"], [*tiny.NAMES, "cow"])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    with pytest.raises(
        DatasetError, match=r"splits with different classes \(1x\)\s+val: features: .*cow.* -> the classes of train are"
    ):
        load_detection_dataset(tmp_path / "set")


@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_a_set_that_was_saved_with_a_format(format, tmp_path):
    splits = {split: tiny.hub_split(split).with_format(format) for split in tiny.SPLITS}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert objects_by_name(load_detection_dataset(tmp_path / "set")["train"]) == expected_objects("train")


def test_every_split_may_have_its_own_spelling(tmp_path):
    splits = {split: tiny.hub_split(split) for split in tiny.SPLITS}
    features = splits["val"].features.copy()
    features["objects"] = {
        ("label" if part == "category" else part): kind for part, kind in features["objects"].items()
    }
    records = [
        {**record, "objects": {"label": record["objects"].pop("category"), **record["objects"]}}
        for record in splits["val"]
    ]
    splits["val"] = datasets.Dataset.from_list(records, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert objects_by_name(load_detection_dataset(tmp_path / "set")["validation"]) == expected_objects("val")


def test_parquet_folder_through_load_dataset(tmp_path):
    for split in tiny.SPLITS:
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        tiny.hub_split(split).to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    loaded = load_detection_dataset(str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert objects_by_name(loaded["train"]) == expected_objects("train")
    assert loaded["train"][0]["image"].size == (40, 30)


def test_objects_as_a_list_of_dicts_and_names_as_ids(tmp_path):
    rows = [
        {"image": tiny.picture((9, 9)), "image_id": name, "objects": [{"bbox": [1, 1, 4, 4], "label": "owl"}]}
        for name in "ab"
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("string"),
            "objects": [{"bbox": [datasets.Value("float32")], "label": datasets.Value("string")}],
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    train = load_detection_dataset(tmp_path / "set")["train"]
    assert objects_by_name(train) == [[("owl", [1, 1, 4, 4])]] * 2
    assert train["image_id"] == [0, 1] and train[0]["objects"]["area"] == [16.0]


def with_another_picture(split: datasets.Dataset, name: str) -> datasets.Dataset:
    """The split with a grey picture of each image in a first column, as a depth map."""
    grey = [tiny.picture(image.size).convert("L") for image in split["image"]]
    other = datasets.Dataset.from_dict({name: grey}, features=datasets.Features({name: datasets.Image()}))
    return datasets.concatenate_datasets([other, split], axis=1)


def test_of_several_image_columns_the_one_called_image_is_read(tmp_path):
    with_another_picture(tiny.hub_split("train"), "depth").save_to_disk(tmp_path / "set")
    assert {image.mode for image in load_detection_dataset(tmp_path / "set")["train"]["image"]} == {"RGB"}


def test_several_image_columns_of_which_none_is_called_image(tmp_path):
    split = with_another_picture(tiny.hub_split("train"), "depth").rename_column("image", "photo")
    split.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"several image columns, \['depth', 'photo'\].*Rename.*`image`"):
        load_detection_dataset(tmp_path / "set")
    split.remove_columns("depth").save_to_disk(tmp_path / "one")
    assert load_detection_dataset(tmp_path / "one")["train"][0]["image"].mode == "RGB"


def test_a_set_without_boxes_is_refused_with_its_columns(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"columns \['text'\].*`objects`.*cppe-5"):
        load_detection_dataset(tmp_path / "set")


def test_the_hub_is_asked_with_every_setting(monkeypatch, tmp_path):
    asked = {}

    def load_dataset(*args, **kwargs):
        asked.update(args=args, **kwargs)
        return datasets.DatasetDict({"train": tiny.hub_split("train")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_detection_dataset("who/what", config_name="full", cache_dir=tmp_path, revision="abc", token="t")
    assert asked == {"args": ("who/what", "full"), "cache_dir": str(tmp_path), "revision": "abc", "token": "t"}
    assert objects_by_name(loaded["train"]) == expected_objects("train")


# --- box formats


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_box_formats(box_format, tmp_path):
    width, height = 40, 30
    x, y, w, h = 4.0, 3.0, 20.0, 12.0
    numbers = {"xywh": (x, y, w, h), "xyxy": (x, y, x + w, y + h), "cxcywh": (x + w / 2, y + h / 2, w, h)}
    values = np.array(numbers[box_format.removesuffix("_normalized")])
    if box_format.endswith("_normalized"):
        values = values / [width, height, width, height]
    np.testing.assert_allclose(to_xywh(values, box_format, width, height), [[x, y, w, h]])

    (tmp_path / "train").mkdir()
    tiny.picture((width, height)).save(tmp_path / "train" / "a.png")
    line = {"file_name": "a.png", "objects": {"bbox": [values.tolist()], "category": ["cat"]}}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(line))
    objects = load_detection_dataset(tmp_path, bbox_format=box_format)["train"][0]["objects"]
    np.testing.assert_allclose(objects["bbox"], [[x, y, w, h]], rtol=1e-6)
    np.testing.assert_allclose(objects["area"], [w * h], rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("bbox_format", "xywh_normalised", r"`bbox_format` is 'xywh_normalised'.*Did you mean `xywh_normalized`"),
        ("bbox_format", "corners", r"must be one of xywh, xyxy, cxcywh"),
        ("format", "coc", r"`format` is 'coc'.*Did you mean `coco`"),
    ],
)
def test_unknown_choices_are_refused(argument, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(tmp_path, **{argument: value})


def test_a_folder_in_no_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of the known formats.*_annotations\.coco\.json.*data\.yaml"):
        load_detection_dataset(tmp_path)


def test_relative_paths(tmp_path, monkeypatch):
    tiny.write_coco(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    train = load_detection_dataset("set")["train"].cast_column("image", datasets.Image(decode=False))
    assert train[0]["image"]["path"] == str(tmp_path / "set" / "images" / "train" / "a1.png")
    with pytest.raises(ValueError, match="There is no folder"):
        load_detection_dataset("./nowhere")


# --- annotations that can't be read: file, row and value


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "problem", "row", "value"),
    [
        (
            lambda c: c["annotations"][1].update(category_id=5),
            "object of an unknown class",
            "annotations[1] (id 1001)",
            5,
        ),
        (
            lambda c: c["annotations"][0].update(image_id=1),
            "object of an image that is not listed",
            "annotations[0] (id 1000)",
            1,
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2]),
            "a bbox needs four numbers",
            "annotations[0] (id 1000)",
            [1, 2],
        ),
        (lambda c: c["annotations"][1].update(id=1000), "annotation id used twice", "annotations[1] (id 1000)", 1000),
        (
            lambda c: c["categories"][0].update(id="x"),
            "a category needs a whole-number id and a name",
            "categories[0]",
            None,
        ),
        (lambda c: c["categories"][1].update(id=90), "category id used twice", "categories[1]", None),
        (lambda c: c["categories"][0].update(name="cat"), "class name used twice", "classes [0, 2]", "cat"),
        (lambda c: c.pop("images"), "a COCO json needs the lists images, annotations, categories", "images", "missing"),
    ],
)
def test_coco_problems(edit, problem, row, value, tmp_path):
    folder = tiny.write_coco(tmp_path / "set")
    path = folder / "annotations" / "instances_train.json"
    (folder / "annotations" / "instances_val.json").unlink()
    change(path, edit)
    with pytest.raises(DatasetError) as error:
        load_detection_dataset(folder)
    finding = next(finding for finding in error.value.findings if finding.problem == problem)
    assert finding.row == row and (value is None or finding.value == value)
    assert finding.file == (str(folder) if problem == "class name used twice" else str(path))
    assert problem in str(error.value) and row in str(error.value)


def test_coco_iscrowd_may_be_null(tmp_path):
    folder = tiny.write_coco(tmp_path / "set")
    change(folder / "annotations" / "instances_train.json", lambda c: c["annotations"][0].update(iscrowd=None))
    assert load_detection_dataset(folder)["train"]["objects"][0]["iscrowd"] == [0, 0]


@pytest.mark.parametrize("given", ["yes", [0]])
def test_coco_iscrowd_that_is_none(given, tmp_path):
    folder = tiny.write_coco(tmp_path / "set")
    path = folder / "annotations" / "instances_train.json"
    change(path, lambda c: c["annotations"][1].update(iscrowd=given))
    with pytest.raises(DatasetError) as error:
        load_detection_dataset(folder)
    (finding,) = error.value.findings
    assert (finding.problem, finding.file) == ("iscrowd must be 0 or 1", str(path))
    assert (finding.row, finding.value) == ("annotations[1] (id 1001)", given)


def test_object_ids_that_are_names_or_too_long_are_numbered(tmp_path):
    coco, imagefolder = tiny.write_coco(tmp_path / "coco"), tiny.write_imagefolder(tmp_path / "imagefolder")
    change(
        coco / "annotations" / "instances_train.json",
        lambda c: [a.update(id=name) for a, name in zip(c["annotations"], ["f3", "a0", 10**20, None], strict=True)],
    )
    path = imagefolder / "train" / "metadata.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first.replace('"id": [0, 1]', '"id": ["f3", "a0"]'), *others]))
    for folder in (coco, imagefolder):
        assert [o["id"] for o in load_detection_dataset(folder)["train"]["objects"]] == [[0, 1], [], [0, 1]]


def test_coco_classes_that_differ_between_splits(tmp_path):
    folder = tiny.write_coco(tmp_path / "set")
    change(folder / "annotations" / "instances_val.json", lambda c: c["categories"][0].update(name="fish"))
    with pytest.raises(DatasetError, match="category id with two names"):
        load_detection_dataset(folder)


def test_coco_json_that_is_none(tmp_path):
    folder = tiny.write_coco(tmp_path / "set")
    (folder / "annotations" / "instances_train.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        load_detection_dataset(folder)


def test_roboflows_heading_category_is_told(tmp_path, caplog):
    load_detection_dataset(tiny.write_roboflow(tmp_path / "set"))
    assert "category that only heads the others: animals" in caplog.text


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ('{"image": "a1.png"}', "no file_name"),
        ('{"file_name": "no.png", "objects": {"bbox": [], "category": []}}', "missing or unreadable image"),
        ('{"file_name": "a1.png", "objects": {"corners": []}}', "objects without boxes or classes"),
        ('{"file_name": "a1.png", "objects": {"bbox": [[1, 1, 2, 2]], "category": []}}', "lists of unequal length"),
        ('{"file_name": "a1.png", "objects": {"bbox": [[1, 1, 2]], "category": [0]}}', "a bbox needs four numbers"),
        ('{"file_name": "a1.png", "objects": {"bbox": [[1, 1, 2, 2]], "category": [7]}}', "object of an unknown class"),
    ],
)
def test_imagefolder_problems_name_the_line(line, problem, tmp_path):
    folder = tiny.write_imagefolder(tmp_path / "set")
    path = folder / "train" / "metadata.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DatasetError, match=problem) as error:
        load_detection_dataset(folder)
    (finding,) = error.value.findings
    assert finding.file == str(path) and finding.row.startswith("line 4")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0 0.5 0.5 0.1", "a label line needs a class and 4 box values"),
        ("0 0.5 0.5 0.1 0.1 0.9", "a label line needs a class and 4 box values"),
        ("cat 0.5 0.5 0.1 0.1", "a label line needs numbers only"),
        ("9 0.5 0.5 0.1 0.1", "object of an unknown class"),
    ],
)
def test_yolo_problems_name_the_line(line, problem, tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    path = folder / "labels" / "train" / "a1.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DatasetError, match=problem) as error:
        load_detection_dataset(folder)
    (finding,) = error.value.findings
    assert (finding.file, finding.row, finding.value) == (str(path), "line 3", line)


def pose(folder, shape: str, line: str):
    """The labels of image a2 as Ultralytics' pose labels: behind the box stand keypoints."""
    (folder / "data.yaml").write_text((folder / "data.yaml").read_text() + f"kpt_shape: {shape}\n")
    for path in folder.glob("labels/*/*.txt"):
        path.unlink()
    path = folder / "labels" / "train" / "a2.txt"
    path.write_text(line + "\n")
    return path


@pytest.mark.parametrize(("shape", "point"), [("[3, 2]", " 0.1 0.1"), ("[4, 3]", " 0.1 0.1 2")])
def test_yolo_pose_labels_begin_with_the_box(shape, point, tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    pose(folder, shape, "0 0.5 0.5 0.2 0.4" + int(shape[1]) * point)
    assert objects_by_name(load_detection_dataset(folder)["train"])[1] == [("cat", [8.0, 15.0, 4.0, 20.0])]


@pytest.mark.parametrize("values", ["0.5 0.5 0.2 0.4", "0.5 0.5 0.2 0.4" + " 0.1" * 4, "0.5 0.5 0.2 0.4" + " 0.1" * 7])
def test_yolo_pose_labels_of_another_length_are_refused(values, tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    path = pose(folder, "[2, 3]", f"0 {values}")
    with pytest.raises(DatasetError) as error:
        load_detection_dataset(folder)
    (finding,) = error.value.findings
    assert (finding.problem, finding.file) == ("a pose label needs a class, 4 box values and the keypoints", str(path))
    assert (finding.row, finding.value) == ("line 1", f"0 {values}")
    assert finding.advice == "kpt_shape [2, 3] makes 11 numbers a line"


@pytest.mark.parametrize("shape", ["17", "[17]", "[a, 3]"])
def test_yolo_kpt_shape_that_is_none(shape, tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    (folder / "data.yaml").write_text((folder / "data.yaml").read_text() + f"kpt_shape: {shape}\n")
    with pytest.raises(DatasetError, match="kpt_shape needs two whole numbers") as error:
        load_detection_dataset(folder)
    (finding,) = error.value.findings
    assert (finding.file, finding.row) == (str(folder / "data.yaml"), "kpt_shape")


@pytest.mark.parametrize("kind", ["coco", "imagefolder", "imagefolder with names", "yolo", "voc"])
def test_files_may_begin_with_a_byte_order_mark(kind, tmp_path):
    folder = WRITERS[kind](tmp_path / "set")
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt", ".yaml", ".xml"):
            path.write_text(path.read_text(), encoding="utf-8-sig")
    assert objects_by_name(load_detection_dataset(folder)["train"]) == expected_objects("train")


def test_imagefolder_lines_end_where_json_lines_do(tmp_path):
    """Not at U+2028 and others that may stand in a text."""
    folder = tiny.write_imagefolder(tmp_path / "set")
    lines = [
        json.dumps({**line, "caption": "a\u2028b\x85c"}, ensure_ascii=False) for line in tiny.metadata_lines("train")
    ]
    (folder / "train" / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    assert objects_by_name(load_detection_dataset(folder)["train"]) == expected_objects("train")


def test_imagefolder_categories_as_cocos(tmp_path):
    folder = tiny.write_imagefolder(tmp_path / "set")
    listed = [{"id": index, "name": name} for index, name in enumerate(tiny.NAMES)]
    (folder / "categories.json").write_text(json.dumps(listed[::-1]))
    assert objects_by_name(load_detection_dataset(folder)["train"]) == expected_objects("train")
    (folder / "categories.json").write_text(json.dumps([["cat"], ["dog"]]))
    with pytest.raises(ValueError, match=r"categories\.json.*a list of names, .*\['cat'\]"):
        load_detection_dataset(folder)


def test_yolo_polygons_lists_and_roboflows_paths(tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    (folder / "labels" / "train" / "a2.txt").write_text("1 0.1 0.2 0.5 0.2 0.5 0.6\n")
    (folder / "train.txt").write_text("./images/train/a1.png\n./images/train/a2.png\n")
    (folder / "data.yaml").write_text("train: train.txt\nval: ../images/val\nnames: [cat, dog, bird]\nnc: 3\n")
    loaded = load_detection_dataset(folder / "data.yaml")
    assert objects_by_name(loaded["train"])[1] == [("dog", [2.0, 10.0, 8.0, 20.0])]
    assert len(loaded["train"]) == 2 and len(loaded["validation"]) == 1


@pytest.mark.parametrize(("names", "ids"), [(("7", "7"), [0, 1]), (("7", "0008"), [7, 8])])
def test_yolo_names_may_recur_in_subfolders(names, ids, tmp_path):
    """As with cameras that each count from 1; where none recurs, the ids are the names' digits."""
    for camera, name in zip(("cam1", "cam2"), names, strict=True):
        for kind in ("images", "labels"):
            (tmp_path / kind / camera).mkdir(parents=True)
        tiny.picture((20, 10)).save(tmp_path / "images" / camera / f"{name}.png")
        (tmp_path / "labels" / camera / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "data.yaml").write_text("train: [images/cam1, images/cam2]\nnames: [cat]\n")
    split, report = check_dataset(load_detection_dataset(tmp_path)["train"])
    assert split["image_id"][:] == ids and report.findings == ()


def test_yolo_image_listed_twice_is_still_found(tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    tiny.picture((20, 10)).save(folder / "images" / "val" / "a1.png")
    (folder / "data.yaml").write_text("train: [images/train, images/val, images/val]\nnames: [cat, dog, bird]\n")
    with pytest.raises(DatasetError, match=r"image id used twice \(2x\)"):
        check_dataset(load_detection_dataset(folder))


def test_yolo_without_its_image_folder(tmp_path):
    folder = tiny.write_yolo(tmp_path / "set")
    (folder / "data.yaml").write_text("train: images/nowhere\nnames: [cat, dog, bird]\nnc: 4\n")
    with pytest.raises(DatasetError, match=r"(?s)nc is not the number of names.*no such image folder.*images/nowhere"):
        load_detection_dataset(folder)


def test_voc_problems(tmp_path):
    folder = tiny.write_voc(tmp_path / "set")
    path = folder / "Annotations" / "a1.xml"
    path.write_text(path.read_text().replace("<name>cat", "<name>cow"))
    (folder / "Annotations" / "a2.xml").write_text("<annotation>")
    with pytest.raises(DatasetError) as error:
        load_detection_dataset(folder)
    broken, unknown = error.value.findings
    assert broken.problem == "missing or broken annotation file"
    assert (unknown.file, unknown.row, unknown.value) == (str(path), "object 0", "cow")


@pytest.mark.parametrize("given", ["Unspecified", "unspecified", ""])
def test_voc_difficult_may_be_unspecified(given, tmp_path):
    folder = tiny.write_voc(tmp_path / "set")
    path = folder / "Annotations" / "a3.xml"
    path.write_text(path.read_text().replace("<difficult>0<", f"<difficult>{given}<"))
    assert load_detection_dataset(folder)["train"]["objects"][2]["iscrowd"] == [1, 0]


def test_voc_difficult_that_is_no_number(tmp_path):
    folder = tiny.write_voc(tmp_path / "set")
    path = folder / "Annotations" / "a3.xml"
    path.write_text(path.read_text().replace("<difficult>0<", "<difficult>maybe<"))
    with pytest.raises(DatasetError) as error:
        load_detection_dataset(folder)
    (finding,) = error.value.findings
    assert (finding.problem, finding.file) == ("difficult must be 0 or 1", str(path))
    assert (finding.row, finding.value) == ("object 1", "maybe")


def test_voc_image_is_that_of_the_annotation_files_name(tmp_path):
    """A copy may still name the image it was made of."""
    folder = tiny.write_voc(tmp_path / "set")
    shutil.copy(folder / "Annotations" / "a1.xml", folder / "Annotations" / "my a1 [flip].xml")
    shutil.copy(folder / "JPEGImages" / "a1.jpg", folder / "JPEGImages" / "my a1 [flip].jpg")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a1  1\nmy a1 [flip]\n")
    train = load_detection_dataset(folder)["train"].cast_column("image", datasets.Image(decode=False))
    assert [one["path"].rpartition("/")[2] for one in train["image"]] == ["a1.jpg", "my a1 [flip].jpg"]


def test_voc_without_lists_is_all_train(tmp_path):
    folder = tiny.write_voc(tmp_path / "set")
    for path in (folder / "ImageSets" / "Main").iterdir():
        path.unlink()
    loaded = load_detection_dataset(folder)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4}


# --- names, ids, splits


@pytest.mark.parametrize(
    ("name", "usual"),
    [
        ("train2017", "train"),
        ("val", "validation"),
        ("valid", "validation"),
        ("dev", "validation"),
        ("val2014", "validation"),
        ("Test", "test"),
        ("extra", "extra"),
    ],
)
def test_split_names(name, usual):
    assert split_name(name) == usual


def coco_of_two_years(folder):
    tiny.write_coco(folder)
    for name in ("train2014", "train2017"):
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(tiny.coco_content("train")))
    (folder / "annotations" / "instances_train.json").unlink()
    return {"train2014": 3, "train2017": 3, "validation": 1}


def yolo_with_val_and_valid(folder):
    tiny.write_yolo(folder)
    (folder / "data.yaml").write_text(
        "train: images/train\nval: images/val\nvalid: images/train\nnames: [cat, dog, bird]"
    )
    return {"train": 3, "val": 1, "valid": 3}


def voc_of_two_years(folder):
    lists = tiny.write_voc(folder) / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "train2007.txt")
    (lists / "train2012.txt").write_text("a1\n")
    return {"train2007": 3, "train2012": 1, "validation": 1}


def imagefolder_with_val_and_dev(folder):
    tiny.write_imagefolder(folder)
    shutil.copytree(folder / "train", folder / "dev")
    return {"dev": 3, "train": 3, "val": 1}


def saved_with_validation_and_dev(folder):
    train, val = tiny.hub_split("train"), tiny.hub_split("val")
    datasets.DatasetDict(train=train, validation=val, dev=train).save_to_disk(folder)
    return {"train": 3, "validation": 1, "dev": 3}


@pytest.mark.parametrize(
    "write",
    [
        coco_of_two_years,
        yolo_with_val_and_valid,
        voc_of_two_years,
        imagefolder_with_val_and_dev,
        saved_with_validation_and_dev,
    ],
)
def test_splits_of_one_usual_name_keep_their_own(write, tmp_path):
    expected = write(tmp_path / "set")
    assert {name: len(split) for name, split in load_detection_dataset(tmp_path / "set").items()} == expected


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ([5, 3, 9], [5, 3, 9]),
        (["0007", "12"], [7, 12]),
        (["b", "a", "b"], [0, 1, 0]),
        (["01", "1"], [0, 1]),
        ([None, None], [0, 1]),
        ([4, 4], [4, 4]),
        ([2**53, 3], [2**53, 3]),  # evaluation keeps ids in float64
        ([2**53 + 1, 3], [0, 1]),
        ([-(2**60), -(2**60)], [0, 0]),
        (["20230101123456789012", "20230101123456789013"], [0, 1]),
    ],
)
def test_whole_ids(given, numbers):
    assert whole_ids(given) == numbers


def test_split_off_validation(tmp_path):
    splits = load_detection_dataset(tiny.write_coco(tmp_path / "set"))
    assert split_off_validation(splits) is splits
    only = datasets.DatasetDict({"train": datasets.concatenate_datasets([splits["train"]] * 8)})
    one, again, other = (split_off_validation(only, 0.25, seed=seed) for seed in (0, 0, 1))
    assert (len(one["train"]), len(one["validation"])) == (18, 6)
    assert one["validation"]["image_id"] == again["validation"]["image_id"]
    assert one["validation"]["image_id"] != other["validation"]["image_id"]
    with pytest.raises(ValueError, match=r"`train_val_split` is 1\.5"):
        split_off_validation(only, 1.5)
    with pytest.raises(ValueError, match="there is no train"):
        split_off_validation(datasets.DatasetDict({"test": splits["train"]}))


class TestKeepClasses:
    def test_objects_of_other_classes_go_and_their_images_stay(self, tmp_path):
        splits = load_detection_dataset(tiny.write_coco(tmp_path / "set"))
        kept = keep_classes(splits, ["bird", "cat"])
        assert class_names_of(kept["train"]) == ["bird", "cat"]
        assert len(kept["train"]) == len(splits["train"])
        before = {row["image_id"]: row["objects"] for row in splits["train"].remove_columns("image")}
        for row in kept["train"].remove_columns("image"):
            old = before[row["image_id"]]
            wanted = [
                (old["id"][i], old["bbox"][i], {0: 1, 2: 0}[c]) for i, c in enumerate(old["category"]) if c in (0, 2)
            ]
            new = row["objects"]
            assert list(zip(new["id"], new["bbox"], new["category"], strict=True)) == wanted

    @pytest.mark.parametrize("names", [["fish"], ["cat", "cat"]])
    def test_unknown_and_repeated_names_are_refused(self, tmp_path, names):
        splits = load_detection_dataset(tiny.write_coco(tmp_path / "set"))
        with pytest.raises(ValueError, match="the classes to keep"):
            keep_classes(splits, names)
