"""Where blocks are: the index in memory, its mirror in Redis, and vLLM's events as one more source."""
