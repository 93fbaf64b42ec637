"""The images that a model has seen in training: hashes of bytes, the file in the model directory, the sample of a large set."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.evaluation import training_images
from imgbatch.evaluation.training_images import (
    NOT_COMPARED,
    SELECTED,
    TRAINED,
    UNSEEN,
    Seen,
    TrainingImages,
    content_hash,
)
from imgbatch.storage.stores import Folder, Stores
from imgbatch.training import artifacts


def hashes(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def many(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def test_the_hash_is_blake2b_of_all_bytes() -> None:
    assert content_hash(b"abc") == 0xD8BB14D833D59559  # b2sum --length=64
    content = bytes(range(256)) * 40
    changed = {content_hash(content[:at] + b"\xff\xfe" + content[at + 2 :]) for at in (0, 5_000, len(content) - 2)}
    assert len({content_hash(content), content_hash(content + b"\0"), content_hash(content[:-1]), *changed}) == 6


def test_hashes_are_uniformly_distributed() -> None:
    values = np.array([content_hash(str(number).encode()) for number in range(20_000)], np.uint64)
    counts = np.bincount((values >> np.uint64(60)).astype(int), minlength=16)
    assert len(counts) == 16 and abs(counts - 1250).max() < 150  # 4 standard deviations


def test_an_image_that_was_trained_on_and_held_out_counts_as_trained_on() -> None:
    images = TrainingImages.of(hashes(30, 10, 10), hashes(20, 30))
    assert images.hashes.tolist() == [10, 20, 30] and images.proportion == 1.0
    assert images.codes(hashes(30, 20, 10, 11, 0, 2**64 - 1)).tolist() == [TRAINED, SELECTED, TRAINED, *[UNSEEN] * 3]


def test_a_model_without_training_images_has_seen_no_image() -> None:
    images = TrainingImages.read(TrainingImages.of(hashes(), hashes()).parquet())
    assert images.codes(hashes(0, 5, 2**64 - 1)).tolist() == [UNSEEN] * 3


def test_the_lowest_hashes_of_many_images_are_an_exact_sample() -> None:
    trained, selected, others = many(5_000), many(1_000, 1), many(3_000, 2)
    images = TrainingImages.of(trained, selected, limit=600)
    assert len(images.hashes) == 600 and images.proportion == pytest.approx(0.1, rel=0.15)
    for group, code in ((trained, TRAINED), (selected, SELECTED), (others, UNSEEN)):
        codes = images.codes(group)
        assert set(codes.tolist()) == {code, NOT_COMPARED}
        assert (codes != NOT_COMPARED).tolist() == (group <= images.hashes[-1]).tolist()
    scored = np.concatenate([trained[:2_000], selected[:500], others])
    seen = Seen.of(images.codes(scored), images)
    assert seen is not None and seen.compared < 700 and str(seen).startswith("about ")
    assert seen.trained == pytest.approx(2_000, rel=0.25) and seen.selected == pytest.approx(500, rel=0.5)


def test_with_a_sample_none_is_reported_of_the_compared_images() -> None:
    images = TrainingImages(hashes(5), np.array([True]), up_to=2**63 - 1)
    seen = Seen.of(images.codes(hashes(1, 2, 2**63, 2**64 - 1)), images)
    assert str(seen) == "none of 2 images looked up was trained on" and images.proportion == 0.5
    assert seen is not None and seen.public() == {
        "trained": 0, "selected": 0, "compared": 2, "share_of_hashes": 0.5,
    }  # fmt: skip
    assert Seen.of(images.codes(hashes(2**63)), images) is None, "no image could be looked up: not known"


def test_a_model_has_seen_the_images_of_its_base_by_their_hashes() -> None:
    base = TrainingImages.of(hashes(1, 2), hashes(3, 4))
    images = TrainingImages.of(hashes(4, 5), hashes(2, 6), base)
    assert images.codes(hashes(1, 2, 3, 4, 5, 6, 7)).tolist() == [
        TRAINED, TRAINED, SELECTED, TRAINED, TRAINED, SELECTED, UNSEEN,
    ]  # fmt: skip
    sampled = TrainingImages.of(many(5_000), hashes(), limit=500)
    both = TrainingImages.of(many(300, 1), hashes(), sampled, limit=10_000)
    assert both.up_to == sampled.up_to and both.hashes.max() <= sampled.up_to
    assert (both.codes(many(5_000)) == sampled.codes(many(5_000))).all()
    smaller = TrainingImages.of(many(300, 1), hashes(), sampled, limit=200)
    assert len(smaller.hashes) == 200 and smaller.up_to < sampled.up_to


def test_the_file_can_be_read_again_also_by_duckdb(tmp_path: Path) -> None:
    import duckdb

    images = TrainingImages.of(many(400), many(100, 1), limit=300)
    (tmp_path / training_images.FILE).write_bytes(images.parquet())
    again = TrainingImages.read((tmp_path / training_images.FILE).read_bytes())
    assert (
        again.up_to == images.up_to
        and (again.hashes == images.hashes).all()
        and (again.trained == images.trained).all()
    )
    with duckdb.connect() as connection:
        rows = connection.sql(
            f"select role, count(*) from '{tmp_path / training_images.FILE}' group by role"
        ).fetchall()
    assert dict(rows) == {"trained": int(images.trained.sum()), "selected": int((~images.trained).sum())}


def test_a_million_hashes_take_eight_megabytes() -> None:
    images = TrainingImages.of(many(1_100_000), hashes())
    assert len(images.hashes) == training_images.LIMIT and len(images.parquet()) < 8.2e6
    assert images.proportion == pytest.approx(10 / 11, rel=0.01)


def test_the_training_images_of_a_model_without_the_file_are_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = Stores(StorageConfig())
    place = Folder(stores, str(tmp_path / "model"))
    (tmp_path / "best.pth").write_bytes(b"weights")
    for name in ("timm:resnet50", "efficientnet_lite0", place.uri, str(tmp_path / "gone"), str(tmp_path / "best.pth")):
        assert training_images.of_model(name, stores) is None
    assert not caplog.records
    place.put(training_images.FILE, TrainingImages.of(hashes(7), hashes()).parquet())
    images = training_images.of_model(place.uri, stores)
    assert images is not None and images.codes(hashes(7)).tolist() == [TRAINED]


def foreign(**columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no parquet", foreign(hash=[1], role=["trained"]), foreign(hash=["a"], role=["trained"]), foreign(role=["trained"])],
    ids=["empty", "text", "no limit", "no number", "no hash"],
)  # fmt: skip
def test_an_invalid_file_is_logged_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / training_images.FILE).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert training_images.of_model(str(tmp_path), Stores(StorageConfig())) is None
    assert f"{tmp_path / training_images.FILE} cannot be read" in caplog.text


def test_training_writes_trained_and_held_out_images() -> None:
    images = pa.table({"content_hash": pa.array([11, 12, None, 14, 15], pa.uint64())})
    written = artifacts.training_images(images, np.array([0, 3]), np.array([1, 3]), None)
    assert TrainingImages.read(written).codes(hashes(11, 12, 14, 15)).tolist() == [TRAINED, SELECTED, TRAINED, UNSEEN]
