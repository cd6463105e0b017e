"""What the parts of one coordinator process share: made once by the server, handed to each part whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_edge.coordinator.catalogue import Catalogue
    from reft_edge.coordinator.deploying.standing import StandingDeployments
    from reft_edge.coordinator.events import Listener
    from reft_edge.coordinator.fleet import Fleet
    from reft_edge.coordinator.learning import Learner
    from reft_edge.coordinator.network import Network
    from reft_edge.coordinator.rejected import RejectedUpdates
    from reft_edge.coordinator.settings import FederationSettings
    from reft_edge.coordinator.store import Store
    from reft_edge.wire.blobs import BlobStore


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """One run, and everything that works on it. `clock` gives Unix time in seconds."""

    run: str
    settings: FederationSettings
    store: Store
    blobs: BlobStore
    catalogue: Catalogue
    learner: Learner
    network: Network
    fleet: Fleet
    standing: StandingDeployments
    rejected: RejectedUpdates
    listener: Listener
    clock: Callable[[], float]
