from __future__ import annotations

import pytest

from hf_detrkd.labels import LabelMap


def id2label(*names):
    return dict(enumerate(names))


def test_same_list_is_the_identity():
    labels = LabelMap.between(id2label("cat", "dog"), id2label("cat", "dog"))
    assert labels.is_identity
    assert labels.teacher_classes == labels.student_classes == (0, 1)


def test_by_name_in_the_students_order():
    labels = LabelMap.between(id2label("person", "car", "dog", "cat"), id2label("cat", "bird", "person"))
    assert labels.names == ("cat", "person")
    assert labels.student_classes == (0, 2)
    assert labels.teacher_classes == (3, 0)
    assert len(labels) == 2
    assert not labels.is_identity


@pytest.mark.parametrize(
    ("teacher", "student"),
    [(("a", "b"), ("b", "a")), (("a", "b", "c"), ("a", "b")), (("a", "b"), ("a", "b", "c"))],
)
def test_order_and_number_are_no_identity(teacher, student):
    assert not LabelMap.between(id2label(*teacher), id2label(*student)).is_identity


def test_case_and_spaces_are_reported():
    labels = LabelMap.between(id2label("Traffic Light", "dining table"), id2label("traffic-light", "dining table"))
    assert labels.teacher_classes == (0, 1)
    assert labels.names == ("traffic-light", "dining table")
    (line,) = [line for line in labels.table().splitlines() if "traffic-light" in line]
    assert "Traffic Light" in line
    assert "same but for case" in line


def test_exact_name_comes_before_a_similar_one():
    labels = LabelMap.between(id2label("RBC", "rbc"), id2label("rbc", "Platelets"))
    assert labels.student_classes == (0,)
    assert labels.teacher_classes == (1,)


def test_no_class_gets_two_partners():
    labels = LabelMap.between(id2label("rbc"), id2label("RBC", "rbc"))
    assert labels.student_classes == (1,)
    assert labels.teacher_classes == (0,)


def test_repeated_names_have_no_partner_in_another_list():
    """COCO's 91 ids hold several "N/A"."""
    labels = LabelMap.between(id2label("N/A", "person", "N/A"), id2label("person", "N/A"))
    assert labels.names == ("person",)
    assert "more than once" in labels.table()
    same = LabelMap.between(id2label("N/A", "person", "N/A"), id2label("N/A", "person", "N/A"))
    assert same.is_identity


def test_string_keys_in_any_order():
    labels = LabelMap.between({"1": "dog", "0": "cat"}, id2label("dog"))
    assert labels.teacher_classes == (1,)


def test_table_shows_all_classes():
    table = LabelMap.between(id2label("person", "motorbike"), id2label("person", "motorbikes", "zebra")).table()
    assert table.splitlines()[1].split() == ["0", "person", "0", "person"]
    assert '1 motorbikes  -            left out; near: "motorbike"' in table
    assert "2 zebra       -            left out" in table
    assert '-             1 motorbike  left out; near: "motorbikes"' in table
    assert table.endswith("1 classes shared; the rest is left out of the distillation terms.")


def test_nothing_shared_is_an_error_with_a_hint():
    with pytest.raises(
        ValueError, match=r"the teacher has 'motorbike', 'car'.*Near misses: 'motorbikes' and 'motorbike'"
    ):
        LabelMap.between(id2label("motorbike", "car"), id2label("motorbikes"))


def test_gaps_in_the_indices_are_an_error():
    with pytest.raises(ValueError, match=r"keys \[1, 2\].*keys 0 to 1"):
        LabelMap.between({1: "a", 2: "b"}, id2label("a"))


def test_placeholders_are_no_names():
    """Eighty classes without names and three without names have nothing to do with each other."""
    many, few = ({i: f"LABEL_{i}" for i in range(number)} for number in (80, 3))
    with pytest.raises(ValueError, match="share no class name"):
        LabelMap.between(many, few)
    assert LabelMap.between(few, dict(few)).is_identity
    assert LabelMap.between({0: "LABEL_0", 1: "cat"}, {0: "cat", 1: "LABEL_0"}).names == ("cat",)
