"""What turns image features into visual tokens."""
