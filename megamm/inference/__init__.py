"""Text out of a built model, at any layout."""
