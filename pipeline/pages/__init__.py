"""Pages of one file that need no network: what the pages of a store and of a comparison share."""
