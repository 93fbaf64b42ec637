"""Labels joined with true classes: the right class for the right image in any order, and no image omitted silently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config.sections import SourceConfig, StorageConfig
from imgbatch.errors import AuditError, BudgetError, InputError, ModelError
from imgbatch.evaluation.evaluation import Evaluation, compared
from imgbatch.evaluation.examples import Examples, examples
from imgbatch.evaluation.ground_truth import GroundTruth
from imgbatch.evaluation.labelled_inputs import Resolver
from imgbatch.evaluation.predictions import PREDICTIONS, LabelReader
from imgbatch.evaluation.training_images import TrainingImages
from imgbatch.inference.label_columns import answer_columns
from imgbatch.ledger.part_file import Footer, encode
from imgbatch.models import imagenet, taxonomy
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Prediction
from imgbatch.report.evaluation import page
from imgbatch.report.parts import Picture, Shown, shown
from imgbatch.schema import LABELS, LISTING, REJECTS, TAR, with_carried
from imgbatch.sources.labelled import OBJECT_OF, TABLE_OF, TRUTH, Columns
from imgbatch.sources.recognise import Source
from imgbatch.storage.stores import Folder, Stores

FRUIT = ("Gala", "Fuji", "Lime", "<b>Fig & co</b>", "Plum", "Kiwi")
TREE = b"label,kind\nGala,Apple\nFuji,Apple\nLime,Citrus\n<b>Fig & co</b>,Fig\nPlum,Stone\nKiwi,Berry\n"
N = 40


def make_model(labels: tuple[str, ...] = FRUIT, tree: bytes | None = TREE) -> Model:
    """Return a model that is not run."""
    preprocess = Preprocess(height=8, width=8, resize=(8,))
    tree_of_labels = tree and taxonomy.read(tree, "t.csv", labels)
    return Model(
        name="s3://m/fruit",
        digest="0" * 64,
        labels=labels,
        preprocess=preprocess,
        taxonomy=tree_of_labels or None,
        network=list,
    )


def predicted(model: Model, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Return rows of labels/ for N images, all classes named in each, and all probabilities."""
    scores = np.random.default_rng(seed).dirichlet(np.full(len(model.labels), 0.4), N).astype(np.float32)
    ids = np.argsort(-scores, 1).astype(np.int32)
    above = None
    if model.taxonomy:
        (kinds, _) = model.taxonomy.roll_up(scores)
        above = Prediction(kinds.argmax(1)[:, None].astype(np.int32), kinds.max(1)[:, None])
    columns = answer_columns(Prediction(ids, np.take_along_axis(scores, ids, 1), above=above), model, 0.5)
    columns |= {"uri": pa.array([f"s3://b/{i}.jpg" for i in range(N)]), "model": pa.array([model.reference] * N)}
    columns |= {"run_id": pa.array(["r"] * N)}
    rows = [columns.get(field.name, pa.nulls(N, field.type)) for field in LABELS]
    return pa.Table.from_arrays(rows, schema=LABELS), scores


def write(
    folder: Folder,
    rows: pa.Table,
    *,
    rejected: list[dict[str, Any]] = [],  # noqa: B006
    fingerprint: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Write an output as the main job does."""
    footer = Footer("r", fingerprint).metadata()
    for number, part in enumerate((rows.slice(0, 25), rows.slice(25)), 1):
        folder.put(f"labels/part-{number:08d}.parquet", encode(part, footer))
    blank = {"stage": "decode", "run_id": "r", "model": "m"}
    refused = pa.Table.from_pylist([{**blank, **row} for row in rejected], schema=REJECTS)
    folder.put("rejects/part-00000001.parquet", encode(refused, footer))


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """A folder for an output."""
    return Folder(Stores(StorageConfig(), {}), str(tmp_path / "out"))


def ground_truth(labels: list[str], model: Model) -> GroundTruth:
    """Return the true classes of all images, listed in another order than that of the table, the first one twice."""
    listed = [{"uri": f"s3://b/{i}.jpg", TRUTH: labels[i]} for i in reversed(range(N))]
    schema = pa.schema([*LISTING, (TRUTH, pa.string())])
    batches = [pa.RecordBatch.from_pylist(listed[start : start + 7], schema=schema) for start in range(0, N, 7)]
    return GroundTruth([*batches, pa.RecordBatch.from_pylist(listed[:1], schema=schema)], model.labels)


def test_each_label_is_compared_with_the_true_class_of_its_image(output: Folder) -> None:
    model = make_model()
    rows, scores = predicted(model)
    write(output, rows)
    classes = np.random.default_rng(5).integers(0, len(FRUIT), N)
    truths = ground_truth([FRUIT[number] for number in classes], model)
    reader = LabelReader(truths, model, temperature=2.0)
    table = pa.concat_tables(reader.take(output.folder("labels")))
    reader.require_all(output)
    assert len(truths) == N and table.select(PREDICTIONS.names).cast(PREDICTIONS).num_rows == N
    by_uri = {row["uri"]: row for row in table.to_pylist()}
    for image in range(N):
        row = by_uri[f"s3://b/{image}.jpg"]
        assert row["truth"] == FRUIT[classes[image]]
        assert row["right"] == (scores[image].argmax() == classes[image])
        assert row["right_in_top5"] == (classes[image] in np.argsort(-scores[image])[:5])
        if row["answer"] is None:
            assert row["answer_right"] is None
        else:
            assert row["answer_right"] == (row["answer"] in model.taxonomy.path(classes[image]))  # type: ignore[union-attr]
    figures = Evaluation.of(reader).public()
    assert figures["n"] == N and figures["top1"] == pytest.approx((scores.argmax(1) == classes).mean())
    kinds = np.array(model.taxonomy.levels[0].node_of)  # type: ignore[union-attr]
    predicted_kinds = model.taxonomy.roll_up(scores)[0].argmax(1)  # type: ignore[union-attr]
    assert figures["levels"] == {
        "kind": pytest.approx((predicted_kinds == kinds[classes]).mean()),
        "label": figures["top1"],
    }
    assert reader.scores.score_before is not None and np.allclose(
        np.sort(reader.scores.score_before), np.sort((scores**2).max(1) / (scores.astype(float) ** 2).sum(1)), rtol=1e-3
    )
    assert sum(each["share"] for each in figures["answers"]) == pytest.approx(1)
    json.dumps(figures, allow_nan=False)


HASHES = np.random.default_rng(9).integers(0, 2**64, N, dtype=np.uint64)


def evaluated(output: Folder, images: TrainingImages | None, *, hashed: bool = True) -> Evaluation:
    """Return the figures of an output in which the first 20 images have a right label, and image i has HASHES[i]."""
    model = make_model()
    rows, scores = predicted(model)
    if hashed:
        rows = rows.append_column("content_hash", pa.array(HASHES))
    write(output, rows, fingerprint={"output.content_hash": True} if hashed else {})
    best = scores.argmax(1)
    reader = LabelReader(
        ground_truth([FRUIT[(number + (i >= 20)) % 6] for i, number in enumerate(best)], model), model, None, images
    )
    list(reader.take(output.folder("labels")))
    return Evaluation.of(reader)


def test_images_seen_in_training_are_counted_and_the_others_scored_separately(output: Folder) -> None:
    evaluation = evaluated(output, TrainingImages.of(HASHES[:15], HASHES[30:32]))
    seen = evaluation.public()["seen"]
    assert seen.pop("unseen") == {
        "n": 23,
        "top1": pytest.approx(5 / 23),
        "interval_95": pytest.approx([0.097, 0.419], abs=1e-3),
    }
    assert seen == {"trained": 15, "selected": 2, "compared": N, "share_of_hashes": 1.0}
    assert str(evaluation.seen) == "15 of 40 images were trained on, 2 of 40 images were used to select the model"
    text = page(evaluation, None, None, *nothing(evaluation))
    warning = text[text.index('class="notice warning"') : text.index("<table>")]
    assert "15 of 40 images were trained on" in warning and "top-1 of 23 images" in warning and "21.74%" in warning


def test_if_all_or_no_images_were_seen_there_is_no_separate_figure(output: Folder) -> None:
    all_seen = evaluated(output.folder("a"), TrainingImages.of(HASHES, HASHES[:0]))
    none_seen = evaluated(output.folder("b"), TrainingImages.of(HASHES[:0], ~HASHES))
    for evaluation, trained in ((all_seen, N), (none_seen, 0)):
        seen = evaluation.public()["seen"]
        assert (seen["trained"], seen["selected"], seen["unseen"]) == (trained, 0, None)
    assert 'class="notice warning"' in page(
        all_seen, None, None, *nothing(all_seen)
    ) and 'class="notice warning"' not in page(none_seen, None, None, *nothing(none_seen))
    assert "None of 40 images was trained on." in page(none_seen, None, None, *nothing(none_seen))
    against = page(none_seen, all_seen, compared(none_seen, all_seen), *nothing(none_seen))
    assert "s3://m/fruit: None of 40" in against and "s3://m/fruit: 40 of 40 images were trained on" in against


@pytest.mark.parametrize(("images", "hashed"), [(None, True), (TrainingImages.of(HASHES, HASHES), False)])
def test_without_hashes_it_is_not_known_which_images_were_seen(
    output: Folder, images: TrainingImages | None, hashed: bool
) -> None:
    evaluation = evaluated(output, images, hashed=hashed)
    assert evaluation.seen is None and evaluation.public()["seen"] is None
    assert "Whether the model was trained on them is not known" in page(evaluation, None, None, *nothing(evaluation))


def test_with_a_sample_of_hashes_the_images_in_the_sample_are_scored_separately(output: Folder) -> None:
    images = TrainingImages.of(HASHES[:20], HASHES[:0], limit=10)
    evaluation = evaluated(output, images)
    inside = np.less_equal(HASHES, images.hashes[-1])
    others = int(np.count_nonzero(inside[20:]))
    seen = evaluation.public()["seen"]
    assert seen["compared"] == 10 + others and seen["trained"] == round(10 * N / (10 + others))
    assert seen["unseen"]["n"] == others and seen["unseen"]["top1"] == 0, "the images 20 to 39 have a wrong label"


def test_two_models_with_different_class_orders_are_compared_image_by_image(output: Folder) -> None:
    first, second = make_model(), make_model(labels=FRUIT[::-1], tree=None)
    rows, scores = predicted(first)
    truths = ground_truth([FRUIT[number] for number in scores.argmax(1)], first)  # the first model is always right
    evaluations = []
    for model, place in ((first, output.folder("a")), (second, output.folder("b"))):
        table = rows if model is first else predicted(model, seed=1)[0]
        write(place, table)
        reader = LabelReader(truths, model)
        list(reader.take(place.folder("labels")))
        evaluations.append(Evaluation.of(reader))
    comparison = compared(*evaluations)
    assert evaluations[0].metrics.top1.value == 1 and comparison["only_second_right"] == 0
    assert comparison["top1"]["difference"] == pytest.approx(1 - evaluations[1].metrics.top1.value)
    assert comparison["only_first_right"] == round((1 - evaluations[1].metrics.top1.value) * N)


def test_missing_labels_are_refused_with_the_names_of_the_rejects(output: Folder) -> None:
    model = make_model()
    rows, scores = predicted(model)
    truths = ground_truth([FRUIT[number] for number in scores.argmax(1)], model)
    refused = [{"uri": "s3://b/39.jpg", "reason": "truncated"}, {"uri": "s3://else/x.jpg", "reason": "empty"}]
    write(output, rows.slice(0, N - 1), rejected=refused)
    reader = LabelReader(truths, model)
    list(reader.take(output.folder("labels")))
    with pytest.raises(
        BudgetError, match=r"39 of 40 images were scored; 1 has no label: s3://b/39.jpg \(truncated\)\."
    ):
        reader.require_all(output)
    write(output, rows.slice(0, N - 2), rejected=refused)
    reader = LabelReader(truths, model)
    list(reader.take(output.folder("labels")))
    with pytest.raises(AuditError, match="1 are in neither labels/ nor rejects/"):
        reader.require_all(output)


def test_labels_of_another_model_are_refused(output: Folder) -> None:
    model = make_model()
    rows, scores = predicted(model)
    other = rows.set_column(rows.schema.get_field_index("model"), LABELS.field("model"), pa.array(["x@123"] * N))
    write(output, other)
    with pytest.raises(ModelError, match="was written by x@123, not by s3://m/fruit@0000"):
        list(
            LabelReader(ground_truth([FRUIT[n] for n in scores.argmax(1)], model), model).take(output.folder("labels"))
        )


def test_the_page_escapes_names_and_shows_the_worst_mistakes(output: Folder) -> None:
    model = make_model()
    rows, scores = predicted(model)
    write(output, rows)
    reader = LabelReader(
        ground_truth([FRUIT[(number + 3) % 6] for number in scores.argmax(1)], model), model, temperature=1.5
    )
    list(reader.take(output.folder("labels")))
    ours = Evaluation.of(reader)
    chosen = examples(ours.scores, ours.metrics.confusion)
    images = reader.images(output.folder("labels"), chosen.images)
    assert images.column_names == ["uri", "size", "etag", "last_modified"] and len(images) == len(chosen.images)
    uris = images["uri"].to_pylist()
    shown_images = shown(chosen.images.tolist(), uris, dict.fromkeys(uris, Picture(b"RIFF")))
    errors = [shown_images[number].uri for number in chosen.errors.tolist()]
    assert errors == [f"s3://b/{number}.jpg" for number in np.argsort(-scores.max(1), kind="stable")[: len(errors)]]
    text = page(ours, ours, compared(ours, ours), chosen, shown_images)
    assert "<b>Fig" not in text and "&lt;b&gt;Fig &amp; co&lt;/b&gt;" in text
    assert text.count("<script") == 1 and text.count('class="thumbnail"') >= len(errors) + len(chosen.pairs)
    assert text == page(ours, ours, compared(ours, ours), chosen, shown_images), "a page is deterministic"
    assert "http://" not in text and "https://" not in text, "the page has no links"
    without = page(ours, None, None, chosen, shown(chosen.images.tolist(), images["uri"].to_pylist(), None))
    assert "<img" not in without and "not shown:" not in without and "s3://b/" in without


def nothing(evaluation: Evaluation) -> tuple[Examples, dict[int, Shown]]:
    """Return the examples of an evaluation, none of which has a picture."""
    chosen = examples(evaluation.scores, evaluation.metrics.confusion)
    return chosen, {number: Shown("s3://b/x.jpg", None) for number in chosen.images.tolist()}


def resolver_of(output: Folder, *tars: str) -> Resolver:
    """Return a resolver for these tars of one input."""
    source = Source("s3://b", "folder", lambda: iter(()))
    resolver = Resolver(output.stores, [source], [Columns()], SourceConfig())
    schema = pa.schema([*LISTING, (TRUTH, pa.string()), (OBJECT_OF, pa.int32()), (TABLE_OF, pa.int32())])
    resolver.add(pa.Table.from_pylist([{"uri": tar, "container": TAR, OBJECT_OF: 0} for tar in tars], schema=schema))
    return resolver


def test_members_of_tars_have_their_class_in_their_rows(output: Folder) -> None:
    model = make_model()
    rows, scores = predicted(model)
    labels = [FRUIT[number] for number in scores.argmax(1)]
    uris = pa.array([f"s3://b/{'one.tar' if i < 20 else 'two.tar'}#{i}.jpg" for i in range(N)])
    rows = rows.set_column(0, LABELS.field("uri"), uris)
    rows = rows.append_column("input_cls", pa.array([labels[i] + "\n" if i % 2 else None for i in range(N)]))
    wrong = [json.dumps({"label": labels[i] if i else FRUIT[labels[0] == FRUIT[0]]}) for i in range(N)]
    rows = rows.append_column("input_json", pa.array([None if i % 2 else wrong[i] for i in range(N)]))
    write(output, rows.slice(0, N - 1))
    listed = [{"uri": f"s3://b/{name}.tar", "container": TAR} for name in ("one", "two", "three")]
    schema = pa.schema([*LISTING, (TRUTH, pa.string())])
    refused = REJECTS.append(pa.field("input_cls", pa.string())).append(pa.field("input_json", pa.string()))
    row = {"uri": "s3://b/three.tar", "stage": "fetch", "reason": "corrupt", "run_id": "r", "model": "m"}
    footer = Footer("r", {}).metadata()
    output.put("rejects/part-00000001.parquet", encode(pa.Table.from_pylist([row], schema=refused), footer))

    names = ["s3://b/one.tar", "s3://b/two.tar"]
    truths = GroundTruth([pa.RecordBatch.from_pylist(listed[:2], schema=schema)], model.labels)
    truths.add_members(output, resolver_of(output, *names))
    reader = LabelReader(truths, model)
    list(reader.take(output.folder("labels")))
    reader.require_all(output)
    assert len(truths) == N - 1 and np.count_nonzero(~reader.scores.right) == 1

    names.append("s3://b/three.tar")
    truths = GroundTruth([pa.RecordBatch.from_pylist(listed, schema=schema)], model.labels)
    truths.add_members(output, resolver_of(output, *names))
    reader = LabelReader(truths, model)
    list(reader.take(output.folder("labels")))
    with pytest.raises(BudgetError, match=r"39 of 40 images were scored; 1 has no label: s3://b/three.tar \(corrupt\)"):
        reader.require_all(output)
    output.put("rejects/part-00000001.parquet", encode(REJECTS.empty_table(), footer))
    truths = GroundTruth([pa.RecordBatch.from_pylist(listed, schema=schema)], model.labels)
    with pytest.raises(AuditError, match=r"three\.tar is listed, but .* has no row of it"):
        truths.add_members(output, resolver_of(output, *names))


def test_a_tar_may_be_in_a_folder_with_a_hash_in_its_name(output: Folder) -> None:
    model = make_model()
    rows, scores = predicted(model)
    rows = rows.set_column(0, LABELS.field("uri"), pa.array([f"/run#3/a.tar#{i}#{i}.jpg" for i in range(N)]))
    labels = [FRUIT[number] for number in scores.argmax(1)]
    write(
        output, rows.append_column("input_cls", pa.array(labels)).append_column("input_json", pa.nulls(N, pa.string()))
    )
    schema = pa.schema([*LISTING, (TRUTH, pa.string())])
    truths = GroundTruth(
        [pa.RecordBatch.from_pylist([{"uri": "/run#3/a.tar", "container": TAR}], schema=schema)], model.labels
    )
    truths.add_members(output, resolver_of(output, "/run#3/a.tar"))
    reader = LabelReader(truths, model)
    list(reader.take(output.folder("labels")))
    reader.require_all(output)
    assert len(truths) == N and reader.scores.right.all()


@pytest.mark.parametrize(
    ("labels", "tree", "message"),
    [
        ((*FRUIT[:-1], "Sloe"), None, "the labels contain the label 'Kiwi', which s3://m/fruit does not have"),
        (FRUIT, TREE.replace(b"kind", b"family"), "other levels than s3://m/fruit has now, family, label"),
        (
            FRUIT,
            TREE.replace(b"Citrus", b"Agrumes"),
            "the labels contain the kind 'Citrus', which s3://m/fruit does not have",
        ),
        (FRUIT, b"label,kind,all\n" + b"".join(line + b",Fruit\n" for line in TREE.splitlines()[1:]), "other levels"),
    ],
)
def test_tables_with_other_labels_or_levels_than_those_of_the_model_are_refused(
    output: Folder, labels: tuple[str, ...], tree: bytes | None, message: str
) -> None:
    rows, _ = predicted(make_model())
    write(output, rows)
    current = make_model(labels, tree)
    with pytest.raises(ModelError, match=re.escape(message)):
        list(LabelReader(ground_truth([labels[0]] * N, current), current).take(output.folder("labels")))


def test_a_second_model_without_a_class_is_refused() -> None:
    schema = with_carried(LISTING, pa.schema([(TRUTH, pa.string())]))
    listed = [{"uri": f"s3://b/{i}.jpg", TRUTH: label} for i, label in enumerate(("Lime", "Gala", "Lime"))]
    truths = GroundTruth([pa.RecordBatch.from_pylist(listed, schema=schema)], FRUIT)
    assert truths.of(make_model(FRUIT[::-1], None)).tolist() == [3, 5, 3]
    with pytest.raises(InputError, match=r"2 images of 1 class that s3://m/fruit does not have: 'Lime'"):
        truths.of(make_model(("Gala", "Fuji"), None))


def test_true_classes_by_wordnet_id_work_with_models_that_name_classes_and_models_that_use_ids() -> None:
    names, ids = make_model(imagenet.imagenet_labels(), None), make_model(imagenet.imagenet_synsets(), None)
    schema = pa.schema([*LISTING, (TRUTH, pa.string())])
    rows = [
        {"uri": f"{number}.jpg", TRUTH: name} for number, name in enumerate(["n02123045", "n01440764", "n15075141"])
    ]
    for first, second in ((names, ids), (ids, names)):
        truths = GroundTruth([pa.RecordBatch.from_pylist(rows, schema=schema)], first.labels)
        assert truths.of(first).tolist() == truths.of(second).tolist() == [281, 0, 999]


def test_true_classes_by_number_are_those_of_the_first_model() -> None:
    first, second = make_model(), make_model(labels=FRUIT[::-1], tree=None)
    schema = pa.schema([*LISTING, (TRUTH, pa.string())])
    rows = [{"uri": f"{number}.jpg", TRUTH: str(number)} for number in (5, 0, 2)]
    truths = GroundTruth([pa.RecordBatch.from_pylist(rows, schema=schema)], first.labels, "index")
    assert (truths.of(first).tolist(), truths.of(second).tolist()) == ([5, 0, 2], [0, 5, 3])
