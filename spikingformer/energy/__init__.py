"""Operations and energy: counting (what happened) is separate from pricing (what it would cost)."""

from .comparison import AnnTwin, ann_twin
from .counting import OperationCounter, count_operations
from .facts import Facts, Kind
from .memory import MEMORY_MODELS, add_memory
from .pricing import PRESETS, Bill, Line, get_preset
from .rates import Rates
from .static import static_counts, with_rates

__all__ = [
    "MEMORY_MODELS",
    "PRESETS",
    "AnnTwin",
    "Bill",
    "Facts",
    "Kind",
    "Line",
    "OperationCounter",
    "Rates",
    "add_memory",
    "ann_twin",
    "count_operations",
    "get_preset",
    "static_counts",
    "with_rates",
]
