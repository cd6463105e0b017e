"""`[deployment]`: how a version is rolled out, and what a device's own check must show before it serves it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from reft_edge.wire.deployment import HealthRules, Share
from reft_edge.wire.messages import Name


class RuleSettings(HealthRules, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[deployment.rules]: the same as what devices are sent, but a mistyped key is an error."""


class DeploymentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values and defaults only."""

    canary: Share = 0.1
    """Share of the devices that are there which get a version first; at least one, and one of each model where that
    leaves as many to the rest."""
    canary_devices: tuple[Name, ...] = ()
    """Instead of a share: exactly these."""
    soak_s: Annotated[float, Meta(ge=0, le=604_800)] = 10.0
    """How long the canaries serve it before the rest is asked. A device tells within two seconds of the first
    request that fails, so ten seconds show what fails at once on devices that predict every few seconds. Whose
    predictions are rarer, or who watches confidence, should give it hours."""
    timeout_s: Annotated[float, Meta(gt=0, le=604_800)] = 600.0
    """For a device that is there, from being asked to its answer: it fetches, checks and switches in between."""
    max_failed_canaries: Share = 0.0
    """Share of the canaries that may refuse, fail or not answer before all of it is rolled back."""
    max_failed: Share = 0.2
    """Share of the rest that may refuse or fail. Those serve on what they served before."""
    latency_s: Annotated[float, Meta(gt=0)] | None = None
    """Goal for one sample. Devices get the best model that is predicted to meet it, and refuse one that does not, but
    for what `rules` say. Without a goal a device gets what it trained."""
    rules: RuleSettings = RuleSettings()

    @property
    def health_rules(self) -> HealthRules:
        """What devices are sent."""
        given = msgspec.structs.asdict(self.rules)
        if given["max_latency_s"] is None:
            given["max_latency_s"] = self.latency_s
        return HealthRules(**given)
