"""Lists of images: names of columns, forms of files, CSV with stray quotes, metadata files."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import ConfigError, InputError, UsageError
from imgbatch.sources import lists
from imgbatch.sources.csv_rows import MAX_LINE
from imgbatch.sources.manifest import Manifest
from imgbatch.storage.stores import Folder
from tests.unit.test_sources import as_csv, as_jsonl, as_parquet, below, disk, ignored, kind, rows

__all__ = ["disk"]

CAFE, CAFE_DECOMPOSED = "Caf\u00e9", "Cafe\u0301"


def as_tsv(table: list[dict[str, Any]]) -> bytes:
    lines = ["\t".join(table[0]), *("\t".join(map(str, row.values())) for row in table)]
    return "\n".join(lines).encode() + b"\n"


def as_json(table: list[dict[str, Any]]) -> bytes:
    return json.dumps(table, indent=1).encode()


FORMS = {
    "m.csv": as_csv,
    "m.tsv": as_tsv,
    "m.jsonl": as_jsonl,
    "m.json": as_json,
    "m.parquet": as_parquet,
    "m.csv.gz": lambda table: gzip.compress(as_csv(table)),
    "m.TSV.gz": lambda table: gzip.compress(as_tsv(table)),
    "m.ndjson.GZ": lambda table: gzip.compress(as_jsonl(table)),
    "m.json.gz": lambda table: gzip.compress(as_json(table)),
    "lines.json": as_jsonl,
    "packed.csv": lambda table: gzip.compress(as_csv(table)),
}


def put(disk: Folder, name: str, content: str | bytes) -> str:
    disk.put(name, content.encode() if isinstance(content, str) else content)
    return disk.at(name)


def carried(result: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name.startswith("input_")} for row in result]


# Forms


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_list_is_read(disk: Folder, name: str) -> None:
    uri = put(disk, name, FORMS[name]([{"uri": "p/a.jpg", "label": "cat"}, {"uri": "p/b.jpg", "label": "cup"}]))
    assert kind(disk, uri) == "manifest"
    assert below(disk, uri) == ["p/a.jpg", "p/b.jpg"]
    assert carried(rows(disk, uri)) == [{"input_label": "cat"}, {"input_label": "cup"}]


@pytest.mark.parametrize(
    "name", ["list.txt", "LIST.TXT", "list.lst", "list.xlsx", "data.arrow", "list.txt.gz", "x.sqlite"]
)
def test_unsupported_forms_of_list_are_refused(disk: Folder, name: str) -> None:
    with pytest.raises(
        InputError, match=r"neither an image nor a supported list.*\.csv, \.tsv, \.jsonl.*source\.format=manifest"
    ):
        kind(disk, put(disk, name, "a.jpg\n"))
    assert kind(disk, disk.at(name), format="objects") == "object"


@pytest.mark.parametrize(
    "content",
    [
        '{"images": [{"file_name": "a.jpg"}], "annotations": []}',
        '{\n "images": [{"file_name": "a.jpg"}]\n}',
        '"text"',
        "[1, 2]",
        '[{"uri": "a.jpg"}',
        "",
    ],
    ids=["COCO in one line", "COCO", "text", "numbers", "torn", "empty"],
)
def test_json_that_is_not_a_list_is_refused(disk: Folder, content: str) -> None:
    uri = put(disk, "instances.json", content)
    if not content:
        assert rows(disk, uri) == []
        return
    with pytest.raises(InputError, match=r"instances\.json"):
        kind(disk, uri)


def test_an_array_with_the_name_of_an_inventory_is_a_list(disk: Folder) -> None:
    uri = put(disk, "manifest.json", '[{"uri": "a.jpg"}]')
    assert kind(disk, uri) == "manifest" and below(disk, uri) == ["a.jpg"]
    with pytest.raises(InputError, match="not the manifest of an S3 Inventory"):
        kind(disk, put(disk, "other/manifest.json", '{"files": 1}'))


def test_a_large_array_is_refused_with_a_remedy(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_JSON_CHARS", 50)
    with pytest.raises(InputError, match="JSON Lines"):
        kind(disk, put(disk, "m.json", as_json([{"uri": "a.jpg", "x": "y" * 50}])))


@pytest.mark.parametrize(
    "content, read",
    [
        (b'{"uri": "a.jpg"}\n', ["a.jpg"]),
        (b'[{"uri": "a.jpg"}]', ["a.jpg"]),
        (b"uri,x\na.jpg,1\n", ["a.jpg"]),
        (b"uri\tx\na.jpg\t1\n", ["a.jpg"]),
        (gzip.compress(b"uri,x\na.jpg,1\n"), ["a.jpg"]),
        (as_parquet([{"uri": "a.jpg"}]), ["a.jpg"]),
    ],
    ids=["JSON Lines", "JSON", "CSV", "TSV", "gzip", "Parquet"],
)
def test_a_list_without_a_suffix_is_recognised_by_its_content(disk: Folder, content: bytes, read: list[str]) -> None:
    assert below(disk, put(disk, "list.txt", content), format="manifest") == read


@pytest.mark.parametrize("cut", [5, 30], ids=["head", "tail"])
@pytest.mark.parametrize("name", ["m.csv.gz", "m.jsonl.gz"])
def test_truncated_gzip_is_an_input_error(disk: Folder, name: str, cut: int) -> None:
    table = [{"uri": f"{number}.jpg", "x": str(hash(number))} for number in range(50)]
    content = (as_csv if "csv" in name else as_jsonl)(table)
    with pytest.raises(InputError, match=name):
        rows(disk, put(disk, name, gzip.compress(content)[:-cut]))


# Names of columns


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("uri, label", [(" uri", "label "), ("uri\u00a0", "\tlabel"), ("\ufeffuri", "label")])
def test_names_of_columns_are_trimmed(disk: Folder, name: str, uri: str, label: str) -> None:
    if "tsv" in name.lower() and "\t" in label:
        label = label.strip()
    if "\ufeff" in uri and "json" in name:
        uri = uri.strip("\ufeff")  # there the mark stands before the text, not in a key
    result = rows(disk, put(disk, name, FORMS[name]([{uri: "a.jpg", label: "cat"}])))
    assert carried(result) == [{"input_label": "cat"}]


@pytest.mark.parametrize("name", FORMS)
def test_names_of_columns_are_normalised(disk: Folder, name: str) -> None:
    result = rows(disk, put(disk, name, FORMS[name]([{"uri": "a.jpg", CAFE_DECOMPOSED: "yes"}])))
    assert carried(result) == [{f"input_{CAFE}": "yes"}]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("first, second", [("label", "label "), (CAFE, CAFE_DECOMPOSED), ("uri", " uri")])
def test_two_columns_with_the_same_normalised_name_are_refused(
    disk: Folder, name: str, first: str, second: str
) -> None:
    table = [{"uri": "a.jpg", first: "a.jpg", second: "b"}]
    with pytest.raises(InputError, match=r"(?s)m?\..*rename one"):
        rows(disk, put(disk, name, FORMS[name](table)))


def test_a_repeated_key_in_an_object_is_refused(disk: Folder) -> None:
    with pytest.raises(InputError, match="line 2: an object has the key 'label' more than once"):
        rows(disk, put(disk, "m.jsonl", '{"uri": "a"}\n{"uri": "b", "label": "cat", "label": "cup"}\n'))


@pytest.mark.parametrize(
    "content",
    [
        "uri, label\nb/a.jpg, cat\n",
        "label, uri\ncat, b/a.jpg\n",
        "uri ,label\nb/a.jpg ,cat\n",
        'uri,label\n" b/a.jpg",cat\n',
    ],
)
def test_spaces_around_a_uri_in_a_csv_are_removed(disk: Folder, content: str) -> None:
    assert below(disk, put(disk, "m.csv", content)) == ["b/a.jpg"]


def test_spaces_around_a_uri_are_kept_in_other_forms(disk: Folder) -> None:
    for name in ("m.jsonl", "m.json", "m.parquet"):
        assert below(disk, put(disk, name, FORMS[name]([{"uri": " a.jpg "}]))) == [" a.jpg "]


# Columns of names


@pytest.mark.parametrize("name", FORMS)
def test_the_uri_column_is_configurable(disk: Folder, name: str) -> None:
    uri = put(disk, name, FORMS[name]([{"uri": "no.jpg", "Image Path": "p/a.jpg", "label": "cat"}]))
    assert below(disk, uri, uri_column="Image Path ") == ["p/a.jpg"]
    assert carried(rows(disk, uri, uri_column="Image Path")) == [{"input_uri": "no.jpg", "input_label": "cat"}]
    with pytest.raises(InputError, match=r"no column 'image_path', which source\.uri_column names.*mean 'Image Path'"):
        rows(disk, uri, uri_column="image_path")


@pytest.mark.parametrize("name", FORMS)
def test_a_template_uses_columns(disk: Folder, name: str) -> None:
    uri = put(disk, name, FORMS[name]([{"id_code": "7f3a", "diagnosis": "2", "a.b": "x"}]))
    assert below(disk, uri, uri_template="train/{id_code}.jpg") == ["train/7f3a.jpg"]
    assert below(disk, uri, uri_template="{{{diagnosis}}}/{ id_code }-{id_code}.{a.b}") == ["{2}/7f3a-7f3a.x"]
    result = carried(rows(disk, uri, uri_template="train/{id_code}.jpg"))
    assert result == [{"input_id_code": "7f3a", "input_diagnosis": "2", "input_a.b": "x"}]
    with pytest.raises(InputError, match=r"no column 'ID_code', which source\.uri_template names.*mean 'id_code'"):
        rows(disk, uri, uri_template="train/{ID_code}.jpg")


def test_a_template_takes_numbers(disk: Folder) -> None:
    assert below(disk, put(disk, "m.parquet", as_parquet([{"id": 7}])), uri_template="{id}.png") == ["7.png"]
    assert below(disk, put(disk, "m.jsonl", '{"id": 7}\n'), uri_template="{id}.png") == ["7.png"]
    for column in (pa.array([1.5]), pa.array([[1]]), pa.array([True])):
        uri = put(disk, "n.parquet", as_parquet(pa.table({"id": column})))
        with pytest.raises(InputError, match=r"n\.parquet: the column 'id' has"):
            rows(disk, uri, uri_template="{id}.png")


def test_a_row_that_lacks_a_part_of_a_template_is_refused_with_its_line(disk: Folder) -> None:
    for name, content in (
        ("m.csv", "id,day\n1,mon\n\n,\n2,\n"),
        ("m.jsonl", '{"id": 1, "day": "mon"}\n\n{}\n\n{"id": 2}\n'),
    ):
        with pytest.raises(InputError, match=rf"{name}, line 5: .*source\.uri_template.*day, id"):
            rows(disk, put(disk, name, content), uri_template="{day}/{id}.jpg")


@pytest.mark.parametrize("template", ["train.jpg", "{}.jpg", "{id:05}.jpg", "{id!r}.jpg", "{id", "}", "{ }"])
def test_an_invalid_template_is_a_config_error(disk: Folder, template: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.uri_template="):
        rows(disk, put(disk, "m.csv", "id\n1\n"), uri_template=template)


@pytest.mark.parametrize(
    "near", ["URI", "Uri", "url", "image_path", "Image Path", "filename", "file_name", "path", "id"]
)
def test_a_near_miss_of_the_uri_column_is_suggested(disk: Folder, near: str) -> None:
    for name in ("m.csv", "m.jsonl", "m.parquet"):
        uri = put(disk, name, FORMS[name]([{"label": "x", near: "a.jpg"}]))
        with pytest.raises(InputError, match=rf"no column 'uri'.*mean '{near}'\? .*--set 'source\.uri_column={near}'"):
            rows(disk, uri)
        assert below(disk, uri, uri_column=near) == ["a.jpg"]


def test_near_misses_are_ordinary_columns_if_the_uri_column_exists(disk: Folder) -> None:
    uri = put(disk, "m.csv", "URI,url,uri,path\n1,2,a.jpg,4\n")
    assert below(disk, uri) == ["a.jpg"]
    assert carried(rows(disk, uri)) == [{"input_URI": "1", "input_url": "2", "input_path": "4"}]


@pytest.mark.parametrize("value", ["5", "true", '["a.jpg"]', '{"x": 1}', "1.5"])
def test_a_uri_that_is_not_text_is_refused_with_its_line(disk: Folder, value: str) -> None:
    uri = put(disk, "m.jsonl", f'{{"uri": null}}\n{{"uri": "a.jpg"}}\n{{"uri": {value}}}\n')
    with pytest.raises(InputError, match=r"m\.jsonl, line 3: 'uri' is "):
        rows(disk, uri)


def test_rows_without_a_uri_are_logged(disk: Folder, caplog: pytest.LogCaptureFixture) -> None:
    for name, content, place in (
        ("m.csv", "uri,x\na.jpg,1\n,2\n,3\n", "line 3"),
        ("m.jsonl", '{"uri": "a.jpg"}\n\n{"uri": null}\n{"x": 1}\n', "line 3"),
        ("m.json", '[{"uri": "a.jpg"}, {"uri": ""}, {}]', "entry 2"),
    ):
        caplog.clear()
        assert ignored(disk, put(disk, name, content)) == 2
        assert f"{name}: 2 rows name no image, the first is {place}" in caplog.text


# CSV


@pytest.mark.parametrize(
    "content, places",
    [
        ('uri,x\na.jpg,"open\nb.jpg,1\nc.jpg,2\n', r"line 2: a quote is not closed"),
        ('uri,x\na.jpg,"Good morning\nb.jpg,1\nc.jpg,she says "hello\nd.jpg,1\n', r"lines 2 to 4: a value continues"),
        (
            'uri,x\na.jpg,"Good morning\nb.jpg,1\nc.jpg,she says hello"\nd.jpg,1\n',
            r"a quote in line 2 .*line 4.*'b\.jpg.{1,2}1'",
        ),
        ('uri,x\na.jpg,"Good\nb.jpg,day"\nd.jpg,1\n', r"a quote in line 2 .*line 3.*'b\.jpg.{1,2}day'"),
        ('uri,label,x\na.jpg,"cat,1\nb.jpg,cup",2\nd.jpg,cat,1\n', r"a quote in line 2 .*line 3.*'b\.jpg.{1,2}cup"),
        ('"uri","x"\n"a.jpg","open\n"b.jpg","1"\n', r"lines 2 to 3: a value continues"),
        ('uri,x\na.jpg,"At last" she said\nb.jpg,1\n', r"line 2: a value continues"),
        ('uri\n"a.jpg\nb.jpg\nc.jpg"\n', r"a quote in line 2 .*line 4"),
        ('uri,x\n"a.jpg,1\nb.jpg,2\nc.jpg",3\nd.jpg,4\n', r"a quote in line 2 .*line 4.*'b\.jpg.{1,2}2'"),
        ('x,uri\n"Good,a.jpg\n1,b.jpg\nday",c.jpg\n', r"a quote in line 2 .*line 4.*'1.{1,2}b\.jpg'"),
    ],
)
def test_an_unclosed_quote_around_rows_is_refused_with_its_line(disk: Folder, content: str, places: str) -> None:
    for name, text in (("m.csv", content), ("m.tsv", content.replace(",", "\t"))):
        with pytest.raises(InputError, match=places):
            rows(disk, put(disk, name, text))


def test_rows_in_quotes_are_recognised_by_ids(disk: Folder) -> None:
    uri = put(disk, "m.csv", 'id,x\n7f3a,"Good morning\n8b2c,1\n9d01,hello"\n0000,1\n')
    with pytest.raises(InputError, match=r"a quote in line 2 .*line 4"):
        rows(disk, uri, uri_template="train/{id}.jpg")


@pytest.mark.parametrize(
    "caption",
    [
        "two\nlines",
        "A cat, sleeping.\nA dog, awake.\nA mouse, gone.",
        'She said "so, then"\n\nand, left',
        "one,\r\ntwo,\rthree,\nfour",
        "Mr. Fox, with a hat\nfile.name, too",
        "\n\n,\n",
        'ends with a quote, "',
    ],
)
def test_captions_of_several_lines_are_values(disk: Folder, caption: str) -> None:
    table = [{"uri": f"p/{number}.jpg", "caption": caption} for number in range(3)] + [
        {"uri": "z.jpg", "caption": "one"}
    ]
    result = rows(disk, put(disk, "m.csv", as_csv(table)))
    assert [row["input_caption"] for row in result] == [caption, caption, caption, "one"]


@pytest.mark.parametrize("name", ["new\nline.jpg", "a,b\nc.jpg", "\n.jpg"])
def test_a_uri_of_several_lines_is_a_value(disk: Folder, name: str) -> None:
    assert below(disk, put(disk, "m.csv", as_csv([{"uri": name, "label": "x"}]))) == [name]
    if "," not in name:
        assert below(disk, put(disk, "m.csv", as_csv([{"uri": name}]))) == [name]


def test_quotes_within_a_value_are_part_of_it(disk: Folder) -> None:
    result = rows(disk, put(disk, "m.csv", 'uri,x\na,5" wide\nb,x\nc,said "hi" and "so\nd,"1 ""2"" 3"\n'))
    assert [row["input_x"] for row in result] == ['5" wide', "x", 'said "hi" and "so', '1 "2" 3']


def test_values_across_blocks_of_lines_are_complete(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [{"uri": f"{number}.jpg", "x": f'"{number}"\n5" wide, {number}\n'} for number in range(300)]
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr("imgbatch.sources.csv_rows._BLOCK", block)
        result = rows(disk, put(disk, "m.csv", as_csv(table) + b'300.jpg,5" wide\n'))
        assert [row["input_x"] for row in result] == [row["x"] for row in table] + ['5" wide']


@pytest.mark.parametrize(
    "content",
    [
        "uri,label\ra.jpg,cat\rb.jpg,cup\r",
        "uri,label\r\na.jpg,cat\r\nb.jpg,cup",
        "\n\nuri,label\n\na.jpg,cat\n\n\nb.jpg,cup\n\n",
        "uri;label\na.jpg;cat\nb.jpg;cup\n",
        "uri|label\na.jpg|cat\nb.jpg|cup\n",
        "uri\tlabel\na.jpg\tcat\nb.jpg\tcup\n",
        "sep=,\nuri,label\na.jpg,cat\nb.jpg,cup\n",
        '"sep=;"\r\nuri;label\r\na.jpg;cat\r\nb.jpg;cup\r\n',
        "SEP=:\nuri:label\na.jpg:cat\nb.jpg:cup\n",
        ",uri,label\n0,a.jpg,cat\n1,b.jpg,cup\n",
        "uri,label,\na.jpg,cat,\nb.jpg,cup,\n",
        "uri,label,,\na.jpg,cat,,\nb.jpg,cup,,\n",
        "uri,label\na.jpg,cat,,\nb.jpg,cup\n",
        "\ufeffuri,label\na.jpg,cat\nb.jpg,cup\n",
        '\ufeff"uri","label"\n"a.jpg","cat"\n"b.jpg","cup"\n',
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_csv_of_other_tools_is_read(disk: Folder, content: str, encoding: str) -> None:
    uri = put(disk, "m.csv", content.lstrip("\ufeff" if encoding != "utf-8" else "").encode(encoding))
    assert below(disk, uri) == ["a.jpg", "b.jpg"]
    assert carried(rows(disk, uri)) == [{"input_label": "cat"}, {"input_label": "cup"}]


@pytest.mark.parametrize("again", ["uri,label", '"uri", label', "\ufeffuri,label"])
def test_a_repeated_header_is_not_a_row(disk: Folder, again: str, caplog: pytest.LogCaptureFixture) -> None:
    uri = put(disk, "m.csv", f"uri,label\na.jpg,cat\n\n{again}\nb.jpg,cup\n,\n")
    assert carried(rows(disk, uri)) == [{"input_label": "cat"}, {"input_label": "cup"}]
    assert "line 4 repeats the header" in caplog.text and "the first is line 6" in caplog.text
    assert ignored(disk, uri) == 2


@pytest.mark.parametrize("again", ["label,uri", "uri,class"])
def test_a_different_header_among_the_rows_is_refused(disk: Folder, again: str) -> None:
    with pytest.raises(InputError, match=r"line 3 is a different header.*separate --input"):
        rows(disk, put(disk, "m.csv", f"uri,label\na.jpg,cat\n{again}\ncup,b.jpg\n"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"# made on Monday\nuri,label\na.jpg,cat\n", "no column 'uri'; it has: # made on Monday.*first line of a CSV"),
        (b"uri,label\n# note\na.jpg,cat\n", "line 2: 1 values, but the header has 2"),
        (b"uri,label\na.jpg,cat\n\nb.jpg,cup,extra\n", "line 4: 3 values, but the header has 2"),
        (b'uri,label\n"a\n.jpg",cat\nb.jpg, "cup, or mug"\n', "line 4: 3 values.*without a space before"),
        (b"uri,label\na.jpg,cat\nb.jpg,cu\x00p\n", "line 3 holds a NUL"),
        ("uri,label\na.jpg,cat\n".encode("utf-16-le"), "line 1 holds a NUL character: save the file as UTF-8"),
        ("uri,label\na.jpg,cat\nb.jpg,Kätzchen\n".encode("latin-1"), "line 3 is not UTF-8"),
        ('uri,label\na.jpg,"cat"\nb.jpg,"猫"\n'.encode("shift-jis"), "line 3 is not UTF-8"),
        (b"a.jpg,cat\nb.jpg,cup\n", r"no column 'uri'; it has: a\.jpg, cat.*first line of a CSV must be its header"),
        (b"PK\x03\x04" + bytes(100), "line 1 holds a NUL"),
    ],
)  # fmt: skip
def test_invalid_csv_is_refused_with_its_line(disk: Folder, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"m\.csv.* {message}"):
        rows(disk, put(disk, "m.csv", content))


def test_long_lines_do_not_fill_the_memory(disk: Folder) -> None:
    long = "x" * (MAX_LINE + 2_000_000)
    for name, content, message in (
        ("m.csv", f"uri,x\na.jpg,{long}\n", "line 2 is longer"),
        (
            "m.csv",
            f'uri,x\na.jpg,"{long[3_000_000:]}\n{long[3_000_000:]}"\n',
            "line 2: a value is longer.*its quote closed",
        ),
        ("m.jsonl", f'{{"uri": "a.jpg"}}\n{{"x": "{long}"}}\n', "line 2 is longer"),
    ):
        with pytest.raises(InputError, match=message):
            rows(disk, put(disk, name, content))


# JSON


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.ndjson.gz"])
def test_a_late_key_is_a_column(disk: Folder, name: str) -> None:
    table: list[dict[str, Any]] = [{"uri": f"{number}.jpg"} for number in range(10_003)]
    table += [{"uri": "late.jpg", "label": "cup"}, {"label ": "cat", "uri": "later.jpg", "day": 5}]
    result = rows(disk, put(disk, name, FORMS[name](table) if name in FORMS else gzip.compress(as_jsonl(table))))
    assert len(result) == 10_005
    assert carried(result[-3:]) == [
        {"input_label": None, "input_day": None},
        {"input_label": "cup", "input_day": None},
        {"input_label": "cat", "input_day": "5"},
    ]


def test_each_batch_has_the_columns_so_far(disk: Folder) -> None:
    table = [{"uri": "a.jpg"}] + [{"uri": "b.jpg", "label": "x"}] * 10_000 + [{"uri": "c.jpg", "z": "1"}]
    manifest = Manifest(disk.stores, put(disk, "m.jsonl", as_jsonl(table)), SourceConfig())
    assert [each.batch.schema.names[5:] for each in manifest.list_images()] == [
        [],
        ["input_label"],
        ["input_label", "input_z"],
    ]


def test_a_late_uri_key_is_found(disk: Folder) -> None:
    uri = put(disk, "m.jsonl", '{"x": 1}\n{"x": 2}\n{"uri": "a.jpg"}\n')
    assert below(disk, uri) == ["a.jpg"] and ignored(disk, uri) == 2


@pytest.mark.parametrize("name, place", [("m.jsonl", "line 3"), ("m.json", "")])
def test_damaged_json_is_refused_with_its_line(disk: Folder, name: str, place: str) -> None:
    content = '{"uri": "a"}\n\n{"uri": "b"' if name == "m.jsonl" else '[{"uri": "a"}, {"uri": "b"]'
    with pytest.raises(InputError, match=rf"{name} cannot be read as JSON.*{place}"):
        rows(disk, put(disk, name, content))


def test_invalid_unicode_is_refused_with_its_line(disk: Folder) -> None:
    with pytest.raises(InputError, match=r"line 2: the value of 'label' is not Unicode text"):
        rows(disk, put(disk, "m.jsonl", b'{"uri": "a"}\n{"uri": "b", "label": "\xe4"}\n'))


# Parquet


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.list_(pa.string()), pa.struct([("x", pa.string())]), pa.timestamp("s")]
)
def test_a_uri_column_of_another_type_is_refused(disk: Folder, kind: pa.DataType) -> None:
    with pytest.raises(InputError, match=r"m\.parquet: the column 'uri' has"):
        rows(disk, put(disk, "m.parquet", as_parquet(pa.table({"uri": pa.array([None], kind)}))))


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]
)
def test_a_uri_may_have_any_text_type(disk: Folder, kind: pa.DataType) -> None:
    value: Any = b"a.jpg" if kind == pa.binary() else "a.jpg"
    column = pa.array([value]).cast(kind) if pa.types.is_dictionary(kind) else pa.array([value], kind)
    assert below(disk, put(disk, "m.parquet", as_parquet(pa.table({"uri": column})))) == ["a.jpg"]


def test_a_damaged_page_is_an_input_error(disk: Folder) -> None:
    data = bytearray(as_parquet(pa.table({"uri": [f"{number}.jpg" for number in range(100)]})))
    data[30:60] = b"\xff" * 30
    with pytest.raises(InputError, match=r"m\.parquet cannot be read as parquet"):
        rows(disk, put(disk, "m.parquet", bytes(data)))


# Metadata files


METADATA = {"metadata.csv": as_csv, "metadata.jsonl": as_jsonl, "metadata.parquet": as_parquet}


def images(disk: Folder, *names: str) -> None:
    for name in names:
        disk.put(name, b"1")


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("folder", ["", "train/", "a/b/"])
def test_metadata_files_add_columns(disk: Folder, name: str, folder: str) -> None:
    images(disk, f"in/{folder}0.jpg", f"in/{folder}deep/1.jpg", "in/other.jpg")
    table = [
        {"file_name": "0.jpg", "label": "cat", "size": "big"},
        {"file_name": "deep/1.jpg", "label": "cup", "size": "5"},
    ]
    disk.put(f"in/{folder}{name}", METADATA[name](table))
    result = rows(disk, disk.at("in"))
    named = {row["uri"]: row["input_label"] for row in result if row["input_label"]}
    assert named == {disk.at(f"in/{folder}0.jpg"): "cat", disk.at(f"in/{folder}deep/1.jpg"): "cup"}
    assert {row["input_size"] for row in result if row["input_label"]} == {"big", "5"}
    assert {row["size"] for row in result if row["input_label"]} == {None}, "the store knows the size"
    assert len(result) == 3 + 2 and ignored(disk, disk.at("in")) == 0


def test_every_folder_may_have_a_metadata_file(disk: Folder) -> None:
    for split in ("train", "test"):
        images(disk, f"in/{split}/0.jpg")
        disk.put(f"in/{split}/metadata.csv", f"file_name,label\n0.jpg,{split}\n".encode())
    result = {(row["uri"].removeprefix(disk.at("in/")), row["input_label"]) for row in rows(disk, disk.at("in"))}
    assert result == {(f"{split}/0.jpg", label) for split in ("train", "test") for label in (None, split)}


@pytest.mark.parametrize("content", [b"id,label\n1,cat\n", b"", b"\xff\xfe\x00", b'{"x": 1}'])
def test_metadata_without_file_names_is_ignored(disk: Folder, content: bytes) -> None:
    images(disk, "in/0.jpg")
    disk.put("in/metadata.csv", content)
    assert below(disk, disk.at("in")) == ["in/0.jpg"] and ignored(disk, disk.at("in")) == 1


def test_damaged_metadata_is_refused_with_its_line(disk: Folder) -> None:
    images(disk, "in/0.jpg")
    disk.put("in/metadata.jsonl", b'{"file_name": "0.jpg", "label": "cat"}\n{"file_name": ')
    with pytest.raises(InputError, match=r"metadata\.jsonl .*line 2"):
        rows(disk, disk.at("in"))


def test_metadata_names_only_candidates_of_the_folder_or_glob(disk: Folder) -> None:
    images(disk, "in/0.jpg", "in/1.png", "in/a/2.jpg")
    disk.put("in/metadata.csv", b"file_name,label\n0.jpg,x\n1.png,y\na/2.jpg,z\nnotes.txt,n\n")

    def named(*inputs: str, **config: Any) -> list[str]:
        return sorted(row["input_label"] for row in rows(disk, *inputs, **config) if row["input_label"])

    assert named(disk.at("in")) == ["x", "y", "z"] and ignored(disk, disk.at("in")) == 1
    assert named(disk.at("in"), suffixes="jpg") == ["x", "z"]
    assert named(disk.at("in/*")) == ["x", "y"]
    uri = disk.at("in/*.jpg")  # does not mean the metadata file
    assert "input_label" not in rows(disk, uri)[0]


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/0.jpg", "s3://bucket/0.jpg", "https://host/0.jpg", "."])
def test_metadata_cannot_name_images_outside_its_folder(disk: Folder, name: str) -> None:
    images(disk, "in/0.jpg")
    disk.put("in/metadata.csv", f"file_name,label\n{name},x\n".encode())
    with pytest.raises(InputError, match=r"metadata\.csv, line 2, names .*images in its folder"):
        rows(disk, disk.at("in"), schemes="s3,https,file")


@pytest.mark.parametrize("name", METADATA)
def test_a_metadata_file_may_be_the_input(disk: Folder, name: str) -> None:
    uri = put(disk, f"in/{name}", METADATA[name]([{"file_name": "0.jpg", "label": "cat"}]))
    assert kind(disk, uri) == "manifest" and below(disk, uri) == ["in/0.jpg"]
    assert carried(rows(disk, uri)) == [{"input_label": "cat"}]
    both = put(disk, f"two/{name}", METADATA[name]([{"file_name": "no.jpg", "uri": "0.jpg"}]))
    assert below(disk, both) == ["two/0.jpg"]


def test_metadata_is_read_from_a_store(s3: Any, tmp_path: Path) -> None:
    place = Folder(s3.stores(retries=0), f"s3://images/{tmp_path.name}")
    for name in ("in/train/0.jpg", "in/test/0.jpg"):
        place.put(name, b"1")
    place.put("in/metadata.csv.gz", gzip.compress(b"file_name\nno.jpg\n"))  # Hugging Face has no such form
    place.put("in/metadata.csv", b"file_name,label\ntrain/0.jpg,cat\n")
    result = {(row["uri"], row["input_label"]) for row in rows(place, place.at("in"))}
    assert result == {
        (place.at("in/train/0.jpg"), None),
        (place.at("in/test/0.jpg"), None),
        (place.at("in/train/0.jpg"), "cat"),
    }


# URIs that a list may name


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "config", [{}, {"uri_column": "uri"}, {"uri_template": "{uri}"}, {"uri_template": "{x}:///{uri}"}]
)
def test_a_manifest_in_a_bucket_cannot_name_local_files(
    s3: Any, tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    place = Folder(s3.stores(retries=0), f"s3://images/{tmp_path.name}")
    place.put(name, FORMS[name]([{"uri": "a.jpg", "x": "s3"}, {"uri": "/etc/passwd", "x": "file"}][1:]))
    with pytest.raises(InputError, match=r"names '.*/etc/passwd'.*source\.schemes="):
        rows(place, place.at(name), **config)


def test_uri_column_and_uri_template_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="set only one of them"):
        SourceConfig(uri_column="a", uri_template="{b}")


def test_omitted_unnamed_columns_are_logged(disk: Folder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows(disk, put(disk, "comma.csv", "uri,label,\na.jpg,cat,\n"))
    assert "without a name" not in caplog.text
    rows(disk, put(disk, "index.csv", ",uri\n0,a.jpg\n"))
    assert "index.csv: columns without a name" in caplog.text
