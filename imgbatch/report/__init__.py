"""Values: pages that a person reads, each one file with everything in it."""
