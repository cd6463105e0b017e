"""Names and options of what compensates for a lossy codec. Read by the agent's daemon: nothing here loads numpy.

`wire.compensation` implements them. As with codecs, an option that the reader does not know is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta


class _Options(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="name"
):
    """What all methods have in common as values."""


class Uncompensated(_Options, frozen=True, kw_only=True, tag="none"):
    """What a codec leaves out is lost. For codecs that are exact, or right in expectation."""


class ErrorFeedbackOptions(_Options, frozen=True, kw_only=True, tag="error_feedback"):
    """The device adds what was left out to its next update."""


class EF21Options(_Options, frozen=True, kw_only=True, tag="ef21"):
    """Device and coordinator keep an estimate of the device's update; its correction travels."""


class EControlOptions(_Options, frozen=True, kw_only=True, tag="econtrol"):
    """The estimate of EF21, and error feedback of adjustable strength."""

    strength: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """Share of the residual that is fed back in a round."""


class DeepGradientOptions(_Options, frozen=True, kw_only=True, tag="deep_gradient"):
    """Error feedback whose leftovers gather momentum, clipping, and more entries in the first rounds."""

    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    """Across rounds."""
    clip: Annotated[float, Meta(ge=1, le=1000)] = 2.0
    """Times the running mean of its own lengths that a device's update may have."""
    warm_up_rounds: Annotated[int, Meta(ge=0, le=1000)] = 4
    """Rounds until a sparse codec's own fraction is reached."""


Compensation: TypeAlias = Uncompensated | ErrorFeedbackOptions | EF21Options | EControlOptions | DeepGradientOptions

CompensationName: TypeAlias = Literal["none", "error_feedback", "ef21", "econtrol", "deep_gradient"]

_BY_NAME: dict[CompensationName, Compensation] = {
    "none": Uncompensated(),
    "error_feedback": ErrorFeedbackOptions(),
    "ef21": EF21Options(),
    "econtrol": EControlOptions(),
    "deep_gradient": DeepGradientOptions(),
}


def find_compensation(choice: CompensationName | Compensation) -> Compensation:
    """What a settings file means by a name, or by a table with a name and options."""
    return _BY_NAME[choice] if isinstance(choice, str) else choice


def compensation_name(compensation: Compensation) -> str:
    """The method without its options."""
    return str(compensation.__struct_config__.tag)


def kept_states(compensation: Compensation) -> int:
    """float32 tensors that a device keeps between rounds for each of its model's that loses something."""
    match compensation:
        case Uncompensated():
            return 0
        case ErrorFeedbackOptions() | EF21Options():
            return 1
        case EControlOptions() | DeepGradientOptions():
            return 2


def keeps_memory(compensation: Compensation) -> bool:
    """Whether the coordinator, too, must keep tensors for each device between rounds."""
    return isinstance(compensation, EF21Options | EControlOptions)
