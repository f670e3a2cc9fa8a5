"""States, links and schedules, as the artifact's manifest holds them; they live in the torch-free runtime."""

from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger, emits_tokens
from tokopt.runtime.format.signature import BATCH, DRAWING, find_role
from tokopt.runtime.format.state import Occupancy, State, slot_axis

__all__ = [
    "BATCH",
    "DRAWING",
    "Entry",
    "Generation",
    "Link",
    "Occupancy",
    "Port",
    "Schedule",
    "State",
    "Trigger",
    "emits_tokens",
    "find_role",
    "slot_axis",
]
