"""Search for a scheme's free hyper-parameters: DR-UCB and Optuna's samplers, on a storage that workers share. Optuna is
imported on use.
"""

from laconic.search.call import search, search_task
from laconic.search.options import SearchOptions
from laconic.search.run import Found

__all__ = ["Found", "SearchOptions", "search", "search_task"]
