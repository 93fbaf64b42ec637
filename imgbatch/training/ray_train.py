"""Ray: fine-tuning on Ray Train: its workers, the replacement of lost ones, and their reports of progress."""

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
from imgbatch.concurrency import process
from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import call_with_timeout
from imgbatch.config.sections import ClusterConfig
from imgbatch.errors import ClusterError, ImgbatchError, UsageError
from imgbatch.terminal import console
from imgbatch.training import trainer
from imgbatch.training.context import FinetuneSpec, WorkerContext

_TICK_S = 0.25
_BACKENDS = ("gloo", "NCCL", "nccl")


def fit(
    spec: FinetuneSpec,
    *,
    gpus: bool,
    cpus_per_worker: int,
    limits: ClusterConfig,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Fine-tune on `train.workers` workers; the result is then in the run's folder.

    If a worker is lost, Ray Train ends the others too. All start again from the last checkpoint, up to `train.max_failures`
    times.

    Args:
        report: takes the reports of the first worker, see `WorkerContext.report`.

    Raises:
        ClusterError: workers were lost too often, made no progress for `cluster.stall_timeout_s` seconds, or Ray does not
            answer.
        ImgbatchError: the error of a worker.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    reports = call_with_timeout(_queue, limits.call_s, "the start of an actor")
    ended: list[BaseException | None] = []
    with tempfile.TemporaryDirectory(prefix="imgbatch-train-", ignore_cleanup_errors=True) as folder:
        create = partial(_torch_trainer, spec, reports, folder, gpus=gpus, cpus_per_worker=cpus_per_worker)
        torch_trainer = call_with_timeout(
            create, limits.call_s, "TorchTrainer"
        )  # its constructor makes a call to the cluster

        def run() -> None:
            try:
                torch_trainer.fit()
                ended.append(None)
            except BaseException as error:  # noqa: BLE001 - it is raised in the calling thread
                ended.append(error)

        threading.Thread(target=run, name="train", daemon=True).start()
        failure = _follow(reports, ended, limits, report)
        call_with_timeout(lambda: reports.shutdown(force=True), limits.call_s, "ray.kill")
    if ended[0] is not None:
        raise _error_of(failure, ended[0])


def _queue() -> Any:
    """Return the queue of the workers' reports."""
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0})


def _follow(
    reports: Any,
    ended: list[BaseException | None],
    limits: ClusterConfig,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Pass on the reports of the workers until all have ended; return the failure that one of them reported."""
    from ray.exceptions import RayActorError
    from ray.util.queue import Empty

    last_report, failure = time.monotonic(), None
    while not ended:
        tick()
        try:
            fact = call_with_timeout(lambda: reports.get(timeout=_TICK_S), limits.call_s, "ray.get")
        except RayActorError as actor_error:
            raise ClusterError(
                "the node with the queue of the workers' reports is lost: run the same command again to resume from the last "
                "checkpoint"
            ) from actor_error
        except Empty:
            if time.monotonic() - last_report > limits.stall_timeout_s:
                raise ClusterError(
                    f"no progress from training workers for {limits.stall_timeout_s:.0f} s (cluster.stall_timeout_s)"
                ) from None
            continue
        last_report = time.monotonic()
        if fact["kind"] == "failed":
            failure = fact
            if isinstance(error := _of_worker(fact), UsageError):  # Ray would retry, which cannot help
                raise error
        else:
            report(fact)
    return failure


def _error_of(failure: dict[str, Any] | None, error: BaseException) -> BaseException:
    """Return the error that a worker reported; without one, a ClusterError with the error of Ray."""
    if failure:
        return _of_worker(failure)
    return ClusterError(
        f"workers were lost more often than train.max_failures allows: {str(error).strip().splitlines()[0][:300]}; "
        "run the same command again to resume from the last checkpoint"
    )


def _of_worker(failure: dict[str, Any]) -> Exception:
    """Return the error that a worker reported."""
    kind = getattr(errors, failure["error"], None)
    if kind is None:
        return RuntimeError(f"in a worker:\n{failure['message']}")
    error: Exception = kind(failure["message"])
    return error


def _torch_trainer(spec: FinetuneSpec, reports: Any, folder: str, *, gpus: bool, cpus_per_worker: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": float(cpus_per_worker)} | ({"GPU": 1.0} if gpus else {})
    return TorchTrainer(
        _work,
        train_loop_config={"spec": spec, "reports": reports, "gpus": gpus, "cpus": cpus_per_worker},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=spec.config.workers, use_gpu=gpus, resources_per_worker=resources),
        # Checkpoints are not Ray's: they are in the run's store, so that they need no other credentials.
        run_config=RunConfig(
            name="imgbatch", storage_path=folder, failure_config=FailureConfig(max_failures=spec.config.max_failures)
        ),
    )


def _work(options: dict[str, Any]) -> None:
    """Run a worker. Its error is reported before it is raised, since Ray wraps exceptions.

    Args:
        options: `train_loop_config`.
    """
    import ray.train
    import ray.train.torch

    console.log_in_worker()
    ray_context, reports = ray.train.get_context(), options["reports"]
    rank, world_size = ray_context.get_world_rank(), ray_context.get_world_size()
    torch.set_num_threads(options["cpus"])
    process.keep_freed_memory()

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(values, value)
        return values

    context = WorkerContext(
        rank=rank,
        world_size=world_size,
        device=ray.train.torch.get_device(),
        wrap=_wrapped if world_size > 1 else lambda net: net,
        gather=gather if world_size > 1 else lambda value: [value],
        loader_processes=max(1, options["cpus"] - 1) if options["gpus"] else 0,
        report=reports.put if rank == 0 else lambda fact: None,
    )
    try:
        trainer.run(options["spec"], context)
    except Exception as error:
        if world_size > 1 and any(name in str(error) for name in _BACKENDS):
            raise  # another worker was lost: the error of this one is only a consequence
        is_ours = isinstance(error, ImgbatchError)
        message = str(error) if is_ours else traceback.format_exc()
        reports.put({"kind": "failed", "error": type(error).__name__ if is_ours else "bug", "message": message})
        raise


def _wrapped(net: torch.nn.Module) -> torch.nn.Module:
    device = next(net.parameters()).device
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
