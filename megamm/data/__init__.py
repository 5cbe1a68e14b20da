"""From conversations and pictures to batches. Never imports models: what it must know of one comes as an ImageFormat."""
