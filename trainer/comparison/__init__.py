"""What a comparison's runs come to: read from their directories, paired, and kept as result.json."""
