"""Effects: `explain`: everything that an output says about one image, from its tables, its listings and its records."""

from __future__ import annotations

import json
import logging
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from imgbatch.config.sections import Config
from imgbatch.errors import InputError, NotFound, OutputError, StoreError, UsageError
from imgbatch.labelling.explanation import Explanation, Listed
from imgbatch.labelling.files import require_absent
from imgbatch.labelling.image_search import Hit, ImageSearch
from imgbatch.ledger.part_file import Footer, footer_of
from imgbatch.ledger.run_record import read_record
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.success_marker import read_success
from imgbatch.schema import TAR
from imgbatch.sources.patterns import Candidates
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console

log = logging.getLogger("imgbatch")

_LISTINGS = 3
"""Number of runs, newest first, whose listings are searched, besides that of the run that wrote the row."""
_STATUS = {LABELS_LOG: "labelled", REJECTS_LOG: "rejected"}


def explain(
    output_uri: str,
    uri: str,
    config: Config,
    *,
    again: bool = False,
    image: str | None = None,
    model: str | None = None,
) -> Explanation:
    """Return everything that is known of one image.

    Args:
        output_uri: the output of a classification, finished or not.
        uri: of the image, as in the tables. A relative path is that of a local file.
        config: options of the store, and limits for the image.
        again: label the image again, on this machine.
        image: with `again`, where to write the image as the network sees it, as a PNG.
        model: with `again`, the current name or URI of the model; None: as recorded.

    Raises:
        InputError: the image is in no table and no listing; the message says why, if that can be known.
        UsageError: options contradict each other, or the file for the image exists.
        OutputError: a part is damaged or foreign.
        ImgbatchError: the image could not be labelled again.
    """
    if (image or model) and not again:
        raise UsageError("--image and --model need --again: without it no image is labelled")
    stores = Stores(config.storage)
    output = Folder(stores, absolute(output_uri))
    if image is not None:
        require_absent(stores, absolute(image))
    search = _Search(output, _spellings(uri))
    found = search.explanation()
    if again:
        from imgbatch.labelling.again import label_again

        row, tars = search.image_row(found)
        record = found.runs.get(str(found.row.get("run_id"))) or search.newest_record()
        found.now = label_again(output, config, row, tars, search.fingerprint(record), record, model=model, image=image)
    return found


def _spellings(uri: str) -> list[str]:
    """Return the forms of a URI under which the tables may have it, the most probable first."""
    if not uri.strip():
        raise UsageError("URI is empty: give the uri of an image, as in the tables")
    forms = [absolute(uri), uri, absolute(urllib.parse.unquote(uri))]
    return list(dict.fromkeys(forms))


class _Search:
    """The search for one image in an output."""

    def __init__(self, output: Folder, uris: Sequence[str]) -> None:
        self._output, self._uris = output, uris
        self._runs = sorted(output.folders("runs"), reverse=True)
        self._records: dict[str, dict[str, Any]] = {}
        self._footer: Footer | None = None
        self._similar: list[str] = []

    def explanation(self) -> Explanation:
        """Return what the tables, listings and records say.

        Raises:
            InputError: the image is nowhere.
        """
        console.step("searching the tables")
        table, hit = self._in_tables()
        run_id = str(hit.row["run_id"]) if hit is not None and hit.row.get("run_id") else None
        console.step("searching the listings")
        listings = list(self._in_listings(run_id))
        is_listed = any(entry.row["uri"] in self._uris for entry in listings)
        if hit is None and not is_listed and (not listings or read_success(self._output) is not None):
            raise InputError(self._not_there(str(listings[0].row["uri"]) if listings else None))
        mentioned = dict.fromkeys([*([run_id] if run_id else []), *(entry.run_id for entry in listings)])
        runs = {name: self._record(name) for name in mentioned}
        if hit is None:
            return Explanation(
                uri=self._uris[0], output=self._output.uri, status="listed", runs=runs, listings=listings
            )
        self._footer = footer_of(hit.metadata, hit.uri)
        return Explanation(
            uri=str(hit.row["uri"]), output=self._output.uri, status=_STATUS[table], row=hit.row, part=hit.uri,
            part_row=hit.number, part_rows=hit.rows, fingerprint=self._footer.fingerprint, runs=runs, listings=listings,
        )  # fmt: skip

    def image_row(self, found: Explanation) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the row with the version of an image, and the tars that may hold it."""
        if found.row:
            return found.row, self._footer.streams if self._footer is not None else {}
        listed = found.listings[0].row
        return {**listed, "uri": self._uris[0]}, {listed["uri"]: {}} if listed.get("container") == TAR else {}

    def newest_record(self) -> dict[str, Any]:
        """Return the run.json of the newest run that says which model it used."""
        return next((record for name in self._runs if (record := self._record(name)).get("model")), {})

    def fingerprint(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fingerprint of the row's part; without a row that of a run."""
        return self._footer.fingerprint if self._footer is not None else record.get("fingerprint") or {}

    def _in_tables(self) -> tuple[str, Hit | None]:
        for name in (LABELS_LOG, REJECTS_LOG):
            search = ImageSearch(self._output.folder(name), self._uris)
            if (hit := search.find()) is not None:
                return name, hit
            self._similar = self._similar or search.similar()
        return "", None

    def _in_listings(self, run_id: str | None) -> Iterator[Listed]:
        """Yield the image, or the tar that holds it, in the listings of the newest runs and of the one that labelled it."""
        searched = [*self._runs[:_LISTINGS], *([run_id] if run_id in self._runs[_LISTINGS:] else [])]
        containers = [uri[:at] for uri in self._uris for at, letter in enumerate(uri) if letter == "#"]
        for name in searched:
            search = ImageSearch(self._output.folder(f"runs/{name}/listing"), [*self._uris, *containers])
            try:
                hit = search.find()
            except OutputError as error:
                log.warning("the listing of run %s is damaged: %s", name, error)
                continue
            if hit is not None and (hit.row["uri"] in self._uris or hit.row.get("container") is not None):
                yield Listed(str(name), hit.row)
            elif not self._similar:
                self._similar = search.similar()

    def _record(self, name: str) -> dict[str, Any]:
        if name not in self._records:
            self._records[name] = read_record(self._output, name)
        return self._records[name]

    def _not_there(self, container: str | None) -> str:
        """Return a message about an image that is nowhere: why, and which names are similar.

        Args:
            container: the listed tar that would hold it; None: there is none.
        """
        uri = self._uris[0]
        if not self._runs:
            return f"{self._output.uri} has no run: it is not the --output of a classification"
        message = f"{uri} is in no table of {self._output.uri}, and not in its newest listings"
        reasons = [f"{container} is listed, and has no image of that name"] if container is not None else []
        reasons = reasons or [*self._by_name(uri)] or [*self._in_store(uri)]
        if self._similar:
            reasons.append(f"did you mean {' or '.join(map(repr, self._similar))}?")
        return ": ".join([message, "; ".join(reasons)]) if reasons else f"{message}: check its spelling"

    def _by_name(self, uri: str) -> Iterator[str]:
        """Yield what the name says: whether it is below an input, and is an image by its name."""
        record = self.newest_record()
        config = record.get("config") or {}
        inputs = [absolute(entry) for entry in config.get("input") or []]
        folder = next((entry for entry in inputs if uri.startswith(f"{entry}/")), None)
        if folder is None:
            if inputs and not any(uri == entry or "*" in entry or "{" in entry for entry in inputs):
                yield f"the inputs of run {record.get('run_id')} are {', '.join(inputs[:3])}"
            return
        suffixes = (config.get("source") or {}).get("suffixes", "images")
        name = uri.removeprefix(f"{folder}/").partition("#")[0]
        if name not in Candidates(suffixes) and not name.lower().endswith((".tar", ".tgz", ".tar.gz", ".parquet")):
            yield f"it is ignored, since its name is not that of an image (source.suffixes={json.dumps(suffixes)})"

    def _in_store(self, uri: str) -> Iterator[str]:
        """Yield whether an object of that name exists now."""
        if "#" in uri:
            return
        with suppress(StoreError):
            try:
                self._output.stores.call("look at", uri, lambda store, path: store.head(path))
                yield "the object exists; if it is new, run the same classify command again"
            except NotFound:
                yield "no object of that name exists"
