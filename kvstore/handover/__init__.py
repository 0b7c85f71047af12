"""How a request's KV changes hands: the state machine (pure), and the verified read."""
