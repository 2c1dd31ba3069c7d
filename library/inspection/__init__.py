"""A dataset inspected before it is trained: every kind of fault, one small function each, and the report."""
