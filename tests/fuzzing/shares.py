"""The names of all fuzzing targets. Apart from the targets, whose imports a coverage-guided engine must see happen."""

from __future__ import annotations

from collections.abc import Mapping

SHARES: Mapping[str, float] = {
    "message_status": 1.0,
    "message_profile": 1.0,
    "message_task": 1.0,
    "message_report": 1.0,
    "message_transfer": 1.0,
    "message_deployment": 1.0,
    "message_condition": 1.0,
    "envelope": 1.0,
    "key": 1.0,
    "block": 1.0,
    "topic": 1.0,
    "receiver": 0.4,
    "sender": 0.4,
    "frame": 1.0,
    "container": 1.0,
    "header": 1.0,
    "update": 1.0,
    "channel_map": 1.0,
    "manifest": 1.0,
    "bundle_folder": 1.0,
    "agent_toml": 0.5,
    "federation_toml": 0.5,
    "profile_toml": 0.5,
    "provisioning_toml": 0.5,
    "toml": 0.5,
    "spool_state": 1.0,
    "certificate": 1.0,
    "authority": 1.0,
    "revocations": 1.0,
    "private_key": 1.0,
    "enrolment": 1.0,
    "body_npy": 1.0,
    "body_picture": 0.5,
    "body_json": 1.0,
    "prediction_counts": 0.2,
    "slots": 0.2,
    "collecting": 0.1,
    "planning": 1.0,
}
"""Target -> how many of a run's inputs it gets beside the others; less for the slow ones."""
