"""Values: HTML pages for people, each in one file without external resources."""
