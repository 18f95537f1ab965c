"""Functions that re-measure claims of papers; a card names them, and their result files decide a claim's state."""
