"""The laws of a model's description: what breaks one is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokopt.runtime.format.check_links import check_links
from tokopt.runtime.format.check_programs import check_programs
from tokopt.runtime.format.check_schedule import check_schedule
from tokopt.runtime.format.check_states import check_states
from tokopt.runtime.format.fault import FormatError
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link
from tokopt.runtime.format.schedule import Schedule
from tokopt.runtime.format.signature import Signature
from tokopt.runtime.format.state import State

__all__ = ["FormatError", "check_format"]


def check_format(
    programs: Mapping[str, Signature],
    states: Sequence[State],
    links: Sequence[Link],
    schedule: Schedule,
    generation: Generation | None,
) -> None:
    """Raise FormatError, which names the place, for the first law that is broken."""
    check_programs(programs)
    check_states(programs, states)
    check_links(programs, links, schedule)
    check_schedule(programs, schedule, generation)
