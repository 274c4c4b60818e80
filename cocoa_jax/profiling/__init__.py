"""What a program costs on a named TPU slice: compiled without one, read from the compiler's own output."""
