"""Blocks of images through decode and network: the right label for the right image, whatever its company."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgbatch.config.sections import Config, StorageConfig
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import ConfigError, ModelError
from imgbatch.evaluation.training_images import content_hash
from imgbatch.inference.messages import events_alone, fatal, note, received, split_events, stream_end, with_events
from imgbatch.inference.timing import Timed
from imgbatch.inference.worker import Classify, LabelImages, Work, decode_block
from imgbatch.ledger.listing_pages import page_name
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Pixels, Prediction, run_in_batches
from imgbatch.models.runtimes.torch_runtime import TorchRuntime
from imgbatch.models.self_check import SelfCheckError
from imgbatch.schema import LISTING, RESULTS
from imgbatch.sources.base import StreamEnd
from imgbatch.storage.stores import Folder, Stores
from tests.unit.pictures import encode, scene

BATCH = 4
SIDE = 16


class MeanColour:
    """A network in ten lines: the logits are 20 times the mean of each channel."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, pixels: Pixels) -> Prediction:
        return run_in_batches(pixels, BATCH, self.forward, k=3)

    def forward(self, batch: Pixels) -> Prediction:
        self.sizes.append(len(batch))
        logits = 20 * batch.mean(axis=(1, 2)) / 255
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        ids = np.argsort(-scores, axis=1).astype(np.int32)
        return Prediction(ids, np.take_along_axis(scores, ids, 1).astype(np.float32))

    def facts(self) -> dict[str, Any]:
        return {"device": "cpu", "batch_size": BATCH}


@pytest.fixture
def work(tmp_path: Path) -> Callable[[list[bytes]], Work]:
    """Return the work on these files, listed."""

    def make(files: list[bytes]) -> Work:
        for number, content in enumerate(files):
            (tmp_path / f"{number:02d}.jpg").write_bytes(content)
        rows = [{"uri": str(tmp_path / f"{number:02d}.jpg")} for number in range(len(files))]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=LISTING), sink)
        stores = Stores(StorageConfig(), {})
        listing = Folder(stores, str(tmp_path / "listing"))
        listing.put(page_name(0), sink.getvalue())
        preprocess = Preprocess(height=SIDE, width=SIDE, resize=(SIDE,))
        model = Model(
            name="mean", digest="0" * 64, labels=("red", "green", "blue"), preprocess=preprocess, network=list
        )
        return Work(stores, listing, WorkerConfig.of(Config()), model)

    return make


def through(work: Work, numbers: list[int], network: MeanColour) -> pa.Table:
    """Return the rows that the operator of a CPU machine gives for these images."""
    (block,) = LabelImages(work, lambda _: network)(pa.table({"index": np.array(numbers)}))
    return received(block)[0]


def pictures(count: int) -> list[bytes]:
    """Return lossless files."""
    return [encode(scene(SIDE, SIDE, seed=number), "PNG") for number in range(count)]


@pytest.mark.parametrize("rows", [1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH - 1])
def test_padding_changes_no_label_and_no_score(work: Callable[[list[bytes]], Work], rows: int) -> None:
    network = MeanColour()
    found = through(work(pictures(rows)), list(range(rows)), network)
    by_hand = MeanColour().forward(np.stack([scene(SIDE, SIDE, seed=number) for number in range(rows)]))
    assert set(network.sizes) == {BATCH}, "every forward pass has one size"
    assert found["label_id"].to_pylist() == by_hand.ids[:, 0].tolist()
    assert np.allclose(found["score"].to_numpy(), by_hand.scores[:, 0])
    assert [row[1]["label_id"] for row in found["top_k"].to_pylist()] == by_hand.ids[:, 1].tolist()
    assert len(set(by_hand.ids[:, 0])) > 1 or rows < 3


def test_a_reject_shifts_no_neighbour(work: Callable[[list[bytes]], Work]) -> None:
    files = pictures(9)
    whole = through(work(files), list(range(9)), MeanColour())
    for bad in (0, 3, 8):
        files[bad] = b"no image"
    found = through(work(files), list(range(9)), MeanColour())
    kept = [number for number in range(9) if number not in (0, 3, 8)]
    assert found.take(kept).select(["label", "score", "top_k"]) == whole.take(kept).select(["label", "score", "top_k"])
    refused = found.take([0, 3, 8])
    assert refused["reason"].to_pylist() == ["not_an_image"] * 3
    assert refused["label"].null_count == refused["top_k"].null_count == refused["answer"].null_count == 3
    assert found.schema == RESULTS


def test_a_block_of_rejects_alone(work: Callable[[list[bytes]], Work]) -> None:
    network = MeanColour()
    found = through(work([b"", b"text"]), [0, 1], network)
    assert found["reason"].to_pylist() == ["empty", "not_an_image"]
    assert found.schema == RESULTS and network.sizes == []


def test_two_operators_return_the_same_rows_as_one(work: Callable[[list[bytes]], Work]) -> None:
    job = work([*pictures(5), b"", *pictures(2)])
    together = through(job, list(range(8)), MeanColour())
    classify = Classify(job, lambda _: MeanColour())
    (pixels,) = decode_block(pa.table({"index": np.arange(8)}), job)
    for size in (1, 3, 8):
        blocks = [received(block)[0] for start in range(0, 8, size) for block in classify(pixels.slice(start, size))]
        assert pa.concat_tables(blocks) == together


def test_rows_have_a_hash_of_the_bytes_if_requested(work: Callable[[list[bytes]], Work]) -> None:
    files = [*pictures(3), b"", b"no image", pictures(1)[0]]
    job = work(files)
    assert through(job, list(range(6)), MeanColour())["content_hash"].null_count == 6
    asked = replace(job, config=replace(job.config, content_hash=True))
    found = through(asked, list(range(6)), MeanColour())
    assert found["content_hash"].to_pylist() == [content_hash(content) for content in files]
    assert found.schema == RESULTS and found.drop_columns("content_hash") == through(
        job, list(range(6)), MeanColour()
    ).drop_columns("content_hash")
    (pixels,) = decode_block(pa.table({"index": np.arange(6)}), asked)
    (labelled,) = Classify(asked, lambda _: MeanColour())(pixels)
    assert received(labelled)[0] == found, "on two operators too"


def test_numbers_need_not_be_consecutive(work: Callable[[list[bytes]], Work]) -> None:
    job = work(pictures(9))
    whole = through(job, list(range(9)), MeanColour())
    assert through(job, [1, 4, 8], MeanColour()) == whole.take([1, 4, 8])


def test_an_error_in_a_worker_is_raised_on_the_driver(work: Callable[[list[bytes]], Work]) -> None:
    def fail(_: Work) -> MeanColour:
        raise ModelError("the weights do not fit")

    for operator in (LabelImages(work(pictures(1)), fail), LabelImages(work(pictures(1)), lambda _: 1 / 0)):  # type: ignore[arg-type,return-value]
        (block,) = operator(pa.table({"index": np.array([0])}))
        with pytest.raises((ModelError, RuntimeError)) as raised:
            received(block)
        assert isinstance(raised.value, ModelError) or "ZeroDivisionError" in str(raised.value)


def test_a_worker_reports_facts_and_durations(work: Callable[[list[bytes]], Work]) -> None:
    (block,) = LabelImages(work(pictures(1)), lambda _: MeanColour())(pa.table({"index": np.array([0])}))
    rows, notes, _ = received(block)
    assert len(rows) == 1
    facts = {key: value for note in notes for key, value in note.items()}
    assert facts["batch_size"] == BATCH and min(facts[f"{stage}_s"] for stage in ("fetch", "decode", "classify")) >= 0
    assert json.dumps(facts)


def test_waiting_for_bytes_counts_as_fetching_and_decoding_does_not() -> None:
    now = 0.0

    def fetched() -> Iterator[int]:
        nonlocal now
        for number in range(3):
            now += 2.0
            yield number

    timed = Timed(fetched(), clock=lambda: now)
    for _ in timed:
        now += 5.0  # decoding
    assert timed.seconds == 6.0


def test_cpu_tasks_beside_gpus_report_their_seconds_through_the_classifier(work: Callable[[list[bytes]], Work]) -> None:
    job = work(pictures(2))
    (pixels,) = decode_block(pa.table({"index": np.arange(2)}), job)
    (block,) = Classify(job, lambda _: MeanColour())(pixels)
    facts = {key for note in received(block)[1] for key in note}
    assert {"fetch_s", "decode_s", "classify_s"} <= facts


def test_a_worker_whose_model_gives_wrong_answers_labels_nothing_and_reports_its_node(
    work: Callable[[list[bytes]], Work],
) -> None:
    def fail(_: Work) -> MeanColour:
        asked.append(1)
        raise SelfCheckError("its logits differ")

    job, asked = replace(work(pictures(2)), node=lambda: "node-id"), list[int]()
    classify = Classify(job, fail)
    (pixels,) = decode_block(pa.table({"index": np.arange(2)}), job)
    for operator, block in (
        (LabelImages(job, fail), pa.table({"index": np.arange(2)})),
        (classify, pixels),
        (classify, pixels),
    ):
        (found,) = operator(block)
        rows, (note,), _ = received(found)
        assert len(rows) == 0 and note["left_out"]["node-id"]["why"] == "its logits differ"
    assert len(asked) == 2, "a worker does not try again"


def test_events_come_after_the_rows_and_leave_no_trace_in_them(work: Callable[[list[bytes]], Work]) -> None:
    (block,) = LabelImages(work([*pictures(2), b""]), lambda _: MeanColour())(pa.table({"index": np.arange(3)}))
    rows, events = split_events(block)
    assert rows.schema == RESULTS and rows["index"].to_pylist() == [0, 1, 2] and len(events) == 2
    end = StreamEnd(number=7, last_offset=512, whole=True)
    again = with_events(rows, stream_end(end), note({"a": 1}), note({"b": [2]}))
    assert again.column_names[-1] == "event" and again["index"].to_pylist() == [0, 1, 2, None, None, None]
    assert received(again) == (rows, [{"a": 1}, {"b": [2]}], [end])
    assert received(with_events(rows)) == received(rows) == (rows, [], [])
    assert received(events_alone(note({}))) == (RESULTS.empty_table(), [{}], [])


def test_no_message_of_an_image_is_taken_for_an_event(work: Callable[[list[bytes]], Work]) -> None:
    (block,) = LabelImages(work([b""]), lambda _: MeanColour())(pa.table({"index": np.array([0])}))
    rows = received(block).rows
    at = rows.schema.get_field_index("message")
    hostile = rows.set_column(at, "message", pa.array([fatal(ModelError("not an error"))]))
    assert received(with_events(hostile)) == (hostile, [], [])


def test_an_error_while_decoding_passes_through_the_second_operator(work: Callable[[list[bytes]], Work]) -> None:
    job, network = work(pictures(2)), MeanColour()
    (failed,) = decode_block(pa.table({"index": np.array([0])}), replace(job, version="0.0.0"))
    (good,) = decode_block(pa.table({"index": np.array([1])}), job)
    for batch in (failed, pa.concat_tables([good, failed], promote_options="default")):  # as Ray may batch them
        (block,) = Classify(job, lambda _: network)(batch)
        with pytest.raises(ConfigError, match="install one version"):
            received(block)
    assert network.sizes == []


def test_a_tar_that_was_read_is_reported_through_the_second_operator(work: Callable[[list[bytes]], Work]) -> None:
    job = work(pictures(3))
    (pixels,) = decode_block(pa.table({"index": np.arange(3)}), job)
    end = StreamEnd(number=7, last_offset=512, whole=True)
    images = received(pixels).rows
    batch = pa.concat_tables(
        [with_events(images.slice(0, 2), stream_end(end)), with_events(images.slice(2))], promote_options="default"
    )
    (block,) = Classify(job, lambda _: MeanColour())(batch)
    (expected,) = Classify(job, lambda _: MeanColour())(pixels)
    assert received(block).rows == received(expected).rows and received(block).ends == [end]


def test_a_node_with_another_version_is_a_usage_error(work: Callable[[list[bytes]], Work]) -> None:
    older = replace(work(pictures(1)), version="0.0.0")
    (block,) = LabelImages(older, lambda _: MeanColour())(pa.table({"index": np.array([0])}))
    with pytest.raises(ConfigError, match="install one version"):
        received(block)


def test_nan_scores_are_an_error(work: Callable[[list[bytes]], Work]) -> None:
    network = MeanColour()
    broken = lambda pixels: Prediction(network(pixels).ids, np.full((len(pixels), 3), np.nan, np.float32))  # noqa: E731
    broken.facts = network.facts
    (block,) = LabelImages(work(pictures(2)), lambda _: broken)(pa.table({"index": np.array([0, 1])}))
    with pytest.raises(ModelError, match="not finite"):
        received(block)


def test_a_network_that_does_not_fit_into_memory_runs_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("injected")
            return pixels.mean((2, 3))

    preprocess = Preprocess(height=SIDE, width=SIDE, resize=(SIDE,), mean=(0.0,) * 3, std=(1.0,) * 3)
    model = Model(name="flat", digest="0", labels=("red", "green", "blue"), preprocess=preprocess, network=Flat)
    runtime = TorchRuntime(model, k=2, batch_size=16, device="cpu", dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    prediction = runtime(pixels)
    assert runtime.facts()["batch_size"] == 2
    assert (prediction.ids[:, 0] == pixels.mean((1, 2)).argmax(1)).all()
