"""Values: what the classes of ImageNet are called, and the taxonomy above them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from imgbatch.errors import ModelError

_SYNSET = re.compile(r"n\d{8}")


# As timm takes it: so many classes are this part of ImageNet.
_SUBSETS = {
    1000: "imagenet",
    11221: "imagenet21k_miil",
    11821: "imagenet12k",
    21841: "imagenet22k",
    21842: "imagenet22k_ms",
    21843: "imagenet21k_goog",
}


# Two classes of ImageNet share the one word that each of them has.
_DISAMBIGUATED = {"n02012849": "crane (bird)", "n03126707": "crane (machine)"}


def package_file(package: str, path: str) -> Path:
    """Return a file of an installed package without importing it: timm alone would bring all of torch."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package!r}, which the model needs, is not installed")
    return Path(spec.submodule_search_locations[0]) / path


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids of ImageNet-1k, in the order of the logits."""
    return tuple(package_file("timm", "data/_info/imagenet_synsets.txt").read_text().split())


@cache
def _words() -> dict[str, str]:
    """Return the words of every synset of ImageNet-21k, parted by commas."""
    lines = package_file("timm", "data/_info/imagenet_synset_to_lemma.txt").read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines)


def readable(labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels that people understand: WordNet ids become words, other labels stay, and each occurs once.

    A class is called by the first word of its synset, by all of them where two classes share the first, and with the id
    where they share all.

    >>> readable(["n02124075", "n02123159"]), readable(["ripe", "unripe"])
    (('Egyptian cat', 'tiger cat'), ('ripe', 'unripe'))
    """
    if not all(_SYNSET.fullmatch(label) and label in _words() for label in labels):
        return tuple(labels)
    whole = [_words()[synset] for synset in labels]
    firsts = [words.partition(",")[0] for words in whole]
    shared, twice = _duplicates(firsts), _duplicates(whole)
    names = [
        _DISAMBIGUATED.get(synset, f"{words} ({synset})" if words in twice else words if first in shared else first)
        for synset, words, first in zip(labels, whole, firsts, strict=True)
    ]
    again = _duplicates(names)  # all words of one class may be the first of another
    return tuple(f"{name} ({synset})" if name in again else name for name, synset in zip(names, labels, strict=True))


def _duplicates(names: Sequence[str]) -> set[str]:
    return {name for name, number in Counter(names).items() if number > 1}


def require_unique(labels: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the labels; ModelError if one stands for more than one class."""
    for label in sorted(_duplicates(labels)):
        places = ", ".join(str(number) for number, name in enumerate(labels) if name == label)
        hint = "; a head of ImageNet's 1,000 classes needs no names" if len(labels) == 1000 else ""
        raise ModelError(
            f"{where}: label {label!r} stands for more than one class (numbers {places}): give each a name of its "
            f"own{hint}"
        )
    return tuple(labels)


@lru_cache(maxsize=8)
def wordnet_ids(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the WordNet id of each class where labels are those of ImageNet or one of its parts; else none.

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
    """Return the 1,000 class names of ImageNet-1k, in the order of the logits, each one once."""
    return readable(imagenet_synsets())


def labels_of(classes: int, said: Sequence[str] | None) -> tuple[str, ...]:
    """Return the labels of a zoo's head: those that its description says, or of the part of ImageNet with so many classes.

    Raises:
        ModelError: neither is known.
    """
    if said:
        return readable(said)
    if classes not in _SUBSETS:
        raise ModelError(
            f"what its {classes} classes are called is not known: give --set model.labels=URI, one name a line"
        )
    return readable(package_file("timm", f"data/_info/{_SUBSETS[classes]}_synsets.txt").read_text().split())
