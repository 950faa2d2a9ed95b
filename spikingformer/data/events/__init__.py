"""Event-camera data: readers and writers, frames, data sets, augmentation, simulation, pictures of recordings."""

from .aedat20 import read_aedat20, write_aedat20
from .aedat31 import read_aedat31, write_aedat31
from .arrays import EVENT_DTYPE, EventFileError, crop_time, make_events, sort_by_time
from .event_set import EventFrames, EventParts, load_event_parts
from .frames import events_to_frames
from .nmnist_bin import read_nmnist, write_nmnist

__all__ = [
    "EVENT_DTYPE",
    "EventFileError",
    "EventFrames",
    "EventParts",
    "crop_time",
    "events_to_frames",
    "load_event_parts",
    "make_events",
    "read_aedat20",
    "read_aedat31",
    "read_nmnist",
    "sort_by_time",
    "write_aedat20",
    "write_aedat31",
    "write_nmnist",
]
