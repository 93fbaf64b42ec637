"""A real Airflow for the recipe in deploy/airflow, with SQLite, in a folder of its own; a command, like Airflow's own CLI."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from tests.conftest import ROOT, clean_environment, free_ports
from tests.deploy.conftest import DEPLOY, RayHead

RECIPE = DEPLOY / "airflow"
AIRFLOW_BIN = ROOT / ".venv-deploy" / "bin"
DAG_ID = "imgbatch_nightly"
_TASK_PROCESS = re.compile(r"airflow worker -- [0-9a-f-]{36}")


@dataclass(frozen=True)
class AirflowHome:
    """A folder with a database and the recipe's DAG."""

    place: Path
    head: RayHead
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

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

    @property
    def output(self) -> str:
        """What Airflow's commands printed."""
        return self._log.read_text()

    @property
    def _log(self) -> Path:
        return self.place / "commands.log"

    def start(self, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command of Airflow's CLI in a session of its own."""
        with self._log.open("a") as log:  # not a pipe, which would be full at some time
            process = subprocess.Popen(
                [str(AIRFLOW_BIN / "airflow"), *words], cwd=self.place, env={**self.environment, **variables}, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        """End all that runs here, and the processes that it started."""
        for process in self.started:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()

    def run(self, *words: str, timeout: float = 240) -> int:
        """Run a command of Airflow's CLI; return its exit code."""
        return self.start(*words).wait(timeout=timeout)

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query to Airflow's database."""
        with sqlite3.connect(f"file:{self.place / 'airflow.db'}?mode=ro", uri=True) as database:
            database.row_factory = sqlite3.Row
            found = [dict(row) for row in database.execute(query)]
        database.close()
        return found

    def tries(self, day: str = "") -> dict[str, tuple[int, str]]:
        """Return the number of tries and the state of each task of the DAG run of a logical date; of all without one."""
        rows = self.rows(
            "select task_id, try_number, task_instance.state from task_instance join dag_run using (run_id) "
            f"where logical_date like '{day.replace('T', ' ')[:19]}%'"
        )
        return {row["task_id"]: (row["try_number"], row["state"]) for row in rows}

    def texts(self) -> str:
        """Return all files that Airflow wrote, the database among them, as text."""
        written = [path for path in self.place.rglob("*") if path.is_file() and "dags" not in path.parts]
        return "\n".join(path.read_bytes().decode("latin-1") for path in written)


class Standalone:
    """A running `airflow standalone`, and its API."""

    def __init__(self, home: AirflowHome) -> None:
        self.home = home
        api, worker_logs, trigger_logs = free_ports(3)
        self._url, self._token = f"http://127.0.0.1:{api}", ""
        self.process = home.start(
            "standalone",
            AIRFLOW__API__HOST="127.0.0.1", AIRFLOW__API__PORT=str(api), AIRFLOW__API__BASE_URL=self._url,
            AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT=str(worker_logs),
            AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT=str(trigger_logs),
            AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS="True", AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION="False",
            AIRFLOW__CORE__PARALLELISM="2",
        )  # fmt: skip

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer of the API as JSON."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def knows_the_dag(self) -> bool:
        """Return whether the API answers and the DAG was read."""
        with suppress(OSError):
            self._token = self.request("GET", "/auth/token")["access_token"]
            self.request("GET", f"/api/v2/dags/{DAG_ID}")
            return True
        return False

    def trigger(self, day: str) -> str:
        """Start a run of the DAG for a logical date; return its id."""
        return str(self.request("POST", f"/api/v2/dags/{DAG_ID}/dagRuns", {"logical_date": day})["dag_run_id"])

    def mark_as_failed(self, run_id: str, task_id: str) -> None:
        """Mark a running task as failed, as a person does in the web interface: Airflow ends its process."""
        path = f"/api/v2/dags/{DAG_ID}/dagRuns/{quote(run_id)}/taskInstances/{task_id}"
        self.request("PATCH", path, {"new_state": "failed"})

    def task_processes(self) -> list[psutil.Process]:
        """Return the processes that execute tasks; their supervisors are not among them."""
        return [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if any(_TASK_PROCESS.match(word) for word in words_of(process))
        ]


def words_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; an empty one if the process has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def in_airflow(code: str, *given: object) -> Any:
    """Run code in Airflow's environment, where `o` is the operator's module and `given` the arguments; return its `result`."""
    head = "import json, sys\nimport imgbatch_operator as o\ngiven = json.loads(sys.argv[1])\n"
    command = [str(AIRFLOW_BIN / "python"), "-c", f"{head}{code}\nprint(json.dumps(result))", json.dumps(given)]
    with tempfile.TemporaryDirectory() as home:  # Airflow writes its configuration there
        environment = {"AIRFLOW_HOME": home, "PYTHONPATH": str(RECIPE), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            command, cwd=home, env={**clean_environment(), **environment}, capture_output=True, text=True
        )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
