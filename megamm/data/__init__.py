"""From conversations and pictures to batches. Imports no model: what it must know of one is an ImageFormat."""
