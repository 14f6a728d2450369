"""Pages and summaries of stores."""
