"""Values: files of weights: their format, their tensors without wrappers, and names that fit a network.

Arbitrary pickles are never loaded.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imgbatch.decode.other_kinds import pointer
from imgbatch.errors import ModelError

State = Mapping[str, torch.Tensor]

WRAPPERS = (
    *("state_dict_ema", "model_ema", "state_dict", "model"),  # in timm's order: averaged weights come first
    *("model_state_dict", "model_state", "net", "network", "weights", "params"),
)
"""Keys of a checkpoint that may contain its state dict, in order of preference."""

_AVERAGED = ("state_dict_ema", "model_ema")

_OPTIONAL_BUFFERS = (
    *("num_batches_tracked", "n_averaged"),  # counters of training
    # Tables of indices that a network computes from its sizes when it is created.
    *("relative_position_index", "relative_coords_table", "attn_mask", "attention_bias_idxs"),
)
"""The last part of the names of buffers without effect at inference. They may be missing or left over."""

# Parts that torch.compile, FSDP and activation checkpointing insert into names, at any depth.
_INSERTED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# torchvision's DenseNet weights of 2017 have a dot that the current names do not have.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")

_MAGIC = {
    b"\x89HDF": "HDF5, as Keras writes it: only weights of PyTorch are read",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"%PDF": "a PDF",
}
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<error", b"<head")
_MAX_TEXT = 4096
_SHOWN = 3


def read(path: Path, where: str) -> tuple[State, list[str]]:
    """Return the tensors of a file of safetensors or of torch.save, and notes about where they were found.

    Raises:
        ModelError: the file is of another kind, truncated, a pickle with more than tensors, or not a state dict.
    """
    state, notes = _unwrap(_load(path, where), where)
    return with_current_names(state), notes


def with_current_names(state: State) -> State:
    """Return the tensors under the current names of the libraries."""
    return {_OLD_DENSENET.sub(r"\1\2.", name): value for name, value in state.items()}


def match_names(net: nn.Module, state: State) -> tuple[State, list[str]]:
    """Return the tensors under the network's names, and notes about the changes: prefixes are removed if all names then fit.

    If nothing fits, return the tensors under the candidate names that have most in common with the network's.
    """
    expected = net.state_dict()
    candidates = list(_name_candidates(state))
    for names, notes in candidates:
        if differing_names(net, names) == ([], []):
            return names, notes + _buffer_notes(expected, names)
    return max(candidates, key=lambda candidate: len(candidate[0].keys() & expected.keys()))[0], []


def differing_names(net: nn.Module, state: State) -> tuple[list[str], list[str]]:
    """Return the missing and the left-over names of a state dict, without buffers that have no effect at inference."""
    expected, buffers = net.state_dict(), dict(net.named_buffers())
    missing = [name for name in expected if name not in state and not (name in buffers and _is_optional(name))]
    surplus = [name for name in state if name not in expected and not _is_optional(name)]
    return sorted(missing), sorted(surplus)


def _name_candidates(state: State) -> Iterator[tuple[State, list[str]]]:
    """Yield the tensors under shorter and shorter names, with a note about the removed parts."""
    yield state, []
    removed = sorted({part for name in state for part in _INSERTED.findall(name)})
    if removed:
        state = {_INSERTED.sub("", name): value for name, value in state.items()}
        yield state, [f"{', '.join(map(repr, removed))} was removed from the names of the tensors"]
    while True:
        firsts = {name.partition(".")[0] for name in state if not _is_optional(name)}
        if len(firsts) != 1 or not all("." in name for name in state if not _is_optional(name)):
            return
        prefix = f"{firsts.pop()}."
        removed.append(prefix)
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        yield state, [f"{', '.join(map(repr, removed))} was removed from the names of the tensors"]


def _buffer_notes(expected: State, state: State) -> list[str]:
    """Return a note about buffers that are missing or left over."""
    names = sorted(expected.keys() ^ state.keys())
    if not names:
        return []
    suffix = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return [f"buffers without effect at inference are missing or left over: {names[0]}{suffix}"]


def _is_optional(name: str) -> bool:
    return name.rpartition(".")[2] in _OPTIONAL_BUFFERS


def _unwrap(content: Any, where: str) -> tuple[State, list[str]]:
    notes: list[str] = []
    while isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items()}, notes
        wrappers = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrappers:
            break
        ignored = f"; {', '.join(map(repr, wrappers[1:]))} is not" if wrappers[1:] else ""
        averaged = " (averaged weights)" if wrappers[0] in _AVERAGED else ""
        notes.append(f"{wrappers[0]!r}{averaged} of the checkpoint is used{ignored}")
        content = content[wrappers[0]]
    raise ModelError(f"{where} has no state dict: {_describe_content(content)}; save net.state_dict()")


def _describe_content(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it is {type(content).__name__}, not names with tensors"
    other_values = [
        f"{name!r} ({type(value).__name__})" for name, value in content.items() if not torch.is_tensor(value)
    ]
    if not other_values:
        return "it is empty"
    suffix = f" and {len(other_values) - _SHOWN} more" if len(other_values) > _SHOWN else ""
    beside = "among its tensors" if len(other_values) < len(content) else "and no tensors"
    return f"it has {', '.join(other_values[:_SHOWN])}{suffix} {beside}"


def _load(path: Path, where: str) -> Any:
    """Return the content of a file. Its format is recognised by the content, since names are often wrong."""
    start = require_weights(path, where)
    try:
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            from safetensors.torch import load_file

            return load_file(path)
        # An open file, since torch decides by the suffix of a path. Checkpoints of timm contain their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors have errors of their own
        raise _unreadable_error(path, where, error) from error


def require_weights(path: Path, where: str) -> bytes:
    """Raise if a file is of another kind; return its first bytes.

    Raises:
        ModelError: with the kind of the file.
    """
    with path.open("rb") as file:
        start = file.read(_MAX_TEXT)
    if not start:
        raise ModelError(f"{where} is empty")
    if kind := pointer(start):
        raise ModelError(f"{where} is {kind}")
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise ModelError(f"{where} is {kind}")
    if start.lstrip().lower().startswith(_MARKUP):
        raise ModelError(
            f"{where} is a web page, not weights: the download may have asked for a login; fetch the file again"
        )
    if len(start) < _MAX_TEXT and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        raise ModelError(f"{where} is a text file, not weights: {start[:60].decode()!r}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ModelError(
                    f"{where} is TorchScript, which is a program: save the state_dict() of its network instead"
                )
    return start


def _unreadable_error(path: Path, where: str, error: Exception) -> ModelError:
    """Return the error for a file that is not read. It names the classes that a pickle would import."""
    unsafe: list[str] = []
    if zipfile.is_zipfile(path):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # noqa: BLE001 - it only improves a message
            unsafe = []
    if unsafe:
        suffix = f" and {len(unsafe) - _SHOWN} more" if len(unsafe) > _SHOWN else ""
        problem = f"is a pickle with more than tensors ({', '.join(unsafe[:_SHOWN])}{suffix}), which is never loaded"
    else:
        problem = (
            "cannot be read as a state dict: it is truncated, or a pickle with more than tensors, which is never loaded "
            f"({(str(error).splitlines() or [repr(error)])[0][:200]})"
        )
    return ModelError(f"{where} {problem}; save net.state_dict() with safetensors or torch.save")
