"""Everything that touches a socket, a file, a clock or a third-party library; each module hides one library."""
