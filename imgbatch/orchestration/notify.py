"""Effects: `notify.url`: one POST when a verb ends, however it ends, and one when a run will be late.

The URL is a secret, such as that of a Slack webhook: it is in no log, message or record.
"""

from __future__ import annotations

import html
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from imgbatch.config.results import NotifyConfig
from imgbatch.config.secrets import masked
from imgbatch.errors import EXIT_CODES, ImgbatchError
from imgbatch.ledger import run_record
from imgbatch.orchestration import end_line

log = logging.getLogger(__name__)

VARIABLE = "IMGBATCH_NOTIFY_URL"
_FORCED_S = 2.0  # after the limit of the orderly stop the process ends within 3 s
_MAX_MESSAGE = 1_000


class Notification:
    """Collects the facts of a verb, and posts them once. Without a URL nothing is posted."""

    def __init__(self, url: str, timeout_s: float, verb: str, output: str) -> None:
        self._url, self._timeout_s, self._verb = url, timeout_s, verb
        self._facts: Mapping[str, Any] = {"output": masked(output)} if output else {}
        self._thread = threading.current_thread()
        self._sent = False

    def take(self, facts: Mapping[str, Any]) -> None:
        """Take the facts of a run that has ended, for `run_record.on_finish`.

        In another thread, the limit of the orderly stop has ended the run, and the process ends soon: then they are posted.
        """
        self._facts = end_line.facts_of(facts)
        if threading.current_thread() is not self._thread:
            self.send(int(facts["exit_code"]), facts.get("error"), timeout_s=min(_FORCED_S, self._timeout_s))

    def send(self, exit_code: int, message: str | None, *, timeout_s: float | None = None) -> None:
        """Post the notification; a failure is logged. Only the first call has an effect."""
        if self._sent or not self._url:
            return
        self._sent = True
        content = json.loads(end_line.compose(self._verb, exit_code, self._facts, message))
        limit_s = timeout_s or self._timeout_s
        thread = self._start_post({"text": text_of(content), **content}, limit_s)
        thread.join(limit_s + 1)
        if thread.is_alive():
            log.warning("notify.url did not answer within %g s (notify.timeout_s)", limit_s)

    def send_late(self, late: Mapping[str, Any]) -> None:
        """Post that the run will be late, and do not wait for the answer.

        Args:
            late: the fact of run.json.
        """
        if self._url:
            content = {"event": "late", "verb": self._verb, **self._facts, **late}
            self._start_post({"text": text_of_late(content), **content}, self._timeout_s)

    def _start_post(self, content: Mapping[str, Any], timeout_s: float) -> threading.Thread:
        # In a thread: the timeouts of the library do not cover the resolution of the host's name.
        thread = threading.Thread(target=self._post, args=(content, timeout_s), daemon=True)
        thread.start()
        return thread

    def _post(self, content: Mapping[str, Any], timeout_s: float) -> None:
        import requests  # takes 0.1 s

        try:
            answer = requests.post(self._url, json=content, timeout=timeout_s, allow_redirects=False)
        except (requests.RequestException, ValueError, OSError) as error:  # its text has the URL
            log.warning("the notification could not be sent to notify.url: %s", type(error).__name__)
            return
        if not 200 <= answer.status_code < 300:
            log.warning("notify.url answered the notification with HTTP status %d", answer.status_code)


@contextmanager
def at_end(config: NotifyConfig, verb: str, output: str) -> Iterator[Notification]:
    """When the block ends, post its outcome to `notify.url`, if there is one."""
    url = config.url or os.environ.get(VARIABLE, "")
    notification = Notification(url, config.timeout_s, verb, output)
    with run_record.on_finish(notification.take):
        try:
            yield notification
        except ImgbatchError as error:
            notification.send(error.exit_code, str(error))
            raise
        except Exception as error:
            notification.send(1, f"{type(error).__name__}: {error}")
            raise
    notification.send(0, None)


def text_of(content: Mapping[str, Any]) -> str:
    """Return the notification as a text of Slack, in which &, < and > are escaped.

    Args:
        content: an end line.

    >>> counts = {"listed": 3000, "labelled": 2998, "rejected": 2}
    >>> text_of({"verb": "classify", "status": "succeeded", "exit_code": 0, "counts": counts, "output": "s3://out/labels"})
    'imgbatch classify succeeded: 3,000 images listed, 2,998 labelled, 2 rejected. s3://out/labels'
    >>> text_of({"verb": "classify", "status": "failed", "exit_code": 2, "message": "--model <x> is unknown", "retry": False})
    'imgbatch classify failed with exit code 2: --model &lt;x&gt; is unknown. To do: change the command.'
    """
    counts, code = content.get("counts") or {}, content["exit_code"]
    figures = ", ".join(f"{counts[name]:,} {word}" for name, word in _COUNTS.items() if counts.get(name) is not None)
    head = f"imgbatch {content['verb']} {content['status']}" + (f" with exit code {code}" if code else "")
    detail = content.get("message", "")[:_MAX_MESSAGE] if code else figures
    sentences = [f"{head}: {detail}" if detail else head]
    if code:
        action = next((entry.action for entry in EXIT_CODES if entry.code == code), "")
        sentences += [f"So far: {figures}"] * bool(figures) + [f"To do: {action}"] * bool(action)
    text = ". ".join(sentence.rstrip(".") for sentence in sentences)
    return html.escape(f"{text}. {content.get('output', '')}".replace("`", "").rstrip(), quote=False)


def text_of_late(content: Mapping[str, Any]) -> str:
    """Return the notification of a run that will be late as a text of Slack.

    >>> late = {"finish_by": "2026-11-29T06:00:00+00:00", "forecast": "2026-11-29T07:10:00+00:00"}
    >>> text_of_late({"verb": "classify", "output": "s3://out/labels", **late})
    'imgbatch classify will be late: run.finish_by is 2026-11-29 06:00 UTC, the forecast is 2026-11-29 07:10 UTC. s3://out/labels'
    """
    finish_by, forecast = (
        datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if text else "unknown"
        for text in (content["finish_by"], content["forecast"])
    )
    text = f"imgbatch {content['verb']} will be late: run.finish_by is {finish_by}, the forecast is {forecast}."
    return html.escape(f"{text} {content.get('output', '')}".rstrip(), quote=False)


_COUNTS = {"listed": "images listed", "labelled": "labelled", "rejected": "rejected"}
