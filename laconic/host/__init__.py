"""What laconic runs in: the process, its threads and ambient torch state, the machine, foreign code, progress."""
