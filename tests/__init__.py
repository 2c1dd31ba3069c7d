"""The tests, and the tiny models they share."""
