"""Files that clients leave here, and batches: work in the background that outlives the server."""
