"""Sums of which nobody sees a part: masks, shares of secrets, integers in place of weights, and the protocol made of them."""
