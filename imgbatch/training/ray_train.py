"""Ray: the shell of fine-tuning on Ray Train: workers, their lost ones replaced, and what they tell on the way."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed

from imgbatch import errors
from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import call_with_timeout
from imgbatch.config.sections import ClusterConfig
from imgbatch.errors import ClusterError, ImgbatchError, UsageError
from imgbatch.terminal import console
from imgbatch.training import trainer as trainer_module
from imgbatch.training.context import Fit, Place

_TICK_S = 0.25
_BACKENDS = ("gloo", "NCCL", "nccl")


def fit(
    job: Fit,
    *,
    gpus: bool,
    cpus_per_worker: int,
    limits: ClusterConfig,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Fine-tune on as many workers as the config says; the result is then in the run's folder.

    A worker that is lost takes the others along; all begin again at the last checkpoint, up to `train.max_failures` times.

    Args:
        tell: takes what the first worker tells, see `epochs`.

    Raises:
        ClusterError: workers were lost too often, told nothing for `cluster.stall_timeout_s` seconds, or Ray does not answer.
        ImgbatchError: what a worker raised.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    told = call_with_timeout(_queue, limits.call_s, "the start of an actor")
    ended: list[BaseException | None] = []
    with tempfile.TemporaryDirectory(prefix="imgbatch-train-", ignore_cleanup_errors=True) as folder:
        made = partial(_trainer, job, told, folder, gpus=gpus, cpus_per_worker=cpus_per_worker)
        trainer = call_with_timeout(made, limits.call_s, "TorchTrainer")  # it tells the cluster that it is used

        def run() -> None:
            try:
                trainer.fit()
                ended.append(None)
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is wanted
                ended.append(error)

        threading.Thread(target=run, name="train", daemon=True).start()
        failed = _follow(told, ended, limits, tell)
        call_with_timeout(lambda: told.shutdown(force=True), limits.call_s, "ray.kill")
    if ended[0] is not None:
        raise _what(failed, ended[0])


def _queue() -> Any:
    """Return what workers tell through."""
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0})


def _follow(
    told: Any,
    ended: list[BaseException | None],
    limits: ClusterConfig,
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Pass on what workers tell until all have ended; return what one said that failed."""
    from ray.exceptions import RayActorError
    from ray.util.queue import Empty

    last, failed = time.monotonic(), None
    while not ended:
        tick()
        try:
            fact = call_with_timeout(lambda: told.get(timeout=_TICK_S), limits.call_s, "ray.get")
        except RayActorError as gone:
            raise ClusterError(
                "the node is gone that passed on what workers tell: the same command goes on from the last checkpoint"
            ) from gone
        except Empty:
            if time.monotonic() - last > limits.stall_timeout_s:
                raise ClusterError(
                    f"training told nothing for {limits.stall_timeout_s:.0f} s (cluster.stall_timeout_s)"
                ) from None
            continue
        last = time.monotonic()
        if fact["kind"] == "failed":
            failed = fact
            if isinstance(error := _of_worker(fact), UsageError):  # which trying again would not mend, as Ray does
                raise error
        else:
            tell(fact)
    return failed


def _what(failed: dict[str, Any] | None, error: BaseException) -> BaseException:
    """Return the error of a worker as what it is, and that of Ray as one of the cluster's."""
    if failed:
        return _of_worker(failed)
    return ClusterError(
        f"workers were lost more often than train.max_failures allows: {str(error).strip().splitlines()[0][:300]}; "
        "the same command goes on from the last checkpoint"
    )


def _of_worker(failed: dict[str, Any]) -> Exception:
    """Return the error that a worker told of."""
    kind = getattr(errors, failed["error"], None)
    if kind is None:
        return RuntimeError(f"in a worker:\n{failed['message']}")
    error: Exception = kind(failed["message"])
    return error


def _trainer(job: Fit, told: Any, folder: str, *, gpus: bool, cpus_per_worker: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": float(cpus_per_worker)} | ({"GPU": 1.0} if gpus else {})
    return TorchTrainer(
        _work,
        train_loop_config={"job": job, "told": told, "gpus": gpus, "cpus": cpus_per_worker},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=job.config.workers, use_gpu=gpus, resources_per_worker=resources),
        # Checkpoints are ours, in the run's own store, so that they need no credentials but ours.
        run_config=RunConfig(
            name="imgbatch", storage_path=folder, failure_config=FailureConfig(max_failures=job.config.max_failures)
        ),
    )


def _work(given: dict[str, Any]) -> None:
    """Be a worker. Errors that trying again would not mend are told, since Ray wraps what is raised."""
    import ray.train
    import ray.train.torch

    console.log_in_worker()
    context, told = ray.train.get_context(), given["told"]
    world = context.get_world_size()
    torch.set_num_threads(given["cpus"])

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * world
        torch.distributed.all_gather_object(found, value)
        return found

    place = Place(
        rank=context.get_world_rank(),
        world=world,
        device=ray.train.torch.get_device(),
        wrap=_wrapped if world > 1 else lambda net: net,
        gather=gather if world > 1 else lambda value: [value],
        loaders=max(1, given["cpus"] - 1) if given["gpus"] else 0,
        tell=told.put if context.get_world_rank() == 0 else lambda fact: None,
    )
    try:
        trainer_module.run(given["job"], place)
    except Exception as error:
        if world > 1 and any(name in str(error) for name in _BACKENDS):
            raise  # another worker is gone, of which this one knows no more
        known = isinstance(error, ImgbatchError)
        message = str(error) if known else traceback.format_exc()
        told.put({"kind": "failed", "error": type(error).__name__ if known else "bug", "message": message})
        raise


def _wrapped(net: torch.nn.Module) -> torch.nn.Module:
    device = next(net.parameters()).device
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
