"""The loop and its services. Start reading at step.py."""
