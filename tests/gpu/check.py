"""Check on a machine with CUDA what machines without a GPU cannot show. It needs no Ray and no network.

    python -m tests.gpu.check                 # at most eight minutes
    python -m tests.gpu.check --device cpu    # walks through the same code; the speed means nothing

It needs torch, torchvision, timm, and the packages of imgbatch except Ray. It compares labels in 16 bits on the GPU with those
in 32 bits on the CPU, makes the GPU run out of memory, measures images per second by batch size with and without
overlapped copies, and fine-tunes for one epoch. It prints a table, and exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import timm
import torch

from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError
from imgbatch.models import builtin
from imgbatch.models.imagenet import imagenet_labels
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.torch_runtime import TorchRuntime
from imgbatch.training import network

Pixels = npt.NDArray[np.uint8]

AGREEMENT = 0.97
"""The smallest proportion of images whose label in 16 bits is that in 32 bits."""
_RANDOM_WEIGHTS = "tf_efficientnet_lite0"
_BALLAST_LEFT = 1 << 30
_TOO_MANY = 4_096
_WARM_UP, _AT_ONCE = 3, 8
_CLEAR = 0.1  # standard deviations of the logits
_CLASSES, _BATCHES = 8, 8
_PASSED = {True: "yes", False: "NO", None: ""}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    check: str
    result: str
    passed: bool | None = None
    """None: a measurement, which cannot fail."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done: the defaults suit a GPU."""

    images: int = 256
    batches: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    seconds: float = 4.0
    """For each measurement."""
    training: int = 2_048
    """The number of images of the epoch."""


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, and print each line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="few images and short measurements")
    flags = parser.parse_args(arguments)
    if flags.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device on this machine", file=sys.stderr)
        return 2
    size = Size(24, (8, 16), 0.2, 64) if flags.small else Size()
    failed = 0
    print("| check | result | passed |\n| --- | --- | --- |")
    for row in rows(flags.device, size):
        print(f"| {row.check} | {row.result} | {_PASSED[row.passed]} |", flush=True)
        failed += row.passed is False
    return int(failed > 0)


def rows(device: str, size: Size) -> Iterator[Row]:
    """Yield the lines of the table. A check that raises does not end the others."""
    started = time.monotonic()
    model = load_model()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    yield Row("device", f"{name}; torch {torch.__version__}, timm {timm.__version__}; {model.name}")
    pixels = pictures(size.images, model.preprocess)
    checks: list[Callable[[], Iterable[Row]]] = [
        lambda: agreement(model, pixels, device),
        lambda: throughput(model, device, size),
        lambda: [one_epoch(model, device, size)],
        lambda: [out_of_memory(model, pixels, device)],  # the last one, since the state after it is less certain
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - the other checks go on
            yield Row(type(error).__name__, " ".join(str(error).split())[:300], passed=False)
    yield Row("all checks", f"{time.monotonic() - started:.0f} s")


def load_model() -> Model:
    """Return the built-in model; without the package of its weights, the same network with random weights."""
    try:
        return builtin.efficientnet_lite0(ModelConfig())
    except ModelError:
        return random_model()


def random_model() -> Model:
    """Return a network with random weights, whose statistics of batch normalisation and mean logits are those of pictures.

    Otherwise all images would get nearly the same logits.
    """
    preprocess = Preprocess.from_timm(builtin.LITE0_CFG)

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        net: torch.nn.Module = timm.create_model(_RANDOM_WEIGHTS, pretrained=False)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # a cumulative mean
        net.train()
        with torch.no_grad():
            pixels = torch.from_numpy(pictures(64, preprocess)).permute(0, 3, 1, 2)
            net(network.normalise(pixels, preprocess))
            network.head_of(net).bias -= net.eval()(network.normalise(pixels, preprocess)).mean(0)
        return net

    return Model(
        name="random weights", digest="", labels=imagenet_labels(), preprocess=preprocess, network=build, features=1280
    )


def pictures(count: int, preprocess: Preprocess) -> Pixels:
    """Return pictures of smooth colours with sharp edges: (count, H, W, 3)."""
    draws = np.random.default_rng(0)
    height, width = preprocess.height, preprocess.width
    y, x = np.mgrid[0:height, 0:width]
    result = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        picture = np.zeros((height, width, 3))
        for _ in range(6):
            angle, period, edge = draws.uniform(0, np.pi), draws.uniform(10, 200), draws.random() < 0.5
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + draws.uniform(0, 6))
            picture += (np.sign(wave) if edge else wave)[..., None] * draws.uniform(0, 1, 3)
        low, high = picture.min(), picture.max()
        result[number] = (picture - low) / (high - low) * 255
    return result


def agreement(model: Model, pixels: Pixels, device: str) -> Iterator[Row]:
    """Compare labels and logits on the device with those in float32 on the CPU.

    Pictures whose two best logits are nearly equal do not count: synthetic pictures have many of them, photos few.
    """
    expected = TorchRuntime(model, k=1, device="cpu", dtype="float32").logits(pixels)
    spread, best = float(expected.std()), np.sort(expected, axis=1)
    clear = best[:, -1] - best[:, -2] >= _CLEAR * spread
    torch.backends.cudnn.allow_tf32 = False  # otherwise float32 would have 10 bits of precision
    for dtype in ("float32", "bfloat16", "float16"):
        logits = TorchRuntime(model, k=1, device=device, dtype=dtype).logits(pixels)
        equal = float((logits.argmax(1) == expected.argmax(1))[clear].mean())
        difference = float(np.abs(logits - expected).max()) / spread
        text = (
            f"{equal:.1%} of {clear.sum()} labels; largest difference of a logit: {difference:.3f} standard deviations"
        )
        yield Row(f"labels in {dtype}", text, bool(np.isfinite(logits).all()) and equal >= AGREEMENT)
    torch.backends.cudnn.allow_tf32 = True


def out_of_memory(model: Model, pixels: Pixels, device: str) -> Row:
    """Run with batches that the memory does not suffice for; the labels have to be those of small batches."""
    expected = TorchRuntime(model, k=1, device=device, dtype="float32", batch_size=8)(pixels).ids
    runtime = TorchRuntime(model, k=1, device=device, dtype="float32", batch_size=_TOO_MANY)
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        ballast = torch.empty(max(0, free - _BALLAST_LEFT), dtype=torch.uint8, device=device)
    else:
        ballast = torch.empty(0)
        _raise_above(runtime, 16)
    try:
        found = runtime(pixels).ids
    finally:
        del ballast
        if device == "cuda":
            torch.cuda.empty_cache()
    text = (
        f"batches of {_TOO_MANY} became {runtime.batch_size}; {(found == expected).mean():.1%} of the labels are equal"
    )
    return Row("out of memory", text, runtime.batch_size < _TOO_MANY and bool((found == expected).mean() >= AGREEMENT))


def _raise_above(runtime: TorchRuntime, images: int) -> None:
    """Let a runtime on the CPU fail as one whose memory suffices for so many images."""
    forward = runtime._outputs

    def limited(batch: Pixels) -> tuple[torch.Tensor, ...]:
        if len(batch) > images:
            raise torch.OutOfMemoryError("injected")
        return forward(batch)

    runtime._outputs = limited  # type: ignore[method-assign]


def throughput(model: Model, device: str, size: Size) -> Iterator[Row]:
    """Measure images per second by batch size."""
    few = pictures(8, model.preprocess)
    for batch in size.batches:
        name = f"images/s, batches of {batch}"
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            runtime = TorchRuntime(model, k=5, device=device, batch_size=batch)
            result = rates(runtime, np.resize(few, (batch, *few.shape[1:])), size.seconds)
            yield Row(name, f"{result}; batches became {runtime.batch_size}" if runtime.batch_size < batch else result)
        except torch.OutOfMemoryError:
            yield Row(name, "out of memory")
            return


def rates(runtime: TorchRuntime, pixels: Pixels, seconds: float) -> str:
    """Measure the runtime, the same with overlapped copies, and the network alone, whose input is on the device."""
    batch = len(pixels)
    plain = per_second(lambda: runtime(pixels), batch, seconds)
    overlapped = overlapped_per_second(runtime, pixels, seconds)
    resident = torch.from_numpy(pixels).to(runtime.device)
    alone = per_second(lambda: _forward(runtime, resident), batch, seconds, runtime.device)
    used = f"; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if runtime.device.type == "cuda" else ""
    return f"{plain:,.0f}; copies overlapped: {overlapped:,.0f}; the network alone: {alone:,.0f}{used}"


def _forward(runtime: TorchRuntime, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        runtime._end_to_end(pixels)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()


def per_second(call: Callable[[], object], images: int, seconds: float, device: torch.device | None = None) -> float:
    """Return how many images per second the call processes, after a few calls that are not measured.

    Args:
        device: the call returns before the device has done its work; every few calls it is waited for.
    """
    for _ in range(_WARM_UP):
        call()
    _wait(device)
    started, calls = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for _ in range(_AT_ONCE if device is not None else 1):
            call()
            calls += 1
        _wait(device)
    return calls * images / (time.monotonic() - started)


def overlapped_per_second(runtime: TorchRuntime, pixels: Pixels, seconds: float) -> float:
    """Measure with two pinned buffers: while one batch is computed, the next one is copied in a second stream.

    On a CPU there are no streams: the same steps follow each other.
    """
    on_gpu = runtime.device.type == "cuda"
    source = torch.from_numpy(pixels)
    buffers = [torch.empty_like(source, pin_memory=on_gpu) for _ in range(2)]
    copying = torch.cuda.Stream() if on_gpu else None
    results: list[list[torch.Tensor]] = [[], []]
    done: list[torch.cuda.Event | None] = [None, None]
    turn = 0

    def step() -> None:
        nonlocal turn
        turn = 1 - turn
        if (event := done[turn]) is not None:
            event.synchronize()  # the batch before the last one: its buffer is free, and its results are there
        buffers[turn].copy_(source)
        with torch.inference_mode():
            if copying is None:
                outputs = runtime._end_to_end(buffers[turn])
            else:
                with torch.cuda.stream(copying):
                    batch = buffers[turn].to(runtime.device, non_blocking=True)
                computing = torch.cuda.current_stream()
                computing.wait_stream(copying)
                batch.record_stream(computing)
                outputs = runtime._end_to_end(batch)
            results[turn] = [output.to("cpu", non_blocking=True) for output in outputs[:-1]]
        if on_gpu:
            done[turn] = torch.cuda.Event()
            done[turn].record()  # type: ignore[union-attr]

    return per_second(step, len(pixels), seconds, runtime.device)


def one_epoch(model: Model, device: str, size: Size) -> Row:
    """Fine-tune for one epoch to tell apart kinds of pictures, with the network and the precision of `imgbatch train`."""
    batch = min(64, size.training // 4)
    on = torch.device(device)
    net = network.build(model, _CLASSES, pretrained=True, seed=0).to(on, memory_format=torch.channels_last)
    groups = network.trainable_groups(net, lr=2e-4, head_factor=10.0, decay=0.01, frozen=0)
    optimiser = torch.optim.AdamW(groups)
    kinds, random, batches = pictures(_CLASSES, model.preprocess).astype(np.int16), np.random.default_rng(1), []
    for _ in range(min(size.training // batch, _BATCHES)):
        classes = random.integers(_CLASSES, size=batch)
        tinted = (kinds[classes] + random.integers(-40, 40, (batch, 1, 1, 3), np.int16)).clip(0, 255).astype(np.uint8)
        batches.append((torch.from_numpy(tinted).permute(0, 3, 1, 2).to(on), torch.from_numpy(classes).to(on)))
    losses, started, counted = [], time.monotonic(), 0
    network.train_mode(net, pretrained=True)
    for step in range(size.training // batch):
        if step == _WARM_UP:
            started, counted = time.monotonic(), 0
        pixels, truths = batches[step % len(batches)]
        with network.autocast("auto", on):
            logits = net(network.normalise(pixels, model.preprocess))
        loss = torch.nn.functional.cross_entropy(logits.float(), truths)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))  # waits for the device
        counted += batch
    rate = counted / (time.monotonic() - started)
    text = f"{rate:,.0f} images/s in batches of {batch}; loss {losses[0]:.2f} to {losses[-1]:.2f}"
    return Row("one epoch of fine-tuning", text, bool(np.isfinite(losses).all()) and losses[-1] < losses[0])


if __name__ == "__main__":
    sys.exit(main())
