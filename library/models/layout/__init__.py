"""Key tables of checkpoint files, both directions: data without logic."""
