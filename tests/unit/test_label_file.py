"""Files of class names: the forms that people have, and what is refused rather than guessed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from imgbatch.errors import ModelError
from imgbatch.models import label_file, taxonomy
from tests.unit.networks import Load, tiny

RGB = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", b"red\ngreen\nblue\n"),
        ("crlf.txt", b"red\r\ngreen\r\nblue\r\n"),
        ("mac.txt", b"red\rgreen\rblue\r"),
        ("bom.txt", b"\xef\xbb\xbfred\ngreen\nblue"),
        ("utf16.txt", "red\ngreen\nblue\n".encode("utf-16")),
        ("spaces.txt", b" red\ngreen \n\tblue\n\n\n"),
        ("list.json", b'["red", "green", "blue"]'),
        ("list.txt", b'[\n "red",\n "green",\n "blue"\n]'),
        ("index.json", b'{"0": "red", "1": "green", "2": "blue"}'),
        ("shuffled.json", b'{"2": "blue", "0": "red", "1": "green"}'),
        ("class_to_idx.json", b'{"blue": 2, "red": 0, "green": 1}'),
        ("config.json", b'{"model_type": "x", "id2label": {"0": "red", "1": "green", "2": "blue"}}'),
        (
            "coco.json",
            b'{"categories": [{"id": 1, "name": "green"}, {"id": 0, "name": "red"}, {"id": 2, "name": "blue"}]}',
        ),
        ("dict.txt", b"{0: 'red',\n 1: 'green',\n 2: 'blue'}\n"),
        ("tuple.txt", b"['red', 'green', 'blue']"),
        ("quoted.txt", b"'red',\n'green',\n'blue'\n"),
        ("numbered.txt", b"0 red\n1 green\n2 blue\n"),
        ("colons.txt", b"0: red\n1: green\n2: blue\n"),
        ("commas.txt", b"0,red\n1,green\n2,blue\n"),
        ("dots.txt", b"0. red\n1. green\n2. blue\n"),
        ("shuffled.txt", b"1 green\n0 red\n2 blue\n"),
        ("header.txt", b"id name\n0 red\n1 green\n2 blue\n"),
        ("last.txt", b"red,0\nblue,2\ngreen,1\n"),
        ("names.csv", b"id,name\n0,red\n1,green\n2,blue\n"),
        ("shuffled.csv", b"name,index,note\ngreen,1,x\nred,0,\nblue,2,y\n"),
        ("semicolons.csv", b"id;name\n0;red\n1;green\n2;blue\n"),
        ("one.csv", b"label\nred\ngreen\nblue\n"),
        ("plain.csv", b"red\ngreen\nblue\n"),
        ("headless.csv", b"0,red\n1,green\n2,blue\n"),
        ("pandas.csv", b",name\n0,red\n1,green\n2,blue\n"),
        ("numbers.csv", b"label,class_name\n0,red\n1,green\n2,blue\n"),
        ("names.tsv", b"red\t0\ngreen\t1\nblue\t2\n"),
        ("data.yaml", b"nc: 3\nnames:\n  0: red\n  1: green\n  2: blue\n"),
        ("list.yml", b"- red\n- green\n- blue\n"),
        ("yaml.txt", b"names: [red, green, blue]\n"),
    ],
)
def test_a_form_that_can_mean_one_thing_only_is_read(name: str, content: bytes) -> None:
    assert label_file.read(content, name) == RGB


def test_names_stay_as_they_are_where_they_only_look_like_a_form() -> None:
    for names in (
        ["7", "8", "9"],
        ["7 up", "cola", "water"],
        ["tench, Tinca tinca", "goldfish, Carassius auratus"],
        ["Boeing 737", "Boeing 747"],
        ["C#", "#1"],
        ["class 0", "class 1"],
    ):
        assert label_file.read("\n".join(names).encode(), "names.txt") == names
    assert label_file.read(b'["10 cm", "20 cm"]', "names.json") == ["10 cm", "20 cm"], "a list is taken as it is"


def test_a_line_ends_where_lines_end_and_nowhere_else() -> None:
    for char in "\u2028\u0085\u000b":
        assert label_file.read(f"red{char}dish\ngreen\n".encode(), "names.txt") == [f"red{char}dish", "green"]


def test_names_are_composed_and_trimmed() -> None:
    assert label_file.read("Cafe\u0301\n th\u00e9\u00a0\n".encode(), "names.txt") == ["Caf\u00e9", "th\u00e9"]
    assert label_file.from_tree({"0": " Cafe\u0301", "1": "x"}, "names.json") == ["Caf\u00e9", "x"]


def test_imagenets_own_files_are_read_by_their_wordnet_ids() -> None:
    keras = json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}).encode()
    caffe = b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
    for name, content in (("imagenet_class_index.json", keras), ("synset_words.txt", caffe)):
        assert label_file.read(content, name) == ["n01440764", "n01443537"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "rot\ngrün\nblau\n".encode("latin-1"), r"not a text file in UTF-8: line 2 .*0xfc.*iconv"),
        ("cut.txt", b"\xff\xfe\x00", "not a text file"),
        ("model.bin", b"PK\x03\x04\x00\x00", "not a text file"),
        ("empty.txt", b"\n \n", "is empty"),
        ("hole.txt", b"red\n\nblue\n", "line 2 is empty"),
        ("comment.txt", b"# my classes\nred\nblue\n", r"line 1 looks like a comment, '# my classes'"),
        ("broken.json", b'{"0": "red"', "starts like JSON, but is not valid.*one name per line"),
        ("one_based.txt", b"1 red\n2 green\n", "its 2 names from 1 to 2: classes are numbered from 0.*JSON list"),
        ("flowers.json", b'{"1": "red", "2": "green", "10": "blue"}', "its 3 names from 1 to 10"),
        ("gap.json", b'{"0": "red", "2": "blue"}', "its 2 names from 0 to 2"),
        ("gap.csv", b"id,name\n0,red\n2,blue\n", "its 2 names from 0 to 2"),
        ("sizes.txt", b"10 cm\n20 cm\n", "If the numbers are part of the names, give a JSON list"),
        ("number.json", b'["red", 2]', r"the name of class 1 is 2, which is not a text"),
        ("norway.yaml", b"- no\n- sv\n", "the name of class 0 is false, which is not a text: put it in quotes"),
        ("mixed.json", b'{"red": "x", "blue": 1}', "not a mapping of class numbers to names"),
        ("text.json", b'{"names": "red"}', "not a mapping of class numbers to names"),
        ("two.json", b'{"names": ["red"], "labels": ["rot"]}', "'names' and 'labels': keep only one"),
        ("two.csv", b"name,label\nred,rot\nblue,blau\n", r"the column of names among its columns \('name', 'label'\)"),
        ("unnamed.csv", b"red,rot\nblue,blau\n", "the column of names among its columns"),
        ("uneven.csv", b"id,name\n0,red,x\n", "does not have 2 columns"),
        ("bad.yaml", b"names: [red\n", "is not YAML"),
        ("bomb.json", b"[" * 100_000, "starts like JSON"),
    ],
)
def test_what_could_mean_two_things_is_refused_with_the_remedy(name: str, content: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=rf"(?s){name}.*{message}"):
        label_file.read(content, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"background\na\nb\nc\n",
            "has 4 names, and .* has 3 classes.*'background': remove it if the head has no such class",
        ),
        (b"__background__\na\nb\nc\n", "'__background__': remove it"),
        (b"a\nb\n", "has 2 names, and .* has 3 classes"),
        (b"a\nb\na\n", r"label 'a' is the name of more than one class \(numbers 0, 2\): give each class its own name"),
        ("Cafe\u0301\nCaf\u00e9\nx\n".encode(), "label 'Caf\u00e9' is the name of more than one class"),
    ],
)
def test_names_that_do_not_suit_the_head_are_refused(load: Load, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    save_file(tiny().state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "own.safetensors", architecture="test_resnet", labels=str(tmp_path / "names.txt"))


def test_labels_that_differ_in_case_alone_are_named_and_used(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "names.txt").write_text("Cardigan\ncardigan\ncap\n")
    save_file(tiny().state_dict(), tmp_path / "own.safetensors")
    model = load(tmp_path / "own.safetensors", architecture="test_resnet", labels=str(tmp_path / "names.txt"))
    assert model.labels == ("Cardigan", "cardigan", "cap")
    assert "differ only in case, spaces or invisible characters: 'Cardigan' and 'cardigan'" in caplog.text


def test_a_value_that_is_too_long_is_named_with_its_line() -> None:
    content = b"id,name\n0,red\n1," + b"x" * (csv.field_size_limit() + 1) + b"\n"
    with pytest.raises(
        ModelError, match=r"names\.csv: line 3: a value is longer than .* characters: is its quote closed\?"
    ):
        label_file.read(content, "names.csv")
    with pytest.raises(ModelError, match=r"t\.csv, line 3: a value is longer than"):
        taxonomy.read(content, "t.csv", ["red"])
