"""From logits to token ids: the cache of keys and values, the choice of the next id, and the loop around both."""
