"""Values: the names and the WordNet ids of the classes of ImageNet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from imgbatch.errors import ModelError

_SYNSET = re.compile(r"n\d{8}")

# The parts of ImageNet by their number of classes, as timm assumes.
_SUBSETS = {
    1000: "imagenet",
    11221: "imagenet21k_miil",
    11821: "imagenet12k",
    21841: "imagenet22k",
    21842: "imagenet22k_ms",
    21843: "imagenet21k_goog",
}

# Two classes of ImageNet whose only word is the same.
_DISAMBIGUATED = {"n02012849": "crane (bird)", "n03126707": "crane (machine)"}


def package_file(package: str, path: str) -> Path:
    """Return a file of an installed package without importing it, since timm would import torch."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the model needs the package {package!r}: install it")
    return Path(spec.submodule_search_locations[0]) / path


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids of ImageNet-1k, in the order of the logits."""
    return tuple(package_file("timm", "data/_info/imagenet_synsets.txt").read_text().split())


@cache
def _words() -> dict[str, str]:
    """Return the words of every synset of ImageNet-21k, separated by commas."""
    lines = package_file("timm", "data/_info/imagenet_synset_to_lemma.txt").read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines)


def readable(labels: Sequence[str]) -> tuple[str, ...]:
    """Return readable labels: WordNet ids become words, each label occurs once, and other labels are unchanged.

    The name of a class is the first word of its synset. If two classes share it, the name is all words; if they share all
    words, the id is added.

    >>> readable(["n02124075", "n02123159"]), readable(["ripe", "unripe"])
    (('Egyptian cat', 'tiger cat'), ('ripe', 'unripe'))
    """
    if not all(_SYNSET.fullmatch(label) and label in _words() for label in labels):
        return tuple(labels)
    all_words = [_words()[synset] for synset in labels]
    firsts = [words.partition(",")[0] for words in all_words]
    shared_first, shared_all = _duplicates(firsts), _duplicates(all_words)
    names = [
        _DISAMBIGUATED.get(
            synset, f"{words} ({synset})" if words in shared_all else words if first in shared_first else first
        )
        for synset, words, first in zip(labels, all_words, firsts, strict=True)
    ]
    repeated = _duplicates(names)  # all words of one class may be the first word of another
    return tuple(f"{name} ({synset})" if name in repeated else name for name, synset in zip(names, labels, strict=True))


def _duplicates(names: Sequence[str]) -> set[str]:
    return {name for name, number in Counter(names).items() if number > 1}


def require_unique(labels: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the labels; raise ModelError if a label occurs twice."""
    for label in sorted(_duplicates(labels)):
        numbers = ", ".join(str(number) for number, name in enumerate(labels) if name == label)
        hint = "; for the 1,000 classes of ImageNet, no names are needed" if len(labels) == 1000 else ""
        raise ModelError(
            f"{where}: label {label!r} is the name of more than one class (numbers {numbers}): give each class its own "
            f"name{hint}"
        )
    return tuple(labels)


@lru_cache(maxsize=8)
def wordnet_ids(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the WordNet id of each class if the labels are those of ImageNet or one of its parts; else none.

    >>> wordnet_ids(imagenet_labels())[:2], wordnet_ids(("ripe", "unripe"))
    (('n01440764', 'n01443537'), ())
    """
    if len(labels) not in _SUBSETS:
        return ()
    path = package_file("timm", f"data/_info/{_SUBSETS[len(labels)]}_synsets.txt")
    synsets = tuple(path.read_text().split())
    return synsets if readable(synsets) == labels else ()


@cache
def imagenet_labels() -> tuple[str, ...]:
    """Return the 1,000 class names of ImageNet-1k, in the order of the logits, without duplicates."""
    return readable(imagenet_synsets())


def labels_of(classes: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the labels of a zoo's head: its names, or those of the part of ImageNet with the same number of classes.

    Raises:
        ModelError: neither is known.
    """
    if names:
        return readable(names)
    if classes not in _SUBSETS:
        raise ModelError(
            f"the names of its {classes} classes are unknown: give a file with one name per line, --set model.labels=URI"
        )
    return readable(package_file("timm", f"data/_info/{_SUBSETS[classes]}_synsets.txt").read_text().split())
