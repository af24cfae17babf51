"""Search for a scheme's free hyper-parameters: DR-UCB and Optuna's samplers, on a storage that workers share. Optuna is imported on use."""

from laconic.search.run import Found, SearchOptions, search, search_task

__all__ = ["Found", "SearchOptions", "search", "search_task"]
