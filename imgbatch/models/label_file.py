"""Values: files with the names of the classes: lines, numbered lines, CSV, JSON, Python or YAML.

A file is read only if it is unambiguous. Everything else is refused with a remedy, since a line such as `0 red` that is read
as a name would be a wrong label.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from imgbatch.decode.other_kinds import describe_placeholder
from imgbatch.errors import ModelError
from imgbatch.sources.spelling import csv_problem, normalise
from imgbatch.terminal.plurals import counted

_NAMES = ("name", "label", "class", "class_name", "label_name", "category", "synset", "wnid")
_NAME_KEYS = {*_NAMES, "names", "labels", "classes", "class_names", "label_names", "categories", "id2label"}
_NUMBER_KEYS = {"id", "index", "idx", "class_id", "label_id", "class_index", "number", "no", ""}
_BACKGROUND = {"background", "__background__", "_background_", "bg", "dummy"}

_NUMBERED = re.compile(r"(\d+)(?:\s*[,;:|=]\s*|[.)]\s+|\s+)(\S.*)")
_NUMBER_LAST = re.compile(r"(.*\S)\s*[,;\t]\s*(\d+)")
_SYNSET_FIRST = re.compile(r"(n\d{8})[\s,:]+\S.*")
_QUOTED = re.compile(r"""(['"])(.+)\1\s*,?""")
_YAML_KEY = re.compile(r"(?:names|labels|classes|class_names|label_names|id2label)\s*:\s*(?:[\[{].*)?(?:\n|$)")

_REMEDY = "give one name per line, in the order of the head, or a JSON list of the names"


def read(content: bytes, where: str) -> list[str]:
    """Return the names of a file, in the order of the head, normalised.

    Args:
        where: the name of the file in messages; its suffix decides between CSV, YAML and other forms.

    Raises:
        ModelError: it is not a list of names, or is ambiguous.

    >>> read(b"0 red\\n1 green\\n", "names.txt"), read(b'{"1": "green", "0": "red"}', "names.json")
    (['red', 'green'], ['red', 'green'])
    """
    text = _text(content, where)
    start, suffix = text.lstrip()[:1], where.lower().rpartition(".")[2]
    if suffix in ("yaml", "yml") or _YAML_KEY.match(text.lstrip()):
        names = _from_tree(_yaml(text, where), where)
    elif start and start in "[{":
        names = _from_tree(_json(text, where), where)
    elif suffix in ("csv", "tsv"):
        names = _from_table(text, "\t" if suffix == "tsv" else None, where)
    else:
        names = _from_lines(text, where)
    names = [normalise(name) for name in names]
    if "" in names:
        raise ModelError(f"{where}: name {names.index('') + 1} is empty: {_REMEDY}")
    return names


def background_hint(names: Sequence[str]) -> str:
    """Return a suffix for a message about too many names, if the first one is a background class.

    >>> background_hint(["background", "cat"])
    "; the first name is 'background': remove it if the head has no such class"
    """
    if names and names[0].lower() in _BACKGROUND:
        return f"; the first name is {names[0]!r}: remove it if the head has no such class"
    return ""


def _text(content: bytes, where: str) -> str:
    if kind := describe_placeholder(content):  # otherwise the three lines of a pointer would be three names
        raise ModelError(f"{where} is {kind}")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ModelError(
            f"{where} is not a text file in UTF-8: line {line} has the byte 0x{content[error.start]:02x}; convert it, e.g. "
            "with iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    if "\0" in text:
        raise ModelError(f"{where} is not a text file: {_REMEDY}")
    # Not splitlines: a name may contain U+2028 or U+0085, which splitlines treats as the end of a line.
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if not text:
        raise ModelError(f"{where} is empty: {_REMEDY}")
    return text


def _json(text: str, where: str) -> Any:
    """Parse JSON, or the output of Python's print: `{0: 'red'}`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ModelError(f"{where} starts like JSON, but is not valid: {error}; {_REMEDY}") from error


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ModelError(f"{where} is not YAML: {' '.join(str(error).split())[:200]}; {_REMEDY}") from error


def from_tree(tree: Any, where: str) -> list[str]:
    """Return the names of a list or a mapping of class numbers, from `config.json` or a JSON file.

    Raises:
        ModelError: a class number has no name, or a name is not a text.

    >>> from_tree({"red": 0, "green": 1}, "names.json"), from_tree({"0": "red", "1": "green"}, "names.json")
    (['red', 'green'], ['red', 'green'])
    """
    return [normalise(name) for name in _from_tree(tree, where)]


def _from_tree(tree: Any, where: str) -> list[str]:
    if isinstance(tree, Mapping):
        sections = [key for key in tree if key in _NAME_KEYS and isinstance(tree[key], list | Mapping)]
        if len(sections) > 1:
            raise ModelError(f"{where} has {' and '.join(map(repr, sections))}: keep only one")
        return _from_tree(tree[sections[0]], where) if sections else _from_mapping(tree, where)
    if not isinstance(tree, list | tuple):
        raise ModelError(f"{where} has {_excerpt(tree)}, which is not a list of names: {_REMEDY}")
    if tree and all(isinstance(item, Mapping) for item in tree):
        return _from_records(tree, where)
    return [_name(item, number, where) for number, item in enumerate(tree)]


def _from_mapping(tree: Mapping[Any, Any], where: str) -> list[str]:
    """Return names from `{"0": "red"}`, or from `{"red": 0}`, the form of torchvision's `class_to_idx`."""
    keys = [_number(key) for key in tree]
    if None not in keys:
        named = {key: value for key, value in zip(keys, tree.values(), strict=True) if key is not None}
        if len(named) < len(tree):
            raise ModelError(f"{where} names a class twice: {_REMEDY}")
        return [_name(named[number], number, where) for number in _require_complete(list(named), where)]
    values = [value if isinstance(value, int) and not isinstance(value, bool) else None for value in tree.values()]
    if tree and None not in values:
        numbers = [value for value in values if value is not None]
        names = dict(zip(numbers, tree, strict=True))
        return [_name(names[number], number, where) for number in _require_complete(numbers, where)]
    raise ModelError(f"{where} has {_excerpt(tree)}, which is not a mapping of class numbers to names: {_REMEDY}")


def _from_records(tree: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """Return names from `[{"id": 0, "name": "red"}]`, the form of categories in COCO."""
    header = list(tree[0])
    if any(list(record) != header for record in tree):
        raise ModelError(f"{where}: its records do not all have the keys {', '.join(map(str, header))}: {_REMEDY}")
    return _from_columns(header, [[record[key] for key in header] for record in tree], where)


def _from_lines(text: str, where: str) -> list[str]:
    lines = [line.strip() for line in text.split("\n")]
    if "" in lines:
        raise ModelError(f"{where}: line {lines.index('') + 1} is empty: {_REMEDY}")
    if any(line.startswith("# ") for line in lines):
        number = next(number for number, line in enumerate(lines, 1) if line.startswith("# "))
        raise ModelError(f"{where}: line {number} looks like a comment, {lines[number - 1][:60]!r}: remove it")
    if all(_SYNSET_FIRST.fullmatch(line) for line in lines):  # Caffe's synset_words.txt
        return [line[:9] for line in lines]
    if quoted := _all_match(_QUOTED, lines):
        return [match[2] for match in quoted]
    data_lines = lines[1:] if len(lines) > 1 and _is_header(re.split(r"[,;\t ]+", lines[0].lower())) else lines
    if numbered := _all_match(_NUMBERED, data_lines):
        return _by_number([(int(match[1]), match[2]) for match in numbered], where)
    if (numbered_last := _all_match(_NUMBER_LAST, data_lines)) and sorted(int(match[2]) for match in numbered_last) == [
        *range(len(numbered_last))
    ]:
        return _by_number([(int(match[2]), match[1]) for match in numbered_last], where)
    return lines


def _from_table(text: str, delimiter: str | None, where: str) -> list[str]:
    lines = text.split("\n")
    delimiter = delimiter or next((char for char in ",;\t" if char in lines[0]), ",")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        rows = [[cell.strip() for cell in row] for row in reader if row]
    except csv.Error as error:
        raise ModelError(f"{where}: line {reader.line_num:,}: {csv_problem(error)}; {_REMEDY}") from error
    if uneven := next((row for row in rows if len(row) != len(rows[0])), None):
        raise ModelError(
            f"{where}: the row {delimiter.join(uneven)!r} does not have {len(rows[0])} columns like the first row"
        )
    header = [cell.lower() for cell in rows[0]]
    if any(cell in _NAME_KEYS for cell in header):
        return _from_columns(header, rows[1:], where)
    return _from_columns(["name"] if len(header) == 1 else [""] * len(header), rows, where)


def _from_columns(header: Sequence[str], rows: Sequence[Sequence[Any]], where: str) -> list[str]:
    """Return names from the only column of names, ordered by the column of class numbers if there is one."""
    columns = list(zip(*rows, strict=True))
    numbers, names = [], []
    for position, (key, column) in enumerate(zip(header, columns, strict=True)):
        if all(_number(value) is not None for value in column):
            numbers.append(position)
        elif str(key).lower() in _NAME_KEYS or not any(header):
            names.append(position)
    if len(header) == 1 and len(columns) == 1:
        return [_name(value, number, where) for number, value in enumerate(columns[0])]
    if len(names) != 1 or len(numbers) > 1 or not (numbers or any(header)):
        raise ModelError(
            f"{where}: the column of names among its columns ({', '.join(map(repr, header)) if any(header) else len(header)}) "
            f"is not clear: {_REMEDY}"
        )
    if not numbers:
        return [_name(value, number, where) for number, value in enumerate(columns[names[0]])]
    pairs = zip(columns[numbers[0]], columns[names[0]], strict=True)
    return _by_number([(int(number), _name(name, int(number), where)) for number, name in pairs], where)


def _by_number(pairs: Sequence[tuple[int, str]], where: str) -> list[str]:
    names = dict(pairs)
    return [names[number] for number in _require_complete([number for number, _ in pairs], where)]


def _require_complete(numbers: Sequence[int], where: str) -> range:
    """Return the class numbers; raise unless they are 0, 1, 2, … without a gap."""
    if sorted(numbers) == [*range(len(numbers))]:
        return range(len(numbers))
    raise ModelError(
        f"{where} numbers its {counted(len(numbers), 'name')} from {min(numbers)} to {max(numbers)}: classes are numbered from "
        "0, each once, in the order of the head. If the numbers are part of the names, give a JSON list of the names; else "
        "number them from 0, or omit the numbers"
    )


def _all_match(pattern: re.Pattern[str], lines: Sequence[str]) -> list[re.Match[str]]:
    """Return the match of each line; an empty list if one line does not match."""
    matches = [match for match in map(pattern.fullmatch, lines) if match]
    return matches if len(matches) == len(lines) else []


def _is_header(words: Sequence[str]) -> bool:
    return len(words) == 2 and len({*words} & _NAME_KEYS) == 1 and len({*words} & _NUMBER_KEYS) == 1


def _number(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) else None


def _name(value: Any, number: int, where: str) -> str:
    """Return the name of a class; the WordNet id from ["n01440764", "tench"], the form of Keras for ImageNet."""
    if isinstance(value, list | tuple) and value and re.fullmatch(r"n\d{8}", str(value[0])):
        return str(value[0])
    if not isinstance(value, str):
        raise ModelError(
            f"{where}: the name of class {number} is {_excerpt(value)}, which is not a text: put it in quotes"
        )
    return value


def _excerpt(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:60]
