"""Does it find backdoors, and does removing them work? See __main__.py."""
