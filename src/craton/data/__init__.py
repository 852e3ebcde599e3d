"""From files to batches: sources, rendering, shards, packing, and a loader whose order is a function of its seed."""
