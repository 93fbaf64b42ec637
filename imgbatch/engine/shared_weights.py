"""Ray: the weights of a model in Ray's object store, for the nodes of a cluster that cannot read them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from imgbatch.concurrency.polling import call_with_timeout
from imgbatch.models.directory import Network
from imgbatch.models.model import Model

if TYPE_CHECKING:
    import ray  # reads its variables when it is imported: `session.connected` sets them first


@dataclass(frozen=True, slots=True)
class ObjectStoreFolder:
    """A folder with one file, the weights. It can be read while the process that made it is connected to Ray."""

    _content: ray.ObjectRef[bytes] = field(repr=False)
    uri: str = "ray://weights"

    def at(self, name: str) -> str:
        """Return the URI of a name in this folder."""
        return f"{self.uri}/{name}"

    def read(self, name: str) -> bytes:
        """Return the weights."""
        import ray

        content: bytes = ray.get(self._content)
        return content


@contextmanager
def in_object_store(model: Model, call_s: float) -> Iterator[Model]:
    """Yield a model that every node can build, without writing to any store.

    Weights on a disk of this machine are put into Ray's object store for the block. Weights in a store are not copied.

    Args:
        call_s: the timeout in seconds.

    Raises:
        ClusterError: the cluster does not answer.
    """
    network: Any = model.network
    if not isinstance(network, Network) or not network.is_local:
        yield model
        return
    import ray

    content = call_with_timeout(partial(ray.put, network.weights()), call_s, "ray.put")
    yield replace(model, network=replace(network, folder=ObjectStoreFolder(content)))
