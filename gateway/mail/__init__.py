"""Messages: the header as raw slices, the body in memory or in a file, trace fields."""
