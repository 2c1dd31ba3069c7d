"""Networks that are trained on top of a frozen model, and the commands that merge them."""
