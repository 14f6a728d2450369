"""Pages, charts and summaries of stores; the trainer's pages share their style."""
