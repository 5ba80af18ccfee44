"""Small-to-large transfer, and the speed that it needs. Nothing outside imports this."""
