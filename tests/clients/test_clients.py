"""The tables of a real run, opened by the programs that people read Parquet with: all rows, nested columns included.

What is expected was read by pyarrow, part by part, in the environment of the jobs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Output, missing

Client = Callable[[str], Any]
Row = Mapping[str, Any]
TABLES = pytest.mark.parametrize("table", ["labels", "rejects"])


def plain(value: Any) -> Any:
    """Return a value as JSON has it: what is a list or a structure to a client becomes list and dict, times become texts."""
    if hasattr(value, "asDict"):  # a row of Spark
        value = value.asDict()
    if hasattr(value, "tolist"):  # an array of NumPy
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, datetime):  # all of them are UTC; Spark gives those of its session, without a zone
        return value.replace(tzinfo=None).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    return None if value is None or value != value or str(value) == "NaT" else value


def timeless(text: Any) -> Any:
    """Return an expected value in the form that `plain` gives."""
    if isinstance(text, str) and text.endswith("+00:00") and len(text) >= 25:
        return datetime.fromisoformat(text).replace(tzinfo=None).isoformat()
    return text


def require_rows(rows: Iterable[Row], output: Output, table: str, *, without: tuple[str, ...] = ()) -> None:
    """Require that these are the rows of a table, but for some columns."""
    expected = [
        {name: timeless(value) for name, value in row.items() if name not in without} for row in output.expected[table]
    ]
    found = [plain(row) for row in rows]
    assert sorted(found, key=lambda row: row["uri"]) == sorted(expected, key=lambda row: row["uri"])


@TABLES
def test_pyarrow_dataset(client: Client, output: Output, table: str) -> None:
    dataset = client("pyarrow.dataset").dataset(output.table(table))
    assert dataset.count_rows() == len(output.expected[table])
    require_rows(dataset.to_table().to_pylist(), output, table)


@TABLES
def test_pandas(client: Client, output: Output, table: str) -> None:
    frame = client("pandas").read_parquet(output.table(table), dtype_backend="pyarrow")
    require_rows(frame.to_dict("records"), output, table)
    assert len(client("pandas").read_parquet(output.table(table))) == len(output.expected[table])


@TABLES
def test_polars(client: Client, output: Output, table: str) -> None:
    polars = client("polars")
    require_rows(polars.read_parquet(f"{output.table(table)}/*.parquet").to_dicts(), output, table)
    lazy = polars.scan_parquet(output.table(table))
    assert lazy.select(polars.len()).collect().item() == len(output.expected[table])
    if table == "labels":
        best = lazy.select(polars.col("top_k").list.first().struct.field("label"), "uri").collect().to_dicts()
        assert {row["uri"]: row["label"] for row in best} == {
            row["uri"]: row["label"] for row in output.expected[table]
        }


@TABLES
def test_duckdb(client: Client, output: Output, table: str) -> None:
    with client("duckdb").connect() as connection:
        files = f"read_parquet('{output.table(table)}/*.parquet')"
        # Through Arrow: DuckDB's own `fetchall` needs another package for a timestamp with a zone.
        require_rows(connection.sql(f"from {files}").to_arrow_table().to_pylist(), output, table)
        if table == "labels":
            query = f"select count(*) from (select unnest(levels) as level from {files}) where level.level = 'warmth'"
            assert connection.sql(query).fetchall() == [(len(output.expected[table]),)]


@TABLES
def test_datasets_of_hugging_face(client: Client, output: Output, table: str, tmp_path: Path) -> None:
    files = f"{output.table(table)}/*.parquet"
    found = client("datasets").load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    require_rows(list(found), output, table)


@pytest.fixture(scope="session")
def spark() -> Any:
    """A Spark in this process."""
    if shutil.which("java") is None:
        missing("java")
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        missing("pyspark")
    options = {"spark.ui.enabled": "false", "spark.sql.session.timeZone": "UTC", "spark.driver.host": "127.0.0.1"}
    session = SparkSession.builder.master("local[1]").config(map=options).getOrCreate()
    yield session
    session.stop()


def spark_type(kind: Any) -> str:
    """Return the name that Spark has for a type of Arrow."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return f"struct<{','.join(f'{field.name}:{spark_type(field.type)}' for field in kind)}>"
    if pa.types.is_nested(kind):
        return f"array<{spark_type(kind.value_type)}>"
    if pa.types.is_timestamp(kind):
        return "timestamp"
    names = {"int32": "int", "int64": "bigint", "bool": "boolean", "date32[day]": "date"}
    return names.get(str(kind), str(kind))


def test_spark_with_a_schema_without_the_embedding(spark: Any, output: Output) -> None:
    """Spark 4 has no float16; everything else it reads."""
    import pyarrow.dataset as ds
    from pyspark.sql.functions import col, explode

    fields = [field for field in ds.dataset(output.table("labels")).schema if field.name != "embedding"]
    schema = ", ".join(f"{field.name} {spark_type(field.type)}" for field in fields)
    frame = spark.read.schema(schema).parquet(str(output.table("labels")))
    require_rows(frame.collect(), output, "labels", without=("embedding",))
    levels = frame.select(explode(col("levels")).alias("each")).where("each.level = 'warmth'")
    assert levels.count() == len(output.expected["labels"])


def test_spark_without_a_schema(spark: Any, output: Output) -> None:
    require_rows(spark.read.parquet(str(output.table("rejects"))).collect(), output, "rejects")


@TABLES
def test_spark_on_an_output_without_embeddings(spark: Any, table: str) -> None:
    """And an old one, whose seals have a row group."""
    old = Path(__file__).parents[1] / "data" / "v0.1.0" / "output" / table
    rows = spark.read.parquet(str(old)).collect()
    assert len(rows) == {"labels": 22, "rejects": 1}[table]
    if table == "labels":
        assert all(row.top_k[0].label == row.label and row.levels[-1].label == row.label for row in rows)


def test_spark_reads_embeddings_as_bytes(spark: Any, output: Output) -> None:
    import numpy as np

    rows = spark.read.schema("uri string, embedding array<binary>").parquet(str(output.table("labels"))).collect()
    expected = {row["uri"]: row["embedding"] for row in output.expected["labels"]}
    assert {row.uri: np.frombuffer(b"".join(row.embedding), "<f2").tolist() for row in rows} == expected
