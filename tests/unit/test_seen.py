"""Which images a model has seen: hashes of bytes, the file in the model directory, the sample of a large set."""

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


def test_the_hash_is_blake2b_and_every_byte_counts() -> None:
    assert content_hash(b"abc") == 0xD8BB14D833D59559  # b2sum --length=64
    content = bytes(range(256)) * 40
    changed = {content_hash(content[:at] + b"\xff\xfe" + content[at + 2 :]) for at in (0, 5_000, len(content) - 2)}
    assert len({content_hash(content), content_hash(content + b"\0"), content_hash(content[:-1]), *changed}) == 6


def test_hashes_are_spread_evenly_as_a_sample_by_value_needs_it() -> None:
    found = np.array([content_hash(str(number).encode()) for number in range(20_000)], np.uint64)
    counts = np.bincount((found >> np.uint64(60)).astype(int), minlength=16)
    assert len(counts) == 16 and abs(counts - 1250).max() < 150  # 4 standard deviations


def test_an_image_that_was_trained_on_and_held_out_counts_as_trained_on() -> None:
    known = TrainingImages.of(hashes(30, 10, 10), hashes(20, 30))
    assert known.hashes.tolist() == [10, 20, 30] and known.proportion == 1.0
    assert known.codes(hashes(30, 20, 10, 11, 0, 2**64 - 1)).tolist() == [TRAINED, SELECTED, TRAINED, *[UNSEEN] * 3]


def test_a_model_that_has_seen_nothing_knows_no_image() -> None:
    known = TrainingImages.read(TrainingImages.of(hashes(), hashes()).parquet())
    assert known.codes(hashes(0, 5, 2**64 - 1)).tolist() == [UNSEEN] * 3


def test_of_many_images_the_lowest_hashes_are_kept_and_are_an_exact_sample() -> None:
    trained, selected, others = many(5_000), many(1_000, 1), many(3_000, 2)
    known = TrainingImages.of(trained, selected, limit=600)
    assert len(known.hashes) == 600 and known.proportion == pytest.approx(0.1, rel=0.15)
    for group, code in ((trained, TRAINED), (selected, SELECTED), (others, UNSEEN)):
        codes = known.codes(group)
        assert set(codes.tolist()) == {code, NOT_COMPARED}
        assert (codes != NOT_COMPARED).tolist() == (group <= known.hashes[-1]).tolist()
    scored = np.concatenate([trained[:2_000], selected[:500], others])
    found = Seen.of(known.codes(scored), known)
    assert found is not None and found.compared < 700 and str(found).startswith("about ")
    assert found.trained == pytest.approx(2_000, rel=0.25) and found.selected == pytest.approx(500, rel=0.5)


def test_none_of_a_sample_is_said_of_the_images_that_could_be_looked_up() -> None:
    known = TrainingImages(hashes(5), np.array([True]), up_to=2**63 - 1)
    found = Seen.of(known.codes(hashes(1, 2, 2**63, 2**64 - 1)), known)
    assert str(found) == "none of 2 images looked up was trained on" and known.proportion == 0.5
    assert found is not None and found.public() == {
        "trained": 0, "selected": 0, "compared": 2, "share_of_hashes": 0.5,
    }  # fmt: skip
    assert Seen.of(known.codes(hashes(2**63)), known) is None, "no image could be looked up: not known"


def test_what_the_base_has_seen_the_new_model_has_seen() -> None:
    base = TrainingImages.of(hashes(1, 2), hashes(3, 4))
    known = TrainingImages.of(hashes(4, 5), hashes(2, 6), base)
    assert known.codes(hashes(1, 2, 3, 4, 5, 6, 7)).tolist() == [
        TRAINED, TRAINED, SELECTED, TRAINED, TRAINED, SELECTED, UNSEEN,
    ]  # fmt: skip
    sampled = TrainingImages.of(many(5_000), hashes(), limit=500)
    both = TrainingImages.of(many(300, 1), hashes(), sampled, limit=10_000)
    assert both.up_to == sampled.up_to and both.hashes.max() <= sampled.up_to
    assert (both.codes(many(5_000)) == sampled.codes(many(5_000))).all()
    smaller = TrainingImages.of(many(300, 1), hashes(), sampled, limit=200)
    assert len(smaller.hashes) == 200 and smaller.up_to < sampled.up_to


def test_the_file_says_the_same_when_it_is_read_again_and_duckdb_reads_it(tmp_path: Path) -> None:
    import duckdb

    known = TrainingImages.of(many(400), many(100, 1), limit=300)
    (tmp_path / training_images.FILE).write_bytes(known.parquet())
    again = TrainingImages.read((tmp_path / training_images.FILE).read_bytes())
    assert (
        again.up_to == known.up_to and (again.hashes == known.hashes).all() and (again.trained == known.trained).all()
    )
    with duckdb.connect() as connection:
        rows = connection.sql(
            f"select role, count(*) from '{tmp_path / training_images.FILE}' group by role"
        ).fetchall()
    assert dict(rows) == {"trained": int(known.trained.sum()), "selected": int((~known.trained).sum())}


def test_a_million_hashes_take_eight_megabytes() -> None:
    known = TrainingImages.of(many(1_100_000), hashes())
    assert len(known.hashes) == training_images.LIMIT and len(known.parquet()) < 8.2e6
    assert known.proportion == pytest.approx(10 / 11, rel=0.01)


def test_a_model_without_the_file_is_one_of_which_nothing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = Stores(StorageConfig())
    place = Folder(stores, str(tmp_path / "model"))
    (tmp_path / "best.pth").write_bytes(b"weights")
    for name in ("timm:resnet50", "efficientnet_lite0", place.uri, str(tmp_path / "gone"), str(tmp_path / "best.pth")):
        assert training_images.of_model(name, stores) is None
    assert not caplog.records
    place.put(training_images.FILE, TrainingImages.of(hashes(7), hashes()).parquet())
    known = training_images.of_model(place.uri, stores)
    assert known is not None and known.codes(hashes(7)).tolist() == [TRAINED]


def foreign(**columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no parquet", foreign(hash=[1], role=["trained"]), foreign(hash=["a"], role=["trained"]), foreign(role=["trained"])],
    ids=["empty", "text", "no limit", "no number", "no hash"],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_named_and_nothing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / training_images.FILE).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert training_images.of_model(str(tmp_path), Stores(StorageConfig())) is None
    assert f"{tmp_path / training_images.FILE} cannot be read" in caplog.text


def test_training_writes_what_it_learned_from_and_what_it_held_out() -> None:
    images = pa.table({"content_hash": pa.array([11, 12, None, 14, 15], pa.uint64())})
    written = artifacts.training_images(images, np.array([0, 3]), np.array([1, 3]), None)
    assert TrainingImages.read(written).codes(hashes(11, 12, 14, 15)).tolist() == [TRAINED, SELECTED, TRAINED, UNSEEN]
