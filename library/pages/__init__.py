"""Pages of HTML that need nothing but themselves: their look, and the parts that reports are made of."""
