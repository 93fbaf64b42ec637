"""A real Airflow for the recipe in deploy/airflow, with SQLite, in a folder of its own; a command, like Airflow's own CLI."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, Ended, clean_environment
from tests.deploy.conftest import DEPLOY, RayHead

RECIPE = DEPLOY / "airflow"
AIRFLOW_BIN = ROOT / ".venv-deploy" / "bin"
DAG_ID = "imgbatch_nightly"


@dataclass(frozen=True)
class AirflowHome:
    """A folder with a database and the recipe's DAG."""

    place: Path
    head: RayHead

    @property
    def environment(self) -> dict[str, str]:
        """What Airflow's processes need. No credentials of the store are among it."""
        host, _, port = self.head.dashboard.removeprefix("http://").partition(":")
        connection = {"conn_type": "http", "host": host, "port": int(port), "password": self.head.token}
        environment = {name: value for name, value in clean_environment().items() if not name.startswith("AIRFLOW")}
        return {
            **environment,
            "PATH": f"{AIRFLOW_BIN}{os.pathsep}{os.environ['PATH']}",
            "AIRFLOW_HOME": str(self.place),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW_CONN_IMGBATCH_RAY": json.dumps(connection),
        }

    def write_recipe(self, **edits: str) -> None:
        """Copy the recipe as a team does: the operator as it is, and the DAG with new values in lines marked EDIT."""
        folder = self.place / "dags"
        folder.mkdir(exist_ok=True)
        shutil.copy(RECIPE / "imgbatch_operator.py", folder)
        text = (RECIPE / "imgbatch_nightly.py").read_text()
        for name, value in edits.items():
            text, count = re.subn(
                rf"^{name} = .*  # EDIT.*$", lambda _, n=name, v=value: f"{n} = {v}", text, flags=re.M
            )
            assert count == 1, name
        (folder / "imgbatch_nightly.py").write_text(text)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command of Airflow's CLI in a session of its own."""
        return subprocess.Popen(
            [str(AIRFLOW_BIN / "airflow"), *words], cwd=self.place, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *words: str, timeout: float = 240) -> Ended:
        """Run a command of Airflow's CLI."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=timeout)
        return Ended(process.returncode, output, "")

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query to Airflow's database."""
        with sqlite3.connect(f"file:{self.place / 'airflow.db'}?mode=ro", uri=True) as database:
            database.row_factory = sqlite3.Row
            found = [dict(row) for row in database.execute(query)]
        database.close()
        return found

    def tries(self) -> dict[str, tuple[int, str]]:
        """Return the number of tries and the state of each task, over all DAG runs."""
        rows = self.rows("select task_id, try_number, state from task_instance")
        return {row["task_id"]: (row["try_number"], row["state"]) for row in rows}

    def texts(self) -> str:
        """Return all files that Airflow wrote, the database among them, as text."""
        written = [path for path in self.place.rglob("*") if path.is_file() and "dags" not in path.parts]
        return "\n".join(path.read_bytes().decode("latin-1") for path in written)


def probe(code: str, *arguments: str) -> Any:
    """Run code in Airflow's environment, where the recipe can be imported; return what it prints as JSON."""
    environment = {**clean_environment(), "PYTHONPATH": str(RECIPE), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [str(AIRFLOW_BIN / "python"), "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
