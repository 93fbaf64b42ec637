"""Effects: the label tree of a model: reading, checks, and sums of probabilities.

A taxonomy gives every label one node at each of a few levels, such as "apple" for "Granny Smith". It is a CSV with the labels
in the first column and coarser and coarser nodes in the next ones, or a JSON tree of objects whose innermost values are lists
of labels.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.decode.other_kinds import describe_placeholder
from imgbatch.errors import InputError, ModelError, closest
from imgbatch.models import imagenet
from imgbatch.sources.spelling import csv_problem, folded, normalise, require_distinct
from imgbatch.terminal.plurals import counted, plural

log = logging.getLogger(__name__)

_SHOWN = 5
_SYNSET = re.compile(r"n\d{8}")

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Level:
    """One depth of the tree."""

    name: str
    nodes: tuple[str, ...]
    """Without duplicates, in the order of their labels."""
    node_of: tuple[int, ...]
    """For each class of the model, in the order of its logits, the number of its node."""


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """The levels of a label tree, coarse to fine. The last level is the labels of the model.

    A node may have the name of its only child ("Banana" of the kind "Banana").
    """

    levels: tuple[Level, ...]

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the tree, independent of the form of its file."""
        return hashlib.sha256(self.to_csv()).hexdigest()

    def path(self, label_id: int) -> list[str]:
        """Return the nodes of a class, coarse to fine.

        >>> read(b"label,coarse\\nGala,Apple\\nBanana,Banana\\n", "fruit.csv", ["Banana", "Gala"]).path(1)
        ['Apple', 'Gala']
        """
        return [level.nodes[level.node_of[label_id]] for level in self.levels]

    def sums(self) -> list[tuple[Ints, Ints]]:
        """Return for each level above the labels, fine to coarse, which nodes to add up.

        The first array has the nodes of the next finer level, grouped by parent; the second array has the start of each
        parent's group.
        """
        sums = []
        for coarse, fine in zip(self.levels[-2::-1], self.levels[:0:-1], strict=True):
            parent = np.zeros(len(fine.nodes), np.int64)
            parent[list(fine.node_of)] = coarse.node_of
            children = np.argsort(parent, kind="stable")
            sums.append((children, np.searchsorted(parent[children], np.arange(len(coarse.nodes)))))
        return sums

    def roll_up(self, probabilities: Floats) -> list[Floats]:
        """Return the probability of each node, as (n, nodes) arrays, coarse to fine, from (n, classes).

        Each level is summed from the next finer one. Rounding is monotonic, so that a sum of non-negative numbers is never
        less than one of them: a parent is never less likely than its child, to the last bit.

        >>> fruit = read(b"label,coarse\\nGala,Apple\\nFuji,Apple\\nLime,Citrus\\n", "f.csv", ["Gala", "Fuji", "Lime"])
        >>> fruit.roll_up(np.array([[0.25, 0.25, 0.5]]))[0].tolist()
        [[0.5, 0.5]]
        """
        levels = [probabilities]
        for children, starts in self.sums():
            levels.insert(0, np.add.reduceat(levels[0][:, children], starts, axis=1))
        return levels

    def to_csv(self) -> bytes:
        """Return the tree as `taxonomy.csv` of a model directory: a row for each label, in the model's order."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([level.name for level in reversed(self.levels)])
        writer.writerows(self.path(label_id)[::-1] for label_id in range(len(self.levels[-1].nodes)))
        return text.getvalue().encode()


def read(content: bytes, where: str, labels: Sequence[str]) -> Taxonomy:
    """Return the taxonomy of a file: JSON if its name ends with .json, else CSV.

    Args:
        where: the name of the file in messages.
        labels: the model's labels, in the order of its logits. The tree must have all of them; others are omitted, with a
            warning.

    Raises:
        ModelError: it cannot be read, lacks a label, or is not a tree of even depth. The message has the names concerned.
    """
    if kind := describe_placeholder(content):
        raise ModelError(f"{where} is {kind}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"{where} is not UTF-8: {error}") from error
    names, paths = _from_json(text, where) if where.lower().endswith(".json") else _from_csv(text, where)
    _require_tree(names, paths, where)
    _require_spellings(names, paths, labels, where)
    path_of = {path[-1]: path for _, path in paths}
    _require_labels(set(path_of), labels, where)
    levels = []
    for depth, name in enumerate(names):
        # The finest level is numbered as the logits are.
        nodes = {node: number for number, node in enumerate(dict.fromkeys(path_of[label][depth] for label in labels))}
        levels.append(Level(name, tuple(nodes), tuple(nodes[path_of[label][depth]] for label in labels)))
    return Taxonomy(tuple(levels))


Paths = Sequence[tuple[str, tuple[str, ...]]]
"""For each label its position in the file, and its nodes from coarse to fine."""


def _from_csv(text: str, where: str) -> tuple[list[str], Paths]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    paths = []
    try:
        header = [normalise(name) for name in next(reader, [])]
        if len(header) < 2 or not all(header) or len(set(header)) < len(header):
            raise ModelError(
                f"{where}: its first line is {','.join(header)!r}; expected the names of the levels, each once, fine to "
                "coarse, such as label,coarse"
            )
        for cells in reader:
            if not cells:
                continue
            row = [normalise(cell) for cell in cells]
            if len(row) != len(header) or not all(row):
                raise ModelError(
                    f"{where}, line {reader.line_num}: {','.join(row)!r} is not as deep as the levels "
                    f"{', '.join(header)}: give a node for each, and repeat the name if there is no coarser node"
                )
            paths.append((f"line {reader.line_num}", tuple(reversed(row))))
    except csv.Error as error:
        raise ModelError(f"{where}, line {reader.line_num}: {csv_problem(error)}") from error
    return header[::-1], paths


def _from_json(text: str, where: str) -> tuple[list[str], Paths]:
    def to_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(normalise(key) for key, _ in items)
        if repeated := [key for key, number in counts.items() if number > 1]:
            raise ModelError(f"{where}: {repeated[0]!r} occurs twice at one place: put its children together")
        return {normalise(key): value for key, value in items}

    try:
        tree = json.loads(text, object_pairs_hook=to_dict)
        names = tree.get("levels") if isinstance(tree, dict) and tree.keys() == {"levels", "tree"} else None
        paths = list(_paths(tree["tree"] if names else tree, ()))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f'{where} is not a tree of labels ({error}); expected {{"Fruit": {{"Apple": ["Gala", "Fuji"]}}}}, or '
            '{"levels": ["department", "kind", "label"], "tree": …}'
        ) from error
    if isinstance(names, list):
        names = [normalise(name) if isinstance(name, str) else name for name in names]
    if names and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)
                      and len(set(names)) == len(names)):  # fmt: skip
        raise ModelError(
            f"{where}: levels is {json.dumps(names)[:60]}; expected their names, each once, coarse to fine"
        )
    depth = len(names) if names else max(map(len, paths), default=0)
    if uneven := [path for path in paths if len(path) != depth]:
        raise ModelError(
            f"{where}: {' > '.join(uneven[0])} is {len(uneven[0])} levels deep, not {depth}: give a node for each level, "
            "and repeat the name if there is no coarser node"
        )
    if depth < 2:
        raise ModelError(f"{where}: there are no levels above the labels")
    return names or [*(f"level_{number}" for number in range(1, depth)), "label"], [
        (" > ".join(path), path) for path in paths
    ]


def _paths(tree: Any, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the path of each label. Raises ValueError if the value is not a tree."""
    if isinstance(tree, str):
        yield (*above, normalise(tree))
    elif isinstance(tree, list) and tree and all(isinstance(label, str) for label in tree):
        yield from ((*above, normalise(label)) for label in tree)
    elif isinstance(tree, dict) and tree:
        for name, below in tree.items():
            yield from _paths(below, (*above, name))
    else:
        raise ValueError(f"{' > '.join(above) or 'the file'} has {json.dumps(tree)[:60]}")


def _require_tree(names: Sequence[str], paths: Paths, where: str) -> None:
    """Refuse a node with two parents, a label in two places, and a cycle of names."""
    parents: dict[tuple[int, str], tuple[str, str]] = {}
    labels: dict[str, str] = {}
    above: dict[str, set[str]] = {}
    for place, path in paths:
        for depth in range(1, len(path)):
            parent, child = path[depth - 1 : depth + 1]
            first_parent, first_place = parents.setdefault((depth, child), (parent, place))
            if first_parent != parent:
                raise ModelError(
                    f"{where}: {names[depth]} {child!r} has two parents, {first_parent!r} ({first_place}) and {parent!r} "
                    f"({place}): keep only one, or give the two nodes different names"
                )
            if parent != child:
                above.setdefault(child, set()).add(parent)
        if path[-1] in labels:
            raise ModelError(f"{where}: {path[-1]!r} is in two places ({labels[path[-1]]} and {place}): keep only one")
        labels[path[-1]] = place
    if cycle := _cycle(above):
        raise ModelError(f"{where}: a cycle, {' > '.join(map(repr, cycle))}: a node cannot be above itself")


def _require_spellings(names: Sequence[str], paths: Paths, labels: Sequence[str], where: str) -> None:
    """Refuse levels, and nodes of one level, that differ only in case, spaces or invisible characters.

    The labels of the model may do so: ImageNet has a Cardigan (a dog) and a cardigan.
    """
    model_labels = set(labels)
    try:
        require_distinct(names, "levels")
        for depth, name in enumerate(names):
            nodes = dict.fromkeys(path[depth] for _, path in paths)
            if depth == len(names) - 1:
                foreign = {folded(node) for node in nodes if node not in model_labels}
                nodes = {node: None for node in nodes if folded(node) in foreign}
            require_distinct(nodes, f"nodes of {name!r}")
    except InputError as error:
        raise ModelError(f"{where}: {error}") from error


def _cycle(above: Mapping[str, set[str]]) -> list[str]:
    """Return a cycle of names, from a name back to itself; empty if there is none."""
    visited: set[str] = set()

    def climb(name: str, below: list[str]) -> list[str]:
        if name in below:
            return [*below[below.index(name) :], name]
        if name not in visited:
            for parent in sorted(above.get(name, ())):
                if cycle := climb(parent, [*below, name]):
                    return cycle
            visited.add(name)
        return []

    return next((cycle for name in sorted(above) if (cycle := climb(name, []))), [])


def _require_labels(in_tree: set[str], labels: Sequence[str], where: str) -> None:
    """Refuse a tree without a label of the model; warn about labels that the model does not have."""
    missing = [label for label in labels if label not in in_tree]
    surplus = sorted(in_tree - set(labels))
    surplus_text = _named(surplus, "unknown to the model", labels) if surplus else ""
    if missing:
        missing_text = _named(missing, f"of the model {plural(len(missing), 'is', 'are')} missing", surplus) + (
            f"; {surplus_text}" if surplus_text else ""
        )
        raise ModelError(f"{where}: {missing_text}: the tree must have a row for each label of the model")
    if surplus:
        _warn_once(f"{where}: {surplus_text}: omitted from the tree")


@cache
def _warn_once(text: str) -> None:
    """Log a warning once per process, since a run reads the tree several times."""
    log.warning("%s", text)


def _named(names: Sequence[str], description: str, candidates: Sequence[str]) -> str:
    """Return a count and the first names, each with a suggestion from the other names."""
    shown = [repr(name) + label_hint(name, candidates) for name in names[:_SHOWN]]
    return f"{counted(len(names), 'label')} {description} ({', '.join(shown)}{', …' if len(names) > _SHOWN else ''})"


def label_hint(name: str, labels: Sequence[str]) -> str:
    """Return a hint about a known name that may be meant: a similar one, or one with this number or WordNet id.

    >>> label_hint("granny  smith", ["Granny Smith", "Gala"]), label_hint("dog", ["Gala"])
    (", did you mean 'Granny Smith'?", '')
    >>> label_hint("n02123159", ["tabby", "tiger cat"]), label_hint("1", ["tabby", "tiger cat"])
    (", the WordNet id of 'tiger cat'?", ", the number of 'tiger cat'?")
    >>> label_hint("crane", ["crane (bird)", "crane (machine)", "crate"])
    ", which may be 'crane (bird)' or 'crane (machine)': use the complete name"
    """
    if name.isdecimal() and len(name) < 9 and int(name) < len(labels):
        return f", the number of {labels[int(name)]!r}?"
    if _SYNSET.fullmatch(name) and (word := imagenet.readable([name])[0]) != name and word in labels:
        return f", the WordNet id of {word!r}?"
    if len(matches := [label for label in labels if folded(re.split(r"[,(]", label)[0]) == folded(name)]) > 1:
        return f", which may be {' or '.join(f'{label!r}{_id_of(label, labels)}' for label in matches)}: use the complete name"
    by_form = {folded(label).replace(" ", ""): label for label in labels}
    form = closest(folded(name).replace(" ", ""), by_form, cutoff=0.8)
    return f", did you mean {by_form[form]!r}?" if form is not None else ""


def _id_of(label: str, labels: Sequence[str]) -> str:
    """Return the WordNet id of a label of ImageNet in parentheses; empty for other labels."""
    ids = imagenet.wordnet_ids(tuple(labels))
    return f" ({ids[list(labels).index(label)]})" if ids else ""
