"""The rows of a run's files."""

DEMONSTRATION = "demonstration-"  # before its number, the id of a demonstration among made rows
