"""imgbatch: label every image of an object store with a CNN, as one batch job with verified tables.

The functions of this module run the same jobs as `imgbatch VERB …`, from Python. They return a summary, or raise an exception
of `imgbatch.errors`. They install no signal handlers and never end the process. A Ray instance that they start is shut down
again.

    >>> import imgbatch
    >>> imgbatch.classify(input="photos", output="labels", config={"cluster.device": "cpu"})  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

# Arrow reads this once, when it is first imported. Its own allocator keeps freed memory, so that the driver's memory would
# grow in steps of 4 MB as long as rows arrive (docs/LOG.md).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

from imgbatch.config import env_file  # after the line above

env_file.load(strict=False)  # in workers too: this is the first code of the package that a process runs

if TYPE_CHECKING:
    from imgbatch.labelling.explanation import Explanation
    from imgbatch.labelling.export import ExportSummary, Format
    from imgbatch.ledger.compact import CompactionSummary
    from imgbatch.pipeline.evaluation_run import EvaluationSummary
    from imgbatch.pipeline.report_again import ReportSummary
    from imgbatch.pipeline.run_summary import RunSummary
    from imgbatch.training.run import TrainingSummary
    from imgbatch.verification.run import VerificationSummary

__all__ = ["__version__", "classify", "compact", "evaluate", "explain", "export", "train", "verify", "write_report"]
__version__ = "0.2.0"

Options = Mapping[str, Any] | str | None
"""Keys of the configuration, such as `{"cluster.device": "cpu"}`, or the path of a TOML file with them."""


def classify(
    *,
    input: str | Sequence[str],
    output: str,
    model: str | None = None,
    limit: int | None = None,
    date: str | None = None,
    config: Options = None,
) -> RunSummary:
    """Label every image of the inputs that has no row in the output yet.

    Args:
        input: prefixes or folders, globs, objects, archives or manifests; `{date}` is filled in.
        output: where labels/ and rejects/ are written; `{model}` and `{date}` are filled in.
        model: a name, or the path or URI of a model directory; None: efficientnet_lite0.
        limit: label only the first images of the listing.
        date: YYYY-MM-DD, fills `{date}`; None: IMGBATCH_DATE, or else today (UTC).
        config: further options (docs/configuration.md).

    Raises:
        ImgbatchError: the run could not be finished; its `exit_code` gives the cause.
    """
    from imgbatch.concurrency.signals import StopRequest
    from imgbatch.config import reading
    from imgbatch.engine.ray_state import shut_down_if_started
    from imgbatch.pipeline import run

    path, keys = _options(config)
    run_config = reading.load(path, **keys, input=_list(input), output=output, model=model, limit=limit, date=date)
    with shut_down_if_started():
        return run.classify(run_config, StopRequest())


def train(
    *,
    input: str | Sequence[str],
    output: str,
    base: str | None = None,
    taxonomy: str | None = None,
    date: str | None = None,
    config: Options = None,
) -> TrainingSummary:
    """Train a model on labelled images, and write its directory.

    Args:
        input: folders with a folder for each class, manifests, Parquet files or tars with labels.
        output: the model directory; it must not hold a model yet.
        base: the model to start from; None: efficientnet_lite0.
        taxonomy: a label tree, CSV or JSON, that is kept with the model.
        date: YYYY-MM-DD, fills `{date}`; None: IMGBATCH_DATE, or else today (UTC).
        config: further options (docs/configuration.md).

    Raises:
        ImgbatchError: the run could not be finished; its `exit_code` gives the cause.
    """
    from imgbatch.concurrency.signals import StopRequest
    from imgbatch.config.reading import load_as
    from imgbatch.config.training import Training
    from imgbatch.engine.ray_state import shut_down_if_started
    from imgbatch.training import run

    path, keys = _options(config)
    flags: dict[str, Any] = {"input": _list(input), "output": output, "base": base, "taxonomy": taxonomy, "date": date}
    run_config = load_as(Training, path, **keys, **flags)
    with shut_down_if_started():
        return run.train(run_config, StopRequest())


def evaluate(
    *,
    input: str | Sequence[str],
    output: str,
    model: str | None = None,
    against: str | None = None,
    split: str | None = None,
    labels: str | None = None,
    date: str | None = None,
    config: Options = None,
) -> EvaluationSummary:
    """Label images whose class is known, and compute how good the labels are.

    Args:
        input: images with labels, as for `train`.
        output: where labels, metrics.json, predictions.parquet and evaluation.html are written.
        model: a name, or the path or URI of a model directory; None: efficientnet_lite0.
        against: a second model, compared on the same images.
        split: train, val or test: only the images of this split.
        labels: the output of an earlier run; its labels are scored, and no model runs.
        date: YYYY-MM-DD, fills `{date}`; None: IMGBATCH_DATE, or else today (UTC).
        config: further options (docs/configuration.md).

    Raises:
        ImgbatchError: the run could not be finished; its `exit_code` gives the cause.
    """
    from imgbatch.concurrency.signals import StopRequest
    from imgbatch.config import reading
    from imgbatch.engine.ray_state import shut_down_if_started
    from imgbatch.pipeline import evaluation_run

    path, keys = _options(config)
    run_config = reading.load(path, **keys, input=_list(input), output=output, model=model, date=date)
    labels = labels and reading.fill_date(labels, run_config.date or reading.resolve_date(date))
    arguments: dict[str, Any] = {"model": model, "against": against, "split": split, "labels": labels}
    with shut_down_if_started():
        return evaluation_run.evaluate(run_config, StopRequest(), **arguments)


def verify(
    output: str,
    *,
    sample: int | None = None,
    model: str | None = None,
    seed: int | None = None,
    config: Options = None,
) -> VerificationSummary:
    """Recount a finished output from its files, check the files, and label a sample again.

    Args:
        output: the output of `classify`.
        sample: number of rows that are labelled again and compared; None: none.
        model: the current name or URI of the model; None: as the run recorded it.
        seed: of the sample; None: a random one.
        config: further options (docs/configuration.md).

    Raises:
        OutputError: there are foreign files or parts in the output.
        AuditError: rows are missing, duplicated or wrong.
        ImgbatchError: the checks could not be finished.
    """
    from imgbatch.config import reading
    from imgbatch.verification import run

    path, keys = _options(config)
    run_config = reading.load(path, **keys, model=model)
    return run.verify(output, run_config, sample=sample, model=model, seed=seed)


def explain(
    output: str,
    uri: str,
    *,
    again: bool = False,
    image: str | None = None,
    model: str | None = None,
    config: Options = None,
) -> Explanation:
    """Return everything that an output says about one image.

    Args:
        output: the output of `classify`, finished or not.
        uri: of the image, as in the tables.
        again: label the image again, in a child process, and compare.
        image: with `again`, where to write the image as the network sees it, as a PNG.
        model: with `again`, the current name or URI of the model; None: as the run recorded it.
        config: further options (docs/configuration.md).

    Raises:
        InputError: the image is in no table and no listing.
        ImgbatchError: the output could not be read, or the image not be labelled again.
    """
    from imgbatch.config import reading
    from imgbatch.labelling import explain as job

    path, keys = _options(config)
    run_config = reading.load(path, **keys, model=model)
    return job.explain(output, uri, run_config, again=again, image=image, model=model)


def export(
    output: str,
    to: str,
    *,
    uncertain: int | None = None,
    sample: int | None = None,
    rejects: bool = False,
    where: str | None = None,
    seed: int | None = None,
    format: Format = "manifest",
    model: str | None = None,
    config: Options = None,
) -> ExportSummary:
    """Write images of an output that are worth a person's time to a file.

    Args:
        output: the output of `classify`, finished or not.
        to: the file, which must not exist.
        uncertain: this many labels with the smallest margins.
        sample: this many labels at random.
        rejects: all rejects.
        where: a condition on the rows (docs/labelling-loop.md).
        seed: of the sample; None: a random one.
        format: a manifest, or tasks for Label Studio.
        model: the current name or URI of the model, for the classes of Label Studio; None: as the run recorded it.
        config: further options (docs/configuration.md).

    Raises:
        UsageError: options contradict each other, or the file exists.
        ImgbatchError: the output could not be read.
    """
    from imgbatch.config import reading
    from imgbatch.labelling import export as job

    path, keys = _options(config)
    selection = job.Selection(uncertain=uncertain, sample=sample, rejects=rejects, where=where, seed=seed)
    return job.export(output, to, reading.load(path, **keys, model=model), selection, format=format, model=model)


def write_report(output: str, *, run: str | None = None, config: Options = None) -> ReportSummary:
    """Write the report of a run again, from what is in the store.

    Args:
        output: the output of `classify`, finished or not.
        run: which run; None: the newest one.
        config: further options (docs/configuration.md).

    Raises:
        InputError: there is no such run.
        ImgbatchError: the output could not be read, or the report not be written.
    """
    from imgbatch.config import reading
    from imgbatch.pipeline import report_again as job

    path, keys = _options(config)
    return job.write_report(output, reading.load(path, **keys), run_id=run)


def compact(output: str, to: str, *, config: Options = None) -> CompactionSummary:
    """Write a merged copy of the tables of a finished output, in few large files.

    Args:
        output: the output of `classify`.
        to: an empty folder outside of it.
        config: further options (docs/configuration.md).

    Raises:
        AuditError: the copy does not have as many rows as the output.
        ImgbatchError: the output is not finished, or could not be read.
    """
    from imgbatch.config import reading
    from imgbatch.ledger import compact as job
    from imgbatch.storage.stores import Stores

    path, keys = _options(config)
    return job.compact(output, to, Stores(reading.load(path, **keys).storage))


def _options(config: Options) -> tuple[str | None, dict[str, Any]]:
    """Return the path of a TOML file, and keys with their values."""
    return (config, {}) if config is None or isinstance(config, str) else (None, dict(config))


def _list(uris: str | Sequence[str]) -> tuple[str, ...]:
    return (uris,) if isinstance(uris, str) else tuple(uris)
